"""Compiled decoding gives the full model's bits too, whoever drafts, in threads as well."""

from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib import import_module

import pytest
import torch
from helpers import tiny_config, tiny_model
from hypothesis import given
from hypothesis import strategies as st

from decode import Sampling, generate
from exact import pack
from extras import compiled, products
from extras.drafters import Jacobi, LookupExit, PromptLookup

CONFIG = dict(n_layers=3, n_heads=2, n_kv_heads=1, dim=32, hidden_dim=48, head_dim=16, max_len=150)


@pytest.fixture(scope="module", params=[torch.bfloat16, torch.float32], ids=str)
def model(request):
    """A compiled model; the second one has two key/value heads, so its graphs take one row."""
    config = tiny_config(**CONFIG | dict(n_kv_heads=1 + (request.param == torch.float32)))
    return compiled.compile_model(tiny_model(config, damp_from=1, dtype=request.param), 1)


def decoded(model, prompt, **how):
    rounds = list(generate(model, prompt, max_new_tokens=90, eos=(), **how))
    return [t for r in rounds for t in r.emitted], torch.cat([r.logits for r in rounds])


DRAFTERS = [None, PromptLookup, Jacobi, partial(LookupExit, exit_layer=1)]
DRAFTS = st.fixed_dictionaries(
    dict(
        draft_len=st.integers(1, 15),
        min_confidence=st.sampled_from([0.0, 0.1, 0.4]),
        drafter=st.sampled_from(DRAFTERS),
    )
)


@given(
    st.lists(st.integers(0, 60), min_size=1, max_size=66),
    st.sampled_from([0.0, 0.0, 1.0]),
    st.lists(DRAFTS, min_size=3, max_size=3),
)
def test_compiled_tokens_and_logits_are_bitwise_the_plain_ones_whoever_drafts(
    model, prompt, temperature, drafts
):
    sampling = Sampling(temperature, seed=3)
    tokens, logits = decoded(model, prompt, sampling=sampling)
    for how in drafts:
        exit_layer = 0 if how["drafter"] else 1
        again = decoded(model, prompt, sampling=sampling, exit_layer=exit_layer, **how)
        assert again[0] == tokens and torch.equal(again[1], logits), how


def test_compiled_logits_are_nearly_those_of_the_packed_model(model):
    packed = pack(tiny_model(model.config, damp_from=1, dtype=model.dtype))
    (tokens, logits), (others, expected) = (decoded(m, [3, 1, 4]) for m in (model, packed))
    same = next((i for i, (a, b) in enumerate(zip(tokens, others)) if a != b), len(tokens)) + 1
    tolerance = 0.3 if model.dtype == torch.bfloat16 else 1e-4
    assert same > 2
    torch.testing.assert_close(logits[:same], expected[:same], atol=tolerance, rtol=0)


def test_threads_on_one_compiled_model_do_not_mix_their_texts(model):
    jobs = [([p, 2, 5], dict(exit_layer=1, draft_len=4) if p % 2 else {}) for p in range(8)]
    alone = [decoded(model, prompt, **how)[0] for prompt, how in jobs]
    with ThreadPoolExecutor(4) as threads:
        together = list(threads.map(lambda job: decoded(model, job[0], **job[1])[0], jobs))
    assert together == alone


def test_another_exit_than_the_compiled_one_is_refused(model):
    with pytest.raises(ValueError, match="no graph begins"):
        next(generate(model, [1, 2], exit_layer=2))


def test_rows_that_do_not_keep_apart_are_refused_and_the_model_stays_plain(monkeypatch):
    class Mixing:
        def __init__(self, model, cuts):
            pass

        def run_layers(self, h, *where):
            return h + len(h)

        def unembed(self, h):
            return h

    monkeypatch.setattr(compiled, "Graphs", Mixing)
    model = tiny_model(tiny_config())
    with pytest.raises(ValueError, match="keep apart"):
        compiled.compile_model(model, 1)
    assert not {"run_layers", "unembed"} & vars(model).keys()


@pytest.mark.parametrize("dtype, exit_layer", [(torch.float64, 1), (torch.float32, 3)])
def test_what_cannot_be_compiled_is_refused(dtype, exit_layer):
    with pytest.raises(ValueError, match=r"float32|exit layer"):
        compiled.compile_model(tiny_model(tiny_config(**CONFIG), dtype=dtype), exit_layer)


def test_graphs_are_compiled_once_for_the_same_weights(model, monkeypatch, capsys):
    again = tiny_model(model.config, damp_from=1, dtype=model.dtype)
    names = [compiled.fingerprint(again)]
    with monkeypatch.context() as patch:  # would be needed to compile anew
        patch.setattr(torch.export, "export", None)
        compiled.compile_model(again, 1)
    assert "compiling" not in capsys.readouterr().err
    _, logits = decoded(model, [3, 1, 4], exit_layer=1)
    assert torch.equal(decoded(again, [3, 1, 4], exit_layer=1)[1], logits)
    other = tiny_model(model.config, damp_from=1, dtype=model.dtype)
    other.model.layers[2].mlp.up_proj.weight.data[5, 5] += 1
    assert compiled.fingerprint(other) not in names


def test_this_pytorchs_products_have_what_is_changed_and_keep_it_elsewhere():
    with products.faster_products():
        gemm = import_module("torch._inductor.codegen.cpp_micro_gemm")
        kernel, configs = gemm.CppMicroGemmFP32Vec, gemm.micro_gemm_configs
        changed = kernel.TEMPLATE_KERNEL
        assert {c.register_blocking.block_m for c in configs[kernel]} == {4}
    assert 8 in {c.register_blocking.block_m for c in configs[kernel]}
    for old, new in products.CHANGES.items():
        assert old in kernel.TEMPLATE_KERNEL and new not in kernel.TEMPLATE_KERNEL
        assert new in changed
