"""Checkpoints as others leave them: what transformers loads is not refused for less."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_special_tokens import config, write_json, write_model

from model import load_checkpoint, save_checkpoint
from support.checkpoint import CheckpointError, generation_config
from support.console import load

TEMPLATE = (
    "{% for m in messages %}<s>{{ m.role }}: {{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant: {% endif %}"
)


def made(path: Path, template: str = TEMPLATE, layers: int = 4, tied: bool = False) -> Path:
    """A checkpoint with a byte-level tokenizer.json, <s> 256 and </s> 257, and chat."""
    path.mkdir()
    write_json(path, "<s>", "</s>")
    config(path, bos_token="<s>", eos_token="</s>", chat_template=template)
    write_model(path, 300, layers, tied=tied, bos=256, eos=(257,))
    return path


def change(file: Path, **keys: object) -> None:
    """Sets keys of a JSON file."""
    found = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps(found | keys))


@pytest.mark.parametrize("head", ["other", "same", "alone"])
def test_a_head_is_tied_where_transformers_ties_it(tmp_path, head):
    path = made(tmp_path / "a")
    change(path / "config.json", tie_word_embeddings=True)
    weights = load_file(path / "model.safetensors")
    table = "model.embed_tokens.weight"
    if head == "same":
        weights["lm_head.weight"] = weights[table].clone()
    if head == "alone":
        del weights[table]
    save_file(weights, path / "model.safetensors")
    model = load_checkpoint(path)
    assert torch.equal(model.lm_head.weight, weights["lm_head.weight"])
    assert model.config.tied == (head != "other")
    save_checkpoint(model, tmp_path / "again")
    again = load_checkpoint(tmp_path / "again")
    assert torch.equal(again.lm_head.weight, model.lm_head.weight)
    assert torch.equal(again.embed_tokens.weight, model.embed_tokens.weight)


@pytest.mark.parametrize(
    "name, content, remedy",
    [
        ("model.safetensors", "version https://git-lfs.github.com/spec/v1\noid", "git lfs pull"),
        ("tokenizer.json", "<!DOCTYPE html><html>", "download it again"),
    ],
)
def test_what_a_download_left_in_a_files_place_is_named(tmp_path, name, content, remedy):
    path = made(tmp_path / "a")
    (path / "pytorch_model.bin").write_text(content)  # which nobody needs
    load(path)
    (path / name).write_text(content)
    with pytest.raises(CheckpointError, match=f"{name} is a .*{remedy}"):
        load(path)


def test_weights_that_no_index_names_are_named(tmp_path):
    path, name = made(tmp_path / "a"), "model-00001-of-00002.safetensors"
    (path / "model.safetensors").rename(path / name)
    with pytest.raises(CheckpointError, match=rf"{name}.* without model.safetensors.index.json"):
        load(path)


def test_rope_scaling_counts_over_rope_parameters_and_swish_is_silu(tmp_path):
    """And rope of Llama 3 without an original length takes the model's."""
    path = made(tmp_path / "a")
    rope = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    change(path / "config.json", rope_parameters={"rope_type": "default"}, rope_scaling=rope)
    change(path / "config.json", hidden_act="swish")
    config = load_checkpoint(path).config
    assert (config.rope_type, config.rope_original_len) == ("llama3", 256)


def test_whole_floats_are_whole_numbers(tmp_path):
    path = made(tmp_path / "a")
    before, file = load_checkpoint(path).config, path / "config.json"
    found = json.loads(file.read_text())
    floats = {k: float(v) for k, v in found.items() if type(v) is int}
    assert "eos_token_id" in floats and "hidden_size" in floats
    change(file, **floats, rope_theta=10000)
    after = load_checkpoint(path).config
    assert repr(after) == repr(before), "types too"
    change(path / "generation_config.json", num_assistant_tokens=19.0, eos_token_id=[7.0])
    assert repr(generation_config(path)) == "{'num_assistant_tokens': 19, 'eos_token_id': [7]}"


def test_bad_advice_is_named_and_refuses_no_model(tmp_path, capfd):
    path = made(tmp_path / "a")
    (path / "generation_config.json").write_text("{")
    load(path)
    assert generation_config(path) == {}
    said = capfd.readouterr().err.splitlines()
    assert said and all("generation_config.json" in line and len(line) < 500 for line in said)


@pytest.mark.parametrize("ids", [-1, 300, [-1, 257], True])
def test_special_ids_outside_the_vocabulary_refuse_no_model(tmp_path, ids):
    path = made(tmp_path / "a")
    change(path / "config.json", eos_token_id=ids, bos_token_id=ids)
    config = load_checkpoint(path).config
    assert (config.eos, config.bos) == (((257,), 257) if ids == [-1, 257] else ((), None))
