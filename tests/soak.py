"""The long run: drafted and plain decoding of the shipped checkpoint, token by token, with mixed exits and draft lengths.

    python tests/soak.py                            100,000 greedy and 100,000 sampled tokens in bfloat16
    python tests/soak.py --tokens 2000 --dtype float32 --how sampled

Prints the mismatches; exit code 1 if there are any. Several processes on as many cores: OMP_NUM_THREADS=1, one --how each.
"""

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np
import torch

from data import held_out_prompts
from decode import DTYPES, Sampling, generate
from model import load_checkpoint
from tokenizer import Tokenizer


def soak(model, prompts: list[list[int]], tokens: int, sampled: bool) -> int:
    """Number of drafted-and-verified tokens whose id or logits differ from plain decoding's, over at least `tokens` tokens.

    Each prompt is decoded plainly once, to the end of the context, and four times with another exit and draft length.
    """
    random, done, wrong, cases, drafted, accepted = np.random.default_rng(0), 0, 0, 0, 0, 0
    while done < tokens:
        prompt = prompts[cases % len(prompts)][: int(random.integers(1, 65))]
        sampling = Sampling(float(random.uniform(0.2, 1.2)) if sampled else 0.0, int(random.choice([0, 40])), float(random.choice([1.0, 0.9])), cases)
        common = dict(max_new_tokens=model.config.max_len, sampling=sampling, eos=())
        full = list(generate(model, prompt, **common))
        reference, bits = [r.emitted[0] for r in full], torch.cat([r.logits for r in full])
        for _ in range(4):
            settings = dict(exit_layer=int(random.integers(1, model.config.n_layers)), draft_len=int(random.integers(1, 16)))
            rounds = list(generate(model, prompt, min_confidence=float(random.choice([0.0, 0.3])), **settings, **common))
            ids, logits = [t for r in rounds for t in r.emitted], torch.cat([r.logits for r in rounds])
            common_length = min(len(ids), len(reference))
            same_bits = (logits[:common_length] == bits[:common_length]).all(-1).tolist()
            wrong += sum(not (a == b and same) for a, b, same in zip(ids, reference, same_bits)) + abs(len(ids) - len(reference))
            done += len(ids)
            drafted, accepted = drafted + sum(len(r.drafted) for r in rounds), accepted + sum(r.accepted for r in rounds)
        cases += 1
        name = "sampled" if sampled else "greedy"
        print(f"\r{name}: {done:,} tokens, {4 * cases} runs, {wrong} mismatches, {accepted / max(drafted, 1):.0%} of {drafted:,} drafted accepted", end="", flush=True)
    print(f"  ({model.dtype}, {torch.get_num_threads()} threads)")
    return wrong


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--ckpt", type=Path, default=ROOT / "checkpoints" / "pystdlib")
    p.add_argument("--tokens", type=int, default=100_000)
    p.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    p.add_argument("--how", choices=["greedy", "sampled", "both"], default="both")
    args = p.parse_args()
    model = load_checkpoint(args.ckpt, DTYPES[args.dtype])
    prompts = held_out_prompts(40, Tokenizer(args.ckpt), 64)
    wrong = sum(soak(model, prompts, args.tokens, sampled) for sampled in (False, True) if args.how in ("both", ["greedy", "sampled"][sampled]))
    raise SystemExit(wrong > 0)


if __name__ == "__main__":
    main()
