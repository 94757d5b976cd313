"""Kangaroo: a small adapter on an early exit of a frozen model drafts (arXiv 2404.18911).

The adapter is a norm, one causal attention, a residual and a norm, on the hidden state that enters layer E; the model's own
head reads it. The model is not changed, so this is what a *plain* checkpoint can have instead of LayerSkip training.

    python kangaroo.py train --ckpt DIR --exit 2 --steps 600        writes runs/kangaroo/adapter.safetensors
    python decode.py --ckpt DIR --adapter runs/kangaroo --compare
"""

import argparse
import json
import math
import os
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from cache import KVQCache
from data import read_corpus, write_tokens
from drafters import Drafter, Pick
from model import PREFILL_ROWS, Attend, Attention, CachedAttention, CheckpointError, Config, Llama, RMSNorm, RowLinear, auto_dtype, batch_attention, load_checkpoint
from tokenizer import Tokenizer

ETA = 0.6  # drafting stops at or below this confidence (section 3.2)


class Adapter(nn.Module):
    """h after layer E -> what the head reads: norm(h + attention(norm(h))) (section 3.1). (..., T, dim) to the same."""

    def __init__(self, config: Config, exit_layer: int):
        super().__init__()
        self.exit_layer = exit_layer
        self.input_layernorm = RMSNorm(config.dim, config.norm_eps)
        self.self_attn = Attention(config)
        self.norm = RMSNorm(config.dim, config.norm_eps)

    def forward(self, h: Tensor, cos: Tensor, sin: Tensor, attend: Attend = batch_attention) -> Tensor:
        return self.norm(h + self.self_attn(self.input_layernorm(h), cos, sin, attend))


def logits_of(model: Llama, h: Tensor) -> Tensor:
    """h (..., dim) -> logits (..., vocab) by the head alone: the adapter has its own last norm."""
    return (model.head or model.lm_head)(h)


class Kangaroo(Drafter):
    """Layers [0, E) of the model, shared with the verifier, then the adapter, which has one layer of keys and values of its own."""

    def __init__(self, model: Llama, cache: KVQCache, eos: tuple[int, ...] = (), min_confidence: float = ETA, *, adapter: Adapter):
        super().__init__(model, cache, eos, min_confidence)
        c = model.config
        self.adapter, self.exit_layer = adapter, adapter.exit_layer
        a = adapter.self_attn
        if not a.qkv:  # guesses need not be exact
            a.qkv, a.out = RowLinear(a.q_proj, a.k_proj, a.v_proj, exact=False), RowLinear(a.o_proj, exact=False)
        self.own = KVQCache(1, c.n_kv_heads, c.head_dim, c.dim, cache.max_len, 1, model.dtype, model.device)

    @property
    def nbytes(self) -> int:
        return self.own.nbytes + sum(p.nbytes for p in self.adapter.parameters())

    def draft(self, tokens: list[int], limit: int, pick: Pick) -> tuple[list[int], int]:
        if self.own.length < self.cache.length:  # the prompt, seen by the verifier alone: its layers [0, E) once more, on the side
            x = torch.tensor([tokens[: self.cache.length]], device=self.model.device)
            h = self.model.run_layers(self.model.embed(x), 0, self.exit_layer)[0]
            for piece in h[self.own.length :].split(PREFILL_ROWS):
                self.adapt(piece, self.own.length)
                self.own.accept(len(piece))
        self.own.rewind(self.cache.length)

        def step(token: int, row: int) -> Tensor:
            h = self.model.run_layers(self.embed(token), 0, self.exit_layer, self.cache, self.cache.length + row)
            self.cache.put_query(row, h[0])
            h = self.adapt(h, self.cache.length + row)
            self.own.accept(1)
            return h

        return self.chain(step, lambda h: logits_of(self.model, h), tokens[-1], limit, pick), self.exit_layer

    def adapt(self, h: Tensor, start: int) -> Tensor:
        """The adapter on rows h (T, dim) at positions from `start` on; leaves their keys and values."""
        cos, sin = self.model.rotary(start, len(h))
        attention = CachedAttention(self.own, start, len(h), h.dtype, self.model.exact)
        return self.adapter(h, cos, sin, lambda q, k, v: attention(0, q, k, v))


# ---------------------------------------------------------------------------------------------------------------------
# Training and files


def train_step(model: Llama, adapter: Adapter, tokens: Tensor) -> Tensor:
    """Cross-entropy () of the adapter's distribution against the full model's, which stays as it is, over tokens (B, T) (section 3.1)."""
    layers = model.config.n_layers
    with torch.no_grad():
        early = model.run_layers(model.embed(tokens), 0, adapter.exit_layer)
        target = model.unembed(model.run_layers(early, adapter.exit_layer, layers)).float().softmax(-1)
    cos, sin = model.rotary(0, tokens.shape[1])
    guess = logits_of(model, adapter(early, cos, sin)).float()
    return F.cross_entropy(guess.flatten(0, 1), target.flatten(0, 1))


def save_adapter(adapter: Adapter, path: Path, about: dict) -> None:
    """Writes adapter.safetensors, whole or not at all, with the exit layer in its header; adapter.json says how it was made."""
    path.mkdir(parents=True, exist_ok=True)
    weights = {name: p.detach().to(torch.bfloat16).contiguous() for name, p in adapter.named_parameters()}
    save_file(weights, path / "adapter.new", metadata={"exit_layer": str(adapter.exit_layer)})
    os.replace(path / "adapter.new", path / "adapter.safetensors")
    (path / "adapter.json").write_text(json.dumps({"exit_layer": adapter.exit_layer, **about}, indent=2) + "\n")


