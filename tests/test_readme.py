"""README.md: every command parses, those that can run do run, every link leads somewhere, the Python blocks work.

Commands run as printed but for what the table RUN puts behind them, in a copy of the repository: what they write goes there.
A new command in the README must be added to RUN or, with a reason, to NOT_RUN.
"""

import argparse
import io
import json
import re
import runpy
import shlex
import shutil
import signal
import sys
from fnmatch import fnmatchcase
from pathlib import Path

import pytest
from conftest import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = ["README.md", "docs/walkthrough.md"]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.S | re.M)
SHORT = "--max-new-tokens 16"
FEW = "--tokens 16 --runs 1"
TINY = "--data corpus --dim 16 --hidden-dim 32 --heads 2 --kv-heads 1 --head-dim 8 --seq 32 --batch 2 --no-compile"

RUN = {  # command: options that follow it here, so that it ends soon
    'python decode.py --ckpt checkpoints/pystdlib --exit 8 --draft 6 --prompt "def quicksort(" --max-new-tokens 256': SHORT,
    "python decode.py --temperature 0.8 --top-p 0.9 --seed 7": SHORT,
    "python decode.py --full": SHORT,
    "python decode.py --no-verify": SHORT,
    "python decode.py --exit-confidence 0.9": SHORT,
    "python decode.py --interactive": SHORT,
    "python decode.py -": SHORT,
    "python decode.py --json": SHORT,
    "python decode.py --exit auto": SHORT,
    "python decode.py --keep-layers 0::2": SHORT,
    'python decode.py --lens --prompt "with open(path"': "--max-new-tokens 2",
    'python decode.py --prompt "with open(path" --max-new-tokens 8 --lens-png docs/lens.png': "--max-new-tokens 2",
    "python decode.py --trace": SHORT,
    "python decode.py --trace-json trace.json": SHORT,
    "python docs/round.py": "",
    "python bench.py memory": "--tokens 8",
    "python bench.py ideal": "--shape 8m --prompts 2 --tokens 16 --runs 1 --alphas 0.8",
    "python bench.py sweep": "--exits 6 --drafts 4 --prompts 4 --tokens 16",
    "python bench.py sweep --exits 2,3,4,6 --drafts 5,8,12 --min-confidence 0.2": "--drafts 5 --exits 3 --prompts 4 --tokens 16",
    "python bench.py speedup": FEW + " --prompts 2",
    "python bench.py drafters": FEW + " --prompts 1 --tries 2",
    "python bench.py auto": FEW + " --prompts 4 --exits 6 --drafts 4",
    "python bench.py coupling --prompts 8 --exits 3,6": "--prompts 2",
    "python kangaroo.py train --exit 2": "--data corpus --steps 2 --batch 2 --seq 32",
    "python train.py --out runs/small --minutes 10": TINY + " --minutes 0.02 --layers 2 --vocab 280",
    "python decode.py --ckpt runs/small --compare": SHORT,
    "python train.py --out runs/tuned --init runs/small --data pairs.jsonl --phase finetune": "--steps 2 --seq 32 --batch 2 --no-compile",
    "python train.py --out runs/pystdlib --steps 2700 --p-max 0.2 --dropout-time constant --exits 2,3,4,6,8,12,16,20 --rotation 2 "
    "--uniform-exits --e-scale 0.3 --lr 2e-3 --warmup 150 --save-every 300": TINY + " --steps 2 --layers 24 --vocab 280",
}
NOT_RUN = {  # pattern of commands: why
    "python decode.py --ckpt layerskip-*": "the weights are gated and up to 138 GB",
    "torchrun --nproc-per-node 8 *": "eight processes; test_resume.py trains with two",
    "python bench.py train --runs 3": "needs transformers, and minutes",
    "python bench.py peers*": "needs transformers",
    "python bench.py speedup *": "compiles 24 layers for a minute; test_cli.py compiles four; without --compile it runs, above",
    "python bench.py roofline --shape 1b *": "needs 2.5 GB, and compiles; test_bench.py makes that table of a small shape",
    "python bench.py ideal --dtype bfloat16 *": "the same",
    "python tests/load_1b.py": "writes 2.5 GB",
    "python decode.py --compile --compare": "compiles 24 layers for a minute; test_cli.py compiles four",
    "make demo": "installs; what it shows is decode.py --compare",
    "make test": "runs this",
    "make parity": "needs transformers; runs in CI",
    "make mutants": "minutes",
    "make soak": "half an hour",
    "make twins": "an hour",
}


