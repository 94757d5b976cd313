"""The command line of decode.py: options -> settings and a model -> a conversation."""

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

from decode import Round, Sampling, generate
from exact import pack
from extras.drafters import FORMS, parse_drafter
from model import load_checkpoint
from support.console import (
    DEFAULT_CKPT,
    DEFAULT_PROMPT,
    DTYPES,
    HELP,
    Show,
    Totals,
    collect,
    command_errors,
    comparison,
    default_settings,
    load,
)
from support.tokenizer import Stream

EXAMPLES = """examples:
  python decode.py --compare
  python decode.py --ckpt DIR --exit 8 --draft 6 --prompt "def quicksort(\""""


def parser() -> argparse.ArgumentParser:
    """The options of the command line."""
    p = argparse.ArgumentParser(
        prog="decode.py",
        usage="%(prog)s [options] [-]",
        description="Draft text with the first layers of a Llama, verify it with the rest: the\n"
        "text is the full model's own, token for token. Defaults are in brackets.",
        epilog=EXAMPLES,
        formatter_class=HELP,
    )
    flag: dict = dict(action="store_true")
    text = "a checkpoint (the shipped one)"
    p.add_argument("--ckpt", type=Path, default=DEFAULT_CKPT, metavar="DIR", help=text)
    add = p.add_mutually_exclusive_group().add_argument
    add("stdin", nargs="?", metavar="-", help="read the prompt from standard input")
    add("--prompt", metavar="TEXT", default=DEFAULT_PROMPT, help="text to go on from (a class)")
    add("--interactive", **flag, help="complete one line of input after the other")
    p.add_argument("--chat", **flag, help="text is a message, by the checkpoint's chat template")
    p.add_argument("--system", metavar="TEXT", help="system message of --chat (none)")
    text = "the most new tokens (%(default)s)"
    p.add_argument("--max-new-tokens", type=int, default=256, metavar="N", help=text)
    p.add_argument("--json", **flag, help="each run as one JSON object, not as text")

    group = p.add_argument_group("drafting (where brackets are missing: the checkpoint's own)")
    add = group.add_argument
    add("--exit", metavar="E", help="draft with the first E layers; auto: chosen by trial")
    add("--drafter", default="exit", metavar="WHO", help=f"{FORMS} (exit)")
    add("--draft", dest="draft_len", type=int, metavar="D", help="most tokens drafted a round")
    text = "stop drafting at or below this probability"
    add("--min-confidence", type=float, metavar="C", help=text)
    add = group.add_mutually_exclusive_group().add_argument
    add("--full", **flag, help="no draft: the full model alone")
    add("--no-verify", **flag, help="no verification: the early exit alone. Lossy")
    add("--compare", **flag, help="also run the full model: the same, and faster?")

    add = p.add_argument_group("sampling (reproducible from the seed, drafted or not)").add_argument
    add("--temperature", type=float, default=0.0, metavar="T", help="0: greedy (0)")
    add("--top-k", type=int, default=0, metavar="K", help="of the K likeliest; 0: of all (0)")
    text = "of those that hold probability P (1)"
    add("--top-p", type=float, default=1.0, metavar="P", help=text)
    add("--seed", type=int, default=0, metavar="N", help="of the noise (0)")

    group = p.add_argument_group("engine")
    text = f"{', '.join(DTYPES)}; auto: bfloat16 if the hardware multiplies it (auto)"
    choices = ["auto", *DTYPES]
    group.add_argument("--dtype", choices=choices, default="auto", metavar="TYPE", help=text)
    group.add_argument("--device", default="auto", help="cpu, cuda, cuda:1; cuda if any (auto)")
    add = group.add_mutually_exclusive_group().add_argument
    add("--no-exact", **flag, help="the plain model: drafted text may differ at near-ties")
    add("--compile", **flag, help="compile first, by a C++ compiler: as exact, then faster")
    return p


