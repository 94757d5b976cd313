"""Self-speculative decoding: draft with the first E layers, verify with the rest, get the full model's bits.

One round (LayerSkip, arXiv 2404.16710, section 4.3), with n tokens known and positions 0..n-2 in the cache:

    draft     row i = 0..d runs token t_i (t_0 = x_{n-1}) through layers [0, E): keys, values and an exit query each;
              t_{i+1} = pick(unembed(exit query i), position n+i)
    verify    the d + 1 exit queries run through layers [E, L) in one pass: v_i = pick(logits_i, position n+i)
    accept    v_0..v_a are emitted, where a is the number of leading i with t_{i+1} == v_i
    rewind    the cache keeps positions 0..n-1+a

Plain decoding is the same round with d = 0 and E = 0. The emitted token is always the verifier's, and `pick` is a pure
function of (logits, seed, position): so the output is the full model's, greedy or sampled, whatever the draft said.

    python decode.py --compare
    python decode.py --ckpt DIR --exit 8 --draft 6 --prompt "def quicksort(" --max-new-tokens 256
"""

import argparse
import json
import math
import os
import sys
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor

from cache import KVQCache
from compiled import compile_passes
from drafters import AutoExit, Drafter, EarlyExit, Jacobi, Pick, PromptLookup, SkipLayers, TwoModels
from kangaroo import ETA, Kangaroo, load_adapter
from model import MAX_ROWS, CheckpointError, Config, Llama, auto_dtype, load_checkpoint, parse_object, prefill
from show import Lens, Show, Trace, trace_json, whole_file
from tokenizer import Stream, Tokenizer

# ---------------------------------------------------------------------------------------------------------------------
# The one verification rule


