"""Measurements: medians of alternating turns, for an idle machine. COMMAND --help says more."""

import argparse
import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch

from bench.common import SHAPES, markdown, progress
from bench.decoding import drafters, speedup, sweep
from bench.engine import ideal, roofline
from bench.peers import peers, train
from exact import auto_dtype
from extras.parallel import processes
from support.console import DEFAULT_CKPT, DTYPES, command_errors, usable_device

FLAG: dict = dict(action="store_true", default=False)
OPTIONS: dict[str, dict] = {
    "ckpt": dict(type=Path, default=DEFAULT_CKPT, help="a checkpoint (the shipped one)"),
    "shape": dict(choices=SHAPES, help="random weights of this shape, no checkpoint"),
    "prompts": dict(type=int, default=20, help="how many (%(default)s)"),
    "prompts-file": dict(type=Path, nargs="+", metavar="FILE", help="your own: .jsonl or a text"),
    "chat": FLAG | dict(help="they are messages of a chat"),
    "task": dict(
        choices=["code", "edit", "chat"], default="code", help="edit and chat: of a chat model"
    ),
    "tokens": dict(type=int, default=256, help="new ones per prompt (%(default)s)"),
    "runs": dict(type=int, default=5, help="alternating turns (%(default)s)"),
    "exit": dict(type=int, help="exit layer, else the checkpoint's"),
    "draft": dict(type=int, help="draft length, else the checkpoint's"),
    "confidence": dict(type=float, help="drafting stops there, else the checkpoint's"),
    "context": dict(type=int, help="live positions before a pass, else a prompt's"),
    "exits": dict(type=int, nargs="+", help="exit layers (1/12, 1/6, 1/4 and 1/3 of the layers)"),
    "drafts": dict(type=int, nargs="+", default=[2, 4, 8], help="draft lengths (2 4 8)"),
    "temperature": dict(type=float, default=0.0, help="0: greedy (0)"),
    "csv": dict(type=Path, metavar="FILE", help="write the rows"),
    "png": dict(type=Path, metavar="FILE", help="draw tokens/s over the exit"),
    "write": FLAG | dict(help="keep the best in generation_config.json"),
    "drafter": dict(nargs="+", default=[], help="other drafters, as in decode.py"),
    "tries": dict(type=int, default=200, help="of the search for sublayers to skip"),
    "compile": FLAG | dict(help="also compiled; decoding drafts so then"),
    "dtype": dict(choices=["auto", *DTYPES], default="auto"),
    "device": dict(default="cpu"),
}
DECODING = "prompts tokens runs confidence dtype device"
OWN = f"{DECODING} prompts-file chat"
COMMANDS: dict[Callable, tuple[str, dict]] = {  # options, and defaults of their own
    speedup: (f"ckpt task {OWN} exit draft drafter compile", {}),
    sweep: (
        f"ckpt {OWN} exits drafts temperature compile csv png write",
        dict(prompts=5, tokens=32, runs=3),
    ),
    drafters: (f"ckpt task {OWN} exit draft drafter tries compile", {}),
    peers: (f"ckpt shape task context {DECODING} exit draft compile", {}),
    roofline: ("ckpt shape runs dtype device context exit draft compile", dict(runs=30)),
    ideal: (
        "shape prompts tokens runs exit draft compile dtype device",
        dict(shape="1b", prompts=4, tokens=64, runs=3),
    ),
    train: ("ckpt runs compile", dict(device="auto")),  # as train.py chooses its device and type
}


def parser() -> argparse.ArgumentParser:
    """The commands and their options."""
    p = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    commands = p.add_subparsers(required=True, metavar="COMMAND")
    for work, (options, defaults) in COMMANDS.items():
        about = work.__doc__ or ""
        short = about.split("\n")[0]
        one = commands.add_parser(work.__name__, help=short, description=about, allow_abbrev=False)
        for name in options.split():
            one.add_argument(f"--{name}", **OPTIONS[name])
        every = {name.replace("-", "_"): x.get("default") for name, x in OPTIONS.items()}
        one.set_defaults(work=work, **every | defaults)
    return p


def machine(device: torch.device) -> str:
    """The processor, whether it has bfloat16 instructions, threads, and a GPU that is used."""
    can = torch.cpu.get_capabilities()
    bf16 = "yes" if any(on and "bf16" in name for name, on in can.items()) else "no"
    threads = f"{torch.get_num_threads()} threads"
    gpu = f", {torch.cuda.get_device_name(device)}" if device.type == "cuda" else ""
    return f"{can['cpu_name']}, bfloat16 instructions: {bf16}, {threads}{gpu}"


def main() -> None:
    args = parser().parse_args()
    several: AbstractContextManager = nullcontext()
    if "RANK" in os.environ:  # torchrun's
        several = processes(args)
    with command_errors("bench"), several:
        if min(args.prompts, args.tokens, args.runs, *(args.exits or [1])) < 1:
            raise ValueError("--prompts, --tokens, --runs, --exits: at least 1")
        if args.chat > bool(args.prompts_file) or (args.prompts_file and args.task != "code"):
            raise ValueError("--chat goes with --prompts-file, --task without")
        args.device = usable_device(args.device)
        args.dtype = DTYPES.get(args.dtype) or auto_dtype(args.device)
        tables = args.work(args)
        progress("")
        print(machine(args.device), *(markdown(*table) for table in tables), sep="\n\n")
    if any(row.get("identical") is False for _, rows in tables for row in rows):
        raise SystemExit("bench: a drafted text is not the plain text")  # exit code 1


if __name__ == "__main__":
    main()
