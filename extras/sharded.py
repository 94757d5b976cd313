"""Training over several processes: `torchrun --nproc-per-node N train.py ...`

FSDP2 spreads parameters, gradients and the optimiser's state, a layer at a time. The state is a
distributed checkpoint in safetensors: each process writes its shards, and any number of processes
under torchrun can go on from it.
"""

import json
import os
import shutil
from collections.abc import Iterable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader as Reader
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter as Writer
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard

from support.checkpoint import read_json
from support.runs import RunDirectory


class ShardedRun(RunDirectory):
    """RunDirectory for this process of several."""

    state = "state-shards"

    def __init__(self, out: str | Path, init: str | Path | None):
        super().__init__(out, init)
        gpu = torch.cuda.is_available()
        if gpu:
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        patience = timedelta(days=1)  # while one process reads the data or evaluates
        dist.init_process_group("nccl" if gpu else "gloo", timeout=patience)
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.device = torch.device("cuda", torch.cuda.current_device()) if gpu else "cpu"

    def close(self) -> None:
        super().close()
        dist.destroy_process_group()

    def shard(self, module: nn.Module, layers: Iterable[nn.Module]) -> None:
        for layer in layers:
            fully_shard(layer)
        fully_shard(module)

    def whole_weights(self, module: nn.Module) -> dict[str, Any]:
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        return get_model_state_dict(module, options=options)

    def sum(self, x: Tensor) -> Tensor:
        """x (...) added up over the processes, the same shape."""
        dist.all_reduce(x)
        return x

    def agree(self, number: int) -> int:
        said = torch.tensor(number, device=self.device)
        dist.all_reduce(said, dist.ReduceOp.MAX)
        return int(said)

    def wait(self) -> None:
        dist.barrier()

    def save_state(self, tensors: dict[str, Tensor], about: dict) -> None:
        """Beside the old state, flushed to disk; then it takes the old one's place."""
        place, aside = self.out / self.state, self.out / "state-shards.new"
        if self.rank == 0:
            shutil.rmtree(aside, ignore_errors=True)  # of a run that was killed
        self.wait()
        try:
            dcp.save(tensors, storage_writer=Writer(str(aside), save_distributed=True))
        except CheckpointException as error:
            cause = next(iter(error.failures.values()))[0]
            raise OSError(f"the state cannot be saved in {self.out}: {cause}") from None
        if self.rank == 0:
            (aside / "run.json").write_text(json.dumps(about))
            for file in aside.iterdir():
                with open(file, "r+b") as written:
                    os.fsync(written.fileno())
            old = self.out / "state-shards.old"
            if place.exists():
                os.rename(place, old)
            os.rename(aside, place)
            shutil.rmtree(old, ignore_errors=True)
        self.wait()

    def load_state(self, tensors: dict[str, Tensor], settings: dict) -> int:
        place, old = self.out / self.state, self.out / "state-shards.old"
        if self.rank == 0 and old.exists() and not place.exists():
            os.rename(old, place)  # killed between the two renames of save_state
        self.wait()
        return super().load_state(tensors, settings)

    def about(self, path: Path) -> dict:
        return read_json(path / "run.json")

    def read_tensors(self, path: Path, tensors: dict[str, Tensor]) -> None:
        """Each process reads its shards. Raises ValueError on files that cannot be read."""
        try:
            dcp.load(tensors, storage_reader=Reader(str(path)))
        except CheckpointException as error:
            raise ValueError(str(next(iter(error.failures.values()))[0])) from None
