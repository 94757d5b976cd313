"""A generation round by round: what was drafted, accepted and rejected, token by token.

    python -m extras.trace --prompt "def add(a, b):" --exit 6 --draft 8
    python -m extras.trace --json trace.json        also as data, for porting/check.py
    python -m extras.trace --html trace.html        as a page to look at

The other commands take their options and the look of a token from here.
"""

import argparse
import json
import sys
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import IO

from decode import Round, generate
from model import Llama
from support import console, decode_command
from support.checkpoint import whole_file
from support.tokenizer import Stream, Tokenizer, visible

SHARED = "--ckpt", "--max-new-tokens", "--temperature", "--top-p", "--seed"


def boxes(r: Round) -> list[tuple[str, int]]:
    """Tokens of a round, signed: ✓ accepted, ✗ rejected, - not looked at, + the verifier's.

    ✓ and + were emitted. After an accepted EOS there is neither ✗ nor +.
    """
    own = r.emitted[r.accepted :]
    signs = "✓" * r.accepted + "✗" * len(own) + "-" * len(r.drafted)
    return [*zip(signs, r.drafted), *(("+", token) for token in own)]


def line(r: Round, tokenizer: Tokenizer) -> str:
    """A round on one line, with a box for each token."""
    return " ".join(f"[{sign}{piece(tokenizer, token)}]" for sign, token in boxes(r))


def trace_json(rounds: list[Round], prompt_ids: list[int], settings: dict) -> dict:
    """A run as data, with the settings of generate that repeat it (porting/SPEC.md, section 10).

    `length` is the number of live positions after a round: all known tokens but the last.
    """
    entries, length, names = [], len(prompt_ids) - 1, ("drafted", "accepted", "emitted")
    for r in rounds:
        length += len(r.emitted)
        entries.append({name: getattr(r, name) for name in names} | dict(length=length))
    repeat = {**settings, **asdict(settings["sampling"])}
    del repeat["sampling"]
    repeat.pop("drafter", None)
    case = dict(name="trace", prompt=prompt_ids, settings=repeat, rounds=entries)
    return {"format": "layerskip-trace-1", "cases": [case]}


def piece(tokenizer: Tokenizer, token: int) -> str:
    """What a token adds to a text, without white space; <id> where that is nothing (BOS, EOS)."""
    before = tokenizer.encode("a", bos=False)[-1:]  # a lone piece would lose its leading space
    text = tokenizer.decode([*before, token])[len(tokenizer.decode(before)) :]
    return visible(text.translate({10: "⏎", 9: "→", 32: "·"})) or f"<{token}>"


def page(
    rounds: list[Round], model: Llama, tokenizer: Tokenizer, prompt_ids: list[int], exit_layer: int
) -> bytes:
    """A run as one page: trace.html with its data."""
    from extras.lens import exits

    tokens, first = prompt_ids + [t for r in rounds for t in r.emitted], len(prompt_ids) - 1
    said, sure = (x[:, first:-1].T for x in exits(model, tokens, first))
    seen = {*tokens, *(t for r in rounds for t in r.drafted), *said.flatten().tolist()}
    stream = Stream(tokenizer, [])
    data = dict(
        layers=model.config.n_layers,
        exit=exit_layer,
        known=len(prompt_ids),
        tokens=tokens,
        texts=[stream.feed([token]) for token in tokens],
        pieces={token: piece(tokenizer, token) for token in seen},
        rounds=[
            dict(drafted=r.drafted, accepted=r.accepted, emitted=len(r.emitted)) for r in rounds
        ],
        said=said.tolist(),
        sure=(100 * sure).int().tolist(),
    )
    text = json.dumps(data).replace("<", "\\u003c")  # which ends no script
    return Path(__file__).with_suffix(".html").read_text("utf-8").replace("DATA", text).encode()


def parser(name: str, about: str, max_new_tokens: int, *more: str) -> argparse.ArgumentParser:
    """A command with the SHARED options of decode.py, and `more` of them."""
    p = argparse.ArgumentParser(prog=f"python -m extras.{name}", description=about)
    options = decode_command.parser()._option_string_actions
    for option in (*SHARED, *more):
        p._add_action(options[option])
    p.set_defaults(max_new_tokens=max_new_tokens)
    return p


def start(args: argparse.Namespace) -> tuple[Llama, Tokenizer, list[int], dict]:
    """The packed model, its tokenizer, the prompt's ids, generate's settings. Or ValueError."""
    whole = argparse.Namespace(**vars(decode_command.parser().parse_args([])) | vars(args))
    s = decode_command.Session(whole, whole.prompt)
    return s.model, s.tokenizer, s.encode(whole.prompt), s.settings


def wanted(path: Path | None) -> AbstractContextManager[IO[bytes] | None]:
    """A whole_file at `path`, or None."""
    return whole_file(path) if path else nullcontext()


def main() -> None:
    own = "--prompt", "--exit", "--draft", "--min-confidence", "--full"
    about = "Each round: guesses that held (✓) or not (✗), and the verifier's token (+)."
    p = parser("trace", about, 64, *own)
    add = p.add_argument
    add("--json", type=Path, metavar="FILE", help="write the rounds as data, too")
    add("--html", type=Path, metavar="FILE", help="write them as a page, too")
    args = p.parse_args()
    with console.command_errors(p.prog), wanted(args.json) as file, wanted(args.html) as html:
        model, tokenizer, ids, settings = start(args)
        print("✓ accepted, ✗ rejected, - not looked at; + the verifier's own", file=sys.stderr)
        rounds = generate(model, ids, **settings)
        result = console.collect(rounds, lambda r: print(line(r, tokenizer)))
        print(result.summary(), file=sys.stderr)
        if file:
            file.write(json.dumps(trace_json(result.rounds, ids, settings)).encode() + b"\n")
        if html:
            html.write(page(result.rounds, model, tokenizer, ids, settings["exit_layer"]))


if __name__ == "__main__":
    main()
