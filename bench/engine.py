"""What passes cost against what they must cost: roofline, ideal."""

from argparse import Namespace
from collections.abc import Callable
from functools import partial
from statistics import median
from timeit import timeit

import torch

from bench.common import Table, Works, alternate, decode_all, engine, progress, target, title
from decode import Round, Sampling, draft, gumbel, new_cache, next_token, verify
from model import Config, Llama


@torch.inference_mode()
def pass_seconds(
    model: Llama, context: int, settings: dict, sampling: Sampling, turns: int, **others: Callable
) -> dict[str, float]:
    """Median seconds of a plain step, a draft and its verification, choice of tokens included.

    After `context` live positions; and of `others`, in the same turns.
    """
    exit_layer, d = settings["exit_layer"], settings["draft_len"]
    cache = new_cache(model.config, context + d + 1, d, model.dtype, model.device)
    for part in (cache.keys, cache.values, cache.queries):
        part.normal_()
    cache.accept(context)
    pick = partial(next_token, sampling=sampling)

    def verified(rows: int, first: int) -> None:
        for row, logits in enumerate(verify(model, cache, [1] * rows, first)):
            pick(logits, context + 1 + row)

    passes = {
        "plain": lambda: verified(1, 0),
        "draft": lambda: draft(model, cache, 1, d, pick, exit_layer),
        "verify": lambda: verified(d + 1, exit_layer),
        **others,
    }
    works: Works = {}
    for name, work in passes.items():  # a verification finds the noise that its draft has made
        setup = "pass" if name == "verify" else gumbel.cache_clear
        works[name] = partial(timeit, work, setup, number=1)
    return {name: median(values) for name, values in alternate(works, turns).items()}


def pass_bytes(c: Config, layers: int, positions: int, itemsize: int) -> int:
    """What a pass through `layers` layers and the head reads: weights once, and the live cache."""
    with torch.device("meta"):
        model = Llama(c)
    parts = [*model.model.layers[:layers], model.model.norm, model.lm_head]
    weights = sum(p.numel() for part in parts for p in part.parameters())
    return itemsize * (weights + 2 * layers * c.n_kv_heads * c.head_dim * positions)


def roofline(args: Namespace) -> list[Table]:
    """Bytes that a plain step, a draft and a verification must read, against the read bandwidth.

    That is of a buffer of the model's size, up to 1 GiB: a small model lives in the processor's
    cache. A draft runs a row more than it guesses, without the head.
    """
    t = target(args)
    exit_layer, d, context = t.settings["exit_layer"], t.settings["draft_len"], len(t.prompts[0])
    model = engine(t, t.load(t.dtype), t.compile)
    read = partial(pass_bytes, model.config, itemsize=model.dtype.itemsize)
    layers, head, end = model.config.n_layers, read(0, 0), context + d + 1
    must = {
        "plain": read(layers, context + 1),
        "draft": (d + 1) * read(exit_layer, context + d // 2) - head,
        "verify": read(layers, end) - read(exit_layer, end) + head,
    }
    x = torch.ones(-(-min(must["plain"], 1 << 30) >> 14), 1 << 12, device=t.device)
    reads = dict(sums=lambda: x.sum().item(), products=lambda: torch.mv(x, x[0])[0].item())
    taken = pass_seconds(model, context, t.settings, Sampling(), t.runs, **reads)
    bandwidth = x.nbytes / min(taken[name] for name in reads)
    rows = []
    for name, size in must.items():
        rate = size / taken[name]
        row = {"pass": name, "MB to read": size / 1e6, "ms": 1e3 * taken[name]}
        rows.append(row | {"GB/s": rate / 1e9, "share of the bandwidth": rate / bandwidth})
    about = f"{context} positions, {x.nbytes >> 20} MiB are read at {bandwidth / 1e9:.1f} GB/s"
    return [(title(t, about), rows)]


def ideal_speedup(alpha: float, draft_len: int, draft: float, verify: float) -> float:
    """(1 + alpha + ... + alpha^d) / (draft + verify), costs in plain steps.

    alpha is the probability of a right guess (arXiv 2211.17192, theorem 3.8, has costs d c and 1).
    """
    return sum(alpha**k for k in range(draft_len + 1)) / (draft + verify)


def accepted_each(rounds: list[Round]) -> float:
    """alpha: accepted guesses among those judged, up to the first wrong one of each round."""
    accepted = sum(r.accepted for r in rounds)
    return accepted / (accepted + sum(r.accepted < len(r.drafted) for r in rounds))


def find_damping(acceptance: Callable[[float], float], wanted: float) -> float:
    """Where acceptance(damping), which falls as damping grows, is as wanted; from 2^-10 to 4."""
    low, high = 2.0**-10, 4.0
    for _ in range(8):
        middle = (low * high) ** 0.5
        low, high = (middle, high) if acceptance(middle) > wanted else (low, middle)
    return low


def ideal(args: Namespace) -> list[Table]:
    """Speedup against the ideal one at set acceptances, on random weights, sampled.

    Layers above the exit add `damping` times what they would, so that the exit foresees as much as
    is wanted. Costs are of passes timed alone, in plain steps. Prefill does not count, nor do
    rounds cut short at the end of a text.
    """
    args.shape = args.shape or "1b"
    t = target(args)
    return [(title(t), [ideal_row(t, alpha) for alpha in t.alphas])]


def ideal_row(t: Namespace, wanted: float) -> dict:
    """What an acceptance promises, and what is measured."""
    model, d, sampling = t.load(t.dtype), t.settings["draft_len"], Sampling(1.0)
    decoded = partial(decode_all, count=t.tokens, sampling=sampling)
    late = model.model.layers[t.settings["exit_layer"] :]
    weights = [w.data for l in late for w in (l.self_attn.o_proj.weight, l.mlp.down_proj.weight)]
    whole = [weight.clone() for weight in weights]

    def acceptance(damping: float) -> float:
        progress(f"{t.name}, acceptance {wanted}: trying damping {damping:g}")
        for weight, kept in zip(weights, whole):
            weight.copy_(kept * damping)
        return accepted_each(decoded(model, t.prompts[:2], **t.settings).rounds)

    damping = find_damping(acceptance, wanted)
    acceptance(damping)
    model, context = engine(t, model, t.compile), len(t.prompts[0]) + t.tokens // 2
    costs, speedups, same = [], [], True
    for _ in range(t.runs):
        taken = pass_seconds(model, context, t.settings, sampling, turns=5)
        costs.append([taken[name] / taken["plain"] for name in ("draft", "verify")])
        plain, drafted = decoded(model, t.prompts), decoded(model, t.prompts, **t.settings)
        rounds = [r for r in drafted.rounds if len(r.drafted) == d]
        speedups.append(seconds_a_token(plain.rounds) / seconds_a_token(rounds))
        same = same and plain.ids == drafted.ids
    c_draft, c_verify = map(median, zip(*costs))
    alpha, measured = accepted_each(rounds), median(speedups)
    promised = ideal_speedup(alpha, d, c_draft, c_verify)
    row = dict(wanted=wanted, damping=damping, alpha=alpha, c_draft=c_draft, c_verify=c_verify)
    row |= {"measured": measured, "ideal": promised, "measured / ideal": measured / promised}
    return row | {"identical": same}


def seconds_a_token(rounds: list[Round]) -> float:
    """Mean seconds of a token, without prefill."""
    taken = sum(r.draft_seconds + r.verify_seconds for r in rounds)
    return taken / sum(len(r.emitted) for r in rounds)
