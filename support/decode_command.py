"""The command line of decode.py: options -> settings and a model -> a conversation."""

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from decode import EarlyExit, NoDraft, Round, Sampling, generate
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
    reading,
    until,
)
from support.data import read_prompts
from support.tokenizer import Stream

EXAMPLES = """examples:
  python decode.py --compare
  python decode.py --ckpt DIR --exit 8 --draft 6 --prompt "def quicksort(\""""

HINT = "this checkpoint's exits seem untrained: try --drafter lookup or --full"
ENOUGH = 40  # guesses, to say so


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
    text = "each of a .jsonl file's, or a text (none)"
    add("--prompts-file", type=Path, metavar="FILE", help=text)
    add("--interactive", **flag, help="complete one line of input after the other")
    p.add_argument("--chat", **flag, help="text is a message, by the checkpoint's chat template")
    p.add_argument("--system", metavar="TEXT", help="system message of --chat (none)")
    text = "the most new tokens (%(default)s)"
    p.add_argument("--max-new-tokens", type=int, default=256, metavar="N", help=text)
    text = "end the text before TEXT; may be given again (none)"
    p.add_argument("--stop", action="append", default=[], metavar="TEXT", help=text)
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

    def __init__(
        self,
        args: argparse.Namespace,
        text: str,
        read: Callable = load_checkpoint,
        agreed: Callable = lambda value: value,
    ):
        """`text` is the prompt, or the first one, which --exit auto reads.

        agreed(value) is the first process's value where `read` loads a part of the model.
        """
        self.args, self.agreed = args, agreed
        if "" in args.stop:
            raise ValueError("--stop needs a text, not an empty one")
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
        encode = self.encode
        self.encode = lambda text: agreed(encode(text))  # a chat template may tell the time
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

            ids = self.encode(text)[: model.config.max_len - 1]  # too many are refused later
            settings |= self.agreed(choose_exit(model, ids, settings | given))
        elif args.exit is not None:
            if args.exit not in map(str, range(1, last + 1)):
                text = f"exit layer must be from 1 to {last}, or auto"
                raise ValueError(f"{text}, not {args.exit!r:.40}")
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

    def run(
        self, ids: list[int], full: bool = False, into: Totals | None = None, **how: int
    ) -> Iterator[Round]:
        """Rounds after the ids of a prompt, by the full model or drafted, up to a stop.

        `into` notes what the prompt took.
        """
        settings = self.settings | (dict(exit_layer=0, drafter=None) if full else {}) | how
        e, stream = settings["exit_layer"], Stream(self.tokenizer, ids, self.args.stop)
        make = settings.get("drafter") or (partial(EarlyExit, exit_layer=e) if e else NoDraft)
        with reading(make, len(ids), into or Totals()) as drafter:
            rounds = generate(self.model, ids, **settings | dict(drafter=drafter))
            yield from until(rounds, stream) if self.args.stop else rounds

    def answer(self, text: str) -> None:
        """Decodes after one prompt, and shows the text, the statistics and --compare, or JSON."""
        if not text:
            raise ValueError("the prompt is empty")
        args, ids = self.args, self.encode(text)
        if args.compare:  # both once for a few tokens, so that neither is timed cold
            for full in (False, True):
                collect(self.run(ids, full, max_new_tokens=16))
        result, prompt = Totals(), "" if args.chat else text
        show = None if args.json else Show(self.tokenizer, ids, prompt, args.stop)
        try:
            collect(self.run(ids, into=result), show, result, args.compare)
        finally:  # Ctrl-C leaves the line whole, and the statistics
            if show and result.rounds:
                show.finish()
                print(f"\n{result.summary()} | {self.how()}", file=sys.stderr)
            if self.chat and args.interactive and result.rounds:
                self.chat.keep(text, self.text_of(ids, result.ids))
        plain = Totals()
        if args.compare:
            collect(self.run(ids, True, plain), into=plain, keep_logits=True)
        if args.json:
            print(json.dumps(self.as_json(result, text, ids, plain)), flush=True)
            return
        if args.compare:
            print(f"full model: {plain.summary().splitlines()[-1]}", file=sys.stderr)
            print(comparison(result, plain), file=sys.stderr)
        wrong = result.drafted >= ENOUGH and (result.acceptance or 0) < 0.1
        if wrong and not self.settings.get("drafter"):
            print(HINT, file=sys.stderr)

    def text_of(self, ids: list[int], new: list[int]) -> str:
        """Text of new ids after those of a prompt, up to a stop."""
        stream = Stream(self.tokenizer, ids, self.args.stop)
        return stream.feed(new) + stream.finish()

    def how(self) -> str:
        """Who drafts, and how a token is chosen."""
        s, who = self.settings, "no draft"
        if self.args.no_verify:
            who = f"exit {self.model.config.n_layers} alone, not verified"
        if s.get("drafter") or s["exit_layer"]:
            who = self.args.drafter if s.get("drafter") else f"exit {s['exit_layer']}"
            who += f", draft {s['draft_len']}"
        sampling = s["sampling"]
        if not sampling.temperature:
            return f"{who}, greedy"
        given = [k for k, v in vars(sampling).items() if v != getattr(Sampling, k) or k == "seed"]
        return ", ".join([who, *(f"{k.replace('_', '-')} {getattr(sampling, k)}" for k in given)])

    def as_json(self, result: Totals, text: str, ids: list[int], full: Totals) -> dict:
        """The run as one object; full_ids, identical and speedup only when the full model ran."""
        args, settings = self.args, self.settings
        about = {**settings, "drafter": args.drafter, "sampling": asdict(settings["sampling"])}
        about |= dict(ckpt=str(args.ckpt), prompt=text, prompt_ids=ids, exact=not args.no_exact)
        about |= dict(dtype=str(self.model.dtype)[6:], device=str(self.model.device))
        about |= dict(verified=not args.no_verify, layers=self.model.config.n_layers)
        about["stop"] = args.stop
        names = "drafted", "accepted", "emitted"
        found = dict(
            text=self.text_of(ids, result.ids),
            ids=result.ids,
            rounds=[{name: getattr(r, name) for name in names} for r in result.rounds],
            settings=about,
            prompt_seconds=result.prompt_seconds,
            first_token_seconds=result.times[0],
            seconds=result.seconds,
            tokens_per_second=result.tokens_per_second,
            acceptance=result.acceptance,
        )
        if full.ids:
            speedup = result.tokens_per_second / full.tokens_per_second
            found |= dict(full_ids=full.ids, identical=result.ids == full.ids, speedup=speedup)
        return found

    def interact(self) -> None:
        """One answer after the other, to lines of standard input."""
        while True:
            print("prompt> " * sys.stdin.isatty(), end="", file=sys.stderr, flush=True)
            if not (line := sys.stdin.buffer.readline()):
                return
            try:
                text = prompt_text(line).rstrip("\r\n")
                if self.chat and text == "/reset":
                    self.chat.reset()
                else:
                    self.answer(text)
            except ValueError as error:  # the next prompt may do better
                print(f"decode.py: {error}", file=sys.stderr)
            except KeyboardInterrupt:  # ends the answer; the conversation goes on
                print(file=sys.stderr)

    def answer_all(self, prompts: list[str]) -> int:
        """One answer after the other; returns the exit code. One that cannot run is a line."""
        code = 0
        for number, text in enumerate(prompts, 1):
            if not self.args.json:
                print(f"\nprompt {number} of {len(prompts)}:", file=sys.stderr)
            try:
                self.answer(text)
            except ValueError as error:
                print(f"decode.py: prompt {number}: {error}", file=sys.stderr)
                code = 2
        return code


