"""Which exit layer and draft length are the fastest: sweep."""

import csv
import io
import textwrap
from argparse import Namespace
from copy import copy
from importlib.util import find_spec
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

SETTINGS_FILE = "generation_config.json"
NOISE = """\
Within noise: in one turn or more as fast as the best. Fewer than 3 turns tell nothing of noise."""


def sweep(args: Namespace) -> list[Table]:
    """Every exit layer x draft length against the fastest plain decoding, the fastest first.

    Built-in prompts are not those of other commands: settings are not shown on what they were
    chosen on. Texts end where decode.py ends them.
    """
    t = target(args, part=0 if args.prompts_file else 1)
    for e, d in product(t.exits, t.drafts):
        in_range("exit layer", e, 1, t.config.n_layers - 1)
        in_range("draft length", d, 1, MAX_ROWS - 1)
    Sampling(t.temperature)
    settings_file = t.ckpt / SETTINGS_FILE
    if t.write and settings_file.exists():
        read_json(settings_file)  # a damaged one is not replaced
    if t.png and not find_spec("matplotlib"):
        raise ValueError("--png needs matplotlib: pip install matplotlib")
    for file in (t.csv, t.png, settings_file if t.write else None):
        if file:
            check_writable(file)

    t.settings["exit_layer"] = 0  # plain decoding in the largest graphs
    raw, who = t.load(t.dtype), dict[str, dict]()
    for e in t.exits:
        own = dict(model=compile_model(copy(raw), e)) if t.compile else {}
        cells = [dict(exit_layer=e, draft_len=d) for d in t.drafts]
        who |= {way(cell): t.settings | cell | own for cell in cells}
    _, rows = drafted_table(t, who, t.temperature)
    rows = judged(rows)
    how = f"temperature {t.temperature}", *["drafts compiled"] * t.compile
    about = title(t, *how, settings="confidence {min_confidence}")
    if t.csv:
        with whole_file(t.csv) as file:
            file.write(as_csv(rows, who).encode())
    if t.png:
        with whole_file(t.png) as file:
            draw(file, rows, who, about)
    return [("\n".join([about, NOISE, verdict(t, rows, who)]), rows)]


def way(cell: dict) -> str:
    """The options of decode.py for an exit layer and a draft length."""
    return f"--exit {cell['exit_layer']} --draft {cell['draft_len']}"


def check_writable(path: Path) -> None:
    """Raises ValueError where whole_file could not write at `path`. Leaves no trace."""
    try:
        with whole_file(path):
            raise KeyError  # whole_file so gives up
    except KeyError:
        pass
    except OSError as error:
        raise ValueError(f"{path} cannot be written: {error.strerror}") from None


def judged(rows: list[dict]) -> list[dict]:
    """Rows by their median speed, with the best and those within noise of it marked."""
    rows = sorted(rows, key=lambda row: -median(row["tokens/s"]))
    best = rows[0]["tokens/s"]
    for row in rows:
        near = len(best) < 3 or any(a >= b for a, b in zip(row["tokens/s"], best))
        row["rank"] = "best" if row is rows[0] else "within noise" if near else None
    return rows


def verdict(t: Namespace, rows: list[dict], who: dict[str, dict]) -> str:
    """The winner in a sentence. With --write it goes into the checkpoint, if it drafts."""
    best = rows[0]["way"]
    not_written = ": nothing was written" * t.write
    if best not in who:
        return f"Plain decoding wins ({best}){not_written}."
    cell = who[best]
    text = f"Best: {best} --min-confidence {cell['min_confidence']}"
    if any(row["rank"] for row in rows if row["way"] not in who):
        text += ", but plain decoding is within noise of it"
    if not t.write:
        return f"{text}. --write keeps it in the checkpoint's settings."
    if any(row["identical"] is False for row in rows):
        return f"{text}. A drafted text is not the plain text{not_written}."
    file = t.ckpt / SETTINGS_FILE
    found = read_json(file, float) if file.exists() else {}
    found["assistant_early_exit"] = cell["exit_layer"]
    found["num_assistant_tokens"] = cell["draft_len"]
    found["assistant_confidence_threshold"] = cell["min_confidence"]
    RunDirectory(t.ckpt, None).write_json(SETTINGS_FILE, found)
    return f"{text}. Written to {file}."


def as_csv(rows: list[dict], who: dict[str, dict]) -> str:
    """The rows, a line each; of several measurements the median, the lowest and the highest."""
    lines = []
    for row in rows:
        cell = who.get(row["way"], {})
        line = {"way": row["way"], "exit": cell.get("exit_layer"), "draft": cell.get("draft_len")}
        for name, value in row.items():
            if isinstance(value, list):
                line |= {f"{name} {f.__name__}": f(value) for f in (median, min, max)}
            else:
                line[name] = value
        lines.append(line)
    text = io.StringIO()
    table = csv.DictWriter(text, lines[0], lineterminator="\n")
    table.writeheader()
    table.writerows(lines)
    return text.getvalue()


def draw(file: IO[bytes], rows: list[dict], who: dict[str, dict], about: str) -> None:
    """A PNG of tokens/s over the exit: a line for each draft length, a level one for plain."""
    from matplotlib.figure import Figure

    figure = Figure((7, 4.5), layout="constrained")
    axis, speeds = figure.subplots(), {row["way"]: median(row["tokens/s"]) for row in rows}
    for d in sorted({cell["draft_len"] for cell in who.values()}):
        cells = [(c["exit_layer"], speeds[n]) for n, c in who.items() if c["draft_len"] == d]
        axis.plot(*zip(*sorted(cells)), marker=".", label=f"draft {d}")
    plain = next(row["way"] for row in rows if row["way"] not in who)
    axis.axhline(speeds[plain], color="black", linestyle="--", label=plain)
    axis.set(
        xlabel="exit", ylabel="tokens/s", xticks=sorted({x["exit_layer"] for x in who.values()})
    )
    axis.set_ylim(bottom=0)
    axis.set_title(textwrap.fill(about, 90), fontsize="small")
    axis.legend()
    figure.savefig(file, dpi=110, format="png")
