"""Who drafts. The verifier does not care: what it emits is the full model's, so any guess is welcome and none is trusted.

    EarlyExit       the first E layers of the model itself (LayerSkip)          leaves their work to the verifier
    AutoExit        the same, choosing E and the draft length as the text goes
    SkipLayers      the model without some attention and MLP sublayers (Draft & Verify)
    TwoModels       a smaller model with the same vocabulary
    PromptLookup    what followed the last time these tokens came
    Jacobi          what the verifier said beyond the first wrong guess

A drafter of one's own is a class with a `draft` method; Kangaroo's is in kangaroo.py.
"""

import math
import time
from collections import deque
from collections.abc import Callable, Collection, Set
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from cache import KVQCache
from model import MAX_ROWS, CachedAttention, Llama, Product, batch_attention, prefill

Pick = Callable[[Tensor, int], int]  # (logits (vocab,), position) -> token


class Drafter:
    """Proposes tokens in one generation. `model` and `cache` are the verifier's; `eos` ends a text.

    A subclass needs `draft` alone. It is given nothing but verified text, and nothing is asked of its guesses.
    """

    watch: tuple[int, ...] = ()  # numbers of layers behind which `verified` wants to see the hidden states

    def __init__(self, model: Llama, cache: KVQCache, eos: tuple[int, ...] = (), min_confidence: float = 0.0):
        self.model, self.cache, self.eos, self.min_confidence = model, cache, eos, min_confidence

    def draft(self, tokens: list[int], limit: int, pick: Pick) -> tuple[list[int], int]:
        """Up to `limit` guesses of what follows `tokens`, and a number of layers E.

        E > 0 says: keys and values of layers [0, E) at the positions of tokens[-1] and of every guess are in the cache, and
        the hidden states that enter layer E are its exit queries. E = 0: the verifier has to run every layer.
        """
        raise NotImplementedError

    def verified(self, tokens: list[int], emitted: list[int], logits: Tensor, hidden: dict[int, Tensor], pick: Pick) -> None:
        """Told after each verification: `emitted` follows `tokens`; logits (rows, vocab) and watched hidden states (rows, dim)
        are those of tokens[-1] and of every guess, right or wrong."""

    def chain(self, step: Callable[[int, int], Tensor], unembed: Product, token: int, limit: int, pick: Pick) -> list[int]:
        """Guesses one token after the other: step(token, row) -> hidden state (1, dim), unembed(h) -> logits (1, vocab).

        Stops early where the top probability is at or below min_confidence; the doubtful token is not drafted (the second
        early exit of Kangaroo, arXiv 2404.18911). Nothing is drafted after an EOS. The last guess is run too, unread, so
        that its keys and values are there.
        """
        drafted: list[int] = []
        position = self.cache.length + 1
        for row in range(limit + 1):
            h = step(token, row)
            if row == limit or (drafted and token in self.eos):
                break
            logits = unembed(h)[0]
            if self.min_confidence > 0 and logits.float().softmax(-1).max() <= self.min_confidence:
                break
            token = pick(logits, position + row)
            drafted.append(token)
        return drafted

    @property
    def nbytes(self) -> int:
        """Memory that drafting takes beyond the model and its cache."""
        return 0

    def embed(self, token: int) -> Tensor:
        """The hidden state (1, dim) that enters the model's first layer for a token."""
        return self.model.embed(torch.tensor([token], device=self.model.device))


class EarlyExit(Drafter):
    """The model's own first E layers and its own head (LayerSkip, arXiv 2404.16710, section 4.3)."""

    def __init__(self, model: Llama, cache: KVQCache, eos: tuple[int, ...] = (), min_confidence: float = 0.0, *, exit_layer: int):
        super().__init__(model, cache, eos, min_confidence)
        self.exit_layer = exit_layer

    def draft(self, tokens: list[int], limit: int, pick: Pick) -> tuple[list[int], int]:
        drafted = self.chain(self.step, self.model.unembed, tokens[-1], limit, pick)
        return drafted, self.exit_layer

    def step(self, token: int, row: int, seen: dict | None = None) -> Tensor:
        """Draft row `row`: the hidden state (1, dim) that enters layer E for its token, kept as its exit query. `seen` as in run_layers."""
        h = self.model.run_layers(self.embed(token), 0, self.exit_layer, self.cache, self.cache.length + row, seen)
        self.cache.put_query(row, h[0])
        return h


