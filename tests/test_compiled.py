"""Compiled decoding gives the full model's bits too, whoever drafts, in threads as well."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from helpers import tiny_config, tiny_model

from decode import Sampling, generate
from exact import pack
from extras import compiled
from extras.drafters import Jacobi, PromptLookup

CONFIG = dict(n_layers=3, n_heads=2, n_kv_heads=1, dim=32, hidden_dim=48, head_dim=16, max_len=150)


@pytest.fixture(scope="module", params=[torch.bfloat16, torch.float32], ids=str)
def model(request):
    """A compiled model; calling its graphs from C++ is left out, which halves the time it takes."""
    patch = pytest.MonkeyPatch()
    patch.setattr(compiled, "OPTIONS", {**compiled.OPTIONS, "cpp_wrapper": False})
    plain = tiny_model(tiny_config(**CONFIG), damp_from=1, dtype=request.param)
    yield compiled.compile_model(plain, 1)
    patch.undo()


def decoded(model, prompt, **how):
    rounds = list(generate(model, prompt, max_new_tokens=90, eos=(), **how))
    return [t for r in rounds for t in r.emitted], torch.cat([r.logits for r in rounds])


DRAFTERS = [
    *(dict(exit_layer=1, draft_len=d, min_confidence=c) for d, c in ((1, 0), (4, 0), (15, 0.1))),
    dict(drafter=PromptLookup, draft_len=9),
    dict(drafter=Jacobi, draft_len=3),
]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_compiled_tokens_and_logits_are_bitwise_the_plain_ones_whoever_drafts(model, temperature):
    for prompt in ([3, 1, 4], [7] * 40):
        sampling = Sampling(temperature, seed=3)
        tokens, logits = decoded(model, prompt, sampling=sampling)
        for how in DRAFTERS:
            again = decoded(model, prompt, sampling=sampling, **how)
            assert again[0] == tokens and torch.equal(again[1], logits), how


def test_compiled_logits_are_nearly_those_of_the_packed_model(model):
    packed = pack(tiny_model(tiny_config(**CONFIG), damp_from=1, dtype=model.dtype))
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
    with pytest.raises(ValueError, match="compiled for exits"):
        next(generate(model, [1, 2], exit_layer=2))


@pytest.mark.parametrize("dtype, exit_layer", [(torch.float64, 1), (torch.float32, 3)])
def test_what_cannot_be_compiled_is_refused(dtype, exit_layer):
    with pytest.raises(ValueError, match=r"float32|exit layer"):
        compiled.compile_model(tiny_model(tiny_config(**CONFIG), dtype=dtype), exit_layer)
