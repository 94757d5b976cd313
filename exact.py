"""Exactness: passes in which a row's result is the same bits whatever else is in the pass.

Plain decoding runs one row a pass, verification several. In exact arithmetic both give a row the
same logits; in floating point a library may add in another order for another number of rows, and
where two logits nearly tie, another token comes out. Equal bits need one property: a row's result
depends neither on how many rows share its pass, nor on their content, nor on its place. Four
things may break it. `pack` replaces the first three:

    matrix products      BLAS picks a kernel, and its order of summation, by the number of rows.
                         RowLinear finds by trial which numbers of rows agree, and pads up to them.
    attention            A fused kernel picks its blocks by the number of queries and of keys.
                         RowAttention always gives it the same number of query rows, and a view of
                         the cache whose length the position alone decides.
    elementwise loops    A vector loop ends in a scalar tail, which may round otherwise: that of
                         exp does; +, *, / and sqrt cannot (IEEE 754 rounds them correctly).
                         PackedNorm uses only these; row_silu gives each row a tail of its own.
    sums over a row      PyTorch splits sums of 32,768 numbers and more between threads. No row
                         of a Llama is as long; pack refuses one.

`pack` also fuses products of the same input, q with k and v, and gate with up: these are faster.
Everything holds for passes of up to MAX_ROWS rows. Longer ones are prefill, which plain decoding
and speculation run alike.
"""

import math
from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cache import KVQCache
from model import MLP, Attention, Llama, RMSNorm, rotate, row_attention

Product = Callable[[Tensor], Tensor]  # x (T, in) -> x W^T (T, out)

MAX_ROWS = 16  # the most rows of a pass that is held to the bit: one token and 15 guesses
BLOCK_ROWS = 8  # that attention runs together
VIEW = 64  # attention looks at a multiple of so many positions


def auto_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where the hardware multiplies it, else float32."""
    onednn = torch.backends.mkldnn.is_available()  # not in every build of PyTorch
    if device.type == "cuda" or (onednn and torch.ops.mkldnn._is_mkldnn_bf16_supported()):
        return torch.bfloat16
    return torch.float32


def pack(model: Llama) -> Llama:
    """Turns a model, in place, into one that decodes to the bit, and returns it.

    Each plain weight is let go as its packed copy is made, so memory holds one set; a packed model
    no longer trains or saves. A second call does nothing. Raises ValueError for rows too long.
    """
    if isinstance(model.lm_head, RowLinear):
        return model
    if model.config.dim >= 1 << 15:
        raise ValueError(f"rows of {model.config.dim} numbers cannot be exact: use --no-exact")
    product = partial(RowLinear, {})
    for layer in model.layers:
        layer.self_attn = PackedAttention(layer.self_attn, product)
        layer.mlp = PackedMLP(layer.mlp, product)
        layer.input_layernorm = PackedNorm(layer.input_layernorm)
        layer.post_attention_layernorm = PackedNorm(layer.post_attention_layernorm)
    model.norm = PackedNorm(model.norm)
    head = product(model.lm_head)
    del model.lm_head
    model.lm_head = head  # type: ignore[assignment]
    c = model.config
    width = safe_width(c.n_heads, c.n_kv_heads, c.head_dim, model.dtype, model.device)
    group = c.n_heads // c.n_kv_heads
    model.row_attention = partial(RowAttention, group=group, width=width)
    return model


# --------------------------------------
# Matrix products


def linear_product(weight: Tensor) -> Product:
    """x -> x W^T in PyTorch's own layout, for a weight (out, in)."""
    return lambda x: F.linear(x, weight)


def packed_product(weight: Tensor) -> Product:
    """x -> x W^T with the weight (out, in) copied once into oneDNN's blocked layout.

    Faster than the plain layout, and less sensitive to the number of rows.
    """
    ops = torch.ops.mkldnn
    packed = ops._reorder_linear_weight(weight)
    return lambda x: ops._linear_pointwise(x, packed, None, "none", [], "")


def batched_product(weight: Tensor) -> Product:
    """x -> x W^T where up to MAX_ROWS rows are a batch of one-row products. weight (out, in)."""
    columns = weight.t().contiguous()

    def product(x: Tensor) -> Tensor:
        if not 1 < x.shape[0] <= MAX_ROWS:
            return x @ columns
        return torch.bmm(x.unsqueeze(1), columns.expand(x.shape[0], -1, -1)).squeeze(1)

    return product


