"""Other drafters than the model's own first layers. Whoever drafts, the text is the full model's.

decode.generate calls these methods, and says what E is:

    draft(tokens, limit, pick) -> (guesses, E)    at most `limit` guesses
    verified(tokens, emitted, logits, pick)       if there: after each verification
"""

import re
from collections.abc import Callable, Collection
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import decode
from cache import KVQCache
from decode import Pick, new_cache
from exact import MAX_ROWS, RowLinear, pack
from model import Llama, load_checkpoint, prefill

POSSIBLE = "exit, lookup, lookup+exit, jacobi, model:DIR, kangaroo:DIR or skip:attn:3,4,mlp:7"
run_draft: Callable[..., list[int]] = decode.draft  # also for what is like a model


class Drafter:
    """Made with the verifier's model and cache, and with what ends a draft."""

    def __init__(
        self, model: Llama, cache: KVQCache, min_confidence: float = 0.0, eos: Collection[int] = ()
    ):
        self.model, self.cache, self.stop = model, cache, (min_confidence, eos)


class TwoModels(Drafter):
    """A smaller model with a cache of its own (speculative decoding, arXiv 2211.17192, 2302.01318).

    Raises ValueError where the vocabularies differ in size.
    """

    def __init__(self, *context: Any, other: Llama):
        super().__init__(*context)
        c, size = other.config, self.model.config.vocab_size
        if c.vocab_size != size:
            raise ValueError(f"the draft model must have {size} tokens too, not {c.vocab_size}")
        self.own = new_cache(c, self.cache.max_len, MAX_ROWS - 1, other.dtype, other.device)
        self.other = other

    def draft(self, tokens: list[int], limit: int, pick: Pick) -> tuple[list[int], int]:
        self.own.rewind(min(self.own.length, len(tokens) - 1))  # what was rejected
        prefill(self.other, self.own, tokens[self.own.length : -1])
        layers = self.other.config.n_layers
        guesses = run_draft(self.other, self.own, tokens[-1], limit, pick, layers, *self.stop)
        self.own.accept(len(guesses) + 1)
        return guesses, 0


class SkipLayers(Drafter):
    """The model without some of its attention and MLP sublayers (Draft & Verify, arXiv 2309.08168).

    The verifier writes over what the draft leaves in the cache. Raises ValueError for a layer that
    the model does not have.
    """

    def __init__(self, *context: Any, attention: Collection[int] = (), mlp: Collection[int] = ()):
        super().__init__(*context)
        self.attention, self.mlp, self.layers = attention, mlp, self.model.config.n_layers
        self.embed, self.unembed = self.model.embed, self.model.unembed
        for l in (*attention, *mlp):
            if not 0 <= l < self.layers:
                raise ValueError(f"a layer to skip must be from 0 to {self.layers - 1}, not {l}")

    def draft(self, tokens: list[int], limit: int, pick: Pick) -> tuple[list[int], int]:
        return run_draft(self, self.cache, tokens[-1], limit, pick, self.layers, *self.stop), 0

    def run_layers(self, h: Tensor, first: int, last: int, cache: KVQCache, start: int) -> Tensor:
        """Llama.run_layers over a cache, without what is skipped."""
        rotary = self.model.rotary(start, len(h))
        attend = self.model.row_attention(cache, start, len(h))
        for l in range(first, last):
            layer = self.model.model.layers[l]
            if l not in self.attention:
                h = h + layer.self_attn(layer.input_layernorm(h), *rotary, partial(attend, l))
            if l not in self.mlp:
                h = h + layer.mlp(layer.post_attention_layernorm(h))
        return h


