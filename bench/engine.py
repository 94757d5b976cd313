"""What passes cost against what they must cost: roofline, ideal."""

from argparse import Namespace
from collections.abc import Callable
from functools import partial
from statistics import median
from timeit import timeit

import torch

from bench.common import Table, Works, alternate, decode_all, engine, target, title
from decode import Round, Sampling, draft, gumbel, new_cache, next_token, verify
from model import Llama
from support.console import Totals

DAMPINGS = 0.4, 0.2, 0.05  # of `ideal`: some 60, 80 and 95% of the guesses are right


@torch.inference_mode()
def pass_seconds(
    model: Llama, context: int, settings: dict, sampling: Sampling, turns: int, **others: Callable
) -> dict[str, float]:
    """Median seconds of a plain step, a draft, its verification, and d + 1 rows of every layer.

    The choice of tokens counts.

    They run after `context` live positions. `others` take turns with them.
    """
    exit_layer, d = settings["exit_layer"], settings["draft_len"]
    cache = new_cache(model, context + d + 1, d)
    for part in (cache.keys, cache.values, cache.queries):
        part.normal_()
    cache.commit(context)
    cache.query_layer = [exit_layer] * (d + 1)
    pick = partial(next_token, sampling=sampling)

    def verified(rows: int, first: int) -> None:
        for row, logits in enumerate(verify(model, cache, [1] * rows, first)):
            pick(logits, context + 1 + row)

    passes = {
        "plain": lambda: verified(1, 0),
        "draft": lambda: draft(model, cache, 1, d, pick, exit_layer),
        "verify": lambda: verified(d + 1, exit_layer),
        "all rows": lambda: verified(d + 1, 0),
        **others,
    }
    works: Works = {}
    for name, work in passes.items():  # a verification finds the noise that its draft has made
        setup = "pass" if name == "verify" else gumbel.cache_clear
        works[name] = partial(timeit, work, setup, number=1)
    return {name: median(values) for name, values in alternate(works, turns).items()}


def pass_bytes(model: Llama, layers: int, positions: int) -> int:
    """What a pass through `layers` layers and the head reads: weights once, and the live cache."""
    c, parts = model.config, [*model.layers[:layers], model.norm, model.lm_head]
    weights = sum(p.numel() for part in parts for p in part.parameters())
    return model.dtype.itemsize * (weights + 2 * layers * c.n_kv_heads * c.head_dim * positions)


def roofline(args: Namespace) -> list[Table]:
    """Bytes that a plain step, a draft and a verification must read, against the read bandwidth.

    "all rows" is a verification of a drafter that runs no layers. --context: live positions.
    The bandwidth is that of a buffer of the model's size, up to 1 GiB: a small model lives in the
    processor's cache. A draft runs a row more than it guesses, without the head.
    """
    t = target(args)
    exit_layer, d = t.settings["exit_layer"], t.settings["draft_len"]
    context = args.context or len(t.prompts[0])
    model, end = t.load(t.dtype), context + d + 1
    read = partial(pass_bytes, model)
    layers, head = model.config.n_layers, read(0, 0)
    must = {
        "plain": read(layers, context + 1),
        "draft": (d + 1) * read(exit_layer, context + d // 2) - head,
        "verify": read(layers, end) - read(exit_layer, end) + head,
        "all rows": read(layers, end),
    }
    x = torch.ones(min(must["plain"], 2**30) // (4 * 4096) + 1, 4096, device=t.device)
    reads = dict(sums=lambda: x.sum().item(), products=lambda: torch.mv(x, x[0])[0].item())
    model = engine(t, model, t.compile)
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


def ideal(args: Namespace) -> list[Table]:
    """Measured speedup against the ideal one, at several acceptances, on random weights, sampled.

    Layers above the exit add `damping` times what they would: less damping, fewer right guesses.
    Costs are of passes timed alone, in plain steps. Prefill does not count, nor do rounds cut
    short at the end of a text.
    """
    t = target(args)
    return [(title(t), [ideal_row(t, damping) for damping in DAMPINGS])]


def ideal_row(t: Namespace, damping: float) -> dict:
    """What the acceptance under this damping promises, and what is measured."""
    model, sampling, d = t.load(t.dtype), Sampling(1.0), t.settings["draft_len"]
    for layer in model.layers[t.settings["exit_layer"] :]:
        layer.self_attn.o_proj.weight.data *= damping
        layer.mlp.down_proj.weight.data *= damping
    model, context = engine(t, model, t.compile), len(t.prompts[0]) + t.tokens // 2
    taken = pass_seconds(model, context, t.settings, sampling, turns=5 * t.runs)
    c_draft, c_verify = (taken[name] / taken["plain"] for name in ("draft", "verify"))
    plain = partial(decode_all, model, t.prompts, t.tokens, sampling=sampling)
    works: Works = {"plain": plain, "drafted": partial(plain, **t.settings)}
    pairs = list(zip(*alternate(works, t.runs).values()))
    speedups = []
    for full, drafted in pairs:
        rounds = [r for r in drafted.rounds if len(r.drafted) == d]
        speedups.append(seconds_a_token(full, 0) / seconds_a_token(drafted, d))
    rounds = [r for r in drafted.rounds if len(r.drafted) == d]
    alpha, measured = accepted_each(rounds), median(speedups)
    promised = ideal_speedup(alpha, d, c_draft, c_verify)
    row = dict(damping=damping, alpha=alpha, c_draft=c_draft, c_verify=c_verify)
    row |= {"measured": measured, "ideal": promised, "measured / ideal": measured / promised}
    return row | {"identical": all(full.ids == drafted.ids for full, drafted in pairs)}


def seconds_a_token(totals: Totals, drafted: int) -> float:
    """Mean seconds of a token in rounds of so many guesses, without the first, which prefills."""
    pairs = enumerate(zip(totals.times, totals.rounds))
    kept = [p for n, p in pairs if n not in totals.starts and len(p[1].drafted) == drafted]
    return sum(seconds for seconds, _ in kept) / sum(len(r.emitted) for _, r in kept)
