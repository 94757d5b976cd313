"""What the measurements share: a model and its prompts, turns, tables."""

import csv
import sys
from argparse import Namespace
from codecs import getwriter
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from statistics import median
from typing import IO, Any

import torch
import torch.distributed as dist

from bench import tasks
from decode import check_request, generate
from exact import pack
from extras.chat import Chat
from extras.compiled import compile_model
from extras.parallel import PartOfLlama, load_part
from model import Config, Llama, load_checkpoint
from support.checkpoint import read_checkpoint
from support.console import Totals, collect, default_settings
from support.tokenizer import Tokenizer

SHAPES = {
    "8m": Config(2048, 192, 384, 24, 3, 1, 64, tied=True),  # the shipped checkpoint
    "135m": Config(49152, 576, 1536, 30, 9, 3, 64, tied=True),  # SmolLM
    "1b": Config(128256, 2048, 8192, 16, 32, 8, 64, tied=True),  # Llama 3.2
    "8b": Config(128256, 4096, 14336, 32, 32, 8, 128),  # Llama 3.1
}
Works = dict[str, Callable[[], Any]]  # what takes turns
Table = tuple[str, list[dict]]  # title, rows {column: value}


def target(args: Namespace, part: int = 0) -> Namespace:
    """The options, and the name, load(dtype), settings, prompts, eos and exits they ask for.

    Settings are chosen on held-out prompts of part 1 and shown on those of part 0. Of part 1 and of
    --prompts-file, texts end at an EOS. Random weights are never sure: no confidence. Raises
    ValueError for settings that cannot be.
    """
    eos, several = (), dist.is_initialized()  # processes of torchrun
    if args.shape:
        config = SHAPES[args.shape]
        load = partial(random_model, config, kind=PartOfLlama if several else Llama)
        settings: dict = dict(exit_layer=config.n_layers // 4, draft_len=6, min_confidence=0.0)
        prompts = [[number, *range(63)] for number in range(args.prompts)]
    else:
        config, tokenizer = Config(**read_checkpoint(args.ckpt)[0]), Tokenizer(args.ckpt)
        load = partial(load_part if several else load_checkpoint, args.ckpt)
        settings = default_settings(args.ckpt, config, tokenizer)
        eos = settings.pop("eos") * bool(part or args.prompts_file)
        eos += Chat(args.ckpt, tokenizer).ends if args.chat else ()
        prompts = tasks.prompts(args, tokenizer, part)
    given = dict(exit_layer=args.exit, draft_len=args.draft, min_confidence=args.confidence)
    settings |= {name: value for name, value in given.items() if value is not None}
    for ids in prompts:
        check_request(config, ids, settings["exit_layer"], settings["draft_len"], args.tokens)
    parts = sorted({max(config.n_layers * n // 12, 1) for n in (1, 2, 3, 4)})
    more = dict(name=args.shape or args.ckpt.name, settings=settings, prompts=prompts, eos=eos)
    more |= dict(exits=args.exits or parts, load=partial(load, device=args.device))
    return Namespace(**vars(args) | more)


def title(t: Namespace, *more: str) -> str:
    """What a table is of. Exit layer 0: of several."""
    drafts = "exit {exit_layer}, draft {draft_len}, " * (t.settings["exit_layer"] > 0)
    drafts = f"{drafts}confidence {{min_confidence}}".format(**t.settings)
    tokens = f"{'up to ' * bool(t.eos)}{t.tokens} tokens"
    size = f"{len(t.prompts)} prompts x {tokens}, medians of {t.runs} turns"
    return ", ".join([t.name, str(t.dtype)[6:], drafts, size, *more])


def random_model(
    config: Config, dtype: torch.dtype, device: torch.device, kind: type[Llama] = Llama
) -> Llama:
    """A Llama of random weights, made in place: memory holds them once."""
    with torch.device("meta"):
        model = kind(config)
    model = model.to(dtype).to_empty(device=device)
    if config.tied:
        model.lm_head.weight = model.embed_tokens.weight
    torch.manual_seed(0)
    for p in model.parameters():
        p.data.normal_(0, 1.5 * p.shape[1] ** -0.5) if p.dim() > 1 else p.data.fill_(1)
    return model


def engine(t: Namespace, model: Llama, compiled: bool) -> Llama:
    """The decoding model: packed or, which takes a while, compiled."""
    return compile_model(model, t.settings["exit_layer"]) if compiled else pack(model)


def decode_all(model: Llama, prompts: list[list[int]], count: int, **settings: Any) -> Totals:
    """`count` tokens after each prompt, added up. Settings may be a list, one for each prompt."""
    total = Totals()
    for number, prompt in enumerate(prompts):
        own = {k: v[number] if isinstance(v, list) else v for k, v in settings.items()}
        own.setdefault("eos", ())
        collect(generate(model, prompt, max_new_tokens=count, **own), into=total)
    return total


def alternate(works: Works, turns: int) -> dict[str, list]:
    """What each function returned, in turns, after one turn that does not count."""
    found: dict[str, list] = {name: [] for name in works}
    for turn in range(turns + 1):
        if not sys.stderr.isatty():
            print(f"turn {turn} of {turns}, {len(works)} rows", file=sys.stderr, flush=True)
        for name, work in works.items():
            progress(f"turn {turn} of {turns}: {name}")
            found[name].append(work())
    return {name: values[1:] for name, values in found.items()}


def compare(
    works: Works, turns: int, same: dict[str, str], base: str = "plain", equal: str = "identical"
) -> list[dict]:
    """A row for each way of making tokens, which returns Totals.

    A speedup is the ratio, turn by turn, to the fastest way with `base` in its name. The column
    `equal` says whether the tokens are those of the way same[name].
    """
    runs = alternate(works, turns)
    speeds = {name: [r.tokens_per_second for r in found] for name, found in runs.items()}
    fastest = max((s for name, s in speeds.items() if base in name), key=median)
    rows = []
    for name, found in runs.items():
        last, other = found[-1], runs.get(same.get(name, ""))
        row: dict = {"way": name, "tokens/s": speeds[name]}
        row["speedup"] = [a / b for a, b in zip(speeds[name], fastest)]
        row["accepted"] = last.acceptance
        row["tokens per round"] = len(last.ids) / len(last.rounds) if last.rounds else None
        row[equal] = all(a.ids == b.ids for a, b in zip(found, other)) if other else None
        rows.append(row)
    return rows


def markdown(title: str, rows: list[dict]) -> str:
    """A table that is readable in a terminal too, without empty columns."""
    names = [name for name in rows[0] if any(row[name] is not None for row in rows)]
    lines = [names, *([shown(row[name]) for name in names] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines)]
    lines.insert(1, ["-" * width for width in widths])
    cells = ([v.ljust(width) for v, width in zip(line, widths)] for line in lines)
    return "\n".join([title, "", *(f"| {' | '.join(line)} |" for line in cells)])


def write_csv(file: IO[bytes], rows: list[dict]) -> None:
    """A line for each row, with medians."""
    writer = csv.DictWriter(getwriter("utf-8")(file), rows[0], lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({k: median(v) if isinstance(v, list) else v for k, v in row.items()})


def shown(value: Any) -> str:
    """A value as text; a list of measurements as its median (lowest to highest)."""
    if isinstance(value, list):
        return f"{shown(median(value))} ({shown(min(value))} to {shown(max(value))})"
    if isinstance(value, float):
        return f"{value:.2f}" if value < 100 else f"{value:.0f}"
    return {"True": "yes", "False": "NO", "None": ""}.get(str(value), str(value))


def progress(text: str) -> None:
    """Shows text in place of the last, on a terminal alone."""
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)


def installed(package: str) -> bool:
    """Whether an optional package is there; one line says so where it is not."""
    if not find_spec(package):
        print(f"bench: {package} is not installed: its rows are missing", file=sys.stderr)
    return bool(find_spec(package))
