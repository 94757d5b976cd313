"""Text files as people have them, and what of them has a loss."""

import json
import os
from pathlib import Path
from tempfile import TemporaryDirectory

import hypothesis.strategies as st
import pytest
import torch
from helpers import write_rows
from hypothesis import given
from test_files_of_others import made

from support.data import IGNORED, Tokens, fingerprint, read_corpus, read_prompts, write_tokens
from support.tokenizer import Tokenizer
from support.train_command import conversations

ROW, BOM = '{"text": "a"}', "\ufeff"


def texts(*sources: Path) -> list[str]:
    return [d.text for d in read_corpus([str(source) for source in sources])]


@pytest.mark.parametrize("name", ["a.jsonl", "A.JSONL", "a.ndjson", "a.json", "b.Json"])
@pytest.mark.parametrize("mark", ["", BOM])
@pytest.mark.parametrize("folder", [False, True])
def test_rows_are_read_whatever_the_file_is_called_and_begins_with(tmp_path, name, mark, folder):
    (tmp_path / name).write_text(f"{mark}{ROW}\n\n{ROW}\n", encoding="utf-8")
    assert texts(tmp_path if folder else tmp_path / name) == ["a", "a"]


def test_a_json_file_may_be_an_array_of_rows(tmp_path):
    file = tmp_path / "a.json"
    file.write_text(f"{BOM}[{ROW},\n {ROW}]", encoding="utf-8")
    assert texts(file) == ["a", "a"]
    file.write_text('{\n"name": 1}')
    with pytest.raises(ValueError, match=r"a\.json, row 1 is not"):
        texts(file)


def test_prompts_are_rows_or_a_whole_file(tmp_path):
    rows, text = tmp_path / "a.JSONL", tmp_path / "a.py"
    first = {"prompt": "p", "reference": "r"}
    rows.write_text(f'{BOM}{json.dumps(first)}\n{{"text": "t"}}\n', encoding="utf-8")
    text.write_text(f"{BOM}x\n\ny\n", encoding="utf-8")
    assert read_prompts(rows) == [first, {"text": "t", "prompt": "t"}]
    assert read_prompts(text) == [{"prompt": "x\n\ny\n"}]
    for wrong, why in [("", "no prompt"), ('{"prompt": ""}', "row 1 is not"), ("[1]", "row 1")]:
        rows.write_text(wrong)
        with pytest.raises(ValueError, match=why):
            read_prompts(rows)
    with pytest.raises(ValueError, match="no file of prompts at"):
        read_prompts(tmp_path)


def test_a_byte_order_mark_is_no_text_and_a_name_need_not_be_utf8(tmp_path):
    file = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff.TXT"))
    file.write_text(f"{BOM}a", encoding="utf-8")
    assert texts(file, tmp_path) == ["a", "a"]


def test_a_directory_says_what_it_skips_and_hides_git(tmp_path):
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "HEAD").write_text("ref")
    (tmp_path / ".note").write_text("b")
    (tmp_path / "a.py").write_text("a")
    (tmp_path / "utf16.txt").write_text("a", encoding="utf-16")
    (tmp_path / "binary").write_bytes(b"a\0b")
    (tmp_path / "package.json").write_text('{\n"name": 1}')
    (tmp_path / "bytes.json").write_bytes(b"\xff")
    said: list[str] = []
    assert [d.text for d in read_corpus([str(tmp_path)], said.append)] == ["b", "a"]
    assert said == ["skipped 4 files that are not UTF-8 text"]


ROWS = [
    r'{"text": "a\ud800b"}',
    r'{"messages": [{"role": "user", "content": "\ud800"}]}',
    '{"messages": []}',
    '{"messages": [{"role": "user"}]}',
    '{"text": ["a"]}',
    "7",
    "{",
    "[" * 100_000,
]


@pytest.mark.parametrize("row", ROWS)
def test_a_row_that_cannot_be_used_is_named_by_file_and_row(tmp_path, row):
    (tmp_path / "e.jsonl").write_text(f"{ROW}\n\n{row}\n")
    with pytest.raises(ValueError, match=r"e\.jsonl, row 3 "):
        texts(tmp_path / "e.jsonl")


PIECES = [b"\xef\xbb\xbf", b"\0", b"\xff", b"\r\n", b"\n", b"[", b"]", b",", b" ", b"{", b"NaN"]
PIECES += [ROW.encode(), b'{"messages": [', b'{"role": "user", "content": "a"}', b"]}", b"1e999"]
PIECES += [b'{"prompt": "a", "completion": "b"}', rb'{"text": "\udfff"}', b'{"text": {}}', b"7"]
NAMES = ["a.jsonl", "a.json", "a.txt"]


@given(st.lists(st.sampled_from(PIECES), max_size=6), st.sampled_from(NAMES))
def test_any_bytes_are_documents_or_one_line_that_names_the_file(pieces, name):
    with TemporaryDirectory() as folder:
        file = Path(folder, name)
        file.write_bytes(b"".join(pieces))
        for source in (file, folder):
            try:
                found = list(read_corpus([str(source)]))
                assert fingerprint(found) == fingerprint(read_corpus([str(source)]))
            except ValueError as error:
                assert name in str(error) and len(str(error).splitlines()) == 1


def prepared(path: Path, rows: list[dict], tokenizer: Path) -> list[Tokens]:
    documents = read_corpus([str(write_rows(path / "rows.jsonl", rows))])
    return list(write_tokens(documents, Tokenizer(tokenizer), path, conversations(tokenizer)))


def test_each_crop_has_a_loss_where_prompts_are_long(tmp_path):
    rows = [{"prompt": "x" * 300 + str(i), "completion": " y"} for i in range(100)]
    for part in prepared(tmp_path, rows, made(tmp_path / "a")):
        seen = set()
        for step in range(200):
            x, y = part.crops(4, 8, 0, step)
            assert (y != IGNORED).any(1).all()
            assert torch.equal(x[:, 1:][y[:, :-1] != IGNORED], y[:, :-1][y[:, :-1] != IGNORED])
            seen |= {int((row != IGNORED).nonzero()[0]) for row in y}
        assert seen == set(range(8)), "at any place of a crop"


def test_data_without_any_loss_is_refused(tmp_path):
    rows = [{"messages": [{"role": "user", "content": str(i)}]} for i in range(200)]
    with pytest.raises(ValueError, match=r"nothing in train\.bin has a loss"):
        prepared(tmp_path, rows, made(tmp_path / "a"))


ENDLESS = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"


@pytest.mark.parametrize("template, end", [(None, "</s>"), (ENDLESS, "\n</s>")])
def test_of_a_conversation_the_answers_are_learned_and_how_they_end(tmp_path, template, end):
    path = made(tmp_path / "a", template) if template else made(tmp_path / "a")
    said = [("system", "s"), ("user", "q</s>"), ("assistant", "one"), ("user", "r")]
    said += [("assistant", "two")]
    messages = tuple(dict(role=role, content=text) for role, text in said)
    ids, learned = conversations(path)(messages)
    names = {256: "<s>", 257: "</s>"}
    show = lambda some: "".join(names.get(i) or Tokenizer(path).decode([i]) for i in some)
    assert show(ids).count("</s>") == (6 if template is None else 2), "the user's is no token"
    parts = "".join(show([i]) if keep else "\0" for i, keep in zip(ids, learned))
    runs = [part for part in parts.split("\0") if part]
    before = "assistant: " if template else ""  # this template has no generation prompt
    first = end.removesuffix("</s>") if template else end
    assert runs == [f"{before}one{first}", f"{before}two{end}"]
    assert ids[-1] == 257 and learned[-1]
