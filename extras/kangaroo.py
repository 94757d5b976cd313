"""Kangaroo: an adapter on an early exit of a frozen model drafts (arXiv 2404.18911).

This is for a *plain* checkpoint, in place of LayerSkip training.

    python -m extras.kangaroo --ckpt DIR --exit 2 --steps 600 --out runs/kangaroo
    python decode.py --ckpt DIR --drafter kangaroo:runs/kangaroo --compare
"""

import argparse
import math
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from cache import KVQCache
from decode import NoDraft, Pick
from exact import auto_dtype
from extras.drafters import run_draft
from model import PREFILL_ROWS, Attend, Attention, Config, Llama, RMSNorm, causal_attention
from support.checkpoint import CheckpointError, whole_file
from support.console import DEFAULT_CKPT, command_errors, load
from support.data import read_corpus, write_tokens
from support.runs import RunDirectory
from support.train_command import conversations


class Adapter(nn.Module):
    """norm(h + attention(norm(h))) for the head (section 3.1). (..., T, dim) to the same."""

    def __init__(self, config: Config, exit_layer: int):
        super().__init__()
        self.exit_layer = exit_layer
        self.input_layernorm = RMSNorm(config.dim, config.norm_eps)
        self.self_attn = Attention(config)
        self.norm = RMSNorm(config.dim, config.norm_eps)

    def forward(self, h: Tensor, *rotary: Tensor, attend: Attend = causal_attention) -> Tensor:
        return self.norm(h + self.self_attn(self.input_layernorm(h), *rotary, attend))


class Kangaroo(NoDraft):
    """Layers [0, E) of the model, shared with the verifier, then the adapter and the model's head.

    To decode.draft this is a model whose unembed is adapter and head, so the exit query is the
    hidden state after layer E. The adapter has a cache of one layer.
    """

    def __init__(self, *context: Any, adapter: Adapter):
        super().__init__(*context)
        model, cache, c = self.model, self.cache, self.model.config
        self.adapter, self.embed, self.run_layers = adapter, model.embed, model.run_layers
        shape = 1, c.n_kv_heads, c.head_dim, c.dim, cache.max_len, 0
        self.own = KVQCache(*shape, model.dtype, model.device)

    def draft(self, tokens: list[int], limit: int, pick: Pick) -> tuple[list[int], int]:
        known, exit_layer = self.cache.length, self.adapter.exit_layer
        if self.own.length < known:  # the prompt, read by the verifier alone
            x = torch.tensor([tokens[:known]], device=self.model.device)
            for rows in self.run_layers(self.embed(x), 0, exit_layer)[0].split(PREFILL_ROWS):
                self.adapt(rows)
        self.own.rewind(known)
        guesses = run_draft(self, self.cache, tokens[-1], limit, pick, exit_layer, *self.stop)
        # The last guess needs no logits, but later rounds need its keys and values.
        unread = self.cache.queries[self.own.length - known : len(guesses) + 1]
        if len(unread):
            self.adapt(unread)
        return guesses, exit_layer

    def unembed(self, h: Tensor) -> Tensor:
        """The next row's hidden state after layer E, (1, dim) -> its logits (1, vocab)."""
        return self.model.lm_head(self.adapt(h))

    def adapt(self, h: Tensor) -> Tensor:
        """The adapter on the next rows h (T, dim); leaves their keys and values."""
        start = self.own.length
        attend = partial(self.model.row_attention(self.own, start, len(h)), 0)
        self.own.commit(len(h))
        return self.adapter(h, *self.model.rotary(start, len(h)), attend=attend)


