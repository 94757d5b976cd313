"""Conversations by a checkpoint's own chat template (`decode.py --chat`), as transformers' are.

The template is chat_template.jinja, or in tokenizer_config.json. It runs in jinja2's sandbox, and
special tokens are special in its own text alone, not in what a user wrote.
"""

import json
import re
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

from jinja2 import TemplateError
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment
from sentencepiece import SentencePieceProcessor

from support.checkpoint import read_json

GUARD = "\ufdd0"  # a code that is no character: breaks up special tokens that a user wrote
ANSWER = "\ufdd1"  # another: stands for an answer, to see what the template puts after it


def refuse(reason: str) -> NoReturn:
    """What templates call raise_exception."""
    raise TemplateError(reason)


class Chat:
    """A conversation: its messages so far. Raises ValueError where there is no template.

    `ends` has the id that ends an answer, if the template has one.
    """

    def __init__(self, path: Path):
        settings, file = path / "tokenizer_config.json", path / "chat_template.jinja"
        found: dict = read_json(settings) if settings.is_file() else {}
        source = file.read_text() if file.is_file() else found.get("chat_template")
        if isinstance(source, list):  # named templates
            named = {x.get("name"): x.get("template") for x in source if isinstance(x, dict)}
            source = named.get("default")
        if not isinstance(source, str):
            raise ValueError(f"{path} has no chat template: leave out --chat")
        self.special, self.encode = special_tokens(path)
        names = {k: v for k, v in found.items() if k.endswith("_token")}
        self.names = {k: v.get("content") if isinstance(v, dict) else v for k, v in names.items()}
        engine = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols]
        )
        engine.filters["tojson"] = lambda x, **how: json.dumps(x, ensure_ascii=False, **how)
        engine.globals["raise_exception"] = refuse
        engine.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
        self.messages: list[dict[str, str]] = []
        try:
            self.template = engine.from_string(source)
        except TemplateError as error:
            raise ValueError(f"the chat template of {path} is damaged: {error}") from None
        turns = [dict(role="user", content="a"), dict(role="assistant", content=ANSWER)]
        _, _, after = self.render(turns, add_generation_prompt=False).partition(ANSWER)
        marks = [part for part in self.split(after) if part in self.special]
        self.ends = tuple(self.special[mark] for mark in marks[:1])

    def render(self, messages: list[dict[str, str]], **settings: Any) -> str:
        """The template's text. Raises ValueError where it refuses the messages."""
        for token in self.special:
            apart = token[:1] + GUARD + token[1:]
            messages = [m | dict(content=m["content"].replace(token, apart)) for m in messages]
        try:
            return self.template.render(messages=messages, **self.names, **settings)
        except Exception as error:  # a template is a program, and may fail in any way
            raise ValueError(f"the chat template refuses this: {error}") from None

    def split(self, text: str) -> list[str]:
        """The text cut at special tokens, which are parts of their own."""
        longest = sorted(self.special, key=len, reverse=True)
        return re.split(f"({'|'.join(map(re.escape, longest))})", text) if longest else [text]

    def ids(self, messages: list[dict[str, str]], **settings: Any) -> list[int]:
        """Ids of the template's text."""
        ids = []
        for part in self.split(self.render(messages, **settings)):
            plain = part.replace(GUARD, "")
            ids += [self.special[part]] if part in self.special else self.encode(plain)
        return ids

    def ask(self, text: str) -> list[int]:
        """Ids of the conversation, of a user's next message, and of what begins the answer."""
        asked = [*self.messages, dict(role="user", content=text)]
        return self.ids(asked, add_generation_prompt=True)

    def keep(self, text: str, answer: str) -> None:
        """Adds a message and its answer to the conversation."""
        self.messages += [dict(role="user", content=text), dict(role="assistant", content=answer)]


def special_tokens(path: Path) -> tuple[dict[str, int], Callable[[str], list[int]]]:
    """A tokenizer's special tokens and their ids, and an encoding that takes none for special."""
    if (path / "tokenizer.json").is_file():
        import tokenizers

        fast = tokenizers.Tokenizer.from_file(str(path / "tokenizer.json"))
        fast.encode_special_tokens = True
        added = fast.get_added_tokens_decoder().items()
        special = {token.content: i for i, token in added if token.special}
        return special, lambda text: fast.encode(text, add_special_tokens=False).ids
    model = SentencePieceProcessor(model_file=str(path / "tokenizer.model"))
    control = filter(model.is_control, range(model.vocab_size()))
    return {model.id_to_piece(i): i for i in control}, model.encode