class RowLinear:
    """x (T, in) -> (T, out): one or several linear layers of the same input, as one exact product.

    min_rows is what safe_rows found: 1, any pass will do; M, shorter passes are padded up to M
    rows; 0, each row runs alone. `probed` holds what it found for weights of one shape.
    """

    SMALL = 1 << 20  # bytes of a weight up to which calling oneDNN costs more than it saves

    def __init__(self, probed: dict, *layers: nn.Linear):
        weight = torch.cat([layer.weight.detach() for layer in layers])
        ways: list[Callable[[Tensor], Product]] = [linear_product]  # in order of preference
        if weight.device.type == "cpu" and torch.backends.mkldnn.is_available():
            if weight.dtype == torch.float32 or weight.dtype == auto_dtype(weight.device):
                ways = [packed_product]
            if weight.dtype != torch.bfloat16 and weight.nbytes <= self.SMALL:
                ways = [batched_product, *ways]
        for way in ways:  # the first that needs no padding, or the last
            key = (way, weight.shape)
            if key not in probed:
                probed[key] = safe_rows(way, weight)
            self.min_rows = probed[key]
            if self.min_rows == 1:
                break
        self.product = way(weight)

    def __call__(self, x: Tensor) -> Tensor:
        rows = x.shape[0]
        if rows > MAX_ROWS or x.dim() > 2 or 0 < self.min_rows <= rows:
            return self.product(x)
        if self.min_rows == 0:  # each row alone; a clone is aligned in memory, a slice may not be
            return torch.cat([self.product(row.clone()) for row in x.split(1)])
        return self.product(F.pad(x, (0, 0, 0, self.min_rows - rows)))[:rows]


