"""Self-speculative decoding: draft with the first E layers, verify with the rest.

One round (LayerSkip, arXiv 2404.16710, section 4.3), with n tokens known and positions 0..n-2 in
the cache:

    draft     row i = 0..d runs token t_i (t_0 = x_{n-1}) through layers [0, E), which leaves keys,
              values and an exit query q_i; t_{i+1} = pick(unembed(q_i), position n+i) for i < d
    verify    q_0..q_d run through layers [E, L) in one pass: logits_0..logits_d
    accept    v_i = pick(logits_i, position n+i); emitted are v_0..v_a, up to the first v_a that is
              an EOS or is not t_{a+1}. Nothing is t_{d+1}: v_d always ends the round
    commit    the cache keeps positions 0..n-1+a; what lies beyond is dead

Plain decoding is the same round with d = 0 and E = 0. The emitted token is always the verifier's,
and `pick` is a pure function of (logits, seed, position). So the output is the full model's, greedy
or sampled, whatever the draft said.
"""

import math
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cache import KVQCache
from exact import MAX_ROWS, view_len
from model import Config, Llama, prefill

Pick = Callable[[Tensor, int], int]  # (logits (vocab,), position) -> token

# --------------------------------------
# The one verification rule


@dataclass(frozen=True)
class Sampling:
    """How a token is chosen. temperature 0 is greedy; top_k 0 and top_p 1 keep all.

    Raises TypeError or ValueError on what is out of its range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self):
        hot = self.temperature != 0
        in_range("temperature", self.temperature, 1e-6 * hot, 1e9)
        in_range("top_k", self.top_k, 0, 2**63)
        in_range("top_p", self.top_p, 1e-9, 1.0)
        in_range("seed", self.seed, 0, 2**64 - 1)


def in_range(name: str, value: Any, low: float, high: float) -> None:
    """TypeError or ValueError unless value is a number from low to high, an int if low is."""
    whole = isinstance(low, int)
    strange = isinstance(value, bool) or not isinstance(value, int if whole else (int, float))
    if strange or not low <= value <= high:
        text = f"{name} must be {'whole, ' * (strange and whole)}from {low} to {high}"
        raise (TypeError if strange else ValueError)(f"{text}, not {value!r:.40}")


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
    and verifier see the same noise, so similar distributions mostly give the same token, and the
    verifier's token does not depend on the draft (Daliri, Musco and Suresh, arXiv 2408.07978).
    Temperature 0: argmax(logits).
    """
    if sampling.temperature == 0:
        return int(logits.max(-1).indices)  # as argmax: first of equals; faster in bfloat16
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

    Leaves keys, values and exit queries of `token` and of every guess in the cache. So the last
    guess is run too: the verifier needs its exit query. Stops where the top probability is at or
    below min_confidence (Kangaroo, arXiv 2404.18911, section 3.2), and after an EOS.
    """
    guesses: list[int] = []
    for row in range(limit + 1):
        position = cache.length + row
        h = model.embed(torch.tensor([token], device=cache.keys.device))
        h = model.run_layers(h, 0, exit_layer, cache, position)  # (1, dim)
        cache.queries[row], cache.query_layer[row] = h[0], exit_layer
        if row == limit or (guesses and token in eos):  # a prompt's own EOS ends nothing
            break
        logits = model.unembed(h)[0]  # (vocab,)
        if min_confidence > 0 and logits.float().softmax(-1).max() <= min_confidence:
            break
        token = pick(logits, position + 1)
        guesses.append(token)
    return guesses


def verify(model: Llama, cache: KVQCache, tokens: list[int], ran: int) -> Tensor:
    """The full model's logits (len(tokens), vocab) for tokens after the live positions: one pass.

    Layers [ran, L) run on the draft's exit queries; `tokens` then only says how many. With ran = 0
    all layers run, on the embedded tokens. Raises ValueError for a drafter's impossible answer.
    """
    rows, vocab = len(tokens), model.config.vocab_size
    room = min(len(cache.queries), cache.max_len - cache.length)
    if rows > room or not all(0 <= token < vocab for token in tokens):
        raise ValueError(f"a drafter guessed {tokens[1:]}: too many tokens, or unknown ones")
    if ran and cache.query_layer[:rows] != [ran] * rows:
        raise ValueError(f"a drafter says that layers 0 to {ran - 1} ran, but left no exit queries")
    if ran:
        h = cache.queries[:rows]
    else:
        h = model.embed(torch.tensor(tokens, device=cache.keys.device))
    h = model.run_layers(h, ran, model.config.n_layers, cache, cache.length)  # (rows, dim)
    return model.unembed(h)


def accept(
    guesses: list[int], logits: Tensor, position: int, pick: Pick, eos: Collection[int]
) -> list[int]:
    """The verifier's own tokens from `position` on: the guesses that were right, then one more.

    logits (len(guesses) + 1, vocab). Nothing is emitted after an EOS.
    """
    emitted = []
    for row, guess in enumerate([*guesses, None]):  # None: always the end
        token = pick(logits[row], position + row)
        emitted.append(token)
        if token != guess or token in eos:
            break
    return emitted


# --------------------------------------
# Who drafts


class NoDraft:
    """No guesses: plain decoding, one token a round. The base class of drafters."""

    def __init__(
        self, model: Llama, cache: KVQCache, min_confidence: float = 0.0, eos: Collection[int] = ()
    ):
        self.model, self.cache = model, cache
        self.stop = min_confidence, eos  # last arguments of the function draft

    def draft(self, tokens: list[int], limit: int, pick: Pick) -> tuple[list[int], int]:
        """At most `limit` (or 0) guesses of what follows `tokens`, and how many layers ran.

        If it is E > 0, layers [0, E) ran on tokens[-1] and every guess, and left in the cache what
        `draft` leaves. If it is 0, verification runs every layer.
        """
        return [], 0

    def verified(self, tokens: list[int], emitted: list[int], logits: Tensor, pick: Pick) -> None:
        """Hears what was emitted after `tokens`, and all the verifier's logits."""


