"""The long run: drafters in turns against plain decoding, bit for bit.

    python tests/soak.py                                 20,000 greedy and 20,000 sampled tokens
    python tests/soak.py --tokens 1000000 --compile      compiled, for hours

A turn draws a prompt, and a sampling every second time. It decodes plainly to the end of the
context, then with each drafter, at an exit, a draft length and a confidence that are drawn too
(compiled: at the checkpoint's exit). Prints the number of mismatches, tokens whose id or logits
differ; exit code 1 if there are any.
"""

import argparse
import sys
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import numpy as np
import torch
from helpers import DRAFTERS, decode, differences

from bench.tasks import held_out_prompts
from decode import Sampling
from exact import MAX_ROWS, pack
from extras.compiled import compile_model
from model import Llama
from support.console import DEFAULT_CKPT, DTYPES, command_errors, default_settings, load

WHO = "early exit", "lookup", "lookup+exit", "jacobi"
LONGEST = 1000  # tokens of a text


def turn(
    model: Llama, prompts: list[list[int]], exits: list[int], number: int, seed: int
) -> Counter:
    """Totals of turn `number`: a pure function of its arguments."""
    random = np.random.default_rng([seed, number])
    pick = lambda *choices: random.choice(choices).item()
    prompt = prompts[random.integers(len(prompts))][: random.integers(1, 65)]
    temperature = random.uniform(0.2, 1.2) * (number % 2)
    sampling = Sampling(temperature, pick(0, 40), pick(1.0, 0.9), int(random.integers(1 << 32)))
    how = dict(max_new_tokens=LONGEST, sampling=sampling)
    plain, total = decode(model, prompt, **how), Counter(turns=1)
    for who in WHO:
        how |= dict(draft_len=int(random.integers(1, MAX_ROWS)), min_confidence=pick(0.0, 0.3))
        own = DRAFTERS[who](model, pick(*exits))
        text = decode(model, prompt, **how, **own)
        if found := differences(text, plain):
            print(f"\nturn {number}, {who} {own}, {how}: {found} mismatches", file=sys.stderr)
        total["mismatches"] += found
        total["tokens"] += len(text.ids)
        total["drafted"] += sum(len(r.drafted) for r in text.rounds)
        total["accepted"] += sum(r.accepted for r in text.rounds)
    return total


def main() -> None:
    about = dict(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p = argparse.ArgumentParser(prog="soak.py", **about)
    add = p.add_argument
    add("--ckpt", type=Path, default=DEFAULT_CKPT)
    add("--tokens", type=int, default=20_000, help="of each kind, at least")
    add("--dtype", choices=["auto", *DTYPES], default="auto")
    add("--compile", action="store_true")
    add("--seed", type=int, default=0, help="of what is drawn")
    args = p.parse_args()
    with command_errors(p.prog):
        model, tokenizer = load(args.ckpt, args.dtype, "cpu")
        prompts, exits = held_out_prompts(40, tokenizer, 64), range(1, model.config.n_layers)
        if args.compile:
            exits = [default_settings(args.ckpt, model.config, tokenizer)["exit_layer"]]
            compile_model(model, exits[0])
        else:
            pack(model)
        engine = f"{str(model.dtype)[6:]}, {'compiled' if args.compile else 'eager'}"
        threads = torch.get_num_threads()
        kinds = [Counter(), Counter()]  # greedy, sampled
        while min(total["tokens"] for total in kinds) < args.tokens:
            number = sum(total["turns"] for total in kinds)  # greedy and sampled take turns
            kinds[number % 2] += turn(model, prompts, [*exits], number, args.seed)
            done = min(total["tokens"] for total in kinds)
            print(f"\r{done:,} of {args.tokens:,}", end="", file=sys.stderr, flush=True)
        print(file=sys.stderr)
        for name, total in zip(("greedy", "sampled"), kinds):
            share = total["accepted"] / max(total["drafted"], 1)
            print(
                f"{total['tokens']:,} {name} tokens in {len(WHO) * total['turns']} runs, "
                f"{share:.0%} of {total['drafted']:,} drafted accepted "
                f"({engine}, {threads} threads): {total['mismatches']} mismatches"
            )
    raise SystemExit(any(total["mismatches"] for total in kinds))


if __name__ == "__main__":
    main()
