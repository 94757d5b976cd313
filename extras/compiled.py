"""Compiled decoding (`decode.py --compile`): layers as graphs of TorchInductor, as exact.

Layers below the exit are one graph and those above it another, so a token meets the same code
whoever drafts. A graph takes up to ROWS rows; a longer pass is cut. Weights are constants of it
(freezing), and products are by Inductor's own C++ template, which sums a row in the same order
whatever the number of rows. Cache and positions are inputs: a graph has no state.

Graphs are compiled ahead of time (torch.export, AOTInductor), and kept on disk.
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

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._inductor.runtime.cache_dir_utils import cache_dir
from torch.export import Dim

from cache import KVQCache
from decode import check_request, new_cache
from exact import MAX_ROWS, PackedAttention, PackedMLP
from model import Layer, Llama

ROWS = {torch.bfloat16: 4, torch.float32: 8}  # of one pass; two of these are faster than more
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
    layer.mlp = PackedMLP(layer.mlp, joined, F.silu)  # which keeps rows apart when it is compiled
    return layer


class Layers(nn.Module):
    """Layers on rows h (T, dim) at positions (T,), over keys and values (Hkv, max_len, hd).

    cos and sin (T, 1, hd). view (S,): zeros, as many as positions that the rows see.
    """

    def __init__(self, layers: Any):
        super().__init__()
        self.layers = nn.ModuleList(map(joined_layer, layers))

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
        size = view.shape[0]
        later = torch.arange(size) > positions[:, None]
        mask = view.masked_fill(later, float("-inf"))[:, None, None]  # (T, 1, 1, S)
        for layer, all_k, all_v in zip(self.layers, keys, values):

            def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
                all_k.index_copy_(1, positions, k.transpose(0, 1))
                all_v.index_copy_(1, positions, v.transpose(0, 1))
                (rows, heads, _), groups = q.shape, k.shape[1]
                # As in exact.RowAttention: rows are a batch, and heads come in eights.
                q = F.pad(q.unflatten(1, (groups, -1)), (0, 0, 0, -(heads // groups) % 8))
                k, v = (x[:, :size].expand(rows, -1, -1, -1) for x in (all_k, all_v))
                mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
                return mixed[:, :, : heads // groups].flatten(1, 2)

            h = layer(h, cos, sin, attend)
        return h


# --------------------------------------
# Graphs in a model's place


def make_graph(file: Path, module: nn.Module, inputs: tuple, dynamic: tuple) -> Callable:
    """The module compiled for such inputs, of which `dynamic` sizes may differ; kept in `file`."""
    if not file.exists():
        print(f"compiling {file.stem}, once", file=sys.stderr, flush=True)
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.export.export(module, inputs, dynamic_shapes=dynamic, strict=False)
            aside = str(file.with_name(f"{os.getpid()}.pt2"))
            torch._inductor.aoti_compile_and_package(
                program, package_path=aside, inductor_configs=dict(OPTIONS)
            )
        os.replace(aside, file)
    return torch._inductor.aoti_load_package(str(file)).loader.run


class Graphs:
    """The decoding passes of a model as graphs between `cuts`, from 0 to L."""

    def __init__(self, model: Llama, cuts: list[int]):
        self.model, self.cuts, self.plain = model, cuts, (model.run_layers, model.unembed)
        c, self.most = model.config, ROWS[model.dtype]
        # As in exact.RowAttention: no lone row of one key/value head.
        self.least = 2 if c.n_kv_heads == 1 else 1
        rows, length = {0: Dim("rows", min=self.least, max=self.most)}, {1: Dim("max_len")}
        folder = Path(cache_dir()) / "layerskip" / fingerprint(model)
        folder.mkdir(parents=True, exist_ok=True)
        cache = new_cache(c, 128, 1, model.dtype, model.device)
        h = torch.zeros(2, c.dim, dtype=model.dtype)
        self.layers: dict[int, Callable] = {}  # by the first layer
        for first, last in pairwise(cuts):
            store = list(cache.keys[first:last]), list(cache.values[first:last])
            inputs = (h, *self.places(cache, 0, 2, 64), *store)
            dynamic = (rows, rows, rows, rows, {0: Dim("view")}, *[[length] * (last - first)] * 2)
            module, name = Layers(model.model.layers[first:last]), f"layers {first} to {last}"
            self.layers[first] = make_graph(folder / f"{name}.pt2", module, inputs, dynamic)
        unembed = nn.Sequential(model.model.norm, model.lm_head)
        self.head = make_graph(folder / "the head.pt2", unembed, (h,), (rows,))

    def places(self, cache: KVQCache, start: int, rows: int, view: int) -> tuple[Tensor, ...]:
        """cos, sin, positions and view of rows from `start` on that see `view` positions."""
        positions = torch.arange(start, start + rows)
        return *self.model.rotary(start, rows), positions, cache.keys.new_zeros(view)

    def run_layers(
        self, h: Tensor, first: int, last: int, cache: KVQCache | None = None, start: int = 0
    ) -> Tensor:
        """Llama.run_layers. Raises ValueError where a decoding pass begins or ends in a graph."""
        if cache is None or len(h) > MAX_ROWS:
            return self.plain[0](h, first, last, cache, start)
        within = [cut for cut in self.cuts if first <= cut <= last]
        if within[:1] != [first] or within[-1:] != [last]:
            raise ValueError(f"no graph begins and ends at {first} and {last}: only {self.cuts} do")
        out = []
        while len(h):  # in parts that see one length of view
            view = cache.view_len(start + 1)
            rows = min(self.most, len(h), view - start)
            part, (cos, sin, positions, zeros) = h[:rows], self.places(cache, start, rows, view)
            part, cos, sin, positions = map(self.least_rows, (part, cos, sin, positions))
            for a, b in pairwise(within):
                store = *cache.keys[a:b], *cache.values[a:b]
                (part,) = self.layers[a]([part, cos, sin, positions, zeros, *store])
            out.append(part[:rows])
            h, start = h[rows:], start + rows
        return torch.cat(out) if len(out) > 1 else out[0]

    def least_rows(self, x: Tensor) -> Tensor:
        """x (T, ...), or a lone row twice where graphs take no lone one."""
        return x if len(x) >= self.least else torch.cat([x, x])

    def unembed(self, h: Tensor) -> Tensor:
        """Llama.unembed."""
        if h.dim() > 2 or len(h) > MAX_ROWS:
            return self.plain[1](h)
        out = [self.head([self.least_rows(x)])[0][: len(x)] for x in h.split(self.most)]
        return torch.cat(out) if len(out) > 1 else out[0]


def fingerprint(model: Llama) -> str:
    """A name for what graphs depend on: weights, code, PyTorch and the processor."""
    about = torch.__version__, torch.get_num_threads(), torch.cpu.get_capabilities(), OPTIONS
    digest = hashlib.sha256(repr((model.config, *about)).encode())
    for code in ("extras/compiled.py", "exact.py", "model.py"):
        digest.update((Path(__file__).parents[1] / code).read_bytes())
    for p in model.parameters():
        digest.update(p.detach().view(torch.uint8).numpy().data)
    return digest.hexdigest()[:32]


@torch.inference_mode()
def compile_model(model: Llama, exit_layer: int = 0) -> Llama:
    """Compiles, in place, a plain model's passes for drafts of exit_layer layers, 0 for none.

    Raises ValueError where there is no compiler or no such exit, and where a try shows that rows do
    not keep apart in what the compiler made.
    """
    if model.dtype not in ROWS or model.device.type != "cpu":
        raise ValueError("--compile is for float32 and bfloat16 on a CPU: leave it out")
    if not (os.environ.get("CXX") or shutil.which("c++")):
        raise ValueError("--compile needs a C++ compiler, and there is none called c++")
    c = model.config
    check_request(c, [0], exit_layer, 1, 1)
    graphs = Graphs(model, sorted({0, exit_layer, c.n_layers}))
    x = torch.arange(MAX_ROWS * c.dim).sin().view(MAX_ROWS, -1).to(model.dtype)
    cache = new_cache(c, MAX_ROWS, 1, model.dtype, model.device)

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
