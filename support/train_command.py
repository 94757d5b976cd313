"""The command line of train.py: options -> settings -> a run in a directory."""

import argparse
import os
import shlex
import shutil
from collections.abc import Callable
from dataclasses import Field, asdict, fields, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from exact import BLOCK_ROWS, auto_dtype
from model import Config, Llama, load_checkpoint, save_checkpoint
from support.checkpoint import config_fields, read_json
from support.console import HELP, command_errors, compiler_errors
from support.data import Render, Tokens, common
from support.runs import RunDirectory, state_tensors
from support.tokenizer import Tokenizer
from train import (
    LAYERSKIP,
    RECIPES,
    Recipe,
    Settings,
    Trainer,
    evaluate,
    exit_layers,
    initialise,
)

SHAPE = Config(2048, 192, 384, 24, n_heads=3, n_kv_heads=1, head_dim=64, max_len=512, tied=True)
MAY_CHANGE_ON_RESUME = {"out", "data", "save_every", "compile", "accumulate"}  # data: by its hash


EXAMPLES = """examples:
  python train.py --out runs/small --steps 500
  python train.py --out runs/tuned --init checkpoints/smollm2 --data pairs.jsonl --steps 60"""


def parser() -> argparse.ArgumentParser:
    """The options of the command line."""
    p = argparse.ArgumentParser(
        prog="train.py",
        usage="%(prog)s --out DIR [options]",
        description="Train an early-exit Llama. The same command goes on with a stopped run.\n"
        "Defaults are in brackets.",
        epilog=EXAMPLES,
        formatter_class=HELP,
    )
    add = p.add_argument
    add("--out", metavar="DIR", help="the run's checkpoint, state and metrics")
    text = "stdlib, directories, .txt, .jsonl (stdlib)"
    add("--data", nargs="+", default=["stdlib"], metavar="SRC", help=text)
    add = p.add_mutually_exclusive_group().add_argument
    add("--init", metavar="DIR", help="a checkpoint to start from (random weights)")
    text = "a config.json with the shape (24 layers of 192)"
    add("--config", metavar="FILE", help=text)
    for f in fields(Settings):
        where = "where the hardware multiplies it"
        add_setting(p, f, *(None, where) if f.name == "bf16" else (f.default, f.default))
    text = "compile layers and loss (where there is a c++)"
    p.add_argument("--compile", action=argparse.BooleanOptionalAction, help=text)
    title = "recipe, and changes of it (in brackets: layerskip's from scratch)"
    group = p.add_argument_group(title)
    names = f"{', '.join(RECIPES)} (%(default)s)"
    add = group.add_argument
    add("--recipe", choices=RECIPES, default="layerskip", metavar="NAME", help=names)
    text = f"{', '.join(LAYERSKIP)} (scratch; with --init continual)"
    add("--phase", choices=LAYERSKIP, metavar="NAME", help=text)
    for f in fields(Recipe):
        add_setting(group, f, None, getattr(LAYERSKIP["scratch"], f.name))
    return p


def add_setting(
    group: argparse._ActionsContainer, f: Field, default: object, shown: object
) -> None:
    """The option of a field that train.setting made; `shown` is what help calls its default."""
    kind, choices = type(f.default), f.metadata["choices"]
    text = f.metadata["text"] + (f": {', '.join(choices)}" if choices else "")
    text += f" ({str(shown).lower()})"
    how: dict = {"type": kind, "choices": choices, "metavar": "NAME" if choices else "N"}
    how = {"action": argparse.BooleanOptionalAction} if kind is bool else how
    group.add_argument("--" + f.name.replace("_", "-"), **how, default=default, help=text)


def settings_of(args: argparse.Namespace, device: torch.device) -> Settings:
    """The settings of the options. Raises ValueError for one out of its range."""
    if args.bf16 is None:
        args.bf16 = auto_dtype(device) == torch.bfloat16
    found = Settings(**{f.name: getattr(args, f.name) for f in fields(Settings)})
    for name, value in asdict(found).items():
        least = {"lr": 1e-12, "warmup": 0, "seed": 0, "bf16": 0}.get(name, 1)
        if not least <= value < 2**63:
            option = name.replace("_", "-")
            raise ValueError(f"--{option} must be at least {least}, not {value}")
    return found