class Session:
    """What the options ask for, ready to answer. Raises ValueError on what cannot run."""

    def __init__(self, args: argparse.Namespace, text: str, read: Callable, agreed: Callable):
        """`text` is the prompt, which --exit auto reads. `read` and `agreed`: see main."""
        self.args, self.agreed = args, agreed
        self.model, self.tokenizer = load(args.ckpt, args.dtype, args.device, read)
        self.encode: Callable[[str], list[int]] = self.tokenizer.encode
        self.chat = None
        if args.system is not None and not args.chat:
            raise ValueError("--system is a message of --chat: add --chat")
        if args.chat:
            from extras.chat import Chat

            context = self.model.config.max_len
            room = context - min(args.max_new_tokens, context // 2)
            self.chat = Chat(args.ckpt, self.tokenizer, args.system, room)
            self.encode = self.chat.ask
        self.settings = self.settings_of(text)
        self.prepare_model()

    def settings_of(self, text: str) -> dict:
        """generate's settings: the checkpoint's, the drafter's, and the options over both."""
        args, model = self.args, self.model
        settings = default_settings(args.ckpt, model.config, self.tokenizer)
        settings["sampling"] = Sampling(args.temperature, args.top_k, args.top_p, args.seed)
        settings["max_new_tokens"] = args.max_new_tokens
        if self.chat:
            settings["eos"] = (*settings["eos"], *self.chat.ends)
        given = {k: v for k, v in vars(args).items() if k in settings and v is not None}
        last = model.config.n_layers - 1
        if args.exit == "auto":
            from extras.lens import choose_exit

            settings |= self.agreed(choose_exit(model, self.encode(text), settings | given))
        elif args.exit is not None:
            if args.exit not in map(str, range(1, last + 1)):
                raise ValueError(f"--exit must be auto or from 1 to {last}, not {args.exit:.40}")
            settings["exit_layer"] = int(args.exit)
        if args.drafter != "exit":
            if args.exit and args.drafter != "lookup+exit":
                raise ValueError(f"--drafter {args.drafter:.40} takes no --exit: leave it out")
            if args.no_verify:
                raise ValueError("--no-verify is the early exit alone: leave out --drafter")
            settings |= parse_drafter(args.drafter, model, settings["exit_layer"])
        return settings | given

    def prepare_model(self) -> None:
        """Cuts the model to its exit for --no-verify, then packs or compiles it."""
        args, settings = self.args, self.settings
        if args.no_verify:
            from extras.early_exit import keep_layers

            self.model = keep_layers(self.model, range(settings["exit_layer"]))
        if args.no_verify or args.full:
            settings |= dict(exit_layer=0, drafter=None)
        if args.compile:
            from extras.compiled import ROWS, compile_model

            self.model = compile_model(self.model, settings["exit_layer"])
            if args.draft_len is None and args.exit != "auto":
                settings["draft_len"] = ROWS - 1  # fills one pass
        elif not args.no_exact:
            pack(self.model)

    def run(self, ids: list[int], full: bool = False, **how: int) -> Iterator[Round]:
        """Rounds after the ids of a prompt, drafted or by the full model."""
        plain = dict(exit_layer=0, drafter=None) if full else {}
        return generate(self.model, ids, **self.settings | plain | how)

    def answer(self, text: str) -> Totals:
        """Decodes after one prompt, and shows the text, the statistics and --compare, or JSON."""
        if not text:
            raise ValueError("the prompt is empty")
        args, ids = self.args, self.agreed(self.encode(text))
        if args.compare:  # both once for a few tokens, so that neither is timed cold
            for full in (False, True):
                collect(self.run(ids, full, max_new_tokens=16))
        result, rounds = Totals(), self.run(ids)
        show = None if args.json else Show(self.tokenizer, ids, "" if args.chat else text)
        try:
            collect(rounds, show, result, args.compare)
        except KeyboardInterrupt:
            if not args.interactive:
                raise
            return result  # the conversation goes on
        finally:  # Ctrl-C leaves the line whole, and the statistics
            if show and result.rounds:
                show.finish()
                print(f"\n{result.summary()} | {self.how()}", file=sys.stderr)
        plain = collect(self.run(ids, full=True), keep_logits=True) if args.compare else None
        if args.json:
            print(json.dumps(self.as_json(result, text, ids, plain)), flush=True)
        elif plain:
            print(f"full model: {plain.summary()}\n{comparison(result, plain)}", file=sys.stderr)
        return result

    def how(self) -> str:
        """Who drafts, and how a token is chosen."""
        s, who = self.settings, "no draft"
        if s.get("drafter") or s["exit_layer"]:
            who = self.args.drafter if s.get("drafter") else f"exit {s['exit_layer']}"
            who += f", draft {s['draft_len']}"
        sampling = s["sampling"]
        if not sampling.temperature:
            return f"{who}, greedy"
        given = [k for k, v in vars(sampling).items() if v != getattr(Sampling, k) or k == "seed"]
        return ", ".join([who, *(f"{k.replace('_', '-')} {getattr(sampling, k)}" for k in given)])

    def as_json(self, result: Totals, text: str, ids: list[int], full: Totals | None) -> dict:
        """The run as one object; full_ids, identical and speedup only when the full model ran."""
        args, settings = self.args, self.settings
        about = {**settings, "drafter": args.drafter, "sampling": asdict(settings["sampling"])}
        about |= dict(ckpt=str(args.ckpt), prompt=text, prompt_ids=ids, exact=not args.no_exact)
        about |= dict(dtype=str(self.model.dtype)[6:], device=str(self.model.device))
        stream, names = Stream(self.tokenizer, ids), ("drafted", "accepted", "emitted")
        found = dict(
            text=stream.feed(result.ids) + stream.finish(),
            ids=result.ids,
            rounds=[{name: getattr(r, name) for name in names} for r in result.rounds],
            settings=about,
            seconds=result.seconds,
            tokens_per_second=result.tokens_per_second,
            acceptance=result.acceptance,
        )
        if full:
            speedup = result.tokens_per_second / full.tokens_per_second
            found |= dict(full_ids=full.ids, identical=result.ids == full.ids, speedup=speedup)
        return found

    def interact(self) -> None:
        """One answer after the other, to lines of standard input."""
        while True:
            try:
                print("prompt> " * sys.stdin.isatty(), end="", file=sys.stderr, flush=True)
                if not (line := sys.stdin.buffer.readline()):
                    return
                text = line.decode().rstrip("\r\n")
                if self.chat and text == "/reset":
                    self.chat.reset()
                    continue
                said = self.answer(text)
                if self.chat:
                    self.chat.keep(text, self.tokenizer.decode(said.ids))
            except ValueError as error:  # the next prompt may do better
                print(f"decode.py: {error}", file=sys.stderr)


def main() -> None:
    args = (options := parser()).parse_args()
    if args.stdin not in (None, "-"):
        options.error(f"{args.stdin!r:.80} belongs to no option: text goes after --prompt")
    # What reads a checkpoint, and what makes a value that of the first process.
    context: Any = nullcontext((load_checkpoint, lambda value: value))
    if "RANK" in os.environ:
        from extras.parallel import processes

        context = processes(args)
    with command_errors("decode.py"), context as (read, agreed):
        if sys.stdout is None or (sys.stdin is None and (args.stdin or args.interactive)):
            raise ValueError("standard input or output is closed")
        given = args.prompt.encode(errors="surrogateescape")
        text = (sys.stdin.buffer.read() if args.stdin else given).decode("utf-8-sig")
        session = Session(args, "" if args.interactive else text, read, agreed)
        if args.interactive:
            session.interact()
        else:
            session.answer(text)


if __name__ == "__main__":
    main()
