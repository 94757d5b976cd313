"""Compiled decoding (`decode.py --compile`): layers as graphs of TorchInductor, as exact.

Layers below the exit are one graph and those above it another, so a token meets the same code
whoever drafts. A graph takes up to ROWS rows; a longer pass is cut. Weights are constants of it
(freezing), and products are by Inductor's C++ template (see products.py), which sums a row in the
same order whatever the number of rows. Cache and positions are inputs: a graph has no state.

Graphs are compiled ahead of time (torch.export, AOTInductor) and kept on disk.
"""

import hashlib
import os
import shutil
import sys
import warnings
from collections.abc import Callable
from copy import copy
from itertools import pairwise, product
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._inductor.runtime.cache_dir_utils import cache_dir
from torch.export import Dim

from cache import KVQCache
from decode import check_request, new_cache
from exact import BLOCK_ROWS as ROWS
from exact import (
    MAX_ROWS,
    PackedAttention,
    PackedMLP,
    auto_dtype,
    block_mask,
    blocks,
    padded_attention,
)
from extras.products import faster_products
from model import Layer, Llama

OPTIONS = {
    "freezing": True,
    "max_autotune": True,
    "max_autotune_gemm_backends": "CPP",
    "emulate_precision_casts": True,  # round where PyTorch does, however operations are fused
}


def joined(*layers: nn.Linear) -> nn.Linear:
    """Linear layers of the same input as one."""
    weight, one = torch.cat([layer.weight.detach() for layer in layers]), copy(layers[0])
    one._parameters = {"weight": nn.Parameter(weight, False), "bias": None}
    return one


def joined_layer(layer: Layer) -> Layer:
    """A copy with four products in place of seven."""
    layer = copy(layer)
    layer._modules = dict(layer._modules)
    layer.self_attn = PackedAttention(layer.self_attn, joined)
    layer.mlp = PackedMLP(layer.mlp, joined, F.silu)  # compiled, it keeps rows apart
    return layer


