"""Text to token ids and back, and a decoder for streams that never prints half a character.

A token may end in the middle of a UTF-8 character (byte fallback), and sentencepiece drops a leading space when it
decodes a lone piece. `Stream` handles both: it decodes the recent context too and gives out only what has settled.
"""

import re
from collections.abc import Callable
from pathlib import Path

from sentencepiece import SentencePieceProcessor


class Tokenizer:
    """tokenizer.model (sentencepiece: Llama 1 and 2, Code Llama, ours) or tokenizer.json (Llama 3) of a directory.

    `bos` and `eos` are ids, None where the file names none. Raises ValueError, one line, when there is no usable one.
    """

    vocab_size: int
    bos: int | None
    eos: int | None
    _encode: Callable[[str], list[int]]
    _decode: Callable[[list[int]], str]

    def __init__(self, path: str | Path):
        path = Path(path)
        model, fast = (path / "tokenizer.model", path / "tokenizer.json") if path.is_dir() else (path, path)
        tiktoken = model.is_file() and is_tiktoken(model)
        if fast.suffix == ".json" and fast.is_file() and (tiktoken or not model.is_file() or model == fast):
            self._load_json(fast)
        elif tiktoken:
            raise ValueError(f"{model} is in tiktoken's format; put the tokenizer.json of the same model beside it")
        elif model.is_file():
            self._load_sentencepiece(model)
        else:
            raise ValueError(f"no tokenizer.model or tokenizer.json in {path}" if path.is_dir() else f"no tokenizer at {path}")

    def _load_sentencepiece(self, path: Path) -> None:
        model = SentencePieceProcessor()
        try:
            model.LoadFromSerializedProto(path.read_bytes())
        except (RuntimeError, OSError):
            raise ValueError(f"{path} is not a sentencepiece model") from None
        self.vocab_size = model.vocab_size()
        self.bos, self.eos = (i if i >= 0 else None for i in (model.bos_id(), model.eos_id()))
        self._encode = lambda text: ([] if self.bos is None else [self.bos]) + model.encode(text)
        self._decode = model.decode

    def _load_json(self, path: Path) -> None:
        try:
            import tokenizers  # only here: sentencepiece checkpoints do without it
        except ImportError:
            raise ValueError(f"{path} needs the tokenizers package: pip install tokenizers") from None
        try:
            model = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises nothing narrower
            raise ValueError(f"{path} is not a tokenizer: {' '.join(str(error).split())}") from None
        self.vocab_size = max(model.get_vocab().values(), default=-1) + 1
        start = model.encode("").ids  # what its own template puts before a text
        ends = (model.token_to_id(name) for name in ("<|end_of_text|>", "<|eot_id|>", "</s>"))
        self.bos, self.eos = (start[0] if start else None), next((i for i in ends if i is not None), None)
        self._encode = lambda text: model.encode(text).ids
        self._decode = lambda ids: model.decode(ids, skip_special_tokens=True)

    def encode(self, text: str, bos: bool = True) -> list[int]:
        """Ids of `text`, after the beginning-of-sequence id where the model expects one and `bos` is set."""
        ids = self._encode(text)
        return ids if bos or self.bos is None else ids[1:]

    def decode(self, ids: list[int]) -> str:
        """Text of `ids`; control ids (BOS, EOS) give none, bytes that are not UTF-8 give U+FFFD."""
        return self._decode(ids)


def is_tiktoken(path: Path) -> bool:
    """Whether a tokenizer.model is Llama 3's list of base64 tokens and ranks, not a sentencepiece model."""
    with open(path, "rb") as file:
        return re.match(rb"[A-Za-z0-9+/]+={0,2} \d+\r?\n", file.read(4096)) is not None


class Stream:
    """Decodes ids as they come: feed(ids) returns the text that is now certain, finish() the rest.

    Starts after `context`, the ids of the prompt, so that a leading space is kept. The parts joined are exactly what
    decode(context + all ids) gives after decode(context).
    """

    KEEP = 8  # ids of context that stay in the window: enough to settle spaces and the longest UTF-8 sequence

    def __init__(self, tokenizer: Tokenizer, context: list[int]):
        self.tokenizer = tokenizer
        self.window = list(context[-self.KEEP :])
        self.printed = tokenizer.decode(self.window)

    def feed(self, ids: list[int]) -> str:
        """Takes the ids that come next; gives the text that no later id can change, possibly none."""
        self.window += ids
        text = self.tokenizer.decode(self.window)
        settled = text.rstrip("\ufffd")  # an unfinished character decodes to U+FFFD, at the end
        if text != settled and not settled.startswith(self.printed):
            return ""  # tokenizer.json's byte fallback takes back whole characters while the next one is unfinished
        new, self.printed = settled[len(self.printed) :], max(settled, self.printed, key=len)
        if settled == text and len(self.window) > 4 * self.KEEP:
            self.window = self.window[-self.KEEP :]
            self.printed = self.tokenizer.decode(self.window)
        return new

    def finish(self) -> str:
        """The text that feed held back: a character that stays unfinished, as U+FFFD."""
        text = self.tokenizer.decode(self.window)
        new, self.printed = text[len(self.printed) :], text
        return new
