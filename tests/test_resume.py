"""Runs that are killed, stopped, refused by the disk or spread over processes, and go on.

Real processes, real signals.
"""

import json
import os
import random
import resource
import shutil
import signal
import socket
import time
from contextlib import suppress
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch
from helpers import SMALL, config_option
from safetensors.torch import load_file

from support import data, train_command
from support.runs import RunDirectory

PROCESSES = get_context("forkserver")
# Imports once; every run is still a process of its own.
PROCESSES.set_forkserver_preload(["support.train_command"])
STEPS = 24
COMMON = (
    f"--steps {STEPS} --save-every 3 --batch 4 --seq 32 --warmup 2 --no-compile --no-bf16 "
    "--p-max 0.6 --dropout-time constant --lr 3e-3"
).split() + config_option(**SMALL, vocab_size=400)


def child(options: list[str], log: Path, environment: dict, most_bytes: int | None) -> None:
    """Runs train.py's main in this process, with its messages in `log`."""
    import sys

    os.environ.update(environment)
    torch.set_num_threads(1)
    if most_bytes:
        resource.setrlimit(resource.RLIMIT_FSIZE, (most_bytes, most_bytes))
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(handle, 2)
    sys.argv = ["train.py", *options]
    train_command.main()


def start(out: Path, source: Path, environment=None, most_bytes=None, extra=()):
    """A process that runs train.py with these options."""
    options = ["--out", str(out), "--data", str(source), *COMMON, *extra]
    log = out.with_suffix(f".{(environment or {}).get('RANK', 0)}.log")
    process = PROCESSES.Process(target=child, args=(options, log, environment or {}, most_bytes))
    process.start()
    return process


def start_some(out: Path, source: Path, count: int) -> list:
    """A run over `count` processes, as torchrun starts them."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    common = {"WORLD_SIZE": str(count), "MASTER_ADDR": "localhost", "MASTER_PORT": port}
    ranks = map(str, range(count))
    return [start(out, source, common | {"RANK": r, "LOCAL_RANK": r}) for r in ranks]


def end(*processes, code: int = 0) -> None:
    for process in processes:
        process.join(600)
        assert process.exitcode == code


def stop(*processes, how=signal.SIGKILL) -> None:
    """Sends a signal to each, unless it has come to its end."""
    for process in processes:
        with suppress(ProcessLookupError):
            os.kill(process.pid, how)


def wait_for(condition, process) -> None:
    late = time.monotonic() + 200
    while not condition() and process.is_alive():
        assert time.monotonic() < late
        time.sleep(0.0005)


def step(out: Path) -> int:
    """The step of the saved state; 0 without one."""
    path = out / "state.safetensors"
    return RunDirectory(out, None).about(path)["step"] if path.exists() else 0


def losses(out: Path) -> list[dict]:
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [(row["step"], row["losses"]) for row in rows if "losses" in row]


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> tuple[Path, Path]:
    """The directory of an uninterrupted run, and its text."""
    root = tmp_path_factory.mktemp("whole")
    (root / "text").mkdir()
    for number, d in enumerate(data.read_files(data.stdlib_files()[:80])):
        (root / "text" / f"{number}.py").write_text(d.text)
    end(start(root / "run", root / "text"))
    assert [step for step, _ in losses(root / "run")] == list(range(1, STEPS + 1))
    return root / "run", root / "text"


@pytest.fixture
def run(whole, tmp_path) -> Path:
    """A directory for a new run that has its tokens already."""
    return prepared(whole[0], tmp_path / "run")


def prepared(whole: Path, out: Path) -> Path:
    out.mkdir()
    for name in ("data.json", "train.bin", "held_out.bin", "tokenizer.model"):
        shutil.copyfile(whole / name, out / name)
    return out


def assert_same_bits(one: Path, other: Path) -> None:
    a, b = (load_file(run / "state.safetensors") for run in (one, other))
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    assert (one / "model.safetensors").read_bytes() == (other / "model.safetensors").read_bytes()
    assert losses(one) == losses(other)


def assert_close(one: Path, other: Path) -> None:
    ours, theirs = losses(one), losses(other)
    assert [step for step, _ in ours] == [step for step, _ in theirs] == list(range(1, STEPS + 1))
    for (_, a), (_, b) in zip(ours, theirs):
        assert a == pytest.approx(b, rel=1e-4)
    a, b = load_file(one / "model.safetensors"), load_file(other / "model.safetensors")
    assert all(torch.allclose(a[name].float(), b[name].float(), atol=2e-3) for name in a)


def said(run: Path) -> str:
    """The last line of a run's messages."""
    text = run.with_suffix(".0.log").read_text()
    assert "Traceback" not in text
    return text.splitlines()[-1]


