"""Valid directories for the fuzzer, and what damages them."""

import json
import math
import os
import random
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import islice, product
from pathlib import Path
from typing import Any

import numpy as np
from chat_table import ADDED, PLAIN, SPECIAL, TEMPLATES
from chat_table import KINDS as TOKENIZERS
from helpers import config_option, tiny_config, tiny_model
from test_loading import meta_config, split_by_index, write_meta
from test_tokenizer import ours

from model import save_checkpoint
from support.runs import RunDirectory
from support.train_command import parser, prepare

# --------------------------------------
# Valid directories

ADVICE = {"eos_token_id": [2, 3], "assistant_early_exit": 1, "num_assistant_tokens": 4}
ADVICE["assistant_confidence_threshold"] = 0.1


def checkpoints(base: Path) -> list[Path]:
    """For each kind of tokenizer one, with a chat template: the first in shards; and Meta's."""
    scaled = dict(rope_type="llama3", rope_factor=8.0, rope_original_len=64)
    model = tiny_model(tiny_config(vocab_size=420, n_layers=2, bos=1, eos=(2,), **scaled))
    paths = [base / str(n) for n in range(len(TOKENIZERS))]
    for path, make, template in zip(paths, TOKENIZERS.values(), TEMPLATES.values()):
        save_checkpoint(model, path)
        make(path)
        put(path / "tokenizer_config.json", ["chat_template"], template)
    (paths[1] / "generation_config.json").write_text(json.dumps(ADVICE))
    file = paths[0] / "config.json"
    found = json.loads(file.read_text()) | dict(attention_bias=False, quantization_config=None)
    found["rope_parameters"] = found.pop("rope_scaling") | dict(rope_theta=found.pop("rope_theta"))
    file.write_text(json.dumps(found))
    split_by_index(paths[0])
    put(paths[0] / "model.safetensors.index.json", ["metadata"], {})
    optional = dict(rope_theta=5e5, use_scaled_rope=True, ffn_dim_multiplier=1.0, moe=None)
    write_meta(tiny_model(replace(meta_config(), vocab_size=300)), base / "meta", 2, 1, **optional)
    ours(base / "meta")
    return [*paths, base / "meta"]


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

Chance = np.random.Generator
NESTED: list = []
for _ in range(200):
    NESTED = [NESTED]
VALUES = [None, True, "", "a%s", [], {}, -1, 0, 1e308, 5e-324, 10**400, 2**63, NESTED, "x" * 10**6]
VALUES += [math.nan, math.inf, 1, 2**31]  # Python reads and writes the first two, too


def pick(chance: Chance, things) -> Any:
    """One of several things."""
    things = list(things)
    return things[int(chance.integers(len(things)))]


def places(value) -> Iterator[list]:
    """The ways to every value in a JSON value; in a long list or object, to some."""
    if isinstance(value, str):  # JSON in a string
        value = json.loads(value)
    items = value.items() if isinstance(value, dict) else enumerate(value)
    few = len(value) > (30 if "model_type" in value else 8)
    for key, inner in islice(items, 3 if few else None):
        yield [key]
        if isinstance(inner, (dict, list)) or str(inner).startswith('{"'):
            yield from ([key, *rest] for rest in places(inner))


def changed(value, place: list, new):
    """A JSON value with a new one in a place."""
    if not place:
        return new
    if isinstance(value, str):
        return json.dumps(changed(json.loads(value), place, new))
    key, *rest = place
    value[key] = changed(value[key], rest, new) if rest else new
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
    """Changes bits, digits and lengths; mostly at the start, where headers are."""
    content = bytearray(file.read_bytes())
    for _ in range(pick(chance, [1, 1, 2, 8])):
        size = min(len(content), pick(chance, [1500, 1500, 1 << 30]))
        place, length = pick(chance, range(size + 1)), pick(chance, range(1, 9))
        part = content[place : place + length]
        digits = re.sub(rb"\d", lambda _: b"%c" % pick(chance, b"0123456789-e."), part)
        flipped = bytes(byte ^ 1 << pick(chance, range(8)) for byte in part[:1]) + part[1:]
        content[place : place + length] = pick(chance, [flipped, flipped, digits, b"", part * 2])
        if chance.random() < 0.1:
            del content[place:]
    file.write_bytes(content)


# --------------------------------------
# Cases

