"""The model against an independent NumPy oracle, the cache, and checkpoints on disk."""

import json
import shutil

import numpy as np
import pytest
import torch
from helpers import tiny_config, tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import oracle_greedy, oracle_logits
from safetensors.torch import load_file, save_file

from cache import VIEW, KVQCache
from decode import generate
from model import CheckpointError, Config, load_checkpoint, save_checkpoint


def numpy_weights(model):
    return {name: p.detach().double().numpy() for name, p in model.state_dict().items()}


@st.composite
def configs(draw):
    n_kv_heads = draw(st.sampled_from([1, 2, 3]))
    return tiny_config(
        n_layers=draw(st.integers(1, 4)),
        n_kv_heads=n_kv_heads,
        n_heads=n_kv_heads * draw(st.sampled_from([1, 2, 3])),
        head_dim=draw(st.sampled_from([2, 6, 8])),
        tied=draw(st.booleans()),
        rope_theta=draw(st.sampled_from([100.0, 10000.0])),
        norm_eps=draw(st.sampled_from([1e-5, 0.1])),
    )


@settings(max_examples=25)
@given(configs(), st.lists(st.integers(0, 60), min_size=1, max_size=20), st.integers(0, 9))
def test_forward_is_the_oracles_in_float64(config, tokens, seed):
    model = tiny_model(config, seed, dtype=torch.float64)
    weights = numpy_weights(model)
    with torch.inference_mode():
        logits = model(torch.tensor([tokens, tokens[::-1]])).numpy()
    # rotary angles are float32 in the model, as in transformers: hence 1e-6 and not 1e-12
    assert np.allclose(logits[0], oracle_logits(weights, config, tokens), rtol=1e-5, atol=1e-5)
    assert np.allclose(logits[1], oracle_logits(weights, config, tokens[::-1]), rtol=1e-5, atol=1e-5)