def steps_done(run: Path) -> int:
    metrics = run / "metrics.jsonl"
    return metrics.read_text().count("losses") if metrics.exists() else 0


def aside(run: Path) -> set[Path]:
    """Files that are, or were, being written beside their places."""
    return set(run.glob(".*.tmp"))


def test_a_killed_run_ends_with_the_same_bits(whole, run):
    """Kills at random times after a process's first step, and when it has begun to save."""
    chance, kills, in_save = random.Random(0), 0, 0
    for number in range(12):
        left = aside(run)
        process, begun = start(run, whole[1]), steps_done(run)
        if number % 3 < 2:
            wait_for(lambda: aside(run) - left and steps_done(run) > begun, process)
        else:
            wait_for(lambda: steps_done(run) > begun, process)
            time.sleep(chance.uniform(0, 0.05))
        stop(process)
        process.join()
        kills += process.exitcode == -signal.SIGKILL
        in_save += bool(aside(run) - left)
        if process.exitcode == 0:
            break
    assert kills >= 3 and in_save >= 1, f"{kills} kills, {in_save} during a save"
    end(start(run, whole[1]))
    assert_same_bits(run, whole[0])


def test_ctrl_c_saves_and_the_run_goes_on(whole, run):
    process = start(run, whole[1])
    wait_for(lambda: steps_done(run) >= 4, process)
    stop(process, how=signal.SIGINT)
    end(process, code=130)
    assert "the same command goes on" in said(run) and 4 <= step(run) < STEPS
    end(start(run, whole[1]))
    assert_same_bits(run, whole[0])


def test_a_compiled_run_goes_on_to_the_same_bits(whole, tmp_path):
    """Stopped before steps whose batches skip samples: other sizes than a run begins with."""
    one, other = prepared(whole[0], tmp_path / "one"), prepared(whole[0], tmp_path / "other")
    graphs = {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "graphs")}
    shape = config_option(**SMALL | dict(n_layers=2), vocab_size=400)  # fewer compile sooner
    compiled = dict(extra=("--compile", *shape), environment=graphs)
    end(start(one, whole[1], **compiled))
    while step(other) < STEPS:
        process, begun = start(other, whole[1], **compiled), steps_done(other)
        wait_for(lambda: steps_done(other) > begun + 12, process)
        stop(process, how=signal.SIGINT)
        process.join()
        assert process.exitcode in (0, 130)
    assert_same_bits(one, other)


HANDOVERS = [(1, signal.SIGKILL, 2), (2, signal.SIGKILL, 1), (2, signal.SIGINT, 2)]


@pytest.mark.parametrize("first, how, second", HANDOVERS)
def test_processes_train_as_one_however_many_go_on(whole, run, first, how, second):
    """Ctrl-C reaches one of them alone.

    Layer dropout of 0.6 on two samples each: often one process runs a layer alone.
    """
    processes = start_some(run, whole[1], first)
    wait_for(lambda: steps_done(run) >= 6, processes[0])
    if how == signal.SIGINT:
        stop(processes[1], how=how)
        end(*processes, code=130)
    else:
        stop(*processes)
    for process in processes:
        process.join()
    end(*start_some(run, whole[1], second))
    assert_close(run, whole[0])


def test_a_full_disk_leaves_the_last_state(whole, run):
    process = start(run, whole[1])
    wait_for(lambda: step(run) > 0, process)
    stop(process)
    process.join()
    before = (run / "state.safetensors").read_bytes()
    end(start(run, whole[1], most_bytes=100_000), code=2)
    assert said(run).startswith("train.py: ")
    assert (run / "state.safetensors").read_bytes() == before
    end(start(run, whole[1]))
    assert_same_bits(run, whole[0])


@pytest.mark.parametrize("sharded_first", [False, True])
def test_a_run_goes_on_with_torchrun_as_it_began(whole, tmp_path, sharded_first):
    run = shutil.copytree(whole[0], tmp_path / "run")
    if sharded_first:
        (run / "state.safetensors").rename(run / "state-shards")
    (process,) = [start(run, whole[1])] if sharded_first else start_some(run, whole[1], 1)
    end(process, code=2)
    assert "torchrun: go on with it that way" in said(run)


def test_pieces_of_a_batch_train_as_the_batch_does(whole, run):
    end(start(run, whole[1], extra=("--accumulate", "2")))
    assert_close(run, whole[0])
