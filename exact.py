"""Exactness: a row's result is the same bits, whatever else is in its pass.

Plain decoding runs one row a pass, verification several. In exact arithmetic both give a row the
same logits. In floating point a library may add in another order for another number of rows, and
where two logits nearly tie, another token comes out. So a row's result must depend neither on how
many rows share its pass, nor on their content, nor on its place. Four things may break that, and
`pack` replaces the first three:

    matrix products      BLAS picks a kernel, and its order of summation, by the number of rows.
                         RowLinear pads to a number of rows that a trial found safe.
    attention            A fused kernel picks its blocks by the number of queries and of keys.
                         exact_attention looks at a view of the cache whose length the position
                         alone decides, and pads the queries up to a multiple found safe.
    elementwise loops    A vector loop ends in a scalar tail, which may round otherwise: that of
                         exp does; +, *, / and sqrt cannot (IEEE 754 rounds them correctly).
                         PackedNorm has only these and a sum; row_silu gives each row a tail.
    sums over a row      PyTorch splits sums of 32,768 numbers and more between threads. No
                         Llama has such rows; pack refuses them.

All this holds for passes of up to MAX_ROWS rows. Longer ones are prefill, which plain decoding and
speculation run alike. For speed, `pack` also fuses q, k and v, and gate and up, into one product.
"""

import math
from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cache import KVQCache
from model import MLP, Attention, Llama, RMSNorm, rotate, row_attention
from support.trials import keeps_apart, loud_attention, safe_rows

Product = Callable[[Tensor], Tensor]  # x (T, in) -> x W^T (T, out)

MAX_ROWS = 16  # the most rows of a pass that is held to the bit: one token and 15 guesses
BLOCK_ROWS = 8  # that attention runs together
VIEW = 64  # attention looks at a multiple of so many positions


def auto_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where the hardware multiplies it, else float32."""
    onednn = torch.backends.mkldnn.is_available()
    if device.type == "cuda" or (onednn and torch.ops.mkldnn._is_mkldnn_bf16_supported()):
        return torch.bfloat16
    return torch.float32


def pack(model: Llama) -> Llama:
    """Turns a model, in place, into one that decodes to the bit, and returns it.

    Each plain weight is let go as its packed copy is made. A packed model no longer trains or
    saves. A second call does nothing. Raises ValueError for rows too long.
    """
    if isinstance(model.lm_head, RowLinear):
        return model
    if model.config.dim >= 1 << 15:
        raise ValueError(f"rows of {model.config.dim} numbers cannot be exact: use --no-exact")
    product = partial(RowLinear, {})  # {}: what trials found, for all layers
    for layer in model.layers:
        layer.self_attn = PackedAttention(layer.self_attn, product)
        layer.mlp = PackedMLP(layer.mlp, product, row_silu)
        layer.input_layernorm = PackedNorm(layer.input_layernorm)
        layer.post_attention_layernorm = PackedNorm(layer.post_attention_layernorm)
    model.norm = PackedNorm(model.norm)
    head = product(model.lm_head)
    del model.lm_head
    model.lm_head = head  # type: ignore[assignment]
    group = model.config.n_heads // model.config.n_kv_heads
    model.row_attention = partial(exact_attention, group=group, pad_to=safe_padding(model))
    return model


# --------------------------------------
# Matrix products


def linear_product(weight: Tensor) -> Product:
    """x -> x W^T in PyTorch's own layout, for a weight (out, in)."""
    return lambda x: F.linear(x, weight)


def packed_product(weight: Tensor) -> Product:
    """x -> x W^T with the weight (out, in) in oneDNN's blocked layout, which is faster."""
    ops = torch.ops.mkldnn
    packed = ops._reorder_linear_weight(weight)
    return lambda x: ops._linear_pointwise(x, packed, None, "none", [], "")


def batched_product(weight: Tensor) -> Product:
    """x -> x W^T where a short pass is a batch of one-row products. weight (out, in)."""
    columns = weight.t().contiguous()

    def product(x: Tensor) -> Tensor:
        if not 1 < x.shape[0] <= MAX_ROWS:
            return x @ columns
        return torch.bmm(x.unsqueeze(1), columns.expand(x.shape[0], -1, -1)).squeeze(1)

    return product


