"""Text to token memmaps. The default corpus is the Python standard library's own source.

Every machine that runs this has that text, in nearly the same version: the shipped checkpoint can
be trained again anywhere, without a download. Documents are split by a hash of their name into
train and held-out, so the split survives a change of Python version. Text streams through: a corpus
may be larger than memory.
"""

import hashlib
import io
import json
import os
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from sentencepiece import SentencePieceTrainer
from torch import Tensor

from support.tokenizer import Tokenizer

HELD_OUT = 0.04  # share of documents that training never sees
LEFT_OUT = {"test", "tests", "idle_test", "site-packages", "dist-packages", "lib2to3"}
LEFT_OUT |= {"__pycache__", "encodings", "pydoc_data"}  # the last two: tables, and the manual
PIECE = 1 << 13  # characters of a .txt file that make one document; every 25th is held out
IGNORED = -100  # target of a token that has no loss


@dataclass(frozen=True)
class Document:
    """A text; of `prompt`, which comes before it, nothing is learned."""

    name: str
    text: str
    prompt: str = ""
    kept_back: bool | None = None  # held out or not; None: by the hash of the name

    @property
    def held_out(self) -> bool:
        """Whether training leaves this document to evaluation."""
        if self.kept_back is not None:
            return self.kept_back
        digest = hashlib.sha256(self.name.encode()).digest()
        return int.from_bytes(digest[:4], "big") < HELD_OUT * 2**32


def stdlib_files() -> list[Path]:
    """The standard library's .py files without its tests, sorted by name."""
    root = Path(sysconfig.get_paths()["stdlib"])
    return sorted(f for f in root.rglob("*.py") if not LEFT_OUT & set(f.relative_to(root).parts))


def read_files(files: Iterable[Path]) -> Iterator[Document]:
    """Each file that is UTF-8 as a document, named by its last two path parts."""
    version = Path(sysconfig.get_paths()["stdlib"]).name  # python3.11
    for file in files:
        try:
            yield Document(
                "/".join(file.parts[-2:]).replace(version, "python"),
                file.read_text(encoding="utf-8"),
            )
        except (UnicodeDecodeError, OSError):
            continue