@dataclass(frozen=True)
class Sampling:
    """How a token is chosen from logits. temperature 0 is greedy; top_k 0 and top_p 1 keep the whole vocabulary.

    Raises ValueError, one line, on a number out of its range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self):
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"temperature must be 0 (greedy) or positive, not {self.temperature}")
        if self.top_k < 0:
            raise ValueError(f"top_k must be 0 (off) or positive, not {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be above 0 and at most 1, not {self.top_p}")
        if not 0 <= self.seed < 2**64:
            raise ValueError(f"seed must be from 0 to 2^64 - 1, not {self.seed}")


@lru_cache(maxsize=2 * MAX_ROWS)
def gumbel(seed: int, position: int, vocab: int) -> Tensor:
    """Standard Gumbel noise (vocab,), float64: a pure function of its arguments, on every machine (Philox counter)."""
    uniform = np.random.Generator(np.random.Philox(key=seed, counter=[0, 0, 0, position])).random(vocab)
    return torch.from_numpy(-np.log(-np.log(uniform * (1 - 2.0**-53) + 2.0**-54)))  # [0, 1) moved into (0, 1)


def keep_likely(scaled: Tensor, top_k: int, top_p: float) -> Tensor:
    """Logits (vocab,) with all but the top_k set to -inf, then all but the smallest set that holds probability top_p."""
    if 0 < top_k < len(scaled):
        scaled = scaled.masked_fill(scaled < scaled.topk(top_k).values[-1], -math.inf)
    if top_p < 1:
        ordered, index = scaled.sort(descending=True)
        probability = ordered.softmax(-1)
        unlikely = probability.cumsum(-1) - probability >= top_p  # never the first
        scaled = scaled.index_fill(0, index[unlikely], -math.inf)
    return scaled


def next_token(logits: Tensor, position: int, sampling: Sampling) -> int:
    """The token at `position`, given logits (vocab,): argmax(filter(logits / T) + gumbel(seed, position)).

    By the Gumbel-max trick this is a sample of softmax(filter(logits / T)). Draft and verifier see the same noise, so
    they agree whenever their distributions lead to the same token, and the verifier's token does not depend on the draft
    (drafter-invariant speculative decoding, Daliri, Musco and Suresh, arXiv 2408.07978). Temperature 0: argmax(logits).
    """
    if sampling.temperature == 0:
        return int(logits.max(-1).indices)  # the first of equals, as argmax; of bfloat16, which argmax is slow with, in a quarter of its time on a CPU
    scaled = keep_likely(logits.double().cpu() / sampling.temperature, sampling.top_k, sampling.top_p)
    return int((scaled + gumbel(sampling.seed, position, len(scaled))).argmax())


# ---------------------------------------------------------------------------------------------------------------------
# Draft, verify, accept


@dataclass
class Round:
    """What one round did. tokens are ids; seconds are wall-clock time."""

    drafted: list[int]
    accepted: int  # how many of the drafted tokens were the verifier's too, from the first on
    emitted: list[int]  # the verifier's tokens: the accepted ones and, unless the text ended with them, one more
    logits: Tensor | None  # (len(emitted), vocab): the full model's logits that gave the emitted tokens
    draft_seconds: float
    verify_seconds: float
    depth: int  # layers behind the emitted tokens: L, or where a lossy early exit left


def verify(model: Llama, cache: KVQCache, tokens: list[int], exit_layer: int, depth: int, watch: Iterable[int] = ()) -> tuple[Tensor, dict[int, Tensor]]:
    """Logits (len(tokens), vocab) after layer `depth` for tokens at the positions that follow the live ones: one pass.

    Starts at exit_layer from the exit queries that the draft left, or at the embedding when exit_layer is 0. Also returns the
    hidden states (len(tokens), dim) behind those numbers of layers in `watch`, for a drafter that learns.
    """
    h = cache.queries[: len(tokens)] if exit_layer else model.embed(torch.tensor(tokens, device=model.device))
    hidden: dict = dict.fromkeys(watch)
    return model.unembed(model.run_layers(h, exit_layer, depth, cache, cache.length, hidden)), hidden


def accept(drafted: list[int], logits: Tensor, position: int, pick: Pick, eos: Collection[int]) -> list[int]:
    """The tokens that the full model emits from `position` on: its own, as long as the draft foresaw them, and one more.

    logits (len(drafted) + 1, vocab). Nothing is emitted after an EOS.
    """
    emitted = []
    for row, foreseen in enumerate([*drafted, None]):
        token = pick(logits[row], position + row)
        emitted.append(token)
        if token != foreseen or token in eos:
            break
    return emitted


def new_cache(config: Config, length: int, draft_len: int, dtype: torch.dtype, device: torch.device) -> KVQCache:
    """A KVQ cache for `length` positions of the model and drafts of draft_len tokens."""
    return KVQCache(config.n_layers, config.n_kv_heads, config.head_dim, config.dim, length, draft_len, dtype, device)


def generate(
    model: Llama,
    prompt_ids: list[int],
    *,
    exit_layer: int = 0,
    draft_len: int = 6,
    max_new_tokens: int = 128,
    sampling: Sampling = Sampling(),
    min_confidence: float = 0.0,
    no_verify: bool = False,
    exit_confidence: float = 0.0,
    drafter: Callable[..., Drafter] | None = None,
    eos: tuple[int, ...] | None = None,
    cache: KVQCache | None = None,
) -> Iterator[Round]:
    """Decodes after prompt_ids, round by round; the tokens are those of the full model, whatever exit_layer is.

    exit_layer    E, from 1 to L-1: draft with layers [0, E), verify with [E, L). 0: no draft, the full model alone.
    draft_len     d, from 1 to MAX_ROWS - 1: the most tokens drafted in a round.
    no_verify     early exit alone: every token is layer E's, unverified. Lossy.
    exit_confidence   early exit by confidence, from layer E on, unverified (see _confident). Lossy.
    drafter       who drafts instead of layers [0, E): called as drafter(model, cache, eos, min_confidence), see drafters.py.
    eos           ids that end the text; default: the model's own. () never ends it.
    cache         an empty cache to use instead of a new one (see new_cache), for a caller who wants to look into it.

    Ends after max_new_tokens, after an EOS, or when the context is full. Packs the model for decoding, in place, if it is
    not (Llama.pack). Raises ValueError, before the first round, on settings or a prompt that cannot run.
    """
    c = model.config
    if not prompt_ids:
        raise ValueError("the prompt is empty: give at least one token")
    if not all(0 <= token < c.vocab_size for token in prompt_ids):
        raise ValueError(f"the prompt has a token outside the model's vocabulary of {c.vocab_size}")
    if len(prompt_ids) >= c.max_len:
        raise ValueError(f"the prompt has {len(prompt_ids)} tokens, and the context of {c.max_len} leaves no room to go on")
    if not 0 <= exit_layer < c.n_layers or ((no_verify or exit_confidence) and exit_layer == 0):
        raise ValueError(f"the exit layer must be from 1 to {c.n_layers - 1} (the model has {c.n_layers} layers), not {exit_layer}")
    if not 0 <= exit_confidence <= 1:
        raise ValueError(f"the exit confidence must be above 0 and at most 1, not {exit_confidence}")
    drafts = (exit_layer > 0 or drafter is not None) and not no_verify and not exit_confidence
    if drafts and not 1 <= draft_len < MAX_ROWS:
        raise ValueError(f"the draft length must be from 1 to {MAX_ROWS - 1}, not {draft_len}")
    if not 0 <= min_confidence < 1:
        raise ValueError(f"the confidence must be from 0 (off) to below 1, not {min_confidence}")
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, not {max_new_tokens}")
    end = min(len(prompt_ids) + max_new_tokens, c.max_len)
    eos = c.eos if eos is None else eos
    draft_len = draft_len if drafts else 0
    if cache is None:
        cache = new_cache(c, end, draft_len, model.dtype, model.device)
    elif cache.length or cache.max_len < end or len(cache.queries) <= draft_len:
        raise ValueError(f"the cache must be empty and hold {end} positions and {draft_len + 1} exit queries")
    if exit_confidence:
        return _confident(model.pack(), cache, list(prompt_ids), exit_layer, end, sampling, exit_confidence, eos)
    model.pack()
    if not drafts:
        return _rounds(model, cache, list(prompt_ids), None, exit_layer if no_verify else c.n_layers, 0, end, sampling, eos)
    drafter = drafter or partial(EarlyExit, exit_layer=exit_layer)
    return _rounds(model, cache, list(prompt_ids), drafter(model, cache, eos, min_confidence), c.n_layers, draft_len, end, sampling, eos)


@torch.inference_mode()
def _rounds(
    model: Llama, cache: KVQCache, tokens: list[int], drafter: Drafter | None, depth: int, draft_len: int, end: int, sampling: Sampling, eos: Collection[int]
) -> Iterator[Round]:
    """The draft-verify loop; `depth` is the layer whose word counts (L, or E for unverified early exit)."""

    def pick(logits: Tensor, position: int) -> int:
        return next_token(logits, position, sampling)

    prefill(model, cache, tokens[:-1], depth)
    while len(tokens) < end:
        started = time.perf_counter()
        drafted: list[int] = []
        exit_layer = 0
        if drafter:
            limit = min(draft_len, end - len(tokens) - 1)  # a round emits one token more than it drafts
            drafted, exit_layer = drafter.draft(tokens, limit, pick)
        drafting_ended = time.perf_counter()
        logits, hidden = verify(model, cache, tokens[-1:] + drafted, exit_layer, depth, drafter.watch if drafter else ())
        emitted = accept(drafted, logits, len(tokens), pick, eos)
        if drafter:
            drafter.verified(tokens, emitted, logits, hidden, pick)
        cache.accept(len(emitted))  # rows beyond stay dead: this is the rewind
        tokens += emitted
        accepted = sum(a == b for a, b in zip(drafted, emitted))
        verified = time.perf_counter()
        yield Round(drafted, accepted, emitted, logits[: len(emitted)], drafting_ended - started, verified - drafting_ended, depth)
        if emitted[-1] in eos:
            return


def confident_exits(exit_layer: int, layers: int) -> list[int]:
    """Where a token may leave by confidence: behind exit_layer and every eighth of the layers after it."""
    return list(range(exit_layer, layers, max(1, layers // 8)))


@torch.inference_mode()
def _confident(
    model: Llama, cache: KVQCache, tokens: list[int], exit_layer: int, end: int, sampling: Sampling, confidence: float, eos: Collection[int]
) -> Iterator[Round]:
    """LITE's dynamic early exit (arXiv 2310.18581, section 4): a token leaves at the first exit that is sure of it.

    Sure is a top probability of at least `confidence`, exits are those of confident_exits. The layers that a token does not run get their keys and values from its last hidden state. Nothing is verified.
    """
    layers = model.config.n_layers
    exits = [*confident_exits(exit_layer, layers), layers]
    prefill(model, cache, tokens[:-1], layers)
    while len(tokens) < end:
        started, depth = time.perf_counter(), 0
        h = model.embed(torch.tensor(tokens[-1:], device=model.device))
        for exit in exits:
            h, depth = model.run_layers(h, depth, exit, cache, cache.length), exit
            logits = model.unembed(h)
            if exit < layers and logits.float().softmax(-1).max() >= confidence:
                model.fill_layers(h, exit, layers, cache, cache.length)
                break
        cache.accept(1)
        tokens.append(next_token(logits[0], len(tokens), sampling))
        yield Round([], 0, tokens[-1:], logits, 0.0, time.perf_counter() - started, depth)
        if tokens[-1] in eos:
            return


# ---------------------------------------------------------------------------------------------------------------------
# Command line

DEFAULT_CKPT = Path(__file__).parent / "checkpoints" / "pystdlib"
DEFAULT_PROMPT = '''class Stack:
    """A last-in, first-out stack."""

    def __init__(self, items=None):
        self._items = list(items or [])

    def push(self, item):
'''
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}


@dataclass
class Run:
    """Totals over the rounds of one generation."""

    ids: list[int] = field(default_factory=list)
    rounds: list[Round] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def tokens_per_second(self) -> float:
        """New tokens per second of generation, prefill included."""
        return len(self.ids) / max(self.seconds, 1e-9)

    @property
    def acceptance(self) -> float | None:
        """Share of drafted tokens that were accepted; None when nothing was drafted."""
        drafted = sum(len(r.drafted) for r in self.rounds)
        return sum(r.accepted for r in self.rounds) / drafted if drafted else None

    def summary(self) -> str:
        """The statistics, one line."""
        parts = [f"{len(self.ids)} tokens in {self.seconds:.2f} s: {self.tokens_per_second:.0f} tokens/s"]
        if self.acceptance is not None:
            drafting, verifying = (sum(getattr(r, f) for r in self.rounds) for f in ("draft_seconds", "verify_seconds"))
            parts.append(f"{self.acceptance:.0%} of {sum(len(r.drafted) for r in self.rounds)} drafted tokens accepted")
            parts.append(f"{len(self.ids) / len(self.rounds):.2f} tokens per round")
            parts.append(f"draft {drafting / self.seconds:.0%}, verify {verifying / self.seconds:.0%} of the time")
        elif len(depths := {r.depth for r in self.rounds}) > 1:
            parts.append(f"{sum(r.depth for r in self.rounds) / len(self.rounds):.1f} layers per token, from {min(depths)} to {max(depths)}")
        return " | ".join(parts)


def run(rounds: Iterator[Round], on_round: Callable[[Round], None] | None = None, into: Run | None = None, keep_logits: bool = False) -> Run:
    """Runs a generation to its end, calling on_round after each round; on_round's time is not counted, prefill's is.

    `into` collects the rounds, so that a caller who is interrupted has what was done. Logits are let go as rounds end,
    unless keep_logits: at a vocabulary of 128k they take 250 kB a token.
    """
    into = into or Run()
    started = time.perf_counter()
    for r in rounds:
        into.seconds += time.perf_counter() - started
        into.ids += r.emitted
        into.rounds.append(r if keep_logits else replace(r, logits=None))
        if on_round:
            on_round(r)
        started = time.perf_counter()
    return into


def generation_defaults(ckpt: Path) -> dict:
    """What generation_config.json says, under transformers' own keys: EOS ids, exit layer, draft length, confidence.

    Raises CheckpointError, one line, where one of them is of the wrong kind.
    """
    file = ckpt / "generation_config.json"
    if not file.exists():
        return {}
    try:
        found = parse_object(file.read_text(encoding="utf-8"), file.name)
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{file} cannot be read: {error}") from None
    kinds: dict[str, type | tuple[type, ...]] = {"assistant_early_exit": int, "num_assistant_tokens": int, "assistant_confidence_threshold": (int, float), "eos_token_id": (int, list)}
    found = {key: found[key] for key in kinds if found.get(key) is not None}
    for key, value in found.items():
        items = value if isinstance(value, list) else [value]
        if not isinstance(value, kinds[key]) or not all(type(item) in (int, float) for item in items):
            raise CheckpointError(f"{file.name}: {key} cannot be {value!r:.40}")
    return found


def parser() -> argparse.ArgumentParser:
    """The options of the command line."""
    p = argparse.ArgumentParser(
        prog="decode.py",
        description="Generate text from an early-exit Llama: draft with its first layers, verify with the rest. "
        "The text is the full model's own, token for token. Text goes to stdout, statistics to stderr.",
        epilog="Without arguments: the shipped checkpoint and a default prompt. Try --compare.",
    )
    p.add_argument("stdin", nargs="?", choices=["-"], help="- reads the prompt from standard input")
    p.add_argument("--ckpt", type=Path, default=DEFAULT_CKPT, metavar="DIR", help="checkpoint directory (default: the shipped one)")
    p.add_argument("--prompt", metavar="TEXT", help="text to go on from")
    p.add_argument("--interactive", action="store_true", help="ask for a prompt, complete it, ask again; Ctrl-D ends")
    p.add_argument("--max-new-tokens", type=int, metavar="N", help="tokens to generate at most (default 256; with --lens 12, and there 0 looks at the prompt alone)")
    draft = p.add_argument_group("drafting (defaults come with the checkpoint)")
    draft.add_argument("--exit", type=exit_choice, metavar="E", help="layers that the draft runs; few: fast, many: accepted more often. auto: chosen as the text goes")
    draft.add_argument("--draft", type=int, metavar="D", help=f"tokens drafted per round at most, 1 to {MAX_ROWS - 1}")
    who = draft.add_mutually_exclusive_group()
    who.add_argument("--adapter", type=Path, metavar="DIR", help="Kangaroo: draft with a trained adapter (kangaroo.py) on an early exit")
    who.add_argument("--draft-ckpt", type=Path, metavar="DIR", help="draft with a smaller checkpoint of the same vocabulary")
    who.add_argument("--skip", metavar="SET", help="Draft & Verify: draft without these sublayers, such as attn:3,4,mlp:7")
    who.add_argument("--lookup", action="store_true", help="draft what followed the last time these tokens came")
    who.add_argument("--jacobi", action="store_true", help="draft what the verifier said beyond its last correction")
    draft.add_argument("--keep-layers", metavar="LIST", help="LayerDrop: run these layers alone, such as 0,1,5 or 0::2 for every other; a lossy, smaller model")
    draft.add_argument("--min-confidence", type=float, metavar="C", help="stop drafting when the exit's top probability is at or below C; 0: never")
    mode = p.add_mutually_exclusive_group()
    mode.add_argument("--full", action="store_true", help="the full model alone, one token per pass")
    mode.add_argument("--no-verify", action="store_true", help="early exit alone: what the draft would say unchecked. Lossy")
    mode.add_argument("--exit-confidence", type=float, default=0.0, metavar="C", help="LITE: each token leaves at the first exit, from E on, whose top probability reaches C. Lossy")
    mode.add_argument("--compare", action="store_true", help="also run the full model: is the text identical, how much faster was it?")
    sample = p.add_argument_group("sampling (exactly reproducible from the seed, drafted or not)")
    sample.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0 is greedy (default)")
    sample.add_argument("--top-k", type=int, default=0, metavar="K", help="choose among the K likeliest tokens; 0: all")
    sample.add_argument("--top-p", type=float, default=1.0, metavar="P", help="choose among the likeliest tokens that hold probability P")
    sample.add_argument("--seed", type=int, default=0)
    engine = p.add_argument_group("engine")
    engine.add_argument("--dtype", choices=["auto", *DTYPES], default="auto", help="auto: bfloat16 where the hardware multiplies it, else float32")
    engine.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, ...; auto: cuda if there is one")
    engine.add_argument(
        "--no-exact",
        action="store_true",
        help="ordinary attention and row counts: can be faster, but speculative text may leave the full model's where two tokens nearly tie",
    )
    engine.add_argument("--compile", action="store_true", help="compile the layers first (a minute or more; needs a C++ compiler): faster from then on, and as exact")
    inside = p.add_argument_group("looking inside")
    inside.add_argument("--lens", action="store_true", help="what every exit would say at every position of the prompt and of a short continuation, and how many layers each token needs")
    inside.add_argument("--lens-png", type=Path, metavar="FILE", help="the lens as a figure too")
    inside.add_argument("--trace", action="store_true", help="a line a round instead of text: drafted, accepted, rejected, the verifier's own, and times")
    inside.add_argument("--trace-json", type=Path, metavar="FILE", help="write the rounds, and the settings that repeat them, to a file")
    p.add_argument("--json", action="store_true", help="print the run as one JSON object instead of text")
    return p


def read_prompt(args: argparse.Namespace) -> str:
    """The prompt: standard input, --prompt, or the default one. Raises ValueError where it is not UTF-8."""
    if args.stdin:
        if sys.stdin is None:
            raise ValueError("standard input is closed")
        try:
            return sys.stdin.buffer.read().decode("utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"standard input is not UTF-8 text: {error.reason} at byte {error.start}") from None
    text = DEFAULT_PROMPT if args.prompt is None else args.prompt
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError("the prompt is not UTF-8 text") from None
    return text


def exit_choice(text: str) -> int | str:
    """The value of --exit. argparse's own error where it is none."""
    if text != "auto" and not text.lstrip("-").isdigit():
        raise argparse.ArgumentTypeError(f"a number of layers, or auto, not {text!r:.40}")
    return text if text == "auto" else int(text)


