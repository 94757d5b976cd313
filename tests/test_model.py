"""The model against an independent one in NumPy; the cache; configs and saved files."""

import json
import math
from dataclasses import asdict, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
import torch
from helpers import DTYPES, decode, tiny_config, tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy_decode import Decoder
from numpy_decode import Llama as Port
from safetensors import safe_open

from cache import KVQCache
from decode import generate, new_cache
from exact import VIEW, pack
from model import (
    PREFILL_ROWS,
    Config,
    causal_attention,
    load_checkpoint,
    prefill,
    row_attention,
    save_checkpoint,
)
from support.checkpoint import (
    KEYS,
    RANGES,
    ROPE_KEYS,
    CheckpointError,
    config_fields,
    config_json,
    parse_object,
)

CLOSE = {torch.float32: 1e-5, torch.bfloat16: 0.03, torch.float64: 1e-12}


def port_of(model):
    """tokens -> logits (T, vocab), float64, of the porting kit's Llama, from a saved checkpoint."""
    with TemporaryDirectory() as folder:
        save_checkpoint(model, folder)
        port = Port(Path(folder), "float64")

    def logits(tokens):
        how = dict(exit_layer=0, draft_len=0, max_new_tokens=0, eos=())
        cache = Decoder(port, tokens, how)
        return port.unembed(port.run_layers(port.embed(tokens), 0, port.n_layers, cache, 0))

    return logits


LLAMA3 = dict(rope_type="llama3", rope_factor=8.0, rope_original_len=32)


@st.composite
def configs(draw):
    pick = lambda *choices: draw(st.sampled_from(choices))
    n_kv_heads = pick(1, 2, 3)
    return tiny_config(
        n_layers=pick(1, 2, 3, 4),
        n_kv_heads=n_kv_heads,
        n_heads=n_kv_heads * pick(1, 2, 3),
        head_dim=pick(2, 6, 8),
        tied=pick(False, True),
        rope_theta=pick(100.0, 10000.0),
        norm_eps=pick(1e-5, 0.1),
        **pick({}, dict(rope_type="linear", rope_factor=4.0), LLAMA3),
    )


