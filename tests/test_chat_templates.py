"""Chat templates run as transformers runs them, and their text is encoded in one piece.

tests/parity.py compares the ids of the whole table with transformers'.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from chat_table import CONVERSATIONS, KINDS, TEMPLATES, said
from conftest import ROOT
from test_machines import typed
from test_special_tokens import BOS, EOS, config, put, write_json, write_model, write_pieces
from tokenizers import Tokenizer as Backend
from tokenizers import models, pre_tokenizers

from extras.chat import CLOSE, OPEN, Chat
from support.decode_command import main

USER, HI = "{{ messages[0].content }}", said("hi")


def chat_of(path: Path, template: str, **names: object) -> Chat:
    """A chat of a byte-level tokenizer, whose bytes below 256 are ids in order of the alphabet."""
    write_json(path, BOS, EOS)
    config(path, **{"bos_token": BOS, "eos_token": EOS, "chat_template": template} | names)
    return Chat(path)


def letters(chat: Chat, text: str) -> list[int]:
    return chat.tokenizer.encode(text, bos=False)


# --------------------------------------
# One piece


def test_a_text_after_a_special_token_is_no_start(tmp_path):
    """Metaspace puts its space at the start of a text, not after BOS."""
    model = Backend(models.BPE({"<unk>": 0, "<s>": 1, "</s>": 2, "▁": 3, "h": 4, "i": 5}, []))
    model.pre_tokenizer = pre_tokenizers.Metaspace("▁", "first", False)
    model.add_special_tokens(["<s>", "</s>"])
    model.save(str(tmp_path / "tokenizer.json"))
    names = dict(bos_token="<s>", eos_token="</s>")
    config(tmp_path, chat_template="{{ bos_token }}" + USER + "{{ eos_token }}", **names)
    assert Chat(tmp_path).ask("hi") == [1, 4, 5, 2]
    config(tmp_path, chat_template=USER, **names)
    assert Chat(tmp_path).ask("hi") == [3, 4, 5]
    assert Chat(tmp_path).ask("i</s>h")[:2] == [3, 5] and Chat(tmp_path).ask("i</s>h")[-1] == 4


@pytest.mark.parametrize("legacy, first", [(False, "t"), (True, "▁t"), (None, "t")])
def test_a_sentencepiece_model_puts_its_space_at_the_start_or_everywhere(tmp_path, legacy, first):
    write_pieces(tmp_path)
    found = {} if legacy is None else {"legacy": legacy}
    config(tmp_path, chat_template="{{ bos_token }}" + USER, **found)
    chat = Chat(tmp_path)
    pieces = [chat.tokenizer.file.model.id_to_piece(i) for i in chat.ask("t</s>t")]
    assert pieces[:2] == ["<s>", first] and pieces[-1] == "t"


@pytest.mark.parametrize("kind", KINDS)
def test_special_tokens_come_from_the_template_alone(tmp_path, kind):
    """As many as with messages that name none."""
    KINDS[kind](tmp_path)
    for template in TEMPLATES.values():
        (tmp_path / "chat_template.jinja").write_text(template, encoding="utf-8")
        chat = Chat(tmp_path)
        ids = {chat.tokenizer.added[text] for text in chat.tokenizer.special}

        def special(messages):
            chat.messages = messages[:-1]
            return [i for i in chat.ask(messages[-1]["content"]) if i in ids]

        for title, messages in CONVERSATIONS.items():
            if "special" in title:
                assert special(messages) == special([m | dict(content="a") for m in messages])


def test_a_piece_of_the_model_that_a_template_uses_is_guarded_too(tmp_path):
    """A user-defined symbol is found in any text, so it is cut apart."""
    write_pieces(tmp_path, user_defined_symbols=["<|im_end|>"])
    listed = {"3": {"content": "<|im_end|>"}}
    config(tmp_path, chat_template=USER + "<|im_end|>", added_tokens_decoder=listed)
    chat = Chat(tmp_path)
    *ids, end = chat.ask("the<|im_end|>fox")
    assert end == 3 not in ids and chat.tokenizer.decode(ids) == "the<|im_end|>fox"


def test_marks_in_messages_change_no_special_token(tmp_path):
    chat = chat_of(tmp_path, USER)
    for text in (f"a{CLOSE}{EOS}{OPEN}", f"{OPEN}{EOS}{CLOSE}", f"<|end{OPEN}_of_text|>"):
        assert 257 not in chat.ask(text)
    chat = chat_of(tmp_path, "{% for m in messages %}{{ m.content }}" + EOS + "{% endfor %}")
    chat.keep(f"x{OPEN}", f"{CLOSE}y")
    assert chat.ask("z").count(257) == 3, "nor to turn the template's own into text"


# --------------------------------------
# The environment


@pytest.mark.parametrize(
    "template, text",
    [
        ("{{ bos_token }}" + USER, "hi"),
        ("{{ tools is none and documents is none }}", "True"),
        ("{{ bos_token is defined }}{{ pad_token is defined }}", "FalseFalse"),
        ("a\n{%- generation -%}\n{{ messages[0].role }}\n{%- endgeneration -%}\nb", "auserb"),
        ("{% set x = 1 %}{% generation %}{% set x = 2 %}{{ x }}{% endgeneration %}{{ x }}", "21"),
        ("{{ messages|tojson(ensure_ascii=False, indent=2) }}", json.dumps(HI, indent=2)),
        ("{{ '<é&' | tojson }}{{ 'é' | tojson(ensure_ascii=true) }}", '"<é&""\\u00e9"'),
        ("{{ {'b': 1, 'a': 2} | tojson(separators=(',', ':'), sort_keys=true) }}", '{"a":2,"b":1}'),
        ("{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}", "01"),
    ],
)
def test_a_template_has_what_transformers_gives_it(tmp_path, template, text):
    chat = chat_of(tmp_path, template, bos_token=None)
    assert chat.render(HI, add_generation_prompt=True) == text


def test_the_names_of_a_sentencepiece_model_are_its_own_unless_the_config_says_none(tmp_path):
    write_pieces(tmp_path)
    template = "{{ bos_token }}|{{ eos_token }}|{{ unk_token }}"
    config(tmp_path, chat_template=template)
    assert Chat(tmp_path).render(HI) == "<s>|</s>|<unk>"
    config(tmp_path, chat_template=template, bos_token=None, eos_token="<|end|>")
    assert Chat(tmp_path).render(HI) == "|<|end|>|<unk>"


def test_a_template_is_utf8_in_any_locale(tmp_path):
    write_json(tmp_path, BOS, EOS)
    write_model(tmp_path, 258)
    (tmp_path / "chat_template.jinja").write_bytes("é{{ messages[0].content }}".encode())
    words = ["decode.py", "--ckpt", tmp_path, "--chat", "--prompt", "hi", "--max-new-tokens", "2"]
    plain = dict(LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0", OMP_NUM_THREADS="1")
    how: dict = dict(env=os.environ | plain, capture_output=True, cwd=ROOT)
    run = subprocess.run([sys.executable, *words, "--json"], **how)
    assert run.returncode == 0, run.stderr
    chat = Chat(tmp_path)
    assert json.loads(run.stdout)["settings"]["prompt_ids"] == letters(chat, "éhi")


def test_a_template_may_take_one_message_alone(tmp_path):
    one = "{% if messages[1] %}{{ raise_exception('one alone') }}{% endif %}" + USER
    chat = chat_of(tmp_path, one)
    assert chat.ask("hi") == letters(chat, "hi") and chat.ends == ()
    chat.keep("hi", "a")
    with pytest.raises(ValueError, match="one alone"):
        chat.ask("hi")


# --------------------------------------
# Long conversations

TURNS = "{% for m in messages %}[{{ m.role[0] }}]{{ m.content }}{{ eos_token }}{% endfor %}"


def test_the_oldest_turns_go_when_the_room_is_full_and_the_system_message_stays(tmp_path, capsys):
    chat_of(tmp_path, TURNS)
    chat = Chat(tmp_path, system="S", room=30)
    for number in range(4):
        text = str(number)
        ids = chat.ask(text)
        assert len(ids) <= 30 and chat.tokenizer.decode(ids).startswith("[s]S[u]")
        chat.keep(text, "answer")
        note = capsys.readouterr().err
        assert ("oldest" in note) == (number > 1) and note.count("\n") == (number > 1)
    assert [m["content"] for m in chat.messages] == ["S", "2", "answer", "3", "answer"]
    chat.reset()
    assert chat.ask("x") == [*letters(chat, "[s]S"), 257, *letters(chat, "[u]x"), 257]
    long = chat.ask("y" * 99)
    assert len(long) > 30, "one message too long for the room is left to the model's own refusal"


def decoded(command, path: Path, *options: str) -> list[dict]:
    """What decode.py says of each line that was typed, in JSON."""
    words = "--dtype float32 --interactive --json --ckpt".split()
    run = command(main, *words, str(path), *options)
    assert run.code == 0, run.err
    return [json.loads(line) for line in run.out.splitlines()]


def test_a_conversation_goes_on_for_an_hour(tmp_path, command, monkeypatch):
    chat_of(tmp_path, TURNS)
    write_model(tmp_path, 258, eos=())
    put(tmp_path, "generation_config.json", eos_token_id=[])
    typed(monkeypatch, *(f"message {i}" for i in range(5)))
    runs = decoded(command, tmp_path, "--chat", "--system", "be kind", "--max-new-tokens", "90")
    assert len(runs) == 5 and all(run["ids"] for run in runs)
    for i, run in enumerate(runs):
        prompt = Chat(tmp_path).tokenizer.decode(run["settings"]["prompt_ids"])
        assert prompt.startswith("[s]be kind[u]") and prompt.endswith(f"message {i}")
    assert "message 0" not in prompt, "the room was full"


def test_reset_begins_anew_and_is_text_without_chat(tmp_path, command, monkeypatch):
    chat_of(tmp_path, TURNS)
    write_model(tmp_path, 258)
    few = "--max-new-tokens", "3"
    typed(monkeypatch, "a", "/reset", "a", "b")
    runs = decoded(command, tmp_path, *few, "--chat", "--system", "S")
    first, again, more = (run["settings"]["prompt_ids"] for run in runs)
    assert first == again and more[: len(first)] == first
    typed(monkeypatch, "/reset")
    (run,) = decoded(command, tmp_path, *few)
    assert run["settings"]["prompt"] == "/reset"


def test_a_system_message_needs_a_chat_and_a_template_that_takes_it(tmp_path, command):
    chat_of(tmp_path, "{{ raise_exception('no system') if messages[0].role == 'system' }}x")
    write_model(tmp_path, 258)
    for options, reason in (([], "add --chat"), (["--chat"], "refuses this: no system")):
        run = command(main, "--ckpt", str(tmp_path), "--system", "S", *options)
        assert run.code == 2 and not run.out and reason in run.err and run.err.count("\n") == 1
