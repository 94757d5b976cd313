"""Every layout of a checkpoint gives the same model, and every bad file one clear line."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from conftest import ROOT
from helpers import tiny_config, tiny_model
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from model import Config, load_checkpoint, save_checkpoint
from support.checkpoint import (
    META_NAMES,
    CheckpointError,
    Stored,
    generation_config,
    parse_object,
    read_checkpoint,
    read_json,
    whole_file,
)

TO_META = {hf: meta for meta, hf in META_NAMES.items()}
PARAMS = dict(dim=32, n_layers=3, n_heads=8, n_kv_heads=4, multiple_of=8, norm_eps=1e-5)
MODEL, INDEX = "model.safetensors", "model.safetensors.index.json"


def meta_config(tied=False) -> Config:
    """The config that PARAMS describes, with the 64 tokens that write_meta's embedding has."""
    shape = dict(vocab_size=64, dim=32, hidden_dim=88, n_layers=3, n_heads=8, n_kv_heads=4)
    return Config(**shape, head_dim=4, max_len=4096, tied=tied)


def write_meta(model, path: Path, shards: int, embedding_dim: int, **changes) -> None:
    """Writes the model as Meta does: interleaved rotary pairs, shards by rows and by columns."""
    path.mkdir()
    (path / "params.json").write_text(json.dumps({**PARAMS, **changes}))
    files = [{"rope.freqs": torch.ones(2)} for _ in range(shards)]
    for name, p in model.named_parameters():
        weight, inner = p.detach(), name.removesuffix(".weight")
        layer = ""
        if inner.startswith("layers."):
            _, number, inner = inner.split(".", 2)
            layer = f"layers.{number}."
        if inner.endswith(("q_proj", "k_proj")):  # half-split to interleaved
            half = model.config.head_dim // 2
            pairs = weight.view(-1, 2, half, weight.shape[1])
            weight = pairs.transpose(1, 2).reshape(weight.shape)
        split = int(inner.endswith(("o_proj", "down_proj")))
        split = embedding_dim if inner == "embed_tokens" else split
        parts = [weight] * shards if weight.dim() == 1 else weight.chunk(shards, split)
        for file, part in zip(files, parts, strict=True):
            file[f"{layer}{TO_META[inner]}.weight"] = part.contiguous()
    for number, file in enumerate(files):
        save_file(file, path / f"consolidated.{number:02}.safetensors")


def split_by_index(path: Path) -> None:
    """Puts the weights of model.safetensors into two shards and an index."""
    weights = load_file(path / MODEL)
    shard_of = {name: f"{i % 2}.safetensors" for i, name in enumerate(sorted(weights))}
    for shard in set(shard_of.values()):
        save_file({n: w for n, w in weights.items() if shard_of[n] == shard}, path / shard)
    (path / INDEX).write_text(json.dumps({"weight_map": shard_of}))
    (path / MODEL).unlink()


def refusal(call, *arguments) -> str:
    """The message of the CheckpointError that the call raises, which must be one clear line."""
    with pytest.raises(CheckpointError) as refused:
        call(*arguments)
    message = str(refused.value)
    assert message.isprintable() and 10 < len(message) < 500
    return message


