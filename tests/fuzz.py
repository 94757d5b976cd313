"""Fuzzing what is read: checkpoints, training runs and data as nobody should leave them.

    python tests/fuzz.py                            4,000 cases; exit code 1 if one fails
    python tests/fuzz.py --first 1200 --cases 100   cases 1200 to 1299 alone

A case is a pure function of its number. It changes a valid directory, then reads it and decodes or
trains. It must end in what was asked for or in one clear line, within five seconds of processor
time and 512 MB above the start. Where transformers is installed, it reads the same directory: what
it loads must not be refused here, and logits, ids and EOS must be the same. KNOWN has what differs
all the same, and why.
"""

import argparse
import collections
import faulthandler
import io
import json
import math
import os
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, suppress
from dataclasses import replace
from itertools import islice, product
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
os.environ["HF_HUB_OFFLINE"] = "1"

import numpy as np
import torch
from chat_table import ADDED, CONVERSATIONS, PLAIN, SPECIAL, TEMPLATES
from chat_table import KINDS as TOKENIZERS
from chat_table import sentencepiece
from helpers import config_option, tiny_config, tiny_model
from test_loading import meta_config, split_by_index, write_meta
from test_tokenizer import byte_level, ours

from decode import generate
from extras.chat import Chat
from model import load_checkpoint, save_checkpoint
from support.console import default_settings, load
from support.data import read_corpus
from support.runs import RunDirectory
from support.tokenizer import Tokenizer
from support.train_command import parser, prepare

try:
    import transformers

    transformers.logging.set_verbosity(100)
    transformers.logging.disable_progress_bar()
except ImportError:
    transformers = None

Chance = np.random.Generator
HEADERS = ("model.safetensors", "state.safetensors")  # the files whose headers are gone through
UNREAD = ("config.json", "model.safetensors", "generation_config.json")  # by a run that goes on
NESTED: list = []
for _ in range(200):
    NESTED = [NESTED]
VALUES = [None, True, "", "a%s", [], {}, -1, 0, 1e308, 5e-324, 10**400, 2**63, NESTED, "x" * 10**6]
VALUES += [math.nan, math.inf]  # Python reads and writes these, too

# --------------------------------------
# Valid directories


def checkpoints(base: Path) -> list[Path]:
    """One file, shards with an index, Meta's layout in two shards."""
    one, shards, meta = base / "one", base / "shards", base / "meta"
    scaled = dict(rope_type="llama3", rope_factor=8.0, rope_original_len=64)
    config = tiny_config(vocab_size=420, n_layers=2, bos=1, eos=(2,), **scaled)
    for path in (one, shards):
        save_checkpoint(tiny_model(config), path)
    split_by_index(shards)
    put(shards / "model.safetensors.index.json", ["metadata"], {"total_size": 1})
    file = shards / "config.json"
    found = json.loads(file.read_text()) | dict(attention_bias=False, quantization_config=None)
    found["rope_parameters"] = found.pop("rope_scaling") | dict(rope_theta=found.pop("rope_theta"))
    file.write_text(json.dumps(found))
    optional = dict(rope_theta=5e5, use_scaled_rope=True, ffn_dim_multiplier=1.0, moe=None)
    write_meta(tiny_model(replace(meta_config(), vocab_size=300)), meta, 2, 1, **optional)
    settings = dict(eos_token_id=[2, 3], assistant_early_exit=1, num_assistant_tokens=4)
    settings["assistant_confidence_threshold"] = 0.1
    (one / "generation_config.json").write_text(json.dumps(settings))
    for path, tokenizer in ((one, sentencepiece), (shards, byte_level), (meta, ours)):
        tokenizer(path)
    return [one, shards, meta]