@torch.inference_mode()
def search_skips(
    model: Llama, tokens: Tensor, tries: int, on_try: Callable | None = None
) -> tuple[set[int], set[int], float]:
    """SkipLayers' attention and mlp, found on tokens (B, T), and the agreement p that they leave.

    Random search: flip one sublayer of the best set so far, and keep what promises more tokens per
    full pass. If a drafted token costs the share c of a pass, d of them promise 1 + p + ... + p^d
    tokens for d c + 1 passes, at the best d. on_try is told each try's number.
    """
    layers, random = model.config.n_layers, torch.Generator().manual_seed(0)
    cache = new_cache(model.config, tokens.shape[1], 0, model.dtype, model.device)
    full = model(tokens).argmax(-1)

    def split(skipped: set[int]) -> tuple[set[int], set[int]]:
        return {i for i in skipped if i < layers}, {i - layers for i in skipped if i >= layers}

    def value(skipped: set[int]) -> tuple[float, float]:
        attention, mlp = split(skipped)
        thin = SkipLayers(model, cache, attention=attention, mlp=mlp)
        texts = [thin.run_layers(text, 0, layers, cache, 0) for text in model.embed(tokens)]
        said = model.unembed(torch.stack(texts)).argmax(-1)
        p, c = (said == full).float().mean().item(), 1 - len(skipped) / (2 * layers)
        return max(sum(p**k for k in range(d + 1)) / (d * c + 1) for d in range(1, MAX_ROWS)), p

    best: set[int] = set()
    most = value(best)
    for number in range(tries):
        trial = best ^ {int(torch.randint(2 * layers, (), generator=random))}
        found = value(trial)
        if found > most:
            best, most = trial, found
        if on_try:
            on_try(number + 1)
    return *split(best), most[1]


class PromptLookup(Drafter):
    """Copies what followed when the latest 3 tokens came last, or else the latest 2, or 1."""

    lengths: tuple[int, ...] = (3, 2, 1)

    def __init__(self, *context: Any):
        super().__init__(*context)
        self.after: dict[tuple[int, ...], int] = {}  # some tokens: where what followed begins
        self.seen = 0

    def draft(self, tokens: list[int], limit: int, pick: Pick) -> tuple[list[int], int]:
        for end in range(self.seen, len(tokens)):
            self.after |= {tuple(tokens[max(end - n, 0) : end]): end for n in self.lengths}
        self.seen = len(tokens)
        for n in self.lengths:
            if place := self.after.get(tuple(tokens[-n:])):
                text = list(tokens)
                for source in range(place, place + limit):  # may go on with its own copy
                    text.append(text[source])
                return text[len(tokens) :], 0
        return [], 0


class EarlyExit(Drafter):
    """decode.draft as a drafter: the model's first layers. `head` may be one for fewer tokens."""

    def __init__(self, *context: Any, exit_layer: int, head: Callable | None = None):
        super().__init__(*context)
        model, self.exit_layer = self.model, exit_layer
        self.embed, self.run_layers, self.unembed = model.embed, model.run_layers, model.unembed
        if head:
            self.unembed = lambda h: head(model.model.norm(h))

    def draft(self, tokens: list[int], limit: int, pick: Pick) -> tuple[list[int], int]:
        e = self.exit_layer
        return run_draft(self, self.cache, tokens[-1], limit, pick, e, *self.stop), e


class LookupExit(Drafter):
    """PromptLookup of 3 tokens while its copies hold, else EarlyExit.

    Copies are looked at in every round, used or not. Of both ways a running mean of the tokens for
    each layer that ran is kept, and copies are used while theirs is not the smaller.
    """

    def __init__(self, *context: Any, exit_layer: int, head: Callable | None = None):
        super().__init__(*context)
        self.lookup, self.copy = PromptLookup(*context), list[int]()
        self.lookup.lengths = (3,)
        self.exit = EarlyExit(*context, exit_layer=exit_layer, head=head)
        self.layers = self.model.config.n_layers
        self.copied, self.foreseen = float(MAX_ROWS), 2 / self.layers  # tokens a layer

    def draft(self, tokens: list[int], limit: int, pick: Pick) -> tuple[list[int], int]:
        self.copy, _ = self.lookup.draft(tokens, limit, pick)
        self.guesses, e = self.copy, 0
        if not self.copy or self.copied < self.foreseen:
            self.guesses, e = self.exit.draft(tokens, limit, pick)
        return self.guesses, e

    def verified(self, tokens: list[int], emitted: list[int], logits: Tensor, pick: Pick) -> None:
        if self.copy:
            same = [a == b for a, b in zip(self.copy, emitted)]
            held = same.index(False) if False in same else len(self.copy)
            self.copied += ((held + 1) / self.layers - self.copied) / 8
        if self.guesses is not self.copy:
            ran = self.layers + len(self.guesses) * self.exit.exit_layer
            self.foreseen += (len(emitted) / ran - self.foreseen) / 8


