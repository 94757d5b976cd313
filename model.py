"""A Llama in one file, with the three verbs that LayerSkip needs.

    embed(tokens)                     (B, T) -> (B, T, dim)
    run_layers(h, first, last, ...)   layers [first, last), over a batch or over a KVQ cache
    unembed(h)                        (..., dim) -> (..., vocab): norm and head, the paper's g(.)

Plain decoding is embed, run_layers(0, L), unembed. Early exit is run_layers(0, E), unembed.
Self-speculation drafts with run_layers(0, E) and verifies with run_layers(E, L).
(LayerSkip, arXiv 2404.16710, section 4.)

Two kinds of pass go through the same layers:

    a batch of sequences   h is (B, T, dim), no cache: training and evaluation
    rows over a cache      h is (T, dim), consecutive positions of one text: prefill and decoding

Shapes: B batch, T rows of this pass, S visible positions, H query heads, Hkv key/value heads, hd
their size. Parameters have Hugging Face's names, without the leading `model.`.
"""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cache import KVQCache
from support.checkpoint import check_tensors, read_checkpoint, write_checkpoint

# Attention's inner part: q (..., T, H, hd), k and v (..., T, Hkv, hd) -> (..., T, H, hd)
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]

PREFILL_ROWS = 512  # a long prompt runs through the layers in pieces of this many rows


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension of (..., dim) (1910.07467)."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(dim)), eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


@dataclass(frozen=True)
class Config:
    """Shape of a Llama. The comments give the keys of Hugging Face's config.json.

    Nothing is checked here: support/checkpoint.py refuses a file with an impossible shape.
    """

    vocab_size: int
    dim: int  # hidden_size
    hidden_dim: int  # intermediate_size
    n_layers: int  # num_hidden_layers
    n_heads: int  # num_attention_heads
    n_kv_heads: int  # num_key_value_heads
    head_dim: int
    max_len: int = 2048  # max_position_embeddings
    norm_eps: float = 1e-5  # rms_norm_eps
    rope_theta: float = 10000.0
    rope_type: str = "default"  # or "linear" (long Code Llama), "llama3" (Llama 3.1 and 3.2)
    rope_factor: float = 1.0
    rope_low_freq_factor: float = 1.0
    rope_high_freq_factor: float = 4.0
    rope_original_len: int = 8192  # original_max_position_embeddings
    tied: bool = False  # tie_word_embeddings
    bos: int | None = None  # bos_token_id
    eos: tuple[int, ...] = ()  # eos_token_id: one or a list


def rotary_frequencies(c: Config) -> Tensor:
    """Angle per position of each pair of a head's dimensions, (hd / 2,) float32.

    RoFormer (arXiv 2104.09864). "linear" is position interpolation (2306.15595). "llama3" is
    Llama 3.1's (2407.21783): only the pairs that turn seldom are slowed.
    """
    frequency = 1.0 / c.rope_theta ** (torch.arange(0, c.head_dim, 2).float() / c.head_dim)
    if c.rope_type == "linear":
        return frequency / c.rope_factor
    if c.rope_type == "llama3":
        turns = c.rope_original_len / (2 * math.pi / frequency)  # over the original context
        low, high = c.rope_low_freq_factor, c.rope_high_freq_factor
        share = ((turns - low) / (high - low)).clamp(0, 1)  # of the original frequency
        return (1 - share) * frequency / c.rope_factor + share * frequency
    return frequency


