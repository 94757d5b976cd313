"""Training a Llama whose every layer can be an exit: LayerSkip (arXiv 2404.16710), section 4.1.

    J = sum_l ẽ(t, l) CE(g(x_{l+1}), Y)          early-exit loss over the layers of this step   (exit_weights)
    x_{l+1} = x_l + M(p(l, t)) f_l(x_l)          layer dropout, drawn per sample and per layer   (run_with_dropout)

    python train.py --out runs/mine --minutes 30          trains on the standard library's source, tokenizer and all

With p_max = 0 and the last exit only it is plain training.
"""

import argparse
import json
import math
import os
import shlex
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from data import crops, is_held_out, read_texts, stdlib_files, train_tokenizer, write_tokens
from model import CheckpointError, Config, Llama, batch_attention, save_checkpoint
from tokenizer import Tokenizer

# ---------------------------------------------------------------------------------------------------------------------
# The two schedules. l counts layers from 0 to L-1, t counts steps from 0 to T-1.


def layer_dropout(l: int, n_layers: int, p_max: float) -> float:
    """Probability of skipping layer l: p(l) = D(l) p_max, D(l) = exp(l ln2 / (L-1)) - 1, from 0 at the first layer to
    p_max at the last. (LayerSkip, section 4.1.1, with S(t) = 1; the paper lets S grow with t when it trains from scratch.)"""
    return p_max * (math.exp(l * math.log(2) / max(n_layers - 1, 1)) - 1)


def exit_weights(t: int, n_layers: int, exits: list[int], rotation: int, e_scale: float, uniform: bool) -> dict[int, float]:
    """Weight ẽ(t, l) of each exit that step t trains, by exit layer E = l + 1; they sum to 1. (LayerSkip, section 4.1.2.)

    ẽ(t, l) = C(t, l) e(l) / sum_i C(t, i) e(i) with the rotational curriculum C: of the chosen `exits`, every `rotation`-th
    one, shifted by one each step, and the last layer always. e(l) = e_scale * sum_{i<=l} i below the last layer and
    e(L-1) = L-1 + e_scale * sum_{i<=L-2} i. uniform: e(l) = e_scale below the last layer and e(L-1) = 1, which gives early
    exits of a deep model a share they can feel: with L = 32 the published weights give exit 3 less than one per cent.
    """

    def e(l: int) -> float:
        if uniform:
            return 1.0 if l == n_layers - 1 else e_scale
        if l == n_layers - 1:
            return l + e_scale * sum(range(l))
        return e_scale * sum(range(l + 1))

    early = [exit for exit in sorted(exits) if exit < n_layers]
    active = [exit for place, exit in enumerate(early) if place % rotation == t % rotation] + [n_layers]
    weights = {exit: e(exit - 1) for exit in active}
    total = sum(weights.values())
    return {exit: weight / total for exit, weight in weights.items() if weight}


# ---------------------------------------------------------------------------------------------------------------------
# One step


def run_with_dropout(layer, h: Tensor, cos: Tensor, sin: Tensor, kept: Tensor) -> Tensor:
    """x + M f(x): `layer` on the samples of h (B, T, dim) where kept (B,) is true; the others pass unchanged and cost
    nothing. Unlike Dropout there is no rescaling, in training or at inference (LayerSkip, section 4.1.1)."""
    if kept.all():
        return layer(h, cos, sin)
    if not kept.any():
        return h
    index = kept.nonzero()[:, 0]
    return h.index_copy(0, index, layer(h[index], cos, sin).to(h.dtype))


