"""Text to token ids and back, and a decoder for streams that never prints half a character.

A token may end in the middle of a UTF-8 character (byte fallback), and sentencepiece drops a leading space when it
decodes a lone piece. `Stream` handles both: it decodes the whole recent context and gives out only what has settled.
"""

from pathlib import Path

from sentencepiece import SentencePieceProcessor


class Tokenizer:
    """A sentencepiece tokenizer.model. `bos` and `eos` are its ids, None where it has none."""

    def __init__(self, path: str | Path):
        path = Path(path)
        path = path / "tokenizer.model" if path.is_dir() else path
        if not path.is_file():
            raise ValueError(f"no tokenizer at {path}")
        self.model = SentencePieceProcessor()
        try:
            self.model.Load(str(path))
        except (RuntimeError, OSError):
            raise ValueError(f"{path} is not a sentencepiece model") from None
        self.vocab_size = self.model.vocab_size()
        self.bos = self.model.bos_id() if self.model.bos_id() >= 0 else None
        self.eos = self.model.eos_id() if self.model.eos_id() >= 0 else None

    def encode(self, text: str, bos: bool = True) -> list[int]:
        """Ids of `text`, after the beginning-of-sequence id where the tokenizer has one and `bos` is set."""
        return [self.bos] * (bos and self.bos is not None) + self.model.encode(text)

    def decode(self, ids: list[int]) -> str:
        """Text of `ids`; control ids (BOS, EOS) give none, bytes that are not UTF-8 give U+FFFD."""
        return self.model.decode(ids)


class Stream:
    """Decodes ids as they come: feed(ids) returns the text that is now certain, finish() the rest.

    Starts after `context`, the ids of the prompt, so that a leading space is kept. The parts joined are exactly what
    decode(context + all ids) gives after decode(context).
    """

    KEEP = 8  # ids of context that stay in the window: enough to settle spaces and the longest UTF-8 sequence

    def __init__(self, tokenizer: Tokenizer, context: list[int]):
        self.tokenizer = tokenizer
        self.window = list(context[-self.KEEP :])
        self.printed = len(tokenizer.decode(self.window))

    def feed(self, ids: list[int]) -> str:
        self.window += ids
        text = self.tokenizer.decode(self.window)
        # An unfinished character decodes to U+FFFD at the end, one for each of its bytes, which are at most three.
        settled = max(len(text.rstrip("\ufffd")), len(text) - 3)
        new, self.printed = text[self.printed : settled], max(self.printed, settled)
        if settled == len(text) and len(self.window) > 4 * self.KEEP:
            self.window = self.window[-self.KEEP :]
            self.printed = len(self.tokenizer.decode(self.window))
        return new

    def finish(self) -> str:
        text = self.tokenizer.decode(self.window)
        new, self.printed = text[self.printed :], len(text)
        return new
