"""Small random models, every way to draft, and the plainest decoding to hold them against."""

import json
import tempfile
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cache import KVQCache
from decode import Round, Sampling, generate, new_cache, next_token
from extras.drafters import (
    Jacobi,
    Lookahead,
    LookupExit,
    PromptLookup,
    SkipLayers,
    TwoModels,
    Window,
)
from extras.early_exit import keep_layers
from extras.kangaroo import Adapter, Kangaroo
from model import Config, Llama
from support.checkpoint import KEYS, config_json

DTYPES = [torch.float32, torch.bfloat16, torch.float64]
SMALL = dict(n_layers=3, dim=32, hidden_dim=48, n_heads=2, n_kv_heads=1, head_dim=16)

# --------------------------------------
# Models


def tiny_config(**changes: Any) -> Config:
    """Four layers of 24, unless `changes` says otherwise."""
    shape: dict = dict(vocab_size=61, dim=24, hidden_dim=40, n_layers=4, n_heads=4, n_kv_heads=2)
    return Config(**{**shape, "head_dim": 8, "max_len": 256, **changes})


def config_option(**shape: Any) -> list[str]:
    """--config of train.py, with the file that it names, for a tied model of this shape."""
    found = config_json(asdict(tiny_config(tied=True, max_len=512)), torch.float32)
    file = Path(tempfile.mkdtemp()) / "config.json"
    file.write_text(json.dumps(found | {KEYS[name]: value for name, value in shape.items()}))
    return ["--config", str(file)]


def tiny_model(
    config: Config | None = None,
    seed: int = 0,
    damp_from: int | None = None,
    damping: float = 0.1,
    dtype: torch.dtype = torch.float32,
    scales: tuple[float, float, float] = (1.0, 1.0, 1.0),
) -> Llama:
    """Random weights.

    Layers from damp_from on add `damping` times as much, so that earlier exits foresee the last
    one. `scales` are factors of the embedding, of o_proj and down_proj, and of the norms' weights:
    they set the scale of the hidden states, of what a layer adds, and of what a layer reads.
    """
    torch.manual_seed(seed)
    model = Llama(config or tiny_config())
    embedding, outputs, norms = scales
    for name, p in model.named_parameters():
        if p.dim() == 1:
            p.data.uniform_(0.5, 1.5).mul_(norms)
            continue
        p.data.normal_(0, 1.5 * p.shape[1] ** -0.5)
        if "embed_tokens" in name:
            p.data *= embedding
        if "o_proj" in name or "down_proj" in name:
            p.data *= outputs
            if damp_from is not None and int(name.split(".")[1]) >= damp_from:
                p.data *= damping
    return model.to(dtype).eval()


def corpus(path: Path) -> Path:
    """A folder of text for training, made in path."""
    folder = path / "corpus"
    folder.mkdir()
    for number in range(60):
        (folder / f"{number}.py").write_text("def f(x):\n    return x + 1\n\n\n" * 20)
    return folder


def write_rows(file: Path, rows: Iterable[dict]) -> Path:
    """JSON Lines."""
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def random_adapter(model: Llama, exit_layer: int = 2) -> Adapter:
    """An adapter of Kangaroo that was not trained."""
    torch.manual_seed(1)
    return Adapter(model.config, exit_layer).to(model.dtype)


def late_layers(model: Llama, e: int) -> partial:
    last = model.config.n_layers
    return partial(SkipLayers, attention={last - 1}, mlp=set(range(e, last)))


# Every way to draft: settings of generate, for a model whose first e layers foresee the rest.
DRAFTERS: dict[str, Callable[[Llama, int], dict]] = {
    "early exit": lambda model, e: dict(exit_layer=e),
    "two models": lambda m, e: dict(drafter=partial(TwoModels, other=keep_layers(m, range(e)))),
    "skip layers": lambda model, e: dict(drafter=late_layers(model, e)),
    "kangaroo": lambda m, e: dict(drafter=partial(Kangaroo, adapter=random_adapter(m, e))),
    "lookup": lambda model, e: dict(drafter=PromptLookup),
    "lookup+exit": lambda model, e: dict(drafter=partial(LookupExit, exit_layer=e)),
    "jacobi": lambda model, e: dict(drafter=Jacobi),
    "lookahead": lambda model, e: dict(drafter=Lookahead),
    "window": lambda model, e: dict(drafter=partial(Window, size=8 * e)),
}


@contextmanager
def on_threads(count: int) -> Iterator[None]:
    """Runs a block on `count` threads of torch."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


# --------------------------------------
# Texts


class Text(NamedTuple):
    """What rounds emitted: ids, and the logits (len(ids), vocab) that gave them."""

    ids: list[int]
    logits: Tensor
    rounds: list[Round]


def text_of(rounds: Iterable[Round]) -> Text:
    rounds = list(rounds)
    logits = torch.cat([r.logits for r in rounds if r.logits is not None])
    return Text([token for r in rounds for token in r.emitted], logits, rounds)


def decode(model: Llama, prompt: list[int], **how: Any) -> Text:
    """A whole generation of 60 tokens in drafts of 5, unless `how` says otherwise."""
    how = dict(max_new_tokens=60, draft_len=5, eos=()) | how
    return text_of(generate(model, prompt, **how))


def differences(a: tuple, b: tuple) -> int:
    """Tokens of two texts whose ids or logits differ, or that one of them lacks."""
    (ids, logits, _), (others, expected, _) = a, b
    equal = (logits[: len(others)] == expected[: len(ids)]).all(-1).tolist()
    same = sum(x == y and bits for x, y, bits in zip(ids, others, equal))
    return max(len(ids), len(others)) - same


def same_bits(a: tuple, b: tuple) -> bool:
    """Whether two texts, of decode or reference_decode, have the same tokens and logits."""
    return differences(a, b) == 0


def fates(rounds: list[Round]) -> set[str]:
    """How much of a draft was accepted, over the rounds that drafted: all, some, none."""
    drafted = [(r.accepted, len(r.drafted)) for r in rounds if r.drafted]
    return {"all" if a == d else "some" if a else "none" for a, d in drafted}


@torch.inference_mode()
def reference_decode(
    model: Llama, prompt: list[int], count: int, sampling: Sampling, eos: Collection[int] = ()
) -> tuple[list[int], Tensor, KVQCache]:
    """Full-model decoding, one token at a time: (tokens, logits (count, vocab), cache).

    Shares no loop with decode.py.
    """
    c = model.config
    cache = new_cache(model, c.max_len, 1)
    if len(prompt) > 1:
        model.run_layers(model.embed(torch.tensor(prompt[:-1])), 0, c.n_layers, cache, 0)
        cache.commit(len(prompt) - 1)
    tokens = list(prompt)
    rows: list[Tensor] = []
    while len(rows) < count and len(tokens) < c.max_len and not (rows and tokens[-1] in eos):
        h = model.embed(torch.tensor(tokens[-1:]))
        rows.append(model.unembed(model.run_layers(h, 0, c.n_layers, cache, len(tokens) - 1))[0])
        tokens.append(next_token(rows[-1], len(tokens), sampling))
        cache.commit(1)
    return tokens[len(prompt) :], torch.stack(rows), cache
