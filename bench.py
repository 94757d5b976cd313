"""Measurements behind the README's figures: medians of alternating runs in one process, on held-out prompts.

    python bench.py sweep       which exit layer and draft length are best here
    python bench.py speedup     the best of them against the fastest plain decoding this code can do
    python bench.py drafters    every drafter on one checkpoint (--ckpt, --adapter, --draft-ckpt), one table
    python bench.py auto        --exit auto against fixed settings on code, prose, repetitive text and random tokens
    python bench.py coupling    sampling: acceptance with shared noise against the optimum of rejection sampling
    python bench.py peers       transformers on the same checkpoint, plain and assistant_early_exit (needs transformers)
    python bench.py train       training: this code's recipes against transformers' Llama in a plain loop (needs transformers)

and of the engine itself (bench_engine.py), on the checkpoint or, with --shape 1b, on random weights of that shape:

    python bench.py roofline    bytes that each pass must read, against the bandwidth of this machine
    python bench.py ideal       speedup at set acceptances against the ideal one
    python bench.py exactness   plain decoding with and without the promise of equal bits
    python bench.py scale       time of a pass by context, model size and rows
    python bench.py memory      peak of allocations, plain and drafted, against a formula
    python bench.py profile     where a round's time goes

Run on an idle machine. Text that is generated does not stop at EOS, so every run makes the same number of tokens.
"""

import argparse
import ast
import csv
import inspect
import json
import re
import signal
import statistics
import sys
import tempfile
import time
import zlib
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from itertools import product
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from bench_engine import SHAPES, alternate, bar, decode_all, described, drafting, dtype_of, exactness, ideal, load, memory, profile, progress, roofline, scale, table
from compiled import compile_passes
from data import held_out_prompts, read_files, stdlib_files
from decode import DEFAULT_CKPT, DTYPES, Run, drafting_defaults, generation_defaults, gumbel, usable_device
from drafters import AutoExit, Drafter, EarlyExit, Jacobi, PromptLookup, SkipLayers, TwoModels, search_skips
from kangaroo import Kangaroo, load_adapter
from model import MAX_ROWS, CheckpointError, auto_dtype, load_checkpoint
from tokenizer import Tokenizer

CELL = ("exit_layer", "draft_len", "tokens_per_second", "plain_tokens_per_second", "speedup", "acceptance", "tokens_per_round", "identical")


def read_cells(file: Path, settings: dict) -> dict[tuple[int, int], dict]:
    """Cells by (exit layer, draft length) of a sweep that wrote `file`; ValueError, one line, where its settings were others."""
    if not file.exists():
        return {}
    with open(file, newline="", encoding="utf-8") as lines:
        rows = list(csv.DictReader(lines))
    for number, row in enumerate(rows, 2):
        if None in (row.get(name) for name in (*settings, *CELL)):
            raise ValueError(f"{file}, line {number}: not a whole cell of a sweep")
        for name, value in settings.items():
            if row[name] != str(value):
                raise ValueError(f"{file} holds cells of {name} {row[name]}, not {value}: give --csv another file")
    return {(int(row["exit_layer"]), int(row["draft_len"])): {name: ast.literal_eval(row[name]) for name in CELL} for row in rows}