# --------------------------------------
# Layouts


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("shards, embedding_dim", [(1, 0), (4, 1), (4, 0), (2, 1)])
def test_metas_layout_is_bitwise_hugging_faces(tmp_path, shards, embedding_dim, tied):
    model = tiny_model(meta_config(tied=tied), dtype=torch.bfloat16)
    write_meta(model, tmp_path / "meta", shards, embedding_dim)
    save_checkpoint(model, tmp_path / "hf")
    ours, theirs = load_checkpoint(tmp_path / "meta"), load_checkpoint(tmp_path / "hf")
    assert ours.config == theirs.config == model.config
    tokens = torch.randint(64, (2, 30))
    assert torch.equal(ours(tokens), theirs(tokens)) and torch.equal(ours(tokens), model(tokens))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_shards_of_an_index_are_the_single_file(tmp_path, dtype):
    model = tiny_model(dtype=dtype)
    save_checkpoint(model, tmp_path)
    split_by_index(tmp_path)
    save_file({"model.rotary_emb.inv_freq": torch.ones(4)}, tmp_path / "unnamed.safetensors")
    _, tensors = read_checkpoint(tmp_path)
    wanted = dict(model.named_parameters())
    assert tensors.keys() == wanted.keys()
    for name, stored in tensors.items():
        read = stored.read()
        assert stored.dtype == read.dtype == dtype and stored.shape == read.shape
        assert torch.equal(read, wanted[name])
    assert load_checkpoint(tmp_path, torch.float32).dtype == torch.float32


def test_metas_parameters_give_the_published_shapes(tmp_path):
    llama2 = dict(n_layers=2, n_heads=32, dim=4096, multiple_of=256, norm_eps=1e-5)
    llama3 = llama2 | dict(n_kv_heads=8, rope_theta=5e5, ffn_dim_multiplier=1.3, multiple_of=1024)
    small = dict(dim=2048, multiple_of=256, ffn_dim_multiplier=1.5)
    published = {
        "Llama 2 7B": llama2,
        "Code Llama": llama2 | dict(rope_theta=1e6, n_kv_heads=None),
        "Llama 3 8B": llama3,
        "Llama 3.1 8B": llama3 | dict(use_scaled_rope=True),
        "Llama 3.2 1B": llama3 | small | dict(use_scaled_rope=True),
    }
    found = {}
    for name, params in published.items():
        path = tmp_path / name
        path.mkdir()
        (path / "params.json").write_text(json.dumps(params))
        weights = {"tok_embeddings.weight": torch.zeros(1, params["dim"])}
        save_file(weights, path / "consolidated.00.safetensors")
        c = Config(**read_checkpoint(path)[0])
        assert (c.dim, c.rope_theta, c.tied) == (params["dim"], params.get("rope_theta", 1e4), True)
        rope = (c.rope_type, c.rope_factor, c.rope_original_len) if c.rope_type == "llama3" else ()
        found[name] = (c.hidden_dim, c.n_kv_heads, c.max_len, *rope)
    assert found == {
        "Llama 2 7B": (11008, 32, 4096),
        "Code Llama": (11008, 32, 16384),
        "Llama 3 8B": (14336, 8, 8192),
        "Llama 3.1 8B": (14336, 8, 131072, "llama3", 8.0, 8192),
        "Llama 3.2 1B": (8192, 8, 131072, "llama3", 32.0, 8192),
    }


def test_a_config_json_makes_it_hugging_faces_layout(tmp_path):
    save_checkpoint(tiny_model(), tmp_path)
    (tmp_path / "params.json").write_text("{}")
    assert load_checkpoint(tmp_path).config == tiny_config()


# --------------------------------------
# Bad files


CONFIG, NORM, META = "config.json", "model.norm.weight", "params.json"
NAN, INFINITY = float("nan"), float("inf")


def text(file: str, content: bytes):
    """A fault: other content of a file."""
    return lambda d: (d / file).write_bytes(content)


def keys(file: str, **changes):
    """A fault: other keys of a JSON file; ... takes one out."""

    def change(d: Path) -> None:
        found = {**json.loads((d / file).read_text()), **changes}
        found = {key: value for key, value in found.items() if value is not ...}
        (d / file).write_text(json.dumps(found))

    return change


def norm(change, file: str = MODEL, name: str = NORM):
    """A fault: the final norm's weight, changed."""

    def change_file(d: Path) -> None:
        weights = load_file(d / file)
        save_file(weights | {name: change(weights[name])}, d / file)

    return change_file


def spoilt(*values: float):
    """A fault: numbers added to the final norm's first weights."""
    return norm(lambda w: w + w.new_tensor([*values, *(len(w) - len(values)) * [0.0]]))