@settings(max_examples=25)
@given(configs(), st.lists(st.integers(0, 60), min_size=1, max_size=20), st.integers(0, 9), st.data())
def test_decoding_over_the_cache_is_the_oracles_token_for_token(config, prompt, seed, data):
    model = tiny_model(config, seed, dtype=torch.float64)
    weights = numpy_weights(model)
    exit_layer = data.draw(st.integers(0, config.n_layers - 1))
    rounds = list(generate(model, prompt, exit_layer=exit_layer, draft_len=3, max_new_tokens=12, eos=()))
    emitted = [t for r in rounds for t in r.emitted]
    assert emitted == oracle_greedy(weights, config, prompt, 12)
    logits = oracle_logits(weights, config, prompt + emitted)[len(prompt) - 1 : -1]
    assert np.allclose(torch.cat([r.logits for r in rounds]).numpy(), logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_early_exit_alone_is_the_oracle_of_that_depth(depth):
    config = tiny_config()
    model = tiny_model(config, dtype=torch.float64)
    weights = numpy_weights(model)
    rounds = generate(model, [5, 6], exit_layer=depth, no_verify=True, max_new_tokens=12, eos=())
    assert [t for r in rounds for t in r.emitted] == oracle_greedy(weights, config, [5, 6], 12, depth)


def test_a_long_prompt_prefills_in_pieces_to_the_same_logits():
    config = tiny_config(max_len=2048, n_layers=2)
    model = tiny_model(config, dtype=torch.float64)
    prompt = [i * 7 % 61 for i in range(1100)]
    with torch.inference_mode():
        expected = model(torch.tensor([prompt]))[0, -1]
    (r,) = generate(model, prompt, max_new_tokens=1)
    assert torch.allclose(r.logits[0], expected, rtol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_inexact_decoding_computes_the_same_function(dtype):
    model, exact = (tiny_model(tiny_config(), seed=3, dtype=dtype) for _ in range(2))
    model.pack(exact=False)
    tokens = [t for r in generate(exact, [1, 2, 3], max_new_tokens=30, eos=()) for t in r.emitted]
    cold = generate(model, [1, 2, 3] + tokens, exit_layer=2, max_new_tokens=1)
    warm = generate(exact, [1, 2, 3] + tokens, exit_layer=2, max_new_tokens=1)
    tolerance = {torch.float32: 1e-4, torch.bfloat16: 0.3, torch.float64: 1e-10}[dtype]
    assert torch.allclose(next(cold).logits, next(warm).logits, atol=tolerance)


# ---------------------------------------------------------------------------------------------------------------------
# The cache


@pytest.mark.parametrize("dtype, itemsize", [(torch.float32, 4), (torch.bfloat16, 2)])
def test_the_caches_bytes_are_the_designs_formula(dtype, itemsize):
    cache = KVQCache(n_layers=3, n_kv_heads=2, head_dim=8, dim=24, max_len=100, draft_len=5, dtype=dtype)
    assert cache.max_len == 2 * VIEW
    assert cache.nbytes == 2 * 3 * 128 * 2 * 8 * itemsize + 6 * 24 * itemsize


def test_reading_the_cache_copies_nothing():
    cache = KVQCache(2, 2, 8, 24, 100, 5)
    k = torch.randn(3, 2, 8)
    cache.write(1, 4, k, 2 * k)
    keys, values = cache.read(1, 10)
    assert keys.untyped_storage().data_ptr() == cache.keys.untyped_storage().data_ptr()
    assert torch.equal(keys[:, 4:7], k.transpose(0, 1)) and torch.equal(values[:, 4:7], 2 * k.transpose(0, 1))
    assert not keys[:, :4].any() and not keys[:, 7:].any() and not cache.read(0, 10)[0].any()
    for end in (64, 128, 64):  # a text that grows, and one that goes back
        shared, _ = cache.share(end, 2)
        assert shared[1].shape == (2, 2, end, 8) and torch.equal(shared[1][0], cache.read(1, end)[0]) and torch.equal(*shared[1])
    cache.write(1, 9, k, k)
    assert torch.equal(cache.share(64, 2)[1][1][1, :, 9:12], k.transpose(0, 1))


def test_accept_and_rewind_only_move_the_length():
    cache = KVQCache(2, 2, 8, 24, 100, 5)
    cache.keys.normal_()
    before = cache.keys.clone()
    cache.accept(70)
    cache.rewind(30)
    cache.accept(2)
    assert cache.length == 32 and torch.equal(cache.keys, before)
    for wrong in (lambda: cache.rewind(33), lambda: cache.rewind(-1), lambda: cache.accept(97), lambda: cache.accept(-33)):
        with pytest.raises(ValueError):
            wrong()
    assert cache.length == 32


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints


@pytest.fixture
def saved(tmp_path):
    model = tiny_model(tiny_config(eos=(2,), bos=1, tied=True))
    save_checkpoint(model, tmp_path / "ckpt")
    return tmp_path / "ckpt"


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_saved_loads_to_the_same_bits(tmp_path, tied, dtype):
    model = tiny_model(tiny_config(tied=tied, eos=(2, 3), bos=1), dtype=dtype)
    save_checkpoint(model, tmp_path)
    loaded = load_checkpoint(tmp_path)
    assert loaded.config == model.config and loaded.dtype == dtype
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), loaded.parameters(), strict=True))
    assert load_checkpoint(tmp_path, torch.float64).dtype == torch.float64
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "model.safetensors"]


def test_shards_load_like_one_file(saved):
    whole = load_checkpoint(saved)
    weights = load_file(saved / "model.safetensors")
    names = sorted(weights)
    parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, part in parts.items():
        save_file({name: weights[name] for name in part}, saved / file)
    (saved / "model.safetensors").unlink()
    index = {"weight_map": {name: file for file, part in parts.items() for name in part}}
    (saved / "model.safetensors.index.json").write_text(json.dumps(index))
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), load_checkpoint(saved).parameters(), strict=True))


def test_loaded_weights_do_not_depend_on_the_file_any_more(saved):
    model = load_checkpoint(saved)
    before = model.model.embed_tokens.weight.detach().clone()
    (saved / "model.safetensors").write_bytes(b"\0" * 100)
    assert torch.equal(model.model.embed_tokens.weight, before)


