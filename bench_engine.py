"""Measurements of the engine, part of bench.py: what a pass costs against what it must cost, on any shape.

Random weights do for all of it: time and memory depend on a model's shape, not on its words. Where acceptance matters
(`ideal`), late layers are damped until the early exit foresees as much as is wanted.
"""

import os
import statistics
import sys
import time
from argparse import Namespace
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from inspect import getclosurevars
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.autograd.profiler import profile as profiler

import compiled
import decode
import model as llama
from cache import VIEW, KVQCache
from decode import DTYPES, Run, Sampling, auto_dtype, drafting_defaults, generate, generation_defaults, gumbel, new_cache, next_token, run, verify
from drafters import EarlyExit
from model import MAX_ROWS, MLP, CachedAttention, Config, Llama, RMSNorm, load_checkpoint
from tokenizer import Tokenizer

SHAPES = {
    "8m": Config(2048, 192, 384, 24, 3, 1, 64, tied=True),  # the shipped checkpoint
    "15m": Config(32000, 288, 768, 6, 6, 6, 48, tied=True),  # llama2.c's stories15M
    "135m": Config(49152, 576, 1536, 30, 9, 3, 64, tied=True),  # SmolLM 135M
    "360m": Config(49152, 960, 2560, 32, 15, 5, 64, tied=True),  # SmolLM 360M
    "1b": Config(  # Llama 3.2 1B
        128256, 2048, 8192, 16, 32, 8, 64, max_len=131072, rope_theta=5e5, rope_type="llama3", rope_factor=32.0, tied=True
    ),
    "8b": Config(128256, 4096, 14336, 32, 32, 8, 128, max_len=131072, rope_theta=5e5, rope_type="llama3", rope_factor=8.0),  # Llama 3.1 8B
}  # fmt: skip

# ---------------------------------------------------------------------------------------------------------------------
# What every measurement uses


def progress(text: str) -> None:
    """Shows text in place of the last, on a terminal alone."""
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)


def bar(done: int, count: int, width: int = 20) -> str:
    """A progress bar for the start of a line."""
    full = width * done // count
    return f"{'█' * full}{'░' * (width - full)} {done}/{count}"


