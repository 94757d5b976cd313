"""Decoding over several processes. Real processes, real signals.

`make parallel` runs tests/several.py, the same comparison, for longer.
"""

import json
import os
import signal
import subprocess
import sys
import time
from argparse import Namespace
from multiprocessing import get_context
from pathlib import Path

import pytest
import several
import torch
from conftest import ROOT
from helpers import tiny_config, tiny_model
from safetensors.torch import load_file, save_file
from test_loading import meta_config, write_meta

from extras import parallel
from model import save_checkpoint
from support import decode_command
from support.checkpoint import read_checkpoint

PROCESSES = get_context("forkserver")
# Imports once.
PROCESSES.set_forkserver_preload(["pytest", "hypothesis", "bench.common", "extras.parallel"])
STORES = []  # of torchrun, which outlive the processes


def child(work, arguments: tuple, rank: int, environment: dict, files: tuple[Path, Path]) -> None:
    """Runs work(*arguments) in this process of several, with its input and output in files."""
    os.environ.update(environment, RANK=str(rank), LOCAL_RANK=str(rank))
    torch.set_num_threads(1)
    for fd, file, flags in ((0, files[0], os.O_RDONLY), (1, files[1], os.O_CREAT | os.O_WRONLY)):
        os.dup2(os.open(file, flags), fd)
    os.dup2(1, 2)
    sys.stdin, sys.stdout, sys.stderr = (open(fd, mode) for fd, mode in enumerate(("r", "w", "w")))
    work(*arguments)


def start(folder: Path, work, *arguments, count: int = 2, stdin: Path = Path(os.devnull)) -> list:
    """Processes as torchrun starts them, which run work(*arguments)."""
    store = torch.distributed.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    STORES.append(store)
    environment = {"WORLD_SIZE": str(count), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    environment |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(store.port)}
    started = []
    for rank in range(count):
        files = stdin, folder / f"{rank}.txt"
        process = PROCESSES.Process(
            target=child, args=(work, arguments, rank, environment, files), daemon=True
        )
        process.start()
        started.append(process)
    return started


def ends(processes: list, folder: Path, seconds: float = 300) -> tuple[list[int], list[str]]:
    """Exit codes and what each process wrote; all must end in time."""
    end = time.monotonic() + seconds
    for process in processes:
        process.join(max(end - time.monotonic(), 0))
    codes = [process.exitcode for process in processes]
    assert None not in codes, codes
    return codes, [(folder / f"{rank}.txt").read_text() for rank in range(len(processes))]


def decode_py(*options: object) -> None:
    sys.argv = ["decode.py", *map(str, options)]
    decode_command.main()


def compare(path: Path, count: int) -> None:
    with parallel.processes(Namespace(device="cpu")):
        totals = [several.turn(path, [3, 1, 4], 5, 20, dtype) for dtype in several.DTYPES]
    print(json.dumps([dict(total) for total in totals]))


# --------------------------------------
# The same text


@pytest.mark.parametrize("number", [0, 1])  # Hugging Face's layout, Meta's in two shards
def test_drafted_text_is_bitwise_plain_text(tmp_path, number):
    several.random_checkpoint(tmp_path / "model", number, 2)
    codes, (said, nothing) = ends(start(tmp_path, compare, tmp_path / "model", 2), tmp_path)
    assert codes == [0, 0] and nothing == "", said
    for total in json.loads(said):
        assert total["tokens"] == 2 * 20 * len(several.WHO) and total["accepted"] > 20
        assert not total["mismatches"] and total["error"] < 3 * total["rounding"], total


# --------------------------------------
# Parts


