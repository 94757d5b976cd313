"""Compiled decoding (`decode.py --compile`): fewer and larger operations, the same bits drafted or not.

    compile_passes(model, (6,))     layers [0, 6) and [6, L) become a graph each

A pass is a run of those pieces: a draft is the first, a verification the second, plain decoding both, one after the other. So
whoever drafts, a token goes through the same compiled code, and nothing is fused across the layer where a draft ends. In a
graph, what is row-wise by nature (norms, rotation, SiLU, sums) is compiled, on one thread, so that no sum over a row is split;
what holds rows apart in model.py, products and CachedAttention, is called from the graph as it is. In bfloat16 on a processor
without instructions for it, products and attention are those of widened.cpp.

The graphs are made by torch.export and compiled by TorchInductor: torch.compile's own machinery takes half a millisecond to
find the graph for each call, a sixth of a small model's draft step.
"""

import os
import shlex
import shutil
import subprocess
import tempfile
import warnings
from collections.abc import Callable, Iterable
from functools import cache
from itertools import pairwise
from pathlib import Path
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn

from cache import KVQCache
from model import MAX_ROWS, CachedAttention, Layer, Llama, Product, RowLinear, gather_heads, spread_heads

# ---------------------------------------------------------------------------------------------------------------------
# What a graph calls and does not look into, as operations of PyTorch: they take numbers, not objects

_products: WeakValueDictionary[int, RowLinear] = WeakValueDictionary()
_attention: list[CachedAttention] = []  # that of the running pass

_library = torch.library.Library("layerskip", "DEF")
_library.define("row_linear(Tensor x, int number, int out_features) -> Tensor")
_library.impl("row_linear", lambda x, number, out_features: _products[number](x), "CompositeExplicitAutograd")
_library.impl("row_linear", lambda x, number, out_features: x.new_empty(x.shape[0], out_features), "Meta")
_library.define("row_bmm(Tensor x, Tensor weight) -> Tensor")
_library.impl("row_bmm", torch.ops.aten.bmm.default, "CPU")
_library.impl("row_bmm", torch.ops.aten.bmm.default, "Meta")
_library.define("attend_rows(Tensor q, Tensor k, Tensor v, int layer) -> Tensor")
_library.impl("attend_rows", lambda q, k, v, layer: _attention[-1].attend_rows(layer, q, k, v).contiguous(), "CompositeExplicitAutograd")
_library.impl("attend_rows", lambda q, k, v, layer: q.new_empty(q.shape), "Meta")
_library.define("attend_widened(Tensor q, Tensor k, Tensor v, int layer) -> Tensor")
_library.impl("attend_widened", lambda *inputs: attend_widened(*inputs), "CPU")
_library.impl("attend_widened", lambda q, k, v, layer: q.new_empty(q.shape), "Meta")
_library.define("widened_product(Tensor x, Tensor weight) -> Tensor")  # these two are widened.cpp's
_library.impl("widened_product", lambda x, weight: x.new_empty(x.shape[0], weight.shape[0]), "Meta")
_library.define("widened_attention(Tensor q, Tensor k, Tensor v, Tensor keys, Tensor values, int layer, int start) -> Tensor")

# ---------------------------------------------------------------------------------------------------------------------
# Products and attention in bfloat16 on a processor without instructions for it


@cache
def has_widened() -> bool:
    """Compiles widened.cpp for this processor and loads its operations; False where the compiler cannot."""
    source, torch_at = Path(__file__).with_name("widened.cpp"), Path(torch.__file__).parent
    with tempfile.TemporaryDirectory() as folder:
        library = str(Path(folder, "widened.so"))
        compiler = [*shlex.split(os.environ.get("CXX") or "c++"), "-std=c++17", "-O3", "-march=native", "-fopenmp", "-shared", "-fPIC"]
        links = [f"-I{torch_at / 'include'}", f"-L{torch_at / 'lib'}", "-ltorch_cpu"]
        if subprocess.run([*compiler, str(source), "-o", library, *links], capture_output=True).returncode:
            return False
        torch.ops.load_library(library)
    return True


def widened_product(weight: Tensor) -> Product:
    """x -> x W^T for a bfloat16 weight (out, in) where the processor has no instruction for it and PyTorch's kernel, which widens every
    weight for every row, takes its time. A plain step of Llama 3.2 1B's shape on a Zen 3 pair: 162 ms not compiled, with that kernel; compiled, 98 with
    sums that TorchInductor writes and 90 with this loop; twelve layers and the head with five rows, 537, 192 and 126."""
    multiply = torch.ops.layerskip.widened_product.default
    return lambda x: multiply(x.flatten(0, -2).contiguous(), weight).unflatten(0, x.shape[:-1])