class Jacobi(Drafter):
    """The verifier's words beyond the first wrong guess are the next guesses (arXiv 2305.10427)."""

    guesses: tuple[int, ...] = ()

    def draft(self, tokens: list[int], limit: int, pick: Pick) -> tuple[list[int], int]:
        return [*self.guesses, *[tokens[-1]] * limit][:limit], 0

    def verified(self, tokens: list[int], emitted: list[int], logits: Tensor, pick: Pick) -> None:
        rows = range(len(emitted), len(logits))
        self.guesses = tuple(pick(logits[row], len(tokens) + row) for row in rows)


def parse_drafter(
    text: str, model: Llama, exit_layer: int = 1, draft_vocab: int | None = None
) -> dict:
    """generate's settings for --drafter: drafter, exit_layer, and Kangaroo's two others.

    exit_layer and draft_vocab are of exit and lookup+exit. With draft_vocab N, drafts read the
    first N rows of the head alone (FR-Spec, arXiv 2502.14856). The model is not packed yet. Raises
    ValueError, one line, for another text, and for a drafter that does not fit the model.
    """
    from extras.kangaroo import Kangaroo, load_adapter  # which imports Drafter

    (name, _, rest), part = text.partition(":"), "(attn|mlp):([0-9]+(?:,[0-9]+)*)"
    drafter: Callable[..., Drafter]
    settings: dict = dict(exit_layer=0)
    if draft_vocab is not None and text not in ("exit", "lookup+exit"):
        raise ValueError("--draft-vocab is for drafts of an exit: leave it out")
    if text in ("exit", "lookup+exit"):
        head, size = None, model.config.vocab_size
        if draft_vocab is not None:
            if not 1 <= draft_vocab <= size:
                raise ValueError(f"--draft-vocab must be from 1 to {size}, not {draft_vocab}")
            first = nn.Linear(model.config.dim, draft_vocab, bias=False, device="meta")
            first.weight = nn.Parameter(model.lm_head.weight[:draft_vocab], requires_grad=False)
            head = RowLinear({}, first)
        kind = EarlyExit if text == "exit" else LookupExit
        drafter = partial(kind, exit_layer=exit_layer, head=head)
        settings = dict(exit_layer=exit_layer)
    elif text in ("lookup", "jacobi"):
        drafter = PromptLookup if text == "lookup" else Jacobi
    elif name == "model" and rest:
        drafter = partial(TwoModels, other=pack(load_checkpoint(rest, model.dtype, model.device)))
    elif name == "kangaroo" and rest:
        adapter = load_adapter(rest, model)
        drafter = partial(Kangaroo, adapter=adapter)
        settings = dict(exit_layer=adapter.exit_layer, draft_len=6, min_confidence=0.6)
    elif name == "skip" and re.fullmatch(f"{part}(,{part})*", rest):
        skipped: dict[str, set[int]] = dict(attn=set(), mlp=set())
        for sublayer, layers in re.findall(part, rest):
            skipped[sublayer] |= set(map(int, layers.split(",")))
        drafter = partial(SkipLayers, attention=skipped["attn"], mlp=skipped["mlp"])
    else:
        raise ValueError(f"--drafter must be {POSSIBLE}, not {text!r:.40}")
    drafter(model, new_cache(model.config, 1, 1, model.dtype, model.device))  # raises if it must
    return settings | dict(drafter=drafter)
