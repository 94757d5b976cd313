"""Other drafters than the model's own first layers. Whoever drafts, the text is the full model's.

Each is a class like decode.NoDraft. DRAFTERS at the end has their names on the command line.
"""

import re
from collections.abc import Callable, Collection
from functools import partial
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import decode
from cache import KVQCache
from decode import EarlyExit, NoDraft, Pick, new_cache
from exact import MAX_ROWS, pack
from model import Llama, load_checkpoint, prefill

run_draft: Callable[..., list[int]] = decode.draft  # also for what is like a model


class TwoModels(NoDraft):
    """A smaller model with a cache of its own (speculative decoding, arXiv 2211.17192, 2302.01318).

    Raises ValueError where the vocabularies differ in size.
    """

    def __init__(self, *context: Any, other: Llama):
        super().__init__(*context)
        c, size = other.config, self.model.config.vocab_size
        if c.vocab_size != size:
            raise ValueError(f"the draft model must have {size} tokens too, not {c.vocab_size}")
        self.own = new_cache(other, self.cache.max_len, MAX_ROWS - 1)
        self.other = other

    def draft(self, tokens: list[int], limit: int, pick: Pick) -> tuple[list[int], int]:
        self.own.rewind(min(self.own.length, len(tokens) - 1))  # what was rejected
        prefill(self.other, self.own, tokens[self.own.length : -1])
        layers = self.other.config.n_layers
        guesses = run_draft(self.other, self.own, tokens[-1], limit, pick, layers, *self.stop)
        self.own.commit(len(guesses) + 1)
        return guesses, 0


class SkipLayers(NoDraft):
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
            layer = self.model.layers[l]
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
    cache = new_cache(model, tokens.shape[1], 0)
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


class PromptLookup(NoDraft):
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


class LookupExit(NoDraft):
    """PromptLookup of 3 tokens while its copies hold, else EarlyExit.

    Copies are looked at in every round, used or not. Tracks tokens per layer run for both; copies
    while copying is at least as good.
    """

    def __init__(self, *context: Any, exit_layer: int):
        super().__init__(*context)
        self.lookup, self.copy = PromptLookup(*context), list[int]()
        self.lookup.lengths = (3,)
        self.exit = EarlyExit(*context, exit_layer=exit_layer)
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


class Jacobi(NoDraft):
    """The verifier's words beyond the first wrong guess are the next guesses (arXiv 2305.10427)."""

    guesses: tuple[int, ...] = ()

    def draft(self, tokens: list[int], limit: int, pick: Pick) -> tuple[list[int], int]:
        return [*self.guesses, *[tokens[-1]] * limit][:limit], 0

    def verified(self, tokens: list[int], emitted: list[int], logits: Tensor, pick: Pick) -> None:
        rows = range(len(emitted), len(logits))
        self.guesses = tuple(pick(logits[row], len(tokens) + row) for row in rows)


class Lookahead(Jacobi):
    """A pool of n-grams from Jacobi's rejected rows guesses (after Lookahead, arXiv 2402.02057).

    The pool has for a token what the verifier last said behind it, in whatever text. Lookahead
    itself checks several n-grams at once, as branches of a tree; here there is one.
    """

    ngram = 3  # tokens of the pool's entries, after their first

    def __init__(self, *context: Any):
        super().__init__(*context)
        self.pool, self.asked = dict[int, list[int]](), list[int]()

    def draft(self, tokens: list[int], limit: int, pick: Pick) -> tuple[list[int], int]:
        text = tokens[-1:]
        while len(text) <= limit and (more := self.pool.get(text[-1])):
            text += more
        rest, _ = super().draft(tokens, limit, pick)
        self.asked = [*text[1:], *rest][:limit]
        return self.asked, 0

    def verified(self, tokens: list[int], emitted: list[int], logits: Tensor, pick: Pick) -> None:
        super().verified(tokens, emitted, logits, pick)
        said = [*emitted, *self.guesses]  # one for each row
        for row, token in enumerate([tokens[-1], *self.asked]):
            if following := said[row : row + self.ngram]:
                self.pool[token] = following