def sublayers(text: str) -> dict[str, set[int]]:
    """The sublayers of --skip: "attn:3,4,mlp:7" -> {"attention": {3, 4}, "mlp": {7}}. ValueError where the text is no such list."""
    found: dict[str, set[int]] = {"attention": set(), "mlp": set()}
    kind = ""
    try:
        for part in text.split(","):
            name, _, number = part.strip().rpartition(":")
            kind = {"attn": "attention", "mlp": "mlp", "": kind}[name]
            found[kind].add(int(number))
    except (KeyError, ValueError):
        raise ValueError(f"--skip takes sublayers such as attn:3,4,mlp:7, not {text!r:.40}") from None
    return found


def choose_drafter(args: argparse.Namespace, model: Llama, settings: dict) -> str:
    """Puts who drafts, and the defaults that go with it, into settings; returns its name. "" when nobody does.

    Raises ValueError on options that do not go together.
    """
    layers, name = model.config.n_layers, "early exit"
    auto = args.exit == "auto"
    if auto:
        name, args.exit, settings["draft_len"] = "exit auto", None, MAX_ROWS - 1
        settings["drafter"] = partial(AutoExit, exit_layer=settings["exit_layer"])
    others = args.adapter or args.draft_ckpt or args.skip is not None or args.lookup or args.jacobi
    if auto and args.trace_json:
        raise ValueError("--trace-json holds rounds that its settings repeat; give --exit a number")
    if auto and (args.full or args.no_verify or args.exit_confidence):
        raise ValueError("--exit auto drafts: it does not go with --full, --no-verify and --exit-confidence")
    if others and (auto or args.exit is not None or args.full or args.no_verify or args.exit_confidence):
        raise ValueError("--exit, --full, --no-verify and --exit-confidence do not go with another drafter")
    if args.adapter:
        adapter = load_adapter(args.adapter, model)
        name, settings["drafter"] = "kangaroo", partial(Kangaroo, adapter=adapter)
        settings.update(exit_layer=adapter.exit_layer, draft_len=6, min_confidence=ETA)
    elif args.draft_ckpt:
        other = load_checkpoint(args.draft_ckpt, model.dtype, model.device)
        name, settings["drafter"] = "two models", partial(TwoModels, other=other)
    elif args.skip is not None:
        skipped = sublayers(args.skip)
        name, settings["drafter"] = "skip layers", partial(SkipLayers, attention=skipped["attention"], mlp=skipped["mlp"])
    elif args.lookup or args.jacobi:
        name, settings["drafter"] = ("prompt lookup", PromptLookup) if args.lookup else ("jacobi", Jacobi)
    for key, given in (("exit_layer", args.exit), ("draft_len", args.draft), ("min_confidence", args.min_confidence)):
        settings[key] = settings[key] if given is None else given
    if not args.full and not 1 <= settings["exit_layer"] < layers:
        raise ValueError(f"--exit must be from 1 to {layers - 1} (the model has {layers} layers), not {settings['exit_layer']}")
    if args.full:
        settings.update(exit_layer=0, drafter=None)
    return name if drafts({**settings, "no_verify": args.no_verify, "exit_confidence": args.exit_confidence}) else ""


