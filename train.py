"""Training a Llama whose every layer can be an exit: LayerSkip, and its relatives as settings.

    x_{l+1} = x_l + M(p(l, t)) f_l(x_l)     layer dropout      layer_dropout, run_with_dropout
    J = sum_l ẽ(t, l) CE(g(x_{l+1}), Y)     early-exit loss    exit_weights, early_exit_loss

    python train.py --out runs/mine --steps 500                       on the standard library's text
    python train.py --out runs/mine --recipe lite --data notes.txt
    python train.py --out runs/mine --init DIR --data pairs.jsonl --phase finetune
    torchrun --nproc-per-node 8 train.py --out runs/mine              sharded, see extras/sharded.py

The same command goes on where a stopped or killed run left off, and ends with the same weights to
the bit (on a CPU). Every random number is a pure function of (seed, step), so a run's state is its
weights, its optimiser and a step.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from model import Llama
from support.data import IGNORED, Tokens
from support.runs import RunDirectory

LOGITS = 1 << 25  # at most so many numbers of logits live at once

# --------------------------------------
# The two schedules, and the recipes that are settings of them. l counts layers from 0 to L-1, t
# counts steps from 0 to T-1.


def setting(default: Any, text: str, *choices: str) -> Any:
    """A field of a dataclass that is an option of the command line, with its help."""
    return field(default=default, metadata={"text": text, "choices": choices or None})


@dataclass(frozen=True)
class Recipe:
    """p(l, t) = p_max S(t) D(l), and e(l) with a curriculum C. The command line can change each."""

    p_max: float = setting(0.0, "layer dropout where it is largest")
    dropout_depth: str = setting("exp", "D: how it grows over layers", "exp", "linear", "constant")
    dropout_time: str = setting("constant", "S: over steps", "constant", "exp", "pld")
    dropout_unit: str = setting("sample", "what skips a layer", "sample", "batch")
    rescale: bool = setting(False, "divide f_l by its keep probability")
    exits: str = setting("none", "exits that get a loss: none, all, lite, or layers such as 2,4,8")
    curriculum: str = setting("rotational", "C: what a step trains", "rotational", "gradual")
    rotation: int = setting(0, "R: a step trains every R-th exit, in turn; 0: one exit")
    e_scale: float = setting(1.0, "weight of the early exits against the last")
    uniform_exits: bool = setting(False, "e(l) = e_scale for each early exit, and 1 for the last")


LAYERSKIP = {  # section 5: 24 layers from scratch, Llama 2 7B continued, Llama 1 7B tuned on code
    "scratch": Recipe(p_max=0.1, dropout_time="exp", exits="all", rotation=0, e_scale=0.2),
    "continual": Recipe(p_max=0.1, exits="all", rotation=8, e_scale=0.2),
    "finetune": Recipe(p_max=0.1, exits="all", rotation=16, e_scale=1.0),
}
RECIPES = {
    "layerskip": LAYERSKIP["scratch"],
    # arXiv 2310.18581, section 3: no dropout, equal losses
    "lite": Recipe(exits="lite", rotation=1, uniform_exits=True),
    # arXiv 1909.11556, section 3
    "layerdrop": Recipe(p_max=0.2, dropout_depth="constant", dropout_unit="batch"),
    # arXiv 2010.13369, algorithm 1
    "pld": Recipe(
        p_max=0.5, dropout_depth="linear", dropout_time="pld", dropout_unit="batch", rescale=True
    ),
    "plain": Recipe(),
}


def layer_dropout(l: int, t: int, layers: int, steps: int, recipe: Recipe) -> float:
    """Probability of skipping layer l at step t: p(l, t) = p_max S(t) D(l).

    LayerSkip (2404.16710, section 4.1.1): D(l) = exp(l ln2 / (L-1)) - 1; S(t) = 1, or
    exp(t ln2 / (T-1)) - 1 from scratch. LayerDrop (1909.11556): D = S = 1. Progressive Layer
    Dropping (2010.13369) keeps a layer with probability 1 - (l/L)(1 - theta(t)), where
    theta(t) = (1 - theta_) exp(-gamma t) + theta_. So D(l) = l/L, S(t) = 1 - exp(-gamma t),
    p_max = 1 - theta_, and gamma = 100 / T.
    """
    depth = {"exp": 2 ** (l / max(layers - 1, 1)) - 1, "linear": l / layers, "constant": 1.0}
    exp = 2 ** (t / max(steps - 1, 1)) - 1
    time = {"constant": 1.0, "exp": exp, "pld": 1 - math.exp(-100 * t / steps)}
    return recipe.p_max * time[recipe.dropout_time] * depth[recipe.dropout_depth]


def exit_layers(recipe: Recipe, layers: int) -> list[int]:
    """The early exits that get a loss, as numbers of layers E = l + 1.

    LITE takes every eighth of L from a quarter on: of 32 layers 8, 12, .. 28. Raises ValueError
    where --exits names none.
    """
    if recipe.exits == "lite":
        return sorted({round(layers * eighths / 8) for eighths in range(2, 8)} - {0, layers})
    if recipe.exits in ("all", "none"):
        return list(range(1, layers)) if recipe.exits == "all" else []
    try:
        exits = sorted({int(e) for e in recipe.exits.split(",")})
    except ValueError:
        exits = [0]
    if not all(1 <= e < layers for e in exits):
        limits = f"layers from 1 to {layers - 1} such as 2,4,8 (the last is always trained)"
        raise ValueError(f"--exits takes all, none, lite or {limits}, not {recipe.exits!r}")
    return exits


def exit_weights(t: int, layers: int, steps: int, recipe: Recipe) -> dict[int, float]:
    """Weight ẽ(t, l) of each exit that step t trains, by exit layer E = l + 1; they sum to 1.

    LayerSkip, section 4.1.2: ẽ(t, l) = C(t, l) e(l) / sum_i C(t, i) e(i), where
    e(l) = e_scale sum_{i<=l} i below the last layer and e(L-1) = L-1 + e_scale sum_{i<=L-2} i.
    The curriculum C is rotational (at step t every R-th exit: those whose place among the exits,
    from 0, is t modulo R) or gradual (from the last layer down, one more every T / 2L steps). The
    last layer always has its loss.
    """

    def e(l: int) -> float:
        if recipe.uniform_exits:
            return 1.0 if l == layers - 1 else recipe.e_scale
        if l == layers - 1:
            return l + recipe.e_scale * sum(range(l))
        return recipe.e_scale * sum(range(l + 1))

    exits = exit_layers(recipe, layers)
    if recipe.curriculum == "gradual":
        added = 2 * layers * t // steps
        active = [exit for exit in exits if exit >= layers - added]
    else:  # rotational
        period = recipe.rotation or max(len(exits), 1)
        active = [exit for place, exit in enumerate(exits) if place % period == t % period]
    weights = {exit: e(exit - 1) for exit in [*active, layers]}
    total = sum(weights.values())
    # e(0) = 0: an exit after one layer gets a loss only with uniform_exits.
    return {exit: weight / total for exit, weight in weights.items() if weight}


# --------------------------------------
# The objective


def draw_mask(seed: int, t: int, drop: list[float], batch: int, unit: str) -> np.ndarray:
    """M of step t, (L, batch) bool: which samples run which layers. A pure function.

    drop[l] is the probability of skipping layer l. unit "batch": all samples skip it or none.
    """
    random = np.random.Generator(np.random.Philox(key=seed, counter=[0, 0, 1, t]))
    draws = random.random((len(drop), batch))
    if unit == "batch":
        draws[:] = draws[:, :1]
    return draws >= np.array(drop)[:, None]


def run_with_dropout(
    layer: Callable[..., Tensor],
    h: Tensor,
    cos: Tensor,
    sin: Tensor,
    mask: Tensor,
    keep: float = 1.0,
) -> Tensor:
    """x + M f(x) / keep for h (B, T, dim): the layer runs on the samples where mask (B,) is true.

    The others pass unchanged and cost nothing. LayerSkip and LayerDrop do not rescale: keep = 1.
    """
    index = None if mask.all() else mask.nonzero()[:, 0]
    x = h if index is None else h[index]
    y = layer(x, cos, sin).to(h.dtype)
    if keep < 1:
        y = x + (y - x) / keep
    return y if index is None else h.index_copy(0, index, y)


class Objective(nn.Module):
    """A Llama whose forward pass is the loss: one module, so that PyTorch can shard it.

    Raises ValueError for a packed model.
    """

    def __init__(self, llama: Llama):
        super().__init__()
        if not isinstance(llama.lm_head, nn.Linear):
            raise ValueError("a packed model does not train: load it again")
        self.llama = llama

    def forward(
        self,
        tokens: Tensor,
        targets: Tensor,
        mask: np.ndarray,
        used: np.ndarray,
        keep: list[float],
        weights: dict[int, float],
    ) -> tuple[Tensor, Tensor]:
        """J (), summed over the targets of tokens (B, T), and each exit's summed loss, (exits,).

        mask (L, B): which samples run a layer; what skips one passes it unchanged. used (L,): the
        layers that at least one process runs: then all must call it, to gather its shards. keep:
        1 - p(l, t), or 1. weights: see exit_weights.
        """
        model, hidden = self.llama, {}
        cos, sin = model.rotary(0, tokens.shape[1])
        h = model.embed(tokens).float()  # float32 between layers, under autocast too

        for l, layer in enumerate(model.layers):
            if used[l]:
                samples = torch.from_numpy(mask[l]).to(h.device)
                h = run_with_dropout(layer, h, cos, sin, samples, keep[l])
            if l + 1 in weights:
                hidden[l + 1] = h.flatten(0, 1)
        return self.early_exit_loss(hidden, targets.flatten(), weights)

    def early_exit_loss(
        self, hidden: dict[int, Tensor], targets: Tensor, weights: dict[int, float]
    ) -> tuple[Tensor, Tensor]:
        """J = sum_l ẽ(t, l) CE(g(x_{l+1}), Y), from x_{l+1} (R, dim) of each exit; targets (R,).

        An exit's logits are made again for the backward pass, some rows at a time: otherwise the
        logits of all exits would be kept.
        """
        rows, sums = max(1, LOGITS // self.llama.config.vocab_size), []
        for h in hidden.values():
            parts = zip(h.split(rows), targets.split(rows))
            losses = [checkpoint(self.exit_loss, *part, use_reentrant=False) for part in parts]
            sums.append(torch.stack(losses).sum())
        shares = torch.tensor([weights[exit] for exit in hidden], device=targets.device)
        return (torch.stack(sums) * shares).sum(), torch.stack(sums).detach()

    def exit_loss(self, h: Tensor, targets: Tensor) -> Tensor:
        """Summed CE () of g(h), h (R, dim), against targets (R,)."""
        logits = self.llama.unembed(h).float()
        return F.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="sum")


@torch.no_grad()
def evaluate(
    model: Llama, tokens: Tokens, length: int, exits: list[int], batches: int = 8, batch: int = 8
) -> dict[int, dict[str, float]]:
    """Held-out loss of each exit, and its agreement with the last's greedy token, on crops.

    Only targets with a loss count. `exits` are in order, the last layer among them.
    """
    sums = {exit: torch.zeros(2, device=model.device) for exit in exits}
    for step in range(batches):
        x, y = (z.to(model.device) for z in tokens.crops(batch, length, seed=0, step=step))
        h, depth, said, counted = model.embed(x), 0, {}, y.flatten() != IGNORED
        for exit in exits:
            h, depth = model.run_layers(h, depth, exit), exit
            logits = model.unembed(h).float().flatten(0, 1)
            loss = F.cross_entropy(logits, y.flatten(), ignore_index=IGNORED)
            said[exit] = loss, logits.argmax(-1)[counted]
        for exit, (loss, picks) in said.items():
            sums[exit] += torch.stack([loss, (picks == said[exits[-1]][1]).float().mean()])
    means = {exit: (pair / batches).tolist() for exit, pair in sums.items()}
    return {exit: dict(loss=round(a, 4), agreement=round(b, 4)) for exit, (a, b) in means.items()}


def initialise(model: Llama, seed: int) -> None:
    """GPT-2's initialisation: normal 0.02, and 0.02 / sqrt(2 L) into the residual stream."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        if p.dim() == 2:
            into = "o_proj" in name or "down_proj" in name
            scale = 0.02 / (math.sqrt(2 * model.config.n_layers) if into else 1)
            p.data.normal_(0, scale, generator=generator)