def train_step(model: Llama, adapter: Adapter, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Two scalars: cross-entropy against the full model (section 3.1), and greedy agreement.

    tokens (B, T). The model is not trained.
    """
    with torch.no_grad():
        early = model.run_layers(model.embed(tokens), 0, adapter.exit_layer)
        late = model.run_layers(early, adapter.exit_layer, model.config.n_layers)
        target = model.unembed(late).float().softmax(-1)
    guess = model.lm_head(adapter(early, *model.rotary(0, tokens.shape[1]))).float()
    agreement = (guess.argmax(-1) == target.argmax(-1)).float().mean()
    return F.cross_entropy(guess.flatten(0, 1), target.flatten(0, 1)), agreement


def save_adapter(adapter: Adapter, path: Path, about: dict) -> None:
    """Writes adapter.safetensors. `about` is in its header, as strings."""
    path.mkdir(parents=True, exist_ok=True)
    weights = {name: p.bfloat16() for name, p in adapter.state_dict().items()}
    header = {key: str(x) for key, x in {**about, "exit_layer": adapter.exit_layer}.items()}
    with whole_file(path / "adapter.safetensors") as file:
        file.write(save(weights, header))


def load_adapter(path: str | Path, model: Llama) -> Adapter:
    """The adapter of a directory, in the model's type, on its device.

    Raises CheckpointError, one line, where none fits the model.
    """
    file, last = Path(path) / "adapter.safetensors", model.config.n_layers - 1
    try:
        with safe_open(file, framework="pt") as stored:
            exit_layer = int((stored.metadata() or {}).get("exit_layer", 0))
            weights = {name: stored.get_tensor(name) for name in stored.keys()}
        if not 1 <= exit_layer <= last:
            raise ValueError(f"its exit layer must be from 1 to {last}, not {exit_layer}")
        adapter = Adapter(model.config, exit_layer)
        adapter.load_state_dict(weights)
    except (OSError, SafetensorError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{file} is no adapter for this model: {error}") from None
    return adapter.to(model.device, model.dtype)


def train(args: argparse.Namespace) -> None:
    """Trains an adapter and saves it. Raises ValueError on what cannot be trained."""
    model, tokenizer = load(args.ckpt, "float32")
    last, least = model.config.n_layers - 1, min(args.exit, args.steps, args.batch, args.seq)
    if least < 1 or args.exit > last or not 0 < args.lr < 1:
        raise ValueError(f"all must be above 0, --exit at most {last}, --lr below 1")
    (folder := args.out / "tokens").mkdir(parents=True, exist_ok=True)
    run = RunDirectory(args.out, None)  # for Ctrl-C and words alone
    parts = write_tokens(
        read_corpus(args.data, run.say), tokenizer, folder, conversations(args.ckpt)
    )
    if min(map(len, parts)) <= args.seq + 1:
        raise ValueError("too little data for this --seq")
    device, fast = model.device, auto_dtype(model.device) == torch.bfloat16
    torch.manual_seed(0)
    model.requires_grad_(False)
    adapter = Adapter(model.config, args.exit).to(device)
    with torch.no_grad():  # at first the plain exit
        adapter.norm.weight.copy_(model.norm.weight)
        adapter.self_attn.o_proj.weight.zero_()

    def loss_on(part: int, step: int) -> tuple[Tensor, Tensor]:
        x, _ = parts[part].crops(args.batch, args.seq, 0, step)
        with torch.autocast(device.type, torch.bfloat16, enabled=fast):
            return train_step(model, adapter, x.to(device))

    @torch.no_grad()
    def report(step: int) -> float:
        """Says what the adapter is worth on held-out crops; the loss."""
        found = torch.stack([torch.stack(loss_on(1, number)) for number in range(16)])
        loss, agreement = found.mean(0).tolist()
        text = f"held-out loss {loss:.3f}, agreement {agreement:.3f}"
        run.say(f"\rstep {step} of {args.steps}: {text}")
        return loss

    run.watch_signals()
    optimizer = torch.optim.AdamW(adapter.parameters(), betas=(0.9, 0.95), weight_decay=0.0)
    report(0)
    for step in range(1, args.steps + 1):  # 50 steps up to --lr, then a cosine to a tenth
        share = min(1, step / 50) * (0.55 + 0.45 * math.cos(math.pi * step / args.steps))
        optimizer.param_groups[0]["lr"] = args.lr * share
        loss, _ = loss_on(0, step)
        loss.backward()
        nn.utils.clip_grad_norm_(adapter.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if sys.stderr.isatty():
            run.say(f"\rstep {step} of {args.steps}, loss {loss:.3f} ", end="")
        stopped = run.stopped()
        if step % max(1, args.steps // 10) == 0 or step == args.steps or stopped:
            found = report(step)
        if stopped:
            break
    if not math.isfinite(found):
        raise ValueError("the loss is not finite: lower --lr")
    save_adapter(adapter, args.out, vars(args) | dict(held_out_loss=found))
    run.say(f"the adapter{', stopped early,' * stopped} is in {args.out}")
    if stopped:
        raise SystemExit(130)


def main() -> None:
    p = argparse.ArgumentParser(prog="python -m extras.kangaroo", description="Train an adapter.")
    add = p.add_argument
    add("--ckpt", type=Path, default=DEFAULT_CKPT, metavar="DIR", help="the model")
    add("--out", type=Path, default="runs/kangaroo", metavar="DIR", help="%(default)s")
    add("--data", nargs="+", default=["stdlib"], metavar="SRC", help="as in train.py")
    for name, value in dict(exit=2, steps=600, batch=8, seq=256, lr=6e-3).items():
        add(f"--{name}", type=type(value), default=value, metavar="N", help="%(default)s")
    args = p.parse_args()
    with command_errors(p.prog):
        train(args)


if __name__ == "__main__":
    main()