def layer_list(text: str, layers: int) -> list[int]:
    """Layer numbers of "0,2,5" and slices such as "0::2"; ValueError where the text is no such list."""
    kept: list[int] = []
    try:
        for part in text.split(","):
            numbers = [int(n) if n.strip() else None for n in part.split(":")]
            kept += [int(part)] if len(numbers) == 1 else range(layers)[slice(*numbers)]
    except (ValueError, TypeError):
        raise ValueError(f"--keep-layers takes layers such as 0,2,5 or slices such as 0::2, not {text!r:.40}") from None
    return kept


def drafting_defaults(found: dict, config: Config) -> dict:
    """Exit layer, draft length and confidence of a checkpoint: its own, as generation_config.json names them, or a quarter
    of the layers, 6 and 0.3."""
    return dict(
        exit_layer=found.get("assistant_early_exit", max(1, config.n_layers // 4)),
        draft_len=min(found.get("num_assistant_tokens", 6), MAX_ROWS - 1),
        min_confidence=found.get("assistant_confidence_threshold", 0.3),
        drafter=None,
    )


def usable_device(name: str) -> torch.device:
    """The device of that name; ValueError, one line, when this machine or this build of PyTorch cannot use it."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.ones(1, device=name).item()
        return torch.device(name)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"device {name!r} cannot be used: {str(error).splitlines()[0]}") from None


UNVERIFIED = {"no_verify", "exit_confidence"}
OTHER_DRAFTERS = {"adapter", "draft_ckpt", "skip", "lookup", "jacobi"}
# options, those that make no sense with them, and why
CLASHES = [
    ({"interactive"}, {"json", "compare", "stdin", "prompt", "lens", "lens_png", "trace_json"}, "asks for prompts and shows text"),
    ({"stdin"}, {"prompt"}, "is the prompt"),
    ({"lens", "lens_png"}, {"exit", "draft", "min_confidence", "full", "compare", *UNVERIFIED, *OTHER_DRAFTERS}, "looks at every exit of the full model"),
    ({"lens", "lens_png"}, {"json", "trace", "trace_json"}, "shows one pass, not rounds"),
    ({"trace"}, {"json"}, "shows rounds in place of the text"),
    ({"trace", "trace_json"}, UNVERIFIED, "shows what was drafted and verified"),
    ({"trace_json"}, OTHER_DRAFTERS, "holds rounds that its settings repeat, those of an early exit"),
]


def check_modes(given: set[str]) -> None:
    """Refuses (ValueError) options, by their names in argparse's namespace, that make no sense together."""
    for modes, clashing, why in CLASHES:
        if modes & given and clashing & given:
            mode, other = ("-" if name == "stdin" else "--" + name.replace("_", "-") for name in (min(modes & given), min(clashing & given)))
            raise ValueError(f"{mode} {why}; leave out {other}")


def decode(args: argparse.Namespace) -> None:
    """The command: load, generate, show. Raises ValueError or CheckpointError, one line, on what cannot run."""
    defaults = parser()
    check_modes({name for name, value in vars(args).items() if value != defaults.get_default(name)})
    lens = args.lens or args.lens_png
    text = "" if args.interactive else read_prompt(args)
    if not text and not args.interactive:
        raise ValueError("the prompt is empty")
    device = usable_device(args.device)
    if not args.ckpt.is_dir():
        raise CheckpointError(f"no checkpoint directory at {args.ckpt}")
    tokenizer, found = Tokenizer(args.ckpt), generation_defaults(args.ckpt)
    model = load_checkpoint(args.ckpt, auto_dtype(device) if args.dtype == "auto" else DTYPES[args.dtype], device)
    if tokenizer.vocab_size > model.config.vocab_size:
        raise CheckpointError(f"the tokenizer has {tokenizer.vocab_size} tokens, the model only {model.config.vocab_size}")
    if args.keep_layers is not None:
        model.keep_layers(layer_list(args.keep_layers, model.config.n_layers))
        if len(model.model.layers) == 1:
            raise ValueError("--keep-layers must leave at least 2 layers")
    settings = drafting_defaults(found, model.config)
    settings["exit_layer"] = min(settings["exit_layer"], model.config.n_layers - 1)
    who = choose_drafter(args, model, settings)
    ends = [e for e in (found.get("eos_token_id"), list(model.config.eos) or None, tokenizer.eos) if e is not None]
    settings.update(
        no_verify=args.no_verify,
        exit_confidence=args.exit_confidence,
        max_new_tokens=(12 if lens else 256) if args.max_new_tokens is None else args.max_new_tokens,
        sampling=Sampling(args.temperature, args.top_k, args.top_p, args.seed),
        eos=() if not ends else tuple(ends[0]) if isinstance(ends[0], list) else (ends[0],),
    )
    model.pack(exact=not args.no_exact)
    if args.compile:
        exits = exits_of(settings, model.config.n_layers)
        print(f"compiling for exits {', '.join(map(str, exits)) or 'at the last layer alone'}", file=sys.stderr)
        compile_passes(model, exits)
    with whole_file(args.lens_png or args.trace_json) as file:
        if lens:
            look(model, tokenizer, settings, text, file)
        elif args.interactive:
            converse(model, tokenizer, settings, Trace if args.trace else Show)
        else:
            complete(model, tokenizer, settings, text, args, who, file)


def drafts(settings: dict) -> bool:
    """Whether these settings of generate draft and verify."""
    return (settings["exit_layer"] > 0 or settings["drafter"] is not None) and not settings["no_verify"] and not settings["exit_confidence"]


def exits_of(settings: dict, layers: int) -> list[int]:
    """The exit layers that these settings of generate use."""
    drafter = getattr(settings["drafter"], "func", settings["drafter"])
    if settings["exit_confidence"]:
        return confident_exits(settings["exit_layer"], layers)
    if drafter is AutoExit:
        return AutoExit.choices(layers, settings["exit_layer"])
    return [settings["exit_layer"]] if settings["exit_layer"] and drafter in (None, Kangaroo) else []


def look(model: Llama, tokenizer: Tokenizer, settings: dict, text: str, file: BinaryIO | None) -> None:
    """Shows every exit of the full model over a prompt and what the full model says next; to `file` too, as a PNG."""
    ids, count = tokenizer.encode(text), settings["max_new_tokens"]
    rounds = generate(model, ids, **{**settings, "exit_layer": 0, "drafter": None, "max_new_tokens": count or 1})
    said = run(rounds).ids if count else []
    lens = Lens(model, tokenizer, ids, [token for token in said if token not in settings["eos"]])
    print(lens.text())
    print(lens.statistics(), file=sys.stderr)
    if file:
        lens.draw(file)


def complete(
    model: Llama, tokenizer: Tokenizer, settings: dict, text: str, args: argparse.Namespace, who: str, trace_file: BinaryIO | None
) -> None:
    """Generates after one prompt and reports; with --compare a second time with the full model alone."""
    ids = tokenizer.encode(text)
    full = {**settings, "exit_layer": 0, "drafter": None}
    rounds = generate(model, ids, **settings)
    if args.compare:  # both once for a few tokens, so that neither is timed cold
        for warm in (settings, full):
            run(generate(model, ids, **{**warm, "max_new_tokens": 16}))
    result, compared = Run(), None
    if args.json:
        run(rounds, into=result, keep_logits=args.compare)
    else:
        show = (Trace if args.trace else Show)(tokenizer, ids, drafts=drafts(settings))
        show.prompt(text)
        stopped = False
        try:
            run(rounds, show, into=result, keep_logits=args.compare)
        except KeyboardInterrupt:
            stopped = True
        show.finish()
        print("\n" + result.summary(), file=sys.stderr)
        if stopped:
            raise KeyboardInterrupt
    if trace_file:
        trace_file.write(trace_json(result.rounds, ids, settings))
    if args.compare:
        compared = run(generate(model, ids, **full), keep_logits=True)
    if args.json:
        shown = {**settings, "drafter": who or None, "sampling": asdict(settings["sampling"]), "ckpt": str(args.ckpt), "prompt": text, "prompt_ids": ids}
        shown.update(dtype=str(model.dtype).removeprefix("torch."), device=str(model.device), exact=model.exact, threads=torch.get_num_threads())
        print(json.dumps(as_json(result, tokenizer, ids, shown, compared)))
    elif compared:
        print("full model: " + compared.summary(), file=sys.stderr)
        print(comparison(result, compared), file=sys.stderr)


def comparison(result: Run, full: Run) -> str:
    """One sentence: the same tokens or not, and the ratio of the speeds."""
    speedup = result.tokens_per_second / full.tokens_per_second
    if result.ids == full.ids:
        same_bits = torch.equal(*(torch.cat([r.logits for r in run.rounds if r.logits is not None]) for run in (result, full)))
        bits = ", logits equal to the last bit" if same_bits else ""
        return f"identical to the full model ({len(full.ids)} tokens{bits}), {speedup:.2f} times its speed"
    first = next((i for i, (a, b) in enumerate(zip(result.ids, full.ids)) if a != b), min(len(result.ids), len(full.ids)))
    return f"NOT identical to the full model, from token {first + 1} on; {speedup:.2f} times its speed"


def as_json(result: Run, tokenizer: Tokenizer, prompt_ids: list[int], settings: dict, full: Run | None) -> dict:
    """The run as one object for scripts; full_ids, identical and speedup only when the full model ran too."""
    stream = Stream(tokenizer, prompt_ids)
    found = {
        "text": stream.feed(result.ids) + stream.finish(),
        "ids": result.ids,
        "rounds": [{"drafted": r.drafted, "accepted": r.accepted, "emitted": r.emitted} for r in result.rounds],
        "settings": settings,
        "seconds": result.seconds,
        "tokens_per_second": result.tokens_per_second,
        "acceptance": result.acceptance,
    }
    if full:
        speedup = result.tokens_per_second / full.tokens_per_second
        found.update(full_ids=full.ids, identical=result.ids == full.ids, speedup=speedup)
    return found


def converse(model: Llama, tokenizer: Tokenizer, settings: dict, shown: type[Show] | type[Trace]) -> None:
    """Reads prompts until the end of input; a prompt that cannot run is said so, and the next one is asked for.

    Raises ValueError on settings that cannot run with any prompt, and where the input is not UTF-8.
    """
    generate(model, [0], **settings)  # settings that cannot run are said so before the first prompt
    while True:
        try:
            text = input("prompt> " if sys.stdin.isatty() else "")
        except (EOFError, KeyboardInterrupt):
            return
        except UnicodeDecodeError:
            raise ValueError("standard input is not UTF-8 text") from None
        if not text:
            continue
        try:
            text.encode("utf-8")  # in some locales bytes that are no text arrive as lone surrogates
            ids = tokenizer.encode(text)
            rounds = generate(model, ids, **settings)
        except ValueError as error:
            print(f"decode.py: {error}", file=sys.stderr)
            continue
        show = shown(tokenizer, ids, drafts=drafts(settings))
        show.prompt(text)
        result = Run()
        try:
            run(rounds, show, into=result)
        except KeyboardInterrupt:  # ends this completion, not the conversation
            pass
        show.finish()
        print(result.summary() + "\n", file=sys.stderr)


def main() -> None:
    try:
        decode(parser().parse_args())
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    except BrokenPipeError:  # the reader of stdout has gone; nothing is left to say to it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1) from None
    except (ValueError, OSError, ImportError) as error:
        print(f"decode.py: {str(error).splitlines()[0]}", file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
