"""A Llama in one file, with the three verbs that LayerSkip needs.

    embed(tokens)                        (B, T) -> (B, T, dim)
    run_layers(h, first, last, ...)      layers [first, last), over a batch or over a KVQ cache
    unembed(h)                           (..., dim) -> (..., vocab): final norm and head, the g(.) of LayerSkip

Plain decoding is embed, run_layers(0, L), unembed. Early exit is run_layers(0, E), unembed. Self-speculation drafts with
run_layers(0, E) and verifies with run_layers(E, L). (LayerSkip, arXiv 2404.16710, section 4.)

Two kinds of pass go through the same layers:

    a batch of sequences   h is (B, T, dim), no cache: training, evaluation, reference logits
    rows over a cache      h is (T, dim), rows at consecutive positions of one sequence: prefill and decoding

Rows are where exactness lives. A row's result must not depend on how many rows share the pass, on their content, or on
its place among them; then drafting and verifying in any grouping gives the bits that plain decoding gives. Everything
that is not row-wise by nature is made so here: matrix products in `RowLinear`, attention in `row_attention`.
"""

import json
import math
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from cache import KVQCache

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]  # attention's inner part, from q (..., T, H, hd), k and v (..., T, Hkv, hd) to (..., T, H, hd)
Product = Callable[[Tensor], Tensor]  # x (T, in) -> x W^T (T, out)

MAX_ROWS = 16  # the most rows of one decoding pass that is held to the bit; longer passes are prefill
PREFILL_ROWS = 512  # a long prompt runs through the layers in pieces of this many rows, to bound memory


class CheckpointError(ValueError):
    """A checkpoint that cannot be used, in one line: what is wrong and what to do."""