HEADERS = ("model.safetensors", "state.safetensors")  # the files whose headers are gone through
UNREAD = ("config.json", "model.safetensors", "generation_config.json")  # by a run that goes on
KINDS = "damaged templates tokens damaged folders settings damaged spoiled folders".split()
FLAGS = ("special", "lstrip", "rstrip", "normalized", "single_word")
NAMES = [*SPECIAL, *ADDED, *PLAIN, "[PAD]", "<new>", "fox", " ", "", None]
IDS = [None, 0, 1, 2, 2.0, 299, 300, 419, 420, -1, [], [2], [2, 3], [3, 2, 500], "2", True]
ROPES = [None, {}, {"type": "linear", "factor": 2}, {"rope_type": "dynamic", "factor": 2.0}]
ROPES += [{"rope_type": "default"}, {"factor": 2.0}, {"rope_type": "default", "rope_theta": 5e5}]
NUMBERS = [None, 0, 0.4, 1, 1e-5, 2, 4.0, 8, 64.0, 10000, 500000.0, "1"]
TOKENS = {  # keys of tokenizer_config.json and special_tokens_map.json: their values
    "bos_token eos_token pad_token unk_token a_token": NAMES,
    "additional_special_tokens extra_special_tokens": [None, [], ["<new>"], ["<think>", "[PAD]"]],
    "add_bos_token add_eos_token legacy add_prefix_space": [True, False, None],
}
SETTINGS = {  # of config.json and generation_config.json
    "eos_token_id bos_token_id pad_token_id": IDS,
    "head_dim num_key_value_heads max_position_embeddings": NUMBERS,
    "rms_norm_eps rope_theta": [1e-5, 1, 1.0, 10000, "1", None],
    "assistant_early_exit num_assistant_tokens assistant_confidence_threshold max_length": NUMBERS,
    "attention_bias mlp_bias tie_word_embeddings use_cache": [True, False, None],
    "rope_scaling rope_parameters": ROPES,
    "hidden_act dtype torch_dtype model_type": ["silu", "swish", "gelu", "bfloat16", "mistral"],
    "architectures quantization_config": [[], {}, ["LlamaModel"], {"quant_method": "fp8"}, None],
}
PARTS = """{{ bos_token }} {{ eos_token }} {{ pad_token }} {{ nobody }} {% generation %} é漢😀
{% endgeneration %} {%- endif %} {% endfor %} {% break %} {{ messages|tojson(indent=2) }} {} {# {%
{{ messages[9].content }} {% if tools %} {{ raise_exception('no') }} {{ strftime_now('%Y') }} <s>
{{ ''.__class__.__mro__ }} {{ range(10**9)|list }} {% for m in messages %} {{ m.content|upper }}
{{ m['content'].split() }} {% set x = namespace(n=0) %} {% set x.n = 1 %} {{ x }} {{ 1/0 }} </s>
{{ messages + 1 }} <|im_end|> <think> {{ messages[0]|tojson }} {{ documents is none }}"""
STRAY = """README.md pytorch_model.bin .0123456789abcdef.tmp adapter_model.safetensors params.json
model-00001-of-00002.safetensors consolidated.00.safetensors model.safetensors.index.json vocab.json
tokenizer.model tokenizer.json special_tokens_map.json added_tokens.json chat_template.jinja"""
CONTENTS: dict[str, Callable[[bytes], bytes]] = {  # that a file may have in place of its own
    "Git LFS": lambda _: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n",
    "HTML": lambda _: b"<!DOCTYPE html>\n<html></html>",
    "empty": lambda _: b"",
    "half": lambda content: content[: len(content) // 2],
    "a mark": lambda content: b"\xef\xbb\xbf" + content,
    "UTF-16": lambda content: content.decode(errors="replace").encode("utf-16"),
    "lines": lambda content: b"\r\n" + content.replace(b"\n", b"\r\n") + b"\r\n \r\n",
    "a surrogate": lambda content: content.replace(b'"', b'"\\ud800', 1),
}
MOVES = [*CONTENTS, *"gone gone shut folder pipe link loop stray stray stray".split()]


class Maker:
    """Makes the directory of a case, `work`, from valid ones under `base`.

    A method for each kind of case, which says what it did.
    """

    def __init__(self, base: Path):
        self.work, self.checkpoints = base / "a case", checkpoints(base)
        self.sources = [*self.checkpoints, stopped_run(base / "run")]
        self.plan: list[tuple] = []  # every wrong value and missing file
        for file in self.files(*self.sources[:2], *self.sources[-3:]):
            self.plan.append((file, None, None))
            if file.suffix in (".json", ".jsonl") or file.name in HEADERS:
                self.plan += product([file], places(cut_out(file)[1]), VALUES)
        random.Random(0).shuffle(self.plan)

    def make(self, number: int, chance: Chance) -> str:
        """Makes a case; its kind, and what was done."""
        turn, place = divmod(number, len(KINDS))
        kind = KINDS[place]
        self.turn = turn * KINDS.count(kind) + KINDS[:place].count(kind)
        return f"{kind} {getattr(self, kind)(chance)!r:.900}"

    def files(self, *folders: Path) -> list[Path]:
        """The files that are read of these directories."""
        files = [f for folder in folders for f in sorted(folder.iterdir()) if f.is_file()]
        return [f for f in files if f.parent.name != "run" or f.name not in UNREAD]

    def copy(self, chance: Chance, sources: list[Path]) -> None:
        shutil.copytree(pick(chance, sources), self.work)

    def damaged(self, _: Chance) -> object:
        """A wrong or missing value or file: the next of the plan."""
        source, what, value = self.plan[self.turn % len(self.plan)]
        shutil.copytree(source.parent, self.work)
        file = self.work / source.name
        put(file, what, value) if what else file.unlink()
        return source.parent.name, file.name, what, value

    def spoiled(self, chance: Chance) -> object:
        """Bytes by chance."""
        source = pick(chance, self.files(*self.sources))
        shutil.copytree(source.parent, self.work)
        flip(self.work / source.name, chance)
        return source.parent.name, source.name

    def templates(self, chance: Chance) -> object:
        """A chat template with other parts, in one of the places where templates are."""
        self.copy(chance, self.checkpoints[:-1])
        part = r"(\{[{%].*?[%}]\})"
        parts = re.split(part, pick(chance, TEMPLATES.values()))
        for _ in range(pick(chance, [0, 1, 1, 2, 4])):
            place, new = pick(chance, range(len(parts))), pick(chance, re.split(part, PARTS))
            parts[place : place + 1] = pick(chance, [[], parts[place : place + 1] * 2, [new]])
        text = "".join(parts)
        value = pick(chance, [text, text, [{"name": "default", "template": text}], *VALUES[:4]])
        put(self.work / "tokenizer_config.json", ["chat_template"], value)
        if file := pick(chance, [True, False]):
            text = pick(chance, ["", "", "\ufeff"]) + text
            (self.work / "chat_template.jinja").write_text(text, encoding="utf-8")
        return file, type(value), text

    def tokens(self, chance: Chance) -> object:
        """Special and added tokens, as the files beside a tokenizer name them."""
        self.copy(chance, self.checkpoints[:-1])
        about = self.work / "tokenizer_config.json"
        if chance.random() < 0.5:
            listed = cut_out(about)[1].get("added_tokens_decoder")
            if not listed:
                known = cut_out(self.work / "tokenizer.json")[1]["added_tokens"]
                listed = {str(token.pop("id")): token for token in known}
            listed[str(max(map(int, listed)) + 1)] = {"content": pick(chance, NAMES[:-1])}
            for i in chance.choice(list(listed), 2):
                listed[str(i)][pick(chance, FLAGS)] = pick(chance, [True, False])
            put(about, ["added_tokens_decoder"], listed)
        if stray := chance.random() < 0.1:
            put(self.work / "added_tokens.json", [pick(chance, NAMES[:-1])], pick(chance, IDS))
        return stray, self.keys(chance, TOKENS, [about.name, "special_tokens_map.json"])

    def settings(self, chance: Chance) -> object:
        """Settings of the model and of its generation, as others write them."""
        self.copy(chance, self.checkpoints[:-1])
        return self.keys(chance, SETTINGS, ["config.json", "config.json", "generation_config.json"])

    def keys(self, chance: Chance, table: dict, files: list[str]) -> list[tuple]:
        did = []
        for _ in range(pick(chance, [1, 1, 2, 3])):
            names, values = pick(chance, table.items())
            did.append((pick(chance, files), pick(chance, names.split()), pick(chance, values)))
            put(self.work / did[-1][0], [did[-1][1]], did[-1][2])
        return did

    def folders(self, chance: Chance) -> object:
        """Files that are missing, stray, half written, in another encoding, or stand-ins."""
        self.copy(chance, self.checkpoints)
        did = []
        for _ in range(pick(chance, [1, 1, 1, 2, 3])):
            file, what = pick(chance, self.files(self.work)), pick(chance, MOVES)
            content, old = file.read_bytes(), file.with_name(f"{file.name}.{len(did)}")
            if what == "stray":
                file = self.work / pick(chance, STRAY.split())
                what = pick(chance, CONTENTS) if not os.path.lexists(file) else "gone"
            did.append((file.name, what))
            if what in CONTENTS:
                file.write_bytes(CONTENTS[what](content))
                continue
            file.rename(old)
            if what == "folder":
                file.mkdir()
            elif what == "pipe":
                os.mkfifo(file)
            elif what != "gone":
                file.symlink_to(file if what == "loop" else old)
                old.chmod(0 if what == "shut" else 0o444)  # keeps out who is not root
        return did
