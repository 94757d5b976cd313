"""Decoding over several processes: `torchrun --nproc-per-node N decode.py ...`

Tensor parallelism (Megatron-LM, arXiv 1909.08053): each process has 1/N of the heads, hidden units
and vocabulary rows, and the cache of its heads. o_proj and down_proj give parts of a sum. A ring
all-reduce would add them in an order that depends on the rows of the pass. So every process gathers
the parts, and adds them in the order of the ranks. Hidden states and logits are then the same bits
everywhere: every process runs the whole command, and picks the same tokens.
"""

import ctypes
import os
import signal
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from model import Attend, Config, Layer, Llama, causal_attention
from support.checkpoint import check_tensors, read_checkpoint

DRAFTERS = "exit", "lookup", "lookup+exit", "jacobi", "lookahead"  # that use no other weights


@contextmanager
def connected() -> Iterator[None]:
    """Makes what a collective call raises, as where a process is lost, a ConnectionError."""
    try:
        yield
    except RuntimeError as error:
        raise ConnectionError(f"another process was lost ({error!s:.200})") from None


def gathered(part: Tensor) -> Tensor:
    """(N, ...): the tensors (...) of all processes, by rank."""
    parts = part.new_empty(dist.get_world_size(), *part.shape)
    with connected():
        dist.all_gather([*parts], part.contiguous())
    return parts


def added(part: Tensor) -> Tensor:
    """The sum of the tensors (...) of all processes, by rank, in float32 or wider."""
    parts = gathered(part)
    total = parts[0].to(torch.promote_types(part.dtype, torch.float32))
    for other in parts[1:]:
        total = total + other
    return total.to(part.dtype)


def agreed(value: Any) -> Any:
    """The first process's value."""
    values = [value]
    with connected():
        dist.broadcast_object_list(values)
    return values[0]


# --------------------------------------
# The model


class PartOfLayer(Layer):
    """A layer of some heads and hidden units, which adds what the other processes' give."""

    def forward(
        self, h: Tensor, cos: Tensor, sin: Tensor, attend: Attend = causal_attention
    ) -> Tensor:
        h = h + added(self.self_attn(self.input_layernorm(h), cos, sin, attend))
        return h + added(self.mlp(self.post_attention_layernorm(h)))


class PartOfLlama(Llama):
    """A Llama of this process's heads, hidden units and vocabulary rows.

    It takes and gives what the whole would: all tokens, whole hidden states, all logits. So does
    what `pack` makes of it. Raises ValueError where N does not divide the shape.
    """

    def __init__(self, config: Config):
        count = dist.get_world_size()
        share = {name: getattr(config, name) for name in ("n_heads", "n_kv_heads", "hidden_dim")}
        for name, size in share.items():
            if size % count:
                raise ValueError(f"{count} processes do not divide the model's {name}, {size}")
            share[name] = size // count
        rows = -(-config.vocab_size // count)  # the last process may have fewer
        super().__init__(replace(config, vocab_size=rows, **share))
        self.config = replace(config, **share)
        self.layers = nn.ModuleList(PartOfLayer(self.config) for _ in range(config.n_layers))
        self.first, self.rows = dist.get_rank() * rows, rows

    def embed(self, tokens: Tensor) -> Tensor:
        place = tokens - self.first
        elsewhere = (place < 0) | (place >= self.rows)
        h = self.embed_tokens(place.masked_fill(elsewhere, 0))
        return added(h.masked_fill(elsewhere[..., None], 0))

    def unembed(self, h: Tensor) -> Tensor:
        parts = gathered(super().unembed(h))  # (N, ..., rows)
        return parts.movedim(0, -2).flatten(-2)[..., : self.config.vocab_size]


def load_part(
    path: str | Path, dtype: torch.dtype | None = None, device: str | torch.device = "cpu"
) -> PartOfLlama:
    """model.load_checkpoint for this process: of a tensor that is split only its part is read."""
    fields, tensors = read_checkpoint(path)
    config, weights = Config(**fields), {}
    with torch.device("meta"):
        part, whole = PartOfLlama(config), Llama(config)
    check_tensors(path, tensors, {name: p.shape for name, p in whole.named_parameters()})
    rank = dist.get_rank()
    for name, p in part.named_parameters():
        sizes = enumerate(zip(p.shape, tensors[name].shape))
        split = ((d, rank * own, (rank + 1) * own) for d, (own, all) in sizes if own != all)
        weight = tensors[name].read(*next(split, ()))
        if missing := p.shape[0] - weight.shape[0]:  # the vocabulary's end
            weight = F.pad(weight, (0, 0, 0, missing))
        weights[name] = weight.to(device, dtype)
    part.load_state_dict(weights, assign=True, strict=False)  # checked
    if config.tied:
        part.lm_head.weight = part.embed_tokens.weight
    return part.eval()


# --------------------------------------
# The processes


class Input:
    """Standard input, which the first process reads for all."""

    def __init__(self, stdin: Any):
        self.stdin, self.buffer, self.isatty = stdin, self, stdin.isatty

    def read(self) -> bytes:
        return agreed(dist.get_rank() or self.stdin.buffer.read())

    def readline(self) -> bytes:
        return agreed(dist.get_rank() or self.stdin.buffer.readline())


@contextmanager
def processes(args: Namespace) -> Iterator[tuple[Callable, Callable]]:
    """Makes this process one of torchrun's while a command runs; gives load_part and agreed.

    The first process alone reads standard input and prints. Of several that fail, as all do on bad
    input, the first to do so says why. Raises ValueError for what needs the whole model.
    """
    store, rank, count = next(dist.rendezvous("env://"))
    local, gpus = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
    backend = "gloo" if args.device == "cpu" or not gpus else "cpu:gloo,cuda:nccl"
    day = timedelta(days=1)  # for users. A lost process is known by its closed connections
    dist.init_process_group(backend, timeout=day, store=store, rank=rank, world_size=count)
    signal.signal(signal.SIGINT, lambda *_: sys.exit(130))  # ends a conversation too
    with suppress(AttributeError):  # glibc: M_MMAP_THRESHOLD, so that freed weights are given back
        ctypes.CDLL(None).mallopt(-3, 1 << 20)
    stderr = sys.stderr
    if rank:
        sys.stdout = sys.stderr = open(os.devnull, "w")
    if sys.stdin:
        sys.stdin = Input(sys.stdin)
    try:
        refuse(args)
        if backend != "gloo":
            if args.device not in ("auto", "cuda") or local >= gpus:
                raise ValueError(f"each process needs one of {gpus} GPUs, or --device cpu")
            torch.cuda.set_device(local)
        yield load_part, agreed
    except Exception:
        with suppress(RuntimeError):  # the store may be lost too
            if store.add("failed", 1) > 1:
                os._exit(0)
        sys.stderr = stderr
        raise
    finally:
        dist.destroy_process_group()  # its threads would abort the end of the interpreter


def refuse(args: Namespace) -> None:
    """Raises ValueError for options of a command that need the whole model in one process."""
    given = vars(args)
    who = given.get("drafter", [])
    if not {*([who] if isinstance(who, str) else who)} <= {*DRAFTERS}:
        raise ValueError(f"over several processes --drafter is {', '.join(DRAFTERS)}")
    for option in ("compile", "no_verify"):
        if given.get(option):
            raise ValueError(f"--{option.replace('_', '-')} is not for several processes")
