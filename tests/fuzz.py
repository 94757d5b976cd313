"""Fuzzing the loader: bytes flipped in, cut from and put into the files of valid checkpoint directories.

    python tests/fuzz.py            4,000 cases; exit code 1 on anything but a model or one clear line

Every case loads the directory, its tokenizer and its generation settings, and runs a token through what loaded. It
must end in a model or a ValueError of one line, within five seconds and 512 MB above the start.
"""

import collections
import json
import resource
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import numpy as np
import torch
from helpers import tiny_config, tiny_model
from safetensors.torch import load_file, save_file
from test_loading import meta_config, write_meta

import data
from decode import generation_defaults
from model import load_checkpoint, save_checkpoint
from tokenizer import Tokenizer


def directories(base: Path) -> list[Path]:
    """Three valid checkpoints: one file, shards with an index, Meta's layout in two shards."""
    one, shards, meta = base / "one", base / "shards", base / "meta"
    scaled = dict(rope_type="llama3", rope_factor=8.0, rope_original_len=64)
    for path in (one, shards):
        save_checkpoint(tiny_model(tiny_config(vocab_size=300, n_layers=2, bos=1, eos=(2,), **scaled)), path)
    weights = load_file(shards / "model.safetensors")
    parts = {"a.safetensors": sorted(weights)[::2], "b.safetensors": sorted(weights)[1::2]}
    for file, names in parts.items():
        save_file({name: weights[name] for name in names}, shards / file)
    (shards / "model.safetensors").unlink()
    (shards / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {n: f for f, names in parts.items() for n in names}}))
    write_meta(tiny_model(meta_config()), meta, 2, 1)
    data.train_tokenizer(["the quick brown fox jumps over the lazy dog\n" * 20], 290, one / "tokenizer.model")
    for path in (shards, meta):
        shutil.copy(one / "tokenizer.model", path)
    for path in (one, shards, meta):
        (path / "generation_config.json").write_text('{"eos_token_id": [2, 3], "assistant_early_exit": 1, "num_assistant_tokens": 4}')
    return [one, shards, meta]


def damage(file: Path, random: np.random.Generator) -> None:
    """Flips a few bits, cuts bytes out, doubles some, or writes other digits; mostly near the start, where headers are."""
    content = bytearray(file.read_bytes())
    for _ in range(int(random.choice([1, 1, 2, 8]))):
        if not content:
            break
        place = int(random.integers(len(content) if random.random() < 0.3 else min(len(content), 1500)))
        kind = random.choice(["flip", "flip", "byte", "cut", "double", "digit", "truncate"])
        if kind == "flip":
            content[place] ^= 1 << int(random.integers(8))
        elif kind == "byte":
            content[place] = int(random.integers(256))
        elif kind == "cut":
            del content[place : place + int(random.integers(1, 9))]
        elif kind == "double":
            content[place:place] = content[place : place + int(random.integers(1, 9))]
        elif kind == "digit":
            digits = [i for i in range(max(0, place - 40), min(len(content), place + 40)) if chr(content[i]).isdigit()]
            if digits:
                content[digits[int(random.integers(len(digits)))]] = ord(random.choice(list("0123456789-e.")))
        else:
            del content[int(random.integers(len(content))) :]
    file.write_bytes(content)


def attempt(path: Path) -> str:
    """Outcome of one directory; anything but these two kinds of end is raised."""
    try:
        tokenizer, model = Tokenizer(path), load_checkpoint(path)
        generation_defaults(path)
        tokenizer.decode(tokenizer.encode("the fox"))
    except ValueError as error:
        assert "\n" not in str(error) and 5 < len(str(error)) < 500, f"not one clear line: {error!r}"
        return "refused"
    with torch.inference_mode():
        assert model(torch.tensor([[0]])).shape[-1] == model.config.vocab_size
    return "loaded"


def main() -> None:
    cases = int(sys.argv[1]) if len(sys.argv) > 1 else 4000
    random, outcomes, failures = np.random.default_rng(0), collections.Counter(), 0
    with tempfile.TemporaryDirectory() as base:
        sources = directories(Path(base))
        assert [attempt(source) for source in sources] == ["loaded"] * 3
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() if Path("/proc/self/statm").exists() else 0
        if used:
            resource.setrlimit(resource.RLIMIT_AS, (used + (512 << 20), resource.RLIM_INFINITY))

        def late(*_):
            raise TimeoutError("took more than five seconds")

        signal.signal(signal.SIGALRM, late)
        for case in range(cases):
            work = Path(base) / "case"
            shutil.copytree(sources[case % 3], work)
            files = sorted(work.iterdir())
            file = files[int(random.integers(len(files)))]
            damage(file, random)
            signal.alarm(5)
            try:
                outcomes[attempt(work)] += 1
            except BaseException as error:
                failures += 1
                print(f"\ncase {case}, {sources[case % 3].name}/{file.name}: {type(error).__name__}: {str(error)[:200]}")
                if isinstance(error, KeyboardInterrupt):
                    raise
            finally:
                signal.alarm(0)
            shutil.rmtree(work)
            if case % 100 == 99:
                print(f"\r{case + 1}/{cases} cases: {dict(outcomes)}, {failures} failures", end="", file=sys.stderr, flush=True)
    print(f"\n{cases} cases on {time.strftime('%Y-%m-%d')}: {outcomes['refused']} refused in one line, {outcomes['loaded']} loaded, {failures} failures")
    print(f"{cases - failures} passed, {failures} failed")
    raise SystemExit(failures > 0)


if __name__ == "__main__":
    main()
