"""What the commands share: load a checkpoint, run a generation, show it, fail in one clear line.

Text goes to stdout, what is said about it to stderr; colours only to a terminal.
"""

import os
import sys
import time
from argparse import RawDescriptionHelpFormatter
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from io import TextIOWrapper
from pathlib import Path
from subprocess import CalledProcessError
from threading import Timer
from types import SimpleNamespace
from typing import Any

import torch
from safetensors import SafetensorError

from decode import Round
from exact import MAX_ROWS, auto_dtype
from model import Config, Llama, load_checkpoint
from support.checkpoint import CheckpointError, generation_config, refuse_stand_in
from support.tokenizer import Stream, Tokenizer, visible

DEFAULT_CKPT = Path(__file__).parents[1] / "checkpoints" / "pystdlib"
DEFAULT_PROMPT = '''def read_table(path, delimiter=","):
    """Read a table from a text file and return a list of rows."""
'''
HELP = partial(RawDescriptionHelpFormatter, max_help_position=26)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}


@contextmanager
def command_errors(name: str) -> Iterator[None]:
    """For the main of a command: what cannot run ends it with one clear line and exit code 2."""
    sys.stderr, code = sys.stderr or open(os.devnull, "w"), 2  # for None, print takes stdout
    if isinstance(sys.stdout, TextIOWrapper):  # ascii or cp1252 lacks most characters
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        yield
        print(end="", flush=True)
        return
    except KeyboardInterrupt:
        code = 130
    except BrokenPipeError:  # the reader of stdout has gone; nothing is left to say to it
        code = 1
    except (ValueError, OSError, ImportError, MemoryError, RuntimeError, SafetensorError) as error:
        if isinstance(error, RuntimeError) and "allocate" not in str(error):
            raise
        text = visible(" ".join(str(error).split())) or "out of memory"
        print(f"{name}: {text:.480}", file=sys.stderr)
    try:
        print(end="", flush=True)
    except OSError:  # let go what stdout still holds: it would be tried again at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    raise SystemExit(code)


@contextmanager
def compiler_errors(option: str) -> Iterator[None]:
    """Makes what PyTorch says when a C++ compiler fails a ValueError: `option` goes without one."""
    try:
        yield
    except (RuntimeError, CalledProcessError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"the C++ compiler does not work: {option} ({reason:.300})") from None


# --------------------------------------
# Loading