@pytest.mark.parametrize("shards, embedding_dim", [(1, 0), (4, 1), (4, 0), (2, 1)])
def test_a_part_that_is_read_is_that_of_the_whole(tmp_path, shards, embedding_dim):
    write_meta(tiny_model(meta_config()), tmp_path / "meta", shards, embedding_dim)
    _, tensors = read_checkpoint(tmp_path / "meta")
    for stored in tensors.values():
        whole = stored.read()
        for dim, size in enumerate(whole.shape):
            for count in (1, 2, 4, 5):  # 5: as a vocabulary is split, in heads of 4 rows
                rows = -(-size // count // 4) * 4
                for first in range(0, size, rows):
                    part = stored.read(dim, first, first + rows)
                    assert torch.equal(part, whole.narrow(dim, first, min(rows, size - first)))


def test_parts_are_added_in_the_order_of_the_ranks(monkeypatch):
    parts = torch.randn(5, 7, 33)
    monkeypatch.setattr(parallel, "gathered", lambda part: parts)
    one_by_one = lambda parts: sum(parts[1:], parts[0])
    assert torch.equal(parallel.added(parts[2]), one_by_one(parts))
    assert not torch.equal(one_by_one(parts.flip(0)), one_by_one(parts))


# --------------------------------------
# The command


@pytest.fixture
def ckpt(tmp_path, shipped) -> Path:
    """A small checkpoint with the shipped tokenizer, for one process or two."""
    save_checkpoint(tiny_model(tiny_config(vocab_size=2048, max_len=1 << 17), 0, 2), tmp_path / "a")
    (tmp_path / "a" / "tokenizer.model").write_bytes((shipped / "tokenizer.model").read_bytes())
    return tmp_path / "a"


def test_the_first_process_reads_and_prints_for_all(ckpt, tmp_path):
    (tmp_path / "in").write_text("def f(x):\n\nclass A:\n")
    options = "--interactive --compare --max-new-tokens 9 --temperature 1 --ckpt".split()
    started = start(tmp_path, decode_py, *options, ckpt, stdin=tmp_path / "in")
    codes, (said, nothing) = ends(started, tmp_path)
    assert (codes, nothing) == ([0, 0], ""), said + nothing
    assert said.count("9 tokens, logits equal to the last bit") == 2
    assert said.count("decode.py: the prompt is empty") == 1


@pytest.mark.parametrize(
    "options, error",
    [
        ([], "3 processes do not divide the model's n_heads, 4"),
        (["--drafter", "skip:attn:1"], "--drafter is exit, lookup"),
        (["--seed", 7], "lm_head.weight holds NaN"),  # only the last process sees it
    ],
)
def test_what_cannot_run_is_one_line_and_ends_all(ckpt, tmp_path, options, error):
    if "NaN" in error:
        weights = load_file(ckpt / "model.safetensors")
        weights["lm_head.weight"][-1] = torch.nan
        save_file(weights, ckpt / "model.safetensors")
    count = 2 + error.startswith("3")
    started = start(tmp_path, decode_py, *options, "--ckpt", ckpt, count=count)
    codes, said = ends(started, tmp_path)
    (line,) = "".join(said).splitlines()
    assert line.startswith("decode.py: ") and error in line
    assert sorted(codes) == [0] * (count - 1) + [2]


@pytest.mark.parametrize("option", ["--compile", "--no-verify", "--drafter model:DIR"])
def test_options_that_need_the_whole_model_are_named(option):
    parallel.refuse(decode_command.parser().parse_args([]))
    with pytest.raises(ValueError, match=option.split()[0]):
        parallel.refuse(decode_command.parser().parse_args(option.split()))


@pytest.mark.parametrize("lost", [0, 1])
def test_a_process_that_is_killed_ends_the_others_with_one_line(ckpt, tmp_path, lost):
    options = "--max-new-tokens", 1 << 16, "--temperature", 4, "--full", "--ckpt", ckpt
    started = start(tmp_path, decode_py, *options)
    first = tmp_path / "0.txt"
    wait_for(lambda: first.exists() and first.stat().st_size > 20)
    os.kill(started[lost].pid, signal.SIGKILL)
    codes, said = ends(started, tmp_path)
    assert codes[lost] == -signal.SIGKILL and codes[1 - lost] == 2
    assert "".join(said).count("decode.py: another process was lost") == 1
    assert "Traceback" not in "".join(said)


@pytest.mark.parametrize("sent", [signal.SIGHUP, signal.SIGINT])
def test_a_closed_terminal_and_ctrl_c_end_torchrun(ckpt, tmp_path, sent):
    run = "-m torch.distributed.run --nproc-per-node 2 decode.py --full --temperature 4".split()
    options = ["--max-new-tokens", str(1 << 16), "--ckpt", str(ckpt)]
    with open(tmp_path / "out", "w") as out, open(tmp_path / "err", "w") as err:
        files: dict = dict(stdin=subprocess.PIPE, stdout=out, stderr=err)
        process = subprocess.Popen([sys.executable, *run, *options], cwd=ROOT, **files)
        try:
            wait_for(lambda: (tmp_path / "out").stat().st_size > 20)
            file = Path(f"/proc/{process.pid}/task/{process.pid}/children")
            workers = file.read_text().split()
            process.send_signal(sent)
            process.wait(300)
        finally:
            process.kill()
    assert len(workers) == 2 and not any(Path(f"/proc/{pid}").exists() for pid in workers)
    assert (tmp_path / "err").read_text().count("tokens/s") <= (sent == signal.SIGINT) * 2


def wait_for(condition) -> None:
    end = time.monotonic() + 300
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)