def train_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention q (B, T, H, hd), k and v (B, T, Hkv, hd) -> (B, T, H, hd), as two plain matrix products.

    At training lengths the products of a CPU in bfloat16 are faster than its fused attention: forward and backward of
    (8, 3 heads, 512, 64) take 22 ms against 41 on two Zen 4 cores. Elsewhere the fused one wins.
    """
    if q.device.type != "cpu":
        return batch_attention(q, k, v)
    batch, length, heads, head_dim = q.shape
    groups = k.shape[2]
    q = q.transpose(1, 2).reshape(batch, groups, -1, head_dim)  # heads that share keys: more query rows
    scores = (q @ k.permute(0, 2, 3, 1) * head_dim**-0.5).unflatten(2, (-1, length))
    hidden = torch.ones(length, length, dtype=torch.bool, device=q.device).triu(1)
    weights = scores.masked_fill(hidden, -math.inf).softmax(-1).to(v.dtype).flatten(2, 3)
    return (weights @ v.transpose(1, 2)).reshape(batch, heads, length, head_dim).transpose(1, 2)


def exit_loss(model: Llama, h: Tensor, targets: Tensor) -> Tensor:
    """CE(g(h), Y) for hidden states h (B, T, dim) after some layer and targets (B, T), in float32."""
    return F.cross_entropy(model.unembed(h).flatten(0, 1).float(), targets.flatten())


def train_step(model: Llama, tokens: Tensor, targets: Tensor, weights: dict[int, float], drop: list[float], generator, block, loss_of):
    """Loss J of one batch and its gradients; returns the unweighted loss of each exit.

    block and loss_of are Layer.forward and exit_loss, perhaps compiled. Random numbers come from `generator` alone.
    """
    cos, sin = (x[None] for x in model.rotary(0, tokens.shape[1]))
    h, total, losses = model.embed(tokens), 0.0, {}
    for l, layer in enumerate(model.model.layers):
        kept = torch.rand(len(tokens), generator=generator) >= drop[l]
        h = run_with_dropout(lambda *x: block(layer, *x, train_attention), h, cos, sin, kept)
        if l + 1 in weights:
            loss = loss_of(model, h, targets)
            total = total + weights[l + 1] * loss
            losses[l + 1] = loss.detach()
    total.backward()
    return {exit: loss.item() for exit, loss in losses.items()}


@torch.no_grad()
def evaluate(model: Llama, tokens: np.ndarray, length: int, batches: int, batch: int) -> dict[str, list[float]]:
    """Held-out loss and agreement with the last layer's greedy token, per exit 1..L, on fixed crops."""
    layers = model.config.n_layers
    loss, agreement = torch.zeros(layers), torch.zeros(layers)
    for step in range(batches):
        x, y = crops(tokens, batch, length, seed=0, step=step)
        h, picks = model.embed(x), []
        for l in range(layers):
            h = model.run_layers(h, l, l + 1)
            logits = model.unembed(h).float()
            loss[l] += F.cross_entropy(logits.flatten(0, 1), y.flatten()) / batches
            picks.append(logits.argmax(-1))
        agreement += torch.stack([(pick == picks[-1]).float().mean() for pick in picks]) / batches
    return {"loss": [round(v, 4) for v in loss.tolist()], "agreement": [round(v, 4) for v in agreement.tolist()]}


def initialise(model: Llama, generator: torch.Generator) -> None:
    """GPT-2's initialisation: normal 0.02, the two projections into the residual stream scaled by 1 / sqrt(2 L)."""
    for name, p in model.named_parameters():
        if p.dim() == 2:
            scale = 0.02 / (math.sqrt(2 * model.config.n_layers) if "o_proj" in name or "down_proj" in name else 1)
            p.data.normal_(0, scale, generator=generator)


# ---------------------------------------------------------------------------------------------------------------------
# The loop