def usable_device(name: str) -> torch.device:
    """The device of that name; "auto" is a GPU if there is one. ValueError if it cannot be used."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        one = torch.ones(1, device=name)
        one.item()  # not on meta, which has no memory
        return one.device
    except (RuntimeError, AssertionError, ImportError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"device {name!r} cannot be used: {reason}") from None


def load(
    ckpt: str | Path,
    dtype: torch.dtype | str = "auto",
    device: torch.device | str = "auto",
    read: Callable[..., Llama] = load_checkpoint,
) -> tuple[Llama, Tokenizer]:
    """The model and the tokenizer of a checkpoint. Raises CheckpointError where one is missing.

    The tokenizer may have more tokens than the model, which then never says them.
    """
    if isinstance(device, str):
        device = usable_device(device)
    if isinstance(dtype, str):
        dtype = auto_dtype(device) if dtype == "auto" else DTYPES[dtype]
    ckpt = Path(ckpt)
    if not ckpt.is_dir():
        raise CheckpointError(f"there is no checkpoint directory {ckpt}")
    try:
        tokenizer = Tokenizer(ckpt)
    except ValueError:
        for name in ("tokenizer.json", "tokenizer.model"):
            refuse_stand_in(ckpt / name)
        raise
    return read(ckpt, dtype, device), tokenizer


def default_settings(ckpt: str | Path, config: Config, tokenizer: Tokenizer) -> dict:
    """exit_layer, draft_len, min_confidence and eos of generate for a checkpoint.

    They are what generation_config.json says under transformers' names for them. Else a quarter of
    the layers, 6 and 0.3, and the EOS of config.json or of the tokenizer.
    """
    found = generation_config(ckpt)
    exit_layer = found.get("assistant_early_exit", max(1, config.n_layers // 4))
    eos = found.get("eos_token_id", list(config.eos) or tokenizer.eos)
    return dict(
        exit_layer=min(exit_layer, config.n_layers - 1),
        draft_len=min(found.get("num_assistant_tokens", 6), MAX_ROWS - 1),
        min_confidence=found.get("assistant_confidence_threshold", 0.3),
        eos=tuple(eos) if isinstance(eos, list) else () if eos is None else (eos,),
    )


# --------------------------------------
# Running and showing


@dataclass
class Totals:
    """What the rounds of one or several generations add up to."""

    ids: list[int] = field(default_factory=list)
    rounds: list[Round] = field(default_factory=list)
    times: list[float] = field(default_factory=list)  # seconds of each round
    starts: list[int] = field(default_factory=list)  # rounds whose time is also that of a prompt
    prompt: int = 0  # tokens of a prompt that was read with `reading`
    prompt_seconds: float = 0.0  # its part of the first round's

    @property
    def seconds(self) -> float:
        """Seconds of generation, of reading a prompt too where its part was not noted."""
        return sum(self.times) - self.prompt_seconds

    @property
    def drafted(self) -> int:
        """How many tokens were drafted."""
        return sum(len(r.drafted) for r in self.rounds)

    @property
    def tokens_per_second(self) -> float:
        """New tokens per second of generation."""
        return len(self.ids) / max(self.seconds, 1e-9)

    @property
    def acceptance(self) -> float | None:
        """Share of drafted tokens that were accepted; None when nothing was drafted."""
        return sum(r.accepted for r in self.rounds) / self.drafted if self.drafted else None

    def summary(self) -> str:
        """The statistics, one line, after one of the prompt where that was noted."""
        speed = f"{self.tokens_per_second:.0f} tokens/s"
        text = f"{len(self.ids)} tokens in {self.seconds:.2f} s: {speed}"
        if self.acceptance is not None:
            text += f" | {self.acceptance:.0%} of the drafted tokens accepted"
            text += f" | {len(self.ids) / len(self.rounds):.2f} tokens per round"
        if self.prompt:
            speed = f"{self.prompt / max(self.prompt_seconds, 1e-9):.0f} tokens/s"
            first = f"{speed} | first new token after {self.times[0]:.2f} s"
            text = f"prompt: {self.prompt} tokens in {self.prompt_seconds:.2f} s: {first}\n{text}"
        return text


def collect(
    rounds: Iterator[Round],
    on_round: Callable[[Round], None] | None = None,
    into: Totals | None = None,
    keep_logits: bool = False,
) -> Totals:
    """Runs a generation to its end. on_round is called after each round; its time does not count.

    `into` collects the rounds, so that an interrupted caller has what was done. Logits are let go
    as rounds end, unless keep_logits.
    """
    into = into or Totals()
    into.starts.append(len(into.rounds))
    started = time.perf_counter()
    for r in rounds:
        into.times.append(time.perf_counter() - started)
        into.ids += r.emitted
        into.rounds.append(r if keep_logits else replace(r, logits=None))
        if on_round:
            on_round(r)
        started = time.perf_counter()
    return into


@contextmanager
def reading(make: Callable[..., Any], prompt: int, into: Totals) -> Iterator[Callable[..., Any]]:
    """Gives drafters as those of `make`, whose first draft notes that the prompt has been read.

    If that takes longer than a second, a line says so on a terminal until then.
    """
    started, line = time.perf_counter(), f"reading {prompt} tokens ..."
    say = partial(print, end="\r", file=sys.stderr, flush=True)
    timer = Timer(1, say, [line])
    timer.daemon = True

    def done() -> None:
        if timer.finished.is_set():
            say(" " * len(line))
        timer.cancel()

    def noting(*context: Any) -> SimpleNamespace:
        drafter = make(*context)

        def draft(*asked: Any) -> tuple[list[int], int]:
            if not into.prompt:
                if torch.cuda.is_available():
                    torch.cuda.synchronize()
                into.prompt, into.prompt_seconds = prompt, time.perf_counter() - started
                done()
            return drafter.draft(*asked)

        return SimpleNamespace(draft=draft, verified=drafter.verified)

    if sys.stderr.isatty():
        timer.start()
    try:
        yield noting
    finally:
        if not into.prompt:
            done()


def until(rounds: Iterator[Round], stream: Stream) -> Iterator[Round]:
    """Rounds up to the token that completes a stop of a new stream: the last one is cut there."""
    for r in rounds:
        fed = 0
        while fed < len(r.emitted) and not stream.stopped:
            stream.feed([r.emitted[fed]])
            fed += 1
        logits = None if r.logits is None else r.logits[:fed]
        yield replace(r, emitted=r.emitted[:fed], logits=logits)
        if stream.stopped:
            return


def comparison(result: Totals, full: Totals) -> str:
    """One sentence: the same tokens and logits or not, and the ratio of the speeds."""
    speedup = f"{result.tokens_per_second / full.tokens_per_second:.2f} times its speed"
    if result.ids != full.ids:
        same = [*(a == b for a, b in zip(result.ids, full.ids)), False].index(False)
        return f"NOT identical to the full model after {same} tokens, {speedup}"
    a, b = (torch.cat([r.logits for r in x.rounds if r.logits is not None]) for x in (result, full))
    bits = ", logits equal to the last bit" if torch.equal(a, b) else ""
    return f"identical to the full model ({len(full.ids)} tokens{bits}), {speedup}"


GREEN, BLUE, DIM, RESET = "\033[32m", "\033[94m", "\033[2m", "\033[0m"


class Show:
    """Streams rounds to stdout. On a terminal, accepted drafts are green, corrections blue."""

    def __init__(
        self, tokenizer: Tokenizer, prompt_ids: list[int], text: str, stops: Collection[str] = ()
    ):
        self.stream, self.terminal = Stream(tokenizer, prompt_ids, stops), sys.stdout.isatty()
        plain = os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb"
        self.colours = self.terminal and not plain
        self.before = text if self.terminal else ""  # not shown for a prompt that cannot run

    def __call__(self, r: Round) -> None:
        for place, token in enumerate(r.emitted):
            self.put(self.stream.feed([token]), GREEN if place < r.accepted else BLUE)

    def finish(self) -> None:
        """The text that was held back, and the end of the line."""
        self.put(self.stream.finish(), BLUE)
        print(flush=True)

    def put(self, text: str, colour: str) -> None:
        """Text to stdout. A model may say anything: a terminal gets no control characters of it."""
        if self.before:
            before, self.before = self.before, ""
            self.put(before, DIM)
        if text and self.terminal:
            text = visible(text)
        print(f"{colour}{text}{RESET}" if text and self.colours else text, end="", flush=True)