def auto_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where the hardware multiplies it, else float32."""
    if device.type == "cuda":
        return torch.bfloat16
    return torch.bfloat16 if torch.ops.mkldnn._is_mkldnn_bf16_supported() else torch.float32


# ---------------------------------------------------------------------------------------------------------------------
# Configuration


@dataclass(frozen=True)
class Config:
    """Shape of a Llama. The comments give the key in Hugging Face's config.json. Shapes that no Llama has are refused (CheckpointError)."""

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
    rope_type: str = "default"  # or "linear" (Code Llama's long contexts) or "llama3" (Llama 3.1 and 3.2)
    rope_factor: float = 1.0
    rope_low_freq_factor: float = 1.0
    rope_high_freq_factor: float = 4.0
    rope_original_len: int = 8192  # original_max_position_embeddings
    tied: bool = False  # tie_word_embeddings
    bos: int | None = None  # bos_token_id
    eos: tuple[int, ...] = field(default=())  # eos_token_id: one or a list

    def __post_init__(self):
        counts = ("vocab_size", "dim", "hidden_dim", "n_layers", "n_heads", "n_kv_heads", "head_dim", "max_len", "rope_original_len")
        for name in counts:
            value, most = getattr(self, name), 1 << (10 if name == "n_layers" else 27)
            if type(value) is not int or not 1 <= value <= most:
                raise CheckpointError(f"config: {name} must be a whole number from 1 to {most}, not {value!r:.40}")
        for name in ("norm_eps", "rope_theta", "rope_factor", "rope_low_freq_factor", "rope_high_freq_factor"):
            value = getattr(self, name)
            if type(value) not in (int, float) or not 0 < value < math.inf:
                raise CheckpointError(f"config: {name} must be a positive number, not {value!r:.40}")
        if self.n_heads % self.n_kv_heads:
            raise CheckpointError(f"config: {self.n_heads} heads do not divide into {self.n_kv_heads} key/value heads")
        if self.head_dim % 2:
            raise CheckpointError(f"config: head_dim must be even for rotary positions, not {self.head_dim}")
        if self.rope_type not in ("default", "linear", "llama3"):
            raise CheckpointError(f"config: rope type {self.rope_type!r:.40} is not supported, only default, linear and llama3")
        if self.rope_type == "llama3" and self.rope_low_freq_factor >= self.rope_high_freq_factor:
            raise CheckpointError("config: rope low_freq_factor must be below high_freq_factor")
        if not isinstance(self.tied, bool):
            raise CheckpointError(f"config: tie_word_embeddings must be true or false, not {self.tied!r:.40}")
        for token in (*self.eos, *(() if self.bos is None else (self.bos,))):
            if type(token) is not int or not 0 <= token < self.vocab_size:
                raise CheckpointError(f"config: a special token must be from 0 to {self.vocab_size - 1}, not {token!r:.40}")

    @classmethod
    def from_json(cls, text: str) -> "Config":
        """Config from the text of a Hugging Face config.json, in the dialect of transformers 4 or 5. CheckpointError, one line, where
        it is none of a Llama that runs here."""
        c = parse_object(text, "config.json")
        if c.get("model_type") != "llama":
            raise CheckpointError(f"config.json: model_type must be 'llama', not {c.get('model_type')!r:.40}")
        for key in ("attention_bias", "mlp_bias", "quantization_config"):
            if c.get(key):
                raise CheckpointError(f"config.json: {key} is not supported")
        if c.get("hidden_act", "silu") != "silu":
            raise CheckpointError(f"config.json: hidden_act {c['hidden_act']!r:.40} is not supported, only silu")
        rope = c.get("rope_parameters") or c.get("rope_scaling") or {}
        if not isinstance(rope, dict):
            raise CheckpointError("config.json: the rope parameters are not a JSON object")
        try:
            dim, heads, eos = c["hidden_size"], c["num_attention_heads"], c.get("eos_token_id")
            if c.get("head_dim") is None and dim % heads:
                raise CheckpointError(f"config: hidden_size {dim} does not divide into {heads} heads")
            kind: Any = rope.get("rope_type", rope.get("type", "default"))
            scaling: dict[str, Any] = {}
            if kind != "default":
                scaling = {"rope_factor": rope["factor"]}
            if kind == "llama3":
                scaling["rope_low_freq_factor"], scaling["rope_high_freq_factor"] = rope["low_freq_factor"], rope["high_freq_factor"]
                scaling["rope_original_len"] = rope["original_max_position_embeddings"]
            return cls(
                vocab_size=c["vocab_size"],
                dim=dim,
                hidden_dim=c["intermediate_size"],
                n_layers=c["num_hidden_layers"],
                n_heads=heads,
                n_kv_heads=heads if c.get("num_key_value_heads") is None else c["num_key_value_heads"],
                head_dim=dim // heads if c.get("head_dim") is None else c["head_dim"],
                max_len=c.get("max_position_embeddings", 2048),
                norm_eps=c.get("rms_norm_eps", 1e-6),
                rope_theta=rope.get("rope_theta", c.get("rope_theta", 10000.0)),
                rope_type=kind,
                **scaling,
                tied=c.get("tie_word_embeddings", False),
                bos=c.get("bos_token_id"),
                eos=tuple(eos) if isinstance(eos, list) else () if eos is None else (eos,),
            )
        except KeyError as error:
            raise CheckpointError(f"config.json has no {error}") from None
        except (TypeError, ZeroDivisionError) as error:
            raise CheckpointError(f"config.json has a value of the wrong kind: {error}") from None

    @classmethod
    def from_params(cls, text: str, vocab_size: int, tied: bool) -> "Config":
        """Config from the text of Meta's params.json, which leaves out the vocabulary (or says -1), the context and the
        scale of rope: these follow from the rope settings of the models that were published. CheckpointError as in from_json."""
        c = parse_object(text, "params.json")
        if c.get("quantization_args") or c.get("moe") or c.get("vision_chunk_size"):
            raise CheckpointError("params.json: only dense text models without quantisation are supported")
        try:
            dim, heads, theta = c["dim"], c["n_heads"], c.get("rope_theta", 10000.0)
            hidden = int(c.get("ffn_dim_multiplier", 1) * int(2 * 4 * dim / 3))
            scaled = bool(c.get("use_scaled_rope", False))
            if dim % heads:
                raise CheckpointError(f"params.json: dim {dim} does not divide into {heads} heads")
            return cls(
                vocab_size=vocab_size,
                dim=dim,
                hidden_dim=-(-hidden // c["multiple_of"]) * c["multiple_of"],
                n_layers=c["n_layers"],
                n_heads=heads,
                n_kv_heads=heads if c.get("n_kv_heads") is None else c["n_kv_heads"],
                head_dim=dim // heads,
                max_len=131072 if scaled else {10000.0: 4096, 1e6: 16384, 5e5: 8192}.get(theta, 4096),
                norm_eps=c["norm_eps"],
                rope_theta=theta,
                rope_type="llama3" if scaled else "default",
                rope_factor=c.get("rope_scaling_factor", 8.0 if dim >= 4096 else 32.0) if scaled else 1.0,  # Llama 3.1; 3.2
                tied=tied,
            )
        except KeyError as error:
            raise CheckpointError(f"params.json has no {error}") from None
        except (TypeError, ValueError, ZeroDivisionError, OverflowError) as error:
            raise CheckpointError(f"params.json has a value of the wrong kind: {error}") from None

    def to_json(self, dtype: torch.dtype) -> str:
        """The text of a config.json that transformers 4 and 5 both read."""
        scaling = {"rope_type": self.rope_type, "factor": self.rope_factor}
        if self.rope_type == "llama3":
            scaling.update(low_freq_factor=self.rope_low_freq_factor, high_freq_factor=self.rope_high_freq_factor)
            scaling.update(original_max_position_embeddings=self.rope_original_len)
        return json.dumps(
            {
                "architectures": ["LlamaForCausalLM"],
                "model_type": "llama",
                "vocab_size": self.vocab_size,
                "hidden_size": self.dim,
                "intermediate_size": self.hidden_dim,
                "num_hidden_layers": self.n_layers,
                "num_attention_heads": self.n_heads,
                "num_key_value_heads": self.n_kv_heads,
                "head_dim": self.head_dim,
                "hidden_act": "silu",
                "max_position_embeddings": self.max_len,
                "rms_norm_eps": self.norm_eps,
                "rope_theta": self.rope_theta,
                "rope_scaling": None if self.rope_type == "default" else scaling,
                "tie_word_embeddings": self.tied,
                "bos_token_id": self.bos,
                "eos_token_id": None if not self.eos else self.eos[0] if len(self.eos) == 1 else list(self.eos),
                "torch_dtype": str(dtype).removeprefix("torch."),
            },
            indent=2,
        )


def parse_object(text: str, name: str) -> dict:
    """A JSON object from text; CheckpointError says which file is not one."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{name} is not JSON: {error}") from None
    if not isinstance(found, dict):
        raise CheckpointError(f"{name} is not a JSON object")
    return found


# ---------------------------------------------------------------------------------------------------------------------
# Matrix products whose rows do not see each other


def safe_rows(make_product: Callable[[Tensor], Product], weight: Tensor) -> int:
    """Smallest M such that make_product(weight), weight (out, in), gives each row the same bits at every row count from M to MAX_ROWS.

    BLAS picks its kernel, and with it the order of summation, by the number of rows. Which counts agree depends on the
    library and on the processor, so it is measured on the machine at hand, with every place in a pass. The probe's terms
    cancel in pairs, so that nothing is left of a sum but its rounding errors: with ordinary numbers another order shows
    in one bfloat16 result of 5,000, with these in nearly all. (A very long weight, a head, is probed as it is.)
    Seen so far: bfloat16 and oneDNN's packed float32 agree from 1 or 2 on, MKL's float32 only at MAX_ROWS itself, and
    MKL where rows are not aligned (12 columns of float64) nowhere. 0 says so: then each row must run alone.
    """
    out_features, in_features = weight.shape
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(in_features, generator=generator)
    first, second, left_over = order.tensor_split((in_features // 2, in_features // 2 * 2))

    def draw(rows: int, sign: float) -> Tensor:
        x = torch.randn(rows, in_features, generator=generator, dtype=torch.float64)  # products of float32 numbers are exact in float64
        x[:, second] = sign * x[:, first]
        x[:, left_over] = 0
        return x.to(weight.device, weight.dtype)

    product = make_product(weight if out_features > 1 << 14 else draw(out_features, -1.0))
    smallest = 1
    for _ in range(1 + 64 // out_features):  # few outputs show few differences: try more inputs
        x = draw(MAX_ROWS, 1.0)
        full = product(x)
        if not all(torch.equal(product(x.roll(by, 0)).roll(-by, 0), full) for by in (1, 2, MAX_ROWS // 2)):
            return 0
        for rows in range(MAX_ROWS - 1, smallest - 1, -1):
            starts = [*range(0, MAX_ROWS - rows, rows), MAX_ROWS - rows]
            if not all(torch.equal(product(x[i : i + rows]), full[i : i + rows]) for i in starts):
                smallest = rows + 1
                break
    return smallest


def linear_product(weight: Tensor) -> Product:
    """x -> x W^T in PyTorch's own layout, for a weight (out, in)."""
    return lambda x: F.linear(x, weight)


def packed_product(weight: Tensor) -> Product:
    """x -> x W^T with the weight (out, in) copied once into oneDNN's blocked layout."""
    packed, linear = torch.ops.mkldnn._reorder_linear_weight(weight), torch.ops.mkldnn._linear_pointwise
    return lambda x: linear(x, packed, None, "none", [], "")


def transposed_product(weight: Tensor) -> Product:
    """x -> x W^T with the weight (out, in) copied once into columns, (in, out): one row of a small layer is a quarter faster."""
    columns = weight.t().contiguous()
    return lambda x: x @ columns


def batched_product(weight: Tensor) -> Product:
    """transposed_product of a weight (out, in), where 2 to MAX_ROWS rows are a batch of products of one row each."""
    columns = weight.t().contiguous()

    def product(x: Tensor) -> Tensor:
        if x.dim() > 2 or not 1 < x.shape[0] <= MAX_ROWS:
            return x @ columns
        bmm = torch.ops.layerskip.row_bmm if torch.compiler.is_compiling() else torch.bmm  # a compiler would write a slower one of its own
        return bmm(x.unsqueeze(1), columns.expand(x.shape[0], -1, -1)).squeeze(1)

    return product


class RowLinear:
    """x (T, in) -> (T, out), one or several linear layers of the same input in one product, row by row the same bits.

    On a CPU the weight is packed once into oneDNN's blocked layout, which is both faster than the plain layout and less
    sensitive to the number of rows (2048 x 8192 on a Zen 4 pair of cores, bfloat16: 0.54 ms against 1.67 for one row, 1.2
    against 1.8 for eight). A call of it costs 20 microseconds before it multiplies, though: a float32 weight of up to SMALL
    bytes goes row by row through MKL (the products of 24 layers of 192 on a Zen 3 pair: one row 2.7 to 3.4 ms against 3.9 to 6,
    five 5.2 against 4.4, nine 6.8 against 5.2; drafts and plain decoding run one row at a time). A pass with fewer rows than `safe_rows` is padded up to it.
    """

    SMALL = 1 << 20
    probed: ClassVar[dict[tuple, int]] = {}
    number: int  # what compiled code calls it by, see compiled.py

    def __init__(self, *layers: nn.Linear, exact: bool = True):
        weight = layers[0].weight if len(layers) == 1 else torch.cat([layer.weight for layer in layers])
        weight = weight.detach()
        self.shape, self.dtype, self.device = tuple(weight.shape), weight.dtype, weight.device
        on_cpu = self.device.type == "cpu" and torch.backends.mkldnn.is_available()
        small = on_cpu and self.dtype in (torch.float32, torch.float64) and weight.nbytes <= self.SMALL
        ways = [linear_product]
        if on_cpu and self.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported():
            ways = [packed_product]
        elif small and not exact:
            ways = [transposed_product]
        elif on_cpu and self.dtype == torch.float32 and exact:
            ways = [batched_product, packed_product] if small else [packed_product]
        elif small:
            ways = [batched_product, linear_product]
        for way in ways:  # the first whose rows need no padding, or the last
            self.take(way, weight, exact)
            if self.min_rows == 1:
                break

    def take(self, way: Callable[[Tensor], Product], weight: Tensor, exact: bool = True) -> None:
        """Multiplies by weight (out, in) in this way from now on."""
        self.min_rows = self.probed_rows(way, weight) if exact else 1
        self.way, self.product = way, way(weight)
        self.plain = weight if way is linear_product else None  # the others have a copy of their own
        self.open = self.min_rows == 1 and way in (linear_product, batched_product)  # a compiler can see what it does

    def probed_rows(self, way: Callable[[Tensor], Product], weight: Tensor) -> int:
        """safe_rows of a kind of product for a weight (out, in) of this shape, probed once in a process."""
        key = (way, self.shape, self.dtype, str(self.device), torch.get_num_threads())
        if key not in self.probed:
            self.probed[key] = safe_rows(way, weight)
        return self.probed[key]

    def __call__(self, x: Tensor) -> Tensor:
        if torch.compiler.is_compiling() and not self.open:
            return torch.ops.layerskip.row_linear(x, self.number, self.shape[0])
        short = self.min_rows - x.shape[0]
        if x.dim() > 2 or x.shape[0] > MAX_ROWS:
            return self.product(x)
        if self.min_rows == 0:
            return torch.cat([self.product(row.clone()) for row in x.split(1)])  # a clone is aligned, a slice may not be
        if short <= 0:
            return self.product(x)
        return self.product(F.pad(x, (0, 0, 0, short)))[: x.shape[0]]


# ---------------------------------------------------------------------------------------------------------------------
# Attention: the only place where positions meet


def rotary_frequencies(c: Config) -> Tensor:
    """Angle per position of each pair of a head, (head_dim / 2,) float32. (RoFormer, arXiv 2104.09864; position
    interpolation, 2306.15595; Llama 3.1, 2407.21783, which slows only the pairs that turn seldom.)"""
    frequency = 1.0 / c.rope_theta ** (torch.arange(0, c.head_dim, 2, dtype=torch.float32) / c.head_dim)
    if c.rope_type == "linear":
        return frequency / c.rope_factor
    if c.rope_type == "llama3":
        turns = c.rope_original_len / (2 * math.pi / frequency)  # over the original context
        low, high = c.rope_low_freq_factor, c.rope_high_freq_factor
        share = ((turns - low) / (high - low)).clamp(0, 1)  # of the original frequency
        return (1 - share) * frequency / c.rope_factor + share * frequency
    return frequency


def rotary_tables(config: Config, length: int) -> tuple[Tensor, Tensor]:
    """cos and signed sin (length, head_dim), float32, so that rotate(x) = x cos + swap(x) sin."""
    angle = torch.outer(torch.arange(length, dtype=torch.float32), rotary_frequencies(config))
    return torch.cat([angle.cos(), angle.cos()], -1), torch.cat([-angle.sin(), angle.sin()], -1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions on x (..., T, heads, head_dim), halves paired as Hugging Face pairs them; cos, sin (T, 1, head_dim)."""
    return x * cos + x.roll(x.shape[-1] // 2, -1) * sin


def batch_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention of whole sequences: q (B, T, H, hd), k and v (B, T, Hkv, hd) -> (B, T, H, hd)."""
    group = q.shape[2] // k.shape[2]
    q, k, v = (x.transpose(1, 2) for x in (q, k.repeat_interleave(group, 2), v.repeat_interleave(group, 2)))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)


@lru_cache(maxsize=4)
def causal_line(length: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """`length` zeros, then as many -inf (2 * length,): read from length - 1 - p on, it is the mask row of position p."""
    with torch.inference_mode(False):
        return torch.cat([torch.zeros(length, dtype=dtype, device=device), torch.full((length,), -math.inf, dtype=dtype, device=device)])


class CachedAttention:
    """Attention of T rows at positions start..start+T-1 over a KVQ cache, the same for every layer of one pass.

    Exact passes (T <= MAX_ROWS) treat the rows as a *batch* of single-row queries over the one cache: keys and values are
    expanded, not copied, each row has its own mask row, and a row at position p sees a view of the cache whose length
    depends on p alone (the next multiple of cache.VIEW). So every row meets the same shapes whichever pass computes it.
    The query heads that share a key/value head are the rows of its small matrix products; they are padded to a multiple
    of 8, so that every operand and every thread's scratch memory starts on 64 bytes: MKL's order of summation depends on
    alignment, and on whether a product has one row. A single row of a model with a single key/value head runs twice:
    alone it would not be spread over threads, and MKL would split its products between threads instead.

    Other passes, prefill and exact=False, are one ordinary attention with a causal mask.
    """

    def __init__(self, cache: KVQCache, start: int, rows: int, dtype: torch.dtype, exact: bool):
        self.cache, self.start, self.rows = cache, start, rows
        self.row_by_row = exact and rows <= MAX_ROWS
        view = cache.view_len(start + rows) if self.row_by_row else start + rows
        line, middle = causal_line(cache.max_len, dtype, cache.keys.device), cache.max_len - 1
        masks = [line[middle - p : middle - p + view] for p in range(start, start + rows)]
        self.mask = masks[0][None] if rows == 1 else torch.stack(masks)
        if self.row_by_row:
            self.slices = []  # rows that share a view length run together
            first = 0
            while first < rows:
                view = cache.view_len(start + first + 1)
                last = min(rows, view - start)
                count = max(last - first, 2 if cache.keys.shape[1] == 1 else 1)
                self.slices.append((first, last, *cache.share(view, count), self.mask[first:last, None, None, :view]))
                first = last

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Writes k, v (T, Hkv, hd) into the cache, attends with q (T, H, hd); returns (T, H, hd)."""
        rows, heads, head_dim = q.shape
        if self.row_by_row:
            return gather_heads(self.attend_rows(layer, spread_heads(q, k.shape[1]), k, v), heads)
        groups = k.shape[1]
        self.cache.write(layer, self.start, k, v)
        keys, values = self.cache.read(layer, self.start + rows)
        q = q.view(rows, groups, -1, head_dim).permute(1, 2, 0, 3).reshape(1, groups, -1, head_dim)  # heads that share keys: more query rows
        mask = self.mask.repeat(heads // groups, 1)
        mixed = F.scaled_dot_product_attention(q, keys[None], values[None], attn_mask=mask)
        return mixed.view(heads, rows, head_dim).transpose(0, 1)

    def attend_rows(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """The exact form: q (T, Hkv, G, hd) as spread_heads makes it, k and v (T, Hkv, hd) -> (T, Hkv, G, hd)."""
        self.cache.write(layer, self.start, k, v)
        out = []
        for first, last, keys, values, mask in self.slices:
            part = q[first:last].expand(keys[layer].shape[0], -1, -1, -1)
            out.append(F.scaled_dot_product_attention(part, keys[layer], values[layer], attn_mask=mask)[: last - first])
        return out[0] if len(out) == 1 else torch.cat(out)


def spread_heads(q: Tensor, groups: int) -> Tensor:
    """q (T, H, hd) by key/value head, (T, Hkv, G, hd): G heads share one, H / Hkv padded with zeros to a multiple of 8."""
    q = q.unflatten(1, (groups, -1))
    if torch.compiler.is_compiling():
        return F.pad(q, (0, 0, 0, -q.shape[2] % 8)).contiguous()
    return torch.cat((q, no_heads(q.shape[0], groups, -q.shape[2] % 8, q.shape[3], q.dtype, q.device)), 2)


@lru_cache(maxsize=4 * MAX_ROWS)
def no_heads(rows: int, groups: int, heads: int, head_dim: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros (rows, groups, heads, head_dim), made once: a third of the time of F.pad, which fills and copies."""
    with torch.inference_mode(False):
        return torch.zeros(rows, groups, heads, head_dim, dtype=dtype, device=device)


def gather_heads(mixed: Tensor, heads: int) -> Tensor:
    """(T, H, hd) from (T, Hkv, G, hd), undoing spread_heads."""
    return mixed[:, :, : heads // mixed.shape[1]].flatten(1, 2)


# ---------------------------------------------------------------------------------------------------------------------
# The model. Module and parameter names are Hugging Face's, so that a safetensors file loads and saves without a mapping.


def joint_linear(x: Tensor, *layers: nn.Linear) -> Tensor:
    """Several linear layers of the same input x (..., in) as one product, side by side."""
    return F.linear(x, torch.cat([layer.weight for layer in layers]))


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last dimension (Zhang and Sennrich, arXiv 1910.07467). Input and output (..., dim).

    Packed, on a CPU: x / sqrt(|x|^2 + n eps) * sqrt(n) w, which is four operations; F.rms_norm is seven there, of which two norms a
    layer took a seventh of a small model's step.
    """

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(dim)), eps
        self.packed: tuple[Tensor, Tensor] | None = None  # sqrt(n eps) () and sqrt(n) w (dim,), at least float32

    def pack(self) -> None:
        """Prepares for decoding; the weight must not change or move after it."""
        if self.weight.device.type == "cpu":
            wide = torch.promote_types(self.weight.dtype, torch.float32)
            scale = math.sqrt(self.weight.shape[0])
            self.packed = torch.tensor(scale * math.sqrt(self.eps), dtype=wide), scale * self.weight.detach().to(wide)

    def forward(self, x: Tensor) -> Tensor:
        if not self.packed or torch.compiler.is_compiling():
            return F.rms_norm(x, self.weight.shape, self.weight, self.eps)
        floor, weight = self.packed
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=weight.dtype)
        return (x / torch.hypot(norm, floor) * weight).to(x.dtype)


class Attention(nn.Module):
    """Grouped-query attention with rotary positions. Input and output (..., T, dim)."""

    def __init__(self, c: Config):
        super().__init__()
        self.heads = (c.n_heads, c.n_kv_heads, c.n_kv_heads)
        self.head_dim = c.head_dim
        self.q_proj = nn.Linear(c.dim, c.n_heads * c.head_dim, bias=False)
        self.k_proj = nn.Linear(c.dim, c.n_kv_heads * c.head_dim, bias=False)
        self.v_proj = nn.Linear(c.dim, c.n_kv_heads * c.head_dim, bias=False)
        self.o_proj = nn.Linear(c.n_heads * c.head_dim, c.dim, bias=False)
        self.qkv: RowLinear | None = None  # set by Llama.pack, as is out
        self.out: RowLinear | None = None

    def project(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (..., T, H, hd), keys and values (..., T, Hkv, hd) of rows at their positions."""
        qkv = self.qkv(x) if self.qkv else joint_linear(x, self.q_proj, self.k_proj, self.v_proj)
        n_heads, n_kv_heads, _ = self.heads
        qk, v = qkv.unflatten(-1, (-1, self.head_dim)).split((n_heads + n_kv_heads, n_kv_heads), -2)
        q, k = rotate(qk, cos, sin).split((n_heads, n_kv_heads), -2)
        return q, k, v

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, attend: Attend) -> Tensor:
        return (self.out or self.o_proj)(attend(*self.project(x, cos, sin)).flatten(-2))


def row_silu(gate: Tensor) -> Tensor:
    """SiLU whose rows do not see each other. gate (..., T, hidden_dim) is a strided view: half of each row of gate and up.

    PyTorch's vector loops end in a scalar tail that rounds differently. Over strided rows each row has its own tail,
    always at its end; but from 32768 elements on the range is cut between threads wherever it falls, so rows go singly.
    """
    if not torch.compiler.is_compiling() and gate.dim() == 2 and gate.shape[0] <= MAX_ROWS and gate.numel() >= 32768:
        return torch.stack([F.silu(row) for row in gate])
    return F.silu(gate)


class MLP(nn.Module):
    """SwiGLU (Shazeer, arXiv 2002.05202). Input and output (..., T, dim)."""

    def __init__(self, c: Config):
        super().__init__()
        self.gate_proj = nn.Linear(c.dim, c.hidden_dim, bias=False)
        self.up_proj = nn.Linear(c.dim, c.hidden_dim, bias=False)
        self.down_proj = nn.Linear(c.hidden_dim, c.dim, bias=False)
        self.gate_up: RowLinear | None = None  # set by Llama.pack, as is down
        self.down: RowLinear | None = None

    def forward(self, x: Tensor) -> Tensor:
        gate_up = self.gate_up(x) if self.gate_up else joint_linear(x, self.gate_proj, self.up_proj)
        gate, up = gate_up.chunk(2, -1)
        return (self.down or self.down_proj)(row_silu(gate) * up)


class Layer(nn.Module):
    """One transformer layer: x + f_l(x) of the LayerSkip paper. Input and output (..., T, dim)."""

    def __init__(self, c: Config):
        super().__init__()
        self.input_layernorm = RMSNorm(c.dim, c.norm_eps)
        self.self_attn = Attention(c)
        self.post_attention_layernorm = RMSNorm(c.dim, c.norm_eps)
        self.mlp = MLP(c)

    def forward(self, h: Tensor, cos: Tensor, sin: Tensor, attend: Attend = batch_attention) -> Tensor:
        h = h + self.self_attn(self.input_layernorm(h), cos, sin, attend)
        return h + self.mlp(self.post_attention_layernorm(h))


class Body(nn.Module):
    """The level that Hugging Face's parameter names have between a Llama and its layers: Llama fills it and runs it."""

    embed_tokens: nn.Embedding
    layers: Any  # an nn.ModuleList, whose type does not say that it holds a Layer each
    norm: RMSNorm


class Llama(nn.Module):
    """Llama 1, 2 and 3 with an unembedding that every layer can use as an exit."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.model = Body()
        # Embedding(vocab, dim) would draw random weights, which imports the compiler where there is no memory yet (1.4 s)
        self.model.embed_tokens = nn.Embedding.from_pretrained(torch.zeros(config.vocab_size, config.dim), freeze=False)
        self.model.layers = nn.ModuleList(Layer(config) for _ in range(config.n_layers))
        self.model.norm = RMSNorm(config.dim, config.norm_eps)
        self.lm_head = nn.Linear(config.dim, config.vocab_size, bias=False)
        if config.tied:
            self.lm_head.weight = self.model.embed_tokens.weight
        self.head: RowLinear | None = None  # set by pack, as is exact
        self.exact = True
        self.compiled: Callable[..., Tensor] | None = None  # set by compile_passes in compiled.py
        self._rotary: tuple[Tensor, Tensor] | None = None

    @property
    def dtype(self) -> torch.dtype:
        """The type of weights, hidden states and logits."""
        return self.model.embed_tokens.weight.dtype

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.model.embed_tokens.weight.device

    def pack(self, exact: bool = True) -> "Llama":
        """Turns the model, in place, into one that only decodes: fused and packed products, and the promise `exact`.

        The plain weights are let go as their packed copies are made, so memory holds one set, and the model no longer
        trains or saves. exact=True: decoding passes give a row the same bits whatever else is in the pass. exact=False
        takes the fastest products and attention for the row count at hand; speculative text may then differ from
        plain text where two tokens nearly tie. Returns the model; a second call does nothing.
        """
        if self.head is not None:
            return self
        for layer in self.model.layers:
            a, m = layer.self_attn, layer.mlp
            a.qkv, a.out = RowLinear(a.q_proj, a.k_proj, a.v_proj, exact=exact), RowLinear(a.o_proj, exact=exact)
            m.gate_up, m.down = RowLinear(m.gate_proj, m.up_proj, exact=exact), RowLinear(m.down_proj, exact=exact)
            del a.q_proj, a.k_proj, a.v_proj, a.o_proj, m.gate_proj, m.up_proj, m.down_proj
            layer.input_layernorm.pack()
            layer.post_attention_layernorm.pack()
        self.model.norm.pack()
        self.head, self.exact = RowLinear(self.lm_head, exact=exact), exact
        del self.lm_head
        return self

    def rotary(self, start: int, rows: int) -> tuple[Tensor, Tensor]:
        """cos and sin (rows, 1, head_dim) for positions from `start`, in the model's dtype, from a table that grows."""
        end, table = start + rows, self._rotary
        if table is None or len(table[0]) < end or table[0].dtype != self.dtype or table[0].device != self.device:
            length = min(max(1 << (end - 1).bit_length(), 256), max(self.config.max_len, end))
            with torch.inference_mode(False):  # a table made while decoding may serve training later
                cos, sin = (x[:, None].to(self.device, self.dtype) for x in rotary_tables(self.config, length))
            self._rotary = table = cos, sin
        return table[0][start:end], table[1][start:end]

    def embed(self, tokens: Tensor) -> Tensor:
        """tokens (B, T) or (T,) -> hidden states (B, T, dim) or (T, dim)."""
        return self.model.embed_tokens(tokens)

    def run_layers(self, h: Tensor, first: int, last: int, cache: KVQCache | None = None, start: int = 0, seen: dict | None = None) -> Tensor:
        """Layers [first, last) on h, the input of layer `first`; returns the input of layer `last`, the same shape.

        Without a cache: h (B, T, dim), whole sequences. With one: h (T, dim), rows at positions start..start+T-1 that see
        what the cache holds of earlier positions and leave their own keys and values in it. Of the numbers of layers that are
        keys of `seen`, those that are reached get the hidden states behind so many layers.
        """
        cos, sin = self.rotary(start, h.shape[-2])
        if cache is None:
            for layer in self.model.layers[first:last]:
                h = layer(h, cos, sin)
            return h
        attention = CachedAttention(cache, start, h.shape[0], h.dtype, self.exact)
        if self.compiled and h.shape[0] <= MAX_ROWS:
            return self.compiled(h, cos, sin, first, last, attention, seen)
        for index in range(first, last):
            h = self.model.layers[index](h, cos, sin, lambda q, k, v: attention(index, q, k, v))
            if seen and index + 1 in seen:
                seen[index + 1] = h
        return h

    def fill_layers(self, h: Tensor, first: int, last: int, cache: KVQCache, start: int) -> None:
        """Leaves keys and values of layers [first, last) for rows h (T, dim) that skip them, as if h entered each of them.

        For lossy early exit alone: later rows find something to attend to (state propagation, CALM, arXiv 2207.07061).
        """
        cos, sin = self.rotary(start, h.shape[0])
        for index in range(first, last):
            layer = self.model.layers[index]
            _, k, v = layer.self_attn.project(layer.input_layernorm(h), cos, sin)
            cache.write(index, start, k, v)

    def keep_layers(self, kept: list[int]) -> "Llama":
        """Leaves only these layers, in place: LayerDrop's pruning at inference (arXiv 1909.11556, section 3.2). Lossy. Raises ValueError
        unless they rise and exist."""
        if not kept or kept != sorted(set(kept)) or not 0 <= kept[0] <= kept[-1] < self.config.n_layers:
            raise ValueError(f"the layers to keep must rise from 0 to at most {self.config.n_layers - 1}, not {kept}")
        self.model.layers = nn.ModuleList(self.model.layers[l] for l in kept)
        self.config = replace(self.config, n_layers=len(kept))
        return self

    def unembed(self, h: Tensor) -> Tensor:
        """Hidden states (..., dim) after any layer -> logits (..., vocab): g(.) in LayerSkip, final norm then head."""
        return (self.head or self.lm_head)(self.model.norm(h))

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens (B, T) -> logits (B, T, vocab) of the full model."""
        return self.unembed(self.run_layers(self.embed(tokens), 0, self.config.n_layers))


@torch.inference_mode()
def prefill(model: Llama, cache: KVQCache, tokens: list[int], depth: int) -> None:
    """Runs tokens through the first `depth` layers after the live positions, PREFILL_ROWS at a time, and makes them live."""
    for first in range(0, len(tokens), PREFILL_ROWS):
        piece = tokens[first : first + PREFILL_ROWS]
        model.run_layers(model.embed(torch.tensor(piece, device=model.device)), 0, depth, cache, cache.length)
        cache.accept(len(piece))


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints: Hugging Face's layout (config.json, model.safetensors or shards) and Meta's (params.json, consolidated.*)

PIECE = 32 << 20  # bytes read from a weight file at a time


def load_checkpoint(path: str | Path, dtype: torch.dtype | None = None, device: str | torch.device = "cpu") -> Llama:
    """A Llama from a directory, in Hugging Face's or Meta's layout. dtype None keeps the stored type.

    Weights stream from the file into place, a piece at a time, and are cast as they land. Meta's shards are joined
    and its q and k rows permuted from interleaved to half-split rotary pairs. Raises CheckpointError, one line, when the
    directory does not hold a whole, finite Llama in safetensors.
    """
    path = Path(path)
    if not path.is_dir():
        raise CheckpointError(f"no checkpoint directory at {path}")
    meta = not (path / "config.json").exists() and (path / "params.json").exists()
    text = _read_text(path / ("params.json" if meta else "config.json"))
    config = None if meta else Config.from_json(text)
    sources = _find_tensors(_meta_files(path) if meta else _weight_files(path), _meta_name if meta else lambda name: name)
    if config is None:
        embedding, head = sources.get("model.embed_tokens.weight"), sources.get("lm_head.weight")
        if not embedding or len(embedding[0].shape) != 2:
            raise CheckpointError(f"{path} lacks the tensor tok_embeddings.weight")
        # Llama 2 shards the embedding along dim, Llama 3 along the vocabulary
        by_rows = embedding[0].shape[1] == parse_object(text, "params.json").get("dim")
        config = Config.from_params(text, embedding[0].shape[0] * (len(embedding) if by_rows else 1), tied=head is None)
    if config.tied:
        sources.pop("lm_head.weight", None)
    if len(sources) < 9 * config.n_layers:  # before a model of absurd depth is built
        raise CheckpointError(f"{path} holds {len(sources)} tensors, too few for the {config.n_layers} layers of its config")
    with torch.device("meta"):
        model = Llama(config)
    wanted = dict(model.named_parameters())
    for problem, names in (("lacks", wanted.keys() - sources.keys()), ("has the unexpected", sources.keys() - wanted.keys())):
        if names:
            raise CheckpointError(f"{path} {problem} tensor {min(names)}" + f" and {len(names) - 1} more" * (len(names) > 1))
    joins = {name: _join_dimension(name, sources[name], tuple(p.shape)) for name, p in wanted.items()}
    for name in wanted:
        weight = torch.empty(wanted[name].shape, dtype=dtype or sources[name][0].dtype, device=device)
        for place, source in enumerate(sources[name]):
            size = source.shape[joins[name]]
            source.read_into(weight.narrow(joins[name], place * size, size))
        if meta and name.endswith(("q_proj.weight", "k_proj.weight")):
            weight = weight.view(-1, config.head_dim // 2, 2, config.dim).transpose(1, 2).reshape(weight.shape)
        module, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(module), leaf, nn.Parameter(weight))
    if config.tied:
        model.lm_head.weight = model.model.embed_tokens.weight
    return model.eval()


@dataclass(frozen=True)
class Stored:
    """One tensor in one safetensors file, `offset` bytes from its start."""

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    offset: int

    def read_into(self, out: Tensor) -> None:
        """Reads the tensor into `out`, of the same shape (...), PIECE bytes at a time; through a buffer where it must be cast.
        CheckpointError, one line, where the file ends early or a number is not finite.

        Plain reads, not the library's mapping: pages of a mapping count as this process's memory while it lives, which
        doubles the peak, and mapping a 2.5 GB file anew for each piece took 40 s instead of 1.
        """
        row_bytes = math.prod(self.shape[1:]) * self.dtype.itemsize
        rows = min(max(1, PIECE // row_bytes), self.shape[0])
        direct = out.dtype == self.dtype and out.device.type == "cpu" and out.is_contiguous()
        buffer = None if direct else torch.empty(rows, *self.shape[1:], dtype=self.dtype)
        with open(self.file, "rb", buffering=0) as file:
            file.seek(self.offset)
            for first in range(0, self.shape[0], rows):
                piece = out[first : first + rows]
                landed = piece if buffer is None else buffer[: len(piece)]
                view = landed.view(-1).view(torch.uint8).numpy().data
                while view:
                    got = file.readinto(view)
                    if not got:
                        raise CheckpointError(f"{self.file.name} ends inside {self.name}")
                    view = view[got:]
                if not direct:
                    piece.copy_(landed)
                # the sum is one fast pass that any NaN or infinity spoils; large finite weights may too, hence the second look
                if not piece.sum().isfinite() and not piece.isfinite().all():
                    raise CheckpointError(f"{self.file.name}: {self.name} holds NaN or infinite values")


FLOATS = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


@contextmanager
def _open(file: Path) -> Iterator[safe_open]:
    try:
        with safe_open(file, framework="pt") as tensors:
            yield tensors
    except (SafetensorError, OSError, OverflowError, ValueError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{file.name} cannot be read as safetensors: {' '.join(str(error).split())}") from None


def _find_tensors(files: list[Path], rename: Callable[[str], str]) -> dict[str, list[Stored]]:
    """The tensors of all files by their Hugging Face name; several in the order of the files where Meta sharded them."""
    found: dict[str, list[Stored]] = {}
    for file in files:
        with _open(file) as tensors, open(file, "rb") as raw:  # the library checks the header; it does not tell the offsets
            start = 8 + int.from_bytes(raw.read(8), "little")
            header = json.loads(raw.read(start - 8))
            for name in tensors.keys():
                if name.endswith(("rotary_emb.inv_freq", "rope.freqs")):
                    continue
                about = tensors.get_slice(name)
                if about.get_dtype() not in FLOATS:
                    raise CheckpointError(f"{file.name}: {name} is stored as {about.get_dtype()}; quantised weights are not supported")
                stored = Stored(file, name, tuple(about.get_shape()), FLOATS[about.get_dtype()], start + header[name]["data_offsets"][0])
                found.setdefault(rename(name), []).append(stored)
    return found


def _join_dimension(name: str, parts: list[Stored], shape: tuple[int, ...]) -> int:
    """The dimension along which the parts of one tensor join to `shape`; vectors are the same in every shard."""
    for dimension in range(len(shape)):
        joined = tuple(n * len(parts) if d == dimension else n for d, n in enumerate(parts[0].shape))
        if joined == shape and all(part.shape == parts[0].shape for part in parts):
            return dimension
    if len(shape) == 1 and parts[0].shape == shape:
        del parts[1:]
        return 0
    shards = f" in {len(parts)} shards" if len(parts) > 1 else ""
    raise CheckpointError(f"{parts[0].file.name}: {name} is {parts[0].shape}{shards}, the config says {shape}")


META_NAMES = {
    "tok_embeddings": "model.embed_tokens",
    "norm": "model.norm",
    "output": "lm_head",
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "attention_norm": "input_layernorm",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj",
    "ffn_norm": "post_attention_layernorm",
}


def _meta_name(name: str) -> str:
    """layers.0.attention.wq.weight -> model.layers.0.self_attn.q_proj.weight; a name it does not know stays as it is."""
    layer = re.match(r"layers\.\d+\.", name)
    prefix = layer.group() if layer else ""
    inner = name[len(prefix) :].removesuffix(".weight")
    return ("model." if prefix else "") + prefix + META_NAMES[inner] + ".weight" if inner in META_NAMES else name


def save_checkpoint(model: Llama, path: str | Path) -> None:
    """Writes config.json and model.safetensors, which load here and in transformers. Each file replaces the old one whole.

    Raises ValueError for a packed model, which has no plain weights any more.
    """
    if model.head is not None:
        raise ValueError("a packed model holds no plain weights to save; save it before pack()")
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    weights = {name: p.detach().cpu().contiguous() for name, p in model.named_parameters()}  # tied weights come once
    aside = path / "model.safetensors.new"
    save_file(weights, aside, metadata={"format": "pt"})
    with open(aside, "rb") as file:
        os.fsync(file.fileno())
    os.replace(aside, path / "model.safetensors")
    aside = path / "config.json.new"
    aside.write_text(model.config.to_json(model.dtype) + "\n")
    os.replace(aside, path / "config.json")


def _read_text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"cannot read {file}: {getattr(error, 'strerror', None) or error}") from None


def _weight_files(path: Path) -> list[Path]:
    """The safetensors files of a directory in Hugging Face's layout; shards as the index names them."""
    if (path / "model.safetensors").is_file():
        return [path / "model.safetensors"]
    index = path / "model.safetensors.index.json"
    if not index.is_file():
        raise _no_weights(path, "model.safetensors or model.safetensors.index.json")
    names = parse_object(_read_text(index), index.name).get("weight_map")
    if not isinstance(names, dict) or not names or not all(isinstance(name, str) for name in names.values()):
        raise CheckpointError(f"{index.name} has no weight_map from tensors to files")
    for name in names.values():
        if Path(name).name != name or "\0" in name or not (path / name).is_file():
            raise CheckpointError(f"{index.name} names the shard {name!r:.80}, which is not a file in {path}")
    return [path / name for name in sorted(set(names.values()))]


def _meta_files(path: Path) -> list[Path]:
    """The model-parallel shards of a directory in Meta's layout, in order."""
    files = sorted(path.glob("consolidated*.safetensors"))
    if not files:
        raise _no_weights(path, "consolidated.*.safetensors")
    return files


def _no_weights(path: Path, wanted: str) -> CheckpointError:
    pickles = sorted(p.name for p in path.iterdir() if p.suffix in (".pth", ".bin", ".pt", ".ckpt"))
    if pickles:
        return CheckpointError(
            f"{path} holds pickled weights ({pickles[0]}), and a pickle can run any code when it is opened; "
            "convert it to safetensors where you trust it"
        )
    return CheckpointError(f"{path} has no {wanted}")
