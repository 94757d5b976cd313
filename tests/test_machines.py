"""Machines and terminals that lack something, and people who press Ctrl-C."""

import io
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT
from test_files_of_others import made

import exact
from decode import generate
from model import load_checkpoint
from support import console, decode_command, train_command
from support.tokenizer import Tokenizer


def command(*options: object, **environment: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of `python options`."""
    found = subprocess.run(
        [sys.executable, *map(str, options)],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )
    return found.returncode, found.stdout, found.stderr


def test_a_pytorch_without_onednn_decodes(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.ops, "mkldnn", SimpleNamespace())
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert exact.auto_dtype(torch.device("cpu")) == torch.float32
    for dtype in (torch.float32, torch.bfloat16):
        model = exact.pack(load_checkpoint(made(tmp_path / str(dtype)), dtype))
        drafted, plain = (
            [t for r in generate(model, [1, 2], exit_layer=e, max_new_tokens=8) for t in r.emitted]
            for e in (2, 0)
        )
        assert drafted == plain


@pytest.mark.parametrize("options", ["decode.py --ckpt A --compile", "train.py --compile TUNE"])
def test_a_compiler_that_fails_is_one_line(tmp_path, options):
    path = made(tmp_path / "a")
    (tmp_path / "text.txt").write_text("text " * 50_000)
    tune = f"--init {path} --out {tmp_path}/o --data {tmp_path}/text.txt --seq 16 --batch 2"
    words = options.replace("TUNE", tune).replace("A", str(path)).split()
    cache = {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "graphs")}
    code, out, said = command(*words, CXX="/bin/false", **cache)
    assert (code, out) == (2, "")
    *before, error = said.splitlines()
    remedy = "leave out --compile" if "decode" in options else "give --no-compile"
    assert f"the C++ compiler does not work: {remedy}" in error and "/bin/false" in error
    assert len(before) < 5 and "Traceback" not in said


def test_a_damaged_graph_is_made_again(tmp_path, monkeypatch):
    from extras import compiled

    monkeypatch.setattr(compiled, "cache_dir", lambda: tmp_path)
    model = load_checkpoint(made(tmp_path / "a"), torch.float32)
    x = torch.ones(2, 32)
    whole = compiled.Graphs(model, 1).unembed(x)
    sound = {file: file.read_bytes() for file in (tmp_path / "layerskip").rglob("*.*")}
    assert len(sound) == 4
    compilations = []

    def compile_again(file, *_):  # what compiling would write
        compilations.append(file)
        assert not file.exists(), "the damaged one is gone"
        for name in (file, file.with_suffix(".json")):
            name.write_bytes(sound[name])

    monkeypatch.setattr(compiled, "compile_graph", compile_again)
    for number, (file, length) in enumerate(zip(sound, (0, 9, 1000, 20_000)), 1):
        file.write_bytes(file.read_bytes()[: min(length, file.stat().st_size - 9)])
        for _ in range(2):
            assert torch.equal(compiled.Graphs(model, 1).unembed(x), whole)
        assert len(compilations) == 2 * number


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "latin-1", "utf-8"])
def test_text_that_an_encoding_lacks_is_written_as_escapes(monkeypatch, encoding):
    inside, text = io.BytesIO(), "a \N{LATIN SMALL LETTER E WITH ACUTE} \N{SNOWMAN} \ufffd \ud800"
    out = io.TextIOWrapper(inside, encoding)
    monkeypatch.setattr(sys, "stdout", out)
    with console.command_errors("x"):
        print(text)
    out.flush()
    assert inside.getvalue().decode(encoding).startswith("a ")
    expected = text.encode(encoding, errors="backslashreplace")
    assert inside.getvalue().strip() == expected


def test_an_answer_ends_whatever_the_output_can_show(tmp_path):
    path = made(tmp_path / "a")
    code, out, said = command(
        "decode.py", "--ckpt", path, "--max-new-tokens", 40, PYTHONIOENCODING="ascii:strict"
    )
    assert code == 0 and "40 tokens" in said and "\\" in out and out.isascii()


@pytest.mark.parametrize(
    "environment, colours",
    [
        ({}, True),
        ({"NO_COLOR": ""}, True),
        ({"NO_COLOR": "1"}, False),
        ({"NO_COLOR": "0"}, False),
        ({"TERM": "dumb"}, False),
        ({"TERM": "xterm", "NO_COLOR": ""}, True),
    ],
)
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
def test_help_fits_a_screen_and_shows_every_default(monkeypatch, module):
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
@pytest.mark.parametrize("options", ["--unknown x", "--unknown", "x", "--seed x", "--seed"])
def test_a_wrong_option_is_named_in_a_line(capsys, monkeypatch, module, options):
    monkeypatch.setattr(sys, "argv", ["prog", *options.split()])
    with pytest.raises(SystemExit) as stop:
        module.main()
    usage, error = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and usage.startswith("usage: ") and len(usage) < 80
    assert options.split()[0] in error and "choose from" not in error


def typed(monkeypatch, *lines: str) -> None:
    text = "".join(line + "\n" for line in lines).encode()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text)))


def test_ctrl_c_ends_an_answer_and_not_the_conversation(tmp_path, monkeypatch, capsys):
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
    path = made(tmp_path / "a")
    monkeypatch.setattr(sys, "argv", ["decode.py", *options.split(), str(path)])
    decode_command.main()
    first, second = asked
    assert second[: len(first)] == first and len(second) > len(first) + 2
    said = capsys.readouterr().err
    assert "2 tokens" in said and "4 tokens" in said


def test_ctrl_c_ends_a_single_answer_with_130(tmp_path, monkeypatch, capsys):
    def stop(*args, **settings):
        yield next(generate(*args, **settings))
        raise KeyboardInterrupt

    monkeypatch.setattr(decode_command, "generate", stop)
    path = made(tmp_path / "a")
    monkeypatch.setattr(sys, "argv", ["decode.py", "--ckpt", str(path), "--dtype", "float32"])
    with pytest.raises(SystemExit) as ended:
        decode_command.main()
    assert ended.value.code == 130 and "tokens/s" in capsys.readouterr().err


def test_a_prompt_from_a_file_with_a_byte_order_mark(tmp_path, monkeypatch, capsys):
    typed(monkeypatch, "\ufeffdef f():")
    path = made(tmp_path / "a")
    words = f"decode.py --ckpt {path} --json --max-new-tokens 2 -"
    monkeypatch.setattr(sys, "argv", words.split())
    decode_command.main()
    assert '"prompt": "def f():' in capsys.readouterr().out
