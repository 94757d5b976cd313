"""Self-speculative decoding: draft with the first E layers, verify with the rest.

One round (LayerSkip, arXiv 2404.16710, section 4.3), with n tokens known and positions 0..n-2 in
the cache:

    draft     row i = 0..d runs token t_i (t_0 = x_{n-1}) through layers [0, E), which leaves keys,
              values and an exit query q_i; t_{i+1} = pick(unembed(q_i), position n+i) for i < d
    verify    q_0..q_d run through layers [E, L) in one pass;  v_i = pick(logits_i, position n+i)
    accept    v_0..v_a are emitted, where a is the number of leading i with t_{i+1} == v_i
    rewind    the cache keeps positions 0..n-1+a

Plain decoding is the same round with d = 0 and E = 0. The emitted token is always the verifier's,
and `pick` is a pure function of (logits, seed, position). So the output is the full model's, greedy
or sampled, whatever the draft said.

    python decode.py --compare
    python decode.py --ckpt DIR --exit 8 --draft 6 --prompt "def quicksort("
"""

import argparse
import math
import sys
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cache import KVQCache
from command import (
    DEFAULT_CKPT,
    DEFAULT_PROMPT,
    DTYPES,
    Run,
    command_errors,
    complete,
    default_settings,
    load,
)
from exact import MAX_ROWS, pack
from model import Config, Llama, prefill

Pick = Callable[[Tensor, int], int]  # (logits (vocab,), position) -> token

# --------------------------------------
# The one verification rule


