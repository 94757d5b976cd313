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
their size. Modules and parameters have Hugging Face's names, so weights load without a mapping.
"""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from cache import KVQCache
from checkpoint import CheckpointError, read_checkpoint, whole_file

# Attention's inner part: q (..., T, H, hd), k and v (..., T, Hkv, hd) -> (..., T, H, hd)
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]

PREFILL_ROWS = 512  # a long prompt runs through the layers in pieces of this many rows


@dataclass(frozen=True)
class Config:
    """Shape of a Llama; the comments give the key in Hugging Face's config.json.

    Raises CheckpointError, one line, for a shape that no Llama has.
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

    def __post_init__(self):
        for name, (low, high) in RANGES.items():
            value = getattr(self, name)
            kinds = (int,) if isinstance(low, int) else (int, float)
            if type(value) not in kinds or not low <= value <= high:
                kind = "a whole number" if kinds == (int,) else "a number"
                raise _bad(f"{name} must be {kind} from {low} to {high}, not {value!r:.40}")
        if self.n_heads % self.n_kv_heads:
            raise _bad(f"{self.n_heads} heads do not divide into {self.n_kv_heads} key/value heads")
        if self.head_dim % 2:
            raise _bad(f"head_dim must be even for rotary positions, not {self.head_dim}")
        if self.rope_type not in ("default", "linear", "llama3"):
            raise _bad(f"rope type {self.rope_type!r:.40} is none of default, linear and llama3")
        if self.rope_type == "llama3" and self.rope_low_freq_factor >= self.rope_high_freq_factor:
            raise _bad("rope low_freq_factor must be below high_freq_factor")
        if not isinstance(self.tied, bool):
            raise _bad(f"tie_word_embeddings must be true or false, not {self.tied!r:.40}")
        for token in (*self.eos, *(() if self.bos is None else (self.bos,))):
            if type(token) is not int or not 0 <= token < self.vocab_size:
                last = self.vocab_size - 1
                raise _bad(f"a special token must be from 0 to {last}, not {token!r:.40}")


SIZES = "vocab_size dim hidden_dim n_heads n_kv_heads head_dim".split()
FACTORS = ("rope_factor", "rope_low_freq_factor", "rope_high_freq_factor")
RANGES = {  # bounds of fields; whole numbers where the bounds are
    **dict.fromkeys(SIZES, (1, 1 << 20)),  # sizes in bytes stay below 2^63
    **dict.fromkeys(("max_len", "rope_original_len"), (1, 1 << 27)),
    "n_layers": (1, 1024),
    "norm_eps": (1e-12, 1.0),
    "rope_theta": (1.0, 1e12),
    **dict.fromkeys(FACTORS, (1e-3, 1e6)),
}


def _bad(text: str) -> CheckpointError:
    return CheckpointError("config: " + text)


