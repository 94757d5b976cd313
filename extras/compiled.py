"""Compiled decoding (`decode.py --compile`): layers as graphs of TorchInductor, as exact.

All layers are the same code with other weights, so one graph of a few layers is compiled, and used
again and again with the weights of the next ones. A token so meets the same code whoever drafts. A
graph takes up to ROWS rows; a longer pass is cut. Products are by Inductor's C++ template (see
products.py), which sums a row in the same order whatever the number of rows. Cache and positions
are inputs: a graph has no state.

Graphs are compiled ahead of time (torch.export, AOTInductor) and kept on disk, for every checkpoint
of the same shape.
"""

import hashlib
import json
import math
import os
import shutil
import sys
import warnings
from collections.abc import Callable
from copy import copy, deepcopy
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any
from unittest.mock import patch

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
    grouped_attention,
    safe_padding,
)
from extras.products import faster_products
from model import Layer, Llama
from support.console import compiler_errors

GROUP = 6  # the most layers of a graph: fewer take longer to call, more take longer to compile
OPTIONS = {
    "freezing": True,
    "max_autotune": True,
    "max_autotune_gemm_backends": "CPP",
    "emulate_precision_casts": True,  # round where PyTorch does, however operations are fused
    "aot_inductor.package_constants_in_so": False,
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

    def __init__(self, layers: Any, pad_to: int):
        super().__init__()
        self.layers: Any = nn.ModuleList(map(joined_layer, layers))
        self.pad_to = pad_to

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
        mask = block_mask(positions, size, a.n_heads // a.n_kv_heads, self.pad_to, h.dtype)
        for layer, all_k, all_v in zip(self.layers, keys, values):

            def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
                all_k.index_copy_(1, positions, k.transpose(0, 1))
                all_v.index_copy_(1, positions, v.transpose(0, 1))
                return grouped_attention(q, all_k[None, :, :size], all_v[None, :, :size], mask)

            h = layer(h, cos, sin, attend)
        return h


# --------------------------------------
# One graph, many weights


def in_blocks(weight: Tensor, shape: tuple[int, ...], pairs: int) -> Tensor:
    """A weight (N, K) as a graph wants it: (N / b, K, b), or as it is where `shape` is its own.

    With pairs = 2 or 4, so many neighbours in K stand together, as AMX reads them.
    """
    if weight.shape == shape:
        return weight
    count, k, b = shape
    x = F.pad(weight, (0, 0, 0, count * b - len(weight))).view(count, b, k).transpose(1, 2)
    return x.reshape(count, k // pairs, pairs, b).transpose(2, 3).reshape(shape).contiguous()


def compile_graph(file: Path, module: nn.Module, inputs: tuple, dynamic: tuple) -> None:
    """Writes a graph of the module to `file`, and to a .json which weight each constant is.

    `dynamic` sizes of the inputs may differ. The graph is made with random weights, so each
    constant tells by its values what it was made of. Raises ValueError where one does not.
    """
    from torch._inductor.graph import GraphLowering

    print(f"compiling {file.stem}, once", file=sys.stderr, flush=True)
    module, random = deepcopy(module), torch.Generator().manual_seed(0)
    for p in module.parameters():
        p.normal_(generator=random)
    constants, allocate = dict[str, Tensor](), GraphLowering.allocate_non_dup_const_name

    def named(graph: Any, name: str | None, data: Tensor) -> str:
        found = allocate(graph, name, data)
        graph.allocated_constant_name[found] = found  # else two may be called alike
        constants[found] = data.detach()
        return found

    aside = file.with_name(f"{os.getpid()}.pt2")
    allocating = patch.object(GraphLowering, "allocate_non_dup_const_name", named)
    with warnings.catch_warnings(), faster_products(), allocating:
        warnings.simplefilter("ignore")
        program = torch.export.export(module, inputs, dynamic_shapes=dynamic, strict=False)
        with compiler_errors("leave out --compile"):
            torch._inductor.aoti_compile_and_package(
                program, package_path=str(aside), inductor_configs=dict(OPTIONS)
            )
    made_of = {}
    for constant in torch._inductor.aoti_load_package(str(aside)).loader.get_constant_fqns():
        data = constants[constant]
        for (name, p), pairs in product(module.named_parameters(), (1, 2, 4)):
            fits = p.shape == data.shape or p.shape[1:] == data.shape[1:-1] != ()
            if fits and torch.equal(in_blocks(p, tuple(data.shape), pairs), data):
                made_of[constant] = name, list(data.shape), pairs
                break
        else:
            raise ValueError("--compile does not know this PyTorch's weights: leave it out")
    file.with_suffix(".json").write_text(json.dumps(made_of))
    os.replace(aside, file)


def load_graph(file: Path, module: nn.Module) -> Callable:
    """The graph in `file`, with the weights of a module of the same kind."""
    loader, weights = torch._inductor.aoti_load_package(str(file)).loader, module.state_dict()
    made_of = json.loads(file.with_suffix(".json").read_text())
    constants = {
        constant: in_blocks(weights[name], tuple(shape), pairs)
        for constant, (name, shape, pairs) in made_of.items()
    }
    loader.load_constants(constants, False, True, True)  # not copied: run keeps them alive

    def run(inputs: list[Tensor], kept: dict = constants) -> Tensor:
        return loader.run(inputs)[0]

    return run


def graph_of(file: Path, module: nn.Module, inputs: tuple, dynamic: tuple) -> Callable:
    """The graph in `file` with the module's weights, compiled where it is missing or damaged."""
    try:
        return load_graph(file, module)
    except (RuntimeError, OSError, ValueError, LookupError, TypeError, AttributeError):
        compile_graph(file, module, inputs, dynamic)
        return load_graph(file, module)


class Graphs:
    """A model's decoding passes as graphs of `group` layers each."""

    def __init__(self, model: Llama, group: int):
        self.model, self.group, self.plain = model, group, (model.run_layers, model.unembed)
        # Where no instruction multiplies bfloat16, graphs read a prompt faster than PyTorch.
        slow = model.dtype == torch.bfloat16 != auto_dtype(model.device)
        self.longest = model.config.max_len if slow else MAX_ROWS
        folder = Path(cache_dir()) / "layerskip" / fingerprint(model)
        folder.mkdir(parents=True, exist_ok=True)
        rows, length = {0: Dim("rows", min=1, max=ROWS)}, {1: Dim("max_len")}
        dynamic = (*[rows] * 4, {0: Dim("view")}, *[[length] * group] * 2)
        h, pad_to = model.norm.weight.new_zeros(2, model.config.dim), max(safe_padding(model), 1)
        cache = new_cache(model, 128, 1)
        inputs = h, *self.places(0, 2, 64), [*cache.keys[:group]], [*cache.values[:group]]
        file = folder / f"{group} layers.pt2"
        self.layers = [
            graph_of(file, Layers(model.layers[l : l + group], pad_to), inputs, dynamic)
            for l in range(0, model.config.n_layers, group)
        ]
        head = nn.Sequential(model.norm, model.lm_head)
        self.head = graph_of(folder / "the head.pt2", head, (h,), (rows,))

    def places(self, start: int, rows: int, view: int) -> tuple[Tensor, ...]:
        """cos, sin and positions of rows from `start`, and a zero for each position they see."""
        cos, sin = self.model.rotary(start, rows)
        return cos, sin, torch.arange(start, start + rows), cos.new_zeros(view)

    def run_layers(
        self, h: Tensor, first: int, last: int, cache: KVQCache | None = None, start: int = 0
    ) -> Tensor:
        """Llama.run_layers. Raises ValueError where a pass begins or ends within a graph."""
        if cache is None or len(h) > self.longest:
            return self.plain[0](h, first, last, cache, start)
        if first % self.group or last % self.group:
            raise ValueError(f"compiled layers run by {self.group}, not from {first} to {last}")
        out, (keys, values) = [], (x.unbind() for x in (cache.keys, cache.values))
        for begin, end, view in blocks(start, len(h), ROWS):
            part, places = h[begin:end], self.places(start + begin, end - begin, view)
            for l in range(first, last, self.group):
                store = *keys[l : l + self.group], *values[l : l + self.group]
                part = self.layers[l // self.group]([part, *places, *store])
            out.append(part)
        return torch.cat(out)

    def unembed(self, h: Tensor) -> Tensor:
        """Llama.unembed."""
        if h.dim() > 2 or len(h) > MAX_ROWS:
            return self.plain[1](h)
        return torch.cat([self.head([x]) for x in h.split(ROWS)])


def fingerprint(model: Llama) -> str:
    """A name for what graphs depend on: shape, type, code, PyTorch and the processor."""
    about = torch.__version__, torch.get_num_threads(), torch.cpu.get_capabilities(), OPTIONS
    shape = replace(model.config, n_layers=0), model.dtype
    digest = hashlib.sha256(repr((shape, about)).encode())
    for code in ("extras/compiled", "extras/products", "exact", "support/trials", "model"):
        digest.update((Path(__file__).parents[1] / f"{code}.py").read_bytes())
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
    check_request(c, [0], exit_layer)
    shared = math.gcd(exit_layer, c.n_layers)
    graphs = Graphs(model, max(n for n in range(1, GROUP + 1) if shared % n == 0))
    x = torch.arange(MAX_ROWS * c.dim).sin().view(MAX_ROWS, -1).to(model.dtype)
    cache = new_cache(model, MAX_ROWS, 1)

    def logits(first: int, rows: int) -> Tensor:
        h = graphs.run_layers(x[first : first + rows], 0, c.n_layers, cache, first)
        return graphs.unembed(h)

    whole = logits(0, MAX_ROWS)
    plain = model.unembed(model.run_layers(x, 0, c.n_layers, cache))
    if (whole - plain).float().norm() > 0.1 * plain.float().norm():
        raise ValueError("compiled logits are not the model's on this machine: no --compile")
    logits(0, MAX_ROWS)  # the cache as before
    for rows, first in product((1, 2, 5, 15), (0, 1, 11)):
        if not torch.equal(logits(first, rows), whole[first : first + rows]):
            raise ValueError("compiled rows do not keep apart on this machine: no --compile")
    model.run_layers = graphs.run_layers  # type: ignore[method-assign]
    model.unembed = graphs.unembed  # type: ignore[method-assign]
    return model