def sweep(args: argparse.Namespace, tokenizer: Tokenizer, prompts: list[list[int]]) -> dict:
    """Tokens/s, acceptance and tokens per round over exit layer x draft length; one run a cell.

    With --csv each cell is written as it ends, and cells that the file already has are not measured again.
    """
    exits, drafts = args.exits or [1, 2, 3, 4, 6, 8], args.drafts or [2, 4, 6, 10, 15]
    confidence = 0.3 if args.min_confidence is None else args.min_confidence
    model = load_checkpoint(args.ckpt, dtype_of(args))
    weights, texts = (zlib.crc32(data) for data in (model.model.embed_tokens.weight.detach().view(torch.uint8).numpy().tobytes(), str(prompts).encode()))
    settings = {
        "checkpoint": f"{args.ckpt.name} {weights:08x}", "prompts": f"{len(prompts)} {texts:08x}", "tokens": args.tokens,
        "dtype": str(model.dtype), "confidence": confidence, "threads": torch.get_num_threads(),
    }  # fmt: skip
    cells = read_cells(args.csv, settings) if args.csv else {}
    wanted = list(product(exits, drafts))
    missing = [cell for cell in wanted if cell not in cells]
    if missing:
        model.pack()
        decode_all(model, prompts[:1], 32)
        plain = decode_all(model, prompts, args.tokens, "full model")
    for done, (exit_layer, draft_len) in enumerate(missing):
        note = f"{bar(done, len(missing))} exit {exit_layer}, draft {draft_len}:"
        r = decode_all(model, prompts, args.tokens, note, exit_layer=exit_layer, draft_len=draft_len, min_confidence=confidence)
        speeds = r.tokens_per_second, plain.tokens_per_second, r.tokens_per_second / plain.tokens_per_second
        values = exit_layer, draft_len, *speeds, r.acceptance or 0.0, len(r.ids) / len(r.rounds), r.ids == plain.ids
        cells[exit_layer, draft_len] = dict(zip(CELL, values))
        if args.csv:
            new = not args.csv.exists()
            with open(args.csv, "a", newline="", encoding="utf-8") as file:
                csv.writer(file).writerows([[*settings, *CELL]] * new + [[*settings.values(), *values]])
    shown = [cells[cell] for cell in wanted]
    print(", ".join(f"{name} {value}" for name, value in settings.items()) + "\n")
    table(
        ["exit", "draft", "tokens/s", "speedup", "accepted", "tokens per round", "identical"],
        [[c["exit_layer"], c["draft_len"], f"{c['tokens_per_second']:.0f}", f"{c['speedup']:.2f}", f"{c['acceptance']:.1%}", f"{c['tokens_per_round']:.2f}", "yes" if c["identical"] else "NO"] for c in shown],
    )
    best = max(shown, key=lambda c: c["speedup"])
    print(f"\nbest: --exit {best['exit_layer']} --draft {best['draft_len']} --min-confidence {confidence}, {best['speedup']:.2f} times the full model's {best['plain_tokens_per_second']:.0f} tokens/s")
    if args.png:
        draw(args.png, exits, drafts, cells, best)
    return {"settings": settings, "cells": shown}


def draw(file: Path, exits: list[int], drafts: list[int], cells: dict, best: dict) -> None:
    """Heat map of speedups. Transparent around the cells, with grey words that are read on white and on black."""
    import matplotlib  # only here

    matplotlib.use("Agg")
    from matplotlib import pyplot

    grey, speeds = "#808080", [[cells[e, d]["speedup"] for d in drafts] for e in exits]
    figure, axis = pyplot.subplots(figsize=(1.6 + 1.1 * len(drafts), 1.2 + 0.62 * len(exits)), layout="constrained")
    picture = axis.imshow(speeds, cmap="viridis", aspect="auto")
    for y, row in enumerate(speeds):
        for x, speed in enumerate(row):
            light: Any = picture.norm(speed)
            axis.text(x, y, f"{speed:.2f}", ha="center", va="center", fontsize=14, color="black" if light > 0.55 else "white")
    place = drafts.index(best["draft_len"]) - 0.5, exits.index(best["exit_layer"]) - 0.5
    axis.add_patch(pyplot.Rectangle(place, 1, 1, fill=False, edgecolor="#e5332a", linewidth=4, clip_on=False))
    axis.set_xticks(range(len(drafts)), map(str, drafts), fontsize=13, color=grey)
    axis.set_yticks(range(len(exits)), map(str, exits), fontsize=13, color=grey)
    axis.set_xlabel("draft length", fontsize=13, color=grey)
    axis.set_ylabel("exit layer", fontsize=13, color=grey)
    axis.set_title("speed against the full model", fontsize=13, color=grey)
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)
    figure.savefig(file, dpi=120, transparent=True)
    pyplot.close(figure)


def fastest_plain(args: argparse.Namespace, prompts: list[list[int]]) -> tuple[str, dict, dict]:
    """The type to draft in; models by (type, exact); and the two fastest ways of plain decoding as {name: (model, {})}.

    Plain decoding comes in bfloat16 and float32, exact and not; each runs a quarter of the prompts.
    """
    dtype = {v: k for k, v in DTYPES.items()}[dtype_of(args)]
    ways = [(d, exact) for d in ("bfloat16", "float32") for exact in (True, False)]
    models = {(d, exact): load_checkpoint(args.ckpt, DTYPES[d], args.device).pack(exact) for d, exact in ways}
    plain = {f"plain, {d}{'' if exact else ', --no-exact'}": model for (d, exact), model in models.items()}
    tried = {name: decode_all(model, prompts[::4], args.tokens, name).tokens_per_second for name, model in plain.items()}
    print("tokens/s on a quarter of the prompts: " + "; ".join(f"{name} {speed:.0f}" for name, speed in tried.items()), flush=True)
    return dtype, models, {name: (plain[name], {}) for name in sorted(tried, key=tried.__getitem__)[-2:]}