def load_adapter(path: str | Path, model: Llama) -> Adapter:
    """The adapter of a directory, in the model's type, on its device. CheckpointError, one line, when it is none or does not fit."""
    path = Path(path)
    try:
        with safe_open(path / "adapter.safetensors", framework="pt") as file:
            said = (file.metadata() or {}).get("exit_layer", "")
        exit_layer = int(said) if said.isdecimal() else 0
        if not 1 <= exit_layer < model.config.n_layers:
            raise CheckpointError(f"{path}/adapter.safetensors: its exit layer must be from 1 to {model.config.n_layers - 1}, not {said!r:.40}")
        weights = load_file(path / "adapter.safetensors")
        with torch.device("meta"):
            adapter = Adapter(model.config, exit_layer)
        adapter.load_state_dict(weights, assign=True)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"no adapter can be read in {path}: {' '.join(str(error).split())}") from None
    except RuntimeError:
        raise CheckpointError(f"the adapter in {path} was trained for a model of another shape") from None
    if not all(p.isfinite().all() for p in adapter.parameters()):
        raise CheckpointError(f"the adapter in {path} holds NaN or infinite values")
    return adapter.to(model.device, model.dtype).eval()


def train(args: argparse.Namespace) -> None:
    """The command: trains an adapter, with progress, and saves it. Settings and data that cannot be trained on are refused (ValueError)."""
    model, tokenizer, out = load_checkpoint(args.ckpt, torch.float32), Tokenizer(args.ckpt), Path(args.out)
    if tokenizer.vocab_size > model.config.vocab_size:
        raise ValueError(f"the tokenizer has {tokenizer.vocab_size} tokens, the model only {model.config.vocab_size}")
    if not 1 <= args.exit < model.config.n_layers:
        raise ValueError(f"--exit must be from 1 to {model.config.n_layers - 1}, not {args.exit}")
    for p in model.parameters():
        p.requires_grad_(False)
    torch.manual_seed(args.seed)
    adapter = Adapter(model.config, args.exit)
    with torch.no_grad():
        adapter.norm.weight.copy_(model.model.norm.weight)  # starts as the plain exit, nearly
        adapter.self_attn.o_proj.weight.zero_()
    (out / "tokens").mkdir(parents=True, exist_ok=True)
    tokens, held_out = write_tokens(read_corpus(args.data), tokenizer, out / "tokens")
    if min(len(tokens), len(held_out)) <= args.seq + 1:
        raise ValueError(f"the data is too short: {len(tokens)} training and {len(held_out)} held-out tokens for --seq {args.seq}")
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=args.lr, betas=(0.9, 0.95), weight_decay=0.0)
    started, smooth, bf16 = time.time(), None, auto_dtype(model.device) == torch.bfloat16
    for step in range(args.steps):
        share = step / args.steps
        for group in optimizer.param_groups:
            group["lr"] = args.lr * min(1, (step + 1) / 50) * (0.1 + 0.45 * (1 + math.cos(math.pi * share)))
        x, _ = tokens.crops(args.batch, args.seq, args.seed, step)
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = train_step(model, adapter, x)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(adapter.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        smooth = loss.item() if smooth is None else 0.95 * smooth + 0.05 * loss.item()
        if not math.isfinite(smooth):
            raise ValueError(f"the loss is not finite at step {step + 1}; try a lower --lr")
        if sys.stderr.isatty() or (step + 1) % 50 == 0 or step + 1 == args.steps:
            left = (time.time() - started) / (step + 1) * (args.steps - step - 1) / 60
            end = "" if sys.stderr.isatty() else "\n"
            print(f"\r{'#' * (20 * (step + 1) // args.steps):20} {step + 1}/{args.steps}  loss {smooth:.3f}  {left:.0f} min left", end=end, file=sys.stderr, flush=True)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        losses = [train_step(model, adapter, held_out.crops(args.batch, args.seq, 0, step)[0]).item() for step in range(8)]
    parameters = sum(p.numel() for p in adapter.parameters())
    about = {"ckpt": str(args.ckpt), "steps": args.steps, "tokens": args.steps * args.batch * args.seq, "parameters": parameters}
    about |= {"seconds": round(time.time() - started), "held_out_loss": round(sum(losses) / len(losses), 4)}
    save_adapter(adapter, out, about)
    print(f"\n{out} holds the adapter: python decode.py --ckpt {args.ckpt} --adapter {out}", file=sys.stderr)


def main() -> None:
    p = argparse.ArgumentParser(prog="kangaroo.py", description="Train an adapter that drafts from an early exit of a frozen model (Kangaroo).")
    p.add_argument("what", choices=["train"])
    p.add_argument("--ckpt", default=Path(__file__).parent / "checkpoints" / "pystdlib", metavar="DIR", help="the model (default: the shipped one)")
    p.add_argument("--exit", type=int, default=2, help="layers under the adapter (default %(default)s)")
    p.add_argument("--out", default="runs/kangaroo", metavar="DIR", help="where the adapter goes (default %(default)s)")
    p.add_argument("--data", nargs="+", default=["stdlib"], metavar="SRC", help="text, as in train.py")
    p.add_argument("--steps", type=int, default=600)
    p.add_argument("--batch", type=int, default=8)
    p.add_argument("--seq", type=int, default=256)
    p.add_argument("--lr", type=float, default=6e-3)
    p.add_argument("--seed", type=int, default=0)
    args = p.parse_args()
    try:
        if min(args.steps, args.batch, args.seq) < 1 or not 0 < args.lr < math.inf:
            raise ValueError("--steps, --batch, --seq and --lr must be positive")
        train(args)
    except (ValueError, OSError, SafetensorError) as error:
        print(f"kangaroo.py: {' '.join(str(error).split())}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None


if __name__ == "__main__":
    main()
