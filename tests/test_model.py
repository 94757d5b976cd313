"""The model against an independent NumPy oracle; the cache; configs and saved files."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import tiny_config, tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import oracle_logits
from safetensors import safe_open

from cache import VIEW, KVQCache
from decode import generate, new_cache
from exact import pack
from extras.early_exit import keep_layers
from model import (
    PREFILL_ROWS,
    causal_attention,
    load_checkpoint,
    prefill,
    read_config,
    row_attention,
    save_checkpoint,
    write_config,
)
from support.checkpoint import CheckpointError, parse_object

DTYPES = [torch.float32, torch.bfloat16, torch.float64]
CLOSE = {torch.float32: 1e-5, torch.bfloat16: 0.03, torch.float64: 1e-12}


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


texts = st.lists(st.integers(0, 60), min_size=1, max_size=20)
seeds = st.integers(0, 9)


def assert_greedy(rounds, weights, config, prompt, depth=None):
    """The rounds' logits are the oracle's after `depth` layers, and the tokens are their best.

    Rotary angles are float32 in the model, as in transformers: hence 1e-3 and not 1e-12.
    """
    rounds = list(rounds)
    tokens = [t for r in rounds for t in r.emitted]
    expected = oracle_logits(weights, config, prompt + tokens, depth)[len(prompt) - 1 : -1]
    logits = torch.cat([r.logits for r in rounds]).numpy()
    assert np.allclose(logits, expected, rtol=1e-3, atol=1e-3)
    chosen = np.take_along_axis(expected, np.array(tokens)[:, None], 1)[:, 0]
    assert np.allclose(chosen, expected.max(-1), rtol=1e-3, atol=1e-3)
    return tokens


@settings(max_examples=settings().max_examples // 2)
@given(configs(), texts, seeds)
def test_forward_is_the_oracles(config, tokens, seed):
    model = tiny_model(config, seed, dtype=torch.float64)
    weights = numpy_weights(model)
    with torch.inference_mode():
        logits = model(torch.tensor([tokens, tokens[::-1]])).numpy()
    for ours, text in zip(logits, (tokens, tokens[::-1])):
        assert np.allclose(ours, oracle_logits(weights, config, text), rtol=1e-3, atol=1e-3)


@settings(max_examples=settings().max_examples // 2)
@given(configs(), texts, seeds, st.booleans(), st.data())
def test_decoding_over_the_cache_is_the_oracles(config, prompt, seed, exact, data):
    model = tiny_model(config, seed, dtype=torch.float64)
    weights = numpy_weights(model)
    exit_layer = data.draw(st.integers(0, config.n_layers - 1))
    how = dict(exit_layer=exit_layer, draft_len=3, max_new_tokens=12, eos=())
    rounds = generate(pack(model) if exact else model, prompt, **how)
    assert len(assert_greedy(rounds, weights, config, prompt)) == 12


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_early_exit_alone_is_the_oracle_of_that_depth(depth):
    config = tiny_config()
    model = tiny_model(config, dtype=torch.float64)
    rounds = generate(keep_layers(model, range(depth)), [5, 6], max_new_tokens=12, eos=())
    assert_greedy(rounds, numpy_weights(model), config, [5, 6], depth)


def test_a_long_prompt_prefills_in_pieces_to_the_same_logits():
    model = tiny_model(tiny_config(max_len=2048, n_layers=2), dtype=torch.float64)
    prompt = [i * 7 % 61 for i in range(2 * PREFILL_ROWS + 76)]
    with torch.inference_mode():
        expected = model(torch.tensor([prompt]))[0, -1]
    (r,) = generate(model, prompt, max_new_tokens=1)
    torch.testing.assert_close(r.logits[0], expected, rtol=1e-9, atol=1e-9)


def test_prefill_leaves_in_the_cache_what_one_token_at_a_time_leaves():
    model = tiny_model(tiny_config(), dtype=torch.float64)
    tokens = [i * 7 % 61 for i in range(70)]
    at_once, singly = (new_cache(model.config, 70, 0, model.dtype, model.device) for _ in range(2))
    prefill(model, at_once, tokens)
    for token in tokens:
        prefill(model, singly, [token])
    assert at_once.length == singly.length == 70
    torch.testing.assert_close(at_once.keys, singly.keys)
    torch.testing.assert_close(at_once.values, singly.values)


@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=settings().max_examples // 4)
@given(st.integers(1, 3), st.integers(1, 4), st.integers(0, 130), st.integers(1, 40), seeds)
def test_attention_of_rows_is_attention_of_the_sequence_up_to_rounding(
    dtype, groups, share, start, rows, seed
):
    """Both kinds for rows, the model's own and exact.py's."""
    torch.manual_seed(seed)
    config = tiny_config(n_heads=groups * share, n_kv_heads=groups, n_layers=2)
    models = tiny_model(config, dtype=dtype), pack(tiny_model(config, dtype=dtype))
    q = torch.randn(start + rows, groups * share, 8).to(dtype)
    k, v = torch.randn(2, start + rows, groups, 8).to(dtype)
    whole = causal_attention(q[None].double(), k[None].double(), v[None].double())[0, start:]
    for model in models:
        cache = new_cache(config, start + rows, 0, dtype, model.device)
        cache.write(1, 0, k[:start], v[:start])
        mixed = model.row_attention(cache, start, rows)(1, q[start:], k[start:], v[start:])
        torch.testing.assert_close(mixed.double(), whole, rtol=0, atol=CLOSE[dtype])
        assert torch.equal(cache.read(1, start + rows)[0], k.transpose(0, 1))
    assert models[0].row_attention is row_attention is not models[1].row_attention


def test_a_model_that_has_decoded_still_trains_and_follows_a_change_of_type():
    model = tiny_model(tiny_config())
    tokens = torch.tensor([[1, 2, 3]])
    list(generate(model, [1, 2], max_new_tokens=3))
    model(tokens).sum().backward()
    assert model.model.layers[0].self_attn.q_proj.weight.grad.any()
    expected = tiny_model(tiny_config()).double()(tokens)
    torch.testing.assert_close(model.double()(tokens), expected)


# --------------------------------------------------------------------------------------------------
# The cache


@pytest.mark.parametrize("dtype, itemsize", [(torch.float32, 4), (torch.bfloat16, 2)])
def test_the_caches_bytes_are_the_designs_formula(dtype, itemsize):
    cache = KVQCache(3, 2, 8, 24, max_len=VIEW + 36, draft_len=5, dtype=dtype)
    assert cache.max_len == 2 * VIEW
    assert cache.nbytes == 2 * 3 * 2 * VIEW * 2 * 8 * itemsize + 6 * 24 * itemsize


def test_the_cache_gives_back_what_was_written_and_copies_nothing():
    cache = KVQCache(2, 2, 8, 24, 100, 5)
    k = torch.randn(3, 2, 8)
    cache.write(1, 4, k, 2 * k)
    keys, values = cache.read(1, 10)
    assert keys.untyped_storage().data_ptr() == cache.keys.untyped_storage().data_ptr()
    assert torch.equal(keys[:, 4:7], k.transpose(0, 1))
    assert torch.equal(values[:, 4:7], 2 * k.transpose(0, 1))
    assert not keys[:, :4].any() and not keys[:, 7:].any() and not cache.read(0, 10)[0].any()
    cache.put_query(3, torch.ones(24))
    assert cache.queries.sum(1).tolist() == [0, 0, 0, 24, 0, 0]


def test_shared_views_show_each_row_the_same_cache_and_what_is_written_later():
    cache = KVQCache(2, 2, 8, 24, 2 * VIEW, 5)
    cache.write(1, 0, *torch.randn(2, VIEW, 2, 8))
    for end in (VIEW, 2 * VIEW, VIEW):  # a text that grows, and one that goes back
        for shared, alone in zip(cache.share(end, 3), cache.read(1, end)):
            assert len(shared) == 2 and torch.equal(shared[1], alone.expand(3, -1, -1, -1))
    k, v = torch.randn(2, 4, 2, 8)
    keys, values = (x[1] for x in cache.share(VIEW, 3))
    cache.write(1, 9, k, v)
    assert torch.equal(keys[2, :, 9:13], k.transpose(0, 1))
    assert torch.equal(values[2, :, 9:13], v.transpose(0, 1))


def test_a_view_covers_its_positions_and_depends_on_their_end_alone():
    assert [KVQCache.view_len(end) for end in (1, VIEW, VIEW + 1)] == [VIEW, VIEW, 2 * VIEW]


def test_accept_and_rewind_only_move_the_length():
    cache = KVQCache(2, 2, 8, 24, 100, 5)
    cache.keys.normal_()
    before = cache.keys.clone()
    cache.accept(70)
    cache.rewind(30)
    cache.accept(2)
    assert cache.length == 32 and torch.equal(cache.keys, before)
    for method, wrong in (("rewind", 33), ("rewind", -1), ("accept", 97), ("accept", -33)):
        with pytest.raises(ValueError, match=f"cannot {method}"):
            getattr(cache, method)(wrong)
    assert cache.length == 32


# --------------------------------------------------------------------------------------------------
# Configs

GIVEN = json.loads(json.dumps(write_config(tiny_config(eos=(2,), bos=1), torch.float32)))
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


@st.composite
def all_configs(draw):
    rope = draw(st.sampled_from(["default", "linear", "llama3"]))
    changes = {} if rope == "default" else dict(rope_factor=draw(st.floats(1e-3, 1e6)))
    if rope == "llama3":
        low = draw(st.floats(1e-3, 1e5))
        high = draw(st.floats(low, 1e6, exclude_min=True))
        changes |= dict(rope_low_freq_factor=low, rope_high_freq_factor=high)
        changes |= dict(rope_original_len=draw(st.integers(1, 1 << 27)))
    token = st.integers(0, 60)
    return replace(
        draw(configs()),
        rope_type=rope,
        **changes,
        max_len=draw(st.integers(1, 1 << 27)),
        bos=draw(st.none() | token),
        eos=tuple(draw(st.lists(token, max_size=3))),
    )


@given(all_configs())
def test_a_config_that_is_written_is_read_the_same(config):
    text = json.dumps(write_config(config, torch.bfloat16))
    assert read_config(json.loads(text)) == config


def test_both_dialects_of_config_say_the_same():
    config = tiny_config(rope_theta=5e5, tied=True)
    old = write_config(config, torch.bfloat16)
    new = {k: v for k, v in old.items() if k not in ("rope_theta", "rope_scaling", "torch_dtype")}
    new |= {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}, "dtype": "bfloat16"}
    assert read_config(old) == read_config(new) == config
    scaled = replace(config, rope_type="linear", rope_factor=2.0)
    old = write_config(scaled, torch.bfloat16)
    older = old | {"rope_scaling": {"type": "linear", "factor": 2.0}}
    new["rope_parameters"] |= {"rope_type": "linear", "factor": 2.0}
    assert read_config(old) == read_config(older) == read_config(new) == scaled


def test_what_a_config_does_not_say_is_as_in_transformers():
    needed = "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads"
    found = read_config({"model_type": "llama"} | {k: GIVEN[k] for k in needed.split()})
    assert (found.n_kv_heads, found.head_dim) == (4, 6) and not found.tied
    assert (found.max_len, found.norm_eps, found.rope_theta) == (2048, 1e-6, 10000.0)
    assert (found.bos, found.eos, found.rope_type) == (None, (), "default")


REFUSED = [
    (dict(model_type="mistral"), "model_type"),
    (dict(model_type=None), "model_type"),
    (dict(attention_bias=True), "attention_bias"),
    (dict(mlp_bias=True), "mlp_bias"),
    (dict(quantization_config={"bits": 4}), "quantization_config"),
    (dict(hidden_act="gelu"), "hidden_act"),
    (dict(vocab_size=None), "vocab_size"),
    (dict(vocab_size=0), "vocab_size"),
    (dict(vocab_size=1 << 30), "vocab_size"),
    (dict(hidden_size="a%s", head_dim=None), "hidden_size"),
    (dict(hidden_size="a%s"), "dim"),
    (dict(hidden_size=[24], head_dim=None), "hidden_size"),
    (dict(hidden_size=24.0), "dim"),
    (dict(hidden_size=True), "dim"),
    (dict(hidden_size=10**400), "dim"),
    (dict(hidden_size=25, head_dim=None), "hidden_size"),
    (dict(intermediate_size=-1), "hidden_dim"),
    (dict(num_hidden_layers=0), "n_layers"),
    (dict(num_hidden_layers=10**9), "n_layers"),
    (dict(num_hidden_layers="four"), "n_layers"),
    (dict(num_attention_heads=0, head_dim=None), "heads"),
    (dict(num_attention_heads=None), "num_attention_heads"),
    (dict(num_key_value_heads=3), "heads"),
    (dict(num_key_value_heads=0), "n_kv_heads"),
    (dict(head_dim=7), "head_dim"),
    (dict(head_dim=0), "head_dim"),
    (dict(max_position_embeddings=2.5), "max_len"),
    (dict(rms_norm_eps=1e308), "norm_eps"),
    (dict(rms_norm_eps=0), "norm_eps"),
    (dict(rms_norm_eps="1e-5"), "norm_eps"),
    (dict(rope_theta=10**400), "rope_theta"),
    (dict(rope_theta=5e-324), "rope_theta"),
    (dict(rope_theta=float("nan")), "rope_theta"),
    (dict(rope_theta=float("inf")), "rope_theta"),
    (dict(rope_theta={}), "rope_theta"),
    (dict(rope_scaling=[1]), "rope"),
    (dict(rope_scaling={"rope_type": "yarn", "factor": 4.0}), "yarn"),
    (dict(rope_scaling={"rope_type": ["linear"]}), "rope type"),
    (dict(rope_scaling={"rope_type": "linear"}), "factor"),
    (dict(rope_scaling={"rope_type": "linear", "factor": 0}), "factor"),
    (dict(rope_scaling=LLAMA3 | {"low_freq_factor": 4.0}), "low_freq_factor"),
    (dict(rope_scaling=LLAMA3 | {"original_max_position_embeddings": 1.5}), "rope_original_len"),
    (dict(rope_scaling={"rope_type": "llama3", "factor": 8.0}), "low_freq_factor"),
    (dict(tie_word_embeddings="false"), "tie_word_embeddings"),
    (dict(bos_token_id=61), "special token"),
    (dict(eos_token_id=[2, -1]), "special token"),
    (dict(eos_token_id={}), "special token"),
    (dict(eos_token_id=True), "special token"),
]


@pytest.mark.parametrize("changes, words", REFUSED, ids=lambda x: str(x)[:60])
def test_a_config_of_no_llama_is_refused_in_one_line_that_names_the_fault(changes, words):
    with pytest.raises(CheckpointError, match=words) as refused:
        read_config(GIVEN | changes)
    assert str(refused.value).isprintable() and len(str(refused.value)) < 160


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner),
    max_leaves=5,
)
rope_values = st.dictionaries(st.sampled_from([*LLAMA3, "type", "rope_theta"]), json_values)


@given(
    st.dictionaries(st.sampled_from([*GIVEN, "rope_parameters"]), json_values | rope_values),
    st.booleans(),
)
def test_any_json_object_is_a_config_or_is_refused_in_one_line(changes, whole):
    text = json.dumps((GIVEN if whole else {"model_type": "llama"}) | changes)
    try:
        config = read_config(parse_object(text, "config.json"))
    except CheckpointError as error:
        assert str(error).isprintable()
    else:
        assert read_config(write_config(config, torch.float32)) == config


# --------------------------------------------------------------------------------------------------
# Saved files


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16])
def test_what_is_saved_loads_to_the_same_bits(tmp_path, tied, dtype):
    model = tiny_model(tiny_config(tied=tied, eos=(2, 3), bos=1), dtype=dtype)
    save_checkpoint(model, tmp_path / "new" / "deep")
    loaded = load_checkpoint(tmp_path / "new" / "deep")
    assert loaded.config == model.config and loaded.dtype == dtype and not loaded.training
    assert loaded.state_dict().keys() == model.state_dict().keys()
    assert all(map(torch.equal, loaded.parameters(), model.parameters()))
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tied
    wide = load_checkpoint(str(tmp_path / "new" / "deep"), torch.float64)
    assert torch.equal(wide.lm_head.weight, model.lm_head.weight.double())


def test_saved_files_are_as_transformers_names_them(tmp_path):
    model = tiny_model(tiny_config(tied=True, eos=(2,)))
    save_checkpoint(model, tmp_path)
    assert sorted(f.name for f in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
        names = set(file.keys())
    layer = "model.layers.0."
    assert {"model.embed_tokens.weight", "model.norm.weight"} < names
    assert {f"{layer}self_attn.{x}_proj.weight" for x in "qkvo"} < names
    assert {f"{layer}mlp.{x}_proj.weight" for x in ("gate", "up", "down")} < names
    assert len(names) == 2 + 9 * 4  # the tied head is not there a second time
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["architectures"] == ["LlamaForCausalLM"] and written["eos_token_id"] == 2
    assert written["torch_dtype"] == "float32" and written["rope_scaling"] is None


def test_a_packed_model_refuses_to_be_saved_and_leaves_nothing(tmp_path):
    with pytest.raises(ValueError, match="packed"):
        save_checkpoint(pack(tiny_model(tiny_config())), tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_saving_over_a_checkpoint_replaces_it_and_nothing_else(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(b"mine")
    for seed in (0, 1):
        model = tiny_model(tiny_config(), seed)
        save_checkpoint(model, tmp_path)
        assert all(map(torch.equal, load_checkpoint(tmp_path).parameters(), model.parameters()))
    assert (tmp_path / "tokenizer.model").read_bytes() == b"mine"
    assert len(list(tmp_path.iterdir())) == 3