def recipe_of(args: argparse.Namespace) -> Recipe:
    """The recipe of the options. Raises ValueError for a setting out of its range."""
    base = RECIPES[args.recipe]
    if args.phase and args.recipe != "layerskip":
        raise ValueError(f"--phase is a setting of --recipe layerskip, not of {args.recipe}")
    if args.recipe == "layerskip":
        base = LAYERSKIP[args.phase or ("continual" if args.init else "scratch")]
    given = {name: getattr(args, name) for name in asdict(base)}
    recipe = replace(base, **{name: value for name, value in given.items() if value is not None})
    for name, most in (("p_max", 0.999), ("rotation", 10**6), ("e_scale", 1e6)):
        if not 0 <= getattr(recipe, name) <= most:
            option = name.replace("_", "-")
            raise ValueError(f"--{option} must be from 0 to {most}, not {getattr(recipe, name)}")
    return recipe


def prepare(args: argparse.Namespace, run: RunDirectory) -> tuple[Trainer, Callable[[], None]]:
    """The trainer of the options, at the step where the run left off, and what saves it."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    recipe, settings = recipe_of(args), settings_of(args, device)
    parts = run.world * settings.accumulate
    if settings.batch % parts:
        raise ValueError(f"--batch {settings.batch} does not divide into {parts} parts")
    model = load_checkpoint(args.init, torch.float32).train() if args.init else None
    config = model.config if model else SHAPE
    if args.config:
        config = Config(**config_fields(read_json(Path(args.config))))
    if config.n_layers < 2:
        raise ValueError("a model of one layer has no early exit to train")
    exit_layers(recipe, config.n_layers)  # refuses a wrong --exits at once
    if settings.seq > config.max_len:
        raise ValueError(f"--seq {settings.seq} is beyond the context of {config.max_len}")
    render = conversations(run.out) if args.init else None
    tokens, held_out, tokenizer = run.open(args.data, config.vocab_size, render)
    if min(len(tokens), len(held_out)) <= settings.seq + 1:
        raise ValueError(f"the data is too short for --seq {settings.seq}")
    if model is None:
        eos = () if tokenizer.eos is None else (tokenizer.eos,)
        config = replace(config, vocab_size=tokenizer.vocab_size, bos=tokenizer.bos, eos=eos)
        model = Llama(config)
        initialise(model, settings.seed)
    tokens.vocab_size = held_out.vocab_size = config.vocab_size  # a tokenizer may have more
    trainer = Trainer(model.to(device), recipe, settings, tokens, run)
    given: dict = {k: v if v is None else str(v) for k, v in vars(args).items()}
    given["init"] = run.init and str(run.init)
    identity = {k: v for k, v in given.items() if k not in MAY_CHANGE_ON_RESUME}
    identity |= {"recipe": asdict(recipe), "config": str(config)}  # the shape, not a file's name
    state = state_tensors(trainer.parameters, trainer.optimizer)
    trainer.step = run.load_state(state, identity)
    if trainer.step:
        run.say(f"going on from step {trainer.step} of {settings.steps}")
    run.take_back_metrics(trainer.step)
    count = sum(p.numel() for p in trainer.parameters.values())
    run.say(f"{count / 1e6:.1f}M parameters, {len(tokens) / 1e6:.2f}M training tokens")
    return trainer, partial(save, trainer, held_out, identity)


def save(trainer: Trainer, held_out: Tokens, identity: dict) -> None:
    """Writes the checkpoint in bfloat16, with what it is worth, then the state.

    In this order a run that is killed between the two goes on from the state before. identity:
    what a run that goes on from the state must agree with.
    """
    run, s, layers = trainer.run, trainer.settings, trainer.config.n_layers
    weights = run.whole_weights(trainer.objective)
    if run.rank == 0:
        stored = Llama(trainer.config).to(torch.bfloat16)
        stored.load_state_dict({k.removeprefix("llama."): v for k, v in weights.items()})
        save_checkpoint(stored, run.out)
        exits = [*(exit_layers(trainer.recipe, layers) or range(1, layers)), layers]
        with torch.autocast("cpu", torch.bfloat16, enabled=s.bf16):
            found = evaluate(stored.float(), held_out, s.seq, exits)
        about = dict(recipe=asdict(trainer.recipe), seed=s.seed, steps=trainer.step)
        about |= dict(tokens=trainer.step * s.batch * s.seq, held_out=found)
        run.describe(about, drafting(found, trainer.recipe))
        run.say(f"\n{worth(found)}")
    state = state_tensors(trainer.parameters, trainer.optimizer)
    run.save_state(state, {"step": trainer.step, "settings": identity})


def worth(found: dict) -> str:
    """What `evaluate` found of four exits, spread evenly, and of the last layer: one line."""
    *exits, last = found
    shown = [*exits[:: -(-len(exits) // 4)], last]
    text = (f"{e}:{found[e]['loss']:.2f} {found[e]['agreement']:.0%}" for e in shown)
    return "held out, exit:loss agreement  " + "  ".join(text)


def drafting(found: dict[int, dict[str, float]], recipe: Recipe) -> dict:
    """Settings of drafting, by transformers' names, from what `evaluate` found of exits.

    Drafting stops in doubt, so a round ends about where an exit with agreement a is wrong: after
    N = 1 / (1 - a) tokens. They cost N E/L for the drafts and 1 - E/L for the verification. A guess
    that is less likely than its cost, E/L, is not worth making.
    """
    *exits, layers = found
    trained = [e for e in exits if e > 1 or recipe.uniform_exits] or exits  # e(0) = 0: exit_weights

    def speedup(e: int) -> float:
        tokens = min(1 / max(1 - found[e]["agreement"], 1e-9), BLOCK_ROWS)
        return tokens / (tokens * e / layers + 1 - e / layers)

    best = max(trained, key=speedup)
    return dict(
        assistant_early_exit=best,
        num_assistant_tokens=BLOCK_ROWS - 1,
        assistant_confidence_threshold=round(best / layers, 2),
    )


def conversations(path: Path) -> Render:
    """Encodes messages by the chat template at `path`, with a loss on the assistant's alone."""

    @cache
    def start() -> tuple[Any, Tokenizer]:
        from extras.chat import Chat

        return Chat(path), Tokenizer(path)

    def render(messages: tuple) -> tuple[list[int], list[bool]]:
        chat, tokenizer = start()
        ids = chat.ids(list(messages), add_generation_prompt=False)
        learned, begin = [False] * len(ids), len(ids)
        for n, message in enumerate(messages):
            if message["role"] == "assistant":
                asked = chat.ids(list(messages[:n]), add_generation_prompt=True)
                answered = chat.ids(list(messages[: n + 1]), add_generation_prompt=False)
                begin, end = common(asked, ids), common(answered, ids)
                learned[begin:end] = [True] * (end - begin)
        if any(learned) and tokenizer.eos is not None and tokenizer.eos not in ids[begin:]:
            return [*ids, tokenizer.eos], [*learned, True]
        return ids, learned

    return render