class Layers(nn.Module):
    """Layers on rows h (T, dim) at positions (T,), over keys and values (Hkv, max_len, hd).

    cos and sin (T, 1, hd). view (S,): a zero for each position that is looked at.
    """

    def __init__(self, layers: Any):
        super().__init__()
        self.layers: Any = nn.ModuleList(map(joined_layer, layers))

    def forward(
        self,
        h: Tensor,
        cos: Tensor,
        sin: Tensor,
        positions: Tensor,
        view: Tensor,
        keys: list[Tensor],
        values: list[Tensor],
    ) -> Tensor:
        size, a = view.shape[0], self.layers[0].self_attn
        mask = block_mask(positions, size, a.n_heads // a.n_kv_heads, ROWS, h.dtype)
        for layer, all_k, all_v in zip(self.layers, keys, values):

            def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
                all_k.index_copy_(1, positions, k.transpose(0, 1))
                all_v.index_copy_(1, positions, v.transpose(0, 1))
                return padded_attention(q, all_k[:, :size], all_v[:, :size], mask, ROWS)

            h = layer(h, cos, sin, attend)
        return h


# --------------------------------------
# Graphs in a model's place


def make_graph(file: Path, module: nn.Module, inputs: tuple, dynamic: tuple) -> Callable:
    """The module compiled for such inputs, whose `dynamic` sizes may differ; kept in `file`."""
    if not file.exists():
        print(f"compiling {file.stem}, once", file=sys.stderr, flush=True)
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.export.export(module, inputs, dynamic_shapes=dynamic, strict=False)
            aside = str(file.with_name(f"{os.getpid()}.pt2"))
            with faster_products():
                torch._inductor.aoti_compile_and_package(
                    program, package_path=aside, inductor_configs=dict(OPTIONS)
                )
        os.replace(aside, file)
    return torch._inductor.aoti_load_package(str(file)).loader.run


class Graphs:
    """A model's decoding passes as graphs between `cuts`, from 0 to L."""

    def __init__(self, model: Llama, cuts: list[int]):
        self.model, self.cuts, self.plain = model, cuts, (model.run_layers, model.unembed)
        # Where no instruction multiplies bfloat16, graphs read a prompt faster than PyTorch.
        slow = model.dtype == torch.bfloat16 != auto_dtype(model.device)
        self.longest = model.config.max_len if slow else MAX_ROWS
        c, rows, length = model.config, {0: Dim("rows", min=1, max=ROWS)}, {1: Dim("max_len")}
        folder = Path(cache_dir()) / "layerskip" / fingerprint(model)
        folder.mkdir(parents=True, exist_ok=True)
        cache = new_cache(model, 128, 1)
        h = torch.zeros(2, c.dim, dtype=model.dtype)
        self.known = WeakKeyDictionary[KVQCache, tuple]()
        places, zeros, keys, values = self.inputs(cache)
        self.layers = dict[int, Callable]()  # by the first layer
        for first, last in pairwise(cuts):
            store = keys[first:last], values[first:last]
            inputs = (h, *(x[:2] for x in places), zeros[:64], *store)
            dynamic = (*[rows] * 4, {0: Dim("view")}, *[[length] * (last - first)] * 2)
            module, name = Layers(model.layers[first:last]), f"layers {first} to {last}"
            self.layers[first] = make_graph(folder / f"{name}.pt2", module, inputs, dynamic)
        head = nn.Sequential(model.norm, model.lm_head)
        self.head = make_graph(folder / "the head.pt2", head, (h,), (rows,))

    def inputs(self, cache: KVQCache) -> tuple:
        """What graphs take of a cache: (cos, sin, positions), zeros, keys, values."""
        if cache not in self.known:
            size = cache.max_len
            places = *self.model.rotary(0, size), torch.arange(size)
            store = list(cache.keys), list(cache.values)
            self.known[cache] = places, cache.keys.new_zeros(size), *store
        return self.known[cache]

    def run_layers(
        self, h: Tensor, first: int, last: int, cache: KVQCache | None = None, start: int = 0
    ) -> Tensor:
        """Llama.run_layers. Raises ValueError where a pass begins or ends within a graph."""
        if cache is None or len(h) > self.longest:
            return self.plain[0](h, first, last, cache, start)
        if not {first, last} <= {*self.cuts}:
            raise ValueError(f"no graph begins and ends at {first} and {last}, only at {self.cuts}")
        (places, zeros, keys, values), out = self.inputs(cache), []
        for begin, end, view in blocks(start, len(h), ROWS):
            at = slice(start + begin, start + end)
            part, inputs = h[begin:end], [*(x[at] for x in places), zeros[:view]]
            for a, b in pairwise(c for c in self.cuts if first <= c <= last):
                (part,) = self.layers[a]([part, *inputs, *keys[a:b], *values[a:b]])
            out.append(part)
        return torch.cat(out)

    def unembed(self, h: Tensor) -> Tensor:
        """Llama.unembed."""
        if h.dim() > 2 or len(h) > MAX_ROWS:
            return self.plain[1](h)
        return torch.cat([self.head([x])[0] for x in h.split(ROWS)])


def fingerprint(model: Llama) -> str:
    """A name for what graphs depend on: weights, code, PyTorch and the processor."""
    about = torch.__version__, torch.get_num_threads(), torch.cpu.get_capabilities(), OPTIONS
    digest = hashlib.sha256(repr((model.config, *about)).encode())
    for code in ("extras/compiled.py", "extras/products.py", "exact.py", "model.py"):
        digest.update((Path(__file__).parents[1] / code).read_bytes())
    for p in model.parameters():
        digest.update(p.detach().view(torch.uint8).numpy().data)
    return digest.hexdigest()[:32]


@torch.inference_mode()
def compile_model(model: Llama, exit_layer: int = 0) -> Llama:
    """Compiles, in place, a plain model's passes for drafts of exit_layer layers, 0 for none.

    Raises ValueError where there is no compiler or no such exit, or where rows do not keep apart.
    """
    if model.dtype not in (torch.bfloat16, torch.float32) or model.device.type != "cpu":
        raise ValueError("--compile is for float32 and bfloat16 on a CPU: leave it out")
    if not (os.environ.get("CXX") or shutil.which("c++")):
        raise ValueError("--compile needs a C++ compiler, and there is none called c++")
    c = model.config
    check_request(c, [0], exit_layer, 1, 1)
    graphs = Graphs(model, sorted({0, exit_layer, c.n_layers}))
    x = torch.arange(MAX_ROWS * c.dim).sin().view(MAX_ROWS, -1).to(model.dtype)
    cache = new_cache(model, MAX_ROWS, 1)

    def logits(first: int, rows: int) -> Tensor:
        h = graphs.run_layers(x[first : first + rows], 0, c.n_layers, cache, first)
        return graphs.unembed(h)

    whole = logits(0, MAX_ROWS)
    for rows, first in product((1, 2, 5, 15), (0, 1, 11)):
        if not torch.equal(logits(first, rows), whole[first : first + rows]):
            raise ValueError("compiled rows do not keep apart on this machine: no --compile")
    model.run_layers = graphs.run_layers  # type: ignore[method-assign]
    model.unembed = graphs.unembed  # type: ignore[method-assign]
    return model