class Window(SkipLayers):
    """The full model, looking at the first 4 and the latest positions only (arXiv 2408.11049).

    On a long context a draft then reads the weights without the cache (MagicDec). The verifier
    looks at all positions, and writes over what the draft leaves in the cache.
    """

    first = 4

    def __init__(self, *context: Any, size: int):
        super().__init__(*context)
        self.size = size
        if size < 1:
            raise ValueError(f"a window must have a position or more, not {size}")

    def run_layers(self, h: Tensor, first: int, last: int, cache: KVQCache, start: int) -> Tensor:
        """Llama.run_layers for one row h (1, dim)."""

        def attend(l: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            cache.write(l, start, k, v)
            keys, values = (x[l] for x in cache.read(start + 1))  # (1, Hkv, S, hd)
            if start >= self.first + self.size:
                ends = slice(0, self.first), slice(-self.size, None)
                keys, values = (torch.cat([x[:, :, e] for e in ends], 2) for x in (keys, values))
            q = q.transpose(0, 1)[None]
            mixed = F.scaled_dot_product_attention(q, keys, values, enable_gqa=True)
            return mixed[0].transpose(0, 1)

        for l in range(first, last):
            h = self.model.layers[l](h, *self.model.rotary(start, 1), partial(attend, l))
        return h


# --------------------------------------
# Names on the command line


def two_models(folder: str, model: Llama, exit_layer: int) -> dict:
    """Settings for model:DIR."""
    other = load_checkpoint(folder, model.dtype, model.device)
    return dict(drafter=partial(TwoModels, other=pack(other)))


def kangaroo(folder: str, model: Llama, exit_layer: int) -> dict:
    """Settings for kangaroo:DIR, which come with the adapter."""
    from extras.kangaroo import Kangaroo, load_adapter

    adapter = load_adapter(folder, model)
    settings = dict(exit_layer=adapter.exit_layer, draft_len=6, min_confidence=0.6)
    return settings | dict(drafter=partial(Kangaroo, adapter=adapter))


def skip_layers(text: str, model: Llama, exit_layer: int) -> dict:
    """Settings for skip:attn:3,4,mlp:7. Raises ValueError for another text."""
    part, skipped = "(attn|mlp):([0-9]+(?:,[0-9]+)*)", dict(attn=set[int](), mlp=set[int]())
    if not re.fullmatch(f"{part}(,{part})*", text):
        raise ValueError(f"--drafter skip takes sublayers such as attn:3,4,mlp:7, not {text!r:.40}")
    for sublayer, layers in re.findall(part, text):
        skipped[sublayer] |= set(map(int, layers.split(",")))
    return dict(drafter=partial(SkipLayers, attention=skipped["attn"], mlp=skipped["mlp"]))


def window(text: str, model: Llama, exit_layer: int) -> dict:
    """window:W."""
    if not re.fullmatch("[0-9]{1,9}", text):
        raise ValueError(f"--drafter window takes a number of positions, not {text!r:.40}")
    return dict(drafter=partial(Window, size=int(text)))


def ones_own(text: str) -> dict:
    """FILE.py:Class. Raises ValueError where there is no such class."""
    file, _, name = text.rpartition(":")
    if not Path(file).is_file() or not (spec := spec_from_file_location("ones_own", file)):
        raise ValueError(f"--drafter {text:.80}: there is no such Python file")
    module = module_from_spec(spec)
    try:
        spec.loader.exec_module(module)  # type: ignore[union-attr]
        return dict(drafter=getattr(module, name))
    except Exception as error:  # a program, which may fail in any way
        raise ValueError(f"--drafter {text:.80}: {error}") from None


# What stands before the colon: the form of the option, and what gives generate's settings for it,
# made of what follows the colon, the plain model, and the exit layer of the command line.
DRAFTERS: dict[str, tuple[str, Callable[[str, Llama, int], dict]]] = {
    "exit": ("exit", lambda _, model, e: dict(exit_layer=e, drafter=None)),
    "lookup": ("lookup", lambda *_: dict(drafter=PromptLookup)),
    "lookup+exit": (
        "lookup+exit",
        lambda _, model, e: dict(exit_layer=e, drafter=partial(LookupExit, exit_layer=e)),
    ),
    "jacobi": ("jacobi", lambda *_: dict(drafter=Jacobi)),
    "lookahead": ("lookahead", lambda *_: dict(drafter=Lookahead)),
    "window": ("window:W", window),
    "model": ("model:DIR", two_models),
    "kangaroo": ("kangaroo:DIR", kangaroo),
    "skip": ("skip:attn:3,4,mlp:7", skip_layers),
}
FORMS = ", ".join(form for form, _ in DRAFTERS.values()) + " or FILE.py:Class"


def parse_drafter(text: str, model: Llama, exit_layer: int = 1) -> dict:
    """generate's settings for --drafter: drafter, exit_layer, and Kangaroo's two others.

    exit_layer is for drafters that use an exit. The model is not packed yet. Raises ValueError for
    another text, and for a drafter that does not fit the model.
    """
    name, _, rest = text.partition(":")
    form, make = DRAFTERS.get(name, ("", None))
    if make and (text == form or (rest and ":" in form)):
        settings = dict(exit_layer=0) | make(rest, model, exit_layer)
    elif ".py:" in text:
        settings = dict(exit_layer=0) | ones_own(text)
    else:
        raise ValueError(f"--drafter must be {FORMS}, not {text!r:.40}")
    try:
        if settings["drafter"]:
            settings["drafter"](model, new_cache(model, 1, 1))  # raises if it must
    except TypeError as error:
        raise ValueError(f"--drafter {text:.80} is no class of drafters: {error}") from None
    return settings