def commands() -> list[str]:
    """The commands of README.md that start with python, make or torchrun: in shell blocks, and as inline code."""
    found = []
    for _, block in (b for b in BLOCK.findall(README) if b[0] in ("sh", "bash")):
        for line in block.replace("\\\n", " ").split("\n"):
            parts = shlex.split(line, comments=True, posix=False)
            for part in re.split(r" [;|] ", " ".join(parts)):
                found.append(part)
    found += [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", BLOCK.sub("", README))]
    return sorted({c.strip() for c in found if re.match(r"(python|make|torchrun) ", c)})


COMMANDS = commands()


class Parsed(BaseException):
    """Stops a script once its command line is parsed."""


def script_of(command: str) -> tuple[str, list[str]]:
    """The script of a command, relative to the root, and its arguments."""
    words = shlex.split(command)
    place = next(i for i, word in enumerate(words) if word.endswith(".py"))
    return words[place], words[place + 1 :]


def run_script(script: Path, args: list[str], monkeypatch, stdin: bytes = b"") -> int:
    """Runs a script as python would, but in this process, which has imported PyTorch already; its exit code."""
    monkeypatch.setattr(sys, "argv", [str(script), *args])
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin), encoding="utf-8"))
    interrupt = signal.getsignal(signal.SIGINT)
    try:
        runpy.run_path(str(script), run_name="__main__")
    except SystemExit as stop:
        return stop.code or 0
    finally:
        signal.signal(signal.SIGINT, interrupt)
    return 0


@pytest.fixture(scope="module")
def copy(tmp_path_factory) -> Path:
    """The repository with a small corpus, to write into."""
    path = tmp_path_factory.mktemp("readme") / "copy"
    path.mkdir()
    for file in [*ROOT.glob("*.py"), *(ROOT / "docs").glob("*")]:
        (path / file.relative_to(ROOT)).parent.mkdir(exist_ok=True)
        shutil.copyfile(file, path / file.relative_to(ROOT))
    (path / "checkpoints").symlink_to(ROOT / "checkpoints")
    (path / "corpus").mkdir()
    for number in range(60):  # a document's part, train or held out, is drawn by its name
        (path / "corpus" / f"{number}.py").write_text("def f(x):\n    return x + 1\n\n\n" * 20)
    pair = json.dumps({"prompt": "def f(x):\n", "completion": "    return x + 1\n"})
    (path / "pairs.jsonl").write_text(f"{pair}\n" * 200)
    return path


def test_every_command_of_the_readme_is_in_one_of_the_two_lists():
    assert len(COMMANDS) > 30
    listed = {c: (c in RUN) + any(fnmatchcase(c, pattern) for pattern in NOT_RUN) for c in COMMANDS}
    assert [c for c, times in listed.items() if times != 1] == [], "add the command to RUN, or to NOT_RUN with a reason"
    assert [c for c in RUN if c not in COMMANDS] == [], "no longer in the README"


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_parses(command, monkeypatch):
    if command.startswith("make "):
        assert re.search(rf"^{command.split()[1]}:", (ROOT / "Makefile").read_text(), re.M)
        return
    script, args = script_of(command)
    assert (ROOT / script).is_file()
    if "argparse" not in (ROOT / script).read_text():
        assert not args
        return
    parse = argparse.ArgumentParser.parse_args

    def parse_only(self, *given, **named):
        raise Parsed(parse(self, *given, **named))

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_only)
    with pytest.raises(Parsed):
        assert run_script(ROOT / script, args, monkeypatch) == 0, "the options are not the script's"


