"""Measurements: medians of alternating turns, for an idle machine. COMMAND --help says more."""

import argparse
import json
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import torch

from bench.common import SHAPES, markdown, progress
from bench.decoding import drafters, speedup, sweep
from bench.engine import ideal, roofline
from bench.peers import peers, train
from checkpoint import whole_file
from command import DEFAULT_CKPT, DTYPES, command_errors, usable_device
from exact import auto_dtype

OPTIONS: dict[str, dict] = {
    "ckpt": dict(type=Path, default=DEFAULT_CKPT),
    "shape": dict(choices=SHAPES, help="random weights of this shape, no checkpoint"),
    "prompts": dict(type=int, default=20),
    "tokens": dict(type=int, default=256, help="new ones for each prompt"),
    "runs": dict(type=int, default=5, help="alternating turns"),
    "exit": dict(type=int, help="exit layer (default: the checkpoint's)"),
    "draft": dict(type=int, help="draft length (default: the checkpoint's)"),
    "confidence": dict(type=float, help="drafting stops there (default: the checkpoint's)"),
    "exits": dict(type=int, nargs="+", default=[2, 3, 4, 6, 8]),
    "drafts": dict(type=int, nargs="+", default=[2, 4, 6, 10, 15]),
    "alphas": dict(type=float, nargs="+", default=[0.6, 0.8, 0.95], help="acceptances"),
    "drafter": dict(nargs="+", default=[], help="model:DIR, kangaroo:DIR"),
    "tries": dict(type=int, default=200, help="of the search for sublayers to skip"),
    "against": dict(type=Path, help="directory of another checkout"),
    "compile": dict(action="store_true", default=False),
    "dtype": dict(choices=["auto", *DTYPES], default="auto"),
    "device": dict(default="cpu"),
    "json": dict(type=Path, help="file for the figures"),
}
DECODING = "prompts tokens runs exit draft confidence"
COMMANDS: dict[Callable, tuple[str, dict]] = {  # options, and defaults of their own
    speedup: (f"{DECODING} compile against", {}),
    sweep: ("prompts tokens runs exits drafts confidence", dict(prompts=5, runs=3)),
    drafters: (f"{DECODING} drafter tries", {}),
    peers: (f"shape {DECODING} compile", {}),
    roofline: ("shape runs exit draft compile", dict(runs=30)),
    ideal: (f"shape alphas {DECODING} compile", dict(prompts=4, tokens=64, runs=3)),
    train: ("runs compile", {}),
}


def parser() -> argparse.ArgumentParser:
    """The commands and their options."""
    p = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    commands = p.add_subparsers(required=True, metavar="COMMAND")
    for work, (options, defaults) in COMMANDS.items():
        about = work.__doc__ or ""
        short = about.split("\n")[0]
        one = commands.add_parser(work.__name__, help=short, description=about, allow_abbrev=False)
        for name in ["ckpt", *options.split(), "dtype", "device", "json"]:
            one.add_argument(f"--{name}", **OPTIONS[name])
        every = {name: option.get("default") for name, option in OPTIONS.items()}
        one.set_defaults(work=work, **every | defaults)
    return p


def machine(device: torch.device) -> str:
    """The processor, whether it has bfloat16 instructions, threads, and a GPU that is used."""
    can = torch.cpu.get_capabilities()
    gpu = f", {torch.cuda.get_device_name(device)}" if device.type == "cuda" else ""
    has = "yes" if any(on and "bf16" in name for name, on in can.items()) else "no"
    threads = f"{torch.get_num_threads()} threads"
    return f"{can['cpu_name']}, bfloat16 instructions: {has}, {threads}{gpu}"


def main() -> None:
    args = parser().parse_args()
    with command_errors("bench"), whole_file(args.json) if args.json else nullcontext() as file:
        if min(args.prompts, args.tokens, args.runs, args.tries) < 1:
            raise ValueError("--prompts, --tokens, --runs and --tries must be at least 1")
        args.device = usable_device(args.device)
        args.dtype = DTYPES.get(args.dtype) or auto_dtype(args.device)
        tables = args.work(args)
        progress("")
        print(machine(args.device), *(markdown(*table) for table in tables), sep="\n\n")
        if file:
            figures = {"machine": machine(args.device), "tables": dict(tables)}
            file.write(json.dumps(figures, indent=2).encode())
    if any(row.get("identical") is False for _, rows in tables for row in rows):
        raise SystemExit("bench: a drafted text is not the plain text")  # exit code 1


if __name__ == "__main__":
    main()
