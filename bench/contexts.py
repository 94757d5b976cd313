"""Prompts of so many tokens, for peers --context: held-out code, or edits of it."""

from argparse import Namespace
from collections.abc import Callable

from bench.tasks import held_out_prompts
from extras.chat import Chat
from support.tokenizer import Tokenizer

REQUEST = "Repeat this, but write `this` for `self`:\n\n"


def long_prompts(t: Namespace, task: str, most: int) -> list[list[int]]:
    """As many prompts of --context tokens, or nearly. Raises ValueError for more than `most`.

    Those of edits show code, ask to repeat it with a change, and begin the answer. A model without
    a chat template goes on from there as well.
    """
    length = t.context
    if length + t.tokens > most:
        raise ValueError(f"--context and --tokens are more than the {most} that the model takes")
    if t.shape:
        return [(prompt * length)[:length] for prompt in t.prompts]
    tokenizer = Tokenizer(t.ckpt)
    found = held_out_prompts(len(t.prompts), tokenizer, length)
    if task == "edit":
        chat = (t.ckpt / "chat_template.jinja").exists()
        ask: Callable[[str], list[int]] = Chat(t.ckpt).ask if chat else tokenizer.encode
        for number, ids in enumerate(found):
            start = tokenizer.decode(ids[: length // 8]).replace("self", "this")
            answer = tokenizer.encode(start, bos=False)
            shown = tokenizer.decode(ids[: length - len(ask(REQUEST)) - len(answer)])
            found[number] = (ask(REQUEST + shown) + answer)[:length]
    return found