def rotary_table(
    c: Config, length: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    """cos and [-sin, sin] (length, 1, hd) for positions 0..length-1."""
    with torch.inference_mode(False):  # a table made in decoding may serve training later
        angle = torch.outer(torch.arange(length, dtype=torch.float32), rotary_frequencies(c))
        cos = torch.cat([angle.cos(), angle.cos()], -1)[:, None]
        sin = torch.cat([-angle.sin(), angle.sin()], -1)[:, None]
        return cos.to(device, dtype), sin.to(device, dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions on x (..., T, heads, hd), given cos and [-sin, sin] (T, 1, hd).

    Dimension i turns together with i + hd/2, as Hugging Face pairs them.
    """
    return x * cos + x.roll(x.shape[-1] // 2, -1) * sin


def causal_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention of whole sequences: q (B, T, H, hd), k and v (B, T, Hkv, hd) -> (B, T, H, hd).

    Query head h reads key/value head h // (H / Hkv).
    """
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    return mixed.transpose(1, 2)


def row_attention(cache: KVQCache, start: int, rows: int) -> Callable[..., Tensor]:
    """Attention of rows at positions start..start+T-1 over a cache: returns attend(layer, q, k, v).

    It writes k and v (T, Hkv, hd) into the cache, then each row of q (T, H, hd) sees the positions
    up to its own. One mask serves every layer of a pass.
    """
    positions = torch.arange(start + rows, device=cache.keys.device)  # (S,)
    mask = positions <= positions[start:, None]  # (T, S)
    keys, values = cache.read(start + rows)

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        cache.write(layer, start, k, v)
        q = q.transpose(0, 1)[None]  # (1, H, T, hd)
        mixed = F.scaled_dot_product_attention(
            q, keys[layer], values[layer], attn_mask=mask, enable_gqa=True
        )
        return mixed[0].transpose(0, 1)

    return attend


class Attention(nn.Module):
    """Grouped-query attention with rotary positions. (..., T, dim) to the same."""

    def __init__(self, c: Config):
        super().__init__()
        self.n_heads, self.n_kv_heads, self.head_dim = c.n_heads, c.n_kv_heads, c.head_dim
        self.q_proj = nn.Linear(c.dim, c.n_heads * c.head_dim, bias=False)
        self.k_proj = nn.Linear(c.dim, c.n_kv_heads * c.head_dim, bias=False)
        self.v_proj = nn.Linear(c.dim, c.n_kv_heads * c.head_dim, bias=False)
        self.o_proj = nn.Linear(c.n_heads * c.head_dim, c.dim, bias=False)

    def project(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (..., T, H, hd), keys and values (..., T, Hkv, hd) of rows at their positions."""
        heads = (-1, self.head_dim)
        q, k, v = (p(x).unflatten(-1, heads) for p in (self.q_proj, self.k_proj, self.v_proj))
        return rotate(q, cos, sin), rotate(k, cos, sin), v

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, attend: Attend) -> Tensor:
        return self.o_proj(attend(*self.project(x, cos, sin)).flatten(-2))


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x)) (arXiv 2002.05202). (..., T, dim) to the same."""

    def __init__(self, c: Config):
        super().__init__()
        self.gate_proj = nn.Linear(c.dim, c.hidden_dim, bias=False)
        self.up_proj = nn.Linear(c.dim, c.hidden_dim, bias=False)
        self.down_proj = nn.Linear(c.hidden_dim, c.dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    """One transformer layer: x + f_l(x) of the LayerSkip paper. (..., T, dim) to the same."""

    def __init__(self, c: Config):
        super().__init__()
        self.input_layernorm = RMSNorm(c.dim, c.norm_eps)
        self.self_attn = Attention(c)
        self.post_attention_layernorm = RMSNorm(c.dim, c.norm_eps)
        self.mlp = MLP(c)

    def forward(
        self, h: Tensor, cos: Tensor, sin: Tensor, attend: Attend = causal_attention
    ) -> Tensor:
        h = h + self.self_attn(self.input_layernorm(h), cos, sin, attend)
        return h + self.mlp(self.post_attention_layernorm(h))


class Llama(nn.Module):
    """Llama 1, 2 and 3, with an unembedding that every layer can use as an exit."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        # nn.Embedding(vocab, dim) would draw random weights that a checkpoint then replaces.
        table = torch.zeros(config.vocab_size, config.dim)
        self.embed_tokens = nn.Embedding.from_pretrained(table, freeze=False)
        self.layers: Any = nn.ModuleList(Layer(config) for _ in range(config.n_layers))
        self.norm = RMSNorm(config.dim, config.norm_eps)
        self.lm_head = nn.Linear(config.dim, config.vocab_size, bias=False)
        if config.tied:
            self.lm_head.weight = self.embed_tokens.weight
        self.row_attention = row_attention  # exact.pack puts another function here
        self._rotary: tuple[Tensor, Tensor] | None = None

    @property
    def dtype(self) -> torch.dtype:
        """The type of weights, hidden states and logits."""
        return self.embed_tokens.weight.dtype

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.embed_tokens.weight.device

    def embed(self, tokens: Tensor) -> Tensor:
        """tokens (B, T) or (T,) -> hidden states (B, T, dim) or (T, dim)."""
        return self.embed_tokens(tokens)

    def run_layers(
        self, h: Tensor, first: int, last: int, cache: KVQCache | None = None, start: int = 0
    ) -> Tensor:
        """Layers [first, last) on h, which enters layer `first`; returns what leaves the last one.

        Without a cache, h (B, T, dim) holds whole sequences. With one, h (T, dim) holds rows at
        positions start..start+T-1. They see what the cache holds of earlier positions and leave
        their own keys and values in it.
        """
        cos, sin = self.rotary(start, h.shape[-2])
        if cache is None:
            for layer in self.layers[first:last]:
                h = layer(h, cos, sin)
            return h
        attend = self.row_attention(cache, start, len(h))
        for l in range(first, last):
            h = self.layers[l](h, cos, sin, partial(attend, l))
        return h

    def unembed(self, h: Tensor) -> Tensor:
        """Hidden states (..., dim) after any layer -> logits (..., vocab): g(.) in LayerSkip."""
        return self.lm_head(self.norm(h))

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens (B, T) -> logits (B, T, vocab) of the full model."""
        return self.unembed(self.run_layers(self.embed(tokens), 0, self.config.n_layers))

    def rotary(self, start: int, rows: int) -> tuple[Tensor, Tensor]:
        """cos and [-sin, sin] (rows, 1, hd) for positions from `start`, from a table that grows."""
        end, kind, table = start + rows, (self.dtype, self.device), self._rotary
        if table is None or (table[0].dtype, table[0].device) != kind or len(table[0]) < end:
            length = 1 << max(end - 1, 255).bit_length()  # a power of two, 256 or more
            table = self._rotary = rotary_table(self.config, length, *kind)
        return table[0][start:end], table[1][start:end]


@torch.inference_mode()
def prefill(model: Llama, cache: KVQCache, tokens: list[int]) -> None:
    """Runs tokens through all layers, after the live positions, and makes them live."""
    for first in range(0, len(tokens), PREFILL_ROWS):
        rows = tokens[first : first + PREFILL_ROWS]
        h = model.embed(torch.tensor(rows, device=model.device))
        model.run_layers(h, 0, model.config.n_layers, cache, cache.length)
        cache.commit(len(rows))


# --------------------------------------
# Checkpoints


def load_checkpoint(
    path: str | Path, dtype: torch.dtype | None = None, device: str | torch.device = "cpu"
) -> Llama:
    """A Llama from a directory in Hugging Face's or Meta's layout, in evaluation mode.

    dtype None keeps the stored type. Raises CheckpointError where the directory does not hold a
    whole, finite Llama in safetensors.
    """
    fields, tensors = read_checkpoint(path)
    with torch.device("meta"):
        model = Llama(Config(**fields))
    check_tensors(path, tensors, {name: p.shape for name, p in model.named_parameters()})
    weights = {name: stored.read().to(device, dtype) for name, stored in tensors.items()}
    model.load_state_dict(weights, assign=True, strict=False)  # checked
    if model.config.tied:
        model.lm_head.weight = model.embed_tokens.weight
    return model.eval()


def save_checkpoint(model: Llama, path: str | Path) -> None:
    """Writes config.json and model.safetensors, each whole or not at all; transformers reads them.

    Raises ValueError for a packed model, which has no plain weights.
    """
    if not isinstance(model.lm_head, nn.Linear):
        raise ValueError("a packed model has no plain weights: save it before exact.pack")
    weights = {name: p.detach() for name, p in model.named_parameters()}  # tied: once
    write_checkpoint(path, asdict(model.config), weights)