def compile(trainer: Trainer) -> None:
    """Compiles the layers and an exit's loss, on a whole batch that trains nothing.

    Graphs specialised to the first batch that a resumed run meets could make it differ from an
    uninterrupted one.
    """
    s, layers, objective = trainer.settings, trainer.config.n_layers, trainer.objective
    varies = trainer.recipe.p_max > 0 and trainer.recipe.dropout_unit == "sample"
    for layer in objective.llama.layers:
        layer.compile(dynamic=varies)
    objective.exit_loss = torch.compile(objective.exit_loss)  # type: ignore[method-assign]
    batch = s.batch // trainer.run.world // s.accumulate
    tokens = torch.zeros(batch, s.seq, dtype=torch.long, device=trainer.device)
    trainer.run.say("compiling (about 30 s; --no-compile goes without)")
    mask, weights = np.ones((layers, batch), bool), {1: 0.5, layers: 0.5}
    fast = torch.autocast(trainer.device.type, torch.bfloat16, enabled=s.bf16)
    with compiler_errors("give --no-compile"), fast:
        loss, _ = objective(tokens, tokens, mask, mask.any(1), [1.0] * layers, weights)
        loss.backward()
    trainer.optimizer.zero_grad(set_to_none=True)


def main() -> None:
    args = (options := parser()).parse_args()
    if args.out is None:
        options.error("the following arguments are required: --out")
    with command_errors("train.py"):
        kind: type[RunDirectory] = RunDirectory
        if "RANK" in os.environ:
            from extras.sharded import ShardedRun as kind
        run = kind(args.out, args.init)
        try:
            trainer, save_now = prepare(args, run)
            run.watch_signals()
            has = args.compile is None and shutil.which("c++")
            if (args.compile or has) and trainer.step < args.steps:
                compile(trainer)
            if args.init and not trainer.step:
                save_now()  # shows where the training begins
            if trainer.train(save_now):
                run.say(f"\nstopped at step {trainer.step}; the same command goes on from there")
                raise SystemExit(130)
            run.say(f"\na checkpoint: python decode.py --ckpt {shlex.quote(args.out)}")
        finally:
            run.close()


if __name__ == "__main__":
    main()
