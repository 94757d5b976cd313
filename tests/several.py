"""Decoding over several processes, drafted and plain, bit for bit.

    torchrun --nproc-per-node 2 tests/several.py                       random models, both layouts
    torchrun --nproc-per-node 3 tests/several.py --ckpt checkpoints/smollm2 --turns 25

A turn decodes a prompt plainly and with each drafter, greedy and sampled, in float32 and bfloat16;
of random models, a new one every turn. Prints the number of mismatches, tokens whose id or logits
differ from plain decoding's or between the processes, and how far the logits are from the whole
model's in one process; exit code 1 beyond its rounding.
"""

import argparse
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import numpy as np
import torch
import torch.distributed as dist
from helpers import DRAFTERS, decode, differences, tiny_config, tiny_model
from test_loading import meta_config, write_meta

from bench.tasks import held_out_prompts
from decode import Sampling
from exact import MAX_ROWS, pack
from extras.parallel import load_part, processes
from model import Llama, load_checkpoint, save_checkpoint
from support.console import command_errors
from support.tokenizer import Tokenizer

WHO = "early exit", "lookup", "lookup+exit", "jacobi", "lookahead"
DTYPES = torch.float32, torch.bfloat16


def random_checkpoint(path: Path, number: int, count: int) -> None:
    """A small model whose heads `count` processes can share, in one layout or the other."""
    kv_heads, tied = count * (1 + number % 2), number % 3 == 0
    if number % 2 and 4 % count == 0:
        model = tiny_model(meta_config(tied=tied), number, 1)
        return write_meta(model, path, shards=(1, 2, 4)[number % 3], embedding_dim=number % 3 % 2)
    shape = dict(n_heads=2 * kv_heads, n_kv_heads=kv_heads, hidden_dim=20 * count, tied=tied)
    save_checkpoint(tiny_model(tiny_config(**shape, max_len=4096), number, 2), path)


def error(logits: torch.Tensor, truth: torch.Tensor) -> float:
    """The largest difference, relative to the largest logit."""
    return ((logits - truth).abs().max() / truth.abs().max()).item()


@torch.inference_mode()
def turn(path: Path, prompt: list[int], number: int, tokens: int, dtype: torch.dtype) -> Counter:
    """Totals of the runs after one prompt, in one type."""
    part, total = pack(load(load_part, path, dtype)), Counter()
    for temperature in (0.0, 0.9):
        how: dict = dict(max_new_tokens=tokens, sampling=Sampling(temperature, seed=number))
        plain = decode(part, prompt, **how)
        for who in WHO:
            draft_len, e = 1 + number % (MAX_ROWS - 1), 1 + number % (part.config.n_layers - 1)
            text = decode(part, prompt, **how, draft_len=draft_len, **DRAFTERS[who](part, e))
            total["tokens"] += len(text.ids)
            total["accepted"] += sum(r.accepted for r in text.rounds)
            total["mismatches"] += differences(text, plain)
        said: list = [None] * dist.get_world_size()
        dist.all_gather_object(said, plain)
        total["mismatches"] += sum(differences(one, plain) for one in said)
        if dist.get_rank() == 0:
            known = torch.tensor([[*prompt, *plain.ids[:-1]]])
            alone, truth = (
                load(load_checkpoint, path, t)(known)[0, len(prompt) - 1 :].double()
                for t in (dtype, torch.float64)
            )
            total["beyond rounding"] += error(plain.logits, truth) > 4 * error(alone, truth) + 1e-6
    return total


@cache
def load(read: Callable, path: Path, dtype: torch.dtype) -> Llama:
    """The checkpoint as `read` gives it."""
    return read(path, dtype)


def main() -> None:
    about = dict(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p = argparse.ArgumentParser(prog="several.py", **about)
    p.add_argument("--ckpt", type=Path)
    p.add_argument("--turns", type=int, default=100)
    p.add_argument("--tokens", type=int, default=30, help="of a run")
    p.add_argument("--device", default="cpu")
    args = p.parse_args()
    total: Counter = Counter()
    with command_errors(p.prog), processes(args), tempfile.TemporaryDirectory() as folder:
        count, random = dist.get_world_size(), np.random.default_rng(0)
        prompts = args.ckpt and held_out_prompts(40, Tokenizer(args.ckpt), 24)
        for number in range(args.turns):
            if args.ckpt:
                path, prompt = args.ckpt, prompts[number % len(prompts)]
            else:
                load.cache_clear()
                path, prompt = Path(folder) / str(number), random.integers(61, size=9).tolist()
                random_checkpoint(path, number, count)
            for dtype in DTYPES:
                total += turn(path, prompt, number, args.tokens, dtype)
            print(f"\r{number + 1} of {args.turns}", end="", file=sys.stderr, flush=True)
        runs = 2 * len(DTYPES) * args.turns
        print(
            f"\n{count} processes, {runs} runs of each of {len(WHO)} drafters, "
            f"{total['tokens']:,} tokens, {total['accepted']:,} of them drafted and accepted: "
            f"{total['mismatches']} mismatches, {total['beyond rounding']} texts beyond rounding"
        )
    raise SystemExit(total["mismatches"] + total["beyond rounding"] > 0)


if __name__ == "__main__":
    main()
