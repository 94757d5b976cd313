"""README.md: its commands parse and run, its Python blocks work, it quotes the code as it is.

Commands run as printed but for the options that RUN adds, in a folder of their own: what they write
goes there. A new command in the README must be added to RUN or, with a reason, to NOT_RUN.
"""

import argparse
import ast
import io
import re
import runpy
import shlex
import signal
import sys
import textwrap
import warnings
from pathlib import Path

import pytest
from conftest import ROOT
from helpers import config_option, corpus

from extras.drafters import parse_drafter
from support import decode_command, train_command
from support.console import load

README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.S | re.M)
SHORT = "--max-new-tokens 12"
SMALL = config_option(n_layers=2, dim=16, hidden_dim=32, n_heads=2, n_kv_heads=1, vocab_size=280)
TINY = "--data corpus --steps 30 --seq 32 --batch 2 --no-compile " + " ".join(SMALL)

RUN = {  # command: options that follow it here, so that it ends soon
    "python decode.py --compare --temperature 0.8 --top-p 0.9": SHORT,
    'python decode.py --prompt "def quicksort(" --exit 8 --draft 6': SHORT,
    "python decode.py --no-verify": SHORT,
    "python -m extras.trace --html page.html": SHORT,
    'python -m extras.lens --prompt "with open(path" --max-new-tokens 8 --png docs/lens.png': "",
    "python train.py --out runs/small --steps 500": TINY,
    "python decode.py --ckpt runs/small --compare": SHORT,
    "python -m extras.evaluate --data README.md --png exits.png": "--exits 6 --limit 1",
    "python -m extras.curves runs/small --png curves.png": "",
}
NOT_RUN = {  # command: why
    "python decode.py --compile --compare": "compiles for a minute",
    "python -m bench speedup --prompts 3 --runs 3 --tokens 128": "test_bench.py runs it, smaller",
    "python -m bench sweep --prompts-file prompts.jsonl --png sweep.png": "test_sweep.py does",
    "torchrun --nproc-per-node N decode.py": "test_parallel.py does",
    "make demo": "installs, then runs the first command",
    "make test": "runs this",
    "make parity": "needs transformers",
    "make real": "needs transformers and the real model, as do the next two",
    "python decode.py --ckpt checkpoints/smollm2 --chat --drafter lookup --compare --prompt "
    '"Repeat: 2, 3, 5, 7, 11, 13"': "",
    "python decode.py --ckpt checkpoints/smollm2 --chat --interactive": "",
    "make smollm2": "downloads; tests/real.py is about what it makes",
}


def commands(page: str) -> list[str]:
    """The commands of a page, in shell blocks and in inline code, in their order."""
    found = []
    for language, block in BLOCK.findall(page):
        if language == "sh":
            for line in block.replace("\\\n", " ").split("\n"):
                found.append(" ".join(shlex.split(line, comments=True, posix=False)))
    found += [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", BLOCK.sub("", page))]
    return list(dict.fromkeys(c for c in found if re.match("(python|make|torchrun) ", c)))


def run_command(command: str, monkeypatch) -> int:
    """Runs a python command in this process, which has imported PyTorch already; its exit code."""
    words = shlex.split(command)[1:]
    module = words[1] if words[0] == "-m" else None
    monkeypatch.setattr(sys, "argv", words[1:] if module else words)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(), encoding="utf-8"))
    interrupt = signal.getsignal(signal.SIGINT)
    try:
        if module:
            with warnings.catch_warnings():  # another test may have imported it already
                warnings.simplefilter("ignore", RuntimeWarning)
                runpy.run_module(module, run_name="__main__", alter_sys=True)
        else:
            script = Path(words[0]) if Path(words[0]).is_file() else ROOT / words[0]
            runpy.run_path(str(script), run_name="__main__")
    except SystemExit as stop:
        return int(stop.code or 0)
    finally:
        signal.signal(signal.SIGINT, interrupt)
    return 0


class Parsed(BaseException):
    """Stops a script once its command line is parsed."""