def speedup(args: argparse.Namespace, tokenizer: Tokenizer, prompts: list[list[int]]) -> dict:
    """Self-speculation against the fastest plain decoding this code can do, alternating, args.runs times each.

    The text is compared with exact plain decoding in the same type.
    """
    dtype, models, contenders = fastest_plain(args, prompts)
    settings = drafting(args, generation_defaults(args.ckpt), models["float32", True].config)

    pairs = {"": models[dtype, True]}  # eager and compiled, each plain and speculative
    if args.compile:
        progress("compiling")
        pairs[", compiled"] = compile_passes(load_checkpoint(args.ckpt, DTYPES[dtype], args.device), [settings["exit_layer"]])
    for how, model in pairs.items():
        contenders[f"plain, {dtype}{how}"], contenders[f"speculative, {dtype}{how}"] = (model, {}), (model, settings)
        decode_all(model, prompts[:1], 32, **settings)
    speeds, last = alternate(args, prompts, contenders)
    table = {name: described(values) for name, values in speeds.items()}
    middle = {name: v["median"] for name, v in table.items()}
    fastest = max((name for name in table if name.startswith("plain")), key=middle.__getitem__)
    print(f"{len(prompts)} held-out prompts x {args.tokens} tokens, {args.runs} alternating runs, {torch.get_num_threads()} threads; tokens/s: median (lowest to highest)")
    for name, v in table.items():
        print(f"{name:30} {v['median']:6.0f}  ({v['low']:.0f} to {v['high']:.0f})")
    print(f"the fastest plain decoding: {fastest.removeprefix('plain, ')}")
    report: dict = {"settings": settings, "tokens_per_second": table, "fastest": fastest}
    for how in pairs:
        plain, drafted = f"plain, {dtype}{how}", f"speculative, {dtype}{how}"
        r, same = last[drafted], last[drafted].ids == last[plain].ids
        report[drafted] = found = {
            "speedup": middle[drafted] / middle[fastest], "identical": same, "acceptance": r.acceptance, "tokens_per_round": len(r.ids) / len(r.rounds)
        }  # fmt: skip
        print(
            f"{drafted}, exit {settings['exit_layer']}, draft {settings['draft_len']}, confidence {settings['min_confidence']}: {found['speedup']:.2f} times the fastest plain decoding; "
            f"{r.acceptance or 0:.0%} accepted, {found['tokens_per_round']:.2f} tokens per round; {'identical' if same else 'NOT identical'} to {plain}"
        )
    if args.compile:
        gains = [middle[f"{kind}, {dtype}, compiled"] / middle[f"{kind}, {dtype}"] for kind in ("plain", "speculative")]
        report["compiled_against_eager"] = gains
        print(f"compiled against eager: plain {gains[0]:.2f} times, speculative {gains[1]:.2f} times")
    return report


