"""The twin experiment: two models of the same data, seed and steps, one plain, one LayerSkip.

    python docs/twins.py                 trains both, decodes with both
    python docs/twins.py --steps 2700    the budget of the shipped checkpoint

Writes docs/twins.md and docs/twins.png. The same command goes on where training was stopped.
"""

import argparse
import json
import statistics
import subprocess
import sys
from datetime import date
from functools import partial
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from bench.__main__ import machine  # noqa: E402
from bench.common import alternate, decode_all  # noqa: E402
from checkpoint import whole_file  # noqa: E402
from command import load  # noqa: E402
from data import held_out_prompts  # noqa: E402
from exact import pack  # noqa: E402

COMMON = "--lr 2e-3 --warmup 100 --save-every 100"
RECIPES = {
    "plain": "--recipe plain",
    "LayerSkip": "--p-max 0.2 --dropout-time constant --exits 2,3,4,6,8,12,16,20 --rotation 2 "
    "--uniform-exits --e-scale 0.3",
}
EXITS = [1, 2, 3, 4, 6, 8, 12, 16, 20]
TURNS = 3


def train(name: str, out: Path, steps: int) -> None:
    """Trains one of the twins. SystemExit when it does not end."""
    command = [sys.executable, str(ROOT / "train.py"), "--out", str(out), "--steps", str(steps)]
    training = subprocess.Popen([*command, *COMMON.split(), *RECIPES[name].split()])
    while training.poll() is None:
        try:
            training.wait()
        except KeyboardInterrupt:  # reaches train.py too, which saves and stops
            continue
    if training.returncode:
        raise SystemExit(f"twins.py: training of {name} stopped; the same command goes on")


def measure(ckpt: Path, prompts: int, tokens: int, draft_len: int) -> dict:
    """training.json of a checkpoint and, per exit, speedup and acceptance: medians of TURNS turns.

    A speedup is against plain decoding of the same model, in the same type.
    """
    model, tokenizer = load(ckpt)
    pack(model)
    texts = held_out_prompts(prompts, tokenizer, 64)
    decode_all(model, texts[:1], 32)  # so that no turn is timed cold
    decoded = partial(decode_all, model, texts, tokens, draft_len=draft_len)
    runs = alternate({str(e): partial(decoded, exit_layer=e) for e in (0, *EXITS)}, TURNS)
    speed = {e: statistics.median(r.tokens_per_second for r in found) for e, found in runs.items()}
    if any(r.ids != runs["0"][0].ids for found in runs.values() for r in found):
        raise SystemExit("twins.py: a drafted text is not the full model's")
    about = json.loads((ckpt / "training.json").read_text(encoding="utf-8"))
    about["speedup"] = {e: speed[str(e)] / speed["0"] for e in EXITS}
    about["accepted"] = {e: runs[str(e)][0].acceptance for e in EXITS}
    return about


def draw(found: dict, draft_len: int) -> None:
    """docs/twins.png: loss, agreement with the last layer and speed, over the exit layer."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 3, figsize=(13, 3.8), layout="constrained")
    for (name, f), colour in zip(found.items(), ("tab:gray", "tab:green")):
        losses = f["held_out_loss_per_exit"]
        layers = range(1, len(losses) + 1)
        how: dict = dict(color=colour, label=name, marker=".")
        axes[0].plot(layers, losses, **how)
        axes[1].plot(layers, f["held_out_agreement_per_exit"], **how)
        axes[2].plot(EXITS, f["speedup"].values(), **how)
    axes[2].axhline(1, color="black", linewidth=0.8, linestyle="--")
    speed = f"speed against plain decoding, draft {draft_len}"
    for axis, title in zip(axes, ("held-out loss", "agreement with the last layer", speed)):
        axis.set(title=title, xlabel="exit layer")
        axis.grid(alpha=0.3)
    axes[0].legend()
    with whole_file(ROOT / "docs" / "twins.png") as file:
        figure.savefig(file, dpi=110, format="png")


def table(found: dict, steps: int, draft_len: int) -> str:
    """docs/twins.md: the numbers of the picture, a row for each exit."""
    twins, kinds = list(found.values()), ("loss", "agreement", "accepted", "speed")
    columns = [f"{kind}, {name}" for kind in kinds for name in found]
    rows = [
        "# Twins",
        "",
        f"`python docs/twins.py --steps {steps}`, {machine(torch.device('cpu'))}, {date.today()}:",
        f"{twins[0]['tokens'] / 1e6:.1f}M tokens each, draft length {draft_len}, no confidence.",
        "",
        "| exit | " + " | ".join(columns) + " |",
        "|---" * (1 + len(columns)) + "|",
    ]
    for e in [*EXITS, len(twins[0]["held_out_loss_per_exit"])]:
        cells = [f"{f['held_out_loss_per_exit'][e - 1]:.2f}" for f in twins]
        cells += [f"{f['held_out_agreement_per_exit'][e - 1]:.0%}" for f in twins]
        for key, form in (("accepted", ".0%"), ("speedup", ".2f")):
            cells += [format(f[key][e], form) if e in f[key] else "" for f in twins]
        rows.append(f"| {e} | " + " | ".join(cells) + " |")
    return "\n".join(rows) + "\n"


def main() -> None:
    form = argparse.RawDescriptionHelpFormatter
    p = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    p.add_argument("--steps", type=int, default=400, help="of each model (default %(default)s)")
    p.add_argument("--out", type=Path, default=ROOT / "runs", help="where they are trained")
    p.add_argument("--draft", type=int, default=4, help="draft length (default %(default)s)")
    p.add_argument("--prompts", type=int, default=3, help="held-out prompts (default %(default)s)")
    p.add_argument("--tokens", type=int, default=128, help="new ones a prompt (%(default)s)")
    args = p.parse_args()
    places = {name: args.out / f"twin-{name.lower()}-{args.steps}" for name in RECIPES}
    for name, out in places.items():
        train(name, out, args.steps)
    how = args.prompts, args.tokens, args.draft
    found = {name: measure(out, *how) for name, out in places.items()}
    draw(found, args.draft)
    text = table(found, args.steps, args.draft)
    with whole_file(ROOT / "docs" / "twins.md") as file:
        file.write(text.encode())
    print(text)


if __name__ == "__main__":
    main()