def only(pattern: str, **weights):
    """A fault: these tensors instead of those in the files."""
    named = {name.replace("_", "."): weight for name, weight in weights.items()}
    return lambda d: [save_file(named, file) for file in d.glob(pattern)]


def more(file: str, other: str, **weights):
    """A fault: the tensors of another file in this one as well, and some more."""
    return lambda d: save_file(load_file(d / file) | load_file(d / other) | weights, d / file)


def renamed(pattern: str, suffix: str):
    return lambda d: [file.rename(file.with_suffix(suffix)) for file in d.glob(pattern)]


def without(file: str):
    return lambda d: (d / file).unlink()


def directory(file: str):
    return lambda d: ((d / file).unlink(), (d / file).mkdir())


def elsewhere(d: Path) -> None:
    """A fault: a shard in a folder of its own."""
    (d / "x").mkdir()
    (d / "0.safetensors").rename(d / "x" / "0.safetensors")
    keys(INDEX, weight_map={NORM: "x/0.safetensors"})(d)


BAD = {  # layout: fault: what does it, and what the line must say
    "one": {
        "no config": (without(CONFIG), CONFIG),
        "a key is missing": (keys(CONFIG, hidden_size=...), "hidden_size"),
        "no weights": (without(MODEL), "safetensors"),
        "pickles alone": (renamed(MODEL, ".bin"), r"pickles.*model\.bin"),
        "weights cut off": (lambda d: os.truncate(d / MODEL, 9000), MODEL),
        "a directory for a file": (directory(MODEL), MODEL),
        "8-bit floats": (norm(lambda w: w.to(torch.float8_e4m3fn)), f"{NORM}.*F8"),
        "another shape": (norm(lambda w: w[1:].clone()), "norm.weight is .*, the config says"),
        "NaN": (spoilt(NAN), f"{MODEL}.*{NORM}"),
        "opposite infinities": (spoilt(INFINITY, -INFINITY), f"{MODEL}.*{NORM}"),
        "one too many": (more(MODEL, MODEL, **{"x\n\x1b[2J": torch.ones(1)}), "unexpected.*x"),
        "one too few": (only(MODEL, model_norm_weight=torch.ones(24)), "lacks"),
    },
    "shards": {
        "weight_map is a list": (keys(INDEX, weight_map=["0.safetensors"]), "weight_map"),
        "a shard elsewhere": (elsewhere, "'x/0"),
        "the directory for a shard": (keys(INDEX, weight_map={NORM: ".."}), r"\.\."),
        "a shard with a NUL": (keys(INDEX, weight_map={NORM: "0\0.safetensors"}), "weight file"),
        "half a surrogate pair": (keys(INDEX, weight_map={NORM: "\ud800"}), "ud800"),
        "a missing shard": (without("1.safetensors"), r"1\.safetensors"),
        "a pickle for a shard": (text("1.safetensors", b"\x80\x04N."), r"1\.safetensors"),
        "a tensor twice": (more("0.safetensors", "1.safetensors"), "the shards do not hold"),
    },
    "meta": {
        "a missing shard": (without("consolidated.00.safetensors"), "the config says"),
        "only pickles": (renamed("consolidated.*", ".pth"), r"pickles.*00\.pth"),
        "no embedding": (only("consolidated.*", norm_weight=torch.ones(32)), "embed_tokens"),
        "an unknown tensor": (only("con*", model_norm_weight=torch.ones(32)), "unexpected"),
        "a shard of another model": (only("*1.saf*", norm_weight=torch.ones(32)), "do not hold"),
        "a shard of another width": (
            norm(lambda w: w[1:].clone(), "consolidated.01.safetensors", "norm.weight"),
            "the shards do not hold norm.weight",
        ),
        "quantised": (keys(META, quantization_args={"scheme": "int4"}), "quantised"),
        "a long multiplier": (keys(META, ffn_dim_multiplier="1" * 400), META),
        "no norm_eps": (keys(META, norm_eps=...), "norm_eps"),
    },
}