class RowLinear:
    """x (T, in) -> (T, out): one or several linear layers of the same input, as one exact product.

    min_rows is what a trial found (kept in `probed` for weights of the same shape): 1, any pass
    will do; M, shorter passes are padded up to M rows; 0, each row runs alone.
    """

    SMALL = 1 << 20  # bytes of a weight up to which calling oneDNN costs more than it saves

    def __init__(self, probed: dict, *layers: nn.Linear):
        weight = torch.cat([layer.weight.detach() for layer in layers])
        ways: list = [linear_product]
        if weight.device.type == "cpu" and torch.backends.mkldnn.is_available():
            if weight.dtype == torch.float32 or weight.dtype == auto_dtype(weight.device):
                ways = [packed_product]
            if weight.dtype != torch.bfloat16 and weight.nbytes <= self.SMALL:
                ways = [batched_product, *ways]
        for way in ways:  # the first that needs no padding, or the last
            key = (way, weight.shape)
            if key not in probed:
                probed[key] = safe_rows(way, weight, MAX_ROWS)
            self.min_rows = probed[key]
            if self.min_rows == 1:
                break
        self.product = way(weight)

    def __call__(self, x: Tensor) -> Tensor:
        rows = x.shape[0]
        if x.dim() == 2 and rows <= MAX_ROWS:
            if self.min_rows == 0:  # alone; a clone is aligned, a slice may not be
                return torch.cat([self.product(row.clone()) for row in x.split(1)])
            if rows < self.min_rows:
                return self.product(F.pad(x, (0, 0, 0, self.min_rows - rows)))[:rows]
        return self.product(x)


# --------------------------------------
# Attention


