"""Compiled decoding (`decode.py --compile`): layers as graphs of TorchInductor, with the same law.

The layers below the exit are one graph and those above it another, so a token goes through the same
code whoever drafts, and nothing is fused across the exit. A graph is made for one row and for ROWS
rows; a longer pass is cut, a shorter one is filled up with copies of its last row. Weights are
constants of a graph (freezing), and products are those of Inductor's own C++ template, which sums a
row in the same order in either graph. Cache, mask and positions are inputs: a graph has no state.

Graphs are made by torch.export, whose calls have no guards to check. float64 has no template.
"""

import os
import shutil
import sys
import warnings
from collections.abc import Callable
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cache import KVQCache
from decode import new_cache
from exact import MAX_ROWS, causal_line
from model import Layer, Llama

ROWS = 4  # rows of the larger graph: as many as a product takes in the time of one

OPTIONS = {
    "freezing": True,
    "max_autotune": True,
    "max_autotune_gemm_backends": "CPP",
    "emulate_precision_casts": True,  # round where PyTorch does, however operations are fused
    "cpp_wrapper": True,  # call the kernels from C++
}


class Layers(nn.Module):
    """Some layers on rows h (T, dim), over their keys and values (Hkv, max_len, hd) each."""

    def __init__(self, layers: list[Layer]):
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(
        self,
        h: Tensor,
        cos: Tensor,
        sin: Tensor,
        positions: Tensor,  # (T,)
        mask: Tensor,  # (T, 1, 1, S)
        keys: list[Tensor],
        values: list[Tensor],
    ) -> Tensor:
        for layer, all_k, all_v in zip(self.layers, keys, values):

            def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
                all_k.index_copy_(1, positions, k.transpose(0, 1))
                all_v.index_copy_(1, positions, v.transpose(0, 1))
                rows, heads, groups = q.shape[0], q.shape[1], k.shape[1]
                # As in exact.RowAttention: heads in eights, and never one small product alone.
                q = F.pad(q.unflatten(1, (groups, -1)), (0, 0, 0, -(heads // groups) % 8))
                count = max(rows, 2 if groups == 1 else 1)
                q, k, v = (
                    x.expand(count, -1, -1, -1)
                    for x in (q, all_k[:, : mask.shape[-1]], all_v[:, : mask.shape[-1]])
                )
                mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
                return mixed[:rows, :, : heads // groups].flatten(1, 2)

            h = layer(h, cos, sin, attend)
        return h


class Unembed(nn.Module):
    """The final norm and the head on rows (T, dim) -> (T, vocab)."""

    def __init__(self, model: Llama):
        super().__init__()
        self.norm, self.head = model.model.norm, model.lm_head

    def forward(self, h: Tensor) -> Tensor:
        return self.head(self.norm(h))


def make_graph(module: nn.Module, inputs: tuple, dynamic: tuple) -> Callable:
    """The module compiled for inputs like these. `dynamic` names the sizes that may differ."""
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.export.export(module, inputs, dynamic_shapes=dynamic, strict=False)
        found = [node.meta["val"] for node in program.graph.nodes if node.op == "placeholder"]
        weights = len(found) - len(torch.utils._pytree.tree_leaves(inputs))
        compiled = torch._inductor.compile(program.module(), found[weights:], options=OPTIONS)
    return compiled


class Graphs:
    """The decoding passes of a model as graphs between `cuts`, layer numbers from 0 to L."""

    def __init__(self, model: Llama, cuts: list[int]):
        self.model, self.cuts, self.plain = model, cuts, model.run_layers
        self.layers: dict[tuple[int, int], Callable] = {}  # by first layer and number of rows
        self.unembeds: dict[int, Callable] = {}  # by number of rows
        cache = new_cache(model.config, 128, 1, model.dtype, model.device)
        longest, view = torch.export.Dim("max_len"), torch.export.Dim("view")
        total, done = 2 * len(cuts), 0
        for rows in (1, ROWS):
            for first, last in pairwise(cuts):
                module = Layers(list(model.model.layers[first:last]))
                h = torch.zeros(rows, model.config.dim, dtype=model.dtype)
                inputs = (h, *self.places(cache, 0, rows, 64), *self.store(cache, first, last))
                each = [{1: longest}] * (last - first)
                dynamic = (None, None, None, None, {3: view}, each, each)
                self.layers[first, rows] = make_graph(module, inputs, dynamic)
                done += 1
                progress(done, total)
            self.unembeds[rows] = make_graph(Unembed(model), (h,), (None,))
            done += 1
            progress(done, total)

    def places(self, cache: KVQCache, start: int, rows: int, view: int) -> tuple[Tensor, ...]:
        """cos, sin, positions and mask of rows at start..start+T-1 that see `view` positions."""
        line = causal_line(cache.max_len, cache.keys.dtype, cache.keys.device)
        middle = cache.max_len - 1
        masks = [line[middle - p : middle - p + view] for p in range(start, start + rows)]
        cos, sin = self.model.rotary(start, rows)
        positions = torch.arange(start, start + rows)
        return cos.clone(), sin.clone(), positions, torch.stack(masks)[:, None, None]

    def store(self, cache: KVQCache, first: int, last: int) -> tuple[list[Tensor], list[Tensor]]:
        """Keys and values of layers [first, last)."""
        return list(cache.keys[first:last].unbind()), list(cache.values[first:last].unbind())

    def run_layers(
        self, h: Tensor, first: int, last: int, cache: KVQCache | None = None, start: int = 0
    ) -> Tensor:
        """Llama.run_layers. Raises ValueError where a decoding pass begins or ends in a graph."""
        if cache is None or len(h) > MAX_ROWS:
            return self.plain(h, first, last, cache, start)
        within = [cut for cut in self.cuts if first <= cut <= last]
        if within[:1] != [first] or within[-1:] != [last]:
            raise ValueError(
                f"the model is compiled for exits after layers {self.cuts[1:-1]}: "
                f"it cannot run layers {first} to {last}"
            )
        out = []
        while len(h):  # in parts that see one length of view
            end = start + len(h)
            view = cache.view_len(start + 1)
            rows = min(ROWS, end - start, view - start)
            part, places = h[:rows], self.places(cache, start, rows, view)
            size = 1 if rows == 1 else ROWS
            if rows < size:  # copies of the last row write what it writes
                part, cos, sin, at, mask = (fill(x, size) for x in (part, *places))
                places = cos, sin, at, mask
            for a, b in pairwise(within):
                part = self.layers[a, size](part.contiguous(), *places, *self.store(cache, a, b))
            out.append(part[:rows])
            h, start = h[rows:], start + rows
        return torch.cat(out)

    def unembed(self, h: Tensor) -> Tensor:
        """Llama.unembed."""
        if h.dim() > 2 or len(h) > MAX_ROWS:
            return self.model.lm_head(self.model.model.norm(h))
        if len(h) == 1:
            return self.unembeds[1](h.contiguous())
        parts = [self.unembeds[ROWS](fill(x, ROWS))[: len(x)] for x in h.split(ROWS)]
        return torch.cat(parts)


def fill(x: Tensor, rows: int) -> Tensor:
    """x (T, ...) with copies of its last row up to `rows`, contiguous."""
    missing = rows - len(x)
    return torch.cat([x, x[-1:].expand(missing, *x.shape[1:])]) if missing else x.contiguous()


def progress(done: int, total: int) -> None:
    """How far compilation is, on stderr."""
    end = "\n" if done == total or not sys.stderr.isatty() else ""
    print(f"\rcompiling: {done}/{total} graphs", end=end, file=sys.stderr, flush=True)


@torch.inference_mode()
def compile_model(model: Llama, exit_layer: int = 0) -> Llama:
    """Compiles, in place, a model's passes for drafts of exit_layer layers, 0 for none.

    Takes a plain model, not a packed one. That rows do not meet in what the compiler made is tried
    at several numbers of rows and places. Raises ValueError where they do, and where there is no
    compiler or no such exit.
    """
    if model.dtype == torch.float64 or model.device.type != "cpu":
        raise ValueError("--compile is for float32 and bfloat16 on a CPU: leave it out")
    if not (os.environ.get("CXX") or shutil.which("c++")):
        raise ValueError("--compile needs a C++ compiler, and there is none called c++")
    c = model.config
    if not 0 <= exit_layer < c.n_layers:
        raise ValueError(f"the exit layer must be from 0 to {c.n_layers - 1}, not {exit_layer}")
    graphs = Graphs(model, sorted({0, exit_layer, c.n_layers}))
    model.run_layers = graphs.run_layers  # type: ignore[method-assign]
    model.unembed = graphs.unembed  # type: ignore[method-assign]
    random = torch.Generator().manual_seed(0)
    x = torch.randn(MAX_ROWS, c.dim, generator=random).to(model.dtype)
    cache = new_cache(c, MAX_ROWS, 1, model.dtype, model.device)

    def logits(first: int, rows: int) -> Tensor:
        h = model.run_layers(x[first : first + rows], 0, c.n_layers, cache, first)
        return model.unembed(h)

    whole = logits(0, MAX_ROWS)
    for rows in (1, 2, 5, MAX_ROWS - 1):
        for first in (0, 1, MAX_ROWS - rows):
            if not torch.equal(logits(first, rows), whole[first : first + rows]):
                raise ValueError("compiled rows do not keep apart on this machine: no --compile")
    return model
