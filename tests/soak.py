"""The long run: drafted against plain decoding of the shipped checkpoint, bit for bit.

    python tests/soak.py                            20,000 greedy and 20,000 sampled tokens
    python tests/soak.py --tokens 100000 --dtype float32 --how sampled

Exits, draft lengths, confidence stops and samplings are drawn at random. Prints one line with the
number of mismatches; exit code 1 if there are any.
"""

import argparse
import sys
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np
import torch

from bench.tasks import held_out_prompts
from decode import Sampling, generate
from exact import MAX_ROWS, pack
from model import Llama
from support.console import DEFAULT_CKPT, DTYPES, command_errors, load


def soak(model: Llama, prompts: list[list[int]], count: int, sampled: bool, seed: int) -> Counter:
    """Totals of at least `count` drafted-and-verified tokens, each held against plain decoding.

    Each prompt is decoded plainly once, to the end of the context, and four times with another exit
    and draft length. A mismatch is a token whose id or logits differ, or that one side lacks.
    """
    random, total = np.random.default_rng(seed), Counter(tokens=0)
    while total["tokens"] < count:
        prompt = prompts[random.integers(len(prompts))][: random.integers(1, 65)]
        sampling = Sampling(
            float(random.uniform(0.2, 1.2)) if sampled else 0.0,
            int(random.choice([0, 40])),
            float(random.choice([1.0, 0.9])),
            int(random.integers(1 << 32)),
        )
        common = dict(max_new_tokens=model.config.max_len, sampling=sampling, eos=())
        full = list(generate(model, prompt, **common))
        plain, logits = [r.emitted[0] for r in full], torch.cat([r.logits for r in full])
        for _ in range(4):
            how = dict(
                exit_layer=int(random.integers(1, model.config.n_layers)),
                draft_len=int(random.integers(1, MAX_ROWS)),
                min_confidence=float(random.choice([0.0, 0.3])),
            )
            rounds = list(generate(model, prompt, **how, **common))
            ids = [token for r in rounds for token in r.emitted]
            rows = torch.cat([r.logits for r in rounds])
            same_bits = (rows[: len(logits)] == logits[: len(rows)]).all(-1).tolist()
            same = sum(a == b and equal for a, b, equal in zip(ids, plain, same_bits))
            total["mismatches"] += max(len(ids), len(plain)) - same
            total["tokens"] += len(ids)
            total["runs"] += 1
            total["drafted"] += sum(len(r.drafted) for r in rounds)
            total["accepted"] += sum(r.accepted for r in rounds)
            print(f"\r{total['tokens']:,} of {count:,}", end="", file=sys.stderr, flush=True)
    print("\r" + " " * 30, end="\r", file=sys.stderr, flush=True)
    return total


def main() -> None:
    about = dict(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p = argparse.ArgumentParser(prog="soak.py", **about)
    p.add_argument("--ckpt", type=Path, default=DEFAULT_CKPT)
    p.add_argument("--tokens", type=int, default=20_000, help="of each kind, at least")
    p.add_argument("--dtype", choices=["auto", *DTYPES], default="auto")
    p.add_argument("--how", choices=["greedy", "sampled", "both"], default="both")
    p.add_argument("--seed", type=int, default=0, help="of what is drawn")
    args = p.parse_args()
    with command_errors(p.prog):
        model, tokenizer = load(args.ckpt, args.dtype, "cpu")
        prompts, total, parts = held_out_prompts(40, tokenizer, 64), Counter(), []
        for kind in ("greedy", "sampled"):
            if args.how in ("both", kind):
                found = soak(pack(model), prompts, args.tokens, kind == "sampled", args.seed)
                parts.append(f"{found['tokens']:,} {kind}")
                total += found
        share = total["accepted"] / max(total["drafted"], 1)
        print(
            f"{' and '.join(parts)} tokens in {total['runs']} runs, {share:.0%} of "
            f"{total['drafted']:,} drafted accepted ({str(model.dtype)[6:]}, "
            f"{torch.get_num_threads()} threads): {total['mismatches']} mismatches"
        )
    raise SystemExit(total["mismatches"] > 0)


if __name__ == "__main__":
    main()
