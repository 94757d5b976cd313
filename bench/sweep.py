"""Which exit layer and draft length are the fastest: sweep."""

import csv
import os
import textwrap
from argparse import Namespace
from contextlib import suppress
from copy import copy
from importlib.util import find_spec
from io import StringIO
from itertools import product
from pathlib import Path
from statistics import median
from typing import IO

from bench.common import Table, target, title
from bench.decoding import drafted_table
from decode import Sampling, in_range
from exact import MAX_ROWS
from extras.compiled import compile_model
from support.checkpoint import read_json, whole_file
from support.runs import RunDirectory

CONFIG = "generation_config.json"
NOISE = "Within noise: as fast as the best in at least one turn, or of fewer than 3 turns."
Cells = dict[str, tuple[int, int]]  # way: exit layer, draft length


def sweep(args: Namespace) -> list[Table]:
    """Every exit layer x draft length against the fastest plain decoding, the fastest first.

    Built-in prompts are not those of other commands: settings are not shown on what they were
    chosen on. Texts end where decode.py ends them.
    """
    t = target(args, part=0 if args.prompts_file else 1)
    Sampling(t.temperature)
    pairs = product(sorted({*t.exits}), sorted({*t.drafts}))
    cells = {f"--exit {e} --draft {d}": (e, d) for e, d in pairs}
    for e, d in cells.values():
        in_range("exit layer", e, 1, t.config.n_layers - 1)
        in_range("draft length", d, 1, MAX_ROWS - 1)
    if t.png and not find_spec("matplotlib"):
        raise ValueError("--png needs matplotlib: pip install matplotlib")
    if t.write:
        kept(t.ckpt)
    for path in filter(None, (t.csv, t.png, t.write and t.ckpt / CONFIG)):
        with suppress(KeyError), whole_file(path):
            raise KeyError  # it can be written: leave no trace

    raw, t.settings["exit_layer"] = t.load(t.dtype), 0  # plain decoding in the largest graphs
    own = {e: dict(model=compile_model(copy(raw), e)) if t.compile else {} for e in t.exits}
    who = {
        name: t.settings | dict(exit_layer=e, draft_len=d) | own[e]
        for name, (e, d) in cells.items()
    }
    rows = ranked(drafted_table(t, who, t.temperature)[1])
    how = f"temperature {t.temperature}", *["drafts compiled"] * t.compile
    about = title(t, *how, settings="confidence {min_confidence}")
    if t.csv:
        with whole_file(t.csv) as file:
            file.write(as_csv(rows, cells).encode())
    if t.png:
        with whole_file(t.png) as file:
            draw(file, rows, cells, about)
    return [("\n".join([about, NOISE, verdict(t, rows, cells)]), rows)]


def ranked(rows: list[dict]) -> list[dict]:
    """Rows by median speed, with the best and those within noise of it marked."""
    rows = sorted(rows, key=lambda row: -median(row["tokens/s"]))
    best = rows[0]["tokens/s"]
    for row in rows:
        near = len(best) < 3 or any(a >= b for a, b in zip(row["tokens/s"], best))
        row["rank"] = "best" if row is rows[0] else "within noise" if near else None
    return rows


def kept(ckpt: Path) -> dict:
    """generation_config.json of a checkpoint, {} without one. CheckpointError if it is damaged."""
    return read_json(ckpt / CONFIG, float) if os.path.lexists(ckpt / CONFIG) else {}


def verdict(t: Namespace, rows: list[dict], cells: Cells) -> str:
    """The winner in a sentence. With --write it goes into the checkpoint, if it drafts."""
    best, nothing = rows[0]["way"], ": nothing was written" * t.write
    if best not in cells:
        return f"Plain decoding wins ({best}){nothing}."
    confidence = t.settings["min_confidence"]
    text = f"Best: {best} --min-confidence {confidence}"
    if any(row["rank"] for row in rows if row["way"] not in cells):
        text += ", but plain decoding is within noise of it"
    if not t.write:
        return f"{text}. --write keeps it in the checkpoint's settings."
    if any(row["identical"] is False for row in rows):
        return f"{text}. A drafted text is not the plain text{nothing}."
    names = "assistant_early_exit", "num_assistant_tokens", "assistant_confidence_threshold"
    new = dict(zip(names, (*cells[best], confidence)))
    RunDirectory(t.ckpt, None).write_json(CONFIG, kept(t.ckpt) | new)
    return f"{text}. Written to {t.ckpt / CONFIG}."


def as_csv(rows: list[dict], cells: Cells) -> str:
    """A line for each row. Measurements are their median, the lowest and the highest."""
    text, parts = StringIO(), (median, min, max)
    out = csv.writer(text, lineterminator="\n")
    many = [name for name, value in rows[0].items() if isinstance(value, list)]
    one = [name for name in rows[0] if name not in many]
    measured = (f"{name} {part.__name__}" for name in many for part in parts)
    out.writerow(["exit", "draft", *one, *measured])
    for row in rows:
        numbers = (part(row[name]) for name in many for part in parts)
        cell = cells.get(row["way"], ("", ""))
        out.writerow([*cell, *(row[name] for name in one), *numbers])
    return text.getvalue()


def draw(file: IO[bytes], rows: list[dict], cells: Cells, about: str) -> None:
    """A PNG of tokens/s over the exit: a line for each draft length, a level one for plain."""
    from matplotlib.figure import Figure

    figure = Figure((7, 4.5), layout="constrained")
    axis, speeds = figure.subplots(), {row["way"]: median(row["tokens/s"]) for row in rows}
    for d in dict.fromkeys(d for _, d in cells.values()):
        points = [(e, speeds[name]) for name, (e, own) in cells.items() if own == d]
        axis.plot(*zip(*points), marker=".", label=f"draft {d}")
    plain = next(name for name in speeds if name not in cells)  # the fastest
    axis.axhline(speeds[plain], color="black", linestyle="--", label=plain)
    axis.set(xlabel="exit", ylabel="tokens/s", xticks=[e for e, _ in points], ylim=(0, None))
    axis.set_title(textwrap.fill(about, 90), fontsize="small")
    axis.legend()
    figure.savefig(file, dpi=110, format="png")
