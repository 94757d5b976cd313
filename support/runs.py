"""The directory of a training run: its lock, its tokens, its state, its metrics.

A run is one process. extras/sharded.py has the same for several, as a subclass: the methods that do
nothing here do something there.
"""

import json
import re
import shlex
import shutil
import signal
import sys
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import IO, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from support.checkpoint import WRONG_KIND, advice, parse_object, read_json, whole_file
from support.data import Render, Tokens, fingerprint, read_corpus, train_tokenizer, write_tokens
from support.tokenizer import Tokenizer

CARRIED = (  # what --init had and training does not change; the last two say BOS and EOS
    "tokenizer.model tokenizer.json tokenizer_config.json special_tokens_map.json "
    "added_tokens.json chat_template.jinja generation_config.json config.json"
).split()
FOREIGN = ("config.json", "params.json", "*.safetensors", "*.index.json", "tokenizer*")


class RunDirectory:
    """A directory that one run trains in. Raises ValueError, one line, on what cannot be used."""

    rank, world, state = 0, 1, "state.safetensors"

    def __init__(self, out: str | Path, init: str | Path | None):
        self.out, self.init = Path(out), None if init is None else Path(init).resolve()
        self.locked: IO | None = None
        self.stop_requested = 0  # to stop

    def lock(self) -> None:
        """Makes the directory this run's alone. Refuses one with a checkpoint that no run made."""
        ours = any((self.out / name).exists() for name in ("lock", "data.json"))
        other = "state.safetensors" if self.state != "state.safetensors" else "state-shards"
        if (self.out / other).exists():
            how = "without" if self.world > 1 else "with"
            raise ValueError(f"{self.out} holds a run {how} torchrun: go on with it that way")
        if self.out.resolve() == self.init:
            raise ValueError("--out is --init: choose another --out")
        if self.out.is_dir() and not ours and any(any(self.out.glob(f)) for f in FOREIGN):
            raise ValueError(f"{self.out} holds a checkpoint of no run: choose another --out")
        self.out.mkdir(parents=True, exist_ok=True)
        self.locked = open(self.out / "lock", "w")
        try:
            import fcntl

            fcntl.flock(self.locked, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except ImportError:
            pass  # Windows: nothing keeps another run out
        except OSError:
            raise ValueError(f"another run trains in {self.out}: choose another --out") from None
        for file in self.out.glob(".*.tmp"):  # of a run that was killed while it saved
            if re.fullmatch(r"\.[0-9a-f]{16}\.tmp", file.name):
                file.unlink()

    def open(
        self, sources: list[str], vocab: int, render: Render | None = None
    ) -> tuple[Tokens, Tokens, Tokenizer]:
        """Locks the directory and prepares the data: the first process does, then all read it."""
        if self.rank == 0:
            self.lock()
            self.prepare_data(sources, vocab, render)
        self.wait()
        self.tokenizer = Tokenizer(self.out)
        files = [self.out / "train.bin", self.out / "held_out.bin"]
        for file in files:
            if not file.is_file() or not file.stat().st_size:
                raise ValueError(f"{file} is empty or missing: choose another --out")
        train, held_out = (Tokens(file, self.tokenizer.vocab_size) for file in files)
        return train, held_out, self.tokenizer

    def prepare_data(self, sources: list[str], vocab: int, render: Render | None) -> None:
        """Writes the tokens, and the tokenizer: --init's, or one trained here. Once.

        Raises ValueError where the directory holds those of other settings or of other data.
        """
        self.say("reading the data")
        wanted = {"vocab": vocab, "init": self.init and str(self.init)}
        wanted |= fingerprint(read_corpus(sources, self.say))
        done = self.out / "data.json"
        if not done.exists():
            if self.init:
                for name in CARRIED:
                    if (self.init / name).is_file():
                        shutil.copyfile(self.init / name, self.out / name)
                tokenizer = Tokenizer(self.out)
            else:
                texts = (d.plain() for d in read_corpus(sources) if not d.held_out)
                tokenizer = train_tokenizer(texts, vocab, self.out / "tokenizer.model")
            write_tokens(read_corpus(sources), tokenizer, self.out, render)
            self.write_json("data.json", wanted)
        elif read_json(done) != wanted:
            what = "tokens of other data, --config or --init"
            raise ValueError(f"{self.out} holds {what}: choose another --out")

    def describe(self, record: dict, drafting: dict) -> None:
        """Writes what tells how the checkpoint was made, and how to decode with it; keeps metrics.

        Settings that --init had stay. An answer ends at its EOS tokens, and at the one that
        training wrote.
        """
        bos, eos = self.tokenizer.bos, self.tokenizer.eos
        found = self.init_json("generation_config.json")
        ends = found.get("eos_token_id", self.init_json("config.json").get("eos_token_id"))
        ends = ends if isinstance(ends, list) else [] if ends is None else [ends]
        ends += [eos] if eos is not None and eos not in ends else []
        ids = {"eos_token_id": ends if len(ends) > 1 else next(iter(ends), None)}
        found = {"bos_token_id": bos, **found, **ids, **drafting}
        self.write_json("generation_config.json", found)
        if (pad := self.init_json("config.json").get("pad_token_id")) is not None:
            config = read_json(self.out / "config.json", float)
            self.write_json("config.json", config | {"pad_token_id": pad})
        command = shlex.join(["python", "train.py", *sys.argv[1:]])
        self.write_json("training.json", {"command": command, **record})
        self.add_metrics({"step": record["steps"], "held_out": record["held_out"]})

    def init_json(self, name: str) -> dict:
        """A file of --init as it stands; {} if there is none that can be read."""
        return advice(self.init / name, float) if self.init else {}

    def write_json(self, name: str, content: dict) -> None:
        """Writes a file of the directory, whole or not at all."""
        with whole_file(self.out / name) as file:
            file.write(json.dumps(content, indent=2).encode() + b"\n")

    # ------------------------------------------------------------------------------------- state

    def save_state(self, tensors: dict[str, Tensor], about: dict) -> None:
        """Writes the state, whole or not at all: tensors by name, and what is to know of them."""
        with whole_file(self.out / self.state) as file:
            save_file(tensors, file.name, {"run": json.dumps(about)})

    def load_state(self, tensors: dict[str, Tensor], settings: dict) -> int:
        """Reads the state into tensors of the same names and shapes, and returns its step.

        0 where there is none. Raises ValueError where it is damaged or of other settings.
        """
        path = self.out / self.state
        if not path.exists():
            return 0
        wrong = (OSError, *WRONG_KIND, AttributeError, RuntimeError)
        try:
            found = self.about(path)
            step = found["step"]
            before = found["settings"]
            differs = [k for k, v in settings.items() if before.get(k) != v]
            if "steps" in differs and int(before["steps"]) < int(settings["steps"]):
                differs.remove("steps")  # a run may go on for longer
            if type(step) is not int or step < 0:
                raise ValueError(f"its step is {step!r:.40}")
            if not differs:
                self.read_tensors(path, tensors)
        except (*wrong, SafetensorError) as error:
            raise ValueError(f"{path} is damaged ({error!s:.200}): choose another --out") from None
        if differs:
            what = f"a run with other settings ({', '.join(differs)})"
            raise ValueError(f"{self.out} holds {what}: use the same, or another --out")
        return step

    def about(self, path: Path) -> dict:
        """What save_state was told about the state at `path`."""
        with safe_open(path, framework="pt") as file:
            return parse_object((file.metadata() or {}).get("run", ""), path.name)

    def read_tensors(self, path: Path, tensors: dict[str, Tensor]) -> None:
        """Copies what is stored into `tensors`."""
        with safe_open(path, framework="pt") as file:
            for name, tensor in tensors.items():
                tensor.copy_(file.get_tensor(name))

    def add_metrics(self, row: dict) -> None:
        """Appends a row to metrics.jsonl."""
        if self.rank == 0:
            with open(self.out / "metrics.jsonl", "a") as file:
                file.write(json.dumps(row) + "\n")

    def take_back_metrics(self, step: int) -> None:
        """Drops rows after `step`, which a killed run wrote, and rows that are damaged.

        All rows at step 0, which the run begins with.
        """
        path, kept = self.out / "metrics.jsonl", []
        if self.rank or not path.exists():
            return
        for line in path.read_text(errors="replace").splitlines():
            try:
                found = parse_object(line, path.name).get("step")
            except ValueError:
                continue
            if type(found) is int and 0 < step >= found:
                kept.append(line + "\n")
        with whole_file(path) as file:
            file.write("".join(kept).encode())

    # ------------------------------------------------------------------------ the person who waits

    def say(self, text: str, end: str = "\n") -> None:
        """Text to stderr, from the first process alone."""
        if self.rank == 0:
            print(text, end=end, file=sys.stderr, flush=True)

    def start_clock(self, step: int) -> None:
        """From now on, speed is the mean since this step."""
        self.begun, self.started = step, time.monotonic()

    def progress(self, step: int, steps: int, tokens: int, row: dict) -> None:
        """Adds a row to the metrics, and says it: on a terminal after each step, else now and then.

        tokens: those of a step.
        """
        per_step = (time.monotonic() - self.started) / (step - self.begun)
        self.add_metrics({"step": step, **row, "tokens_per_second": tokens / per_step})
        terminal = sys.stderr.isatty()
        if terminal or step % 50 == 0 or step == steps:
            bar = f"{'#' * (20 * step // steps):20} {step}/{steps}"
            left = f"{(steps - step) * per_step / 60:.0f} minutes left"
            text = " ".join(f"{exit}:{loss:.2f}" for exit, loss in row["losses"].items())
            end = "" if terminal else "\n"
            self.say(f"\r{bar}  {tokens / per_step:,.0f} tokens/s, {left}  loss {text}", end)

    def watch_signals(self) -> None:
        """From now on Ctrl-C and SIGTERM show in stopped(). A second one ends the process."""

        def ask_to_stop(number: int, _: object) -> None:
            self.stop_requested = 1
            signal.signal(number, signal.SIG_DFL)

        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, ask_to_stop)

    def stopped(self) -> bool:
        """Whether the run was asked to stop, in any process."""
        return self.agree(self.stop_requested) > 0

    # -------------------------------------------------------------------- for several processes

    def shard(self, module: nn.Module, layers: Iterable[nn.Module]) -> None:
        """Spreads parameters, gradients and the optimiser's state over the processes."""

    def whole_weights(self, module: nn.Module) -> dict[str, Any]:
        """The module's weights by name, whole, for the first process."""
        return module.state_dict()

    def sum(self, x: Tensor) -> Tensor:
        """x (...) added up over the processes, the same shape."""
        return x

    def agree(self, number: int) -> int:
        """The largest number that any process says."""
        return number

    def wait(self) -> None:
        """Returns when every process has come here."""

    def close(self) -> None:
        """Lets go of the directory, and of the other processes."""
        if self.locked:
            self.locked.close()


def state_tensors(
    parameters: Mapping[str, Tensor], optimizer: torch.optim.Optimizer
) -> dict[str, Tensor]:
    """Weights and AdamW's state by name, each shaped as its weight; steps are ().

    AdamW counts steps for each parameter: one that all samples skipped is not updated.
    """
    found = {}
    for name, p in parameters.items():
        state = optimizer.state[p]
        if not state:
            state["step"] = torch.tensor(0.0, device=p.device)
            state.update(exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p))
        found[f"weight.{name}"] = p.detach()
        found.update({f"{key}.{name}": value for key, value in state.items()})
    return found
