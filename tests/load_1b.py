"""Memory and time of loading a checkpoint of Llama 3.2 1B's shape.

    python tests/load_1b.py

It writes 2.5 GB of random bfloat16 to a temporary directory. Bounds: peak resident memory of a
process that only loads, at most 1.15 times the weights; loading, at most twice the time of reading
the file. (It is in the page cache. Medians of five alternating runs, each in a new process, so that
both pay for fresh memory.) Exit code 1 beyond a bound.
"""

import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import torch

from bench.common import SHAPES, random_model
from model import save_checkpoint

# Not ru_maxrss, which a process takes over from the one that started it.
LOAD = r"""
import re, sys, time
sys.path.insert(0, sys.argv[1])
from model import load_checkpoint
started = time.perf_counter()
model = load_checkpoint(sys.argv[2])
seconds = time.perf_counter() - started
resident = int(re.search(r"VmHWM:\s+(\d+)", open("/proc/self/status").read())[1])
print(seconds, 1024 * resident, sum(p.nbytes for p in model.parameters()))
"""

READ = """
import pathlib, sys, time
started = time.perf_counter()
data = pathlib.Path(sys.argv[2], "model.safetensors").read_bytes()
print(time.perf_counter() - started)
"""


def figures(program: str, path: str) -> list[float]:
    """What a new process prints that runs `program` on a checkpoint."""
    command = [sys.executable, "-c", program, str(ROOT), path]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return [float(v) for v in done.stdout.split()]


def main() -> None:
    with tempfile.TemporaryDirectory() as path:
        model = random_model(SHAPES["1b"], torch.bfloat16, torch.device("cpu"))
        save_checkpoint(model, path)
        figures(READ, path)
        runs = [(figures(READ, path), figures(LOAD, path)) for _ in range(5)]
    read = statistics.median(reading[0] for reading, _ in runs)
    times, peaks, sizes = zip(*(loading for _, loading in runs))
    seconds, peak, weights = statistics.median(times), max(peaks), sizes[0]
    print(f"{weights / 1e9:.2f} GB of weights: reading {read:.2f} s, loading {seconds:.2f} s")
    print(f"loading takes {seconds / read:.2f} times as long as reading; at most 2")
    print(f"peak resident memory is {peak / weights:.3f} times the weights; at most 1.15")
    raise SystemExit(seconds > 2 * read or peak > 1.15 * weights)


if __name__ == "__main__":
    main()