def drafters(args: argparse.Namespace, tokenizer: Tokenizer, prompts: list[list[int]]) -> dict:
    """Every drafter on one checkpoint: acceptance, tokens per round, speed against the fastest plain decoding, what it costs.

    --min-confidence and a second number in --drafts are Kangaroo's (by default 0.6 and 6, its paper's); of --exits, the first counts.
    """
    dtype, models, contenders = fastest_plain(args, prompts)
    model = models[dtype, True]
    plain_name, exact = f"plain, {dtype}", dict(contenders)
    exact[plain_name] = (model, {})
    base = drafting_defaults(generation_defaults(args.ckpt), model.config)
    base["draft_len"] = args.drafts[0] if args.drafts else base["draft_len"]
    exit_layer = base["exit_layer"] = args.exits[0] if args.exits else base["exit_layer"]
    who = {f"early exit, E = {exit_layer}": (base, "its training")}
    extra: dict[str, torch.nn.Module] = {}
    who["exit auto"] = ({**base, "draft_len": MAX_ROWS - 1, "drafter": partial(AutoExit, exit_layer=exit_layer)}, "its training")
    if args.adapter:
        adapter = load_adapter(args.adapter, model)
        about = json.loads((args.adapter / "adapter.json").read_text())
        settings = {**base, "draft_len": args.drafts[1] if args.drafts and args.drafts[1:] else 6, "min_confidence": 0.6 if args.min_confidence is None else args.min_confidence}
        extra[f"kangaroo, E = {adapter.exit_layer}"] = adapter
        who[f"kangaroo, E = {adapter.exit_layer}"] = ({**settings, "drafter": partial(Kangaroo, adapter=adapter)}, f"{about.get('tokens', 0) / 1e6:.1f}M tokens, {about.get('seconds', 0) / 60:.0f} min")
    if args.draft_ckpt:
        other = load_checkpoint(args.draft_ckpt, DTYPES[dtype])
        record = json.loads((args.draft_ckpt / "training.json").read_text()) if (args.draft_ckpt / "training.json").exists() else {}
        extra["two models"] = other
        who["two models"] = ({**base, "drafter": partial(TwoModels, other=other)}, f"{record.get('tokens', 0) / 1e6:.1f}M tokens")
    texts = load_checkpoint(args.ckpt, auto_dtype(torch.device("cpu")))
    attention, mlp, _ = search_skips(texts, torch.tensor(held_out_prompts(4 * args.prompts, tokenizer, 64)[2 * args.prompts :]), args.tries, on_try=lambda n, *_: progress(f"search {n}/{args.tries}"))
    progress("")
    print(f"Draft & Verify leaves out attention {sorted(attention)} and MLP {sorted(mlp)}")
    who[f"skip {len(attention)} attention, {len(mlp)} MLP"] = ({**base, "drafter": partial(SkipLayers, attention=attention, mlp=mlp)}, f"{args.tries} tries")
    who["prompt lookup"], who["jacobi"] = ({**base, "drafter": PromptLookup}, "none"), ({**base, "drafter": Jacobi}, "none")
    made: dict[str, Drafter] = {}
    more = {name: sum(p.numel() for p in module.parameters()) for name, module in extra.items()}

    def kept(name: str, maker: Callable[..., Drafter]) -> Callable[..., Drafter]:
        def make(*given: Any) -> Drafter:
            made[name] = maker(*given)
            return made[name]

        return make

    for name, (settings, _) in who.items():
        maker = settings["drafter"] or partial(EarlyExit, exit_layer=exit_layer)
        exact[name] = (model, {**settings, "drafter": kept(name, maker)})
    speeds, last = alternate(args, prompts, exact)
    middle = {name: statistics.median(values) for name, values in speeds.items()}
    fastest = max(contenders, key=middle.__getitem__)
    rows = [f"{args.ckpt.name}, {len(prompts)} held-out prompts x {args.tokens} tokens, medians of {args.runs} alternating runs; the fastest plain decoding is {fastest.removeprefix('plain, ')}: {middle[fastest]:.0f} tokens/s.", ""]
    rows += ["| drafter | accepted | tokens per round | speed against plain | lowest to highest | extra parameters | extra memory | training |", "|---|---|---|---|---|---|---|---|"]
    report = {}
    for name, (_, cost) in who.items():
        r, ratios = last[name], [v / middle[fastest] for v in speeds[name]]
        assert r.ids == last[plain_name].ids, f"{name}: the text is not the full model's"
        report[name] = {"accepted": r.acceptance, "tokens_per_round": len(r.ids) / len(r.rounds), "speedup": middle[name] / middle[fastest], "extra_bytes": made[name].nbytes}
        rows.append(f"| {name} | {r.acceptance or 0:.0%} | {len(r.ids) / len(r.rounds):.2f} | {middle[name] / middle[fastest]:.2f} | {min(ratios):.2f} to {max(ratios):.2f} | {more.get(name, 0) / 1e6:.2f}M | {made[name].nbytes / 1e6:.1f} MB | {cost} |")
    print("\n".join(rows))
    return report


def auto(args: argparse.Namespace, tokenizer: Tokenizer, prompts: list[list[int]]) -> dict:
    """--exit auto against fixed settings, on four kinds of text: each kind's best fixed setting, and the best over all.

    Fewer than 4 prompts, one a kind, are refused (ValueError).
    """
    model = load_checkpoint(args.ckpt, dtype_of(args)).pack()
    each = args.prompts // 4
    if each < 1:
        raise ValueError("auto needs --prompts of at least 4")
    random = torch.Generator().manual_seed(0)
    kinds = {
        "code": prompts[:each],
        "prose": docstrings(tokenizer, each, 64),
        "repetitive": [(p[:12] * 6)[:64] for p in prompts[each : 2 * each]],
        "random tokens": [torch.randint(3, model.config.vocab_size, (64,), generator=random).tolist() for _ in range(each)],
    }
    base = drafting_defaults(generation_defaults(args.ckpt), model.config)
    confidence = base["min_confidence"] if args.min_confidence is None else args.min_confidence
    fixed = {f"E = {e}, d = {d}": dict(exit_layer=e, draft_len=d, min_confidence=confidence) for e in args.exits or [2, 3, 4, 6, 8] for d in args.drafts or [2, 4, 8, 15]}
    choices = {"plain": {}, **fixed, "auto": dict(draft_len=MAX_ROWS - 1, min_confidence=confidence, drafter=partial(AutoExit, exit_layer=base["exit_layer"]))}
    decode_all(model, prompts[:1], 32, **choices["auto"])
    speeds: dict[str, dict[str, list[float]]] = {name: {kind: [] for kind in kinds} for name in choices}
    for turn in range(args.runs):
        for name, settings in choices.items():
            for kind, texts in kinds.items():
                speeds[name][kind].append(decode_all(model, texts, args.tokens, f"run {turn + 1}/{args.runs}, {name}, {kind}:", **settings).tokens_per_second)
    middle = {name: {kind: statistics.median(v) for kind, v in found.items()} for name, found in speeds.items()}
    for found in middle.values():  # the same number of tokens of each kind: the mean of times, not of speeds
        found["all"] = len(kinds) / sum(1 / found[kind] for kind in kinds)
    best = {kind: max(fixed, key=lambda name: middle[name][kind]) for kind in [*kinds, "all"]}
    rows = ["| text | plain, tokens/s | best fixed setting | its speed | the best over all | auto | auto against the best over all |", "|---|---|---|---|---|---|---|"]
    for kind in [*kinds, "all"]:
        plain, one, over_all, chosen = (middle[name][kind] for name in ("plain", best[kind], best["all"], "auto"))
        rows.append(f"| {kind} | {plain:.0f} | {best[kind]} | {one / plain:.2f} | {over_all / plain:.2f} | {chosen / plain:.2f} | {chosen / over_all - 1:+.0%} |")
    print("\n".join(rows))
    return middle


