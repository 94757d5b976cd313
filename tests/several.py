"""Decoding over several processes, drafted and plain, bit for bit.

    torchrun --nproc-per-node 2 tests/several.py                       random models, both layouts
    torchrun --nproc-per-node 3 tests/several.py --ckpt checkpoints/smollm2
    torchrun --nproc-per-node 2 tests/several.py --memory      of each process, on the 1B shape

A turn decodes a prompt plainly and with each drafter, greedy and sampled, in float32 and bfloat16;
of random models, a new one every turn. Prints the number of mismatches, tokens whose id or logits
differ from plain decoding's or between the processes, and how far the logits are from float64's;
exit code 1 where that is more than twice as far as the whole model's in one process. --memory: exit
code 1 where a process loads, packs and decodes in more than 1.15 times its share of weights, cache
and largest tensor.
"""

import argparse
import re
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import numpy as np
import torch
import torch.distributed as dist
from helpers import DRAFTERS, decode, differences, tiny_config, tiny_model
from test_loading import meta_config, write_meta

from bench.common import SHAPES, random_model
from bench.tasks import held_out_prompts
from decode import Sampling, generate
from exact import MAX_ROWS, pack
from extras.parallel import agreed, load_part, processes
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
    """The norm of the difference, relative to the norm of the truth."""
    return ((logits - truth).norm() / truth.norm()).item()


@torch.inference_mode()
def turn(
    path: Path, prompt: list[int], number: int, tokens: int, dtype: torch.dtype, device: Any = "cpu"
) -> Counter:
    """Totals of the runs after one prompt, in one type."""
    part, total = pack(load(load_part, path, dtype, device)), Counter()
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
        here = plain._replace(logits=plain.logits.cpu(), rounds=[])
        dist.all_gather_object(said, here)
        total["mismatches"] += sum(differences(one, here) for one in said)
        if dist.get_rank() == 0:
            known = torch.tensor([[*prompt, *plain.ids[:-1]]], device=device)
            whole, truth = (
                load(load_checkpoint, path, t, device)(known)[0, len(prompt) - 1 :].double()
                for t in (dtype, torch.float64)
            )
            total["error"] += error(plain.logits, truth)
            total["rounding"] += error(whole, truth)
    return total


@cache
def load(read: Callable[..., Llama], *what: Any) -> Llama:
    """read(*what), once."""
    return read(*what)


def resident(what: str) -> int:
    """Bytes of this process in memory: VmRSS now, VmHWM at most since the last reset."""
    found = re.search(what + r":\s+(\d+)", Path("/proc/self/status").read_text())
    return 1024 * int(found[1]) if found else 0


def memory(folder: Path) -> float:
    """The most memory of this process, beyond what it had before, relative to its share."""
    path = agreed(folder)
    if dist.get_rank() == 0:
        save_checkpoint(random_model(SHAPES["1b"], torch.bfloat16, torch.device("cpu")), path)
    dist.barrier()
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    part = load_part(path)
    c, sizes = part.config, [p.nbytes for p in part.parameters()]
    weights = sum(sizes) + part.lm_head.weight.nbytes  # packed, a tied head is there twice
    for _ in generate(pack(part), [1] * 2000, exit_layer=4, max_new_tokens=48):
        pass
    cache = 2 * c.n_layers * 2048 * c.n_kv_heads * c.head_dim * part.dtype.itemsize
    peak, share = resident("VmHWM") - before, weights + cache + max(sizes)
    found: list = [None] * dist.get_world_size()
    dist.all_gather_object(found, peak / share)
    print(f"{share / 1e9:.2f} GB a process; at most {max(found):.2f} times that", flush=True)
    return max(found)


def main() -> None:
    about = dict(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p = argparse.ArgumentParser(prog="several.py", **about)
    p.add_argument("--ckpt", type=Path)
    p.add_argument("--turns", type=int, default=25)
    p.add_argument("--tokens", type=int, default=30, help="of a run")
    p.add_argument("--device", default="cpu")
    p.add_argument("--memory", action="store_true")
    args = p.parse_args()
    totals: list[Counter] = [Counter() for _ in DTYPES]
    with command_errors(p.prog), processes(args), tempfile.TemporaryDirectory() as folder:
        if args.memory:
            raise SystemExit(memory(Path(folder)) > 1.15)
        count, random = dist.get_world_size(), np.random.default_rng(0)
        prompts = args.ckpt and held_out_prompts(40, Tokenizer(args.ckpt), 24)
        for number in range(args.turns):
            if args.ckpt:
                path, prompt = args.ckpt, prompts[number % len(prompts)]
            else:
                load.cache_clear()
                path, prompt = Path(folder) / str(number), random.integers(61, size=9).tolist()
                random_checkpoint(path, number, count)
            for total, dtype in zip(totals, DTYPES):
                total.update(turn(path, prompt, number, args.tokens, dtype, args.device))
            print(f"\r{number + 1} of {args.turns}", end="", file=sys.stderr, flush=True)
        runs, total = 2 * len(DTYPES) * args.turns, sum(totals, Counter())
        drift = max(t["error"] / (t["rounding"] or 1) for t in totals)  # 0 but in the first process
        print(
            f"\n{count} processes, {runs} runs of each of {len(WHO)} drafters, "
            f"{total['tokens']:,} tokens, {total['accepted']:,} of them drafted and accepted: "
            f"{total['mismatches']} mismatches; logits {drift:.2f} times as far from float64's"
        )
        raise SystemExit(total["mismatches"] > 0 or not drift <= 2)  # NaN is neither


if __name__ == "__main__":
    main()