@pytest.mark.parametrize("layout, fault", [(layout, f) for layout in BAD for f in BAD[layout]])
def test_a_bad_checkpoint_is_refused_by_its_fault(tmp_path, layout, fault):
    path, (spoil, says) = tmp_path / "x", BAD[layout][fault]
    if layout == "meta":
        write_meta(tiny_model(meta_config()), path, 2, 1)
    else:
        save_checkpoint(tiny_model(), path)
    if layout == "shards":
        split_by_index(path)
    spoil(path)
    assert re.search(says, refusal(load_checkpoint, path))


def test_the_fuzzers_first_cases_end_as_they_must():
    """Of every kind; where transformers is installed, with the same results."""
    command = [sys.executable, str(ROOT / "tests" / "fuzz.py"), "--cases", "135"]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0 and " read\n" in run.stdout, run.stdout + run.stderr


@pytest.mark.parametrize("path", ["nothing", "file", "a\0b", "a" * 5000])
def test_what_is_no_directory_is_refused(tmp_path, path):
    (tmp_path / "file").write_text("{}")
    assert "directory" in refusal(read_checkpoint, f"{tmp_path}/{path}")


def test_a_file_that_shrinks_or_goes_away_is_refused(tmp_path):
    save_checkpoint(tiny_model(), tmp_path)
    _, tensors = read_checkpoint(tmp_path)
    os.truncate(tmp_path / MODEL, 1000)
    assert MODEL in refusal(tensors["norm.weight"].read)
    (tmp_path / MODEL).unlink()
    assert MODEL in refusal(tensors["norm.weight"].read)


@pytest.mark.parametrize("error", [RuntimeError("cannot allocate memory"), MemoryError()])
def test_running_out_of_memory_is_one_line(tmp_path, monkeypatch, error):
    save_checkpoint(tiny_model(), tmp_path)
    monkeypatch.setattr(torch.Tensor, "clone", Mock(side_effect=error))
    assert re.search(f"{MODEL}.*weight.*memory", refusal(load_checkpoint, tmp_path))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_large_finite_numbers_whose_sum_overflows_are_read(tmp_path, dtype):
    weight = torch.full((64, 64), torch.finfo(dtype).max, dtype=dtype)
    save_file({"w": weight}, tmp_path / MODEL)
    stored = Stored("w", (tmp_path / MODEL,), (64, 64), dtype)
    assert torch.equal(stored.read(), weight)


def test_a_tensor_that_was_read_does_not_follow_its_file(tmp_path):
    save_checkpoint(tiny_model(), tmp_path)
    weight = read_checkpoint(tmp_path)[1]["embed_tokens.weight"].read()
    with open(tmp_path / MODEL, "r+b") as file:
        file.write(bytes(os.path.getsize(tmp_path / MODEL)))
    assert weight.ne(0).any() and weight.data_ptr() % 64 == 0


# --------------------------------------
# JSON, generation_config.json


@given(st.text(st.sampled_from('{}[]":,0e-.\\u nul\ud800x'), max_size=40) | st.text(max_size=20))
def test_any_text_is_an_object_or_is_refused(text):
    try:
        assert isinstance(parse_object(text, "some.json"), dict)
    except CheckpointError as error:
        assert "some.json" in str(error)


@pytest.mark.parametrize("depth", [101, 990, 10**6])
def test_deep_nesting_and_long_numbers_are_refused(depth):
    for text in ('{"a":' * depth + "1" + "}" * depth, "[" * depth, '{"a": 1' + "0" * 10**5 + "}"):
        assert "some.json" in refusal(parse_object, text, "some.json")


