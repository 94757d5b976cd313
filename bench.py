"""Measurements behind the README's figures: medians of alternating runs in one process, on held-out prompts.

    python bench.py sweep       which exit layer and draft length are best here
    python bench.py speedup     the best of them against the fastest plain decoding this code can do
    python bench.py train       training: this code's recipes against transformers' Llama in a plain loop (needs transformers)

Run on an idle machine. Text that is generated does not stop at EOS, so every run makes the same number of tokens.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch

from data import held_out_prompts
from decode import DEFAULT_CKPT, DTYPES, Run, auto_dtype, drafting_defaults, generate, generation_defaults, run
from model import CheckpointError, Llama, load_checkpoint
from tokenizer import Tokenizer


def decode_all(model: Llama, prompts: list[list[int]], count: int, note: str = "", **settings) -> Run:
    """One generation of `count` tokens per prompt, as one Run."""
    total = Run()
    for done, prompt in enumerate(prompts):
        progress(f"{note} prompt {done + 1}/{len(prompts)}")
        one = run(generate(model, prompt, max_new_tokens=count, eos=(), **settings))
        total = Run(total.ids + one.ids, total.rounds + one.rounds, total.seconds + one.seconds)
    progress("")
    return total


def progress(text: str) -> None:
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)


def described(values: list[float]) -> dict:
    """Median and spread of repeated measurements."""
    return {"median": statistics.median(values), "low": min(values), "high": max(values)}


def sweep(args, tokenizer: Tokenizer, prompts: list[list[int]]) -> dict:
    """Tokens/s, acceptance and tokens per round over exit layer x draft length; one run a cell, a quarter of the prompts."""
    prompts, exits, drafts = prompts[::4], args.exits or [1, 2, 3, 4, 6, 8], args.drafts or [2, 4, 6, 10, 15]
    confidence = 0.3 if args.min_confidence is None else args.min_confidence
    model = load_checkpoint(args.ckpt, DTYPES.get(args.dtype) or auto_dtype(torch.device("cpu"))).pack()
    decode_all(model, prompts[:1], 32)
    plain = decode_all(model, prompts, args.tokens, "full model")
    print(f"full model: {plain.tokens_per_second:.0f} tokens/s ({model.dtype}, {torch.get_num_threads()} threads)")
    print("exit  draft  tokens/s  speedup  accepted  tokens/round")
    cells = []
    for exit_layer in exits:
        for draft_len in drafts:
            settings = dict(exit_layer=exit_layer, draft_len=draft_len, min_confidence=confidence)
            r = decode_all(model, prompts, args.tokens, f"exit {exit_layer}, draft {draft_len}", **settings)
            speedup, per_round = r.tokens_per_second / plain.tokens_per_second, len(r.ids) / len(r.rounds)
            same = "" if r.ids == plain.ids else "   NOT identical to the full model"
            print(f"{exit_layer:4}  {draft_len:5}  {r.tokens_per_second:8.0f}  {speedup:7.2f}  {r.acceptance or 0:8.1%}  {per_round:12.2f}{same}", flush=True)
            cells.append({**settings, "tokens_per_second": r.tokens_per_second, "speedup": speedup, "acceptance": r.acceptance, "tokens_per_round": per_round})
    best = max(cells, key=lambda c: c["speedup"])
    print(f"best: --exit {best['exit_layer']} --draft {best['draft_len']} --min-confidence {confidence}, {best['speedup']:.2f} times the full model")
    return {"plain_tokens_per_second": plain.tokens_per_second, "cells": cells}


def speedup(args, tokenizer: Tokenizer, prompts: list[list[int]]) -> dict:
    """Self-speculation against the fastest plain decoding this code can do, alternating, args.runs times each.

    Plain decoding comes in bfloat16 and float32, exact and not; each runs a quarter of the prompts, and the two fastest go
    on to the alternating runs. The text is compared with exact plain decoding in the same type.
    """
    dtype = {v: k for k, v in DTYPES.items()}[DTYPES.get(args.dtype) or auto_dtype(torch.device("cpu"))]
    models = {(d, exact): load_checkpoint(args.ckpt, DTYPES[d]).pack(exact) for d in ("bfloat16", "float32") for exact in (True, False)}
    settings = drafting_defaults(generation_defaults(args.ckpt), models["float32", True].config)
    given = {"exit_layer": args.exits and args.exits[0], "draft_len": args.drafts and args.drafts[0], "min_confidence": args.min_confidence}
    settings.update({name: value for name, value in given.items() if value is not None})

    plain = {f"plain, {d}{'' if exact else ', --no-exact'}": model for (d, exact), model in models.items()}
    tried = {name: decode_all(model, prompts[::4], args.tokens, name).tokens_per_second for name, model in plain.items()}
    print("tokens/s on a quarter of the prompts: " + "; ".join(f"{name} {speed:.0f}" for name, speed in tried.items()), flush=True)
    drafted = f"speculative, {dtype}"
    contenders = {name: (plain[name], {}) for name in sorted(tried, key=tried.get)[-2:]}
    contenders[drafted] = (models[dtype, True], settings)
    decode_all(models[dtype, True], prompts[:1], 32, **settings)

    speeds, last = {name: [] for name in contenders}, {}
    for turn in range(args.runs):
        for name, (model, extra) in contenders.items():
            last[name] = decode_all(model, prompts, args.tokens, f"run {turn + 1}/{args.runs}, {name}:", **extra)
            speeds[name].append(last[name].tokens_per_second)
    same_name = f"plain, {dtype}"
    reference = last[same_name] if same_name in last else decode_all(models[dtype, True], prompts, args.tokens, same_name)

    table = {name: described(values) for name, values in speeds.items()}
    fastest = max(list(table)[:-1], key=lambda n: table[n]["median"])
    ratio, r = table[drafted]["median"] / table[fastest]["median"], last[drafted]
    same = r.ids == reference.ids
    print(f"{len(prompts)} held-out prompts x {args.tokens} tokens, {args.runs} alternating runs, {torch.get_num_threads()} threads; tokens/s: median (lowest to highest)")
    for name, v in table.items():
        print(f"{name:28} {v['median']:6.0f}  ({v['low']:.0f} to {v['high']:.0f})")
    print(
        f"exit {settings['exit_layer']}, draft {settings['draft_len']}, confidence {settings['min_confidence']}: {ratio:.2f} times the fastest plain decoding; "
        f"{r.acceptance or 0:.0%} accepted, {len(r.ids) / len(r.rounds):.2f} tokens per round; {'identical' if same else 'NOT identical'} to {same_name}"
    )
    return {
        "settings": settings, "tokens_per_second": table, "tried": tried, "speedup": ratio, "identical": same,
        "acceptance": r.acceptance, "tokens_per_round": len(r.ids) / len(r.rounds),
    }  # fmt: skip


def train(args, tokenizer: Tokenizer, prompts) -> dict:
    """Training tokens/s of the shipped shape: transformers' LlamaForCausalLM in a plain loop, eager and compiled, and the
    recipes plain and layerskip of train.py. Same batch, bfloat16 autocast, AdamW; alternating turns of ten steps."""
    import transformers

    import train as training

    with tempfile.TemporaryDirectory() as folder:

        def ours(*recipe: str):
            out = Path(folder, recipe[1])
            options = training.parser().parse_args(["--out", str(out), "--steps", "100000", *recipe])
            run = training.Run(options)
            return run.train_step

        c = load_checkpoint(args.ckpt).config
        config = transformers.LlamaConfig(
            vocab_size=c.vocab_size, hidden_size=c.dim, intermediate_size=c.hidden_dim, num_hidden_layers=c.n_layers, num_attention_heads=c.n_heads,
            num_key_value_heads=c.n_kv_heads, head_dim=c.head_dim, tie_word_embeddings=True, use_cache=False, max_position_embeddings=c.max_len,
        )  # fmt: skip
        batch = torch.randint(c.vocab_size, (8, 512), generator=torch.Generator().manual_seed(0))

        def theirs(compiled: bool):
            model = transformers.LlamaForCausalLM(config)
            optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
            forward = torch.compile(model) if compiled else model

            def step():
                with torch.autocast("cpu", torch.bfloat16):
                    loss = forward(input_ids=batch, labels=batch).loss
                loss.backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)

            return step

        steps = {
            "transformers, eager": theirs(False),
            "transformers, torch.compile": theirs(True),
            "train.py --recipe plain": ours("--recipe", "plain"),
            "train.py --recipe layerskip": ours("--recipe", "layerskip"),
            "the same, published dropout from the start": ours("--recipe", "layerskip", "--dropout-time", "constant", "--seed", "1"),
        }
        for name, step in steps.items():  # compiles
            for _ in range(4):
                progress(f"warming up: {name}")
                step()
        speeds = {name: [] for name in steps}
        for turn in range(args.runs):
            for name, step in steps.items():
                progress(f"turn {turn + 1}/{args.runs}: {name}")
                started = time.perf_counter()
                for _ in range(10):
                    step()
                speeds[name].append(10 * batch.numel() / (time.perf_counter() - started))
        progress("")
    found = {name: described(values) for name, values in speeds.items()}
    first = found["transformers, eager"]["median"]
    for name, v in found.items():
        print(f"{name:44} {v['median']:6.0f} tokens/s ({v['low']:.0f} to {v['high']:.0f}), {v['median'] / first:.2f} times")
    return found


def main() -> None:
    p = argparse.ArgumentParser(prog="bench.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    numbers = lambda text: [int(v) for v in text.split(",")]
    p.add_argument("what", choices=["sweep", "speedup", "train"])
    p.add_argument("--ckpt", type=Path, default=DEFAULT_CKPT, metavar="DIR")
    p.add_argument("--prompts", type=int, default=20, help="held-out prompts (default %(default)s)")
    p.add_argument("--tokens", type=int, default=256, help="new tokens per prompt (default %(default)s)")
    p.add_argument("--runs", type=int, default=5, help="alternating runs for speedup (default %(default)s)")
    p.add_argument("--exits", type=numbers, metavar="E,E,...", help="exit layers (sweep: 1,2,3,4,6,8; speedup: the checkpoint's own)")
    p.add_argument("--drafts", type=numbers, metavar="D,D,...", help="draft lengths (sweep: 2,4,6,10,15; speedup: the checkpoint's own)")
    p.add_argument("--min-confidence", type=float, help="default: 0.3 (sweep), the checkpoint's own (speedup)")
    p.add_argument("--dtype", choices=["auto", *DTYPES], default="auto", help="of the drafted runs; plain decoding runs in the faster type")
    p.add_argument("--json", metavar="FILE", help="also write the figures to FILE")
    args = p.parse_args()
    try:
        tokenizer = Tokenizer(args.ckpt)
        prompts = held_out_prompts(2 * args.prompts, tokenizer, 64)  # settings are chosen on one half, speedup is shown on the other
        tuning, shown = prompts[args.prompts :], prompts[: args.prompts]
        report = {"sweep": sweep, "speedup": speedup, "train": train}[args.what](args, tokenizer, tuning if args.what == "sweep" else shown)
        if args.json:
            Path(args.json).write_text(json.dumps(report, indent=2) + "\n")
    except (CheckpointError, ValueError, OSError) as error:
        print(f"bench.py: {error}", file=sys.stderr)
        raise SystemExit(2)
    except KeyboardInterrupt:
        raise SystemExit(130)


if __name__ == "__main__":
    main()
