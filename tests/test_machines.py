"""Machines and terminals that lack something, and people who press Ctrl-C."""

import io
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT
from helpers import decode, same_bits, tiny_model
from test_files_of_others import made

import exact
from decode import generate
from support import console, decode_command, train_command
from support.tokenizer import Tokenizer


def test_a_pytorch_without_onednn_decodes(monkeypatch):
    monkeypatch.setattr(torch.ops, "mkldnn", SimpleNamespace())
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert exact.auto_dtype(torch.device("cpu")) == torch.float32
    for dtype in (torch.float32, torch.bfloat16):
        model = exact.pack(tiny_model(damp_from=2, dtype=dtype))
        assert same_bits(decode(model, [1, 2], exit_layer=2), decode(model, [1, 2]))


@pytest.mark.parametrize("options, remedy", [
    ("decode.py --ckpt {0}/a", "leave out --compile"),
    ("train.py --init {0}/a --out {0}/o --data {0}/text.txt --seq 16 --batch 2",
     "give --no-compile"),
])  # fmt: skip
def test_a_compiler_that_fails_is_one_line(tmp_path, options, remedy):
    made(tmp_path / "a")
    (tmp_path / "text.txt").write_text("text " * 50_000)
    done = subprocess.run(
        [sys.executable, *options.format(tmp_path).split(), "--compile"],
        cwd=ROOT,
        env=os.environ | dict(CXX="/bin/false", TORCHINDUCTOR_CACHE_DIR=f"{tmp_path}/graphs"),
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout) == (2, "")
    *before, error = done.stderr.splitlines()
    assert f"the C++ compiler does not work: {remedy}" in error and "/bin/false" in error
    assert len(before) < 5 and "Traceback" not in done.stderr


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "utf-8"])
def test_text_that_an_encoding_lacks_is_escaped(monkeypatch, encoding):
    inside, text = io.BytesIO(), "a \N{LATIN SMALL LETTER E WITH ACUTE} \N{SNOWMAN} \ufffd \ud800"
    out = io.TextIOWrapper(inside, encoding)
    monkeypatch.setattr(sys, "stdout", out)
    with console.command_errors("x"):
        print(text)
    out.flush()
    assert inside.getvalue().strip() == text.encode(encoding, errors="backslashreplace")


@pytest.mark.parametrize("environment, colours", [
    ({}, True),
    ({"NO_COLOR": ""}, True),
    ({"NO_COLOR": "1"}, False),
    ({"TERM": "dumb"}, False),
])  # fmt: skip
def test_colours_are_for_terminals_that_have_them(tmp_path, monkeypatch, environment, colours):
    for name in ("NO_COLOR", "TERM"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    out = io.StringIO()
    out.isatty = lambda: True
    monkeypatch.setattr(sys, "stdout", out)
    show = console.Show(Tokenizer(made(tmp_path / "a")), [1], "prompt")
    show.put("text", console.GREEN)
    assert (console.GREEN in out.getvalue()) == colours


@pytest.mark.parametrize("module", [decode_command, train_command])
def test_help_shows_every_default(monkeypatch, module):
    monkeypatch.setenv("COLUMNS", "80")
    parser = module.parser()
    lines = parser.format_help().splitlines()
    assert len(lines) <= 50 and max(map(len, lines)) <= 100
    assert lines[-3] == "examples:" and all(line.startswith("  python ") for line in lines[-2:])
    for action in parser._actions:
        own = action.dest in ("exit", "draft_len", "min_confidence", "out")  # the checkpoint's
        if action.option_strings and action.nargs != 0 and not own:
            text = action.help % {"default": action.default}
            assert text.endswith(")"), action.dest
            if isinstance(action.default, int | float):
                assert text.endswith(f"({action.default:g})")


@pytest.mark.parametrize("module", [decode_command, train_command])
@pytest.mark.parametrize("options", ["--unknown x", "x", "--seed x", "--seed"])
def test_a_wrong_option_is_named_in_a_line(command, module, options):
    run = command(module.main, *options.split())
    usage, error = run.err.splitlines()
    assert run.code == 2 and usage.startswith("usage: ") and len(usage) < 80
    assert options.split()[0] in error and "choose from" not in error


def typed(monkeypatch, *lines: str) -> None:
    text = "".join(line + "\n" for line in lines).encode()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text)))


def test_ctrl_c_ends_an_answer_alone(tmp_path, monkeypatch, command):
    """And what was said until then is part of it."""
    asked = []

    def stop_the_first(model, ids, **settings):
        asked.append(ids)
        for number, r in enumerate(generate(model, ids, **settings)):
            if len(asked) == 1 and number == 2:
                raise KeyboardInterrupt
            yield r

    monkeypatch.setattr(decode_command, "generate", stop_the_first)
    typed(monkeypatch, "one", "two")
    options = "--chat --interactive --full --max-new-tokens 4 --dtype float32 --ckpt"
    run = command(decode_command.main, *options.split(), str(made(tmp_path / "a")))
    first, second = asked
    assert second[: len(first)] == first and len(second) > len(first) + 2
    assert "2 tokens" in run.err and "4 tokens" in run.err


def test_a_byte_order_mark_is_no_prompt(tmp_path, monkeypatch, command):
    typed(monkeypatch, "\ufeffdef f():")
    options = f"--ckpt {made(tmp_path / 'a')} --json --max-new-tokens 2 -"
    assert '"prompt": "def f():' in command(decode_command.main, *options.split()).out
