"""What is decoded: held-out code, edits or answers of a chat model, or prompts from files."""

import ast
import re
from argparse import Namespace
from collections.abc import Callable, Iterator
from itertools import cycle

from extras.chat import Chat
from support.data import read_files, read_prompts, stdlib_files
from support.tokenizer import Tokenizer

EDITS = (
    "Repeat this function, but call it `run_{n}` instead.",
    "Add a docstring to this function and repeat it whole.",
    "Rename the first argument of this function to `first_{n}`. Give the whole function.",
)
EXTRACTS = (
    "Give the name and the e-mail address of each person as lines `name: address`.",
    "Copy the lines of those who live in {city}, word for word.",
    "Give this table as a list of JSON objects.",
)
NAMES = ("Ada Byron", "Kurt Stein", "Mary Noether", "Sonja Lovelace", "Alan Hopper", "Grace Gauss")
CITIES = ("Lisbon", "Oslo", "Vienna")
QUESTIONS = (
    "What is the difference between a list and a tuple in Python?",
    "Write a short story about a lighthouse keeper.",
    "How do I stay focused while I study?",
    "Explain photosynthesis to a child.",
    "Give me a recipe for a quick vegetable soup.",
    "What should I see in Rome in two days?",
    "Write a polite e-mail that declines an invitation.",
    "Why is the sky blue?",
    "Name five uses of a paper clip.",
    "How does a bicycle stay upright?",
)


def held_out_prompts(count: int, tokenizer: Tokenizer, length: int) -> list[list[int]]:
    """`count` prompts of `length` tokens from held-out files, each up to a function's first line.

    They take turns: one from every file before a second from any.
    """
    places = []
    for text in (d.text for d in read_files(stdlib_files()) if d.held_out):
        heads = [m.end() for m in re.finditer(r"\n *def [^\n]*:\n", text) if m.end() > 8 * length]
        picked = heads[len(heads) // 8 :: max(1, len(heads) // 4)][:4]
        places += [(turn, text[:place]) for turn, place in enumerate(picked)]
    places.sort(key=lambda p: p[0])
    start = tokenizer.encode("")
    return [
        start + tokenizer.encode(text[-8 * length :], bos=False)[len(start) - length :]
        for _, text in places[:count]
    ]


def functions() -> Iterator[str]:
    """Short functions from held-out files, of 8 to 23 lines without comments."""
    for text in (d.text for d in read_files(stdlib_files()) if d.held_out):
        for node in ast.parse(text).body:
            if isinstance(node, ast.FunctionDef) and 8 <= len(ast.unparse(node).split("\n")) < 24:
                yield "\n".join(text.split("\n")[node.lineno - 1 : node.end_lineno])


def edits(count: int) -> list[str]:
    """Requests whose answers repeat most of what they show: two of code, one of a table."""
    found, code = [], cycle(functions())
    for n in range(count):
        if n % 3 < 2:
            found.append(f"{EDITS[n // 3 % 3].format(n=n)}\n\n```python\n{next(code)}\n```")
            continue
        people = [(NAMES[(n + i) % 6], CITIES[(n * i) % 3]) for i in range(6)]
        rows = [f"{name}, {name.split()[0].lower()}{n}@example.org, {c}" for name, c in people]
        ask = EXTRACTS[n // 3 % 3].format(city=CITIES[n % 3])
        found.append(ask + "\n\n" + "\n".join(["name, e-mail, city", *rows]))
    return found


def prompts(args: Namespace, tokenizer: Tokenizer, part: int) -> list[list[int]]:
    """Ids of --prompts prompts of --prompts-file or of --task, at most ten of chat.

    Part 1, to choose on, is code. Raises ValueError where a file holds no prompt, and where a
    conversation has no chat template.
    """
    ask: Callable[[str], list[int]] = tokenizer.encode
    if args.prompts_file and not part:
        texts = [row["prompt"] for file in args.prompts_file for row in read_prompts(file)]
    elif args.task == "code" or part:
        return held_out_prompts(2 * args.prompts, tokenizer, 64)[part::2]
    else:
        texts = edits(args.prompts) if args.task == "edit" else list(QUESTIONS)
    if args.chat or args.task != "code":
        ask = Chat(args.ckpt).ask
    return [ask(text) for text in texts[: args.prompts]]