def read_lines(path: Path) -> Iterator[Document]:
    """Each line of a JSONL file, {"text"} or {"prompt", "completion"}, as a document.

    Raises ValueError, one line, where a line has neither.
    """
    with open(path, encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                text, prompt = (
                    (row["completion"], row["prompt"]) if "completion" in row else (row["text"], "")
                )
                if not isinstance(text, str) or not isinstance(prompt, str):
                    raise TypeError
            except (ValueError, KeyError, TypeError):
                wanted = '{"text": ...} or {"prompt": ..., "completion": ...}'
                raise ValueError(f"{path}, line {number} is not {wanted}") from None
            yield Document(f"{path.name}:{number}", text, prompt)


def read_corpus(sources: list[str]) -> Iterator[Document]:
    """Documents of stdlib, .jsonl and .txt files, and directories.

    Raises ValueError where a source is missing or cannot be read as text.
    """
    for source in sources:
        path = Path(source)
        if source == "stdlib":
            yield from read_files(stdlib_files())
        elif path.is_dir():
            yield from read_files(sorted(f for f in path.rglob("*") if f.is_file()))
        elif not path.is_file():
            what = "give stdlib, a directory, a .txt or a .jsonl file"
            raise ValueError(f"no data at {source}: {what}")
        else:
            try:
                if path.suffix == ".jsonl":
                    yield from read_lines(path)
                    continue
                with open(path, encoding="utf-8") as file:
                    for number, piece in enumerate(iter(lambda: file.read(PIECE), "")):
                        yield Document(f"{path.name}:{number}", piece, kept_back=number % 25 == 3)
            except UnicodeDecodeError:
                raise ValueError(f"{source} is not UTF-8 text") from None


def train_tokenizer(texts: Iterable[str], vocab_size: int, path: Path) -> Tokenizer:
    """Trains a sentencepiece BPE tokenizer and writes it to `path`.

    It gives back every character but U+2581, its own sign for a space: byte fallback, no
    normalisation, no dummy prefix, runs of spaces as pieces, newline a piece of its own.
    Raises ValueError where the text has not enough pieces for the size."""
    lines = (line for text in texts for line in text.split("\n") if line and "\0" not in line)
    model = io.BytesIO()
    try:
        SentencePieceTrainer.Train(
            sentence_iterator=lines,
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            byte_fallback=True,
            character_coverage=0.9995,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            allow_whitespace_only_pieces=True,
            split_digits=True,
            user_defined_symbols=["\n"],
            max_sentence_length=1 << 16,
            input_sentence_size=2_000_000,  # a larger corpus is sampled
            num_threads=1,
            minloglevel=2,
        )
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        text = f"no tokenizer of {vocab_size} tokens can be trained on this text: {reason}"
        raise ValueError(text) from None
    aside = path.with_suffix(".new")
    aside.write_bytes(model.getvalue())
    os.replace(aside, path)
    return Tokenizer(path)


class Tokens:
    """Token ids of documents, one after another, in a memmap.

    Where documents have prompts, a .mask file beside it says which ids have a loss. Raises
    ValueError where the two differ in length.
    """

    def __init__(self, path: Path, vocab_size: int):
        self.ids = np.memmap(path, dtype=self.dtype(vocab_size), mode="r")
        mask = path.with_suffix(".mask")
        self.learned = np.memmap(mask, dtype=np.bool_, mode="r") if mask.exists() else None
        self.path, self.vocab_size = path, vocab_size
        if self.learned is not None and len(self.learned) != len(self.ids):
            raise ValueError(f"{mask} is damaged: choose another --out")

    def __len__(self) -> int:
        return len(self.ids)

    @staticmethod
    def dtype(vocab_size: int) -> type:
        """The type of ids on disk: the smallest that holds the vocabulary."""
        return np.uint16 if vocab_size <= 1 << 16 else np.uint32

    def crops(self, batch: int, length: int, seed: int, step: int) -> tuple[Tensor, Tensor]:
        """Inputs and targets (batch, length) at random places: a pure function of (seed, step).

        A target without a loss is IGNORED. Raises ValueError on an id outside the vocabulary.
        """
        random = np.random.Generator(np.random.Philox(key=seed, counter=[0, 0, 0, step]))
        starts = random.integers(0, len(self) - length, batch)
        ids = np.stack([self.ids[s : s + length + 1] for s in starts]).astype(np.int64)
        if ids.max() >= self.vocab_size:
            raise ValueError(f"{self.path} is damaged: choose another --out")
        rows = torch.from_numpy(ids)
        inputs, targets = rows[:, :-1], rows[:, 1:]
        if self.learned is not None:
            learned = np.stack([self.learned[s + 1 : s + length + 1] for s in starts])
            targets = targets.masked_fill(torch.from_numpy(~learned), IGNORED)
        return inputs, targets


def write_tokens(
    documents: Iterable[Document], tokenizer: Tokenizer, folder: Path
) -> tuple[Tokens, Tokens]:
    """Encodes documents as BOS, tokens, EOS into folder/train.bin and held_out.bin; returns both.

    Raises ValueError where a file stays empty.
    """
    dtype, names = Tokens.dtype(tokenizer.vocab_size), ("train", "held_out")
    files = {
        name: (open(folder / f"{name}.bin", "wb"), open(folder / f"{name}.mask", "wb"))
        for name in names
    }
    prompts = False
    for document in documents:
        ids, mask = files[names[document.held_out]]
        # The prompt is encoded with the text: a space may belong to either.
        whole = tokenizer.encode(document.prompt + document.text)
        whole += [] if tokenizer.eos is None else [tokenizer.eos]
        prompt = tokenizer.encode(document.prompt) if document.prompt else []
        shared = next((i for i, (a, b) in enumerate(zip(prompt, whole)) if a != b), len(prompt))
        np.array(whole, dtype=dtype).tofile(ids)
        np.array([False] * shared + [True] * (len(whole) - shared)).tofile(mask)
        prompts = prompts or shared > 0
    for file in (f for pair in files.values() for f in pair):
        file.close()
    for name in names:
        if not prompts:
            (folder / f"{name}.mask").unlink()
        if not (folder / f"{name}.bin").stat().st_size:
            raise ValueError(
                f"the data is too short: no document fell to the {name.replace('_', '-')} part"
            )
    return Tokens(folder / "train.bin", tokenizer.vocab_size), Tokens(
        folder / "held_out.bin", tokenizer.vocab_size
    )
