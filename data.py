"""Files to token memmaps; the default corpus is the Python standard library's own source.

Every machine that runs this has that text, in nearly the same version, so the shipped checkpoint can be trained again
anywhere without a download. Files are split by a hash of their name into train and held-out, so the split survives a
change of Python version.
"""

import hashlib
import io
import re
import sysconfig
from pathlib import Path

import numpy as np
import torch
from sentencepiece import SentencePieceTrainer
from torch import Tensor

from tokenizer import Tokenizer

HELD_OUT = 0.04  # share of files that training never sees
LEFT_OUT = {"test", "tests", "idle_test", "site-packages", "dist-packages", "lib2to3", "__pycache__"}
LEFT_OUT |= {"encodings", "pydoc_data"}  # tables and a dump of the manual, not source that anybody wrote


def stdlib_files() -> list[Path]:
    """The standard library's .py files without its tests, sorted by name."""
    root = Path(sysconfig.get_paths()["stdlib"])
    return sorted(f for f in root.rglob("*.py") if not LEFT_OUT & set(f.relative_to(root).parts))


def is_held_out(file: Path) -> bool:
    """Whether a file belongs to the held-out split; decided by the hash of its last two path parts."""
    digest = hashlib.sha256("/".join(file.parts[-2:]).replace(_versioned(), "python").encode()).digest()
    return int.from_bytes(digest[:4], "big") < HELD_OUT * 2**32


def _versioned() -> str:
    return Path(sysconfig.get_paths()["stdlib"]).name  # python3.11


def read_texts(files: list[Path]) -> list[str]:
    """The text of each file that is UTF-8."""
    texts = []
    for file in files:
        try:
            texts.append(file.read_text(encoding="utf-8"))
        except (UnicodeDecodeError, OSError):
            continue
    return texts


def train_tokenizer(texts: list[str], vocab_size: int, path: Path) -> Tokenizer:
    """Trains a sentencepiece BPE tokenizer that gives back every character but U+2581, its own sign for a space: byte
    fallback, no normalisation, no dummy prefix, runs of spaces as pieces, newline a piece of its own. Writes `path`."""
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
            num_threads=1,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise ValueError(f"no tokenizer of {vocab_size} tokens can be trained on this text: {' '.join(str(error).split())}") from None
    path.write_bytes(model.getvalue())
    return Tokenizer(path)


def write_tokens(texts: list[str], tokenizer: Tokenizer, path: Path) -> np.ndarray:
    """Encodes texts as BOS, tokens, EOS each, one after another, into a memmap file of uint16 or uint32."""
    dtype = np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32
    with open(path, "wb") as file:
        for text in texts:
            np.array(tokenizer.encode(text) + [tokenizer.eos], dtype=dtype).tofile(file)
    return np.memmap(path, dtype=dtype, mode="r")


def crops(tokens: np.ndarray, batch: int, length: int, seed: int, step: int) -> tuple[Tensor, Tensor]:
    """Inputs and targets (batch, length) at random places: a pure function of (seed, step)."""
    starts = np.random.Generator(np.random.Philox(key=seed, counter=[0, 0, 0, step])).integers(0, len(tokens) - length, batch)
    rows = torch.from_numpy(np.stack([tokens[s : s + length + 1] for s in starts]).astype(np.int64))
    return rows[:, :-1], rows[:, 1:]


def held_out_prompts(count: int, tokenizer: Tokenizer, length: int) -> list[list[int]]:
    """`count` prompts of `length` tokens (BOS first) from held-out files, each ending with the first line of a function.

    They take turns: one from every file before a second from any.
    """
    places = []
    for text in read_texts([f for f in stdlib_files() if is_held_out(f)]):
        heads = [m.end() for m in re.finditer(r"\n *def [^\n]*:\n", text) if m.end() > 8 * length]
        picked = heads[len(heads) // 8 :: max(1, len(heads) // 4)][:4]
        places += [(turn, text[: place]) for turn, place in enumerate(picked)]
    places.sort(key=lambda p: p[0])
    return [[tokenizer.bos] + tokenizer.encode(text[-8 * length :], bos=False)[1 - length :] for _, text in places[:count]]
