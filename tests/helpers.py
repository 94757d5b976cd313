"""Small random models whose exits agree with the full model, and the plainest decoding loop."""

import json
import tempfile
from collections.abc import Collection
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cache import KVQCache
from decode import Sampling, new_cache, next_token
from model import Config, Llama
from support.checkpoint import KEYS, config_json


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
    config: Config,
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
    model = Llama(config)
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