@dataclass(frozen=True)
class Sampling:
    """How a token is chosen from logits. temperature 0 is greedy; top_k 0 and top_p 1 keep all.

    Raises TypeError or ValueError, one line, on what is no such number or out of its range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self):
        for name, low, high, text in (
            ("temperature", 1e-6, 1e9, "0 (greedy) or from 1e-6 to 1e9"),
            ("top_k", 0, 2**63, "0 (off) or positive"),
            ("top_p", 1e-9, 1, "above 0 and at most 1"),
            ("seed", 0, 2**64 - 1, "from 0 to 2^64 - 1"),
        ):
            value = getattr(self, name)
            kinds = int if isinstance(low, int) else (int, float)
            if isinstance(value, bool) or not isinstance(value, kinds):
                raise TypeError(f"{name} must be a number {text}, not {value!r:.40}")
            if not low <= value <= high and (name, value) != ("temperature", 0):
                raise ValueError(f"{name} must be {text}, not {value}")


@lru_cache(maxsize=2 * MAX_ROWS)
def gumbel(seed: int, position: int, vocab: int) -> Tensor:
    """Standard Gumbel noise (vocab,), float64, by Philox: a pure function of its arguments."""
    random = np.random.Generator(np.random.Philox(key=seed, counter=[0, 0, 0, position]))
    uniform = random.random(vocab) * (1 - 2.0**-53) + 2.0**-54  # from [0, 1) into (0, 1)
    return torch.from_numpy(-np.log(-np.log(uniform)))


def keep_likely(scaled: Tensor, top_k: int, top_p: float) -> Tensor:
    """Logits (vocab,) with -inf outside the top_k, then outside the smallest set of mass top_p."""
    if 0 < top_k < len(scaled):
        scaled = scaled.masked_fill(scaled < scaled.topk(top_k).values[-1], -math.inf)
    if top_p < 1:
        ordered, index = scaled.sort(descending=True, stable=True)
        probability = ordered.softmax(-1)
        unlikely = probability.cumsum(-1) - probability >= top_p  # never the first
        scaled = scaled.index_fill(0, index[unlikely], -math.inf)
    return scaled


def next_token(logits: Tensor, position: int, sampling: Sampling) -> int:
    """The token at `position`: argmax(filter(logits / T) + gumbel(seed, position)).

    logits (vocab,). By the Gumbel-max trick this is a sample of softmax(filter(logits / T)). Draft
    and verifier see the same noise, so they agree whenever their distributions lead to the same
    token, and the verifier's token does not depend on the draft (Daliri, Musco and Suresh, arXiv
    2408.07978). Temperature 0: argmax(logits).
    """
    if sampling.temperature == 0:
        return int(logits.max(-1).indices)  # as argmax: the first of equals. Faster in bfloat16
    scaled = logits.double().cpu() / sampling.temperature
    scaled = keep_likely(scaled, sampling.top_k, sampling.top_p)
    return int((scaled + gumbel(sampling.seed, position, len(scaled))).argmax())


# --------------------------------------
# The round


def draft(
    model: Llama,
    cache: KVQCache,
    token: int,
    limit: int,
    pick: Pick,
    exit_layer: int,
    min_confidence: float = 0.0,
    eos: Collection[int] = (),
) -> list[int]:
    """Guesses up to `limit` tokens after `token`, with layers [0, exit_layer) and the shared head.

    Leaves their keys and values, and the exit query of `token` and of every guess, in the cache:
    the last guess is run too, though nobody reads its logits here. Drafting stops early where the
    top probability is at or below min_confidence (Kangaroo, arXiv 2404.18911, section 3.2), and
    after an EOS. `model` needs embed, run_layers and unembed alone.
    """
    guesses: list[int] = []
    for row in range(limit + 1):
        position = cache.length + row
        h = model.embed(torch.tensor([token], device=cache.keys.device))
        h = model.run_layers(h, 0, exit_layer, cache, position)  # (1, dim)
        cache.put_query(row, h[0])
        if row == limit or (guesses and token in eos):  # a prompt may end in an EOS
            break
        logits = model.unembed(h)[0]
        if min_confidence > 0 and logits.float().softmax(-1).max() <= min_confidence:
            break
        token = pick(logits, position + 1)
        guesses.append(token)
    return guesses


def verify(model: Llama, cache: KVQCache, tokens: list[int], exit_layer: int) -> Tensor:
    """The full model's logits (len(tokens), vocab) for tokens after the live positions: one pass.

    Layers [exit_layer, L) run on the exit queries that the draft left. With exit_layer 0 all layers
    run, on the embedded tokens.
    """
    if exit_layer:
        h = cache.queries[: len(tokens)]
    else:
        h = model.embed(torch.tensor(tokens, device=cache.keys.device))
    h = model.run_layers(h, exit_layer, model.config.n_layers, cache, cache.length)
    return model.unembed(h)


def accept(
    guesses: list[int], logits: Tensor, position: int, pick: Pick, eos: Collection[int]
) -> list[int]:
    """The verifier's own tokens from `position` on: as many as the draft foresaw, and one more.

    logits (len(guesses) + 1, vocab). Nothing is emitted after an EOS.
    """
    emitted = []
    for row, guess in enumerate([*guesses, None]):
        token = pick(logits[row], position + row)
        emitted.append(token)
        if token != guess or token in eos:
            break
    return emitted


@torch.inference_mode()
def generate(
    model: Llama,
    prompt_ids: list[int],
    *,
    exit_layer: int = 0,
    draft_len: int = 6,
    max_new_tokens: int = 128,
    sampling: Sampling = Sampling(),
    min_confidence: float = 0.0,
    drafter: Callable | None = None,
    eos: tuple[int, ...] | None = None,
) -> Iterator["Round"]:
    """Decodes after prompt_ids, round by round. The tokens are the full model's, whoever drafts.

    exit_layer    E, from 1 to L-1: draft with layers [0, E). 0: no draft, the full model alone.
    draft_len     d, from 1 to MAX_ROWS - 1: the most tokens drafted in a round.
    min_confidence   see draft.
    drafter       makes a drafter in place of layers [0, E), which says E; see extras/drafters.py:
                  drafter(model, cache, min_confidence, eos).draft(tokens, limit, pick)
                  -> (at most `limit` guesses, E). E > 0: layers [0, E) ran, and left in the
                  cache what draft leaves. 0: verification runs every layer.
    eos           ids that end the text; None: the model's own. () never ends it.

    Ends after max_new_tokens, after an EOS, or when the context is full. With a model from
    exact.pack the output equals plain decoding to the last bit; without, where no two logits nearly
    tie. Raises ValueError or TypeError, at the first round, on what cannot run.
    """
    c = model.config
    check_request(c, prompt_ids, exit_layer, draft_len, max_new_tokens)
    if not isinstance(min_confidence, (int, float)) or not 0 <= min_confidence < 1:
        raise ValueError(f"the confidence must be from 0 to below 1, not {min_confidence!r:.40}")
    tokens, eos = list(prompt_ids), c.eos if eos is None else eos
    if not isinstance(eos, (tuple, list, set)) or not isinstance(sampling, Sampling):
        raise TypeError("eos must be a tuple of tokens, sampling a Sampling")
    drafts = exit_layer != 0 or drafter is not None
    end = min(len(tokens) + max_new_tokens, c.max_len)
    cache = new_cache(c, end, draft_len if drafts else 0, model.dtype, model.device)
    pick = partial(next_token, sampling=sampling)
    other = drafter(model, cache, min_confidence, eos) if drafter else None

    prefill(model, cache, tokens[:-1])
    while len(tokens) < end:
        started = time.perf_counter()
        guesses, layers_run = [], exit_layer
        limit = min(draft_len, end - len(tokens) - 1)  # a round emits one token more than it drafts
        if other:
            guesses, layers_run = other.draft(tokens, limit, pick)
        elif exit_layer:
            guesses = draft(model, cache, tokens[-1], limit, pick, exit_layer, min_confidence, eos)
        drafted = time.perf_counter()
        logits = verify(model, cache, tokens[-1:] + guesses, layers_run)
        emitted = accept(guesses, logits, len(tokens), pick, eos)
        if other and hasattr(other, "verified"):  # a drafter that learns from the rejected rows too
            other.verified(tokens, emitted, logits, pick)
        cache.accept(len(emitted))  # rows of tokens[-1] and the accepted guesses; the rest is dead
        tokens += emitted
        accepted = sum(guess == token for guess, token in zip(guesses, emitted))
        seconds = drafted - started, time.perf_counter() - drafted
        yield Round(guesses, accepted, emitted, logits[: len(emitted)], *seconds)
        if emitted[-1] in eos:
            return


@dataclass
class Round:
    """What one round did. Tokens are ids; seconds are wall-clock time."""

    drafted: list[int]
    accepted: int  # how many drafted tokens were the verifier's too, from the first on
    emitted: list[int]  # the accepted tokens and, unless the text ended with them, one more
    logits: Tensor | None  # (len(emitted), vocab): the full model's, that gave the emitted tokens
    draft_seconds: float
    verify_seconds: float


def new_cache(
    c: Config, length: int, draft_len: int, dtype: torch.dtype, device: torch.device
) -> KVQCache:
    """A KVQ cache for `length` positions of a model and drafts of draft_len tokens."""
    return KVQCache(c.n_layers, c.n_kv_heads, c.head_dim, c.dim, length, draft_len, dtype, device)


def check_request(
    c: Config, prompt_ids: list[int], exit_layer: int, draft_len: int, max_new_tokens: int
) -> None:
    """Raises TypeError or ValueError, one line, on a prompt or settings that cannot run."""
    for what, value, low, high in (
        ("exit layer", exit_layer, 0, c.n_layers - 1),
        ("draft length", draft_len, 1, MAX_ROWS - 1),
        ("number of new tokens", max_new_tokens, 1, math.inf),
    ):
        if type(value) is not int:
            raise TypeError(f"the {what} must be a whole number, not {value!r:.40}")
        if not low <= value <= high:
            raise ValueError(f"the {what} must be from {low} to {high}, not {value}")
    if not isinstance(prompt_ids, (list, tuple)) or not all(type(t) is int for t in prompt_ids):
        raise TypeError("the prompt must be a list of ints; a tensor's .tolist() is one")
    if not prompt_ids:
        raise ValueError("the prompt is empty: give at least one token")
    if not all(0 <= token < c.vocab_size for token in prompt_ids):
        raise ValueError(f"the prompt has a token outside the vocabulary of {c.vocab_size}")
    if len(prompt_ids) >= c.max_len:
        raise ValueError(f"the prompt has {len(prompt_ids)} tokens, the context only {c.max_len}")


# --------------------------------------
# Command line


def parser() -> argparse.ArgumentParser:
    """The options of the command line."""
    p = argparse.ArgumentParser(
        description="Draft text with the first layers of a Llama, verify it with the rest: "
        "the text is the full model's own, token for token.",
        epilog="Without arguments: the shipped checkpoint and a default prompt. Try --compare.",
    )
    flag: dict = dict(action="store_true")
    p.add_argument("--ckpt", type=Path, default=DEFAULT_CKPT, metavar="DIR", help="a checkpoint")
    add = p.add_mutually_exclusive_group().add_argument
    add("stdin", nargs="?", choices=["-"], help="- reads the prompt from standard input")
    add("--prompt", metavar="TEXT", default=DEFAULT_PROMPT, help="text to go on from")
    add("--interactive", **flag, help="complete one line of input after the other")
    p.add_argument("--chat", **flag, help="text is a message, by the checkpoint's chat template")
    p.add_argument("--max-new-tokens", type=int, default=256, metavar="N", help="%(default)s")
    p.add_argument("--json", **flag, help="each run as one JSON object, not as text")

    group = p.add_argument_group("drafting (defaults come with the checkpoint)")
    add = group.add_argument
    add("--exit", metavar="E", help="draft with the first E layers; auto: chosen from the prompt")
    who = "lookup, lookup+exit, jacobi, model:DIR, kangaroo:DIR or skip:attn:3,4,mlp:7"
    add("--drafter", default="exit", metavar="WHO", help=f"draft with {who}")
    add("--draft", dest="draft_len", type=int, help="most tokens drafted a round")
    text = "stop drafting at or below this probability"
    add("--min-confidence", type=float, metavar="C", help=text)
    add("--draft-vocab", type=int, metavar="N", help="exits guess only the first N tokens")
    add = group.add_mutually_exclusive_group().add_argument
    add("--full", **flag, help="no draft: the full model alone")
    add("--no-verify", **flag, help="no verification: the early exit alone. Lossy")
    add("--compare", **flag, help="also run the full model: the same, and faster?")

    add = p.add_argument_group("sampling (reproducible from the seed, drafted or not)").add_argument
    add("--temperature", type=float, default=0.0, metavar="T", help="0 is greedy (default)")
    add("--top-k", type=int, default=0, metavar="K", help="choose among the K likeliest; 0: all")
    add("--top-p", type=float, default=1.0, metavar="P", help="among those that hold probability P")
    add("--seed", type=int, default=0)

    group = p.add_argument_group("engine")
    text = "auto: bfloat16 where the hardware multiplies it, else float32"
    group.add_argument("--dtype", choices=["auto", *DTYPES], default="auto", help=text)
    group.add_argument("--device", default="auto", help="cpu, cuda, cuda:1; auto: cuda if any")
    add = group.add_mutually_exclusive_group().add_argument
    add("--no-exact", **flag, help="the plain model: near-ties may make drafted text differ")
    add("--compile", **flag, help="compile first (needs a C++ compiler): as exact, then faster")
    return p


def decode(args: argparse.Namespace) -> None:
    """The command. Raises ValueError, one line, on what cannot run."""
    if sys.stdout is None or (sys.stdin is None and (args.stdin or args.interactive)):
        raise ValueError("standard input or output is closed")
    data = sys.stdin.buffer.read() if args.stdin else args.prompt.encode(errors="surrogateescape")
    text = "" if args.interactive else data.decode()
    model, tokenizer = load(args.ckpt, args.dtype, args.device)
    args.dtype, args.device = str(model.dtype)[6:], str(model.device)  # for --json
    settings = default_settings(args.ckpt, model.config, tokenizer)
    settings["max_new_tokens"] = args.max_new_tokens
    settings["sampling"] = Sampling(args.temperature, args.top_k, args.top_p, args.seed)
    encode: Callable[[str], list[int]] = tokenizer.encode
    chat = None
    if args.chat:
        from extras.chat import Chat

        chat = Chat(args.ckpt)
        encode, settings["eos"] = chat.ask, (*settings["eos"], *chat.ends)
    given = {k: v for k, v in vars(args).items() if k in settings and v is not None}
    last = model.config.n_layers - 1
    if args.exit == "auto":
        from extras.lens import choose_exit

        settings |= choose_exit(model, encode(text), settings | given)
    elif args.exit is not None:
        if args.exit not in map(str, range(1, last + 1)):
            raise ValueError(f"--exit must be auto or from 1 to {last}, not {args.exit:.40}")
        settings["exit_layer"] = int(args.exit)
    if args.drafter != "exit" or args.draft_vocab is not None:
        from extras.drafters import parse_drafter

        if args.exit and args.drafter not in ("exit", "lookup+exit"):
            raise ValueError(f"--drafter {args.drafter:.40} takes no --exit: leave it out")
        settings |= parse_drafter(args.drafter, model, settings["exit_layer"], args.draft_vocab)
    settings |= given
    if args.no_verify:
        from extras.early_exit import keep_layers

        if args.drafter != "exit":
            raise ValueError("--no-verify is the early exit alone: leave out --drafter")
        model = keep_layers(model, range(settings["exit_layer"]))
    if args.no_verify or args.full:
        settings |= dict(exit_layer=0, drafter=None)
    if args.compile:
        from extras.compiled import ROWS, compile_model

        model = compile_model(model, settings["exit_layer"])
        if args.draft_len is None and args.exit != "auto":
            settings["draft_len"] = ROWS - 1  # fills one pass
    elif not args.no_exact:
        pack(model)

    def answer(text: str) -> Run:
        if not text:
            raise ValueError("the prompt is empty")
        return complete(partial(generate, model), tokenizer, settings, text, encode(text), args)

    if not args.interactive:
        answer(text)
        return
    while True:
        try:
            print("prompt> " * sys.stdin.isatty(), end="", file=sys.stderr, flush=True)
            if not (line := sys.stdin.buffer.readline()):
                return
            text = line.decode().rstrip("\r\n")
            said = answer(text)
            if chat:
                chat.keep(text, tokenizer.decode(said.ids))
        except ValueError as error:  # the next prompt may do better
            print(f"decode.py: {error}", file=sys.stderr)


def main() -> None:
    with command_errors("decode.py"):
        decode(parser().parse_args())


if __name__ == "__main__":
    main()