def test_a_json_file_that_cannot_be_read_is_named(tmp_path):
    bad = {"empty.json": b"", "latin.json": b'"\xe9"', "utf16.json": "{}".encode("utf-16")}
    for name, content in bad.items():
        (tmp_path / name).write_bytes(content)
        assert name in refusal(read_json, tmp_path / name)
    (tmp_path / "folder.json").mkdir()
    os.mkfifo(tmp_path / "pipe.json")
    for name in ("folder.json", "pipe.json", "missing.json"):
        assert name in refusal(read_json, tmp_path / name)


USABLE = {
    "assistant_early_exit": [1, 7],
    "num_assistant_tokens": [1, 20],
    "assistant_confidence_threshold": [0, 0.4, 0.999],
    "eos_token_id": [0, [], [0, 128009]],
}
NEVER = [True, "1", -1, 1.5, {}, [[1.5]], [True], [-1], float("nan")]
UNUSABLE = {
    "assistant_early_exit": [0, [1]],
    "num_assistant_tokens": [0, [1]],
    "assistant_confidence_threshold": [1, 10**400, -0.1, [0.5]],
    "eos_token_id": [[0, "2"]],
}


def generation(path: Path, **keys) -> dict:
    (path / "generation_config.json").write_text(json.dumps({"temperature": "x", **keys}))
    return generation_config(path)


@pytest.mark.parametrize("key", USABLE)
def test_generation_settings_come_as_they_are_or_are_named(tmp_path, key, capfd):
    assert generation_config(tmp_path) == generation(tmp_path, **{key: None}) == {}
    for value in USABLE[key]:
        assert generation(tmp_path, **{key: value}) == {key: value}
    assert capfd.readouterr().err == ""
    for value in NEVER + UNUSABLE[key]:
        assert generation(tmp_path, **{key: value}) == {}
        said = capfd.readouterr().err
        assert f"generation_config.json: {key} " in said and said.count("\n") == 1


# --------------------------------------
# whole_file


def contents(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in path.iterdir()}


def test_a_whole_file_is_there_at_the_end_and_touches_no_other(tmp_path):
    others = {"X.new": b"a", "X.tmp": b"b", "X~": b"c", ".X": b"d"}
    for name, content in others.items():
        (tmp_path / name).write_bytes(content)
    for content in (b"first", b"second"):
        with whole_file(tmp_path / "X") as file:
            file.write(content)
            assert (tmp_path / "X").exists() == (content == b"second"), "not before the end"
        assert contents(tmp_path) == others | {"X": content}


@pytest.mark.parametrize("old", [{}, {"X": b"old"}])
def test_a_file_that_was_not_finished_leaves_no_trace(tmp_path, old):
    for name, content in old.items():
        (tmp_path / name).write_bytes(content)
    with pytest.raises(KeyboardInterrupt), whole_file(tmp_path / "X") as file:
        file.write(b"half")
        raise KeyboardInterrupt
    assert contents(tmp_path) == old


def test_a_file_keeps_its_link_and_its_permissions(tmp_path):
    (tmp_path / "usual").write_bytes(b"")
    (tmp_path / "file").write_bytes(b"old")
    (tmp_path / "file").chmod(0o640)
    (tmp_path / "link").symlink_to("file")
    (tmp_path / "dangling").symlink_to("new")
    for name in ("link", "dangling"):
        with whole_file(tmp_path / name) as file:
            save_file({"w": torch.ones(2)}, file.name)  # it puts a file of its own there
        assert (tmp_path / name).is_symlink() and load_file(tmp_path / name)["w"].sum() == 2
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o640
    assert (tmp_path / "new").stat().st_mode == (tmp_path / "usual").stat().st_mode


def test_a_path_that_cannot_be_a_file_is_refused_at_once(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "loop").symlink_to("loop")
    os.mkfifo(tmp_path / "pipe")
    before = sorted(tmp_path.iterdir())
    for name in ("folder", "loop", "pipe", "missing/X", "pipe/X", "a\0b", "."):
        with pytest.raises(ValueError), whole_file(f"{tmp_path}/{name}"):
            raise AssertionError("opened")
    assert sorted(tmp_path.iterdir()) == before