texts = st.lists(st.integers(0, 60), min_size=1, max_size=20)
seeds = st.integers(0, 9)
half = settings(max_examples=settings().max_examples // 2)
near = lambda a, b: np.allclose(a, b, rtol=1e-5, atol=1e-5)  # rotary angles are float32


@half
@given(configs(), texts, seeds)
def test_forward_is_the_ports(config, tokens, seed):
    model = tiny_model(config, seed, dtype=torch.float64)
    port, batch = port_of(model), [tokens, tokens[::-1]]
    with torch.inference_mode():
        assert all(map(near, model(torch.tensor(batch)).numpy(), map(port, batch)))


@half
@given(configs(), texts, seeds, st.booleans(), st.data())
def test_decoding_over_the_cache_is_the_ports(config, prompt, seed, exact, data):
    """Its logits are, and its tokens are their best."""
    model = tiny_model(config, seed, dtype=torch.float64)
    port, exit_layer = port_of(model), data.draw(st.integers(0, config.n_layers - 1))
    how = dict(exit_layer=exit_layer, draft_len=3, max_new_tokens=12)
    tokens, logits, _ = decode(pack(model) if exact else model, prompt, **how)
    expected = port(prompt + tokens)[len(prompt) - 1 : -1]
    assert len(tokens) == 12 and near(logits.numpy(), expected)
    assert near(expected[range(12), tokens], expected.max(-1))


def test_prefill_in_pieces_is_prefill_of_tokens():
    """And the logits after it are those of the whole text at once."""
    model = tiny_model(tiny_config(max_len=2048, n_layers=2), dtype=torch.float64)
    prompt = [i * 7 % 61 for i in range(2 * PREFILL_ROWS + 76)]
    at_once, singly = (new_cache(model, len(prompt), 0) for _ in range(2))
    prefill(model, at_once, prompt)
    for token in prompt:
        prefill(model, singly, [token])
    assert at_once.length == singly.length == len(prompt)
    torch.testing.assert_close(at_once.keys, singly.keys)
    torch.testing.assert_close(at_once.values, singly.values)
    with torch.inference_mode():
        expected = model(torch.tensor([prompt]))[0, -1]
    found = decode(model, prompt, max_new_tokens=1).logits[0]
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


# Both kinds for rows, the model's own and exact.py's, are attention of the sequence up to rounding.
@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=max(settings().max_examples // 8, 1))
@given(
    st.integers(1, 3),
    st.integers(1, 4),
    st.sampled_from([2, 8, 64]),
    st.integers(0, 130),
    st.integers(1, 40),
    seeds,
)
def test_attention_of_rows_is_that_of_the_sequence(
    dtype, groups, share, head_dim, start, rows, seed
):
    torch.manual_seed(seed)
    heads, end = groups * share, start + rows
    config = tiny_config(n_heads=heads, n_kv_heads=groups, head_dim=head_dim, n_layers=2)
    models = tiny_model(config, dtype=dtype), pack(tiny_model(config, dtype=dtype))
    q = torch.randn(end, heads, head_dim).to(dtype)
    k, v = torch.randn(2, end, groups, head_dim).to(dtype)
    whole = causal_attention(q[None].double(), k[None].double(), v[None].double())[0, start:]
    for model in models:
        cache = new_cache(model, end, 0)
        cache.write(1, 0, k[:start], v[:start])
        mixed = model.row_attention(cache, start, rows)(1, q[start:], k[start:], v[start:])
        torch.testing.assert_close(mixed.double(), whole, rtol=0, atol=CLOSE[dtype])
        assert torch.equal(cache.read(end)[0][1][0], k.transpose(0, 1))
    assert models[0].row_attention is row_attention is not models[1].row_attention


def test_a_model_that_has_decoded_trains():
    model, tokens = tiny_model(), torch.tensor([[1, 2, 3]])
    list(generate(model, [1, 2], max_new_tokens=3))
    model(tokens).sum().backward()
    assert model.layers[0].self_attn.q_proj.weight.grad.any()
    expected = tiny_model().double()(tokens)
    torch.testing.assert_close(model.double()(tokens), expected)


# --------------------------------------
# The cache


def test_a_cache_has_whole_views_and_the_designs_bytes():
    cache = new_cache(tiny_model(dtype=torch.bfloat16), VIEW + 1, 5)
    assert cache.keys.shape == (4, 2, 2 * VIEW, 8) and cache.queries.shape == (6, 24)
    nbytes = sum(x.nbytes for x in (cache.keys, cache.values, cache.queries))
    assert nbytes == 2 * (2 * 4 * 2 * VIEW * 2 * 8 + 6 * 24) and cache.max_len == 2 * VIEW


def test_the_cache_gives_back_what_was_written():
    """And copies nothing."""
    cache, k = KVQCache(2, 2, 8, 24, 100, 5), torch.randn(3, 2, 8)
    cache.write(1, 4, k, 2 * k)
    (other, keys), (_, values) = cache.read(10)
    assert keys.untyped_storage().data_ptr() == cache.keys.untyped_storage().data_ptr()
    assert torch.equal(keys[0, :, 4:7], k.transpose(0, 1))
    assert torch.equal(values[0, :, 4:7], 2 * k.transpose(0, 1))
    assert not keys[..., :4, :].any() and not keys[..., 7:, :].any() and not other.any()
    cache.write(0, 2, k, k)
    assert torch.equal(other[0, :, 2:5], k.transpose(0, 1)), "what is written later shows"
    assert cache.read(12)[0][0].shape == (1, 2, 12, 8)


def test_commit_and_rewind_only_move_the_length():
    cache = KVQCache(2, 2, 8, 24, 100, 5)
    cache.keys.normal_()
    before = cache.keys.clone()
    cache.commit(70)
    cache.rewind(30)
    cache.query_layer[1] = 2
    cache.commit(2)
    assert cache.length == 32 and torch.equal(cache.keys, before)
    assert cache.query_layer == [0] * 6, "what was drafted is not of the next round"
    for method, wrong in (("rewind", 33), ("rewind", -1), ("commit", 97), ("commit", -33)):
        with pytest.raises(ValueError, match=f"cannot {method}"):
            getattr(cache, method)(wrong)
    assert cache.length == 32


# --------------------------------------
# Configs


def read(given: dict) -> Config:
    return Config(**config_fields(given))


def written(config: Config, dtype=torch.float32) -> dict:
    return json.loads(json.dumps(config_json(asdict(config), dtype)))


GIVEN = written(tiny_config(eos=(2,), bos=1))
ROPE = written(tiny_config(**LLAMA3))["rope_scaling"]


tokens, lengths, factors = st.integers(0, 60), st.integers(1, 1 << 27), st.floats(1e-3, 1e6)


@given(configs(), st.lists(factors, min_size=3, max_size=3, unique=True), st.data())
def test_a_config_that_is_written_is_read_the_same(config, factors, data):
    draw, (low, high, factor) = data.draw, sorted(factors)
    if config.rope_type != "default":
        config = replace(config, rope_factor=factor)
    if config.rope_type == "llama3":
        ends = dict(rope_low_freq_factor=low, rope_high_freq_factor=high)
        config = replace(config, **ends, rope_original_len=draw(lengths))
    eos, bos = tuple(draw(st.lists(tokens, max_size=3))), draw(st.none() | tokens)
    config = replace(config, max_len=draw(lengths), bos=bos, eos=eos)
    assert read(written(config, torch.bfloat16)) == config


def test_all_dialects_of_config_say_the_same():
    config = tiny_config(rope_theta=5e5, rope_type="linear", rope_factor=2.0)
    old, rope = written(config), {"type": "linear", "factor": 2.0}
    older = old | {"rope_scaling": rope}
    new = {k: v for k, v in old.items() if k not in ("rope_theta", "rope_scaling", "torch_dtype")}
    new["rope_parameters"] = {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5}
    assert read(old) == read(older) == read(new) == config


def test_config_defaults_are_transformers():
    needed = "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads"
    found = read({"model_type": "llama"} | {k: GIVEN[k] for k in needed.split()})
    assert (found.n_kv_heads, found.head_dim) == (4, 6) and not found.tied
    assert (found.max_len, found.norm_eps, found.rope_theta) == (2048, 1e-6, 10000.0)
    assert (found.bos, found.eos, found.rope_type) == (None, (), "default")


@pytest.mark.parametrize("name", RANGES)
def test_a_field_out_of_range_is_refused(name):
    (low, high), key = RANGES[name], (KEYS | ROPE_KEYS | {"rope_theta": "rope_theta"})[name]
    wrong = [low - 1 if isinstance(low, int) else low / 2, 2 * high, 10**400, math.nan, "4", True]
    for value in (*wrong, *[low + 0.5] * isinstance(low, int), [low], {}):
        changes = {"rope_scaling": ROPE | {key: value}} if name in ROPE_KEYS else {key: value}
        with pytest.raises(CheckpointError, match=name) as refused:
            read(GIVEN | changes)
        assert str(refused.value).isprintable() and len(str(refused.value)) < 160


REFUSED = [
    (dict(model_type="mistral"), "model_type"),
    (dict(quantization_config={"bits": 4}), "quantization_config"),
    (dict(hidden_act="gelu"), "hidden_act"),
    (dict(vocab_size=None), "vocab_size"),
    (dict(hidden_size=25, head_dim=None), "hidden_size"),
    (dict(num_key_value_heads=3), "heads"),
    (dict(head_dim=7), "head_dim"),
    (dict(rope_scaling={"rope_type": "yarn", "factor": 4.0}), "yarn"),
    (dict(rope_scaling={"rope_type": "linear"}), "factor"),
    (dict(rope_scaling={"rope_type": "llama3", "factor": 8.0}), "low_freq_factor"),
    (dict(rope_scaling=ROPE | {"low_freq_factor": 4.0}), "low_freq_factor"),
    (dict(tie_word_embeddings="false"), "tie_word_embeddings"),
]


@pytest.mark.parametrize("changes, words", REFUSED, ids=lambda x: str(x)[:60])
def test_a_config_of_no_llama_is_refused_by_name(changes, words):
    with pytest.raises(CheckpointError, match=words) as refused:
        read(GIVEN | changes)
    assert str(refused.value).isprintable()


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner),
    max_leaves=5,
)
rope_values = st.dictionaries(st.sampled_from([*ROPE, "type", "rope_theta"]), json_values)


