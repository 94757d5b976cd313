"""Tokenizers of all kinds, and streams: the parts that come with the tokens join to the text."""

import base64
import json
import re
from pathlib import Path

import pytest
import tokenizers
from chat_table import write_pieces
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from support.data import train_tokenizer
from support.tokenizer import Stream, Tokenizer, visible

TEXT = "the quick brown fox jumps over the lazy dog and runs away from it all day long\n" * 50


def sentencepiece(path: Path, **options) -> Tokenizer:
    write_pieces(path, sentence_iterator=iter(TEXT.split("\n")), vocab_size=300, **options)
    return Tokenizer(path)


def ours(path: Path) -> Tokenizer:
    return train_tokenizer([TEXT], 290, path / "tokenizer.model")


def byte_level(path: Path) -> Tokenizer:
    """A byte-level BPE tokenizer.json with a BOS template, as Llama 3's."""
    model = tokenizers.Tokenizer(models.BPE())
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    alphabet, special = pre_tokenizers.ByteLevel.alphabet(), ["<bos>", "</s>"]
    how = dict(vocab_size=300, special_tokens=special, initial_alphabet=alphabet)
    model.train_from_iterator([TEXT, "漢字" * 20], trainers.BpeTrainer(**how))
    bos = [("<bos>", model.token_to_id("<bos>"))]
    model.post_processor = processors.TemplateProcessing("<bos> $A", special_tokens=bos)
    model.save(str(path / "tokenizer.json"))
    return Tokenizer(path)


def byte_fallback(path: Path) -> Tokenizer:
    """A tokenizer.json of characters and bytes, which decodes as that of Llama 2 does."""
    names = [f"<0x{byte:02X}>" for byte in range(256)] + list("▁thequickfox字\ufffd\n")
    vocabulary = {name: i for i, name in enumerate(dict.fromkeys(names))}
    model = tokenizers.Tokenizer(models.BPE(vocabulary, [], byte_fallback=True))
    model.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    model.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)])
    model.add_special_tokens(["<s>", "</s>"])
    model.save(str(path / "tokenizer.json"))
    return Tokenizer(path)


KINDS = {
    "Llama 2's": lambda path: sentencepiece(path, remove_extra_whitespaces=False),
    "sentencepiece that drops spaces": sentencepiece,
    "sentencepiece without a prefix": lambda path: sentencepiece(path, add_dummy_prefix=False),
    "ours": ours,
    "byte level": byte_level,
    "byte fallback": byte_fallback,
}