class EarlyExit(NoDraft):
    """LayerSkip's drafter: the model's own first exit_layer layers."""

    def __init__(self, *context: Any, exit_layer: int):
        super().__init__(*context)
        self.exit_layer = exit_layer

    def draft(self, tokens: list[int], limit: int, pick: Pick) -> tuple[list[int], int]:
        e = self.exit_layer
        return draft(self.model, self.cache, tokens[-1], limit, pick, e, *self.stop), e


# --------------------------------------
# The loop


@dataclass
class Round:
    """What one round did."""

    drafted: list[int]
    emitted: list[int]  # the accepted tokens and, unless they end with an EOS, one more
    logits: Tensor | None  # (len(emitted), vocab): the full model's; None: let go

    @property
    def accepted(self) -> int:
        """How many drafted tokens were the verifier's too, from the first on."""
        return sum(guess == token for guess, token in zip(self.drafted, self.emitted))


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
    drafter: Any = None,
    eos: Collection[int] | None = None,
) -> Iterator[Round]:
    """Decodes after prompt_ids, round by round. The tokens are the full model's, whoever drafts.

    exit_layer      E, from 1 to L-1: draft with layers [0, E). 0: no draft, the full model alone.
    draft_len       d, from 1 to MAX_ROWS - 1: the most tokens drafted in a round.
    min_confidence  stops a draft, from 0 (never) to below 1: see draft.
    drafter         a subclass of NoDraft, which drafts in place of layers [0, exit_layer).
    eos             ids that end the text; None: the model's own. () never ends it.

    Ends after max_new_tokens, after an EOS, or when the context is full. With a model from
    exact.pack the output equals plain decoding to the last bit; without, where no two logits nearly
    tie. Raises ValueError or TypeError, at the first round, on what cannot run.
    """
    c, eos = model.config, model.config.eos if eos is None else eos
    check_request(c, prompt_ids, exit_layer, draft_len, max_new_tokens, min_confidence)
    tokens = list(prompt_ids)
    end = min(len(tokens) + max_new_tokens, c.max_len)
    cache, pick = new_cache(model, end, draft_len), partial(next_token, sampling=sampling)
    make = drafter or (partial(EarlyExit, exit_layer=exit_layer) if exit_layer else NoDraft)
    drafter = make(model, cache, min_confidence, eos)  # of this text

    prefill(model, cache, tokens[:-1])
    while len(tokens) < end:
        limit = min(draft_len, end - len(tokens) - 1)  # room for the verifier's own token
        guesses, ran = drafter.draft(tokens, limit, pick)  # layers [0, ran) have run
        logits = verify(model, cache, tokens[-1:] + guesses, ran)  # layers [ran, L), in one pass
        emitted = accept(guesses, logits, len(tokens), pick, eos)  # the verifier's tokens
        drafter.verified(tokens, emitted, logits, pick)
        cache.commit(len(emitted))  # what lies beyond is dead
        tokens += emitted
        yield Round(guesses, emitted, logits[: len(emitted)])
        if emitted[-1] in eos:
            return


def new_cache(model: Llama, length: int, draft_len: int) -> KVQCache:
    """A KVQ cache of a model for `length` positions, in whole views, and drafts of draft_len."""
    c, length = model.config, view_len(length)
    shape = c.n_layers, c.n_kv_heads, c.head_dim, c.dim
    return KVQCache(*shape, length, draft_len, model.dtype, model.device)


def check_request(
    c: Config,
    prompt_ids: list[int],
    exit_layer: int = 0,
    draft_len: int = 1,
    max_new_tokens: int = 1,
    min_confidence: float = 0.0,
) -> None:
    """Raises TypeError or ValueError for settings of generate that cannot run."""
    in_range("exit layer", exit_layer, 0, c.n_layers - 1)
    in_range("draft length", draft_len, 1, MAX_ROWS - 1)
    in_range("number of new tokens", max_new_tokens, 1, 1e99)
    in_range("confidence", min_confidence, 0.0, 1 - 1e-9)
    if not isinstance(prompt_ids, (list, tuple)) or not all(type(t) is int for t in prompt_ids):
        raise TypeError("the prompt must be a list of ints, such as tensor.tolist()")
    if not 0 < len(prompt_ids) < c.max_len:
        raise ValueError(f"a prompt of {len(prompt_ids)} tokens: give 1 to {c.max_len - 1}")
    if not all(0 <= token < c.vocab_size for token in prompt_ids):
        raise ValueError(f"the prompt has a token outside the vocabulary of {c.vocab_size}")


if __name__ == "__main__":
    from support.decode_command import main

    main()
