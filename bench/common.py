"""What the measurements share: a model and its prompts, turns, tables, other processes."""

import json
import sys
from argparse import Namespace
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from subprocess import PIPE, Popen
from typing import Any

import torch

from checkpoint import read_checkpoint
from command import Run, default_settings, run
from data import held_out_prompts
from decode import check_request, generate
from exact import pack
from model import Config, Llama, load_checkpoint, read_config
from tokenizer import Tokenizer

SHAPES = {
    "8m": Config(2048, 192, 384, 24, 3, 1, 64, tied=True),  # the shipped checkpoint
    "15m": Config(32000, 288, 768, 6, 6, 6, 48, tied=True),  # llama2.c's stories15M
    "135m": Config(49152, 576, 1536, 30, 9, 3, 64, tied=True),  # SmolLM
    "360m": Config(49152, 960, 2560, 32, 15, 5, 64, tied=True),
    "1b": Config(128256, 2048, 8192, 16, 32, 8, 64, tied=True),  # Llama 3.2
    "8b": Config(128256, 4096, 14336, 32, 32, 8, 128),  # Llama 3.1
}
ROOT = Path(__file__).parents[1]
Works = dict[str, Callable[[], Any]]  # what takes turns
Table = tuple[str, list[dict]]  # title, rows {column: value}


def target(args: Namespace, part: int = 0) -> Namespace:
    """The options, with name, load(dtype), settings of generate and prompts for what they ask.

    Settings are chosen on held-out prompts of part 1 and shown on those of part 0. Random weights
    are never sure: no confidence. Raises ValueError for settings that cannot be.
    """
    if args.shape:
        config, load = SHAPES[args.shape], partial(random_model, SHAPES[args.shape])
        settings: dict = dict(exit_layer=config.n_layers // 4, draft_len=6, min_confidence=0.0)
        prompts = [[number, *range(63)] for number in range(args.prompts)]
    else:
        config, tokenizer = read_config(read_checkpoint(args.ckpt)[0]), Tokenizer(args.ckpt)
        load = partial(load_checkpoint, args.ckpt)
        settings = default_settings(args.ckpt, config, tokenizer)
        settings.pop("eos")
        prompts = held_out_prompts(2 * args.prompts, tokenizer, 64)[part::2]
    given = dict(exit_layer=args.exit, draft_len=args.draft, min_confidence=args.confidence)
    settings |= {name: value for name, value in given.items() if value is not None}
    check_request(config, [0], settings["exit_layer"], settings["draft_len"], args.tokens)
    more = dict(name=args.shape or args.ckpt.name, settings=settings, prompts=prompts)
    return Namespace(**vars(args) | more, load=partial(load, device=args.device))


def title(t: Namespace, *more: object) -> str:
    """What a table is of."""
    drafts = "exit {exit_layer}, draft {draft_len}, confidence {min_confidence}"
    size = f"{len(t.prompts)} prompts x {t.tokens} tokens, medians of {t.runs} turns"
    dtype, drafts = str(t.dtype).removeprefix("torch."), drafts.format(**t.settings)
    return ", ".join([t.name, dtype, drafts, size, *map(str, more)])


def random_model(config: Config, dtype: torch.dtype, device: torch.device) -> Llama:
    """A Llama of random weights, made in place: memory holds them once."""
    with torch.device("meta"):
        model = Llama(config)
    model = model.to(dtype).to_empty(device=device)
    if config.tied:
        model.lm_head.weight = model.model.embed_tokens.weight
    torch.manual_seed(0)
    for p in model.parameters():
        p.data.normal_(0, 1.5 * p.shape[1] ** -0.5) if p.dim() > 1 else p.data.fill_(1)
    return model


def engine(t: Namespace, model: Llama, compiled: bool) -> Llama:
    """The decoding model: packed or, which takes a while, compiled."""
    if not compiled:
        return pack(model)
    from extras.compiled import compile_model

    return compile_model(model, t.settings["exit_layer"])


def decode_all(model: Llama, prompts: list[list[int]], count: int, **settings: Any) -> Run:
    """`count` tokens after each prompt, as one Run. Settings may be a list, one for each prompt."""
    total = Run()
    for number, prompt in enumerate(prompts):
        own = {k: v[number] if isinstance(v, list) else v for k, v in settings.items()}
        one = run(generate(model, prompt, max_new_tokens=count, eos=(), **own))
        total.ids += one.ids
        total.rounds += one.rounds
        total.seconds += one.seconds
    return total


def alternate(works: Works, turns: int) -> dict[str, list]:
    """What each function returned, in turns, after one turn that does not count."""
    found: dict[str, list] = {name: [] for name in works}
    for turn in range(turns + 1):
        for name, work in works.items():
            progress(f"turn {turn} of {turns}: {name}")
            found[name].append(work())
    return {name: values[1:] for name, values in found.items()}


def compare(
    works: Works, turns: int, same: dict[str, str], base: str = "plain", equal: str = "identical"
) -> list[dict]:
    """A row for each way of making tokens, a function that returns a Run.

    Speedups are ratios, turn by turn, to the fastest way with `base` in its name. The column
    `equal` says whether the tokens are those of the way same[name].
    """
    runs = alternate(works, turns)
    speeds = {name: [r.tokens_per_second for r in found] for name, found in runs.items()}
    fastest = max((s for name, s in speeds.items() if base in name), key=median)
    rows = []
    for name, found in runs.items():
        last, other = found[-1], runs.get(same.get(name, ""))
        row: dict = {"way": name, "tokens/s": spread(speeds[name])}
        row["speedup"] = spread([a / b for a, b in zip(speeds[name], fastest)])
        row["accepted"] = last.acceptance
        row["tokens per round"] = len(last.ids) / len(last.rounds) if last.rounds else None
        row[equal] = all(a.ids == b.ids for a, b in zip(found, other)) if other else None
        rows.append(row)
    return rows


def spread(values: list[float]) -> list[float]:
    """Median, lowest and highest of repeated measurements."""
    return [median(values), min(values), max(values)]


def markdown(title: str, rows: list[dict]) -> str:
    """A table that is readable in a terminal too, without empty columns."""
    names = [name for name in rows[0] if any(row[name] is not None for row in rows)]
    lines = [names, *([shown(row[name]) for name in names] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines)]
    lines.insert(1, ["-" * width for width in widths])
    cells = ([v.ljust(width) for v, width in zip(line, widths)] for line in lines)
    return "\n".join([title, "", *(f"| {' | '.join(line)} |" for line in cells)])


def shown(value: Any) -> str:
    """A value as text."""
    if isinstance(value, list):
        return "{} ({} to {})".format(*map(shown, value))
    if isinstance(value, float):
        return f"{value:.2f}" if value < 100 else f"{value:.0f}"
    return {"True": "yes", "False": "NO", "None": ""}.get(str(value), str(value))


def progress(text: str) -> None:
    """Shows text in place of the last, on a terminal alone."""
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)