def prompt_text(given: bytes) -> str:
    """A prompt without its byte order mark. Raises ValueError where it is not UTF-8."""
    try:
        return given.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError("the prompt is not UTF-8 text") from None


def main() -> None:
    args = (options := parser()).parse_args()
    if args.stdin not in (None, "-"):
        options.error(f"{args.stdin!r:.80} belongs to no option: text goes after --prompt")
    code = 0
    several: Any = nullcontext(())
    if "RANK" in os.environ:  # torchrun's
        from extras.parallel import processes

        several = processes(args)
    with command_errors("decode.py"), several as own:
        if sys.stdout is None or (sys.stdin is None and (args.stdin or args.interactive)):
            raise ValueError("standard input or output is closed")
        given = args.prompt.encode(errors="surrogateescape")
        prompts = [prompt_text(sys.stdin.buffer.read() if args.stdin else given)]
        if args.prompts_file:
            prompts = [row["prompt"] for row in read_prompts(args.prompts_file)]
        session = Session(args, "" if args.interactive else prompts[0], *own)
        if args.interactive:
            session.interact()
        elif args.prompts_file:
            code = session.answer_all(prompts)
        else:
            session.answer(prompts[0])
    if code:
        raise SystemExit(code)


if __name__ == "__main__":
    main()
