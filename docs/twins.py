"""The twin experiment: two models with the same data, seed and steps, one trained plainly and one with LayerSkip.

    python docs/twins.py                    trains both (a quarter of an hour to half an hour each on two cores; goes on where it stopped),
                                            decodes with both, writes docs/twins.png and docs/twins.md
    python docs/twins.py --steps 2700       the budget of the shipped checkpoint

Left, held-out loss and agreement with the last layer, per exit. Right, speed of self-speculative decoding over the exit layer
against the same model's plain decoding.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from bench import decode_all  # noqa: E402
from data import held_out_prompts  # noqa: E402
from model import load_checkpoint  # noqa: E402
from tokenizer import Tokenizer  # noqa: E402

COMMON = ["--lr", "2e-3", "--warmup", "100", "--save-every", "100"]
RECIPES = {
    "plain": ["--recipe", "plain"],
    "LayerSkip": ["--p-max", "0.2", "--dropout-time", "constant", "--exits", "2,3,4,6,8,12,16,20", "--rotation", "2", "--uniform-exits", "--e-scale", "0.3"],
}
EXITS = [1, 2, 3, 4, 6, 8, 12, 16, 20]


def measure(ckpt: Path, prompts: int, tokens: int, draft_len: int) -> dict:
    """Plain tokens/s of a checkpoint and, per exit, the speedup and acceptance of drafting; medians of three turns."""
    model, turns = load_checkpoint(ckpt).pack(), 3
    texts = held_out_prompts(prompts, Tokenizer(ckpt), 64)
    decode_all(model, texts[:1], 32)
    runs = {exit: [] for exit in [0, *EXITS]}
    for turn in range(turns):
        for exit, found in runs.items():
            settings = dict(exit_layer=exit, draft_len=draft_len) if exit else {}
            found.append(decode_all(model, texts, tokens, f"{ckpt.name}, turn {turn + 1}/{turns}, exit {exit}:", **settings))
    speed = {exit: sorted(r.tokens_per_second for r in found)[turns // 2] for exit, found in runs.items()}
    assert all(r.ids == runs[0][0].ids for found in runs.values() for r in found), "drafted text is the full model's"
    exits = {exit: {"speedup": speed[exit] / speed[0], "accepted": runs[exit][0].acceptance} for exit in EXITS}
    return {"plain_tokens_per_second": speed[0], "exits": exits, **json.loads((ckpt / "training.json").read_text())}


def draw(found: dict, file: Path, draft_len: int) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 3, figsize=(13, 3.8), layout="constrained")
    for (name, f), colour in zip(found.items(), ("tab:gray", "tab:green")):
        layers = range(1, len(f["held_out_loss_per_exit"]) + 1)
        axes[0].plot(layers, f["held_out_loss_per_exit"], color=colour, label=name, marker=".")
        axes[1].plot(layers, f["held_out_agreement_per_exit"], color=colour, label=name, marker=".")
        axes[2].plot(EXITS, [f["exits"][e]["speedup"] for e in EXITS], color=colour, label=name, marker=".")
    axes[2].axhline(1, color="black", linewidth=0.8, linestyle="--")
    for axis, title in zip(axes, ("held-out loss", "agreement with the last layer", f"speed against plain decoding, draft {draft_len}")):
        axis.set(title=title, xlabel="exit layer")
        axis.grid(alpha=0.3)
    axes[0].legend()
    figure.savefig(file, dpi=110)


def table(found: dict, steps: int, draft_len: int) -> str:
    plain, twin = found.values()
    rows = [f"{steps} steps each ({plain['tokens'] / 1e6:.1f}M tokens); `python docs/twins.py --steps {steps}`. Draft length {draft_len}, no confidence stop.", ""]
    rows += ["| exit | loss, plain | loss, LayerSkip | agreement, plain | agreement, LayerSkip | accepted, plain | accepted, LayerSkip | speed, plain | speed, LayerSkip |"]
    rows += ["|---" * 9 + "|"]
    for e in [*EXITS, len(plain["held_out_loss_per_exit"])]:
        cells = [f"{f['held_out_loss_per_exit'][e - 1]:.2f}" for f in (plain, twin)]
        cells += [f"{f['held_out_agreement_per_exit'][e - 1]:.0%}" for f in (plain, twin)]
        for key, shape in (("accepted", ".0%"), ("speedup", ".2f")):
            cells += [format(f["exits"][e][key], shape) if e in f["exits"] else "" for f in (plain, twin)]
        rows.append(f"| {e} | " + " | ".join(cells) + " |")
    return "\n".join(rows) + "\n"


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--steps", type=int, default=400, help="of each model (default %(default)s)")
    p.add_argument("--out", type=Path, default=ROOT / "runs", help="where the models are trained (default runs/)")
    p.add_argument("--draft", type=int, default=4, help="draft length (default %(default)s)")
    p.add_argument("--prompts", type=int, default=3)
    p.add_argument("--tokens", type=int, default=128)
    args = p.parse_args()
    found = {}
    for name, recipe in RECIPES.items():
        out = args.out / f"twin-{name.lower()}-{args.steps}"
        command = [sys.executable, str(ROOT / "train.py"), "--out", str(out), "--steps", str(args.steps), *COMMON, *recipe]
        training = subprocess.Popen(command)
        while training.poll() is None:
            try:
                training.wait()
            except KeyboardInterrupt:  # reaches train.py too, which saves and stops
                continue
        if training.returncode:
            raise SystemExit(f"twins.py: training of {name} stopped; the same command goes on")
    for name in RECIPES:
        found[name] = measure(args.out / f"twin-{name.lower()}-{args.steps}", args.prompts, args.tokens, args.draft)
    draw(found, ROOT / "docs" / "twins.png", args.draft)
    text = table(found, args.steps, args.draft)
    (ROOT / "docs" / "twins.md").write_text("# Twins\n\n" + text)
    print(text)


if __name__ == "__main__":
    main()