def parses(command: str, monkeypatch) -> bool:
    """Whether a command's script or target exists and takes its options."""
    words = shlex.split(command)
    if words[0] == "make":
        return bool(re.search(f"^{words[1]}:", (ROOT / "Makefile").read_text(), re.M))
    if words[0] == "torchrun":
        words[:4] = ["python", words[3]]
    file = ROOT / words[1]
    if words[1] == "-m":
        file = ROOT / words[2].replace(".", "/")
        file = file / "__main__.py" if file.is_dir() else file.with_suffix(".py")
    if not file.is_file():
        return False
    text = file.read_text(encoding="utf-8")
    if "parse_args" not in text and "_command import main" not in text:
        return len(words) == 2  # it takes no options, and would run
    parse = argparse.ArgumentParser.parse_args

    def parse_only(self, *given, **named):
        raise Parsed(parse(self, *given, **named))

    with monkeypatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", parse_only)
        try:
            run_command(shlex.join(words), patch)
        except Parsed:
            return True
        except ImportError as error:  # of a package that the tests do without
            return error.name == "transformers"
    return False


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder to run commands in."""
    path = corpus(tmp_path_factory.mktemp("readme")).parent
    (path / "docs").mkdir()
    (path / "README.md").write_text(README, encoding="utf-8")
    return path


def test_every_command_of_the_readme_is_listed():
    listed = [*RUN, *NOT_RUN]
    assert sorted(listed) == sorted(commands(README)), "add it to RUN, or to NOT_RUN with a reason"


def test_every_command_of_the_readme_parses(monkeypatch):
    assert [c for c in commands(README) if not parses(c, monkeypatch)] == []
    assert not parses("python decode.py --no-such-option", monkeypatch)
    assert not parses("python no_such_script.py", monkeypatch)
    assert not parses("make no-such-target", monkeypatch)


@pytest.mark.parametrize("command", RUN)
def test_commands_run(command, folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    if "runs/small" in command and not (folder / "runs" / "small").exists():
        train = next(c for c in RUN if "--out runs/small" in c)
        assert run_command(f"{train} {RUN[train]}", monkeypatch) == 0
    code = run_command(f"{command} {RUN[command]}", monkeypatch)
    out, err = capsys.readouterr()
    assert code == 0 and out + err, err
    if "--compare" in command:
        sample = next(code for language, code in BLOCK.findall(README) if "identical" in code)
        start, end = sample.strip().replace("256", "12").split("...")
        assert start in err and err.rstrip().endswith(end)
    if "--png" in command:
        assert (folder / "docs" / "lens.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("page", ["README.md", "docs/drafters.md", "docs/library.md"])
def test_the_python_blocks_of_a_page_work_one_after_the_other(page, monkeypatch, capsys):
    text = (ROOT / page).read_text(encoding="utf-8")
    blocks = [code for language, code in BLOCK.findall(text) if language == "python"]
    monkeypatch.chdir(ROOT)
    namespace = {"__name__": "readme"}
    for number, code in enumerate(blocks, 1):
        exec(compile(code, f"{page}, python block {number}", "exec"), namespace)
    assert len(capsys.readouterr().out) > 20


def test_the_loop_is_quoted_whole():
    code = (ROOT / "decode.py").read_text(encoding="utf-8")
    (function,) = (n for n in ast.parse(code).body if getattr(n, "name", "") == "generate")
    (start,) = (n.lineno for n in function.body if ast.unparse(n).startswith("prefill("))
    (end,) = (n.end_lineno for n in function.body if isinstance(n, ast.While))
    loop = "\n".join(code.split("\n")[start - 1 : end]) + "\n"
    (quoted,) = [block for language, block in BLOCK.findall(README) if language == "py"]
    assert quoted == textwrap.dedent(loop)


def test_every_option_of_the_readme_is_one_of_a_command():
    parsers = decode_command.parser(), train_command.parser()
    for span in re.findall(r"`(--[^`]+)`", BLOCK.sub("", README)):
        option, *value = span.split()
        (p, *_) = [p for p in parsers if option in p._option_string_actions]
        assert not value or p.parse_args(span.split())


def test_every_drafter_of_the_readme_is_known():
    model, _ = load(ROOT / "checkpoints" / "pystdlib")
    found = re.findall(r"`--drafter ([^`]+)`", README)
    assert len(found) > 4
    for text in found:
        if name := re.search("DIR|FILE", text):
            with pytest.raises((ValueError, OSError), match=name[0]):
                parse_drafter(text, model)
        else:
            assert parse_drafter(text, model)["drafter"]
