"""Decoding over several processes. Real processes, real signals.

`make parallel` runs tests/several.py, the same comparison, for longer.
"""

import json
import os
import signal
import socket
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
PROCESSES.set_forkserver_preload(["test_parallel"])  # imports once


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
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    environment = {"WORLD_SIZE": str(count), "MASTER_ADDR": "localhost", "MASTER_PORT": port}
    started = []
    for rank in range(count):
        files = stdin, folder / f"{rank}.txt"
        process = PROCESSES.Process(
            target=child, args=(work, arguments, rank, environment, files), daemon=True
        )
        process.start()
        started.append(process)
    return started


def ends(processes: list, folder: Path, seconds: float = 120) -> tuple[list[int], list[str]]:
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
        totals = [several.turn(path, [3, 1, 4], 5, 40, dtype) for dtype in several.DTYPES]
    print(json.dumps([dict(total) for total in totals]))


# --------------------------------------
# The same text


@pytest.mark.parametrize("number", [0, 1])  # Hugging Face's layout, Meta's in two shards
def test_drafted_text_is_bitwise_plain_text_and_close_to_one_processs(tmp_path, number):
    several.random_checkpoint(tmp_path / "model", number, 2)
    codes, (said, nothing) = ends(start(tmp_path, compare, tmp_path / "model", 2), tmp_path)
    assert codes == [0, 0] and nothing == "", said
    for total in json.loads(said):
        assert total["tokens"] == 2 * 40 * len(several.WHO) and total["accepted"] > 40
        assert "mismatches" not in {k for k, v in total.items() if v}, total
        assert not total.get("beyond rounding"), total
