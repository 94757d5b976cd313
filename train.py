"""Training a Llama whose every layer can be an exit: LayerSkip and its relatives, as settings of two schedules.

    x_{l+1} = x_l + M(p(l, t)) f_l(x_l)          layer dropout       (layer_dropout, run_with_dropout)
    J = sum_l ẽ(t, l) CE(g(x_{l+1}), Y)          early-exit loss     (exit_weights, EarlyExitLoss)

    python train.py --out runs/mine --minutes 30                              LayerSkip on the standard library's source
    python train.py --out runs/mine --recipe lite --data notes.txt            another recipe, other text
    python train.py --out runs/mine --init DIR --data pairs.jsonl --phase finetune
    torchrun --nproc-per-node 8 train.py --out runs/mine                      sharded over 8 processes

The same command goes on where a stopped or killed run left off, and ends with the same weights to the bit (CPU). Every
random number is a pure function of (seed, step), so the state of a run is its weights, its optimiser and a step.
"""

import argparse
import json
import math
import os
import shlex
import shutil
import signal
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.distributed.checkpoint import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard
from torch.utils.checkpoint import checkpoint

from data import IGNORED, Tokens, read_corpus, train_tokenizer, write_tokens
from model import Config, Llama, auto_dtype, batch_attention, load_checkpoint, parse_object, save_checkpoint
from tokenizer import Tokenizer

warnings.filterwarnings("ignore", "torch.distributed is disabled")  # one process saves and loads without it

# ---------------------------------------------------------------------------------------------------------------------
# The two schedules, and the recipes that are settings of them. l counts layers from 0 to L-1, t counts steps from 0 to T-1.


@dataclass(frozen=True)
class Recipe:
    """p(l, t) = p_max * S(t) * D(l), and e(l) with a curriculum; the fields are what the command line can change."""

    p_max: float = 0.0  # layer dropout at the last layer, at the end
    dropout_depth: str = "exp"  # D: exp (LayerSkip), linear (PLD), constant (LayerDrop)
    dropout_time: str = "constant"  # S: constant, exp (LayerSkip from scratch), pld
    dropout_unit: str = "sample"  # a skipped layer is skipped by a sample (LayerSkip) or by the whole batch
    rescale: bool = False  # divide f_l by its keep probability (PLD)
    exits: str = "none"  # early exits that get a loss: none, all, lite, or layers such as 2,4,8
    curriculum: str = "rotational"  # or gradual
    rotation: int = 0  # R: every exit is trained each R steps; 0: as many as there are exits, one a step
    e_scale: float = 1.0
    uniform_exits: bool = False  # e(l) = e_scale for each early exit and 1 for the last, not growing with depth
    distill: float = 0.0  # the last share of steps, in which exits learn the last layer's distribution, not the text


LAYERSKIP = {  # arXiv 2404.16710, section 5: 24 layers from scratch, Llama 2 7B continued, Llama 1 7B tuned on code
    "scratch": Recipe(p_max=0.1, dropout_time="exp", exits="all", rotation=0, e_scale=0.2),
    "continual": Recipe(p_max=0.1, exits="all", rotation=8, e_scale=0.2),
    "finetune": Recipe(p_max=0.1, exits="all", rotation=16, e_scale=1.0),
}
RECIPES = {
    "layerskip": LAYERSKIP["scratch"],
    "lite": Recipe(exits="lite", rotation=1, uniform_exits=True),  # arXiv 2310.18581, section 3: no dropout, equal losses
    "layerdrop": Recipe(p_max=0.2, dropout_depth="constant", dropout_unit="batch"),  # arXiv 1909.11556, section 3
    "pld": Recipe(p_max=0.5, dropout_depth="linear", dropout_time="pld", dropout_unit="batch", rescale=True),  # arXiv 2010.13369
    "plain": Recipe(),
}


def layer_dropout(l: int, t: int, layers: int, steps: int, recipe: Recipe) -> float:
    """Probability of skipping layer l at step t: p(l, t) = p_max S(t) D(l).

    LayerSkip (2404.16710, 4.1.1): D(l) = exp(l ln2 / (L-1)) - 1; S(t) = exp(t ln2 / (T-1)) - 1 from scratch, 1 otherwise.
    LayerDrop (1909.11556): D = S = 1. Progressive Layer Dropping (2010.13369, algorithm 1): keep probability
    1 - (l/L)(1 - theta(t)) with theta(t) = (1 - theta_) exp(-gamma t) + theta_; so D(l) = l/L, S(t) = 1 - exp(-gamma t),
    p_max = 1 - theta_ (theta_ = 0.5) and gamma = 100 / T.
    """
    depth = {"exp": 2 ** (l / max(layers - 1, 1)) - 1, "linear": l / layers, "constant": 1.0}
    time = {"constant": 1.0, "exp": 2 ** (t / max(steps - 1, 1)) - 1, "pld": 1 - math.exp(-100 * t / steps)}
    return recipe.p_max * time[recipe.dropout_time] * depth[recipe.dropout_depth]