def learning_rate(t: int, steps: int, warmup: int) -> float:
    """Factor on the peak rate: linear warm-up, then a cosine down to a tenth."""
    if t < warmup:
        return (t + 1) / warmup
    return 0.1 + 0.45 * (1 + math.cos(math.pi * (t - warmup) / max(steps - warmup, 1)))


# --------------------------------------
# A step, and the loop


@dataclass(frozen=True)
class Settings:
    """How a run trains, beside its recipe."""

    steps: int = setting(3000, "optimiser steps")
    batch: int = setting(8, "sequences per step, over all processes")
    seq: int = setting(512, "tokens per sequence")
    accumulate: int = setting(1, "run a batch in so many pieces, to save memory")
    lr: float = setting(1e-3, "peak learning rate")
    warmup: int = setting(100, "steps of linear warm-up")
    save_every: int = setting(500, "steps between checkpoints")
    seed: int = setting(0, "of weights, crops and dropout")
    bf16: bool = setting(False, "bfloat16 products")


class Trainer:
    """Model, optimiser and step of one run. Raises ValueError on what cannot train.

    `run` is its directory, and the link to other processes.
    """

    def __init__(
        self, model: Llama, recipe: Recipe, settings: Settings, tokens: Tokens, run: RunDirectory
    ):
        self.recipe, self.settings, self.tokens, self.run = recipe, settings, tokens, run
        self.config, self.device, self.step = model.config, model.device, 0
        self.objective = Objective(model)
        run.shard(self.objective, model.layers)
        named = self.objective.named_parameters()
        self.parameters = {name.removeprefix("llama."): p for name, p in named}
        groups: list[dict] = [{"params": [], "weight_decay": w} for w in (0.0, 0.1)]
        for p in self.parameters.values():
            groups[p.dim() == 2]["params"].append(p)  # matrices decay, norms do not
        self.optimizer = torch.optim.AdamW(groups, lr=settings.lr, betas=(0.9, 0.95), fused=True)

    def train_step(self) -> tuple[dict[int, float], float]:
        """One optimiser step: the mean loss of each exit that it trained, and the gradient's norm.

        Raises ValueError on a loss that is not finite.
        """
        s, t, layers = self.settings, self.step, self.config.n_layers
        tokens, targets = (x.to(self.device) for x in self.tokens.crops(s.batch, s.seq, s.seed, t))
        counted = max(int((targets != IGNORED).sum()), 1)
        weights = exit_weights(t, layers, s.steps, self.recipe)
        drop = [layer_dropout(l, t, layers, s.steps, self.recipe) for l in range(layers)]
        mask = draw_mask(s.seed, t, drop, s.batch, self.recipe.dropout_unit)
        keep = [1 - p if self.recipe.rescale else 1.0 for p in drop]

        # Every process draws for the whole batch and trains its own part of it, in pieces. So what
        # is trained does not depend on their number.
        sums = torch.zeros(len(weights), device=self.device)
        pieces = np.arange(s.batch).reshape(self.run.world, s.accumulate, -1)  # ids of samples
        for number, own in enumerate(pieces[self.run.rank]):
            used = mask[:, pieces[:, number].flatten()].any(1)  # by any process's piece
            batch = tokens[own], targets[own], mask[:, own], used, keep, weights
            with torch.autocast(self.device.type, torch.bfloat16, enabled=s.bf16):
                total, losses = self.objective(*batch)
            (total * (self.run.world / counted)).backward()  # sharding divides by world
            sums += losses
        sums = self.run.sum(sums)

        norm: Any = nn.utils.clip_grad_norm_(self.parameters.values(), 1.0)
        norm = float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)
        if not math.isfinite(norm) or not sums.isfinite().all():
            raise ValueError(f"the loss is not finite at step {t + 1}: try a lower --lr")
        for group in self.optimizer.param_groups:
            group["lr"] = s.lr * learning_rate(t, s.steps, s.warmup)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        return dict(zip(weights, (sums / counted).tolist())), norm

    def train(self, save: Callable[[], None]) -> bool:
        """The loop: steps, progress and saves. Ctrl-C ends it after the step, saved: then True."""
        s, run, stopped = self.settings, self.run, False
        run.start_clock(self.step)
        while self.step < s.steps and not stopped:
            losses, norm = self.train_step()
            run.progress(self.step, s.steps, s.batch * s.seq, {"losses": losses, "norm": norm})
            stopped = run.stopped()
            if self.step % s.save_every == 0 or self.step == s.steps or stopped:
                save()
        return stopped


if __name__ == "__main__":
    from support.train_command import main

    main()
