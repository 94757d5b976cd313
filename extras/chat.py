"""Conversations by a checkpoint's own chat template (`decode.py --chat`), as transformers' are.

The template is chat_template.jinja, or in tokenizer_config.json. It runs in jinja2's sandbox, and
special tokens are special in its own text alone, not in what a user wrote.
"""

import json
import re
import sys
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from support.tokenizer import Tokenizer, any_of

OPEN, CLOSE = "\ufdd0", "\ufdd1"  # no characters: around a special token's name in a message
ANSWER = "\ufdd2"  # another: stands for an answer, to see what the template puts after it


def refuse(reason: str) -> NoReturn:
    """What templates call raise_exception."""
    raise TemplateError(reason)


class Generation(Extension):
    """{% generation %} ... {% endgeneration %}: marks what is trained on. Here, a plain block."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> nodes.Node:
        """The block's content, with names of its own."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


class Chat:
    """A conversation: its messages so far. Raises ValueError where there is no template.

    `ends` has the id that ends an answer, if the template has one. `room` is the most ids that
    `ask` gives while there are old turns to leave out.
    """

    def __init__(
        self,
        path: Path,
        tokenizer: Tokenizer | None = None,
        system: str | None = None,
        room: int = 1 << 30,
    ):
        self.tokenizer, self.room = tokenizer or Tokenizer(path), room
        file, source = path / "chat_template.jinja", self.tokenizer.config.get("chat_template")
        if file.is_file():
            source = file.read_text(encoding="utf-8")
        if isinstance(source, list):  # named templates
            named = {x.get("name"): x.get("template") for x in source if isinstance(x, dict)}
            source = named.get("default")
        if not isinstance(source, str):
            raise ValueError(f"{path} has no chat template: leave out --chat")
        special = self.tokenizer.special
        used = {t for t in self.tokenizer.added if t in special or (t in source and t.strip())}
        self.special = re.compile(any_of(used))  # as text of a message they are text
        self.marks = re.compile(f"{OPEN}({self.special.pattern}){CLOSE}|[{OPEN}{CLOSE}]")
        engine = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, Generation]
        )
        engine.filters["tojson"] = lambda x, ensure_ascii=False, **how: json.dumps(
            x, ensure_ascii=ensure_ascii, **how
        )
        engine.globals["raise_exception"] = refuse
        engine.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
        self.first = [] if system is None else [dict(role="system", content=system)]
        self.reset()
        try:
            self.template = engine.from_string(source)
        except (TemplateError, SyntaxError) as error:  # of Python: {% break %} outside a loop
            raise ValueError(f"the chat template of {path} is damaged: {error}") from None
        turns, after = [dict(role="user", content="a"), dict(role="assistant", content=ANSWER)], ""
        with suppress(ValueError):  # a template may take one message alone
            after = self.render(turns, add_generation_prompt=False).partition(ANSWER)[2]
        end = self.special.search(after)
        self.ends = (self.tokenizer.added[end[0]],) if end else ()

    def reset(self) -> None:
        """Begins anew, after the system message if there is one."""
        self.messages = [*self.first]

    def render(self, messages: list[dict[str, str]], **settings: Any) -> str:
        """The template's text, with marks around special tokens that are not its own.

        Raises ValueError where it refuses the messages.
        """

        def marked(text: str) -> str:
            return self.special.sub(rf"{OPEN}\g<0>{CLOSE}", re.sub(f"[{OPEN}{CLOSE}]", "", text))

        settings |= dict(messages=[m | dict(content=marked(m["content"])) for m in messages])
        settings |= dict(tools=None, documents=None) | self.tokenizer.names
        try:
            return self.template.render(settings)
        except Exception as error:  # a template is a program, and may fail in any way
            raise ValueError(f"the chat template refuses this: {error}") from None

    def ids(self, messages: list[dict[str, str]], **settings: Any) -> list[int]:
        """Ids of the template's text."""
        return self.tokenizer.encode_marked(self.marks.split(self.render(messages, **settings)))

    def ask(self, text: str) -> list[int]:
        """Ids of the conversation, of a user's next message, and of what begins the answer.

        Where they are too many, the oldest turns leave the conversation, with a note on stderr.
        """
        left_out = 0
        while True:
            asked = [*self.messages, dict(role="user", content=text)]
            ids = self.ids(asked, add_generation_prompt=True)
            if len(ids) <= self.room or len(self.messages) == len(self.first):
                break
            del self.messages[len(self.first) : len(self.first) + 2]
            left_out += 1
        if left_out:
            note = f"the context is full: the oldest turns ({left_out}) are left out from here on"
            print(note, file=sys.stderr)
        return ids

    def keep(self, text: str, answer: str) -> None:
        """Adds a message and its answer to the conversation."""
        self.messages += [dict(role="user", content=text), dict(role="assistant", content=answer)]