def chats(base: Path) -> list[Path]:
    """A checkpoint for each kind of tokenizer in the table of chats, with a template."""
    model = tiny_model(tiny_config(vocab_size=420, n_layers=2, bos=1, eos=(2,)))
    for (kind, make), template in zip(TOKENIZERS.items(), TEMPLATES.values()):
        path = base / re.sub(r"\W+", "-", kind)
        save_checkpoint(model, path)
        make(path)
        put(path / "tokenizer_config.json", ["chat_template"], template)
    return [base / re.sub(r"\W+", "-", kind) for kind in TOKENIZERS]


def training(path: Path) -> tuple:
    """A training run of a tiny model, for two steps, in the directory `path`, and its save."""
    small = dict(n_layers=2, dim=16, hidden_dim=16, n_heads=2, n_kv_heads=1, vocab_size=280)
    options = ["--seq=16", "--batch=2", *config_option(**small)]
    data = ["--data", str(path.parent / "pairs.jsonl"), "--no-compile", "--no-bf16"]
    args = parser().parse_args(["--out", str(path), "--steps=2", *options, *data])
    return prepare(args, RunDirectory(args.out, args.init))


def stopped_run(path: Path) -> Path:
    """A run that was stopped after the first of two steps."""
    pairs = (dict(prompt=f"{i} and ", completion=f"{i + 1}, {2 * i}.") for i in range(1000))
    (path.parent / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    stopped, save = training(path)
    stopped.train_step()
    stopped.run.add_metrics({"step": 1, "losses": {2: 1.0}, "norm": 1.0})
    save()
    return path


# --------------------------------------
# Damage


def places(value) -> Iterator[list]:
    """The ways to every value in a JSON value; in a long list or object, to its first three."""
    if isinstance(value, str) and value.startswith("{"):  # JSON in a string
        value = json.loads(value)
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, inner in islice(items, 3 if len(value) > 20 else None):
        yield [key]
        if isinstance(inner, (dict, list)) or str(inner).startswith('{"'):
            yield from ([key, *rest] for rest in places(inner))


def changed(value, place: list, new):
    """A JSON value with a new one in a place."""
    if not place:
        return new
    if isinstance(value, str):
        return json.dumps(changed(json.loads(value), place, new))
    known = not isinstance(value, dict) or place[0] in value
    value[place[0]] = changed(value[place[0]] if known else None, place[1:], new)
    return value


def cut_out(file: Path) -> tuple[bytes, dict, bytes]:
    """What stands before a file's JSON, the JSON, and what stands after it."""
    content, start = file.read_bytes() if file.exists() else b"{}", 0
    end = len(content)
    if file.suffix == ".jsonl":  # the last line
        start = content.rstrip().rfind(b"\n") + 1
    if file.suffix == ".safetensors":  # the header, after its length
        start, end = 8, 8 + int.from_bytes(content[:8], "little")
    return content[:start], json.loads(content[start:end]), content[end:]


def put(file: Path, place: list, value) -> None:
    """Puts a value in a place of a file's JSON."""
    start, found, rest = cut_out(file)
    text = json.dumps(changed(found, place, value)).encode()
    if file.suffix == ".safetensors":
        start = len(text).to_bytes(8, "little")
    file.write_bytes(start + text + rest)


def flip(file: Path, chance: Chance) -> None:
    """Flips bits, cuts or doubles bytes, changes digits, truncates; mostly where headers are."""
    content = bytearray(file.read_bytes())
    for _ in range(int(chance.choice([1, 1, 2, 8]))):
        size = min(len(content), 1500) if chance.random() < 0.7 else len(content)
        if not size:
            break
        place, length = int(chance.integers(size)), int(chance.integers(1, 9))
        part = slice(place, place + length)
        digits = [i for i in range(size) if abs(i - place) < 40 and chr(content[i]).isdigit()]
        kind = chance.choice(["flip", "flip", "byte", "cut", "double", "digit", "truncate"])
        if kind == "flip":
            content[place] ^= 1 << int(chance.integers(8))
        elif kind == "byte":
            content[place] = int(chance.integers(256))
        elif kind == "cut":
            del content[part]
        elif kind == "double":
            content[part] = content[part] * 2
        elif kind == "digit" and digits:
            content[chance.choice(digits)] = ord(chance.choice(list("0123456789-e.")))
        elif kind == "truncate":
            del content[int(chance.integers(len(content))) :]
    file.write_bytes(content)


def confuse(file: Path, chance: Chance) -> None:
    """Puts wrong values, and sizes that are too large, in a few places of a file's JSON."""
    values = [*VALUES, *(2**n for n in range(32))]
    for _ in range(int(chance.integers(2, 5))):
        put(file, pick(chance, list(places(cut_out(file)[1]))), pick(chance, values))


def pick(chance: Chance, of) -> Any:
    """One of several things, of any kind."""
    of = list(of)
    return of[int(chance.integers(len(of)))]


# --------------------------------------
# Kinds of cases: each makes the directory `work` from a valid one, and says what it did

FLAGS = ("special", "lstrip", "rstrip", "normalized", "single_word")
NAMES = [*SPECIAL, *ADDED, *PLAIN, "[PAD]", "<new>", "fox", " ", ""]
PARTS = [  # of chat templates
    *("{{ bos_token }}", "{{ eos_token }}", "{{ pad_token }}", "{{ unk_token }}", "{{ nobody }}"),
    *("{% generation %}", "{% endgeneration %}", "{%- endif %}", "{% endfor %}", "{% break %}"),
    *("{{ messages|tojson(indent=2) }}", "{{ messages[0] | tojson }}", "{{ messages[9].content }}"),
    *("{% if tools %}x{% endif %}", "{{ documents is none }}", "{{ raise_exception('no') }}"),
    *("{{ strftime_now('%Y') }}", "{{ ''.__class__.__mro__ }}", "{{ range(10**9) | list }}"),
    *("{% for m in messages %}", "{{ m.content | trim | upper }}", "{{ m['content'].split() }}"),
    *("{%- set x = namespace(n=0) -%}", "{% set x.n = 1 %}", "{{ x }}", "{{ 1 / 0 }}", "{#", "{%"),
    *("{% macro f(a) %}{{ a }}</s>{% endmacro %}", "{{ f('<s>') }}", "{{ messages + 1 }}"),
    *("\n", " \n ", "  ", "é漢😀", "\ufeff", "<s>", " </s> ", "<|im_end|>\n", "<think>", "{}"),
]
TOKEN_IDS = [None, 0, 1, 2, 2.0, 5, 299, 300, 419, 420, -1, [], [2], [2, 3], [3, 2, 500], "2", True]
SETTINGS = {  # by file: values of keys that others write
    "generation_config.json": {
        **dict.fromkeys(("eos_token_id", "bos_token_id", "pad_token_id"), TOKEN_IDS),
        "assistant_early_exit": [None, 0, 1, 2, 9, 1.0, "1"],
        "num_assistant_tokens": [0, 1, 19.0, 20, 1000, None],
        "assistant_confidence_threshold": [0, 0.4, 1, 2.0, None, "x"],
        "temperature": [0, 0.0, 0.6, None],
        "stop_strings": ["a", ["a"], None],
        "max_length": [20, 4096.0, None],
    },
    "config.json": {
        **dict.fromkeys(("eos_token_id", "bos_token_id", "pad_token_id"), TOKEN_IDS),
        **dict.fromkeys(("head_dim", "num_key_value_heads"), [None, 8, 8.0, 2, 4, 1]),
        **dict.fromkeys(("attention_bias", "mlp_bias"), [False, True, None]),
        "tie_word_embeddings": [True, False, None, 1, 0],
        "rope_theta": [10000, 500000.0, None, 1e6],
        "rope_scaling": [
            *(None, {}, {"type": "linear", "factor": 2.0}, {"rope_type": "dynamic", "factor": 2.0}),
            *({"rope_type": "default"}, {"type": "linear", "factor": 2}, {"factor": 2.0}),
            {"rope_type": "default", "rope_theta": 5e5},
        ],
        "hidden_act": ["silu", "swish", "gelu", None],
        "rms_norm_eps": [1e-5, 1e-6, 0, 1, None],
        "max_position_embeddings": [1, 64, 2048.0, 1 << 20, None],
        **dict.fromkeys(("dtype", "torch_dtype"), ["float32", "bfloat16", "auto", None]),
        "model_type": ["llama", "mistral", "Llama", None],
        "architectures": [None, [], ["LlamaModel"], ["MistralForCausalLM"]],
        "quantization_config": [None, {}, {"quant_method": "fp8"}],
        **dict.fromkeys(("pretraining_tp", "use_cache", "transformers_version"), [1, None, "4.1"]),
    },
}


def planned(sources: list[Path]) -> list[tuple]:
    """Every wrong or missing value and file, in a fixed, mixed order: (file, what, value)."""
    cases: list[tuple] = []
    for file in files_of(sources):
        cases += [(file, "empty", None), (file, "directory", None)]
        if file.suffix in (".json", ".jsonl") or file.name in HEADERS:
            cases += product([file], places(cut_out(file)[1]), VALUES)
    random.Random(0).shuffle(cases)
    return cases


def files_of(sources: list[Path]) -> list[Path]:
    """The files that are read of these directories."""
    files = [file for source in sources for file in sorted(source.iterdir())]
    return [f for f in files if f.parent.name != "run" or f.name not in UNREAD]


class Maker:
    """Makes the directory of a case, `work`, from valid ones under `base`."""

    def __init__(self, base: Path):
        self.work = base / "a case"
        self.plain, self.chats = checkpoints(base), chats(base)
        self.sources = [*self.plain, *self.chats, stopped_run(base / "run")]
        self.plan = planned([*self.plain, self.sources[-1]])

    def copy(self, chance: Chance, of: list[Path]) -> None:
        shutil.copytree(pick(chance, of), self.work)

    def damaged(self, number: int, chance: Chance) -> object:
        """A wrong or missing value or file."""
        file, what, value = self.plan[number % len(self.plan)]
        shutil.copytree(file.parent, self.work)
        if what == "empty":
            (self.work / file.name).write_bytes(b"")
        elif what == "directory":
            (self.work / file.name).unlink()
            (self.work / file.name).mkdir()
        else:
            put(self.work / file.name, what, value)
        return f"{file.parent.name}/{file.name}", what, value

    def spoiled(self, number: int, chance: Chance) -> object:
        """Bytes or values by chance."""
        file = pick(chance, files_of(self.sources))
        shutil.copytree(file.parent, self.work)
        how = confuse if file.suffix == ".json" and chance.random() < 0.5 else flip
        how(self.work / file.name, chance)
        return f"{file.parent.name}/{file.name}"

    def templates(self, number: int, chance: Chance) -> object:
        """A chat template with other parts, in one of the places where templates are."""
        self.copy(chance, self.chats)
        parts = re.split(r"(\{[{%].*?[%}]\})", pick(chance, TEMPLATES.values()))
        for _ in range(int(chance.choice([0, 1, 1, 2, 4]))):
            place = int(chance.integers(len(parts)))
            new = [[], parts[place : place + 1] * 2, [pick(chance, PARTS)]][int(chance.integers(3))]
            parts[place : place + 1] = new
        template = "".join(parts)
        named = [{"name": "default", "template": template}, {"name": "tool_use", "template": "x"}]
        where = pick(chance, ["config", "config", "file", "file", "named", "other"])
        value = {"named": named, "other": pick(chance, VALUES)}.get(where, template)
        put(self.work / "tokenizer_config.json", ["chat_template"], value)
        if where == "file":
            mark = chance.choice(["", "", "", "\ufeff"])
            (self.work / "chat_template.jinja").write_text(mark + template, encoding="utf-8")
        return where, template

    def tokens(self, number: int, chance: Chance) -> object:
        """Special and added tokens, as files beside the tokenizer name them."""
        self.copy(chance, self.chats)
        about, did = self.work / "tokenizer_config.json", list[Any]()
        listed = cut_out(about)[1].get("added_tokens_decoder")
        if not listed:
            known = cut_out(self.work / "tokenizer.json")[1]["added_tokens"]
            listed = {str(token.pop("id")): token for token in known}
        if chance.random() < 0.5:
            for i in chance.choice(list(listed), 2):
                listed[str(i)][pick(chance, FLAGS)] = bool(chance.integers(2))
            listed[str(max(map(int, listed)) + 1)] = self.token(chance, True)
            put(about, ["added_tokens_decoder"], listed)
            did.append(listed)
        for _ in range(int(chance.integers(1, 5))):
            names = ("bos_token", "eos_token", "pad_token", "unk_token", "image_token")
            lists = ("additional_special_tokens", "extra_special_tokens")
            flags = ("add_bos_token", "add_eos_token", "legacy", "add_prefix_space")
            key = pick(chance, names + lists + flags)
            value = self.token(chance)
            if key in lists:
                value = [self.token(chance) for _ in range(int(chance.integers(3)))]
            if key in flags:
                value = pick(chance, [True, False, None])
            file = pick(chance, ("tokenizer_config.json", "special_tokens_map.json"))
            if chance.random() < 0.1:
                file, key, value = "added_tokens.json", pick(chance, NAMES), pick(chance, TOKEN_IDS)
            put(self.work / file, [key], value)
            did.append((file, key, value))
        return did

    def token(self, chance: Chance, whole: bool = False) -> str | dict | None:
        """A token as JSON has it."""
        flags = {flag: bool(chance.random() < 0.3) for flag in FLAGS}
        found = dict(content=pick(chance, NAMES), **flags)
        return found if whole or chance.random() < 0.2 else pick(chance, [found["content"]] * 9 + [None])

    def settings(self, number: int, chance: Chance) -> object:
        """Settings of the model and of its generation, as others write them."""
        self.copy(chance, self.plain[:2])
        did = []
        for _ in range(int(chance.integers(1, 4))):
            file = pick(chance, SETTINGS)
            key = pick(chance, SETTINGS[file])
            value = pick(chance, SETTINGS[file][key])
            put(self.work / file, [key], value)
            did.append((file, key, value))
        return did

    def marks(self, number: int, chance: Chance) -> object:
        """A file of text in another encoding, or with something around its text."""
        self.copy(chance, self.sources[:-1])
        (self.work / "chat_template.jinja").write_text(TEMPLATES["ChatML"])
        texts = [f for f in files_of([self.work]) if f.suffix in (".json", ".jinja")]
        file = pick(chance, texts)
        text = file.read_bytes().decode()
        ways = {
            "mark": b"\xef\xbb\xbf" + text.encode(),
            "two marks": b"\xef\xbb\xbf" * 2 + text.encode(),
            "UTF-16": text.encode("utf-16"),
            "Latin-1": "é".encode("latin-1") + text.encode(),
            "lines": text.replace("\n", "\r\n").encode() + b"\r\n\r\n",
            "ends": b" \n\t" + text.encode() + b" \n",
            "zeros": text.encode() + b"\0" * 9,
            "more": text.encode() + b"}",
            "surrogate": text.replace('"', '"\\ud800', 1).encode(),
            "escapes": json.dumps(json.loads(text)).encode() if file.suffix == ".json" else b"\x1b[1m",
        }
        way = pick(chance, ways)
        file.write_bytes(ways[way])
        return file.name, way

    def folders(self, number: int, chance: Chance) -> object:
        """Files that are missing, stray, half written, or stand-ins for others."""
        self.copy(chance, self.sources[:-1])
        did = []
        for _ in range(int(chance.choice([1, 1, 1, 2, 3]))):
            file = pick(chance, files_of([self.work]))
            content = file.read_bytes() if file.is_file() else b""
            lfs = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
            what = pick(chance, "gone half lfs html link loop folder pipe stray other odd".split())
            did.append((file.name, what))
            if not file.is_file():
                continue
            if what in ("gone", "link", "loop", "folder", "pipe"):
                file.rename(self.work / f"{file.name}.old")
            if what == "half":
                file.write_bytes(content[: int(chance.integers(len(content) + 1))])
            elif what in ("lfs", "html"):
                file.write_bytes(lfs if what == "lfs" else b"<!DOCTYPE html><html></html>\n")
            elif what in ("link", "loop"):
                file.symlink_to(file.name + ".old" if what == "link" else file.name)
            elif what == "folder":
                file.mkdir()
            elif what == "pipe":
                os.mkfifo(file)
            elif what == "odd":  # only who is not root is kept out
                file.chmod(pick(chance, (0, 0o200, 0o444)))
            elif what in ("stray", "other"):
                names = "README.md pytorch_model.bin .0123456789abcdef.tmp adapter_model.safetensors "
                names += "model-00001-of-00002.safetensors params.json consolidated.00.safetensors "
                names += "model.safetensors.index.json tokenizer.model tokenizer.json .git/config "
                names += "special_tokens_map.json added_tokens.json chat_template.jinja vocab.json"
                stray = self.work / pick(chance, names.split())
                stray.parent.mkdir(exist_ok=True)
                with suppress(OSError):
                    stray.write_bytes(pick(chance, [b"", b"{}", b"a", lfs, content]))
                did[-1] = (stray.name, what)
        return did

    def data(self, number: int, chance: Chance) -> object:
        """Text and rows, in files and folders as people have them; some of them damaged."""
        corpus = self.work / "corpus"
        (corpus / ".git").mkdir(parents=True)
        (corpus / ".git" / "config").write_text("not this")
        texts = ["a", "é漢😀\n", " two\r\nlines ", "", "\u2028x", "z" * 9000]
        say = lambda: pick(chance, texts)
        made: list[dict] = []
        did = []
        for n in range(int(chance.integers(1, 4))):
            rows = []
            for _ in range(int(chance.integers(1, 4))):
                messages = [dict(role=r, content=say()) for r in ("user", "assistant")]
                row = [{"text": say()}, dict(prompt=say(), completion=say()), {"messages": messages}]
                rows.append(pick(chance, row) | pick(chance, [{}, {"id": 1}]))
            suffix = pick(chance, ".jsonl .JSONL .ndjson .json .Json .txt .py".split())
            lines = [json.dumps(row, ensure_ascii=bool(chance.integers(2))) for row in rows]
            ends, text = pick(chance, ["\n", "\r\n", "\n\n", "\n \n"]), ""
            if suffix in (".txt", ".py"):
                text = say()
                rows = [{"text": text.replace("\r\n", "\n")}]
            elif suffix.lower() == ".json" and chance.random() < 0.5:
                text = json.dumps(rows, indent=pick(chance, [None, 2]))
            else:
                text = ends.join(lines) + ends * int(chance.integers(2))
            file = corpus / f"{n}{suffix}"
            file.write_bytes((pick(chance, ["", "\ufeff"]) + text).encode())
            made += rows
            did.append((file.name, ends))
        if chance.random() < 0.4:
            flip(file, chance)
            did.append("flipped")
            made = None
        (self.work / "made.json").write_text(json.dumps(made))
        return did


# --------------------------------------
# What is read

IDS = torch.tensor([[1, 2, 3, 70, 9, 258, 1]])
TEXTS = ("the fox", " <s>the</s> fox<|im_end|> <think>\n[PAD]a<new>", "", "漢é\n\n  x")
KNOWN: dict[str, str] = {}


@contextmanager
def in_time(seconds: float) -> Iterator[None]:
    """TimeoutError for what takes longer."""

    def stop(*_: object) -> None:
        raise TimeoutError

    signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


class Refused(str):
    """One clear line, said by this code."""


def read(call: Callable, expected: tuple = (ValueError,)) -> Any:
    """What a call gives, or Refused. What is neither is raised."""
    try:
        return call()
    except expected as error:
        text = str(error)
        assert text.isprintable() and 10 < len(text) < 600, f"not one clear line: {error!r:.600}"
        return Refused(text)


def train(path: Path) -> None:
    """Goes on with a stopped run."""
    going_on, save = training(path)
    going_on.train(save)


def corpus(path: Path) -> None:
    """Reads data; the documents must be what was written."""
    made = json.loads((path / "made.json").read_text())
    found = list(read_corpus([str(path / "corpus")]))
    if made is not None:
        wanted = [
            (row.get("prompt", ""), row.get("text", row.get("completion", "")), row.get("messages"))
            for row in made
        ]
        said = [(d.prompt, d.text, list(d.messages) or None) for d in found]
        assert said == wanted, f"{said} is not {wanted}"


def whole(path: Path) -> None:
    """Decodes a few tokens, as the command does."""
    model, tokenizer = load(path, torch.float32, "cpu")
    settings = default_settings(path, model.config, tokenizer) | dict(max_new_tokens=4)
    ids = tokenizer.encode("the fox")
    for r in generate(model, ids, **settings):
        assert r.logits.shape == (len(r.emitted), model.config.vocab_size)
        tokenizer.decode(ids + r.emitted)


@torch.no_grad()
def ours_of(path: Path, messages: list) -> dict:
    """By aspect, what is read here."""
    model = read(lambda: load_checkpoint(path, torch.float32))
    tokenizer = read(lambda: Tokenizer(path))
    found = dict(logits=model, ids=tokenizer, chat=tokenizer)
    if not isinstance(model, Refused):
        found["logits"] = read(lambda: model(IDS[:, : 7 if model.config.vocab_size > 258 else 1]))
    if not isinstance(tokenizer, Refused):
        found["ids"] = [tokenizer.file.parse(text) for text in TEXTS]
        found["before"] = tokenizer.encode("")
        chat = lambda: Chat(path, tokenizer).ids(messages, add_generation_prompt=True)
        found["chat"] = read(chat)
        if not isinstance(model, Refused):
            found["eos"] = set(default_settings(path, model.config, tokenizer)["eos"])
    return found


@torch.no_grad()
def theirs_of(path: Path, messages: list) -> dict:
    """By aspect, what transformers reads; without what it refuses."""
    found: dict = {}
    try:
        transformers.AutoConfig.from_pretrained(path)
    except Exception:
        return found
    with suppress(Exception), in_time(5):
        how = dict(dtype=torch.float32, output_loading_info=True)
        model, about = transformers.AutoModelForCausalLM.from_pretrained(path, **how)
        if not about["missing_keys"] and not about["mismatched_keys"]:
            found["logits"] = model(IDS[:, : 7 if model.config.vocab_size > 258 else 1]).logits
            eos = model.generation_config.eos_token_id
            eos = eos if isinstance(eos, list) else [eos]
            found["eos"] = {t for t in eos if type(t) in (int, float)} or None
    with suppress(BaseException), in_time(5):
        fast = (path / "tokenizer.json").is_file()
        if not fast and not (path / "tokenizer.model").is_file():
            return found
        kind = "PreTrainedTokenizerFast" if fast else "LlamaTokenizer"
        tokenizer = getattr(transformers, kind).from_pretrained(path)
        found["ids"] = [tokenizer.encode(text, add_special_tokens=False) for text in TEXTS]
        if fast:
            found["before"] = tokenizer.encode("")
        how = dict(return_dict=False, add_generation_prompt=True, sanitize_control_tokens=True)
        found["chat"] = tokenizer.apply_chat_template(messages, **how)
    return found


def differences(path: Path, messages: list) -> dict[str, str]:
    """By aspect, how this code and transformers differ."""
    ours, found = ours_of(path, messages), {}
    if transformers is None or not (path / "config.json").exists():
        return {}
    for aspect, wanted in theirs_of(path, messages).items():
        said = ours.get(aspect)
        if wanted is None or said is None:
            continue
        if isinstance(said, Refused):
            found[aspect] = f"refused: {said}"
        elif aspect == "logits":
            if said.shape != wanted.shape or not torch.allclose(said, wanted, 1e-3, 1e-4, True):
                found[aspect] = f"logits {said.flatten()[:3]} are not {wanted.flatten()[:3]}"
        elif aspect == "before":
            if wanted[: len(said)] != said:
                found[aspect] = f"before: {said} is not {wanted}"
        elif said != wanted:
            found[aspect] = f"{aspect}: {said} is not {wanted}"
    return found


def main() -> None:
    options = argparse.ArgumentParser()
    options.add_argument("--first", type=int, default=0)
    options.add_argument("--cases", type=int, default=4000)
    args = options.parse_args()
    torch.set_num_threads(1)
    outcomes: collections.Counter = collections.Counter()
    with tempfile.TemporaryDirectory() as base, redirect_stderr(io.StringIO()):
        maker = Maker(Path(base))
        kinds = [Maker.damaged, Maker.templates, Maker.tokens, Maker.damaged, Maker.spoiled]
        kinds += [Maker.settings, Maker.damaged, Maker.marks, Maker.folders, Maker.data]
        for source in [*maker.plain, *maker.chats]:
            d = differences(source, CONVERSATIONS["a message"])
            print(source.name, theirs_of(source, CONVERSATIONS["a message"]).keys(), d)
            whole(source)
        statm = Path("/proc/self/statm")
        if statm.exists():
            used = int(statm.read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (used + (512 << 20), resource.RLIM_INFINITY))
        for number in range(args.first, args.first + args.cases):
            chance = np.random.default_rng(number)
            make = kinds[number % len(kinds)]
            did = make(maker, number // 10 * 3 + [0, 0, 0, 1, 1, 1, 2, 2, 2, 2][number % 10], chance)
            faulthandler.dump_traceback_later(60, exit=True, file=sys.__stderr__)  # of what never ends
            started = time.process_time()
            try:
                with redirect_stderr(io.StringIO()):
                    if (maker.work / "data.json").exists():
                        outcome, differ = read(lambda: train(maker.work), (ValueError, OSError)), {}
                    elif (maker.work / "corpus").exists():
                        outcome, differ = read(lambda: corpus(maker.work)), {}
                    else:
                        outcome = read(lambda: whole(maker.work))
                        seconds = time.process_time() - started
                        assert seconds < 5, f"took {seconds:.1f} seconds"
                        messages = CONVERSATIONS[pick(chance, CONVERSATIONS)]
                        differ = differences(maker.work, messages)
                outcome = "refused" if isinstance(outcome, Refused) else "read"
                for aspect, how in differ.items():
                    print(f"case {number} {make.__name__} {did!r:.300}: {aspect}: {how[:400]}", flush=True)
                    outcomes[make.__name__, "differs " + aspect] += 1
            except BaseException as error:
                outcome = "failed"
                print(f"case {number}, {make.__name__} {did!r:.180}: FAILED {error!r:.400}", flush=True)
                if isinstance(error, KeyboardInterrupt):
                    raise
            finally:
                faulthandler.cancel_dump_traceback_later()
            outcomes[make.__name__, outcome] += 1
            if os.environ.get("KEEP"):
                shutil.copytree(maker.work, os.environ["KEEP"], symlinks=True)
            shutil.rmtree(maker.work)
    print(outcomes)
    raise SystemExit(outcomes["failed"] > 0)


if __name__ == "__main__":
    main()