def table(names: list[str], rows: list[list]) -> None:
    """Prints Markdown that is readable in a terminal too."""
    rows = [names, *([str(v) for v in row] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = ["| " + " | ".join(v.ljust(w) for v, w in zip(row, widths)) + " |" for row in rows]
    lines.insert(1, "|" + "|".join("-" * (w + 2) for w in widths) + "|")
    print("\n".join(lines), flush=True)


def described(values: list[float]) -> dict:
    """Median and spread of repeated measurements."""
    return {"median": statistics.median(values), "low": min(values), "high": max(values)}


def decode_all(model: Llama, prompts: list[list[int]], count: int, note: str = "", **settings: Any) -> Run:
    """One generation of `count` tokens per prompt, as one Run."""
    total = Run()
    for done, prompt in enumerate(prompts):
        progress(f"{note} prompt {done + 1}/{len(prompts)}")
        one = run(generate(model, prompt, max_new_tokens=count, eos=(), **settings))
        total = Run(total.ids + one.ids, total.rounds + one.rounds, total.seconds + one.seconds)
    progress("")
    return total


def alternate(args: Namespace, prompts: list[list[int]], contenders: dict) -> tuple[dict[str, list[float]], dict[str, Run]]:
    """tokens/s of each contender {name: (model, settings)}, args.runs times in turn, and its last run."""
    speeds: dict[str, list[float]] = {name: [] for name in contenders}
    last = {}
    for turn in range(args.runs):
        for place, (name, (model, extra)) in enumerate(contenders.items()):
            note = f"{bar(turn * len(contenders) + place, args.runs * len(contenders))} {name}:"
            last[name] = decode_all(model, prompts, args.tokens, note, **extra)
            speeds[name].append(last[name].tokens_per_second)
    return speeds, last


def dtype_of(args: Namespace) -> torch.dtype:
    """The type that --dtype names; auto as in decode.py."""
    return DTYPES.get(args.dtype) or auto_dtype(torch.device(args.device))


def settle() -> None:
    """Waits until a GPU, if one is in use, has done what it was given."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def random_model(config: Config, dtype: torch.dtype, device: torch.device | str = "cpu") -> Llama:
    """A Llama of random weights, made in place: memory holds them once."""
    with torch.device("meta"):
        model = Llama(config)
    model, generator = model.to(dtype).to_empty(device=device), torch.Generator(device).manual_seed(0)
    if config.tied:
        model.lm_head.weight = model.model.embed_tokens.weight
    with torch.no_grad():
        for name, p in model.named_parameters():
            progress(f"random weights: {name}")
            p.fill_(1.0) if p.dim() == 1 else p.normal_(0, 1.5 * p.shape[1] ** -0.5, generator=generator)
    progress("")
    return model.eval()


def load(args: Namespace, shape: str | None, dtype: torch.dtype) -> Llama:
    """A model that is not packed yet: random weights of `shape`, or the checkpoint where it is None."""
    return random_model(SHAPES[shape], dtype, args.device) if shape else load_checkpoint(args.ckpt, dtype, args.device)


def packed(args: Namespace, model: Llama, exits: Iterable[int]) -> Llama:
    """The model ready to decode, compiled with --compile."""
    if args.compile:
        progress("compiling")
        compiled.compile_passes(model, exits)
        progress("")
    return model.pack()


def targets(args: Namespace) -> Iterator[tuple[str, Llama, dict]]:
    """(name, packed model, drafting settings) of the checkpoint, or of each shape that was asked for, one at a time.

    Random weights are never sure of a word, so a shape drafts without a confidence.
    """
    for shape in args.shape or [None]:
        model = load(args, shape, dtype_of(args))
        found = {"assistant_confidence_threshold": 0.0} if shape else generation_defaults(args.ckpt)
        settings = drafting(args, found, model.config)
        yield shape or args.ckpt.name, packed(args, model, [settings["exit_layer"]]), settings
        del model  # before the next is made


def drafting(args: Namespace, found: dict, config: Config) -> dict:
    """Drafting settings: what was asked for, else the checkpoint's own. Raises ValueError where the model has no such exit."""
    settings = drafting_defaults(found, config)
    given = {"exit_layer": args.exits and args.exits[0], "draft_len": args.drafts and args.drafts[0], "min_confidence": args.min_confidence}
    settings.update({name: value for name, value in given.items() if value is not None})
    if not 1 <= settings["exit_layer"] < config.n_layers or not 1 <= settings["draft_len"] < MAX_ROWS:
        raise ValueError(f"exit layers go from 1 to {config.n_layers - 1}, draft lengths to {MAX_ROWS - 1}: not {settings['exit_layer']}, {settings['draft_len']}")
    return settings


def passes(model: Llama, context: int, exit_layer: int, draft_len: int, sampling: Sampling = Sampling()) -> dict[str, Callable]:
    """The passes of decoding at `context` live positions, as functions: a plain step; a draft step; the row of the last guess,
    which is run but not read; and the verification of draft_len + 1 rows. Each but `row` ends with the choice of its tokens."""
    c = model.config
    cache = new_cache(c, context + MAX_ROWS, draft_len, model.dtype, model.device)
    cache.keys.normal_(), cache.values.normal_(), cache.queries.normal_()
    cache.accept(context)
    drafter, tokens = EarlyExit(model, cache, exit_layer=exit_layer), [1] * (draft_len + 1)

    def pick(logits: Tensor) -> None:
        for row, one in enumerate(logits):
            next_token(one, context + 1 + row, sampling)

    def plain():
        gumbel.cache_clear()  # a plain or draft step is the first to need the noise of its position
        pick(verify(model, cache, tokens[:1], 0, c.n_layers)[0])

    def draft():
        gumbel.cache_clear()
        pick(model.unembed(drafter.step(1, 0)))

    return {"plain": plain, "draft": draft, "row": lambda: drafter.step(1, 0), "verify": lambda: pick(verify(model, cache, tokens, exit_layer, c.n_layers)[0])}


@torch.inference_mode()
def median_seconds(works: dict[Any, Callable], repeat: int) -> dict[Any, float]:
    """Median seconds of each function, in turns after one call that does not count."""
    taken: dict[Any, list[float]] = {name: [] for name in works}
    for _ in range(repeat + 1):
        for name, work in works.items():
            settle()
            started = time.perf_counter()
            work()
            settle()
            taken[name].append(time.perf_counter() - started)
    return {name: statistics.median(seconds[1:]) for name, seconds in taken.items()}


# ---------------------------------------------------------------------------------------------------------------------
# roofline: bytes that must move, and how fast they do


def layer_bytes(c: Config, layers: int, itemsize: int) -> int:
    """Weights of `layers` layers."""
    attention = c.dim * (2 * c.n_heads + 2 * c.n_kv_heads) * c.head_dim
    return layers * itemsize * (attention + 3 * c.dim * c.hidden_dim + 2 * c.dim)


def kv_bytes(c: Config, layers: int, positions: int, itemsize: int) -> int:
    """Keys and values of `positions` positions in `layers` layers."""
    return layers * itemsize * 2 * c.n_kv_heads * c.head_dim * positions


def head_bytes(c: Config, itemsize: int) -> int:
    """Weights of the unembedding: final norm and head."""
    return itemsize * c.dim * (c.vocab_size + 1)


def pass_bytes(c: Config, layers: int, positions: int, itemsize: int) -> int:
    """What a pass through `layers` layers and the head must read: each weight once, however many rows, and the live cache."""
    return layer_bytes(c, layers, itemsize) + kv_bytes(c, layers, positions, itemsize) + head_bytes(c, itemsize)


def reader(size: int, device: torch.device) -> tuple[Callable, int, str]:
    """PyTorch's fastest way to read a buffer of `size` bytes with all threads: it, the bytes, and what it is.

    Of a vector sum, a matrix times a vector and a maximum. (widened.cpp, which asks for memory ahead of time, may read a little faster.)
    """
    x = torch.ones(-(-size // (4 << 12)), 1 << 12, device=device)
    methods: dict[str, Callable] = {"sum": x.sum, "matrix times vector": lambda: torch.mv(x, x[0]), "maximum": x.amax}
    seconds = median_seconds(methods, 10)
    fastest = min(seconds, key=seconds.__getitem__)
    return methods[fastest], x.nbytes, fastest


def roofline(args: Namespace, tokenizer: Tokenizer, prompts: list[list[int]]) -> dict:
    """Bytes that each kind of pass must read, against the bandwidth of this machine, medians of both, measured in turns.

    The bandwidth is that of a buffer as large as the model, up to 1 GiB: small models live in the processor's cache, which
    is faster than memory.
    """
    report: dict = {}
    for name, model, s in targets(args):
        c, size, exit_layer, rows = model.config, model.dtype.itemsize, s["exit_layer"], s["draft_len"] + 1
        works, end, layers = passes(model, args.context, exit_layer, rows - 1), args.context + 1, c.n_layers
        must = {
            "plain": pass_bytes(c, layers, end, size),
            "draft": pass_bytes(c, exit_layer, end, size),
            "verify": pass_bytes(c, layers - exit_layer, args.context + rows, size),
        }
        read, buffer, method = reader(min(must["plain"], 1 << 30), args.device)
        seconds = median_seconds(works | {"read": read}, args.runs)
        bandwidth = buffer / seconds["read"]
        print(
            f"{name}, {model.dtype}{', compiled' if args.compile else ''}, {args.context} positions, exit {exit_layer}, draft {rows - 1}, {torch.get_num_threads()} threads; "
            f"medians of {args.runs} turns; a buffer of {buffer / 1e6:.0f} MB is read at {bandwidth / 1e9:.1f} GB/s ({method})\n"
        )
        report[name] = {"bandwidth": bandwidth} | {kind: {"bytes": must[kind], "seconds": seconds[kind], "share": must[kind] / seconds[kind] / bandwidth} for kind in must}
        table(
            ["pass", "layers", "rows", "MB to read", "ms", "GB/s", "share of the bandwidth"],
            [
                [kind, ran, n, f"{v['bytes'] / 1e6:.1f}", f"{v['seconds'] * 1e3:.2f}", f"{v['bytes'] / v['seconds'] / 1e9:.1f}", f"{v['share']:.0%}"]
                for (kind, ran, n) in (("plain", layers, 1), ("draft", exit_layer, 1), ("verify", layers - exit_layer, rows))
                for v in [report[name][kind]]
            ],
        )
        del model, works, read
    return report


# ---------------------------------------------------------------------------------------------------------------------
# ideal: the speedup that acceptance and costs promise, and what is left of it


def expected_tokens(alpha: float, draft_len: int) -> float:
    """Tokens that a round emits on average, where each guess is accepted with probability alpha once those before it were."""
    return sum(alpha**k for k in range(draft_len + 1))


def ideal_speedup(alpha: float, draft_len: int, draft: float, verify: float, row: float = 0.0) -> float:
    """Speedup of a round of draft_len draft steps, one more draft row and a verification; costs in plain steps.
    (Leviathan et al., arXiv 2211.17192, theorem 3.8, where verification costs one plain step.)"""
    return expected_tokens(alpha, draft_len) / (draft_len * draft + row + verify)


def accepted_each(rounds: list) -> float:
    """alpha: accepted guesses among those that were judged, that is, up to each round's first wrong one."""
    accepted = sum(r.accepted for r in rounds)
    return accepted / (accepted + sum(r.accepted < len(r.drafted) for r in rounds))


def find_damping(acceptance: Callable[[float], float], target: float, close: float = 0.01, tries: int = 8) -> float:
    """The damping at which acceptance(damping), which falls from 1 at 0, is about `target`: a bracket, then bisection.

    acceptance is measured on short runs, so it is noisy: the search ends within `close` or after `tries` halvings.
    Raises ValueError where no damping brings it down.
    """
    low, high = 0.0, 0.5
    while (found := acceptance(high)) > target:
        low, high = high, 2 * high
        if high > 64:
            raise ValueError(f"no damping brings acceptance down to {target}: {found:.2f} are accepted at {low:g}")
    for _ in range(tries):
        middle = (low + high) / 2
        found = acceptance(middle)
        if abs(found - target) <= close:
            return middle
        low, high = (middle, high) if found > target else (low, middle)
    return (low + high) / 2


class Damped:
    """A random model whose layers from `exit_layer` on add `damping` times what they would. 0: exits foresee all."""

    def __init__(self, model: Llama, exit_layer: int, pack: Callable[[Llama], Llama]):
        late = model.model.layers[exit_layer:]
        weights = [w.detach().clone() for layer in late for w in (layer.self_attn.o_proj.weight, layer.mlp.down_proj.weight)]
        self.model = pack(model)
        self.late = list(zip((p for layer in late for p in (layer.self_attn.out, layer.mlp.down)), weights))

    def damp(self, damping: float) -> None:
        """Sets the damping, whatever it was."""
        for product, weight in self.late:  # packed anew, so that a damped product costs what any product costs
            damped = product.way(weight * damping)
            if product.open:  # compiled code has looked into it, and holds its weight
                for held, new in zip(tensors_of(product.product), tensors_of(damped)):
                    held.copy_(new)
            else:
                product.product = damped


def tensors_of(function: Callable) -> list[Tensor]:
    """The tensors, each (...), that a function made in another holds."""
    return [value for value in getclosurevars(function).nonlocals.values() if isinstance(value, Tensor)]


def ideal(args: Namespace, tokenizer: Tokenizer, prompts: list[list[int]]) -> dict:
    """Measured speedup against the ideal one at set acceptances, on random weights, sampled so that the text is not a loop.

    Only rounds of a full draft count, and prefill does not. The costs are medians of passes timed alone, in the same run.
    """
    return {shape: ideal_of(args, shape, prompts) for shape in args.shape or ["1b"]}


def ideal_of(args: Namespace, shape: str, prompts: list[list[int]]) -> dict:
    """`ideal` for one shape."""
    model = load(args, shape, dtype_of(args))
    s = drafting(args, {"num_assistant_tokens": 4, "assistant_confidence_threshold": 0.0}, model.config)
    exit_layer, draft_len, sampling = s["exit_layer"], s["draft_len"], Sampling(1.0)
    damped, report, shown = Damped(model, exit_layer, partial(packed, args, exits=[exit_layer])), {}, []

    def drafted(texts: list[list[int]], note: str) -> tuple[Run, list]:
        """A run, and its rounds of a full draft."""
        r = decode_all(model, texts, args.tokens, note, exit_layer=exit_layer, draft_len=draft_len, sampling=sampling)
        return r, [one for one in r.rounds if len(one.drafted) == draft_len]

    def acceptance(damping: float) -> float:
        damped.damp(damping)
        return accepted_each(drafted(prompts[:2], f"{shape}, acceptance {target}: damping {damping:g},")[1])

    for target in args.alphas:
        damping = find_damping(acceptance, target)
        damped.damp(damping)
        costs, plain_speeds, speeds = [], [], []
        for turn in range(args.runs):
            note = f"{bar(turn, args.runs)} {shape}, acceptance {target}:"
            costs.append(median_seconds(passes(model, len(prompts[0]) + args.tokens // 2, exit_layer, draft_len, sampling), 5))
            plain = decode_all(model, prompts, args.tokens, note + " plain,", sampling=sampling)
            plain_speeds.append(len(plain.ids) / sum(r.verify_seconds for r in plain.rounds))
            whole, rounds = drafted(prompts, note + " drafted,")
            assert whole.ids == plain.ids, "the drafted text is not the full model's"
            speeds.append(sum(len(r.emitted) for r in rounds) / sum(r.draft_seconds + r.verify_seconds for r in rounds))
        cost = {kind: statistics.median(c[kind] / c["plain"] for c in costs) for kind in ("draft", "row", "verify")}
        alpha, measured = accepted_each(rounds), statistics.median(speeds) / statistics.median(plain_speeds)
        best = ideal_speedup(alpha, draft_len, cost["draft"], cost["verify"])
        with_row = ideal_speedup(alpha, draft_len, cost["draft"], cost["verify"], cost["row"])
        emitted, expected = statistics.mean(len(r.emitted) for r in rounds), expected_tokens(alpha, draft_len)
        accepted, distinct = statistics.mean(r.accepted / draft_len for r in rounds), len(set(plain.ids)) / len(plain.ids)
        report[str(target)] = dict(
            damping=damping, alpha=alpha, accepted=accepted, tokens_per_round=emitted, expected=expected, cost=cost,
            measured=measured, ideal=best, ideal_with_row=with_row, distinct=distinct,
        )  # fmt: skip
        row = [target, f"{damping:.4g}", f"{alpha:.3f}", f"{accepted:.0%}", f"{emitted:.2f} ({expected:.2f})", f"{cost['draft']:.3f}", f"{cost['verify']:.3f}"]
        shown.append(row + [f"{measured:.2f}", f"{best:.2f}", f"{measured / best:.0%}", f"{with_row:.2f}", f"{measured / with_row:.0%}", f"{distinct:.0%}"])
    print(f"{shape}, random weights, {model.dtype}{', compiled' if args.compile else ''}, exit {exit_layer} of {model.config.n_layers}, draft {draft_len}, {len(prompts)} prompts x {args.tokens} tokens, medians of {args.runs} runs\n")
    table(["wanted", "damping", "alpha", "accepted", "tokens per round (expected)", "c_draft", "c_verify", "measured", "ideal", "of it", "with the last row", "of it", "distinct tokens"], shown)
    print(
        f"\nalpha: a guess is accepted, once those before it were. accepted: of all {draft_len} guesses. Costs in plain steps. ideal = (1 + alpha + ... + alpha^{draft_len}) / "
        f"({draft_len} c_draft + c_verify).\nWith the last row: the engine runs {draft_len + 1} draft rows, as the verifier starts at layer {exit_layer} for the last guess too; its row costs {cost['row']:.3f}.\n"
    )
    return report


# ---------------------------------------------------------------------------------------------------------------------
# exactness, scale


def exactness(args: Namespace, tokenizer: Tokenizer, prompts: list[list[int]]) -> dict:
    """Plain decoding with and without the promise of equal bits, alternating; one type and one model at a time."""
    report, rows = {}, []
    for shape in args.shape or [None]:
        for dtype in ("bfloat16", "float32") if args.dtype == "auto" else (args.dtype,):
            models = {how: load(args, shape, DTYPES[dtype]).pack(how == "exact") for how in ("exact", "not exact")}
            for model in models.values():
                decode_all(model, prompts[:1], 8)
            speeds, _ = alternate(args, prompts, {how: (model, {}) for how, model in models.items()})
            found = {how: described(v) for how, v in speeds.items()}
            cost = found["not exact"]["median"] / found["exact"]["median"] - 1
            report[f"{shape or args.ckpt.name}, {dtype}"] = found | {"cost": cost}
            shown = (f"{v['median']:.1f} ({v['low']:.1f} to {v['high']:.1f})" for v in found.values())
            rows.append([shape or args.ckpt.name, dtype, *shown, f"{cost:+.1%}"])
            del models, model
    print(f"{len(prompts)} prompts x {args.tokens} tokens, medians of {args.runs} alternating runs, {torch.get_num_threads()} threads\n")
    table(["model", "type", "exact, tokens/s", "--no-exact, tokens/s", "time that exactness costs"], rows)
    return report


CONTEXTS = (128, 256, 512, 1024, 2048, 4096, 8192)
ROWS = (1, 2, 3, 4, 6, 8, 12, 16)
INNER = ((CachedAttention, "attend_rows"), (compiled, "attend_widened"))  # of these, one is called in each layer
ATTENTION = ((CachedAttention, "__init__"), (CachedAttention, "__call__"), *INNER)


@contextmanager
def pausing(seconds: float) -> Iterator[None]:
    """After each layer's attention the caller waits, busy with nothing, and the processor's other core idles."""

    def paused(attend: Callable) -> Callable:
        def call(*given):
            mixed, until = attend(*given), time.perf_counter() + seconds
            while time.perf_counter() < until:
                pass
            return mixed

        return call

    with ExitStack() as stack:
        for owner, name in INNER:
            stack.enter_context(patch.object(owner, name, paused(getattr(owner, name))))
        yield


def scale(args: Namespace, tokenizer: Tokenizer, prompts: list[list[int]]) -> dict:
    """Milliseconds of a plain step as the context grows, attention apart from the rest; as the model grows; and of a full pass
    as its rows grow.

    The rest of a step may take longer behind a longer attention for no other reason than that time passes: presumably what it
    had in the processor's caches has gone. So a step at the shortest context is also timed with pauses as long as the longest one's attention.
    """
    args.shape, report = args.shape or [shape for shape in SHAPES if shape != "8b"], {}
    tables: tuple[list, list, list] = ([], [], [])
    for name, model, _ in targets(args):
        c, size = model.config, model.dtype.itemsize
        steps = {context: passes(model, context, 1, 1)["plain"] for context in CONTEXTS}
        parts: dict[int | str, list] = defaultdict(list)

        def timed(plain: Callable) -> list[float]:
            """Seconds of attention and of the rest of a plain step."""
            clock = Clock()
            with clock.patched(*((*part, "attention") for part in ATTENTION)), torch.inference_mode():
                clock.timed("rest", plain)()
            return [clock.seconds[None, phase] for phase in ("attention", "rest")]

        for turn in range(args.runs + 1):  # in turns: a machine that slows down slows all of them
            for done, (context, plain) in enumerate(steps.items()):
                progress(f"{bar(turn * len(steps) + done, (args.runs + 1) * len(steps))} {name}, context {context}")
                parts[context].append(timed(plain))
            with pausing((parts[CONTEXTS[-1]][-1][0] - parts[CONTEXTS[0]][-1][0]) / c.n_layers):
                parts["paused"].append(timed(steps[CONTEXTS[0]]))
        found = {context: [statistics.median(v) for v in zip(*taken[1:])] for context, taken in parts.items()}
        progress(f"{name}, rows")
        rows = median_seconds({n: passes(model, 128, 0, n - 1)["verify"] for n in ROWS}, args.runs)
        progress("")
        report[name] = {"context": found, "rows": rows}
        count, read = layer_bytes(c, c.n_layers, 1) + head_bytes(c, 1), pass_bytes(c, c.n_layers, 129, size)
        longest, shortest, paused = (found[context][1] for context in (CONTEXTS[-1], CONTEXTS[0], "paused"))
        tables[0].append([name, *(f"{1e3 * a:.2f} + {1e3 * b:.2f}" for a, b in found.values()), f"{longest / shortest - 1:+.0%}", f"{longest / paused - 1:+.0%}"])
        tables[1].append([name, f"{count / 1e6:.0f}M", f"{read / 1e6:.0f}", f"{1e3 * sum(found[128]):.2f}", f"{read / sum(found[128]) / 1e9:.1f}"])
        tables[2].append([name, *(f"{s / rows[1]:.2f}" for s in rows.values())])
        del model, plain, steps
    print(f"{dtype_of(args)}{', compiled' if args.compile else ''}, {torch.get_num_threads()} threads, medians of {args.runs} turns\n\nms of a plain step by context: attention (with its mask and the cache's writing) + the rest\n")
    table(["model", *map(str, CONTEXTS), f"{CONTEXTS[0]}, with pauses", f"the rest, {CONTEXTS[-1]} against {CONTEXTS[0]}", "against pauses"], tables[0])
    print("\na plain step at 128 positions by size\n")
    table(["model", "parameters", "MB to read", "ms", "GB/s"], tables[1])
    print("\na pass through all layers at 128 positions by rows, in passes of one row\n")
    table(["model", *map(str, ROWS)], tables[2])
    return report


# ---------------------------------------------------------------------------------------------------------------------
# memory


@contextmanager
def silent_stderr() -> Iterator[None]:
    """The profiler's library announces itself on stderr, which nothing else turns off."""
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def peak_bytes(work: Callable) -> int:
    """The most bytes that PyTorch's allocator held at once during work(), above what it held before.

    From the profiler's record of every allocation, temporaries inside operators included, to the byte; the process's
    resident size would add pages of code, threads and what malloc keeps. oneDNN's and MKL's own scratch does not show.
    On a GPU that of its allocator, which counts in blocks of 512 bytes.
    """
    if torch.cuda.is_initialized():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        return torch.cuda.max_memory_allocated() - before
    with silent_stderr(), profiler(profile_memory=True, use_kineto=False) as recorded:
        work()
    held = peak = 0
    for event in sorted((e for e in recorded.kineto_results.events() if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def activation_bytes(c: Config, rows: int, view: int, logits: int, itemsize: int) -> int:
    """What a pass of `rows` rows over `view` positions holds at its widest: its mask, the hidden states, their norm and the wider of

    an MLP     gate and up, SiLU of gate, their product      4 hidden_dim a row
    the head   logits of this pass and of the last           2 vocab_size for each of `logits` rows
    """
    return itemsize * (rows * (view + 2 * c.dim) + max(4 * c.hidden_dim * rows, 2 * c.vocab_size * logits))


def cache_bytes(c: Config, length: int, draft_len: int, itemsize: int) -> int:
    """Keys and values of `length` positions, in whole views, and draft_len + 1 exit queries: what KVQCache.nbytes must be."""
    return kv_bytes(c, c.n_layers, -(-length // VIEW) * VIEW, itemsize) + itemsize * (draft_len + 1) * c.dim


def memory(args: Namespace, tokenizer: Tokenizer, prompts: list[list[int]]) -> dict:
    """Peak of PyTorch's allocations above the weights, plain and drafted, against a formula: the cache and the widest pass.

    Drafting may add its d + 1 exit queries and what a pass of d + 1 rows holds: no more.
    """
    report, rows, notes, verdicts = {}, [], [], []
    prompt, end = prompts[0], len(prompts[0]) + args.tokens
    for name, model, s in targets(args):
        assert model.head  # it is packed
        c, size, draft_len = model.config, model.dtype.itemsize, s["draft_len"]
        s["min_confidence"] = 0.0  # full drafts, the most that can be held
        peaks = []
        for kind, d, settings in (("plain", 0, {}), (f"drafted, d = {draft_len}", draft_len, s)):
            decode_all(model, [prompt], args.tokens, f"{name}, {kind}:", **settings)  # makes the rotary table, which stays
            peaks.append(peak_bytes(partial(decode_all, model, [prompt], args.tokens, **settings)))
            prefilled = activation_bytes(c, len(prompt) - 1, len(prompt) - 1, 0, size)
            cache, widest = cache_bytes(c, end, d, size), max(prefilled, activation_bytes(c, d + 1, end, max(d + 1, model.head.min_rows), size))
            off = peaks[-1] / (cache + widest) - 1
            verdicts.append(abs(off) <= 0.1)
            rows.append([name, kind, *(f"{v / 1e6:.3f}" for v in (peaks[-1], cache + widest, cache, widest)), f"{off:+.1%}"])
            report[f"{name}, {kind}"] = {"peak": peaks[-1], "cache": cache, "widest_pass": widest}
        added, allowed = peaks[1] - peaks[0], size * (draft_len + 1) * c.dim + activation_bytes(c, draft_len + 1, end, draft_len + 1, size)
        verdicts.append(added <= allowed)
        notes.append(f"{name}: drafting adds {added / 1e3:.1f} kB; {draft_len + 1} exit queries and a pass of {draft_len + 1} rows are {allowed / 1e3:.1f} kB")
        del model
    print(f"peak of allocations above the weights, a prompt of {len(prompt)} and {args.tokens} new tokens, {dtype_of(args)}{', compiled' if args.compile else ''}, MB\n")
    table(["model", "decoding", "peak", "formula", "its cache", "its widest pass", "difference"], rows)
    print("\n" + "\n".join(notes) + f"\nwithin 10% of the formula, and drafting within its rows: {'yes' if all(verdicts) else 'NO'}")
    return report | {"within": all(verdicts)}


# ---------------------------------------------------------------------------------------------------------------------
# profile: where a round's time goes


class Clock:
    """Time of wrapped functions by (side, phase), each without that of wrapped functions inside it."""

    def __init__(self):
        self.seconds: dict[tuple, float] = defaultdict(float)
        self.calls: Counter[tuple] = Counter()
        self.side: str | None = None
        self.inside: list[float] = []  # for each running function, the seconds of those that it called

    def timed(self, phase: str, work: Callable, side: str | None = None) -> Callable:
        """`work` with its time counted under a phase; on a side, it and what it calls, or on that of its caller."""
        def call(*given, **named):
            self.side, outer = side or self.side, self.side
            self.inside.append(0.0)
            settle()
            started = time.perf_counter()
            try:
                return work(*given, **named)
            finally:
                settle()
                took = time.perf_counter() - started
                self.seconds[self.side, phase] += took - self.inside.pop()
                self.calls[self.side, phase] += 1
                self.side = outer
                if self.inside:
                    self.inside[-1] += took

        return call

    @contextmanager
    def patched(self, *places: tuple) -> Iterator[None]:
        """Times owner.name under a phase, and on a side, for each (owner, name, phase[, side]); puts all back at the end."""
        with ExitStack() as stack:
            for owner, name, phase, *side in places:
                stack.enter_context(patch.object(owner, name, self.timed(phase, getattr(owner, name), *side)))
            yield


REST = "the rest: Python, residual sums, confidence"
PHASES = (
    (EarlyExit, "draft", REST, "draft"),
    (decode, "verify", REST, "verify"),
    (decode, "accept", REST, "verify"),
    (Llama, "embed", "embedding"),
    (RMSNorm, "forward", "norms"),
    (llama, "rotate", "rotary positions"),
    (Llama, "rotary", "rotary positions"),
    (KVQCache, "write", "cache write"),
    (KVQCache, "put_query", "cache write"),
    (CachedAttention, "__init__", "attention's mask"),
    (CachedAttention, "__call__", "attention"),
    (MLP, "forward", "SiLU(gate) * up"),
    (decode, "next_token", "choice of the token"),
)


def profile(args: Namespace, tokenizer: Tokenizer, prompts: list[list[int]]) -> dict:
    """Where the time of drafting and verification goes, by timers around the parts of the engine, in one process."""
    report = {}
    for name, model, s in targets(args):
        products = [(model, "head", "head product")]
        for layer in model.model.layers:
            products += [(layer.self_attn, "qkv", "query, key, value product"), (layer.self_attn, "out", "attention's output product")]
            products += [(layer.mlp, "gate_up", "gate and up product"), (layer.mlp, "down", "down product")]
        decode_all(model, prompts[:1], 16, **s)
        bare = decode_all(model, prompts, args.tokens, f"{name}, without timers:", **s)
        clock = Clock()
        with clock.patched(*PHASES, *products):
            timed = decode_all(model, prompts, args.tokens, f"{name}, with timers:", **s)
        count, spent = len(timed.rounds), {key: v for key, v in clock.seconds.items() if key[0]}  # prefill has no side
        print(f"{name}, {model.dtype}, exit {s['exit_layer']}, draft {s['draft_len']}, confidence {s['min_confidence']}: {count} rounds, {torch.get_num_threads()} threads; the timers cost {timed.seconds / bare.seconds - 1:.0%}\n")
        whole, rows = sum(spent.values()), []
        for phase in sorted({p for _, p in spent}, key=lambda p: -spent.get(("draft", p), 0) - spent.get(("verify", p), 0)):
            row = [phase]
            for key in (("draft", phase), ("verify", phase)):
                row += [f"{spent[key] / whole:.1%}", f"{clock.calls[key] / count:.1f}", f"{1e6 * spent[key] / clock.calls[key]:.1f}"] if key in spent else ["", "", ""]
            rows.append(row)
        draft, check = (sum(v for key, v in spent.items() if key[0] == side) / whole for side in ("draft", "verify"))
        rows.append(["together", f"{draft:.1%}", "", "", f"{check:.1%}", "", ""])
        table(["phase", "draft", "calls a round", "µs a call", "verify", "calls a round", "µs a call"], rows)
        report[name] = {f"{side}, {phase}": {"seconds": v, "calls": clock.calls[side, phase]} for (side, phase), v in spent.items()}
        del model, products, layer
    return report
