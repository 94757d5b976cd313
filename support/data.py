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
import re
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from sentencepiece import SentencePieceTrainer
from torch import Tensor

from support.checkpoint import whole_file
from support.tokenizer import Tokenizer

ROWS = {".jsonl", ".ndjson", ".json"}  # suffixes of files of rows
DOCUMENT_ROW = '{"text"}, {"prompt", "completion"} or {"messages": [{"role", "content"}]}'
Say = Callable[[str], object]  # tells a person; str tells nobody
Render = Callable[[tuple], tuple[list[int], list[bool]]]  # messages -> ids, and which have a loss
HELD_OUT = 0.04  # share of documents that training never sees
LEFT_OUT = {"test", "tests", "idle_test", "site-packages", "dist-packages", "lib2to3"}
LEFT_OUT |= {"__pycache__", "encodings", "pydoc_data"}  # the last two: tables, and the manual
PIECE = 1 << 13  # characters of a .txt file that make one document; every 25th is held out
IGNORED = -100  # target of a token that has no loss


class NoText(ValueError):
    """A file that holds no text and no rows."""


@dataclass(frozen=True)
class Document:
    """A text, and an optional prompt that carries no loss; or a conversation in their place."""

    name: str
    text: str
    prompt: str = ""
    kept_back: bool | None = None  # held out or not; None: by the hash of the name
    messages: tuple = ()  # [{"role", "content"}]; the assistant's carry loss

    @property
    def held_out(self) -> bool:
        """Whether training leaves this document to evaluation."""
        if self.kept_back is not None:
            return self.kept_back
        digest = hashlib.sha256(os.fsencode(self.name)).digest()
        return int.from_bytes(digest[:4], "big") < HELD_OUT * 2**32

    def plain(self) -> str:
        """Prompt and text. Raises ValueError for a conversation."""
        if self.messages:
            raise ValueError("conversations need the chat template of an --init checkpoint")
        return self.prompt + self.text


def stdlib_files() -> list[Path]:
    """The standard library's .py files without its tests, sorted by name."""
    root = Path(sysconfig.get_paths()["stdlib"])
    return sorted(f for f in root.rglob("*.py") if not LEFT_OUT & set(f.relative_to(root).parts))


def read_files(files: Iterable[Path], say: Say = str) -> Iterator[Document]:
    """Each file of text as a document, named by its last two path parts, or its rows as documents.

    Says how many hold neither.
    """
    version, skipped = Path(sysconfig.get_paths()["stdlib"]).name, 0  # python3.11
    for file in files:
        try:
            if file.suffix.lower() in ROWS:
                yield from read_rows(file)
                continue
            text = file.read_text(encoding="utf-8-sig")
            if "\0" in text:
                raise NoText
            yield Document("/".join(file.parts[-2:]).replace(version, "python"), text)
        except (NoText, UnicodeDecodeError, OSError):
            skipped += 1
    if skipped:
        say(f"skipped {skipped} files that are not UTF-8 text")


def read_rows(path: Path, make: Callable | None = None, wanted: str = DOCUMENT_ROW) -> Iterator:
    """What `make` makes of each row of a file, documents if None.

    A row is a line, or an element of the array that .json may hold. Raises ValueError where a row
    is not what is wanted; NoText for a .json file of another kind.
    """
    make = make or row_document
    wrong, number = NoText if path.suffix.lower() == ".json" else ValueError, 0
    try:
        with open(path, encoding="utf-8-sig") as file:
            array = wrong is NoText and file.read(1) == "["
            file.seek(0)
            for number, row in enumerate(json.load(file) if array else file, 1):
                if array or row.strip():
                    yield make(row if array else json.loads(row), f"{path.name}:{number}")
    except UnicodeDecodeError:
        raise wrong(f"{path} is not UTF-8 text") from None
    except UnicodeEncodeError:
        raise ValueError(f"{path}, row {number} holds half a surrogate pair") from None
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        wrong = wrong if number < 2 else ValueError
        raise wrong(f"{path}, row {number} is not {wanted}") from None


