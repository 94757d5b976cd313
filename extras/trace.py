"""A generation round by round: what was drafted, accepted and rejected, token by token.

    python -m extras.trace --prompt "def add(a, b):" --exit 6 --draft 8
    python -m extras.trace --json trace.json        also as data, for porting/check.py

The other commands take their options and the look of a token from here.
"""

import argparse
import json
import sys
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path

from decode import Round, Sampling, generate
from exact import pack
from model import Llama
from support import console
from support.checkpoint import whole_file
from support.tokenizer import Tokenizer, visible


def boxes(r: Round) -> list[tuple[str, int]]:
    """The tokens of a round, with signs: ✓ accepted, ✗ rejected, - not looked at, + the verifier's.

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
    case = dict(name="trace", prompt=prompt_ids, settings=repeat, rounds=entries)
    return {"format": "layerskip-trace-1", "cases": [case]}


def piece(tokenizer: Tokenizer, token: int) -> str:
    """What a token adds to a text, without white space; <id> where that is nothing (BOS, EOS)."""
    before = tokenizer.encode("a", bos=False)[-1:]  # a lone piece would lose its leading space
    text = tokenizer.decode([*before, token])[len(tokenizer.decode(before)) :]
    return visible(text.translate({10: "⏎", 9: "→", 32: "·"})) or f"<{token}>"


def parser(name: str, about: str, max_new_tokens: int) -> argparse.ArgumentParser:
    """The options that the commands share."""
    p = argparse.ArgumentParser(prog=f"python -m extras.{name}", description=about)
    add = p.add_argument
    add("--ckpt", type=Path, default=console.DEFAULT_CKPT, metavar="DIR", help="checkpoint")
    add("--prompt", default=console.DEFAULT_PROMPT, help="text to go on from")
    add("--max-new-tokens", type=int, default=max_new_tokens, metavar="N", help="%(default)s")
    add("--temperature", type=float, default=0.0, metavar="T", help="0 is greedy (default)")
    add("--seed", type=int, default=0, help="of sampling")
    return p


def start(args: argparse.Namespace) -> tuple[Llama, Tokenizer, list[int], dict]:
    """The packed model, its tokenizer, the prompt's ids, and the settings of generate.

    Raises ValueError, one line, on what cannot be used.
    """
    model, tokenizer = console.load(args.ckpt)
    settings = console.default_settings(args.ckpt, model.config, tokenizer)
    settings["max_new_tokens"] = args.max_new_tokens
    settings["sampling"] = Sampling(args.temperature, seed=args.seed)
    settings |= {k: v for k, v in vars(args).items() if k in settings and v is not None}
    return pack(model), tokenizer, tokenizer.encode(args.prompt), settings


def main() -> None:
    p = parser("trace", "Show each round of a generation.", 64)
    add = p.add_argument
    add("--exit", type=int, dest="exit_layer", metavar="E", help="draft with the first E layers")
    add("--draft", type=int, dest="draft_len", metavar="D", help="the most tokens drafted a round")
    add("--min-confidence", type=float, metavar="C", help="stop drafting at or below this")
    add("--json", type=Path, metavar="FILE", help="write the rounds as data, too")
    args = p.parse_args()
    wanted = whole_file(args.json) if args.json else nullcontext()
    with console.command_errors(p.prog), wanted as file:
        model, tokenizer, ids, settings = start(args)
        print("✓ accepted, ✗ rejected, - not looked at; + the verifier's own", file=sys.stderr)
        rounds = generate(model, ids, **settings)
        result = console.collect(rounds, lambda r: print(line(r, tokenizer)))
        print(result.summary(), file=sys.stderr)
        if file:
            file.write(json.dumps(trace_json(result.rounds, ids, settings)).encode() + b"\n")


if __name__ == "__main__":
    main()
