"""Compiled decoding gives the full model's bits too, whoever drafts, in threads as well."""

from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib import import_module
from itertools import product
from pathlib import Path

import pytest
import torch
from helpers import DRAFTERS, SMALL, decode, same_bits, tiny_config, tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from decode import Sampling, generate
from exact import pack
from extras import compiled, products

CONFIG = SMALL | dict(max_len=150)
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


@settings(max_examples=max(settings().max_examples // 2, 1))
@given(
    st.lists(st.integers(0, 60), min_size=1, max_size=66),
    st.sampled_from([0.0, 0.0, 1.0]),
    st.lists(DRAFTS, min_size=3, max_size=3),
)
def test_compiled_is_bitwise_plain_whoever_drafts(model, prompt, temperature, drafts):
    sampling = Sampling(temperature, seed=3)
    plain = decode_90(model, prompt, sampling=sampling)
    for who, length, confidence in drafts:
        how = DRAFTERS[who](model, 1) | length | confidence
        assert same_bits(decode_90(model, prompt, sampling=sampling, **how), plain), who


def test_compiled_logits_are_near_packed_ones(model):
    packed = pack(tiny_model(model.config, damp_from=1, dtype=model.dtype))
    (tokens, logits, _), (others, expected, _) = (decode(m, [3, 1, 4]) for m in (model, packed))
    same = next((i for i, (a, b) in enumerate(zip(tokens, others)) if a != b), len(tokens)) + 1
    tolerance = 0.3 if model.dtype == torch.bfloat16 else 1e-4
    assert same > 2
    torch.testing.assert_close(logits[:same], expected[:same], atol=tolerance, rtol=0)


def test_threads_do_not_mix_their_texts(model):
    text = lambda p: decode_90(model, [p, 2, 5], exit_layer=p % 2, draft_len=4)
    with ThreadPoolExecutor(4) as threads:
        assert all(map(same_bits, threads.map(text, range(8)), map(text, range(8))))


@pytest.mark.parametrize("exit_layer", [0, 2])
def test_logits_do_not_depend_on_the_exit(model, exit_layer):
    """So `--full --compile` and `--exit E --compile` of two commands agree."""
    whole = tiny_model(model.config, damp_from=1, dtype=model.dtype)
    compiled.compile_model(whole, exit_layer)
    assert same_bits(decode_90(whole, [3, 1, 4]), decode_90(model, [3, 1, 4], exit_layer=1))


def test_a_pass_within_a_graph_is_refused(model, monkeypatch):
    monkeypatch.setattr(model.run_layers.__self__, "group", 3)
    with pytest.raises(ValueError, match="run by 3"):
        next(generate(model, [1], exit_layer=2))


def test_rows_that_mix_leave_the_model_plain(monkeypatch):
    class Mixing:
        def __init__(self, model, group):
            self.plain, self.unembed = model.run_layers, model.unembed

        def run_layers(self, h, *where):
            return self.plain(h, *where) + 1e-4 * len(h)

    monkeypatch.setattr(compiled, "Graphs", Mixing)
    model = tiny_model()
    with pytest.raises(ValueError, match="keep apart"):
        compiled.compile_model(model, 1)
    assert not {"run_layers", "unembed"} & vars(model).keys()


def test_wrong_logits_leave_the_model_plain(model, monkeypatch):
    wrong = lambda weight, shape, pairs: torch.zeros(shape, dtype=weight.dtype)
    monkeypatch.setattr(compiled, "in_blocks", wrong)
    with pytest.raises(ValueError, match="not the model's"):
        compiled.compile_model(tiny_model(model.config, dtype=model.dtype), 1)


@pytest.mark.parametrize("dtype, exit_layer", [(torch.float64, 1), (torch.float32, 3)])
def test_what_cannot_be_compiled_is_refused(dtype, exit_layer):
    with pytest.raises(ValueError, match=r"float32|exit layer"):
        compiled.compile_model(tiny_model(tiny_config(**CONFIG), dtype=dtype), exit_layer)


def test_a_shape_is_compiled_once(model, monkeypatch, capsys):
    again = tiny_model(model.config, damp_from=1, dtype=model.dtype)
    other = tiny_model(model.config, seed=5, dtype=model.dtype)
    monkeypatch.setattr(torch.export, "export", None)  # would be needed to compile anew
    for one in (again, other):
        compiled.compile_model(one, 1)
    assert "compiling" not in capsys.readouterr().err
    assert same_bits(decode(again, [3, 1, 4], exit_layer=1), decode(model, [3, 1, 4]))
    assert not same_bits(decode(other, [3, 1, 4]), decode(model, [3, 1, 4]))


def test_a_missing_or_damaged_graph_is_made_again(model, tmp_path, monkeypatch):
    folder = Path(compiled.cache_dir()) / "layerskip" / compiled.fingerprint(model)
    sound = {tmp_path / file.name: file.read_bytes() for file in folder.glob("the head.*")}
    head, x = nn.Sequential(model.norm, model.lm_head), torch.ones(2, 32, dtype=model.dtype)
    compilations = []

    def compile_again(file, *_):  # what compiling would write
        compilations.append(file)
        for name in sound:
            name.write_bytes(sound[name])

    monkeypatch.setattr(compiled, "compile_graph", compile_again)
    for number, (file, length) in enumerate(product(sound, (0, 9, 1000, 20_000)), 1):
        file.write_bytes(sound[file][: min(length, len(sound[file]) - 9)])
        for _ in range(2):
            graph = compiled.graph_of(tmp_path / "the head.pt2", head, (), ())
            assert torch.equal(graph([x]), model.unembed(x))
        assert len(compilations) == number


def test_products_are_changed_and_put_back():
    with products.faster_products():
        gemm = import_module("torch._inductor.codegen.cpp_micro_gemm")
        kernel, configs = gemm.CppMicroGemmFP32Vec, gemm.micro_gemm_configs
        changed = kernel.TEMPLATE_KERNEL
        assert {c.register_blocking.block_m for c in configs[kernel]} == {4}
    assert 8 in {c.register_blocking.block_m for c in configs[kernel]}
    for old, new in products.CHANGES.items():
        assert old in kernel.TEMPLATE_KERNEL and new not in kernel.TEMPLATE_KERNEL
        assert new in changed
