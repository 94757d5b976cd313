"""Fuzzing what is read: wrong values in JSON, and damaged bytes, in valid directories.

    python tests/fuzz.py               5,000 cases; exit code 1 if one ends as it must not
    python tests/fuzz.py 1200 1300     cases 1200 to 1299 alone

A case damages one file of a checkpoint, loads it and decodes a few tokens; or one of a stopped
training run, and goes on with that. It must end in what was asked for or in an error of one clear
line that a command shows, within five seconds of processor time and 512 MB above the start.
"""

import collections
import faulthandler
import io
import json
import math
import random
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import redirect_stderr
from dataclasses import replace
from itertools import islice, product
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import numpy as np
import torch
from helpers import config_option, tiny_config, tiny_model
from test_loading import meta_config, split_by_index, write_meta
from test_tokenizer import byte_level, ours

from decode import generate
from model import save_checkpoint
from support.console import default_settings, load
from support.runs import RunDirectory
from support.train_command import parser, prepare

CASES = 5000
HEADERS = ("model.safetensors", "state.safetensors")  # the files whose headers are gone through
UNREAD = ("config.json", "model.safetensors", "generation_config.json")  # by a run that goes on
NESTED: list = []
for _ in range(200):
    NESTED = [NESTED]
VALUES = [None, True, "", "a%s", [], {}, -1, 0, 1e308, 5e-324, 10**400, 2**63, NESTED, "x" * 10**6]
VALUES += [math.nan, math.inf]  # Python reads and writes these, too


def directories(base: Path) -> list[Path]:
    """Valid checkpoints: one file, shards with an index, Meta's layout in two shards."""
    one, shards, meta = base / "one", base / "shards", base / "meta"
    scaled = dict(rope_type="llama3", rope_factor=8.0, rope_original_len=64)
    config = tiny_config(vocab_size=300, n_layers=2, bos=1, eos=(2,), **scaled)
    for path in (one, shards):
        save_checkpoint(tiny_model(config), path)
    split_by_index(shards)
    file = shards / "config.json"
    found = json.loads(file.read_text()) | dict(attention_bias=False, quantization_config=None)
    found["rope_parameters"] = found.pop("rope_scaling") | dict(rope_theta=found.pop("rope_theta"))
    file.write_text(json.dumps(found))
    optional = dict(rope_theta=5e5, use_scaled_rope=True, ffn_dim_multiplier=1.0, moe=None)
    write_meta(tiny_model(replace(meta_config(), vocab_size=300)), meta, 2, 1, **optional)
    settings = dict(eos_token_id=[2, 3], assistant_early_exit=1, num_assistant_tokens=4)
    settings["assistant_confidence_threshold"] = 0.1
    (one / "generation_config.json").write_text(json.dumps(settings))
    for path, tokenizer in ((one, ours), (shards, byte_level), (meta, ours)):
        tokenizer(path)
    return [one, shards, meta]


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
        if isinstance(inner, (dict, list)) or str(inner).startswith("{"):
            yield from ([key, *rest] for rest in places(inner))


def changed(value, place: list, new):
    """A JSON value with a new one in a place."""
    if not place:
        return new
    if isinstance(value, str):
        return json.dumps(changed(json.loads(value), place, new))
    value[place[0]] = changed(value[place[0]], place[1:], new)
    return value


def cut_out(file: Path) -> tuple[bytes, dict, bytes]:
    """What stands before a file's JSON, the JSON, and what stands after it."""
    content, start = file.read_bytes(), 0
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


def spoil(file: Path, chance: np.random.Generator) -> None:
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


def confuse(file: Path, chance: np.random.Generator) -> None:
    """Puts wrong values, and sizes that are too large, in a few places of a file's JSON."""
    values = [*VALUES, *(2**n for n in range(32))]
    for _ in range(int(chance.integers(2, 5))):
        possible = list(places(cut_out(file)[1]))
        place = possible[int(chance.integers(len(possible)))]
        put(file, place, values[int(chance.integers(len(values)))])


