"""Memory and time of loading a checkpoint of Llama 3.2 1B's shape (2.5 GB of bfloat16, random, written to a temporary file).

    python tests/load_1b.py

Bounds: peak resident memory of a process that only loads, at most 1.15 times the weights; loading, at most twice the time
that reading the file into memory takes (file in the page cache, medians of five alternating runs, each in a new process, so
that both pay for fresh memory). Exit code 1 beyond a bound.
"""

import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import torch

LLAMA_32_1B = dict(
    model_type="llama", vocab_size=128256, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32,
    num_key_value_heads=8, head_dim=64, max_position_embeddings=131072, rms_norm_eps=1e-5, rope_theta=5e5, tie_word_embeddings=True,
    rope_scaling=dict(rope_type="llama3", factor=32.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192),
)  # fmt: skip

LOAD = """
import resource, sys, time
sys.path.insert(0, sys.argv[1])
from model import load_checkpoint
started = time.perf_counter()
model = load_checkpoint(sys.argv[2])
seconds = time.perf_counter() - started
print(seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, sum(p.nbytes for p in model.parameters()))
"""


def write_random(path: Path, config: dict) -> None:
    """Writes config.json and model.safetensors with random weights, a tensor at a time."""
    from model import Config, Llama

    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps(config))
    with torch.device("meta"):
        model = Llama(Config.from_json(json.dumps(config)))
    header, offset = {}, 0
    for name, p in model.named_parameters():
        header[name] = {"dtype": "BF16", "shape": list(p.shape), "data_offsets": [offset, offset + 2 * p.numel()]}
        offset += 2 * p.numel()
    text = json.dumps(header).encode()
    with open(path / "model.safetensors", "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for p in model.parameters():
            scale = 1.0 if p.dim() == 1 else p.shape[1] ** -0.5
            weight = torch.ones(p.shape) if p.dim() == 1 else torch.randn(p.shape) * scale
            file.write(weight.bfloat16().view(torch.int16).numpy().data)


READ = """
import pathlib, sys, time
started = time.perf_counter()
data = pathlib.Path(sys.argv[2], "model.safetensors").read_bytes()
print(time.perf_counter() - started)
"""


def figures(program: str, path: Path) -> list[float]:
    """What a new process prints that runs `program` on a checkpoint."""
    done = subprocess.run([sys.executable, "-c", program, str(ROOT), str(path)], capture_output=True, text=True, check=True)
    return [float(v) for v in done.stdout.split()]


def main() -> None:
    with tempfile.TemporaryDirectory() as path:
        path = Path(path)
        write_random(path, LLAMA_32_1B)
        figures(READ, path)
        runs = [(figures(READ, path), figures(LOAD, path)) for _ in range(5)]
    read = statistics.median(r[0] for r, _ in runs)
    loads = [load for _, load in runs]
    seconds, peak, weights = zip(*loads)
    seconds, peak, weights = statistics.median(seconds), max(peak), weights[0]
    print(f"{weights / 1e9:.2f} GB of weights: reading the file {read:.2f} s, loading {seconds:.2f} s ({seconds / read:.2f} times; at most 2)")
    print(f"peak resident memory {peak / 1e9:.2f} GB, {peak / weights:.3f} times the weights (at most 1.15)")
    raise SystemExit(seconds > 2 * read or peak > 1.15 * weights)


if __name__ == "__main__":
    main()