def row_document(row: dict, name: str) -> Document:
    """The document of a row. Fails in one of several ways where it is none."""
    text, prompt, messages = "", "", tuple[dict, ...]()
    if row.get("messages"):
        messages = tuple({key: m[key] for key in ("role", "content")} for m in row["messages"])
        "".join(m["role"] + m["content"] for m in messages).encode()
    elif "completion" in row:
        text, prompt = row["completion"], row["prompt"]
    else:
        text = row["text"]
    "".join((text, prompt)).encode()  # refuses what is no text, and half a surrogate pair
    return Document(name, text, prompt, messages=messages)


def prompt_row(row: dict, name: str) -> dict:
    """A row whose "prompt", or "text", is a prompt. Fails in one of several ways without one."""
    prompt = row["prompt"] if "prompt" in row else row["text"]
    if not prompt.encode():
        raise ValueError
    return row | {"prompt": prompt}


def read_prompts(path: Path) -> list[dict]:
    """The rows of a .jsonl or .json file, {"prompt", ...}; any other file of text is one prompt.

    Raises ValueError where the file is neither or holds no prompt.
    """
    if not path.is_file():
        raise ValueError(f"no file of prompts at {path}")
    if path.suffix.lower() in ROWS:
        rows = list(read_rows(path, prompt_row, '{"prompt": TEXT} or {"text": TEXT}'))
    else:
        try:
            text = path.read_text(encoding="utf-8-sig")
        except UnicodeDecodeError:
            raise ValueError(f"{path} is not UTF-8 text") from None
        rows = [{"prompt": text}] if text else []
    if not rows:
        raise ValueError(f"{path} holds no prompt")
    return rows


def read_corpus(sources: list[str], say: Say = str) -> Iterator[Document]:
    """Documents of stdlib, of files of rows or of text, and of directories.

    Raises ValueError where a source is missing or cannot be read as text.
    """
    for source in sources:
        path = Path(source)
        if source == "stdlib":
            yield from read_files(stdlib_files(), say)
        elif path.is_dir():
            found = sorted(f for f in path.rglob("*") if f.is_file())
            hidden = re.compile(r"(.*/)?\.[^/]*/")  # in folders such as .git
            seen = (f for f in found if not hidden.match(f.relative_to(path).as_posix()))
            yield from read_files(seen, say)
        elif not path.is_file():
            what = "give stdlib, a directory, a .txt or a .jsonl file"
            raise ValueError(f"no data at {source}: {what}")
        else:
            try:
                if path.suffix.lower() in ROWS:
                    yield from read_rows(path)
                    continue
                with open(path, encoding="utf-8-sig") as file:
                    for number, piece in enumerate(iter(lambda: file.read(PIECE), "")):
                        yield Document(f"{path.name}:{number}", piece, kept_back=number % 25 == 3)
            except UnicodeDecodeError:
                raise ValueError(f"{source} is not UTF-8 text") from None


def fingerprint(documents: Iterable[Document]) -> dict:
    """Size and hash of what documents say, whatever their files are called."""
    digest, size = hashlib.sha256(), 0
    for d in documents:
        part = repr((d.prompt, d.text, d.messages)).encode()
        digest.update(part)
        size += len(part)
    return {"bytes": size, "sha256": digest.hexdigest()}


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
    with whole_file(path) as file:
        file.write(model.getvalue())
    return Tokenizer(path)


