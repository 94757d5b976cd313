"""Self-speculation against plain decoding: speedup, drafters, sweep."""

import os
from argparse import Namespace
from collections.abc import Iterable
from copy import copy
from functools import partial
from importlib.util import find_spec
from statistics import median
from typing import IO

import torch

from bench.common import (
    Table,
    Works,
    compare,
    decode_all,
    engine,
    progress,
    target,
    title,
    write_csv,
)
from decode import Sampling, check_request
from exact import auto_dtype, pack
from extras.compiled import compile_model
from extras.drafters import DRAFTERS, SkipLayers, parse_drafter, search_skips
from extras.lens import choose_exit
from extras.trace import wanted
from support.checkpoint import read_json
from support.runs import RunDirectory


def drafted_table(t: Namespace, who: dict[str, dict], temperature: float = 0.0) -> Table:
    """Plain decoding, and drafting with the settings of `who`, which may name a model of its own.

    Plain decoding is exact in --dtype, not exact, and exact in another type that is fast here; with
    --compile, exact in --dtype, and compiled. Drafting is compiled then, and must write the
    compiled plain text.
    """
    models, ours = {"plain": pack(t.load(t.dtype))}, "plain"
    if t.compile:
        ours = "plain, compiled"
        models[ours] = engine(t, t.load(t.dtype), compiled=True)
    else:
        models["plain, not exact"] = t.load(t.dtype)
        other = torch.float32 if t.dtype == torch.bfloat16 else auto_dtype(t.device)
        if other != t.dtype:  # bfloat16 is slow where nothing multiplies it
            models[f"plain, {str(other)[6:]}"] = pack(t.load(other))
    how: dict = dict(prompts=t.prompts, count=t.tokens, eos=t.eos, sampling=Sampling(temperature))
    works: Works = {n: partial(decode_all, model=model, **how) for n, model in models.items()}
    works |= {name: partial(works[ours], **settings) for name, settings in who.items()}
    same = dict.fromkeys(who, ours)
    about = [f"temperature {temperature}", *["compiled"] * t.compile]
    about += [f"prompts of {file.name}" for file in t.prompts_file or ()]
    return title(t, *about), compare(works, t.runs, same)


def speedup(args: Namespace) -> list[Table]:
    """Self-speculation against the fastest plain decoding, greedy and at temperature 0.8.

    --drafter adds other drafters, by decode.py's names for them.
    """
    t = target(args)
    who = {"drafted": t.settings, **named(t, t.drafter)}
    return [drafted_table(t, who, temperature) for temperature in (0.0, 0.8)]


def named(t: Namespace, drafters: Iterable[str]) -> dict[str, dict]:
    """Settings of generate for drafters by name."""
    raw, base = t.load(t.dtype), t.settings
    return {who: base | parse_drafter(who, raw, base["exit_layer"]) for who in drafters}


def drafters(args: Namespace) -> list[Table]:
    """Every drafter on one checkpoint, greedy and at temperature 0.8, against plain decoding.

    --drafter adds model:DIR and kangaroo:DIR. What `exit auto` reads of a prompt beforehand and the
    search for sublayers to skip, on other prompts, are not timed.
    """
    t, texts = target(args), torch.tensor(target(args, part=1).prompts)
    raw, base = t.load(t.dtype), t.settings
    show = lambda number, *_: progress(f"search {number} of {t.tries}")
    attention, mlp, _ = search_skips(raw, texts, t.tries, on_try=show)
    who = {"early exit": base}
    if not t.compile:  # graphs are of one exit
        chosen = [choose_exit(raw, prompt, base) for prompt in t.prompts]
        auto = {name: [one[name] for one in chosen] for name in ("exit_layer", "draft_len")}
        who["exit auto"] = {**base, **auto}
    alone = [form for form, _ in DRAFTERS.values() if ":" not in form and form != "exit"]
    who |= named(t, [*alone, *t.drafter])
    skip = dict(exit_layer=0, drafter=partial(SkipLayers, attention=attention, mlp=mlp))
    who[f"skip {len(attention)} attention, {len(mlp)} MLP"] = {**base, **skip}
    return [drafted_table(t, who, temperature) for temperature in (0.0, 0.8)]