def edit(saved, **changes):
    config = json.loads((saved / "config.json").read_text())
    config.update(changes)
    (saved / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v != "gone"}))


def change_weights(saved, change):
    weights = load_file(saved / "model.safetensors")
    change(weights)
    save_file(weights, saved / "model.safetensors")


BAD = {
    "no directory": lambda d: shutil.rmtree(d),
    "no config": lambda d: (d / "config.json").unlink(),
    "config not JSON": lambda d: (d / "config.json").write_text("{"),
    "config a list": lambda d: (d / "config.json").write_text("[]"),
    "another architecture": lambda d: edit(d, model_type="mistral"),
    "no layers": lambda d: edit(d, num_hidden_layers=0),
    "missing value": lambda d: edit(d, hidden_size="gone"),
    "heads do not divide": lambda d: edit(d, num_key_value_heads=3),
    "text for a number": lambda d: edit(d, num_hidden_layers="four"),
    "rope scaling": lambda d: edit(d, rope_scaling={"rope_type": "yarn", "factor": 4.0}),
    "attention bias": lambda d: edit(d, attention_bias=True),
    "quantised": lambda d: edit(d, quantization_config={"bits": 4}),
    "no weights": lambda d: (d / "model.safetensors").unlink(),
    "truncated": lambda d: (d / "model.safetensors").write_bytes((d / "model.safetensors").read_bytes()[:-10]),
    "not safetensors": lambda d: (d / "model.safetensors").write_bytes(b"hello world"),
    "missing tensor": lambda d: change_weights(d, lambda w: w.pop("model.norm.weight")),
    "extra tensor": lambda d: change_weights(d, lambda w: w.update(extra=torch.zeros(1))),
    "wrong shape": lambda d: change_weights(d, lambda w: w.update({"model.norm.weight": torch.zeros(3)})),
    "integers": lambda d: change_weights(d, lambda w: w.update({"model.norm.weight": torch.zeros(24, dtype=torch.int32)})),
    "NaN": lambda d: change_weights(d, lambda w: w["model.norm.weight"].fill_(float("nan"))),
    "only a pickle": lambda d: (d / "model.safetensors").rename(d / "pytorch_model.bin"),
    "index leaves the directory": lambda d: (
        (d / "model.safetensors").rename(d.parent / "model.safetensors"),
        (d / "model.safetensors.index.json").write_text('{"weight_map": {"x": "../model.safetensors"}}'),
    ),
}


@pytest.mark.parametrize("fault", BAD)
def test_a_bad_checkpoint_is_refused_in_one_line(saved, fault):
    BAD[fault](saved)
    with pytest.raises(CheckpointError) as refused:
        load_checkpoint(saved)
    assert "\n" not in str(refused.value)


def test_a_packed_model_refuses_to_be_saved(tmp_path):
    with pytest.raises(ValueError):
        save_checkpoint(tiny_model(tiny_config()).pack(), tmp_path)


def test_both_dialects_of_config_say_the_same():
    base = json.loads(tiny_config(rope_theta=5e5, tied=True).to_json(torch.bfloat16))
    new = {k: v for k, v in base.items() if k not in ("rope_theta", "torch_dtype")}
    new.update(rope_parameters={"rope_type": "default", "rope_theta": 5e5}, dtype="bfloat16")
    assert Config.from_json(json.dumps(base)) == Config.from_json(json.dumps(new)) == tiny_config(rope_theta=5e5, tied=True)


def test_a_model_of_some_layers_is_those_layers_in_their_order():
    whole, x = tiny_model(tiny_config()), torch.arange(7)[None]
    h = whole.embed(x)
    for l in (0, 2, 3):
        h = whole.run_layers(h, l, l + 1)
    expected = whole.unembed(h)
    assert torch.equal(whole.keep_layers([0, 2, 3])(x), expected) and whole.config.n_layers == 3


@pytest.mark.parametrize("kept", [[], [0, 4], [2, 1], [1, 1], [-1, 2]])
def test_layers_that_cannot_be_kept_are_refused(kept):
    with pytest.raises(ValueError, match="layers to keep"):
        tiny_model(tiny_config()).keep_layers(kept)