def safe_rows(way: Callable[[Tensor], Product], weight: Tensor) -> int:
    """The least of 1, 2, 4, 8, 16 such that way(weight) keeps so many rows and more apart; else 0.

    weight (out, in). Found by trial on this machine. In the trial each row of the weight is (w, -w)
    and each input (x, x), in a random order: the true sum is 0, so results are rounding errors
    alone, and any other order of summation shows. (A head, which is long, is tried as it is.)
    """
    out_features, in_features = weight.shape
    generator = torch.Generator().manual_seed(0)
    half = in_features // 2
    first, second, left_over = torch.randperm(in_features, generator=generator).tensor_split(
        (half, 2 * half)
    )

    def draw(rows: int, sign: float) -> Tensor:
        x = torch.randn(rows, in_features, generator=generator, dtype=torch.float64)
        x[:, second] = sign * x[:, first]
        x[:, left_over] = 0
        return x.to(weight.device, weight.dtype)

    product = way(weight if out_features > 1 << 14 else draw(out_features, -1.0))
    inputs = [draw(MAX_ROWS, 1.0) for _ in range(1 + 64 // out_features)]  # narrow: more
    for least in (1, 2, 4, 8, MAX_ROWS):
        if all(keeps_apart(lambda rows: product(x[rows]), least, MAX_ROWS) for x in inputs):
            return least
    return 0


def keeps_apart(operation: Callable[[Tensor], Tensor], least: int, most: int) -> bool:
    """Whether rows have the same bits in every company of `least` to `most` rows, at any place.

    operation(numbers (T,)) is the result (T, ...) of a pass of the rows with these numbers.
    """
    numbers = torch.arange(most)
    whole = operation(numbers)
    for rows in range(most, least - 1, -1):
        for by in (0, 1, 2, most // 2, most - 1):
            some = numbers.roll(by)[:rows]
            if not torch.equal(operation(some), whole[some]):
                return False
    return True


# --------------------------------------
# Attention


def view_len(end: int) -> int:
    """Length of the view of a cache that covers positions [0, end): a function of `end` alone."""
    return -(-end // VIEW) * VIEW


def blocks(start: int, rows: int, width: int) -> Iterator[tuple[int, int, int]]:
    """Cuts rows at positions start..start+rows-1: (first, last, view), for each block of rows.

    A block has at most `width` rows, and all of them look at the same length of view.
    """
    first, end = start, start + rows
    while first < end:
        view = view_len(first + 1)
        last = min(first + width, view, end)
        yield first - start, last - start, view
        first = last


def padded_attention(q: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
    """Attention of rows q (T, H, hd) over keys and values (1, Hkv, S, hd): (T, H, hd).

    The rows of the pass and the G = H / Hkv heads of a group are together the query rows of a
    key/value head, padded to those of mask (width, G, S): so the cache is read once for all, and
    the kernel always meets one number of rows.
    """
    (rows, heads, size), (width, _, view) = q.shape, mask.shape
    q = F.pad(q, (0, 0, 0, 0, 0, width - rows)).view(width, keys.shape[1], -1, size)
    q = q.transpose(0, 1).reshape(1, keys.shape[1], -1, size)  # (1, Hkv, width * G, hd)
    mixed = F.scaled_dot_product_attention(q, keys, values, attn_mask=mask.view(-1, view))
    mixed = mixed.view(keys.shape[1], width, -1, size).transpose(0, 1)  # (width, Hkv, G, hd)
    return mixed.reshape(width, heads, size)[:rows]


def block_mask(positions: Tensor, view: int, group: int, width: int, dtype: torch.dtype) -> Tensor:
    """0 where a row at one of `positions` (T,) sees a position of the view, else -inf.

    (width, group, view), for each head of a group. Rows that only pad see all.
    """
    later = torch.arange(view, device=positions.device) > positions[:, None]  # (T, S)
    mask = torch.zeros(width, group, view, dtype=dtype, device=positions.device)
    mask[: positions.shape[0]].masked_fill_(later[:, None], -math.inf)
    return mask


def safe_width(
    heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype, device: torch.device
) -> int:
    """BLOCK_ROWS if padded_attention keeps rows apart here, by trial; else 1: each runs alone."""
    generator = torch.Generator().manual_seed(0)
    for view in (VIEW, 3 * VIEW, 16 * VIEW):
        shapes = (BLOCK_ROWS, heads, head_dim), *[(1, kv_heads, view, head_dim)] * 2
        q, k, v = (torch.randn(s, generator=generator).to(device, dtype) for s in shapes)

        def attend(rows: Tensor) -> Tensor:
            mask = block_mask(view - 1 - rows, view, heads // kv_heads, BLOCK_ROWS, dtype)
            return padded_attention(q[rows], k, v, mask)

        if not keeps_apart(attend, 1, BLOCK_ROWS):
            return 1
    return BLOCK_ROWS


class RowAttention:
    """model.row_attention, held to the bit: attend(layer, q, k, v) for T rows at start..start+T-1.

    Rows run in blocks of one shape. Passes of more than MAX_ROWS rows are prefill: they run whole.
    """

    def __init__(self, cache: KVQCache, start: int, rows: int, group: int, width: int):
        self.cache, self.start = cache, start
        self.long = row_attention(cache, start, rows) if rows > MAX_ROWS else None
        self.blocks: list[tuple] = []  # (first, last, keys and values of each layer, mask)
        positions = torch.arange(start, start + rows, device=cache.keys.device)
        for first, last, view in blocks(start, 0 if self.long else rows, width):
            mask = block_mask(positions[first:last], view, group, width, cache.keys.dtype)
            both = (x[:, None, :, :view].unbind() for x in (cache.keys, cache.values))
            self.blocks.append((first, last, *both, mask))

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if self.long:
            return self.long(layer, q, k, v)
        self.cache.write(layer, self.start, k, v)
        mixed = [
            padded_attention(q[first:last], keys[layer], values[layer], mask)
            for first, last, keys, values, mask in self.blocks
        ]
        return mixed[0] if len(mixed) == 1 else torch.cat(mixed)


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
    """Attention with q, k and v in one product, and q and k in one rotation.

    `product` makes one product of linear layers with the same input, such as RowLinear.
    """

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

    def __init__(self, m: MLP, product: Callable, silu: Callable | None = None):
        nn.Module.__init__(self)
        self.silu = silu or row_silu
        self.gate_up_proj = product(m.gate_proj, m.up_proj)
        self.down_proj = product(m.down_proj)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up_proj(x).chunk(2, -1)
        return self.down_proj(self.silu(gate) * up)


def row_silu(gate: Tensor) -> Tensor:
    """SiLU whose rows do not see each other; gate (..., T, hidden_dim) is half of gate_up.

    A strided view is looped over row by row, so each row has its own tail, always at its end. From
    32,768 elements on PyTorch cuts the range between threads wherever it falls: rows go singly.
    """
    if gate.dim() == 2 and gate.shape[0] <= MAX_ROWS and gate.numel() >= 32768:
        return torch.stack([F.silu(row) for row in gate])
    return F.silu(gate)