def view_len(end: int) -> int:
    """Length of the view of a cache that covers positions [0, end)."""
    return -(-end // VIEW) * VIEW


def blocks(start: int, rows: int, width: int) -> Iterator[tuple[int, int, int]]:
    """Cuts rows at positions start..start+rows-1 into blocks of rows [first, end): yields
    (first, end, view). A block has at most `width` rows, which look at the same length of view.
    """
    first = 0
    while first < rows:
        view = view_len(start + first + 1)
        end = min(first + width, view - start, rows)
        yield first, end, view
        first = end


def grouped_attention(q: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
    """Attention of rows q (T, H, hd) over keys and values (1, Hkv, S, hd): (T, H, hd).

    The rows and the G = H / Hkv heads of a group are together the queries of a key/value head, so
    the cache is read once for all. They are padded to the rows of mask (at least T * G, S).
    """
    (rows, heads, size), groups = q.shape, keys.shape[1]
    q = q.view(rows, groups, -1, size).transpose(0, 1).reshape(1, groups, -1, size)
    padded = F.pad(q, (0, 0, 0, mask.shape[0] - q.shape[2]))
    mixed = F.scaled_dot_product_attention(padded, keys, values, attn_mask=mask)
    mixed = mixed.transpose(1, 2)[:, : q.shape[2]]  # (1, T * G, Hkv, hd)
    return mixed.view(rows, -1, groups, size).transpose(1, 2).reshape(rows, heads, size)


def block_mask(positions: Tensor, view: int, group: int, pad_to: int, dtype: torch.dtype) -> Tensor:
    """0 where a query sees a position of the view, else -inf.

    (T * group, up to a multiple of pad_to, view). The `group` heads of a row see up to its
    position, of `positions` (T,). Queries that only pad see all.
    """
    ends = positions.repeat_interleave(group)
    ends = F.pad(ends, (0, -ends.shape[0] % pad_to), value=1 << 40)  # sees all
    later = torch.arange(view, device=ends.device) > ends[:, None]
    return torch.zeros(later.shape, dtype=dtype, device=ends.device).masked_fill_(later, -math.inf)


def safe_padding(model: Llama) -> int:
    """To a multiple of how many queries attention must pad to keep rows apart, by trial.

    0 where no padding helps: each row runs alone.
    """
    c = model.config
    group, heads = c.n_heads // c.n_kv_heads, (c.n_heads, c.n_kv_heads, c.head_dim)

    def keeps(view: int, pad_to: int) -> bool:
        q, k, v = loud_attention(BLOCK_ROWS, view, heads, model.dtype, model.device)

        def attend(rows: Tensor) -> Tensor:
            last = torch.full_like(rows, view - 1, device=q.device)  # all see all
            return grouped_attention(q[rows], k, v, block_mask(last, view, group, pad_to, q.dtype))

        return keeps_apart(attend, 1, BLOCK_ROWS)

    most = BLOCK_ROWS * group  # one number of queries for all
    for pad_to in (8, most) if c.head_dim >= 16 else (most,):  # short sums hide their order
        if all(keeps(view, pad_to) for view in range(VIEW, 17 * VIEW, 3 * VIEW)):
            return pad_to
    return 0


def exact_attention(
    cache: KVQCache, start: int, rows: int, group: int, pad_to: int
) -> Callable[..., Tensor]:
    """model.row_attention, held to the bit: returns attend(layer, q, k, v).

    Rows run in blocks, each over its own view. A longer pass is prefill, and runs whole.
    """
    if rows > MAX_ROWS:
        return row_attention(cache, start, rows)
    positions = torch.arange(start, start + rows, device=cache.keys.device)
    parts = []
    for first, last, view in blocks(start, rows, BLOCK_ROWS if pad_to else 1):
        mask = block_mask(positions[first:last], view, group, max(pad_to, 1), cache.keys.dtype)
        parts.append((first, last, *cache.read(view), mask))

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        cache.write(layer, start, k, v)
        mixed = [
            grouped_attention(q[first:last], keys[layer], values[layer], mask)
            for first, last, keys, values, mask in parts
        ]
        return mixed[0] if len(mixed) == 1 else torch.cat(mixed)

    return attend


# --------------------------------------
# Layers


class PackedNorm(RMSNorm):
    """RMSNorm as x / sqrt(|x|^2 + n eps) * (sqrt(n) weight), in correctly rounded operations."""

    def __init__(self, norm: RMSNorm):
        nn.Module.__init__(self)
        wide = torch.promote_types(norm.weight.dtype, torch.float32)
        n = norm.weight.shape[0]
        self.weight = math.sqrt(n) * norm.weight.detach().to(wide)  # type: ignore[assignment]
        self.floor = self.weight.new_tensor(n * norm.eps)

    def forward(self, x: Tensor) -> Tensor:
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=self.weight.dtype)
        length.square_().add_(self.floor).sqrt_()
        return (x / length * self.weight).to(x.dtype)


class PackedAttention(Attention):
    """Attention with q, k and v in one product. `product` makes one of several linear layers."""

    def __init__(self, a: Attention, product: Callable):
        nn.Module.__init__(self)  # not Attention's, which would make plain weights
        self.n_heads, self.n_kv_heads, self.head_dim = a.n_heads, a.n_kv_heads, a.head_dim
        self.qkv_proj = product(a.q_proj, a.k_proj, a.v_proj)
        self.o_proj = product(a.o_proj)

    def project(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        qkv = self.qkv_proj(x).unflatten(-1, (-1, self.head_dim))
        qk, v = qkv.split((self.n_heads + self.n_kv_heads, self.n_kv_heads), -2)
        q, k = rotate(qk, cos, sin).split((self.n_heads, self.n_kv_heads), -2)
        return q, k, v


class PackedMLP(MLP):
    """MLP with gate and up in one product."""

    def __init__(self, m: MLP, product: Callable, silu: Callable):
        nn.Module.__init__(self)
        self.silu = silu
        self.gate_up_proj = product(m.gate_proj, m.up_proj)
        self.down_proj = product(m.down_proj)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up_proj(x).chunk(2, -1)
        return self.down_proj(self.silu(gate) * up)


def row_silu(gate: Tensor) -> Tensor:
    """SiLU whose rows do not see each other; gate (..., T, hidden_dim) is half of gate_up.

    PyTorch loops over such a view row by row, so each row has a tail of its own. From 32,768
    elements on it cuts the range between threads wherever that falls: then rows go singly.
    """
    if gate.dim() == 2 and gate.shape[0] <= MAX_ROWS and gate.numel() >= 32768:
        return torch.stack([F.silu(row) for row in gate])
    return F.silu(gate)