def docstrings(tokenizer: Tokenizer, count: int, length: int) -> list[list[int]]:
    """Prompts of `length` tokens that start with the prose of held-out files' long docstrings."""
    found = []
    for d in read_files(stdlib_files()):
        for text in re.findall(r'"""(.{300,}?)"""', d.text, re.DOTALL) if d.held_out else ():
            found.append(tokenizer.encode('"""' + text)[:length])
    return found[:: max(1, len(found) // count)][:count]


@torch.inference_mode()
def coupling(args: argparse.Namespace, tokenizer: Tokenizer, prompts: list[list[int]]) -> dict:
    """What exact reproducibility costs in sampling: how often the same Gumbel noise makes exit and full model agree, against
    1 - TV(p, q), which rejection sampling reaches; averages over the positions of the held-out prompts."""
    model, report = load_checkpoint(args.ckpt, torch.float32), {}
    tokens = torch.tensor(prompts)
    h, logits = model.embed(tokens), {}
    for l in range(model.config.n_layers):
        h = model.run_layers(h, l, l + 1)
        logits[l + 1] = model.unembed(h)[:, 8:].flatten(0, 1).double()
    exits, full = args.exits or [2, 3, 4, 6, 8, 12], logits[model.config.n_layers]
    noise = torch.stack([gumbel(0, position, full.shape[1]) for position in range(len(full))])
    print("| exit | temperature | same noise agrees | 1 - TV | difference |\n|---|---|---|---|---|")
    for exit in exits:
        for temperature in (0.3, 0.6, 0.9, 1.2):
            p, q = (x / temperature for x in (full, logits[exit]))
            shared = sum(((p + n).argmax(-1) == (q + n).argmax(-1)).double().mean().item() for n in (noise.roll(k, 0) for k in range(8))) / 8
            most = torch.minimum(p.softmax(-1), q.softmax(-1)).sum(-1).mean().item()
            report[f"{exit}, {temperature}"] = {"coupled": shared, "optimum": most}
            print(f"| {exit} | {temperature} | {shared:.1%} | {most:.1%} | {100 * (most - shared):.1f} points |")
    return report


def peers(args: argparse.Namespace, tokenizer: Tokenizer, prompts: list[list[int]]) -> dict:
    """transformers on the same checkpoint, prompts, type, exit and draft length: plain decoding and assistant_early_exit.

    Both sides decode greedily with a cache, prompt included in the time; each side's drafted text is compared with its own
    plain text. Alternating turns. Of random weights (--shape) plain decoding alone: their exits foresee nothing.
    """
    return {shape or args.ckpt.name: peers_of(args, shape, prompts) for shape in args.shape or [None]}


def peers_of(args: argparse.Namespace, shape: str | None, prompts: list[list[int]]) -> dict:
    """`peers` for one model."""
    import transformers

    transformers.logging.set_verbosity_error()
    dtype = dtype_of(args)
    model = load(args, shape, dtype)
    settings = drafting(args, {} if shape else generation_defaults(args.ckpt), model.config)
    config = transformers.LlamaConfig(**json.loads(model.config.to_json(dtype)))
    with torch.device("meta"):
        theirs = transformers.LlamaForCausalLM(config).to(dtype).eval()
    theirs.load_state_dict(model.state_dict(), assign=True)  # the same memory, until pack() below lets go of it
    theirs.model.rotary_emb = type(theirs.model.rotary_emb)(config).to(model.device)  # no part of the state
    model.pack()
    theirs.generation_config = transformers.GenerationConfig(do_sample=False, max_new_tokens=args.tokens, pad_token_id=0)
    assist = dict(assistant_early_exit=settings["exit_layer"])
    theirs.generation_config.num_assistant_tokens = settings["draft_len"]
    theirs.generation_config.num_assistant_tokens_schedule = "constant"
    theirs.generation_config.assistant_confidence_threshold = settings["min_confidence"]

    def generated(count: int = args.tokens, **how: Any) -> Run:
        total = Run()
        for prompt in prompts:
            started = time.perf_counter()
            ids = torch.tensor([prompt], device=model.device)
            out = theirs.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, **how)
            total = Run(total.ids + out[0, len(prompt) :].tolist(), [], total.seconds + time.perf_counter() - started)
        return total

    sides = {
        "transformers, plain": lambda: generated(),
        "transformers, assistant_early_exit": lambda: generated(**assist),
        "this code, plain": lambda: decode_all(model, prompts, args.tokens),
        "this code, self-speculative": lambda: decode_all(model, prompts, args.tokens, **settings),
    }
    if args.compile:
        progress("compiling")
        fast = compile_passes(load(args, shape, dtype), [settings["exit_layer"]])
        sides["this code, plain, compiled"] = lambda: decode_all(fast, prompts, args.tokens)
        sides["this code, self-speculative, compiled"] = lambda: decode_all(fast, prompts, args.tokens, **settings)
    if shape:
        sides = {name: decoded for name, decoded in sides.items() if "plain" in name}
    for name in sides:
        progress(f"warming up: {name}")
        generated(8, **(assist if "early" in name else {})) if "transformers" in name else decode_all(model, prompts[:1], 8)
    speeds: dict[str, list[float]] = {name: [] for name in sides}
    last = {}
    for turn in range(args.runs):
        for name, decoded in sides.items():
            progress(f"turn {turn + 1}/{args.runs}: {name}")
            last[name] = decoded()
            speeds[name].append(last[name].tokens_per_second)
    progress("")
    found = {name: described(values) for name, values in speeds.items()}
    print(
        f"{shape or args.ckpt.name}, {len(prompts)} held-out prompts x {args.tokens} tokens, {dtype}, {torch.get_num_threads()} threads, {args.runs} runs"
        + f", exit {settings['exit_layer']}, draft {settings['draft_len']}, confidence {settings['min_confidence']}" * (not shape)
        + "\n"
    )
    rows = []
    for name, v in found.items():
        same = ""
        if "plain" not in name:
            own = last[name.replace("assistant_early_exit", "plain").replace("self-speculative", "plain")]
            texts = [[r.ids[i : i + args.tokens] for i in range(0, len(r.ids), args.tokens)] for r in (last[name], own)]
            same = f"{sum(a == b for a, b in zip(*texts))} of {len(prompts)}"
        other = found["transformers, plain" if "plain" in name else "transformers, assistant_early_exit"]["median"]
        rows.append([name, f"{v['median']:.1f} ({v['low']:.1f} to {v['high']:.1f})", f"{v['median'] / other:.2f}", same])
    table(["", "tokens/s", "against transformers", "drafted texts that equal its own plain text"], rows)
    return found


def training_step(recipe: list[str], ckpt: Path, folder: str) -> Callable[[], object]:
    """A step of `train.py` with these arguments or, for ["transformers", "eager" or "compiled"], of its LlamaForCausalLM in a plain loop."""
    if recipe[0] != "transformers":
        import train as training

        return training.Run(training.parser().parse_args(["--out", folder, "--steps", "100000", *recipe])).train_step
    import transformers

    c = load_checkpoint(ckpt).config
    config = transformers.LlamaConfig(
        vocab_size=c.vocab_size, hidden_size=c.dim, intermediate_size=c.hidden_dim, num_hidden_layers=c.n_layers, num_attention_heads=c.n_heads,
        num_key_value_heads=c.n_kv_heads, head_dim=c.head_dim, tie_word_embeddings=True, use_cache=False, max_position_embeddings=c.max_len,
    )  # fmt: skip
    batch = torch.randint(c.vocab_size, (8, 512), generator=torch.Generator().manual_seed(0))
    bf16 = auto_dtype(torch.device("cpu")) == torch.bfloat16
    model = transformers.LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    forward = torch.compile(model) if recipe[1] == "compiled" else model

    def step():
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = forward(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def train_in_turns(recipe: list[str], ckpt: Path, folder: str, turns: Connection) -> None:
    """A process of `train`: warms up, then answers each True with the seconds of ten steps."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the process that started this one ends it
    step = training_step(recipe, ckpt, folder)
    for _ in range(4):
        step()
    turns.send(None)
    with suppress(EOFError):
        while turns.recv():
            started = time.perf_counter()
            for _ in range(10):
                step()
            turns.send(time.perf_counter() - started)


def train(args: argparse.Namespace, tokenizer: Tokenizer, prompts: list[list[int]]) -> dict:
    """Training tokens/s of the shipped shape: transformers' LlamaForCausalLM in a plain loop, eager and compiled, and the
    recipes plain and layerskip of train.py. Same batch, AdamW, bfloat16 autocast where the hardware has it; turns of ten steps.

    Each in a process of its own, of which one runs at a time: in one process they would share what torch.compile has made."""
    import transformers  # noqa: F401  # where it is missing, say so before any process starts

    contenders = {
        "transformers, eager": ["transformers", "eager"],
        "transformers, torch.compile": ["transformers", "compiled"],
        "train.py --recipe plain": ["--recipe", "plain"],
        "train.py --recipe layerskip": ["--recipe", "layerskip"],
        "the same, published dropout from the start": ["--recipe", "layerskip", "--dropout-time", "constant", "--seed", "1"],
    }
    speeds: dict[str, list[float]] = {name: [] for name in contenders}
    with tempfile.TemporaryDirectory() as folder:
        turns, context = {}, get_context("spawn")
        for name, recipe in contenders.items():
            progress(f"warming up: {name}")
            turns[name], theirs = context.Pipe()
            context.Process(target=train_in_turns, args=(recipe, args.ckpt, f"{folder}/{len(turns)}", theirs), daemon=True).start()
            theirs.close()
            turns[name].recv()
        for turn in range(args.runs):
            for name in contenders:
                progress(f"{bar(turn, args.runs)} {name}")
                turns[name].send(True)
                speeds[name].append(10 * 8 * 512 / turns[name].recv())
        progress("")
    found = {name: described(values) for name, values in speeds.items()}
    first = found["transformers, eager"]["median"]
    for name, v in found.items():
        print(f"{name:44} {v['median']:6.0f} tokens/s ({v['low']:.0f} to {v['high']:.0f}), {v['median'] / first:.2f} times")
    return found


def file_prompts(file: Path, tokenizer: Tokenizer) -> list[list[int]]:
    """Prompts of a text file, where blank lines part them, or of a .jsonl file, each line an object with "prompt".

    Raises ValueError, one line, where it has none.
    """
    text = file.read_text(encoding="utf-8")
    found = [part.strip("\n") for part in re.split(r"\n[ \t]*\n", text)]
    if file.suffix == ".jsonl":
        try:
            found = [json.loads(line)["prompt"] + "" for line in text.split("\n") if line.strip()]
        except (ValueError, KeyError, TypeError):
            raise ValueError(f'{file}: not every line is a JSON object with a string "prompt"') from None
    prompts = [tokenizer.encode(one) for one in found if one]
    if not prompts:
        raise ValueError(f"{file} holds no prompt")
    return prompts


def numbers(kind: Callable = int) -> Callable[[str], list]:
    """An argparse type for numbers with commas between."""
    return lambda text: [kind(v) for v in text.split(",")]


OPTIONS: dict[str, dict[str, Any]] = {
    "ckpt": dict(type=Path, default=DEFAULT_CKPT, metavar="DIR", help="checkpoint (default: the shipped one)"),
    "shape": dict(type=lambda text: text.split(","), metavar="NAME,...", help=f"random weights of these shapes instead of a checkpoint: {', '.join(SHAPES)}"),
    "prompts": dict(type=int, default=20, metavar="N", help="held-out prompts (default %(default)s); sweep takes a quarter of the number, from those that the others leave out"),
    "prompts-file": dict(type=Path, metavar="FILE", help='prompts from FILE instead, all of them: text with blank lines between, or .jsonl with "prompt"'),
    "tokens": dict(type=int, default=256, metavar="N", help="new tokens per prompt (default %(default)s)"),
    "runs": dict(type=int, default=5, metavar="N", help="alternating runs, or repetitions (default %(default)s)"),
    "context": dict(type=int, default=128, metavar="N", help="live positions (default %(default)s)"),
    "exits": dict(type=numbers(), metavar="E,...", help="exit layers; the first of them where one is needed (default there: the checkpoint's own)"),
    "drafts": dict(type=numbers(), metavar="D,...", help="draft lengths, likewise"),
    "min-confidence": dict(type=float, metavar="C", help="default: 0.3 (sweep), the checkpoint's own (others)"),
    "alphas": dict(type=numbers(float), default=[0.6, 0.8, 0.95], metavar="A,...", help="acceptances to set (default 0.6,0.8,0.95)"),
    "dtype": dict(choices=["auto", *DTYPES], default="auto", help="auto: bfloat16 where the hardware multiplies it; speedup: of the drafted runs; exactness: bfloat16 and float32"),
    "compile": dict(action="store_true", default=False, help="compiled passes too"),
    "device": dict(default="cpu", help="cpu, cuda, cuda:1, ... (default %(default)s)"),
    "adapter": dict(type=Path, metavar="DIR", help="a Kangaroo adapter for the checkpoint"),
    "draft-ckpt": dict(type=Path, metavar="DIR", help="a smaller checkpoint of the same vocabulary"),
    "tries": dict(type=int, default=200, metavar="N", help="tries of the search for sublayers to skip (default %(default)s)"),
    "csv": dict(type=Path, metavar="FILE", help="write each cell to FILE as it ends; what FILE already holds is not measured again"),
    "png": dict(type=Path, metavar="FILE", help="draw the speedups as a heat map (needs matplotlib)"),
    "json": dict(metavar="FILE", help="also write the figures to FILE"),
}
COMMANDS: dict[str, tuple[Callable, str, dict[str, Any]]] = {  # the function, its options beside --ckpt and --json, defaults that are its own
    "sweep": (sweep, "prompts prompts-file tokens exits drafts min-confidence dtype csv png", {}),
    "speedup": (speedup, "prompts prompts-file tokens runs exits drafts min-confidence dtype compile device", {}),
    "drafters": (drafters, "prompts prompts-file tokens runs exits drafts min-confidence dtype adapter draft-ckpt tries", {}),
    "auto": (auto, "prompts tokens runs exits drafts min-confidence dtype", {}),
    "coupling": (coupling, "prompts exits", {}),
    "peers": (peers, "shape prompts prompts-file tokens runs exits drafts min-confidence dtype compile device", {}),
    "train": (train, "runs", {}),
    "roofline": (roofline, "shape runs context exits drafts dtype compile device", {"runs": 30}),
    "ideal": (ideal, "shape alphas prompts prompts-file tokens runs exits drafts dtype compile device", {"prompts": 4, "tokens": 64, "runs": 3}),
    "exactness": (exactness, "shape prompts prompts-file tokens runs dtype device", {"prompts": 4, "tokens": 128}),
    "scale": (scale, "shape runs dtype compile device", {"runs": 10}),
    "memory": (memory, "shape prompts-file tokens exits drafts dtype compile device", {"tokens": 64}),
    "profile": (profile, "shape prompts prompts-file tokens exits drafts min-confidence dtype", {"prompts": 4, "tokens": 128}),
}


def parser() -> argparse.ArgumentParser:
    """The commands and their options."""
    p = argparse.ArgumentParser(prog="bench.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = p.add_subparsers(dest="what", required=True, metavar="WHAT")
    for name, (work, options, defaults) in COMMANDS.items():
        one = commands.add_parser(name, description=inspect.getdoc(work), formatter_class=argparse.RawDescriptionHelpFormatter)
        one.set_defaults(**{option.replace("-", "_"): about.get("default") for option, about in OPTIONS.items()})
        for option in ["ckpt", *options.split(), "json"]:
            one.add_argument(f"--{option}", **{**OPTIONS[option], **({"default": defaults[option]} if option in defaults else {})})
    return p


def main() -> None:
    args = parser().parse_args()
    try:
        if unknown := set(args.shape or ()) - set(SHAPES):
            raise ValueError(f"--shape takes {', '.join(SHAPES)}, not {min(unknown)!r:.40}")
        if min(args.prompts, args.tokens, args.runs) < 1:
            raise ValueError("--prompts, --tokens and --runs must be at least 1")
        args.device = usable_device(args.device)
        tokenizer = Tokenizer(args.ckpt)
        if args.prompts_file:
            prompts = file_prompts(args.prompts_file, tokenizer)
        else:  # settings are chosen on one half, with a quarter of its prompts, and speedup is shown on the other
            prompts = held_out_prompts(2 * args.prompts, tokenizer, 64)
            prompts = prompts[args.prompts :: 4] if args.what == "sweep" else prompts[: args.prompts]
        report = COMMANDS[args.what][0](args, tokenizer, prompts)
        if args.json:
            Path(args.json).write_text(json.dumps(report, indent=2) + "\n")
    except (CheckpointError, ValueError, OSError, ImportError) as error:
        progress("")
        print(f"bench.py: {str(error).splitlines()[0]}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None


if __name__ == "__main__":
    main()