def check(args: argparse.Namespace) -> list[int]:
    """The exits to train; raises ValueError on settings that cannot run."""
    for name in ("steps", "batch", "seq", "rotation", "save_every", "layers", "vocab"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1, not {getattr(args, name)}")
    if args.minutes is not None and not args.minutes > 0:
        raise ValueError(f"--minutes must be positive, not {args.minutes}")
    if args.seq > args.max_len:
        raise ValueError(f"--seq {args.seq} is longer than the context of {args.max_len} (--max-len)")
    if not 0 <= args.p_max < 1:
        raise ValueError(f"--p-max must be from 0 to below 1, not {args.p_max}")
    if not 0 <= args.e_scale < math.inf:
        raise ValueError(f"--e-scale must not be negative, not {args.e_scale}")
    try:
        exits = [int(e) for e in args.exits.split(",")] if args.exits else list(range(1, args.layers))
    except ValueError:
        raise ValueError(f"--exits takes layers such as 2,4,8, not {args.exits!r}") from None
    if not all(1 <= e < args.layers for e in exits):
        raise ValueError(f"--exits must lie from 1 to {args.layers - 1}; the last layer is always trained")
    return exits


def train(args: argparse.Namespace) -> None:
    exits, out = check(args), Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    train_tokens, held_tokens, tokenizer = prepare_data(out, args.vocab)
    config = Config(
        vocab_size=tokenizer.vocab_size,
        dim=args.dim,
        hidden_dim=args.hidden_dim,
        n_layers=args.layers,
        n_heads=args.heads,
        n_kv_heads=args.kv_heads,
        head_dim=args.head_dim,
        max_len=args.max_len,
        tied=True,
        bos=tokenizer.bos,
        eos=(tokenizer.eos,),
    )
    generator = torch.Generator().manual_seed(args.seed)
    model = Llama(config)
    initialise(model, generator)
    decayed = [p for p in model.parameters() if p.dim() == 2]
    plain = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.95), fused=True)
    drop = [layer_dropout(l, args.layers, args.p_max) for l in range(args.layers)]
    block, loss_of = (lambda layer, *x: layer(*x)), exit_loss
    if args.compile:
        block, loss_of = torch.compile(block), torch.compile(loss_of)

    parameters = sum(p.numel() for p in model.parameters())
    log(f"{parameters / 1e6:.1f}M parameters, {len(train_tokens) / 1e6:.2f}M training tokens, {len(held_tokens) / 1e6:.2f}M held out")
    steps, started, seen, shown = args.steps, time.time(), 0, {}
    metrics = open(out / "metrics.jsonl", "w")
    step = 0
    try:
        while step < steps:
            if args.minutes and step == 20:  # after compilation: turn the time budget into a number of steps
                started, seen = time.time(), 0
            if args.minutes and step == 40:
                steps = 41 + int(args.minutes * 60 / ((time.time() - started) / 20))
                log(f"\n{args.minutes} minutes are {steps} steps")
            for group in optimizer.param_groups:
                group["lr"] = args.lr * learning_rate(step, steps, args.warmup)
            x, y = crops(train_tokens, args.batch, args.seq, args.seed, step)
            weights = exit_weights(step, args.layers, exits, args.rotation, args.e_scale, args.uniform_exits)
            with torch.autocast("cpu", torch.bfloat16, enabled=args.bf16):
                losses = train_step(model, x, y, weights, drop, generator, block, loss_of)
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0).item()
            if not math.isfinite(norm):
                raise SystemExit(f"\ntrain.py: the gradient is not finite at step {step}; the last checkpoint in {out} stays as it is")
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            step, seen = step + 1, seen + x.numel()
            for exit, loss in losses.items():
                shown[exit] = loss if exit not in shown else 0.95 * shown[exit] + 0.05 * loss
            rate = seen / (time.time() - started)
            metrics.write(json.dumps({"step": step, "losses": losses, "norm": norm, "tokens_per_second": rate}) + "\n")
            if step % 10 == 0 or step == steps:
                left = (steps - step) * x.numel() / rate / 60
                exits_shown = " ".join(f"{e}:{shown[e]:.2f}" for e in sorted(shown))
                log(f"\rstep {step}/{steps}  {rate:,.0f} tokens/s  {left:.1f} min left  loss {exits_shown}", end="")
                metrics.flush()
            if step % args.save_every == 0 or step == steps:
                save(model, tokenizer, out, args, step, evaluate(model, held_tokens, args.seq, 8, args.batch))
    except KeyboardInterrupt:
        log("\nstopped; saving")
        save(model, tokenizer, out, args, step, evaluate(model, held_tokens, args.seq, 8, args.batch))
    log(f"\n{out} holds the checkpoint: python decode.py --ckpt {out}")


def learning_rate(t: int, steps: int, warmup: int) -> float:
    """Factor on the peak rate: linear warm-up, then a cosine down to a tenth."""
    if t < warmup:
        return (t + 1) / warmup
    return 0.1 + 0.45 * (1 + math.cos(math.pi * (t - warmup) / max(steps - warmup, 1)))