@given(
    st.dictionaries(st.sampled_from([*GIVEN, "rope_parameters"]), json_values | rope_values),
    st.booleans(),
)
def test_any_json_object_is_a_config_or_is_refused(changes, whole):
    text = json.dumps((GIVEN if whole else {"model_type": "llama"}) | changes)
    try:
        config = read(parse_object(text, "config.json"))
    except CheckpointError as error:
        assert str(error).isprintable()
    else:
        assert read(written(config)) == config


# --------------------------------------
# Saved files


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16])
def test_what_is_saved_loads_to_the_same_bits(tmp_path, tied, dtype):
    """Over another checkpoint too, and beside other files."""
    path = tmp_path / "new" / "deep"
    save_checkpoint(tiny_model(seed=1), path)
    (path / "tokenizer.model").write_bytes(b"mine")
    model = tiny_model(tiny_config(tied=tied, eos=(2, 3), bos=1), dtype=dtype)
    save_checkpoint(model, path)
    loaded = load_checkpoint(path)
    assert (path / "tokenizer.model").read_bytes() == b"mine" and len([*path.iterdir()]) == 3
    assert loaded.config == model.config and loaded.dtype == dtype and not loaded.training
    assert loaded.state_dict().keys() == model.state_dict().keys()
    assert all(map(torch.equal, loaded.parameters(), model.parameters()))
    assert (loaded.lm_head.weight is loaded.embed_tokens.weight) == tied
    wide = load_checkpoint(str(path), torch.float64)
    assert torch.equal(wide.lm_head.weight, model.lm_head.weight.double())


def test_saved_files_have_transformers_names(tmp_path):
    model = tiny_model(tiny_config(tied=True, eos=(2,)))
    save_checkpoint(model, tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
        names = set(file.keys())  # the tied head is not there a second time
    assert names == {f"model.{name}" for name, _ in model.named_parameters()}
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"] and config["eos_token_id"] == 2
    assert config["torch_dtype"] == "float32" and config["rope_scaling"] is None


def test_a_packed_model_is_not_saved(tmp_path):
    with pytest.raises(ValueError, match="packed"):
        save_checkpoint(pack(tiny_model()), tmp_path / "new")
    assert not (tmp_path / "new").exists()
