"""Training runs side by side: loss over steps, loss and agreement over exits.

python -m extras.curves runs/plain runs/layerskip --png twins.png
"""

import argparse
from pathlib import Path
from typing import IO

from extras.trace import wanted
from support.checkpoint import parse_object
from support.console import command_errors
from support.train_command import worth


def read_run(run: Path) -> tuple[list[dict], list[dict]]:
    """Rows of metrics.jsonl (docs/training.md): steps, saves. ValueError without saves."""
    file = run / "metrics.jsonl"
    text = file.read_text("utf-8") if file.is_file() else ""
    rows = [parse_object(line, str(file)) for line in text.splitlines()]
    if not (saves := [row for row in rows if "held_out" in row]):
        raise ValueError(f"{run} is no run of train.py that was saved")
    return [row for row in rows if "losses" in row], saves


def draw(file: IO[bytes], runs: dict) -> None:
    """A PNG of three plots, from `read_run` by name. In the first, training is pale."""
    from matplotlib.figure import Figure

    figure = Figure((13, 3.6), layout="constrained")
    over_steps, *over_exits = figure.subplots(1, 3)
    for number, (name, (steps, saves)) in enumerate(runs.items()):
        found, how = saves[-1]["held_out"], dict(color=f"C{number}", marker=".", label=name)
        *_, last = found
        trained = [(s["step"], s["losses"][last]) for s in steps]
        saved = [(s["step"], s["held_out"][last]["loss"]) for s in saves]
        over_steps.plot(*zip(*trained), how["color"], alpha=0.3)
        over_steps.plot(*zip(*saved), **how)
        for axis, key in zip(over_exits, ("loss", "agreement")):
            axis.plot([*map(int, found)], [e[key] for e in found.values()], **how)
            axis.set(title=f"held-out {key}", xlabel="exit")
    over_steps.set(title="loss of the last layer", xlabel="step")
    over_steps.legend()
    figure.savefig(file, dpi=110, format="png")


def main() -> None:
    p = argparse.ArgumentParser(prog="python -m extras.curves", description="Compare runs.")
    p.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a directory of train.py")
    p.add_argument("--png", type=Path, metavar="FILE", help="draw them")
    args = p.parse_args()
    with command_errors(p.prog), wanted(args.png) as file:
        runs = {str(run): read_run(run) for run in args.runs}
        for name, (_, saves) in runs.items():
            print(f"{name}, step {saves[-1]['step']}: {worth(saves[-1]['held_out'])}")
        if file:
            draw(file, runs)


if __name__ == "__main__":
    main()