@pytest.mark.parametrize("command", RUN)
def test_commands_run(command, copy, monkeypatch, capsys):
    script, args = script_of(command)
    monkeypatch.chdir(copy)
    if "runs/small" in args and "--minutes" not in args and not (copy / "runs" / "small").exists():
        train = next(c for c in RUN if "--out runs/small" in c)
        assert run_script(copy / "train.py", script_of(train)[1] + shlex.split(RUN[train]), monkeypatch) == 0
    stdin = {"-": b"import os\n", "--interactive": b"import os\n\n"}.get(args[-1] if args else "", b"")
    code = run_script(copy / script, args + shlex.split(RUN[command]), monkeypatch, stdin)
    out, err = capsys.readouterr()
    assert code == 0, err
    assert out or err or script.startswith("docs/")


def test_the_drawing_of_a_round_is_the_one_that_its_script_draws(copy, monkeypatch):
    run_script(copy / "docs" / "round.py", [], monkeypatch)
    assert (copy / "docs" / "round.svg").read_text() == (ROOT / "docs" / "round.svg").read_text()


def test_the_python_blocks_work_one_after_the_other(monkeypatch, capsys):
    blocks = [code for language, code in BLOCK.findall(README) if language == "python"]
    assert len(blocks) >= 2
    monkeypatch.chdir(ROOT)
    namespace = {"__name__": "readme"}
    for number, code in enumerate(blocks, 1):
        exec(compile(code, f"README.md, python block {number}", "exec"), namespace)
    assert len(capsys.readouterr().out) > 20


def defined(name: str, file: Path) -> bool:
    return re.search(rf"^\s*(def|class) {name}\b|^{name}\b[^\n]* = ", file.read_text(encoding="utf-8"), re.M) is not None


def anchors(text: str) -> set[str]:
    """The anchors that GitHub gives to the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", BLOCK.sub("", text), re.M)
    return {re.sub(r"[^\w\- ]", "", h.replace("`", "").lower()).replace(" ", "-") for h in headings}


@pytest.mark.parametrize("page", PAGES)
def test_every_link_leads_to_a_file_and_every_function_named_in_one_is_there(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    links = re.findall(r"\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^)\s]+)\)", BLOCK.sub("", text))
    links = [(label, target) for label, target in links if not re.match(r"https?:", target)]
    assert len(links) > 2
    for label, target in links:
        path, _, anchor = target.partition("#")
        file = (ROOT / page).parent / path if path else ROOT / page
        assert file.exists(), target
        if anchor:
            assert anchor in anchors(file.read_text(encoding="utf-8")), target
        for name in re.findall(r"`(\w+)(?:\([^`]*\))?`", label) if file.suffix == ".py" else ():
            assert defined(name, file), f"{name} is not in {path}"
    for path, name in re.findall(r"([\w/]+\.py)::(\w+)", text):
        assert defined(name, ROOT / path), f"{path}::{name}"


def test_every_file_and_option_named_in_code_exists():
    """`model.py`, `docs/lens.png`; `--exit 6`: of some script here, or of a program that is not ours."""
    spans = " ".join(re.findall(r"`([^`]+)`", BLOCK.sub("", README)))
    for name in re.findall(r"(?<![\w/.*])((?:docs|tests|porting|checkpoints)/[\w./]+|\w+\.py)\b", spans):
        assert (ROOT / name).exists() or (ROOT / "tests" / name).exists(), name
    known = {"--nproc-per-node", "--local-dir", "--no-compile"}
    for script in ("decode.py", "train.py", "kangaroo.py", "bench.py"):
        known |= {f"--{name}" for name in re.findall(r'"(?:--)?([a-z][\w-]*)"', (ROOT / script).read_text())}
    assert [option for option in re.findall(r"(?<![\w-])--[a-z][\w-]*", README) if option not in known] == []