@pytest.fixture(scope="module", params=KINDS)
def tokenizer(request, tmp_path_factory) -> Tokenizer:
    return KINDS[request.param](tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def fast(tmp_path) -> Path:
    byte_level(tmp_path)
    return tmp_path


def streamed(tokenizer: Tokenizer, context: list[int], portions: list[list[int]]) -> list[str]:
    stream = Stream(tokenizer, context)
    return [*(stream.feed(portion) for portion in portions), stream.finish()]


def added(tokenizer: Tokenizer, context: list[int], ids: list[int]) -> str:
    """What decode(context + ids) has after decode(context)."""
    before, text = tokenizer.decode(context), tokenizer.decode(context + ids)
    same = (k for k in range(len(before), -1, -1) if text.startswith(before[:k]))
    return text[next(same) :]


@st.composite
def ids_of(draw, tokenizer: Tokenizer) -> list[int]:
    """Ids of texts, cut and torn apart anywhere, runs of one id, control ids, unknown ids."""

    def torn(text: str, start: int, place: int, count: int) -> list[int]:
        ids = tokenizer.encode(text)[start:]
        return ids[:-place] + count * control + ids[-place:]

    control = [0 if tokenizer.bos is None else tokenizer.bos]
    characters = st.sampled_from("the quick foxé漢字😀 \n\ufffd")
    texts = st.text(characters | st.characters(codec="utf-8")) | st.text("漢😀x", min_size=9)
    cuts = (st.integers(0, 6), st.integers(1, 9), st.integers(0, 9))
    one = st.integers(0, tokenizer.vocab_size + 3)
    runs = st.tuples(one, st.integers(1, 40)).map(lambda t: [t[0]] * t[1])
    pieces = st.builds(torn, texts, *cuts) | runs | st.lists(one, max_size=40)
    return [i for piece in draw(st.lists(pieces, max_size=8)) for i in piece]


def split(ids: list[int], sizes: list[int]) -> list[list[int]]:
    """ids in portions of these sizes, repeated; what is left comes at once."""
    portions, ids = [], list(ids)
    for size in sizes * (len(ids) + 1):
        portions.append(ids[:size])
        ids = ids[size:]
    return [*portions, ids]


@given(st.data())
def test_streamed_parts_join_to_the_text(tokenizer, draw):
    ids = draw.draw(ids_of(tokenizer))
    cut = draw.draw(st.integers(0, len(ids)))
    context, rest = ids[:cut], ids[cut:]
    portions = split(rest, draw.draw(st.lists(st.integers(0, 9), min_size=1, max_size=4)))
    assert "".join(streamed(tokenizer, context, portions)) == added(tokenizer, context, rest)


@given(st.text(st.sampled_from("the quick foxé漢字😀 \n"), min_size=1), st.data())
def test_a_stream_never_shows_half_a_character(tokenizer, text, draw):
    ids = tokenizer.encode(text)
    whole = [k for k in range(len(ids) + 1) if text.startswith(tokenizer.decode(ids[:k]))]
    cut = draw.draw(st.sampled_from(whole))
    parts = streamed(tokenizer, ids[:cut], [[i] for i in ids[cut:]])
    assert "\ufffd" not in "".join(parts)
    assert tokenizer.decode(ids[:cut]) + "".join(parts) == tokenizer.decode(ids)


# One byte after the other that is no text, and BOS alone, among them.
@pytest.mark.parametrize("text", ["the fox ", "漢😀", "the漢", "", "bos"])
def test_the_work_does_not_grow_with_the_text(tokenizer, monkeypatch, text):
    """Counts the ids that are decoded."""
    ids = tokenizer.encode(text or "漢", bos=False)
    ids = 200 * ids if text else 1000 * ids[-1:]
    if text == "bos":
        ids = 1000 * [tokenizer.bos or 0]
    stream, work, decode = Stream(tokenizer, ids), [0], tokenizer._decode
    monkeypatch.setattr(tokenizer, "_decode", lambda ids: (work.append(len(ids)), decode(ids))[1])
    parts = [stream.feed([i]) for i in ids]
    assert sum(work) < 50 * len(ids)
    assert "".join(parts) + stream.finish() == added(tokenizer, ids, ids)


def test_unknown_ids_have_no_text(tokenizer):
    ids = tokenizer.encode("the fox")
    unknown = [tokenizer.vocab_size, 10**6, -1]
    assert tokenizer.decode(ids + unknown) == tokenizer.decode(ids)
    with pytest.raises(ValueError):
        tokenizer.encode("a\ud83db")


# --------------------------------------
# Files


def test_tokenizer_json_gives_back_the_text(fast):
    tokenizer = Tokenizer(fast)
    ids = tokenizer.encode(" the  fox 漢😀\n")
    assert ids[0] == tokenizer.bos == 0 and tokenizer.decode(ids) == " the  fox 漢😀\n"
    assert tokenizer.encode("fox", bos=False) == tokenizer.encode("fox")[1:]
    assert tokenizer.eos == 1 and tokenizer.vocab_size > max(ids)


def test_truncation_and_padding_are_off(fast):
    plain = Tokenizer(fast)
    model = tokenizers.Tokenizer.from_file(str(fast / "tokenizer.json"))
    model.enable_truncation(4)
    model.enable_padding(length=16, pad_id=1, pad_token="</s>")
    model.save(str(fast / "tokenizer.json"))
    changed = Tokenizer(fast)
    assert changed.bos == plain.bos
    for text in ("", "a", "the quick brown fox jumps over the lazy dog"):
        assert changed.encode(text) == plain.encode(text)


def test_each_file_can_be_named_alone(fast):
    assert Tokenizer(fast / "tokenizer.json").bos == 0
    ours(fast)
    assert Tokenizer(fast / "tokenizer.model").vocab_size == 290


def test_tiktokens_format_is_told_apart(fast):
    ranks = "".join(f"{base64.b64encode(bytes([i])).decode()} {i}\n" for i in range(256))
    (fast / "tokenizer.model").write_text(ranks)
    assert Tokenizer(fast).bos == 0, "tokenizer.json beside it is used"
    (fast / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match="tiktoken"):
        Tokenizer(fast)


def refusal(path: Path) -> str:
    """What is said of a path without a usable tokenizer: one short line."""
    with pytest.raises(ValueError) as refused:
        Tokenizer(path)
    message = str(refused.value)
    assert message.isprintable() and 10 < len(message) < 600
    return message


@pytest.mark.parametrize("text", ["", '{"model": 3}', "[" * 10**5])
def test_a_file_that_is_no_tokenizer_is_one_line(tmp_path, text):
    assert "no tokenizer" in refusal(tmp_path / "nothing")
    (tmp_path / "tokenizer.json").write_text(text)
    assert "not a tokenizer" in refusal(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "tokenizer.model").write_bytes(b"no model" + text.encode())
    assert "not a sentencepiece model" in refusal(tmp_path) == refusal(tmp_path / "tokenizer.model")


@pytest.mark.parametrize("long", [True, False])
def test_a_fault_inside_tokenizer_json_is_one_line(fast, long):
    """The second makes the library panic, with an exception that is no Exception."""
    found = json.loads((fast / "tokenizer.json").read_text())
    if long:
        found["model"]["vocab"]["<bos>"] = "x\n\x1b" * 10**5
    else:
        found["post_processor"]["special_tokens"] = {}
    (fast / "tokenizer.json").write_text(json.dumps(found))
    refusal(fast)


# --------------------------------------
# Text on a terminal, prompts


@given(st.text() | st.text(st.characters(max_codepoint=0xA0)))
def test_visible_text_loses_nothing(text):
    shown = visible(text)
    assert not any(ord(c) < 32 or 127 <= ord(c) < 160 for c in shown if c not in "\n\t")
    plain = text.replace("\\", "/")  # a backslash of its own would be ambiguous
    assert re.sub(r"\\x(..)", lambda code: chr(int(code[1], 16)), visible(plain)) == plain
    sequences = "\x1b[2J\x07\x7f\x9b1m\r\nok\tö漢\u2028"
    assert visible(sequences) == "\\x1b[2J\\x07\\x7f\\x9b1m\\x0d\nok\tö漢\u2028"