def sweep(args: Namespace) -> list[Table]:
    """Every exit layer x draft length against the fastest plain decoding, the fastest first.

    Built-in prompts are not those of other commands. Texts end at an EOS.
    """
    t = target(args, part=0 if args.prompts_file else 1)
    cells = {f"--exit {e} --draft {d}": (e, d) for e in t.exits for d in t.drafts}
    if t.png and not find_spec("matplotlib"):
        raise ValueError("--png needs matplotlib")
    t.file = t.ckpt / "generation_config.json"
    if t.write and t.file.exists():
        read_json(t.file)  # refused before the work
    if t.write and not os.access(t.ckpt, os.W_OK):
        raise ValueError(f"{t.ckpt} cannot be written")
    with wanted(t.csv) as table, wanted(t.png) as picture:
        raw, t.settings["exit_layer"] = t.load(t.dtype), 0  # plain: in the largest graphs
        Sampling(t.temperature)  # refused before the work
        for e, d in cells.values():
            check_request(raw.config, [0], e, d, 1, t.settings["min_confidence"])
        own = {e: dict(model=compile_model(copy(raw), e)) if t.compile else {} for e in t.exits}
        who = {
            name: t.settings | dict(exit_layer=e, draft_len=d) | own[e]
            for name, (e, d) in cells.items()
        }
        about, rows = drafted_table(t, who, t.temperature)
        rows = ranked(rows)
        if table:
            cell = lambda row: dict(zip(("exit", "draft"), cells.get(row["way"], ("", ""))))
            ends = lambda speeds: dict(lowest=min(speeds), highest=max(speeds))
            write_csv(table, [cell(row) | row | ends(row["tokens/s"]) for row in rows])
        if picture:
            draw(picture, rows, cells, about)
    return [(f"{about}\n{verdict(t, rows, cells)}", rows)]


def ranked(rows: list[dict]) -> list[dict]:
    """Rows by median speed, with the best and those within noise of it marked."""
    rows = sorted(rows, key=lambda row: -median(row["tokens/s"]))
    best = rows[0]["tokens/s"]
    for row in rows:
        near = len(best) < 3 or any(a >= b for a, b in zip(row["tokens/s"], best))
        row["rank"] = "best" if row is rows[0] else "within noise" if near else None
    return rows


def verdict(t: Namespace, rows: list[dict], cells: dict) -> str:
    """The winner in a sentence. With --write it goes into the checkpoint, if it drafts."""
    best, confidence = rows[0]["way"], t.settings["min_confidence"]
    if best not in cells:
        return f"Plain decoding wins ({best})" + ": nothing was written" * t.write
    text = f"Best: {best} --min-confidence {confidence}"
    if not t.write:
        return f"{text}. --write keeps it"
    if any(row["identical"] is False for row in rows):
        return text  # the command fails
    names = "assistant_early_exit", "num_assistant_tokens", "assistant_confidence_threshold"
    new = dict(zip(names, (*cells[best], confidence)))
    old = read_json(t.file, float) if t.file.exists() else {}
    RunDirectory(t.ckpt, None).write_json(t.file.name, old | new)
    return f"{text}. Written to {t.file}"


def draw(file: IO[bytes], rows: list[dict], cells: dict, about: str) -> None:
    """A PNG of tokens/s and their range over the exit: a line for each draft length."""
    from matplotlib.figure import Figure

    figure = Figure((7, 4.5), layout="constrained")
    axis, lines = figure.subplots(), dict[int, list]()
    for row in rows:
        (e, d), speeds = cells.get(row["way"], (0, 0)), row["tokens/s"]
        lines.setdefault(d, []).append((e, median(speeds), min(speeds), max(speeds)))
    axis.axhline(lines.pop(0)[0][1], color="black", linestyle="--", label="plain decoding")
    for number, d in enumerate(sorted(lines)):
        exits, medians, low, high = zip(*sorted(lines[d]))
        axis.plot(exits, medians, f"C{number}", marker=".", label=f"draft {d}")
        axis.vlines(exits, low, high, f"C{number}", alpha=0.3)
    axis.set(xlabel="exit", ylabel="tokens/s", xticks=exits)
    figure.suptitle(about, fontsize="small", wrap=True)
    axis.legend()
    figure.savefig(file, dpi=110, format="png")
