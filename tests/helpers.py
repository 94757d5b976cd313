"""Small random models whose early exits really agree with the full model, and the plainest decoding loop there is."""

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor

from cache import KVQCache
from decode import Sampling, new_cache, next_token
from model import Config, Llama


def tiny_config(**changes: Any) -> Config:
    shape: dict = dict(vocab_size=61, dim=24, hidden_dim=40, n_layers=4, n_heads=4, n_kv_heads=2, head_dim=8, max_len=256)
    return Config(**{**shape, **changes})


def tiny_model(config: Config, seed: int = 0, damp_from: int | None = None, damping: float = 0.1, dtype: torch.dtype = torch.float32) -> Llama:
    """Random weights; layers from damp_from on add `damping` times as much, so that earlier exits foresee the last one."""
    torch.manual_seed(seed)
    model = Llama(config)
    for name, p in model.named_parameters():
        if p.dim() == 1:
            p.data.uniform_(0.5, 1.5)
            continue
        p.data.normal_(0, 1.5 * p.shape[1] ** -0.5)
        late = damp_from is not None and name.startswith("model.layers.") and int(name.split(".")[2]) >= damp_from
        if late and ("o_proj" in name or "down_proj" in name):
            p.data *= damping
    return model.to(dtype).eval()


@torch.inference_mode()
def reference_decode(
    model: Llama, prompt: list[int], count: int, sampling: Sampling, eos: Collection[int] = (), depth: int | None = None
) -> tuple[list[int], Tensor, KVQCache]:
    """Full-model decoding one token at a time, by hand: (tokens, logits (count, vocab), cache). Shares no loop with decode.py."""
    c = model.config
    depth = c.n_layers if depth is None else depth
    cache = new_cache(c, c.max_len, 1, model.dtype, model.device)
    if len(prompt) > 1:
        model.run_layers(model.embed(torch.tensor(prompt[:-1])), 0, depth, cache, 0)
        cache.accept(len(prompt) - 1)
    tokens = list(prompt)
    rows: list[Tensor] = []
    while len(rows) < count and len(tokens) < c.max_len and not (rows and tokens[-1] in eos):
        h = model.run_layers(model.embed(torch.tensor(tokens[-1:])), 0, depth, cache, len(tokens) - 1)
        rows.append(model.unembed(h)[0])
        tokens.append(next_token(rows[-1], len(tokens), sampling))
        cache.accept(1)
    return tokens[len(prompt) :], torch.stack(rows), cache