# --------------------------------------
# The model


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension of (..., dim) (1910.07467)."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(dim)), eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


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

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        cache.write(layer, start, k, v)
        keys, values = cache.read(layer, start + rows)
        mixed = F.scaled_dot_product_attention(
            q.transpose(0, 1)[None], keys[None], values[None], attn_mask=mask, enable_gqa=True
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


class Body(nn.Module):
    """There so that names read model.layers.0 and so on, as Hugging Face's do."""

    embed_tokens: nn.Embedding
    layers: Any  # an nn.ModuleList of Layer
    norm: RMSNorm


class Llama(nn.Module):
    """Llama 1, 2 and 3, with an unembedding that every layer can use as an exit."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.model = Body()
        # nn.Embedding(vocab, dim) would draw random weights that a checkpoint then replaces.
        table = torch.zeros(config.vocab_size, config.dim)
        self.model.embed_tokens = nn.Embedding.from_pretrained(table, freeze=False)
        self.model.layers = nn.ModuleList(Layer(config) for _ in range(config.n_layers))
        self.model.norm = RMSNorm(config.dim, config.norm_eps)
        self.lm_head = nn.Linear(config.dim, config.vocab_size, bias=False)
        if config.tied:
            self.lm_head.weight = self.model.embed_tokens.weight
        self.row_attention = row_attention  # exact.pack puts another function here
        self._rotary: tuple[Tensor, Tensor] | None = None

    @property
    def dtype(self) -> torch.dtype:
        """The type of weights, hidden states and logits."""
        return self.model.embed_tokens.weight.dtype

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.model.embed_tokens.weight.device

    def embed(self, tokens: Tensor) -> Tensor:
        """tokens (B, T) or (T,) -> hidden states (B, T, dim) or (T, dim)."""
        return self.model.embed_tokens(tokens)

    def run_layers(
        self, h: Tensor, first: int, last: int, cache: KVQCache | None = None, start: int = 0
    ) -> Tensor:
        """Layers [first, last) on h, the input of layer `first`; returns the input of layer `last`.

        Without a cache, h (B, T, dim) holds whole sequences. With one, h (T, dim) holds rows at
        positions start..start+T-1. They see what the cache holds of earlier positions and leave
        their own keys and values in it.
        """
        cos, sin = self.rotary(start, h.shape[-2])
        if cache is None:
            for layer in self.model.layers[first:last]:
                h = layer(h, cos, sin)
            return h
        attend = self.row_attention(cache, start, len(h))
        for l in range(first, last):
            h = self.model.layers[l](h, cos, sin, partial(attend, l))
        return h

    def unembed(self, h: Tensor) -> Tensor:
        """Hidden states (..., dim) after any layer -> logits (..., vocab): g(.) in LayerSkip."""
        return self.lm_head(self.model.norm(h))

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens (B, T) -> logits (B, T, vocab) of the full model."""
        return self.unembed(self.run_layers(self.embed(tokens), 0, self.config.n_layers))

    def rotary(self, start: int, rows: int) -> tuple[Tensor, Tensor]:
        """cos and [-sin, sin] (rows, 1, hd) for positions from `start`, from a table that grows."""
        end, table = start + rows, self._rotary
        stale = table is None or (table[0].dtype, table[0].device) != (self.dtype, self.device)
        if table is None or stale or len(table[0]) < end:
            length = min(max(1 << (end - 1).bit_length(), 256), max(self.config.max_len, end))
            with torch.inference_mode(False):  # a table made in decoding may serve training later
                positions = torch.arange(length, dtype=torch.float32)
                angle = torch.outer(positions, rotary_frequencies(self.config))
                cos = torch.cat([angle.cos(), angle.cos()], -1)[:, None]
                sin = torch.cat([-angle.sin(), angle.sin()], -1)[:, None]
                table = cos.to(self.device, self.dtype), sin.to(self.device, self.dtype)
            self._rotary = table
        return table[0][start:end], table[1][start:end]


@torch.inference_mode()
def prefill(model: Llama, cache: KVQCache, tokens: list[int]) -> None:
    """Runs tokens through all layers, after the live positions, and makes them live."""
    for first in range(0, len(tokens), PREFILL_ROWS):
        rows = tokens[first : first + PREFILL_ROWS]
        h = model.embed(torch.tensor(rows, device=model.device))
        model.run_layers(h, 0, model.config.n_layers, cache, cache.length)
        cache.accept(len(rows))


# --------------------------------------
# Checkpoints

KEYS = {  # field of Config: key of Hugging Face's config.json
    "vocab_size": "vocab_size",
    "dim": "hidden_size",
    "hidden_dim": "intermediate_size",
    "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads",
    "n_kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "max_len": "max_position_embeddings",
    "norm_eps": "rms_norm_eps",
    "tied": "tie_word_embeddings",
    "bos": "bos_token_id",
}
ROPE_KEYS = {
    "rope_type": "rope_type",
    "rope_factor": "factor",
    "rope_low_freq_factor": "low_freq_factor",
    "rope_high_freq_factor": "high_freq_factor",
    "rope_original_len": "original_max_position_embeddings",
}


def read_config(c: dict) -> Config:
    """Config from the keys of Hugging Face's config.json, as transformers 4 or 5 writes them.

    Raises CheckpointError, one line, where it is none of a Llama that runs here.
    """
    if c.get("model_type") != "llama":
        raise _bad(f"model_type must be 'llama', not {c.get('model_type')!r:.40}")
    for key in ("attention_bias", "mlp_bias", "quantization_config"):
        if c.get(key):
            raise _bad(f"{key} is not supported")
    if c.get("hidden_act", "silu") != "silu":
        raise _bad(f"hidden_act {c['hidden_act']!r:.40} is not supported, only silu")
    rope = c.get("rope_parameters") or c.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise _bad("the rope parameters are not a JSON object")
    found = {name: c[key] for name, key in KEYS.items() if c.get(key) is not None}
    for name in ("vocab_size", "dim", "hidden_dim", "n_layers", "n_heads"):
        if name not in found:
            raise _bad(f"{KEYS[name]} is missing")
    if "head_dim" not in found:
        dim, heads = found["dim"], found["n_heads"]
        if type(dim) is not int or type(heads) is not int or heads < 1 or dim % heads:
            raise _bad(f"hidden_size {dim!r:.40} does not divide into {heads!r:.40} heads")
        found["head_dim"] = dim // heads
    found["rope_type"] = kind = rope.get("rope_type", rope.get("type", "default"))
    found["rope_theta"] = rope.get("rope_theta", c.get("rope_theta", 10000.0))
    wanted = {"linear": ("rope_factor",), "llama3": tuple(ROPE_KEYS)[1:]}
    for name in wanted.get(kind, ()) if isinstance(kind, str) else ():
        if ROPE_KEYS[name] not in rope:
            raise _bad(f"rope {ROPE_KEYS[name]} is missing")
        found[name] = rope[ROPE_KEYS[name]]
    eos = c.get("eos_token_id")
    found["eos"] = tuple(eos) if isinstance(eos, list) else () if eos is None else (eos,)
    return Config(**{"n_kv_heads": found["n_heads"], "norm_eps": 1e-6} | found)


def write_config(config: Config, dtype: torch.dtype) -> dict:
    """The keys of a config.json that transformers 4 and 5 both read."""
    c: dict = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu"}
    c |= {key: getattr(config, name) for name, key in KEYS.items()}
    c |= {"rope_theta": config.rope_theta, "rope_scaling": None}
    if config.rope_type != "default":
        names = ROPE_KEYS if config.rope_type == "llama3" else ("rope_type", "rope_factor")
        c["rope_scaling"] = {ROPE_KEYS[name]: getattr(config, name) for name in names}
    eos = list(config.eos)
    c["eos_token_id"] = None if not eos else eos[0] if len(eos) == 1 else eos
    return c | {"torch_dtype": str(dtype).removeprefix("torch.")}


def load_checkpoint(
    path: str | Path, dtype: torch.dtype | None = None, device: str | torch.device = "cpu"
) -> Llama:
    """A Llama from a directory in Hugging Face's or Meta's layout, in evaluation mode.

    dtype None keeps the stored type. Raises CheckpointError, one line, when the directory does not
    hold a whole, finite Llama in safetensors.
    """
    found, tensors = read_checkpoint(path)
    config = read_config(found)
    if config.tied:
        tensors.pop("lm_head.weight", None)
    with torch.device("meta"):
        model = Llama(config)
    wanted = dict(model.named_parameters())
    for names, what in (
        (wanted.keys() - tensors.keys(), "lacks the tensor"),
        (tensors.keys() - wanted.keys(), "has the unexpected tensor"),
    ):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise CheckpointError(f"{path} {what} {min(names)}{more}")
    for name, parameter in wanted.items():
        stored = tensors[name]
        if stored.shape != parameter.shape:
            expected = tuple(parameter.shape)
            raise CheckpointError(f"{path}: {name} is {stored.shape}, the config says {expected}")
    for name in wanted:
        weight = tensors[name].read().to(device, dtype)
        module, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(module), leaf, nn.Parameter(weight))
    if config.tied:
        model.lm_head.weight = model.model.embed_tokens.weight
    return model.eval()


def save_checkpoint(model: Llama, path: str | Path) -> None:
    """Writes config.json and model.safetensors, each whole or not at all; transformers reads them.

    Raises ValueError for a packed model, which has no plain weights.
    """
    if not isinstance(model.lm_head, nn.Linear):
        raise ValueError("a packed model has no plain weights: save it before exact.pack")
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    weights = {name: p.detach().cpu().contiguous() for name, p in model.named_parameters()}
    with whole_file(path / "model.safetensors") as file:  # tied weights are there once
        save_file(weights, file.name, metadata={"format": "pt"})
    with whole_file(path / "config.json") as file:
        text = json.dumps(write_config(model.config, model.dtype), indent=2)
        file.write(text.encode() + b"\n")