class AutoExit(EarlyExit):
    """EarlyExit that chooses E and the draft length for each round, from what earlier rounds showed (after DEL, arXiv 2504.05598).

    Every verified token is a trial of every exit: would its guess have been sure, and right? One round in EVERY, all exits are
    tried over the rows that were verified, at the price of one unembedding. The rounds that each exit and draft length
    would have made of the last tokens tried are then played again, with costs measured once on the machine at hand; the
    setting of most tokens per second drafts.
    """

    EVERY = 3
    MEMORY = 64  # tokens tried that are played again

    def __init__(self, model: Llama, cache: KVQCache, eos: tuple[int, ...] = (), min_confidence: float = 0.0, *, exit_layer: int | None = None):
        layers = model.config.n_layers
        super().__init__(model, cache, eos, min_confidence, exit_layer=exit_layer or max(1, layers // 4))
        self.exits = self.choices(layers, self.exit_layer)
        self.draft_len, self.turn, self.trying = 8, -1, True
        self.sure: dict[int, deque[bool]] = {e: deque(maxlen=self.MEMORY) for e in self.exits}  # by token tried
        self.right: dict[int, deque[bool]] = {e: deque(maxlen=self.MEMORY) for e in self.exits}  # sure and right
        self.early: list[dict] = []  # of each draft row: its hidden states behind the exits up to exit_layer

    @staticmethod
    def choices(layers: int, exit_layer: int) -> list[int]:
        """The exits of a model that are tried: shares of its layers, and exit_layer."""
        shares = {max(1, round(layers * share)) for share in (1 / 12, 1 / 8, 1 / 6, 1 / 4, 1 / 3, 1 / 2)}
        return sorted(e for e in shares | {exit_layer} if e < layers)

    def draft(self, tokens: list[int], limit: int, pick: Pick) -> tuple[list[int], int]:
        self.turn += 1
        self.trying, self.early = self.turn % self.EVERY == 0, []
        self.watch = tuple(e for e in self.exits if e > self.exit_layer) if self.trying else ()
        return super().draft(tokens, min(limit, self.draft_len), pick)

    def step(self, token: int, row: int, seen: dict | None = None) -> Tensor:
        self.early.append(dict.fromkeys(e for e in self.exits if e <= self.exit_layer) if self.trying else {})
        return super().step(token, row, self.early[-1])

    def verified(self, tokens: list[int], emitted: list[int], logits: Tensor, hidden: dict[int, Tensor], pick: Pick) -> None:
        if not self.trying:
            return
        rows = len(emitted)
        hidden = hidden | {e: torch.cat([row[e] for row in self.early]) for e in self.early[0]}
        guesses = self.model.unembed(torch.cat([hidden[e][:rows] for e in self.exits])).unflatten(0, (-1, rows))
        confidence = guesses.float().softmax(-1).amax(-1).tolist()
        for i, e in enumerate(self.exits):
            for row, token in enumerate(emitted):
                sure = confidence[i][row] > self.min_confidence
                self.sure[e].append(sure)
                self.right[e].append(sure and pick(guesses[i, row], len(tokens) + row) == token)
        self.exit_layer, self.draft_len = self.best()

    def best(self) -> tuple[int, int]:
        """The exit and draft length of most tokens per second over the tokens tried; a draft of 0 tokens is plain decoding."""
        layer, head = pass_seconds(self.model)
        layers, found, least = self.model.config.n_layers, (self.exit_layer, 0), math.inf
        for e in self.exits:
            sure, right = run_lengths(self.sure[e]), run_lengths(self.right[e])
            # seconds of a round by the number of its guesses: its rows below the exit, and its verification
            rounds = [k * (e * layer(1) + head(1)) + e * layer(1) + (layers - e) * layer(k + 1) + head(k + 1) for k in range(MAX_ROWS)]
            if len(right) * rounds[0] < least:
                found, least = (e, 0), len(right) * rounds[0]
            for d in (1, 2, 4, 8, MAX_ROWS - 1):
                seconds, place = 0.0, 0
                while place < len(right):  # a round: it drafts while it is sure, and ends behind the first wrong guess
                    drafted = min(d, sure[place])
                    seconds += rounds[drafted] + (head(1) if drafted < d else 0.0)  # a doubtful guess is paid for too
                    place += min(d, right[place]) + 1
                seconds *= len(right) / place  # the last round may go on behind the tokens tried
                if seconds < least:
                    found, least = (e, d), seconds
        return found


def run_lengths(flags: Collection[bool]) -> list[int]:
    """At each place, how many in a row are true from there on: [True, True, False, True] -> [2, 1, 0, 1]."""
    lengths, run = [], 0
    for flag in reversed(list(flags)):
        run = run + 1 if flag else 0
        lengths.append(run)
    return lengths[::-1]


_measured: WeakKeyDictionary = WeakKeyDictionary()


def pass_seconds(model: Llama) -> tuple[Callable[[float], float], Callable[[float], float]]:
    """Two functions of the number of rows: seconds for one layer and for embedding, head and choice; measured once per model."""
    if model not in _measured:
        c, layers = model.config, model.config.n_layers
        cache = KVQCache(layers, c.n_kv_heads, c.head_dim, c.dim, 2 * MAX_ROWS, 1, model.dtype, model.device)

        def seconds(rows: int, last: int, repeat: int = 7) -> float:
            taken = []
            for _ in range(repeat):
                started = time.perf_counter()
                h = model.embed(torch.zeros(rows, dtype=torch.long, device=model.device))
                h = model.run_layers(h, 0, last, cache, MAX_ROWS) if last else h
                int(model.unembed(h)[0].argmax())
                taken.append(time.perf_counter() - started)
            return sorted(taken)[repeat // 2]

        def line(one: float, many: float) -> Callable[[float], float]:
            slope = max(many - one, 0.0) / 7
            return lambda rows: one + slope * (rows - 1)

        half = max(1, round(layers / 2))  # one of the exits that AutoExit.choices has: a compiled model knows no other
        head = [seconds(rows, 0) for rows in (1, 8)]
        layer = [max(seconds(rows, half) - h, 1e-9) / half for rows, h in zip((1, 8), head)]
        _measured[model] = line(*layer), line(*head)
    return _measured[model]


class SkipLayers(Drafter):
    """The model without some of its attention and MLP sublayers (Draft & Verify, arXiv 2309.08168). No extra memory: what it
    writes in the cache is for its own guesses, and the verifier writes over it. Raises ValueError for a layer that there is not."""

    def __init__(self, model: Llama, cache: KVQCache, eos: tuple[int, ...] = (), min_confidence: float = 0.0, *, attention: Set[int] = frozenset(), mlp: Set[int] = frozenset()):
        super().__init__(model, cache, eos, min_confidence)
        for l in attention | mlp:
            if not 0 <= l < model.config.n_layers:
                raise ValueError(f"layers to skip must lie from 0 to {model.config.n_layers - 1}, not {l}")
        self.attention, self.mlp = attention, mlp

    def draft(self, tokens: list[int], limit: int, pick: Pick) -> tuple[list[int], int]:
        def step(token: int, row: int) -> Tensor:
            h = self.embed(token)
            return self.run(h, row) if row < limit else h  # the last is not read

        return self.chain(step, self.model.unembed, tokens[-1], limit, pick), 0

    def run(self, h: Tensor, row: int) -> Tensor:
        """Draft row `row` through what is not skipped: h (1, dim) to the same."""
        start = self.cache.length + row
        cached = CachedAttention(self.cache, start, 1, h.dtype, self.model.exact)
        return run_without(self.model, h, self.model.rotary(start, 1), cached, self.attention, self.mlp)


def run_without(model: Llama, h: Tensor, rotary: tuple[Tensor, Tensor], attend: Callable[..., Tensor], attention: Set[int], mlp: Set[int]) -> Tensor:
    """All layers on h (..., T, dim) without the attention of some and the MLP of some; attend(layer, q, k, v) is attention's inner part."""
    for l, layer in enumerate(model.model.layers):
        if l not in attention:
            h = h + layer.self_attn(layer.input_layernorm(h), *rotary, lambda q, k, v: attend(l, q, k, v))
        if l not in mlp:
            h = h + layer.mlp(layer.post_attention_layernorm(h))
    return h


@torch.inference_mode()
def search_skips(model: Llama, tokens: Tensor, tries: int, seed: int = 0, on_try: Callable[..., object] | None = None) -> tuple[set[int], set[int], float]:
    """A set of sublayers for SkipLayers, found on texts tokens (B, T): attention, MLP and the share of words still foreseen.

    Random search, as the paper suggests where no better is at hand: flip one to three sublayers of the best set so far, keep
    what promises more tokens per pass of the full model. With agreement p and a draft that costs the share c of a
    full pass, d tokens drafted promise (1 - p^(d+1)) / (1 - p) tokens for d c + 1 passes, at the best d.
    """
    layers, rotary = model.config.n_layers, model.rotary(0, tokens.shape[1])
    random = torch.Generator().manual_seed(seed)
    said = model(tokens).argmax(-1)

    def value(skipped: set[int]) -> tuple[float, float]:
        attention, mlp = {i for i in skipped if i < layers}, {i - layers for i in skipped if i >= layers}
        h = run_without(model, model.embed(tokens), rotary, lambda l, *qkv: batch_attention(*qkv), attention, mlp)
        p = (model.unembed(h).argmax(-1) == said).float().mean().item()
        cost = 1 - len(skipped) / (2 * layers)
        return max(sum(p**k for k in range(d + 1)) / (d * cost + 1) for d in range(1, MAX_ROWS)), p

    best: set[int] = set()
    (most, agreement) = value(best)
    for number in range(tries):
        count = int(torch.randint(1, 4, (), generator=random))
        trial = best ^ set(torch.randint(2 * layers, (count,), generator=random).tolist())
        found, p = value(trial)
        if found > most:
            best, most, agreement = trial, found, p
        if on_try:
            on_try(number + 1, best, most, agreement)
    return {i for i in best if i < layers}, {i - layers for i in best if i >= layers}, agreement


class TwoModels(Drafter):
    """A smaller model with the same vocabulary and a cache of its own (speculative decoding, arXiv 2211.17192 and 2302.01318).

    Raises ValueError where the vocabularies differ in size.
    """

    def __init__(self, model: Llama, cache: KVQCache, eos: tuple[int, ...] = (), min_confidence: float = 0.0, *, other: Llama):
        super().__init__(model, cache, eos, min_confidence)
        if other.config.vocab_size != model.config.vocab_size:
            raise ValueError(f"the draft model has {other.config.vocab_size} tokens, the model {model.config.vocab_size}: drafting needs one vocabulary")
        c, self.weights = other.config, sum(p.nbytes for p in other.parameters())
        self.other = other.pack()
        self.known: list[int] = []  # the tokens whose keys and values its cache holds
        self.own = KVQCache(c.n_layers, c.n_kv_heads, c.head_dim, c.dim, cache.max_len, 1, other.dtype, other.device)

    @property
    def nbytes(self) -> int:
        return self.own.nbytes + self.weights

    def draft(self, tokens: list[int], limit: int, pick: Pick) -> tuple[list[int], int]:
        same = next((i for i, (a, b) in enumerate(zip(self.known, tokens[:-1])) if a != b), min(len(self.known), len(tokens) - 1))
        self.own.rewind(same)
        prefill(self.other, self.own, tokens[same:-1], self.other.config.n_layers)

        def step(token: int, row: int) -> Tensor:
            h = self.other.embed(torch.tensor([token], device=self.other.device))
            h = self.other.run_layers(h, 0, self.other.config.n_layers, self.own, self.own.length)
            self.own.accept(1)
            return h

        drafted = self.chain(step, self.other.unembed, tokens[-1], limit, pick)
        self.known = (tokens + drafted)[: self.own.length]
        return drafted, 0


class PromptLookup(Drafter):
    """What followed the last time that the latest tokens came: copies from the text itself (prompt lookup, n-gram drafting)."""

    def draft(self, tokens: list[int], limit: int, pick: Pick) -> tuple[list[int], int]:
        for n in (3, 2, 1):
            latest = tokens[-n:]
            for place in range(len(tokens) - n - 1, -1, -1):
                if tokens[place : place + n] == latest:
                    return tokens[place + n : place + n + limit], 0
        return [], 0


class Jacobi(Drafter):
    """The verifier's own words beyond the first wrong guess become the next guesses (Jacobi decoding, arXiv 2305.10427)."""

    def __init__(self, model: Llama, cache: KVQCache, eos: tuple[int, ...] = (), min_confidence: float = 0.0):
        super().__init__(model, cache, eos)
        self.guesses: list[int] = []

    def draft(self, tokens: list[int], limit: int, pick: Pick) -> tuple[list[int], int]:
        return (self.guesses + [tokens[-1]] * limit)[:limit], 0

    def verified(self, tokens: list[int], emitted: list[int], logits: Tensor, hidden: dict[int, Tensor], pick: Pick) -> None:
        self.guesses = [pick(logits[row], len(tokens) + row) for row in range(len(emitted), len(logits))]