def attend_widened(q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
    """CachedAttention of the running pass for bfloat16 rows: q (T, H, hd), k and v (T, Hkv, hd) -> (T, H, hd), where hd is 64 or 128.
    Llama 3.2 1B's heads on a Zen 3 pair, 128 and 8,192 positions: a row takes 232 and 3,877 us with PyTorch's attention, 68 and 2,771 with this."""
    cache, start = _attention[-1].cache, _attention[-1].start
    return torch.ops.layerskip.widened_attention(q.contiguous(), k.contiguous(), v.contiguous(), cache.keys, cache.values, layer, start)


# ---------------------------------------------------------------------------------------------------------------------
# Graphs

OPTIONS = {
    "emulate_precision_casts": True,  # round to bfloat16 where PyTorch does: else a row alone, fused otherwise than several, has other bits
    "pattern_matcher": False,  # nor may a sum be fused with the product before it
    "cpp.threads": 1,  # nor may a sum be split between threads
    "fx_graph_cache": False,  # it cannot store these graphs, and says so at length
}


class Piece(nn.Module):
    """Some layers, the first of them number `first`, from h (T, dim), cos and sin to h; attention is that of the running pass."""

    def __init__(self, layers: Iterable[Layer], first: int, widened: bool):
        super().__init__()
        self.layers, self.first, self.widened = list(layers), first, widened  # a list: their weights are packed, not this module's

    def forward(self, h: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        for index, layer in enumerate(self.layers, self.first):

            def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
                if self.widened:
                    return torch.ops.layerskip.attend_widened(q, k, v, index)
                return gather_heads(torch.ops.layerskip.attend_rows(spread_heads(q, k.shape[1]), k, v, index), q.shape[1])

            h = layer(h, cos, sin, attend)
        return h

    def graph(self, h: Tensor, cos: Tensor, sin: Tensor) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        """Compiled for one row, if h (T, dim) is one, or for any other number up to MAX_ROWS."""
        rows = None if h.shape[0] == 1 else {0: torch.export.Dim("rows", min=2, max=MAX_ROWS)}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.export.export(self, (h, cos, sin), dynamic_shapes=(rows, rows, rows), strict=False)
            inputs = [node.meta["val"] for node in program.graph.nodes if node.op == "placeholder"][-3:]  # before them come weights
            # Where every step is one row, what calls a graph's parts is compiled too: a plain step of the shipped shape takes 7% less, of Llama
            # 3.2 1B's 4%; but compiling takes a fifth longer, and several rows gain little.
            return torch._inductor.compile(program.module(), inputs, options=OPTIONS | {"cpp_wrapper": rows is None and h.device.type == "cpu"})


class Pieces:
    """Layers as compiled graphs between `cuts`, 0 and L among them; Llama.run_layers calls it for decoding passes."""

    def __init__(self, model: Llama, cuts: list[int], widened: bool):
        self.cuts = cuts
        self.graphs = {}
        for rows in (1, 2):  # a single row, or several
            inputs = (torch.zeros(rows, model.config.dim, dtype=model.dtype, device=model.device), *(x.clone() for x in model.rotary(0, rows)))
            for first, last in pairwise(cuts):
                self.graphs[first, rows == 1] = Piece(model.model.layers[first:last], first, widened).graph(*inputs)

    def __call__(self, h: Tensor, cos: Tensor, sin: Tensor, first: int, last: int, attention: CachedAttention, seen: dict | None = None) -> Tensor:
        """Llama.run_layers on rows h (T, dim). ValueError where the pass begins or ends inside a piece."""
        within = [cut for cut in self.cuts if first <= cut <= last]
        if first < last and (within[:1] != [first] or within[-1:] != [last] or not set(seen or ()) <= {*self.cuts}):
            raise ValueError(f"the model was compiled to exit behind layers {self.cuts[1:-1]}, and a pass of layers {first} to {last} was asked for")
        _attention.append(attention)
        try:
            for start, end in pairwise(within):
                h = self.graphs[start, h.shape[0] == 1](h, cos, sin)
                if seen and end in seen:
                    seen[end] = h
        finally:
            _attention.pop()
        return h


@torch.inference_mode()
def compile_passes(model: Llama, exits: Iterable[int] = ()) -> Llama:
    """Compiles, in place, a model's decoding passes for those exit layers; packs it if it is not. Returns the model.

    Takes some seconds for each layer. That rows do not meet in what the compiler made is tried, as in safe_rows: counts of rows, in
    several places. Raises ValueError where they do, where an exit does not exist, or where there is no compiler.
    """
    if model.device.type == "cpu" and not (os.environ.get("CXX") or shutil.which("c++")):
        raise ValueError("--compile needs a C++ compiler, and there is none called c++")
    c, model = model.config, model.pack()
    if not model.exact:
        raise ValueError("compiled decoding is exact: leave out --no-exact or --compile")
    if wrong := [e for e in exits if not 0 < e < c.n_layers]:
        raise ValueError(f"exit layers lie from 1 to {c.n_layers - 1}, not {wrong[0]}")
    products = [p for layer in model.model.layers for p in (layer.self_attn.qkv, layer.self_attn.out, layer.mlp.gate_up, layer.mlp.down)]
    for product in products:
        product.number = max(_products, default=-1) + 1
        _products[product.number] = product
    plain = [p for p in (*products, model.head) if p.plain is not None and p.dtype == torch.bfloat16 and model.device.type == "cpu"]
    for product in plain:
        if product.shape[0] % 4 == 0 and product.shape[1] % 32 == 0 and has_widened():
            product.take(widened_product, product.plain)
            product.open = True
    widened = bool(plain) and c.head_dim in (64, 128) and has_widened()
    model.compiled = Pieces(model, sorted({0, *exits, c.n_layers}), widened)
    x = torch.randn(MAX_ROWS, c.dim, generator=torch.Generator().manual_seed(0)).to(model.device, model.dtype)
    cache = KVQCache(c.n_layers, c.n_kv_heads, c.head_dim, c.dim, MAX_ROWS, 1, model.dtype, model.device)
    whole = model.run_layers(x, 0, c.n_layers, cache)
    for rows in (1, 2, 5, MAX_ROWS - 1):
        for first in {0, 1, MAX_ROWS - rows}:
            part = slice(first, first + rows)
            if not torch.equal(model.run_layers(x[part], 0, c.n_layers, cache, first), whole[part]):
                raise ValueError("compiled layers do not keep the rows of a pass apart on this machine: leave out --compile")
    return model