def installed(package: str) -> bool:
    """Whether an optional package is there; says so where it is not."""
    if not find_spec(package):
        print(f"bench: {package} is not installed: a row is missing", file=sys.stderr)
    return bool(find_spec(package))


SERVE = """
for line in sys.stdin:
    print(json.dumps(answer(*json.loads(line))), flush=True)
"""


def child(stack: ExitStack, folder: Path, code: str, *given: Any) -> Callable[..., Run]:
    """ask(*request) -> Run by a Python process in a folder, which ends with the stack.

    `code` defines answer(*request) -> tokens, seconds; sys.argv[1:] is `given`; all in JSON. Raises
    ValueError when the process has ended.
    """
    code = "import json, os, sys, time\n" + code + SERVE
    command = [sys.executable, "-c", code, *map(json.dumps, given)]
    how: dict = dict(stdin=PIPE, stdout=PIPE, text=True, start_new_session=True)  # no Ctrl-C there
    process: Any = Popen(command, cwd=folder, **how)
    stack.callback(process.communicate)
    stack.callback(process.kill)

    def ask(*request: Any) -> Run:
        try:
            print(json.dumps(request), file=process.stdin, flush=True)
            tokens, seconds = json.loads(process.stdout.readline())
        except (BrokenPipeError, json.JSONDecodeError):
            raise ValueError("a process has ended; its last lines, above, say why") from None
        return Run(tokens, [], seconds)

    return ask
