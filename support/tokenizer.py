"""Text to token ids and back, and a decoder for streams that never prints half a character.

A token may end inside a UTF-8 character, and decoding drops a leading space: see `Stream`.
"""

import re
from collections.abc import Callable, Set
from itertools import takewhile
from operator import eq
from pathlib import Path

from sentencepiece import SentencePieceProcessor


class Tokenizer:
    """tokenizer.model (Llama 1 and 2, ours) or tokenizer.json (Llama 3) at `path`.

    `bos` and `eos` are ids, None where the file names none. ValueError when there is no usable one.
    """

    bos: int | None
    eos: int | None
    closing: Set[int]  # ids after which the text before them is final
    _encode: Callable[[str], list[int]]
    _decode: Callable[[list[int]], str]

    def __init__(self, path: str | Path):
        path = Path(path)
        model, fast = path / "tokenizer.model", path / "tokenizer.json"
        if path.is_file():
            model, fast = path, path if path.suffix == ".json" else fast
        tiktoken = model.is_file() and is_tiktoken(model)
        if fast.is_file() and (tiktoken or model == fast or not model.is_file()):
            self._load_json(fast)
        elif tiktoken:
            raise ValueError(f"{model} is in tiktoken's format: put a tokenizer.json beside it")
        elif model.is_file():
            self._load_sentencepiece(model)
        else:
            raise ValueError(f"no tokenizer.model or tokenizer.json at {path}")

    def _load_sentencepiece(self, path: Path) -> None:
        model = SentencePieceProcessor()
        try:
            model.LoadFromSerializedProto(path.read_bytes())
        except (RuntimeError, OSError):
            raise ValueError(f"{path} is not a sentencepiece model") from None
        self.vocab_size = model.vocab_size()
        self.bos, self.eos = (i if i >= 0 else None for i in (model.bos_id(), model.eos_id()))
        self.closing = {i for i in range(self.vocab_size) if not model.is_control(i)}
        self._encode = lambda text: ([] if self.bos is None else [self.bos]) + model.encode(text)
        self._decode = model.decode

    def _load_json(self, path: Path) -> None:
        try:
            import tokenizers  # only here

            model = tokenizers.Tokenizer.from_file(str(path))
            model.no_truncation()
            model.no_padding()
            start = model.encode("").ids  # what its template puts before a text
        except ImportError:
            raise ValueError(f"{path} needs a package: pip install tokenizers") from None
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # a panic is no Exception
            reason = visible(" ".join(str(error).split()))
            raise ValueError(f"{path} is not a tokenizer: {reason:.300}") from None
        vocabulary = model.get_vocab()
        self.vocab_size = max(vocabulary.values(), default=-1) + 1
        ends = (vocabulary.get(name) for name in ("<|end_of_text|>", "<|eot_id|>", "</s>"))
        self.bos = start[0] if start else None
        self.eos = next((i for i in ends if i is not None), None)
        # A bad byte turns a run of byte tokens into U+FFFD. Special tokens do not end a run.
        added = model.get_added_tokens_decoder()
        texts = {i for token, i in vocabulary.items() if not re.fullmatch("<0x..>", token)}
        self.closing = texts - {i for i, token in added.items() if token.special}
        self._encode = lambda text: model.encode(text).ids
        self._decode = lambda ids: model.decode(ids, skip_special_tokens=True)

    def encode(self, text: str, bos: bool = True) -> list[int]:
        """Ids of `text`, after that of BOS where the model expects one and `bos` is set."""
        text.encode()  # refuses half a surrogate pair
        ids = self._encode(text)
        return ids if bos or self.bos is None else ids[1:]

    def decode(self, ids: list[int]) -> str:
        """Text of `ids`: of bad bytes, U+FFFD; of BOS, EOS and unknown ids, none."""
        return self._decode([i for i in ids if 0 <= i < self.vocab_size])


def is_tiktoken(path: Path) -> bool:
    """Whether a tokenizer.model lists base64 tokens and ranks, as Llama 3's."""
    with open(path, "rb") as file:
        return re.match(rb"[A-Za-z0-9+/]+={0,2} \d+\r?\n", file.read(4096)) is not None


def visible(text: str) -> str:
    r"""Text for a terminal: control characters as \x1b and the like, but for newline and tab."""
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", lambda c: f"\\x{ord(c[0]):02x}", text)


class Stream:
    """Decodes ids as they come, after those of `context`.

    The parts joined are decode(context + all ids) without the start it shares with decode(context).

    A window of the latest ids is decoded. After a closing id its text is final, but for U+FFFD as
    its last three characters: an unfinished character has at most three bytes. Old ids leave when
    the others decode to the same end, perhaps after U+FFFD for a cut character.
    """

    KEEP = 8  # ids of a shortened window

    def __init__(self, tokenizer: Tokenizer, context: list[int]):
        self.tokenizer, self.window, self.given = tokenizer, list[int](), ""
        self.feed(context)
        self.given = tokenizer.decode(self.window)  # the start of its text that is out

    def feed(self, ids: list[int]) -> str:
        """Takes the next ids; gives the text that no later id can change."""
        self.window += ids
        if not self.window or self.window[-1] not in self.tokenizer.closing:
            return ""
        text = self.tokenizer.decode(self.window)
        unsure = min(len(text) - len(text.rstrip("\ufffd")), 3)
        new = self._give(text[: len(text) - unsure])
        if len(self.window) > 4 * self.KEEP:
            tail = self.tokenizer.decode(self.window[-self.KEEP :])
            end = tail.lstrip("\ufffd") or tail[3:]
            if len(end) >= max(unsure, 1) and text.endswith(end):
                self.window = self.window[-self.KEEP :]
                self.given = tail[: -len(end)] + self.given[len(text) - len(end) :]
        return new

    def finish(self) -> str:
        """The text held back; U+FFFD for an unfinished character."""
        return self._give(self.tokenizer.decode(self.window))

    def _give(self, text: str) -> str:
        shared = sum(takewhile(bool, map(eq, text, self.given)))
        self.given = text if len(text) > shared else self.given
        return text[shared:]