class Tokens:
    """Token ids of documents, one after another, in a memmap.

    Where some have no loss, a .mask file beside it says which have one. Raises ValueError where
    none has, or where the two differ in length.
    """

    def __init__(self, path: Path, vocab_size: int):
        self.ids = np.memmap(path, dtype=self.dtype(vocab_size), mode="r")
        mask = path.with_suffix(".mask")
        self.learned = np.memmap(mask, dtype=np.bool_, mode="r") if mask.exists() else None
        self.path, self.vocab_size = path, vocab_size
        if self.learned is not None and len(self.learned) != len(self.ids):
            raise ValueError(f"{mask} is damaged: choose another --out")
        if self.targets is not None and not len(self.targets):
            raise ValueError(f"nothing in {path.name} has a loss: give more, or other, data")

    def __len__(self) -> int:
        return len(self.ids)

    @cached_property
    def targets(self) -> np.ndarray | None:
        """Places of the ids that have a loss, (n,); None if all have."""
        return None if self.learned is None else np.flatnonzero(self.learned[1:]) + 1

    @staticmethod
    def dtype(vocab_size: int) -> type:
        """The type of ids on disk: the smallest that holds the vocabulary."""
        return np.uint16 if vocab_size <= 1 << 16 else np.uint32

    def crops(self, batch: int, length: int, seed: int, step: int) -> tuple[Tensor, Tensor]:
        """Inputs and targets (batch, length) at random places: a pure function of (seed, step).

        A target without a loss is IGNORED. Raises ValueError on an id outside the vocabulary.
        """
        random = np.random.Generator(np.random.Philox(key=seed, counter=[0, 0, 0, step]))
        if self.targets is None:
            starts = random.integers(0, len(self) - length, batch)
        else:  # each crop holds a target that has a loss
            at = self.targets[random.integers(0, len(self.targets), batch)]
            starts = at - 1 - random.integers(0, length, batch)
            starts = starts.clip(0, len(self) - length - 1)
        ids = np.stack([self.ids[s : s + length + 1] for s in starts]).astype(np.int64)
        if ids.max() >= self.vocab_size:
            raise ValueError(f"{self.path} is damaged, or has tokens that the model lacks")
        rows = torch.from_numpy(ids)
        inputs, targets = rows[:, :-1], rows[:, 1:]
        if self.learned is not None:
            learned = np.stack([self.learned[s + 1 : s + length + 1] for s in starts])
            targets = targets.masked_fill(torch.from_numpy(~learned), IGNORED)
        return inputs, targets


def encode(
    document: Document, tokenizer: Tokenizer, render: Render | None = None
) -> tuple[list[int], list[bool]]:
    """Ids of a document, and which of them have a loss."""
    if document.messages and render:
        return render(document.messages)
    # The prompt is encoded with the text: a space may belong to either.
    ids = tokenizer.encode(document.plain())
    ids += [] if tokenizer.eos is None else [tokenizer.eos]
    shared = common(tokenizer.encode(document.prompt), ids) if document.prompt else 0
    return ids, [place >= shared for place in range(len(ids))]


def common(a: list[int], b: list[int]) -> int:
    """How many ids two texts share from their start on."""
    return next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))


def write_tokens(
    documents: Iterable[Document],
    tokenizer: Tokenizer,
    folder: Path,
    render: Render | None = None,
) -> tuple[Tokens, Tokens]:
    """Encodes documents as BOS, tokens, EOS into folder/train.bin and held_out.bin; returns both.

    `render` encodes conversations. Raises ValueError where a file stays empty.
    """
    dtype, names = Tokens.dtype(tokenizer.vocab_size), ("train", "held_out")
    files = {
        name: (open(folder / f"{name}.bin", "wb"), open(folder / f"{name}.mask", "wb"))
        for name in names
    }
    masked = False
    for document in documents:
        ids, mask = files[names[document.held_out]]
        try:
            whole, learned = encode(document, tokenizer, render)
        except ValueError as error:
            raise ValueError(f"{document.name}: {error}") from None
        np.array(whole, dtype=dtype).tofile(ids)
        np.array(learned).tofile(mask)
        masked = masked or not all(learned)
    for file in (f for pair in files.values() for f in pair):
        file.close()
    for name in names:
        if not masked:
            (folder / f"{name}.mask").unlink()
        if not (folder / f"{name}.bin").stat().st_size:
            raise ValueError(
                f"the data is too short: no document fell to the {name.replace('_', '-')} part"
            )
    return Tokens(folder / "train.bin", tokenizer.vocab_size), Tokens(
        folder / "held_out.bin", tokenizer.vocab_size
    )