def files_of(sources: list[Path]) -> list[Path]:
    """The files that are read of these directories."""
    files = [file for source in sources for file in sorted(source.iterdir())]
    return [f for f in files if f.parent.name != "run" or f.name not in UNREAD]


def planned(sources: list[Path]) -> list[tuple]:
    """Every case that leaves nothing to chance, in a fixed, mixed order: (file, what, value)."""
    cases: list[tuple] = []
    for file in files_of(sources):
        cases += [(file, "empty", None), (file, "directory", None)]
        if file.suffix in (".json", ".jsonl") or file.name in HEADERS:
            cases += product([file], places(cut_out(file)[1]), VALUES)
    random.Random(0).shuffle(cases)
    return cases


def damage(file: Path, what, value) -> None:
    """Does to a file what a planned case says."""
    if what == "empty":
        file.write_bytes(b"")
    elif what == "directory":
        file.unlink()
        file.mkdir()
    else:
        put(file, what, value)


# --------------------------------------
# Cases


def attempt(path: Path) -> str:
    """How a directory ends; anything but the two kinds of end is raised."""
    expected: tuple = (ValueError,)
    try:
        if (path / "data.json").exists():
            expected = (ValueError, OSError)
            with redirect_stderr(io.StringIO()):
                going_on, save = training(path)
                going_on.train(save)
            return "read"
        model, tokenizer = load(path, torch.float32, "cpu")
        settings = default_settings(path, model.config, tokenizer) | dict(max_new_tokens=4)
        ids = tokenizer.encode("the fox")
        for r in generate(model, ids, **settings):
            assert r.logits.shape == (len(r.emitted), model.config.vocab_size)
            tokenizer.decode(ids + r.emitted)
    except expected as error:
        text = str(error)
        assert text.isprintable() and 10 < len(text) < 600, f"not one clear line: {error!r:.600}"
        return "refused"
    return "read"


def main() -> None:
    first, last = map(int, sys.argv[1:]) if len(sys.argv) == 3 else (0, CASES)
    outcomes: collections.Counter = collections.Counter()
    with tempfile.TemporaryDirectory() as base:
        sources = directories(Path(base))
        assert [attempt(source) for source in sources] == ["read"] * len(sources)
        sources.append(stopped_run(Path(base) / "run"))
        statm = Path("/proc/self/statm")
        if statm.exists():
            used = int(statm.read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (used + (512 << 20), resource.RLIM_INFINITY))
        plan, files = planned(sources), files_of(sources)
        for number in range(first, last):
            chance = np.random.default_rng(number)
            file, *how = plan[number] if number < len(plan) else (chance.choice(files),)
            work = Path(base) / "case"
            shutil.copytree(file.parent, work)
            if how:
                damage(work / file.name, *how)
            elif file.suffix == ".json" and chance.random() < 0.5:
                confuse(work / file.name, chance)
            else:
                spoil(work / file.name, chance)
            faulthandler.dump_traceback_later(60, exit=True)  # of what never ends
            started = time.process_time()
            try:
                outcome = attempt(work)
                seconds = time.process_time() - started
                assert seconds < 5, f"took {seconds:.1f} seconds"
            except BaseException as error:
                outcome = "failed"
                name, reason = f"{file.parent.name}/{file.name}", f"{error!r:.200}"
                print(f"case {number}, {name} {how!r:.80}: {reason}", flush=True)
                if isinstance(error, KeyboardInterrupt):
                    raise
            finally:
                faulthandler.cancel_dump_traceback_later()
            outcomes[outcome] += 1
            shutil.rmtree(work)
    wrong = min(last, len(plan)) - min(first, len(plan))
    kinds = f"{wrong} wrong or missing values and files, {last - first - wrong} drawn by chance"
    ends = ", ".join(f"{outcomes[name]} {name}" for name in ("refused", "read", "failed"))
    print(f"cases {first} to {last - 1}: {kinds}: {ends}")
    raise SystemExit(outcomes["failed"] > 0)


if __name__ == "__main__":
    main()
