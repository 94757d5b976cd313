"""What a draft of E layers can reach at best: E layers that serve nothing but to foresee the full model.

    python docs/bound.py --exit 6 --steps 1500 --out runs/draft6          trains them, prints agreement with the full model as it goes
    python decode.py --draft-ckpt runs/draft6 --compare                   they are a checkpoint: a draft model

The first E layers of a checkpoint, its embedding and its head are copied and trained on the frozen checkpoint's own distribution
(the target of DistillSpec, arXiv 2310.08461). An early exit has the same E layers, but must leave the layers above something to work with, and
shares its head with them: what this copy reaches with the same training is more than it can hope for.
"""

import argparse
import json
import math
import shutil
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from data import read_corpus, write_tokens  # noqa: E402
from model import Llama, load_checkpoint, save_checkpoint  # noqa: E402
from tokenizer import Tokenizer  # noqa: E402
from train import cross_entropy, learning_rate, train_attention  # noqa: E402


def hidden(model: Llama, tokens: torch.Tensor) -> torch.Tensor:
    """What the head reads after the last layer, (rows, dim), for tokens (B, T)."""
    h, (cos, sin) = model.embed(tokens), model.rotary(0, tokens.shape[1])
    for layer in model.model.layers:
        h = layer(h, cos, sin, train_attention)
    return h.flatten(0, 1)


def losses(student: Llama, teacher: Llama, head: torch.Tensor, tokens: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, float]:
    """Mean cross-entropy of the student's distribution against the teacher's, and how often their greedy tokens agree."""
    with torch.no_grad():
        wanted = teacher.unembed(hidden(teacher, tokens)).float()
    loss, logits = cross_entropy(hidden(student, tokens), student.model.norm.weight, head, student.model.norm.eps, targets.flatten(), wanted)
    return loss / targets.numel(), (logits.argmax(-1) == wanted.argmax(-1)).float().mean().item()


def main() -> None:
    p = argparse.ArgumentParser(prog="docs/bound.py", description="Train a copy of the first E layers to foresee the full model, and nothing else.")
    p.add_argument("--ckpt", default=ROOT / "checkpoints" / "pystdlib", metavar="DIR", help="the full model (default: the shipped one)")
    p.add_argument("--exit", type=int, default=6, help="layers of the copy (default %(default)s)")
    p.add_argument("--out", default="runs/draft6", metavar="DIR", help="where the copy goes (default %(default)s)")
    p.add_argument("--data", nargs="+", default=["stdlib"], metavar="SRC", help="text, as in train.py")
    p.add_argument("--steps", type=int, default=1500)
    p.add_argument("--batch", type=int, default=8)
    p.add_argument("--seq", type=int, default=256)
    p.add_argument("--lr", type=float, default=1e-3)
    args = p.parse_args()

    torch.manual_seed(0)
    teacher, student = load_checkpoint(args.ckpt, torch.float32), load_checkpoint(args.ckpt, torch.float32)
    if not 1 <= args.exit < teacher.config.n_layers:
        p.error(f"--exit must be from 1 to {teacher.config.n_layers - 1}, not {args.exit}")
    student.config = replace(teacher.config, n_layers=args.exit)
    del student.model.layers[args.exit :]
    for layer in [*teacher.model.layers, *student.model.layers]:
        layer.compile()
    tokenizer, out = Tokenizer(args.ckpt), Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    shutil.copy(Path(args.ckpt) / "tokenizer.model", out)
    tokens, held_out = write_tokens(read_corpus(args.data), tokenizer, out)
    optimizer = torch.optim.AdamW(student.parameters(), lr=args.lr, betas=(0.9, 0.95), weight_decay=0.0)
    started = time.time()
    head = student.lm_head.weight
    for step in range(args.steps + 1):
        if step % 100 == 0 or step == args.steps:
            with torch.no_grad():
                found = [losses(student, teacher, head, *held_out.crops(8, 256, seed=0, step=i)) for i in range(8)]
            loss, agreement = (sum(float(f[i]) for f in found) / 8 for i in range(2))
            print(json.dumps({"step": step, "seconds": round(time.time() - started), "held_out_loss": round(loss, 4), "agreement": round(agreement, 4)}), flush=True)
            save_checkpoint(student, out)
            (out / "training.json").write_text(json.dumps({"teacher": str(args.ckpt), "steps": step, "tokens": step * args.batch * args.seq, "agreement": agreement}, indent=2) + "\n")
        if step == args.steps:
            break
        for group in optimizer.param_groups:
            group["lr"] = args.lr * learning_rate(step, args.steps, 50)
        loss, _ = losses(student, teacher, head, *tokens.crops(args.batch, args.seq, 1, step))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if not math.isfinite(loss.item()):
            raise SystemExit(f"docs/bound.py: the loss is not finite at step {step + 1}; try a lower --lr")


if __name__ == "__main__":
    main()