def exit_layers(recipe: Recipe, layers: int) -> list[int]:
    """The early exits that get a loss, as numbers of layers E = l + 1. LITE, 32 layers: 8, 12, .. 28, every eighth of L.

    Raises ValueError, one line, where --exits names none.
    """
    if recipe.exits == "lite":
        return sorted({round(layers * eighths / 8) for eighths in range(2, 8)} - {0, layers})
    if recipe.exits in ("all", "none"):
        return list(range(1, layers)) if recipe.exits == "all" else []
    try:
        exits = sorted({int(e) for e in recipe.exits.split(",")})
    except ValueError:
        raise ValueError(f"--exits takes all, none, lite or layers such as 2,4,8, not {recipe.exits!r}") from None
    if not all(1 <= e < layers for e in exits):
        raise ValueError(f"--exits must lie from 1 to {layers - 1}; the last layer is always trained")
    return exits


def exit_weights(t: int, layers: int, steps: int, recipe: Recipe) -> dict[int, float]:
    """Weight ẽ(t, l) of each exit that step t trains, by exit layer E = l + 1; they sum to 1. (LayerSkip, section 4.1.2.)

    ẽ(t, l) = C(t, l) e(l) / sum_i C(t, i) e(i), e(l) = e_scale * sum_{i<=l} i below the last layer and
    e(L-1) = L-1 + e_scale * sum_{i<=L-2} i. C is rotational (of the exits every R-th, one further each step) or gradual
    (from the last layer down, one more every T / 2L steps); the last layer always has its loss. uniform_exits (LITE):
    e(l) = e_scale, e(L-1) = 1.
    """

    def e(l: int) -> float:
        if recipe.uniform_exits:
            return 1.0 if l == layers - 1 else recipe.e_scale
        if l == layers - 1:
            return l + recipe.e_scale * sum(range(l))
        return recipe.e_scale * sum(range(l + 1))

    exits = exit_layers(recipe, layers)
    if recipe.curriculum == "gradual":
        active = [exit for exit in exits if exit >= layers - t * 2 * layers // steps]
    else:
        period = recipe.rotation or max(len(exits), 1)
        active = [exit for place, exit in enumerate(exits) if place % period == t % period]
    weights = {exit: e(exit - 1) for exit in [*active, layers]}
    total = sum(weights.values())
    return {exit: weight / total for exit, weight in weights.items() if weight}


# ---------------------------------------------------------------------------------------------------------------------
# The objective


def draw_kept(seed: int, t: int, drop: list[float], batch: int, unit: str) -> np.ndarray:
    """M of step t: which layers run which samples, (L, batch) bool, with drop[l] the probability of skipping layer l. A pure
    function of its arguments. unit "batch": a layer is skipped by all samples or none."""
    draws = np.random.Generator(np.random.Philox(key=seed, counter=[0, 0, 1, t])).random((len(drop), batch))
    if unit == "batch":
        draws[:] = draws[:, :1]
    return draws >= np.array(drop)[:, None]


def run_with_dropout(layer: Callable[..., Tensor], h: Tensor, cos: Tensor, sin: Tensor, kept: Tensor, keep: float = 1.0, always: bool = False) -> Tensor:
    """x + M f(x) / keep: `layer` on the samples of h (B, T, dim) where kept (B,) is true; the others pass unchanged and cost
    nothing. LayerSkip and LayerDrop do not rescale (keep = 1). `always` runs the layer on no samples rather than not at
    all: a process of several must take part in gathering a sharded layer that another one runs.
    """
    if not kept.any() and not always:
        return h
    index = None if kept.all() else kept.nonzero()[:, 0]
    x = h if index is None else h[index]
    y = layer(x, cos, sin).to(h.dtype)
    if keep < 1:
        y = x + (y - x) / keep
    return y if index is None else h.index_copy(0, index, y)


def train_attention(q: Tensor, k: Tensor, v: Tensor, smallest: int = 64) -> Tensor:
    """Causal attention q (B, T, H, hd), k and v (B, T, Hkv, hd) -> (B, T, H, hd), as plain matrix products.

    At training lengths the products of a CPU are faster than its fused attention, and a block of queries leaves out the keys
    after it: with eight blocks, of `smallest` queries or more, 9/16 of the products are left. A training step of the shipped
    shape, compiled, in float32 on two Zen 3 cores: 3.47 s with one block, 3.05 with two, 2.94 with four; with the mask added,
    not filled in, 7% less, and with eight blocks 2% less again. Elsewhere the fused one wins.
    """
    if q.device.type != "cpu":
        return batch_attention(q, k, v)
    batch, length, heads, head_dim = q.shape
    shared = heads // k.shape[2]  # heads that share keys: more query rows
    q, k, v = q.transpose(1, 2).unflatten(1, (-1, shared)) * head_dim**-0.5, k.permute(0, 2, 3, 1), v.transpose(1, 2)
    places = torch.arange(length, dtype=torch.float32, device=q.device)  # compared in whole vectors; integers take 2.5 times the softmax's time
    out = []
    size = max(smallest, -(-length // 8))
    for first in range(0, length, size):
        last = min(first + size, length)
        scores = (q[:, :, :, first:last].flatten(2, 3) @ k[..., :last]).unflatten(2, (shared, last - first))
        hidden = torch.where(places[:last] > places[first:last, None], -math.inf, 0.0)  # added: what fills a mask keeps it for the way back
        weights = (scores + hidden).softmax(-1).to(v.dtype).flatten(2, 3)
        out.append((weights @ v[:, :, :last]).unflatten(2, (shared, last - first)))
    return torch.cat(out, 3).reshape(batch, heads, length, head_dim).transpose(1, 2)


def cross_entropy(h: Tensor, norm: Tensor, head: Tensor, eps: float, targets: Tensor, teacher: Tensor | None) -> tuple[Tensor, Tensor]:
    """Summed CE of g(h) for rows h (R, dim) against targets (R,) or, if given, against softmax(teacher) (R, V); and logits."""
    logits = F.linear(F.rms_norm(h, norm.shape, norm, eps), head).float()
    if teacher is None:
        return F.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="sum"), logits.detach()
    loss = -(teacher.softmax(-1) * logits.log_softmax(-1)).sum(-1)
    return (loss * (targets != IGNORED)).sum(), logits.detach()


class EarlyExitLoss(torch.autograd.Function):
    """sum_l ẽ(t, l) CE(g(x_{l+1}), Y), with the gradient taken in the forward pass, one exit and some rows at a time.

    So there is never more than one set of logits, whatever the number of exits and rows: LOGITS elements of float32. All
    exits share one norm (dim,) and one head (vocab, dim). Takes the hidden states (R, dim) of each exit and targets (R,); returns J ()
    and the unweighted summed loss of each exit (exits,).
    """

    LOGITS = 1 << 25

    @staticmethod
    def forward(
        ctx: Any, loss_of: Callable, eps: float, targets: Tensor, weights: tuple[float, ...], distill: bool, norm: Tensor, head: Tensor, *hidden: Tensor
    ) -> tuple[Tensor, Tensor]:
        """J, and the gradients that backward will hand out."""
        need = any(ctx.needs_input_grad)
        d_norm, d_head, d_hidden = torch.zeros_like(norm), torch.zeros_like(head), [torch.empty_like(h) for h in hidden]
        sums = torch.zeros(len(hidden), device=targets.device)
        rows = max(1, EarlyExitLoss.LOGITS // len(head))
        for first in range(0, len(targets), rows):
            part, teacher = slice(first, first + rows), None
            for i in reversed(range(len(hidden))):  # the last layer first: it teaches
                with torch.enable_grad():
                    inputs = [x.detach().requires_grad_() for x in (hidden[i][part], norm, head)]
                    loss, logits = loss_of(*inputs, eps, targets[part], teacher)
                    grads = torch.autograd.grad(loss * weights[i], inputs) if need else ()
                sums[i] += loss.detach()
                if need:
                    d_hidden[i][part] = grads[0]
                    d_norm += grads[1]
                    d_head += grads[2]
                if distill and teacher is None:
                    teacher = logits
        ctx.save_for_backward(d_norm, d_head, *d_hidden)
        ctx.mark_non_differentiable(sums)
        return (sums * torch.tensor(weights, device=sums.device)).sum(), sums

    @staticmethod
    def backward(ctx: Any, d_total: Tensor, _: Tensor) -> tuple:
        """The gradients of norm, head and hidden states that forward left, times that of J."""
        d_norm, d_head, *d_hidden = ctx.saved_tensors
        return (None, None, None, None, None, d_norm * d_total, d_head * d_total, *(d * d_total for d in d_hidden))


class Objective(nn.Module):
    """A Llama whose forward pass is the loss: one module, so that PyTorch can shard it."""

    def __init__(self, llama: Llama, compile: bool = False, recompute: bool = False):
        super().__init__()
        self.llama, self.recompute, self.sharded, self.varies = llama, recompute, False, False
        self.cross_entropy = torch.compile(cross_entropy) if compile else cross_entropy
        if compile:
            for layer in llama.model.layers:
                layer.compile()

    def shard(self) -> "Objective":
        """Spreads parameters, gradients and optimiser state over the processes, a layer at a time (FSDP2)."""
        for layer in self.llama.model.layers:
            fully_shard(layer)
        self.sharded = True
        fully_shard(self)
        return self

    def forward(self, tokens: Tensor, targets: Tensor, kept: np.ndarray, runs: np.ndarray, keep: list[float], weights: dict[int, float], distill: bool) -> tuple[Tensor, Tensor]:
        """J (), summed over the targets of tokens (B, T), and the summed loss of each exit in `weights`, (exits,).

        kept (L, B): which samples run a layer. runs (L,): whether any sample of any process does. keep: 1 - p(l, t), or 1.
        """
        model, hidden = self.llama, []
        cos, sin = model.rotary(0, tokens.shape[1])
        h = model.embed(tokens).float()

        def run(layer: Callable[..., Tensor], *x: Tensor) -> Tensor:
            if self.varies:  # one graph for any number of samples, see Run.rehearse
                torch._dynamo.maybe_mark_dynamic(x[0], 0)
            return checkpoint(layer, *x, train_attention, use_reentrant=False) if self.recompute else layer(*x, train_attention)

        for l, layer in enumerate(model.model.layers):
            samples = torch.from_numpy(kept[l]).to(h.device)
            h = run_with_dropout(lambda *x: run(layer, *x), h, cos, sin, samples, keep[l], self.sharded and bool(runs[l]))
            if l + 1 in weights:
                hidden.append(h.flatten(0, 1))
        norm = model.model.norm
        shares = tuple(weights[exit] for exit in sorted(weights))
        return EarlyExitLoss.apply(self.cross_entropy, norm.eps, targets.flatten(), shares, distill, norm.weight, model.lm_head.weight, *hidden)


@torch.no_grad()
def evaluate(model: Llama, tokens: Tokens, length: int, batches: int = 8, batch: int = 8) -> dict[str, list[float]]:
    """Held-out loss and agreement with the last layer's greedy token, per exit 1..L, on fixed crops."""
    layers = model.config.n_layers
    loss, agreement = torch.zeros(layers), torch.zeros(layers)
    for step in range(batches):
        x, y = (z.to(model.device) for z in tokens.crops(batch, length, seed=0, step=step))
        h, picks = model.embed(x), []
        for l in range(layers):
            h = model.run_layers(h, l, l + 1)
            logits = model.unembed(h).float()
            loss[l] += F.cross_entropy(logits.flatten(0, 1), y.flatten(), ignore_index=IGNORED).cpu() / batches
            picks.append(logits.argmax(-1))
        agreement += torch.stack([(pick == picks[-1]).float().mean() for pick in picks]).cpu() / batches
    return {"loss": [round(v, 4) for v in loss.tolist()], "agreement": [round(v, 4) for v in agreement.tolist()]}


def initialise(model: Llama, seed: int) -> None:
    """GPT-2's initialisation: normal 0.02, the two projections into the residual stream scaled by 1 / sqrt(2 L)."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        if p.dim() == 2:
            scale = 0.02 / (math.sqrt(2 * model.config.n_layers) if "o_proj" in name or "down_proj" in name else 1)
            p.data.normal_(0, scale, generator=generator)


def learning_rate(t: int, steps: int, warmup: int) -> float:
    """Factor on the peak rate: linear warm-up, then a cosine down to a tenth."""
    if t < warmup:
        return (t + 1) / warmup
    return 0.1 + 0.45 * (1 + math.cos(math.pi * (t - warmup) / max(steps - warmup, 1)))


# ---------------------------------------------------------------------------------------------------------------------
# One run: its state, and the loop


class Run:
    """A training run in a directory: model, optimiser, step, and how they are kept. What cannot run is refused in one line (ValueError)."""

    def __init__(self, args: argparse.Namespace):
        self.args, self.out = args, Path(args.out)
        self.rank, self.world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        if (args.batch % self.world) or (args.batch // self.world) % args.accumulate:
            raise ValueError(f"--batch {args.batch} does not divide into {self.world} processes x {args.accumulate} parts (--accumulate)")
        self.device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if torch.cuda.is_available() else torch.device("cpu")
        if args.bf16 is None:  # without the hardware it is 16 times slower than float32
            args.bf16 = auto_dtype(self.device) == torch.bfloat16
        model = load_checkpoint(args.init, torch.float32).train() if args.init else None
        layers = model.config.n_layers if model else args.layers
        self.recipe = recipe_of(args)
        exit_layers(self.recipe, layers)
        if layers < 2:
            raise ValueError("a model of one layer has no early exit to train")
        shape = dict(dim=args.dim, hidden_dim=args.hidden_dim, n_layers=args.layers, n_heads=args.heads, n_kv_heads=args.kv_heads, head_dim=args.head_dim)
        config = model.config if model else Config(vocab_size=args.vocab, max_len=args.max_len, tied=True, **shape)
        if args.seq > config.max_len:
            raise ValueError(f"--seq {args.seq} is longer than the model's context of {config.max_len}")
        if (self.out / "model.safetensors").exists() and not (self.out / "data.json").exists():
            raise ValueError(f"{self.out} holds a checkpoint that no run made here: choose another --out")
        if self.rank == 0:
            self.out.mkdir(parents=True, exist_ok=True)
            self.data = self.prepare_data()
        if self.world > 1:
            dist.barrier()
        self.data = self.prepare_data()
        train_tokens, held_out, tokenizer = self.data
        if min(len(train_tokens), len(held_out)) <= args.seq + 1:
            raise ValueError(f"the data is too short: {len(train_tokens)} training and {len(held_out)} held-out tokens for --seq {args.seq}")
        if model is None:
            special: dict = dict(bos=tokenizer.bos, eos=() if tokenizer.eos is None else (tokenizer.eos,))
            model = Llama(replace(config, vocab_size=tokenizer.vocab_size, **special))
            initialise(model, args.seed)
        elif tokenizer.vocab_size > model.config.vocab_size:
            raise ValueError(f"the tokenizer has {tokenizer.vocab_size} tokens, the model only {model.config.vocab_size}")
        self.config = model.config
        self.objective = Objective(model.to(self.device), args.compile, args.recompute)
        if self.world > 1:
            self.objective.shard()
        self.parameters = {name.removeprefix("llama."): p for name, p in self.objective.named_parameters()}
        matrices = [p for p in self.parameters.values() if p.dim() == 2]
        vectors = [p for p in self.parameters.values() if p.dim() < 2]
        groups = [{"params": matrices, "weight_decay": args.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.95), fused=True)
        self.step, self.steps = 0, args.steps
        self.resume()
        record = self.out / "training.json"
        if self.step and not (record.exists() and json.loads(record.read_text())["steps"] == self.step):
            self.save_model()  # killed after the state was saved and before this was

    # ------------------------------------------------------------------------------------------------------------- data

    def prepare_data(self) -> tuple[Tokens, Tokens, Tokenizer]:
        """Training and held-out tokens and the tokenizer: --init's, or trained on the training documents. Made once.

        Raises ValueError where the directory holds those of other settings.
        """
        wanted = {"data": self.args.data, "vocab": self.args.vocab, "init": str(self.args.init)}
        done, path = self.out / "data.json", self.out / "tokenizer.model"
        if done.is_file() and json.loads(done.read_text()) == wanted:
            tokenizer = Tokenizer(self.out)
            return Tokens(self.out / "train.bin", tokenizer.vocab_size), Tokens(self.out / "held_out.bin", tokenizer.vocab_size), tokenizer
        if done.is_file():
            raise ValueError(f"{self.out} holds the tokens of other --data, --vocab or --init: choose another --out")
        log("reading the data")
        if self.args.init:
            for name in ("tokenizer.model", "tokenizer.json"):
                (self.out / name).unlink(missing_ok=True)
                if (Path(self.args.init) / name).is_file():
                    shutil.copyfile(Path(self.args.init) / name, self.out / name)
            tokenizer = Tokenizer(self.out)
        else:
            tokenizer = train_tokenizer((d.prompt + d.text for d in read_corpus(self.args.data) if not d.held_out), self.args.vocab, path)
        tokens = write_tokens(read_corpus(self.args.data), tokenizer, self.out)
        write_whole(done, json.dumps(wanted))
        return *tokens, tokenizer

    # ------------------------------------------------------------------------------------------------------------ state

    def tensors(self) -> dict[str, Tensor]:
        """Weights and AdamW's state, by name, each shaped as its weight (out, in) or (dim,), steps (); sharded over the processes as they are trained.

        AdamW counts steps for each parameter: one that no sample used in a step, of a layer that all skipped, is not updated.
        """
        found = {}
        for name, p in self.parameters.items():
            state = self.optimizer.state[p]
            if not state:
                state.update(step=torch.tensor(0.0, device=p.device), exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p))
            found[f"weight.{name}"] = p.detach()
            found.update({f"{key}.{name}": value for key, value in state.items()})
        return found

    def save_state(self) -> None:
        """Writes state-STEP whole, or not at all: aside, flushed to disk, renamed; then removes the one before it.

        PyTorch's distributed checkpoint in safetensors: each process writes its shards, any number of them can read it.
        """
        aside, place = self.out / "state.new", self.out / f"state-{self.step:08d}"
        if self.rank == 0:
            shutil.rmtree(aside, ignore_errors=True)
        self.wait()
        try:
            dcp.save(self.tensors(), storage_writer=HuggingFaceStorageWriter(str(aside), save_distributed=True), no_dist=self.world == 1)
        except CheckpointException as error:
            shutil.rmtree(aside, ignore_errors=True)
            cause, _ = next(iter(error.failures.values()))
            raise OSError(f"step {self.step} cannot be saved in {self.out} ({cause}); {self.last_state()}") from None
        self.wait()
        if self.rank == 0:
            (aside / "run.json").write_text(json.dumps({"step": self.step, "steps": self.steps, "settings": self.settings()}))
            for file in aside.iterdir():
                with open(file, "rb") as f:
                    os.fsync(f.fileno())
            shutil.rmtree(place, ignore_errors=True)
            os.rename(aside, place)
            flush_folder(self.out)
            for old in self.out.glob("state-*"):
                if old != place:
                    shutil.rmtree(old)
        self.wait()

    def last_state(self) -> str:
        """Words for an error message: which saved state a run can go on from."""
        states = sorted(self.out.glob("state-*"))
        return f"{states[-1]} is the last good state" if states else "no state was saved yet"

    def wait(self) -> None:
        """Until every process is here."""
        if self.world > 1:
            dist.barrier()

    def agree(self, number: int) -> int:
        """The largest number that any process says: all go on, stop and plan together."""
        if self.world == 1:
            return number
        said = torch.tensor(number, device=self.device)
        dist.all_reduce(said, dist.ReduceOp.MAX)
        return int(said)

    def settings(self) -> dict:
        """What the weights depend on; a run that goes on must agree with it."""
        free = {"out", "save_every", "compile", "plot", "minutes", "steps", "accumulate", "recompute"}
        return {**{k: v if v is None else str(v) for k, v in vars(self.args).items() if k not in free}, "recipe": asdict(self.recipe)}

    def resume(self) -> None:
        """Goes on from the last state in the directory, if there is one; ValueError where it is damaged or of other settings."""
        states = sorted(self.out.glob("state-*"))
        if not states:
            return
        try:
            found = parse_object((states[-1] / "run.json").read_text(), f"{states[-1]}/run.json")
            differs = [k for k, v in self.settings().items() if found["settings"].get(k) != v]
            for shard in states[-1].glob("*.safetensors"):
                with safe_open(shard, framework="pt"):  # checks header and size
                    pass
        except (OSError, ValueError, KeyError, AttributeError, SafetensorError) as error:
            raise ValueError(f"{states[-1]} cannot be gone on from ({error}): remove it, or choose another --out") from None
        if self.args.minutes is None and found["steps"] != self.steps:
            differs.append("steps")
        if differs:
            raise ValueError(f"{self.out} holds a run with other settings ({', '.join(differs)}): use the same, or choose another --out")
        self.step, self.steps = found["step"], found["steps"]
        try:
            dcp.load(self.tensors(), storage_reader=HuggingFaceStorageReader(str(states[-1])), no_dist=self.world == 1)
        except CheckpointException as error:
            cause, _ = next(iter(error.failures.values()))
            raise ValueError(f"{states[-1]} cannot be read ({cause}): remove it, or choose another --out") from None
        log(f"going on from step {self.step} of {self.steps}")

    def save_model(self) -> None:
        """The checkpoint in bfloat16, with what a reader needs to judge it and to make it again."""
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        weights = {k.removeprefix("llama."): v for k, v in get_model_state_dict(self.objective, options=options).items()}
        if self.rank == 0:
            _, held_out, tokenizer = self.data
            stored = Llama(self.config).to(torch.bfloat16)
            stored.load_state_dict(weights)
            save_checkpoint(stored, self.out)
            with torch.autocast("cpu", torch.bfloat16, enabled=self.args.bf16):
                found = evaluate(stored.float(), held_out, self.args.seq)  # the stored weights, in products that are fast here
            record = {
                "command": shlex.join(["python", "train.py", *sys.argv[1:]]),
                "recipe": asdict(self.recipe),
                "seed": self.args.seed,
                "steps": self.step,
                "tokens": self.step * self.args.batch * self.args.seq,
                "held_out_loss_per_exit": found["loss"],
                "held_out_agreement_per_exit": found["agreement"],
            }
            write_whole(self.out / "generation_config.json", json.dumps({"bos_token_id": tokenizer.bos, "eos_token_id": tokenizer.eos}, indent=2))
            write_whole(self.out / "training.json", json.dumps(record, indent=2))
            self.metrics({"step": self.step, "held_out": found})
            if self.args.plot:
                plot(self.out)
        self.wait()

    def metrics(self, line: dict | None = None) -> None:
        """Appends to metrics.jsonl; without a line, takes back what a killed run wrote after its last state."""
        if self.rank:
            return
        file = self.out / "metrics.jsonl"
        if line is None:
            kept = [row for row in file.read_text().splitlines(True) if row.endswith("}\n") and json.loads(row)["step"] <= self.step] if file.exists() else []
            write_whole(file, "".join(kept), end="")
            return
        with open(file, "a") as f:
            f.write(json.dumps(line) + "\n")

    # ------------------------------------------------------------------------------------------------------------- step

    def train_step(self) -> tuple[dict[int, float], float]:
        """One optimiser step; returns the mean loss of each exit that it trained, and the norm of the gradient.

        Every process reads the whole batch and the draws of all its samples, and trains its own part, in --accumulate
        pieces: so neither the number of processes nor of pieces changes what is trained. Raises ValueError where the loss is not finite.
        """
        args, t, layers = self.args, self.step, self.config.n_layers
        tokens, targets = (x.to(self.device) for x in self.data[0].crops(args.batch, args.seq, args.seed, t))
        counted = max(int((targets != IGNORED).sum()), 1)
        weights = exit_weights(t, layers, self.steps, self.recipe)
        drop = [layer_dropout(l, t, layers, self.steps, self.recipe) for l in range(layers)]
        kept = draw_kept(args.seed, t, drop, args.batch, self.recipe.dropout_unit)
        keep = [1 - p if self.recipe.rescale else 1.0 for p in drop]
        distill = t >= self.steps * (1 - self.recipe.distill)
        pieces = np.arange(args.batch).reshape(self.world, args.accumulate, -1)  # process, piece, sample
        sums = torch.zeros(len(weights), device=self.device)
        for number, samples in enumerate(pieces[self.rank]):
            runs = kept[:, pieces[:, number].flatten()].any(1)
            with torch.autocast(self.device.type, torch.bfloat16, enabled=args.bf16):
                total, losses = self.objective(tokens[samples], targets[samples], kept[:, samples], runs, keep, weights, distill)
            (total * (self.world / counted)).backward()  # sharding averages over the processes
            sums += losses
        if self.world > 1:
            dist.all_reduce(sums)
        total_norm = torch.nn.utils.clip_grad_norm_(self.parameters.values(), args.clip)
        norm = (total_norm.full_tensor() if hasattr(total_norm, "full_tensor") else total_norm).item()
        if not math.isfinite(norm) or not sums.isfinite().all():
            raise ValueError(f"the loss or its gradient is not finite at step {t + 1}; {self.last_state()}; try a lower --lr")
        for group in self.optimizer.param_groups:
            group["lr"] = args.lr * learning_rate(t, self.steps, args.warmup)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        return dict(zip(sorted(weights), (sums / counted).tolist())), norm

    def rehearse(self) -> None:
        """Compiles what this run needs, on a batch that skips nothing, and trains nothing.

        A compiler looks at the sizes that it meets first. A process that goes on with a run may first meet a batch of which a
        layer skips some samples; with graphs made for it the run would end with other bits than one that was not stopped. (Seen in
        bfloat16 on AVX-512; in float32 on AVX2 both graphs give the same bits.)
        """
        args, layers = self.args, self.config.n_layers
        self.objective.varies = self.recipe.p_max > 0 and self.recipe.dropout_unit == "sample"
        shape = (args.batch // self.world // args.accumulate, args.seq)
        tokens, kept = torch.zeros(shape, dtype=torch.long, device=self.device), np.ones((layers, shape[0]), dtype=bool)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=args.bf16):
            total, _ = self.objective(tokens, tokens, kept, kept.any(1), [1.0] * layers, {layers: 1.0}, False)
        total.backward()
        self.optimizer.zero_grad(set_to_none=True)

    def train(self) -> None:
        """The loop, with progress, saves, and a stop that Ctrl-C asks for."""
        args, stop = self.args, []

        def ask_to_stop(*_: object) -> None:
            stop.append(True)
            signal.signal(signal.SIGINT, signal.SIG_DFL)

        signal.signal(signal.SIGINT, ask_to_stop)
        self.metrics()
        count = sum(p.numel() for p in self.parameters.values())
        log(f"{count / 1e6:.1f}M parameters, {len(self.data[0]) / 1e6:.2f}M training tokens, {len(self.data[1]) / 1e6:.2f}M held out")
        begun, started, seen = self.step, time.time(), 0
        shown: dict[int, float] = {}
        stopped = False
        if args.compile and self.step < self.steps:
            self.rehearse()
        while self.step < self.steps and not stopped:
            if self.steps >= ENDLESS and self.step == begun + 20:  # after compilation: turn the time into a number of steps
                started, seen = time.time(), 0
            if self.steps >= ENDLESS and self.step == begun + 40:
                self.steps = self.agree(self.step + 1 + int(args.minutes * 60 / ((time.time() - started) / 20)))
            losses, norm = self.train_step()
            seen += args.batch * args.seq
            for exit, loss in losses.items():
                shown[exit] = loss if exit not in shown else 0.95 * shown[exit] + 0.05 * loss
            rate = seen / (time.time() - started)
            self.metrics({"step": self.step, "losses": losses, "norm": norm, "tokens_per_second": rate})
            if sys.stderr.isatty() or self.step % 50 == 0 or self.step == self.steps:
                left = (self.steps - self.step) * args.batch * args.seq / rate / 60
                exits_shown = " ".join(f"{e}:{shown[e]:.2f}" for e in sorted(shown))
                head, end = ("\r\033[K", "") if sys.stderr.isatty() else ("", "\n")
                bar = "" if self.steps >= ENDLESS else f"{'#' * (20 * self.step // self.steps):20} {self.step}/{self.steps}"
                log(f"{head}{bar}  {rate:,.0f} tokens/s  {left:.0f} min left  loss {exits_shown}", end=end)
            stopped = self.agree(len(stop)) > 0
            if self.step % args.save_every == 0 or self.step == self.steps or stopped:
                self.save_state()
                self.save_model()
        if stopped:
            log(f"\nstopped at step {self.step}; the same command goes on from there")
            raise SystemExit(130)
        log(f"\n{self.out} holds the checkpoint: python decode.py --ckpt {self.out}")


def write_whole(path: Path, text: str, end: str = "\n") -> None:
    """Writes a small file whole or not at all."""
    aside = path.with_name(path.name + ".new")
    aside.write_text(text + end)
    os.replace(aside, path)


def flush_folder(path: Path) -> None:
    """Makes renames in a folder last (POSIX)."""
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)


def plot(out: Path) -> None:
    """Writes training.png: held-out loss and agreement with the last layer, per exit, over the steps of metrics.jsonl."""
    import matplotlib  # only here

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    rows = [row for row in rows if "held_out" in row]
    layers = len(rows[0]["held_out"]["loss"])
    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for axis, what in zip(axes, ("loss", "agreement")):
        for l in range(layers):
            axis.plot([r["step"] for r in rows], [r["held_out"][what][l] for r in rows], color=pyplot.cm.viridis(l / layers), marker=".")
        axis.set(xlabel="step", title={"loss": "held-out loss", "agreement": "agreement with the last layer"}[what])
    colours = pyplot.cm.ScalarMappable(pyplot.Normalize(1, layers), "viridis")
    figure.colorbar(colours, ax=axes, label="exit layer")
    figure.savefig(out / "training.png", dpi=120)
    pyplot.close(figure)


def log(text: str, end: str = "\n") -> None:
    """Text to stderr, from the first process alone."""
    if int(os.environ.get("RANK", 0)) == 0:
        print(text, end=end, file=sys.stderr, flush=True)


# ---------------------------------------------------------------------------------------------------------------------
# Command line

ENDLESS = 10**9


def recipe_of(args: argparse.Namespace) -> Recipe:
    """The recipe of --recipe and --phase, with what the command line changes."""
    base = RECIPES[args.recipe]
    if args.recipe == "layerskip":
        base = LAYERSKIP[args.phase or ("continual" if args.init else "scratch")]
    return replace(base, **{name: getattr(args, name) for name in asdict(base) if getattr(args, name) is not None})


def parser() -> argparse.ArgumentParser:
    """The options of the command line."""
    p = argparse.ArgumentParser(
        description="Train an early-exit Llama. The same command goes on where a stopped run left off.",
        epilog="The recipes are settings of two schedules, layer dropout and exit weights; see Recipe in train.py.",
    )
    p.add_argument("--out", required=True, metavar="DIR", help="directory for the checkpoint, the run's state, tokens and metrics")
    p.add_argument("--data", nargs="+", default=["stdlib"], metavar="SRC", help="stdlib, packages, directories, .txt, or .jsonl with prompt and completion")
    p.add_argument("--init", metavar="DIR", help="start from this checkpoint, with its shape and tokenizer")
    p.add_argument("--steps", type=int, default=3000, help="optimiser steps (default %(default)s)")
    p.add_argument("--minutes", type=float, help="training time instead of --steps, turned into steps once the speed is known; reading, compiling and evaluation come on top")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--batch", type=int, default=8, help="sequences per step, over all processes (default %(default)s)")
    p.add_argument("--accumulate", type=int, default=1, help="run a process's part of the batch in so many pieces, to save memory")
    p.add_argument("--seq", type=int, default=512, help="tokens per sequence (default %(default)s)")
    p.add_argument("--lr", type=float, default=1e-3, help="peak learning rate (default %(default)s)")
    p.add_argument("--warmup", type=int, default=100, help="steps of linear warm-up (default %(default)s)")
    p.add_argument("--weight-decay", type=float, default=0.1, help="AdamW, on matrices (default %(default)s)")
    p.add_argument("--clip", type=float, default=1.0, help="largest norm of the gradient (default %(default)s)")
    p.add_argument("--save-every", type=int, default=500, help="steps between checkpoints (default %(default)s)")
    p.add_argument("--plot", action="store_true", help="also draw training.png at each save; needs matplotlib")
    recipe = p.add_argument_group("recipe")
    recipe.add_argument("--recipe", choices=RECIPES, default="layerskip", help="default %(default)s; the options below change single settings of it")
    recipe.add_argument("--phase", choices=LAYERSKIP, help="LayerSkip's published settings for training from scratch (default), continued (default with --init) or tuned")
    recipe.add_argument("--p-max", type=float, help="layer dropout at the last layer")
    recipe.add_argument("--dropout-depth", choices=["exp", "linear", "constant"], help="how it grows over layers")
    recipe.add_argument("--dropout-time", choices=["constant", "exp", "pld"], help="how it grows over steps")
    recipe.add_argument("--dropout-unit", choices=["sample", "batch"], help="what skips a layer")
    recipe.add_argument("--rescale", action=argparse.BooleanOptionalAction, default=None, help="divide a kept layer's output by its keep probability")
    recipe.add_argument("--exits", help="exits that get a loss: all, none, lite, or layers such as 2,4,8")
    recipe.add_argument("--curriculum", choices=["rotational", "gradual"], help="which exits a step trains")
    recipe.add_argument("--rotation", type=int, help="each exit is trained every so many steps; 0: one exit a step")
    recipe.add_argument("--e-scale", type=float, help="weight of the early exits against the last")
    recipe.add_argument("--uniform-exits", action=argparse.BooleanOptionalAction, default=None, help="equal weights for the early exits, not growing with depth")
    recipe.add_argument("--distill", type=float, help="last share of the steps in which exits learn the last layer's distribution (not in the papers)")
    shape = p.add_argument_group("shape of a model from scratch")
    for name, default in {"layers": 24, "dim": 192, "hidden-dim": 384, "heads": 3, "kv-heads": 1, "head-dim": 64, "vocab": 2048}.items():
        shape.add_argument(f"--{name}", type=int, default=default, help="default %(default)s")
    shape.add_argument("--max-len", type=int, default=512, help="context length (default %(default)s)")
    engine = p.add_argument_group("engine")
    engine.add_argument("--bf16", action=argparse.BooleanOptionalAction, help="bfloat16 matrix products (default: where the hardware has them)")
    engine.add_argument("--compile", action=argparse.BooleanOptionalAction, default=shutil.which("c++") is not None, help="torch.compile of layers and loss")
    engine.add_argument("--recompute", action="store_true", help="activation checkpointing: keep only layer inputs, run layers again backward")
    return p


def check(args: argparse.Namespace) -> None:
    """Raises ValueError on settings that cannot run."""
    for name in ("steps", "batch", "accumulate", "seq", "save_every", "layers", "vocab", "warmup"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1, not {getattr(args, name)}")
    if args.minutes is not None and not 0 < args.minutes < math.inf:
        raise ValueError(f"--minutes must be positive, not {args.minutes}")
    if args.plot and find_spec("matplotlib") is None:
        raise ValueError("--plot needs matplotlib: pip install matplotlib")
    if args.phase and args.recipe != "layerskip":
        raise ValueError(f"--phase is a setting of --recipe layerskip, not of {args.recipe}")
    recipe = recipe_of(args)
    if not 0 <= recipe.p_max < 1:
        raise ValueError(f"--p-max must be from 0 to below 1, not {recipe.p_max}")
    if not 0 <= recipe.e_scale < math.inf:
        raise ValueError(f"--e-scale must not be negative, not {recipe.e_scale}")
    if recipe.rotation < 0:
        raise ValueError(f"--rotation must be 0 or positive, not {recipe.rotation}")
    if not 0 <= recipe.distill <= 1:
        raise ValueError(f"--distill must be from 0 to 1, not {recipe.distill}")
    for name in ("lr", "clip"):
        if not 0 < getattr(args, name) < math.inf:
            raise ValueError(f"--{name} must be positive, not {getattr(args, name)}")
    if not 0 <= args.seed < 2**63:
        raise ValueError(f"--seed must be from 0 to 2^63 - 1, not {args.seed}")


def main() -> None:
    args = parser().parse_args()
    if args.minutes:
        args.steps = ENDLESS
    try:
        check(args)
        if "RANK" in os.environ:
            if torch.cuda.is_available():
                torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
            patience = timedelta(days=1)  # while one process reads the data or evaluates
            dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo", timeout=patience)
        Run(args).train()
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    except (ValueError, OSError, SafetensorError) as error:
        print(f"train.py: {' '.join(str(error).split())}", file=sys.stderr)
        raise SystemExit(2) from None
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    main()
