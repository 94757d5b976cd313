"""Compiled decoding gives the full model's bits too, whoever drafts, in threads as well."""

from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib import import_module

import pytest
import torch
from helpers import DRAFTERS, decode, same_bits, tiny_config, tiny_model
from hypothesis import given
from hypothesis import strategies as st

from decode import Sampling, generate
from exact import pack
from extras import compiled, products

CONFIG = dict(n_layers=3, n_heads=2, n_kv_heads=1, dim=32, hidden_dim=48, head_dim=16, max_len=150)
decode_90 = partial(decode, max_new_tokens=90)


@pytest.fixture(scope="module", params=[torch.bfloat16, torch.float32], ids=str)
def model(request):
    """A compiled model, with one key/value head, and one with two."""
    config = tiny_config(**CONFIG | dict(n_kv_heads=1 + (request.param == torch.float32)))
    return compiled.compile_model(tiny_model(config, damp_from=1, dtype=request.param), 1)


DRAFTS = st.tuples(
    st.sampled_from([*DRAFTERS]),
    st.integers(1, 15).map(lambda d: dict(draft_len=d)),
    st.sampled_from([0.0, 0.1, 0.4]).map(lambda c: dict(min_confidence=c)),
)


@given(
    st.lists(st.integers(0, 60), min_size=1, max_size=66),
    st.sampled_from([0.0, 0.0, 1.0]),
    st.lists(DRAFTS, min_size=3, max_size=3),
)
def test_compiled_text_is_bitwise_plain_whoever_drafts(model, prompt, temperature, drafts):
    sampling = Sampling(temperature, seed=3)
    plain = decode_90(model, prompt, sampling=sampling)
    for who, length, confidence in drafts:
        how = DRAFTERS[who](model, 1) | length | confidence
        assert same_bits(decode_90(model, prompt, sampling=sampling, **how), plain), who


def test_compiled_logits_are_nearly_the_packed_models(model):
    packed = pack(tiny_model(model.config, damp_from=1, dtype=model.dtype))
    (tokens, logits, _), (others, expected, _) = (decode(m, [3, 1, 4]) for m in (model, packed))
    same = next((i for i, (a, b) in enumerate(zip(tokens, others)) if a != b), len(tokens)) + 1
    tolerance = 0.3 if model.dtype == torch.bfloat16 else 1e-4
    assert same > 2
    torch.testing.assert_close(logits[:same], expected[:same], atol=tolerance, rtol=0)


def test_threads_on_one_model_do_not_mix_their_texts(model):
    text = lambda p: decode_90(model, [p, 2, 5], exit_layer=p % 2, draft_len=4)
    with ThreadPoolExecutor(4) as threads:
        assert all(map(same_bits, threads.map(text, range(8)), map(text, range(8))))


def test_another_exit_than_the_compiled_one_is_refused(model):
    with pytest.raises(ValueError, match="no graph begins"):
        next(generate(model, [1, 2], exit_layer=2))


def test_rows_that_do_not_keep_apart_leave_the_model_plain(monkeypatch):
    class Mixing:
        def __init__(self, model, cuts):
            pass

        def run_layers(self, h, *where):
            return h + len(h)

        def unembed(self, h):
            return h

    monkeypatch.setattr(compiled, "Graphs", Mixing)
    model = tiny_model()
    with pytest.raises(ValueError, match="keep apart"):
        compiled.compile_model(model, 1)
    assert not {"run_layers", "unembed"} & vars(model).keys()


@pytest.mark.parametrize("dtype, exit_layer", [(torch.float64, 1), (torch.float32, 3)])
def test_what_cannot_be_compiled_is_refused(dtype, exit_layer):
    with pytest.raises(ValueError, match=r"float32|exit layer"):
        compiled.compile_model(tiny_model(tiny_config(**CONFIG), dtype=dtype), exit_layer)


def test_the_same_weights_are_compiled_once(model, monkeypatch, capsys):
    again, other = (tiny_model(model.config, damp_from=1, dtype=model.dtype) for _ in range(2))
    name = compiled.fingerprint(again)
    with monkeypatch.context() as patch:  # would be needed to compile anew
        patch.setattr(torch.export, "export", None)
        compiled.compile_model(again, 1)
    assert "compiling" not in capsys.readouterr().err
    text = lambda model: decode(model, [3, 1, 4], exit_layer=1)
    assert same_bits(text(again), text(model))
    other.layers[2].mlp.up_proj.weight.data[5, 5] += 1
    assert compiled.fingerprint(other) != name


def test_this_pytorchs_products_are_changed_and_put_back():
    with products.faster_products():
        gemm = import_module("torch._inductor.codegen.cpp_micro_gemm")
        kernel, configs = gemm.CppMicroGemmFP32Vec, gemm.micro_gemm_configs
        changed = kernel.TEMPLATE_KERNEL
        assert {c.register_blocking.block_m for c in configs[kernel]} == {4}
    assert 8 in {c.register_blocking.block_m for c in configs[kernel]}
    for old, new in products.CHANGES.items():
        assert old in kernel.TEMPLATE_KERNEL and new not in kernel.TEMPLATE_KERNEL
        assert new in changed
