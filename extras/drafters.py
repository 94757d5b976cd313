"""Other drafters than the model's own first layers. Whoever drafts, the text is the full model's.

A drafter has one or two methods, which generate calls:

    draft(tokens, limit, pick) -> (guesses, E)      at most `limit` guesses of what follows tokens
    verified(tokens, emitted, logits, pick)         after each verification

E > 0 says: layers [0, E) ran on tokens[-1] and on every guess, and left keys, values and exit
queries in the cache. E = 0: the verifier runs every layer.
"""

import re
from collections.abc import Callable, Collection
from functools import partial
from typing import Any

import torch
from torch import Tensor

import decode
from cache import KVQCache
from decode import Pick, new_cache
from exact import MAX_ROWS, pack
from model import Llama, causal_attention, load_checkpoint, prefill

run_draft: Callable[..., list[int]] = decode.draft  # also takes what is only like a model


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

    The verifier writes over the keys and values that its draft leaves in the cache. Raises
    ValueError for a layer that the model does not have.
    """

    def __init__(self, *context: Any, attention: Collection[int] = (), mlp: Collection[int] = ()):
        super().__init__(*context)
        self.attention, self.mlp, self.layers = attention, mlp, self.model.config.n_layers
        self.embed, self.unembed, self.end = self.model.embed, self.model.unembed, -1
        for l in (*attention, *mlp):
            if not 0 <= l < self.layers:
                raise ValueError(f"a layer to skip must be from 0 to {self.layers - 1}, not {l}")

    def draft(self, tokens: list[int], limit: int, pick: Pick) -> tuple[list[int], int]:
        self.end = self.cache.length + limit  # of a last guess, whose row nobody reads
        return run_draft(self, self.cache, tokens[-1], limit, pick, self.layers, *self.stop), 0

    def run_layers(
        self, h: Tensor, first: int, last: int, cache: KVQCache | None = None, start: int = 0
    ) -> Tensor:
        """Llama.run_layers without what is skipped."""
        if cache and start == self.end:
            return h
        cos, sin = self.model.rotary(start, h.shape[-2])
        attend: Any = lambda layer, *qkv: causal_attention(*qkv)
        if cache:
            attend = self.model.row_attention(cache, start, len(h))
        for l in range(first, last):
            layer = self.model.model.layers[l]
            if l not in self.attention:
                h = h + layer.self_attn(layer.input_layernorm(h), cos, sin, partial(attend, l))
            if l not in self.mlp:
                h = h + layer.mlp(layer.post_attention_layernorm(h))
        return h


@torch.inference_mode()
def search_skips(
    model: Llama, tokens: Tensor, tries: int, seed: int = 0, on_try: Callable | None = None
) -> tuple[set[int], set[int], float]:
    """SkipLayers' attention and mlp, found on tokens (B, T), and the agreement p that they leave.

    Random search: flip one to three sublayers of the best set so far, and keep what promises more
    tokens per full pass. If a drafted token costs the share c of a pass, d of them promise
    1 + p + ... + p^d tokens for d c + 1 passes, at the best d.
    """
    layers, random = model.config.n_layers, torch.Generator().manual_seed(seed)
    cache = new_cache(model.config, 1, 1, model.dtype, model.device)
    full = model(tokens).argmax(-1)

    def split(skipped: set[int]) -> tuple[set[int], set[int]]:
        return {i for i in skipped if i < layers}, {i - layers for i in skipped if i >= layers}

    def value(skipped: set[int]) -> tuple[float, float]:
        attention, mlp = split(skipped)
        thin = SkipLayers(model, cache, attention=attention, mlp=mlp)
        h = thin.run_layers(model.embed(tokens), 0, layers)
        p = (model.unembed(h).argmax(-1) == full).float().mean().item()
        c = 1 - len(skipped) / (2 * layers)
        return max(sum(p**k for k in range(d + 1)) / (d * c + 1) for d in range(1, MAX_ROWS)), p

    best: set[int] = set()
    most, agreement = value(best)
    for number in range(tries):
        count = int(torch.randint(1, 4, (), generator=random))
        trial = best ^ set(torch.randint(2 * layers, (count,), generator=random).tolist())
        found, p = value(trial)
        if found > most:
            best, most, agreement = trial, found, p
        if on_try:
            on_try(number + 1, best, most, agreement)
    return *split(best), agreement


class PromptLookup(Drafter):
    """Copies what followed when the latest 3 tokens came last, or else the latest 2, or 1."""

    def draft(self, tokens: list[int], limit: int, pick: Pick) -> tuple[list[int], int]:
        for n in (3, 2, 1):
            latest = tokens[-n:]
            for place in range(len(tokens) - n - 1, -1, -1):
                if tokens[place : place + n] == latest:
                    return tokens[place + n : place + n + limit], 0
        return [], 0


class Jacobi(Drafter):
    """The verifier's words beyond the first wrong guess are the next guesses (arXiv 2305.10427)."""

    guesses: tuple[int, ...] = ()

    def draft(self, tokens: list[int], limit: int, pick: Pick) -> tuple[list[int], int]:
        return [*self.guesses, *[tokens[-1]] * limit][:limit], 0

    def verified(self, tokens: list[int], emitted: list[int], logits: Tensor, pick: Pick) -> None:
        rows = range(len(emitted), len(logits))
        self.guesses = tuple(pick(logits[row], len(tokens) + row) for row in rows)


def parse_drafter(text: str, model: Llama) -> dict:
    """generate's settings for lookup, jacobi, model:DIR, kangaroo:DIR or skip:attn:3,4,mlp:7.

    They are drafter and exit_layer, 0 but for Kangaroo, and its paper's draft_len and
    min_confidence. Raises ValueError, one line, for another text and for what does not fit the
    model.
    """
    from extras.kangaroo import ETA, Kangaroo, load_adapter  # which imports Drafter

    kind, _, rest = text.partition(":")
    drafter: Callable[..., Drafter]
    settings: dict = dict(exit_layer=0)
    if text in ("lookup", "jacobi"):
        drafter = PromptLookup if text == "lookup" else Jacobi
    elif kind == "model" and rest:
        drafter = partial(TwoModels, other=pack(load_checkpoint(rest, model.dtype, model.device)))
    elif kind == "kangaroo" and rest:
        adapter = load_adapter(rest, model)
        drafter = partial(Kangaroo, adapter=adapter)
        settings = dict(exit_layer=adapter.exit_layer, draft_len=6, min_confidence=ETA)
    elif kind == "skip" and re.fullmatch("(attn|mlp):[0-9]+(,((attn|mlp):)?[0-9]+)*", rest):
        skipped: dict[str, set[int]] = dict(attn=set(), mlp=set())
        for name, numbers in re.findall("(attn|mlp):([0-9,]+)", rest):
            skipped[name] |= {int(l) for l in numbers.strip(",").split(",")}
        drafter = partial(SkipLayers, attention=skipped["attn"], mlp=skipped["mlp"])
    else:
        possible = "lookup, jacobi, model:DIR, kangaroo:DIR or skip:attn:3,4,mlp:7"
        raise ValueError(f"--drafter must be {possible}, not {text!r:.40}")
    drafter(model, new_cache(model.config, 1, 1, model.dtype, model.device))  # raises if it must
    return settings | dict(drafter=drafter)