def prepare_data(out: Path, vocab: int) -> tuple[np.ndarray, np.ndarray, Tokenizer]:
    """Training and held-out tokens and the tokenizer, trained on the training files; kept in `out` for the next run."""
    files = stdlib_files()
    texts = read_texts([f for f in files if not is_held_out(f)])
    path = out / "tokenizer.model"
    tokenizer = Tokenizer(path) if path.is_file() else train_tokenizer(texts, vocab, path)
    if tokenizer.vocab_size != vocab:
        raise ValueError(f"{path} has {tokenizer.vocab_size} tokens, not the {vocab} of --vocab; choose another --out")
    held_out = read_texts([f for f in files if is_held_out(f)])
    return write_tokens(texts, tokenizer, out / "train.bin"), write_tokens(held_out, tokenizer, out / "held_out.bin"), tokenizer


def save(model: Llama, tokenizer: Tokenizer, out: Path, args: argparse.Namespace, step: int, held_out: dict) -> None:
    """Writes the checkpoint in bfloat16 with what a reader needs to judge it and to make it again."""
    stored = Llama(model.config).to(torch.bfloat16)
    stored.load_state_dict(model.state_dict())
    save_checkpoint(stored, out)
    generation = {"bos_token_id": tokenizer.bos, "eos_token_id": tokenizer.eos}
    record = {
        "command": shlex.join(["python", "train.py", *sys.argv[1:]]),
        "seed": args.seed,
        "steps": step,
        "tokens": step * args.batch * args.seq,
        "held_out_loss_per_exit": held_out["loss"],
        "held_out_agreement_per_exit": held_out["agreement"],
    }
    for name, value in (("generation_config.json", generation), ("training.json", record)):
        (out / (name + ".new")).write_text(json.dumps(value, indent=2) + "\n")
        os.replace(out / (name + ".new"), out / name)


def log(text: str, end: str = "\n") -> None:
    print(text, end=end, file=sys.stderr, flush=True)


def main() -> None:
    p = argparse.ArgumentParser(description="Train an early-exit Llama: LayerSkip's layer dropout and early-exit loss.")
    p.add_argument("--out", required=True, help="directory for the checkpoint, tokenizer, tokens and metrics")
    p.add_argument("--steps", type=int, default=3000, help="optimiser steps (default %(default)s)")
    p.add_argument("--minutes", type=float, help="time budget instead of --steps; turned into steps once the speed is known")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--batch", type=int, default=8, help="sequences per step")
    p.add_argument("--seq", type=int, default=512, help="tokens per sequence")
    p.add_argument("--lr", type=float, default=1e-3, help="peak learning rate")
    p.add_argument("--warmup", type=int, default=100, help="steps of linear warm-up")
    p.add_argument("--save-every", type=int, default=500, help="steps between checkpoints")
    shape = p.add_argument_group("shape of the model")
    shape.add_argument("--layers", type=int, default=24)
    shape.add_argument("--dim", type=int, default=192)
    shape.add_argument("--hidden-dim", type=int, default=384)
    shape.add_argument("--heads", type=int, default=3)
    shape.add_argument("--kv-heads", type=int, default=1)
    shape.add_argument("--head-dim", type=int, default=64)
    shape.add_argument("--vocab", type=int, default=2048)
    shape.add_argument("--max-len", type=int, default=512, help="context length")
    recipe = p.add_argument_group("LayerSkip recipe")
    recipe.add_argument("--p-max", type=float, default=0.1, help="layer dropout at the last layer; 0 turns it off")
    recipe.add_argument("--exits", help="exit layers that get a loss, such as 2,4,8 (default: every layer)")
    recipe.add_argument("--rotation", type=int, default=8, help="each exit is trained every so many steps; the last always")
    recipe.add_argument("--e-scale", type=float, default=1.0, help="weight of the early exits against the last")
    recipe.add_argument("--uniform-exits", action="store_true", help="equal weights for the early exits, not growing with depth")
    p.add_argument("--bf16", action=argparse.BooleanOptionalAction, default=True, help="bfloat16 matrix products")
    p.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True, help="torch.compile of layer and loss")
    args = p.parse_args()
    if args.minutes:
        args.steps = 10**9
    try:
        train(args)
    except (CheckpointError, ValueError, OSError) as error:
        log(f"train.py: {error}")
        raise SystemExit(2)


if __name__ == "__main__":
    main()
