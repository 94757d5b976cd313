"""The contract: speculative decoding gives the bits of full-model decoding."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from helpers import reference_decode, tiny_config, tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st

from decode import Sampling, generate, new_cache
from drafters import AutoExit, EarlyExit, Jacobi, PromptLookup, SkipLayers, TwoModels
from kangaroo import Adapter, Kangaroo
from model import MAX_ROWS, Llama, RMSNorm, RowLinear, row_silu, safe_rows

pytestmark = pytest.mark.threads

DTYPES = [torch.float32, torch.bfloat16, torch.float64]


@st.composite
def cases(draw):
    """A random model, prompt and settings; max_len and the lengths are such that views of the cache, the end of the
    context and the end of the budget are crossed inside rounds."""
    n_layers, n_kv_heads = draw(st.integers(2, 8)), draw(st.sampled_from([1, 2, 3]))
    config = tiny_config(
        vocab_size=draw(st.sampled_from([5, 37, 200])),
        dim=draw(st.sampled_from([12, 24, 50, 64])),
        hidden_dim=draw(st.sampled_from([20, 33, 64, 100])),
        n_layers=n_layers,
        n_heads=n_kv_heads * draw(st.sampled_from([1, 2, 3, 4, 8])),
        n_kv_heads=n_kv_heads,
        head_dim=draw(st.sampled_from([4, 6, 16, 64])),
        max_len=draw(st.sampled_from([70, 150])),
        tied=draw(st.booleans()),
    )
    exit_layer = draw(st.integers(1, n_layers - 1))
    damping = draw(st.sampled_from([0.0, 0.03, 0.1, 0.3, 1.0]))
    model = tiny_model(config, draw(st.integers(0, 99)), exit_layer, damping, draw(st.sampled_from(DTYPES)))
    prompt = draw(st.lists(st.integers(0, config.vocab_size - 1), min_size=1, max_size=draw(st.sampled_from([1, 17, 66]))))
    temperature = draw(st.sampled_from([0.0, 0.0, 0.4, 1.0, 2.0]))
    sampling = Sampling(temperature, draw(st.sampled_from([0, 1, 4])), draw(st.sampled_from([1.0, 0.7])), draw(st.integers(0, 9)))
    how = dict(
        exit_layer=exit_layer,
        draft_len=draw(st.integers(1, 8)),
        min_confidence=draw(st.sampled_from([0.0, 0.0, 0.3, 0.8])),
        max_new_tokens=draw(st.sampled_from([1, 2, 9, 40, 80])),
        eos=tuple(draw(st.lists(st.integers(0, config.vocab_size - 1), max_size=1))),
    )
    return model, prompt, sampling, how


def smaller(model):
    """The model's first two layers as a model of their own: foresees some of its words."""
    config = replace(model.config, n_layers=min(2, model.config.n_layers))
    other = Llama(config).to(model.dtype).eval()
    other.load_state_dict({name: w for name, w in model.state_dict().items() if name in other.state_dict()})
    return other


def random_adapter(model, exit_layer: int):
    torch.manual_seed(1)
    return Adapter(model.config, exit_layer).to(model.dtype)


DRAFTERS = {  # who drafts -> drafter for an unpacked model whose layers from exit_layer on are damped
    "early exit": lambda model, exit_layer: partial(EarlyExit, exit_layer=exit_layer),
    "exit auto": lambda model, exit_layer: partial(AutoExit, exit_layer=exit_layer),
    "skip layers": lambda model, exit_layer: partial(SkipLayers, attention={model.config.n_layers - 1}, mlp=set(range(exit_layer, model.config.n_layers))),
    "two models": lambda model, exit_layer: partial(TwoModels, other=smaller(model)),
    "kangaroo": lambda model, exit_layer: partial(Kangaroo, adapter=random_adapter(model, exit_layer)),
    "prompt lookup": lambda model, exit_layer: PromptLookup,
    "jacobi": lambda model, exit_layer: Jacobi,
}


@pytest.mark.parametrize("who", DRAFTERS)
def test_tokens_logits_and_cache_are_bitwise_the_full_models_whoever_drafts(who):
    seen = set()

    @settings(max_examples=settings().max_examples if who == "early exit" else settings().max_examples // 4)
    @given(cases())
    def law(case):
        model, prompt, sampling, how = case
        drafter = DRAFTERS[who](model, how["exit_layer"])
        model.pack()
        tokens, logits, reference = reference_decode(model, prompt, how["max_new_tokens"], sampling, how["eos"])
        cache = new_cache(model.config, model.config.max_len, how["draft_len"], model.dtype, model.device)
        emitted, rows = [], []
        for r in generate(model, prompt, sampling=sampling, cache=cache, drafter=drafter, **how):
            emitted += r.emitted
            rows.append(r.logits)
            assert r.accepted in (len(r.emitted), len(r.emitted) - 1)
            assert cache.length == len(prompt) + len(emitted) - 1
            live = slice(0, cache.length)
            assert torch.equal(cache.keys[:, :, live], reference.keys[:, :, live])
            assert torch.equal(cache.values[:, :, live], reference.values[:, :, live])
            if r.drafted:
                seen.add("all" if r.accepted == len(r.drafted) else "some" if r.accepted else "none")
        assert emitted == tokens
        assert torch.equal(torch.cat(rows), logits)

    law()
    assert seen == {"all", "some", "none"}, "the examples must cover full, partial and no acceptance"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_draft_that_equals_the_full_model_is_always_accepted(dtype, temperature):
    """With later layers that add nothing, exit and full logits are the same: whatever rejects a token then is a bug in the
    draft (a wrong position of its noise, a missing key), which the output alone cannot show."""
    model = tiny_model(tiny_config(), damp_from=2, damping=0.0, dtype=dtype)
    rounds = list(generate(model, [3, 1, 4], exit_layer=2, draft_len=5, max_new_tokens=60, sampling=Sampling(temperature, seed=5), eos=()))
    assert [len(r.drafted) for r in rounds] == [5] * 10
    assert all(r.accepted == len(r.drafted) for r in rounds)


def test_a_confident_draft_stops_before_the_doubtful_token():
    model = tiny_model(tiny_config(), damp_from=2, damping=0.1)
    kept = list(generate(model, [3, 1], exit_layer=2, draft_len=8, max_new_tokens=80, min_confidence=0.25, eos=()))
    lengths = {len(r.drafted) for r in kept}
    assert min(lengths) < 8 and len(lengths) > 2
    probe = tiny_model(tiny_config(), damp_from=2, damping=0.1)
    tokens = [3, 1]
    for r in kept:  # by a full recomputation: every drafted token had more than 0.25 at the exit, the one after it had not
        for more in range(len(r.drafted) + 1):
            h = probe.run_layers(probe.embed(torch.tensor([tokens + r.drafted[:more]])), 0, 2)
            top = probe.unembed(h)[0, -1].softmax(-1).max().item()
            if more < len(r.drafted):
                assert top > 0.25 - 1e-4
            elif len(r.drafted) < 8 and len(tokens) + more < 2 + 80 - 1:
                assert top <= 0.25 + 1e-4
        tokens += r.emitted


@given(cases())
def test_early_exit_alone_is_the_first_layers_own_decoding(case):
    model, prompt, sampling, how = case
    model.pack()
    tokens, logits, _ = reference_decode(model, prompt, how["max_new_tokens"], sampling, how["eos"], depth=how["exit_layer"])
    rounds = list(generate(model, prompt, sampling=sampling, no_verify=True, **how))
    assert [t for r in rounds for t in r.emitted] == tokens
    assert torch.equal(torch.cat([r.logits for r in rounds]), logits)


@pytest.mark.parametrize("dtype", DTYPES)
def test_confident_exits_span_early_exit_alone_and_the_full_model(dtype):
    model = tiny_model(tiny_config(n_layers=8), damp_from=3, dtype=dtype)
    run = lambda **how: list(generate(model, [7, 3], max_new_tokens=40, eos=(), **how))
    ids = lambda rounds: [t for r in rounds for t in r.emitted]
    always, never, between = (run(exit_layer=2, exit_confidence=c) for c in (1e-9, 1.0, 0.2))
    assert ids(always) == ids(run(exit_layer=2, no_verify=True)) and {r.depth for r in always} == {2}
    assert ids(never) == ids(run()) and {r.depth for r in never} == {8}
    assert {2, 8} <= {r.depth for r in between} and ids(always) != ids(never)
    assert all(r.logits[0].float().softmax(-1).max() >= 0.19 for r in between if r.depth < 8)


def test_layers_that_a_token_skips_are_filled_as_if_it_had_entered_them():
    model = tiny_model(tiny_config()).pack()
    filled, run = (new_cache(model.config, 64, 1, model.dtype, model.device) for _ in range(2))
    h = torch.randn(3, 24)
    with torch.inference_mode():
        model.fill_layers(h, 2, 4, filled, 5)
        for layer in (2, 3):
            model.run_layers(h, layer, layer + 1, run, 5)
    assert torch.equal(filled.keys, run.keys) and torch.equal(filled.values, run.values) and filled.keys[3].any()


@pytest.mark.parametrize("limit", range(1, 12))
def test_a_round_never_emits_past_the_budget_the_context_or_the_end_of_text(limit):
    model = tiny_model(tiny_config(max_len=40), damp_from=1, damping=0.0)
    settings = dict(exit_layer=1, draft_len=5)
    run = lambda prompt, **more: [t for r in generate(model, prompt, **settings, **more) for t in r.emitted]
    assert len(run([7], max_new_tokens=limit, eos=())) == limit
    assert len(run([7] * (40 - limit), max_new_tokens=99, eos=())) == limit
    free = run([7], max_new_tokens=30, eos=())
    ended = run([7], max_new_tokens=30, eos=(free[limit],))
    assert ended == free[: free.index(free[limit]) + 1]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(64, 96), (256, 640), (192, 2048), (100, 33), (2048, 256)])
def test_a_packed_product_gives_a_row_the_same_bits_in_any_company(dtype, shape):
    inner, outer = shape
    torch.manual_seed(0)
    linear = torch.nn.Linear(inner, outer, bias=False, dtype=dtype)
    product = RowLinear(linear)
    x = torch.randn(MAX_ROWS, inner, dtype=dtype)
    with torch.inference_mode():
        full = product(x)
        for rows in range(1, MAX_ROWS + 1):
            for first in range(0, MAX_ROWS - rows + 1, 3):
                assert torch.equal(product(x[first : first + rows]), full[first : first + rows])
        tolerance = {torch.float32: 1e-4, torch.bfloat16: 0.1, torch.float64: 1e-12}[dtype]
        assert torch.allclose(full, linear(x), atol=tolerance)


@pytest.mark.parametrize("rows", [1, 4, 5, MAX_ROWS])
def test_a_short_pass_is_padded_to_the_safe_row_count(rows, monkeypatch):
    monkeypatch.setattr(RowLinear, "probed_rows", lambda self, way, weight: 5)
    plain, ran = torch.nn.Linear(12, 7, bias=False), []
    linear, x = RowLinear(plain), torch.randn(rows, 12)
    product = linear.product
    linear.product = lambda x: ran.append(len(x)) or product(x)
    torch.testing.assert_close(linear(x), plain(x).detach())
    assert ran == [max(rows, 5)]


def test_the_probe_finds_the_row_counts_whose_bits_differ():
    """A product that sums in another order below five rows is found out, and five is the answer."""

    def product(x):
        terms = x * torch.linspace(-1, 1, x.shape[1])
        return (terms if x.shape[0] >= 5 else terms.flip(-1)).cumsum(-1)[:, -1:]

    assert safe_rows(lambda weight: product, torch.zeros(1, 200, dtype=torch.float64)) == 5


def test_the_probe_finds_a_product_whose_bits_depend_on_the_place():
    def product(x):
        terms = x * torch.linspace(-1, 1, x.shape[1])
        return torch.stack([(row if i % 4 else row.flip(-1)).cumsum(-1)[-1:] for i, row in enumerate(terms)])

    assert safe_rows(lambda weight: product, torch.zeros(1, 200, dtype=torch.float64)) == 0


def test_the_probe_sees_an_order_of_summation_that_bfloat16_almost_hides():
    """One row summed in float32 from the other end: ordinary bfloat16 results agree, all but a few in ten thousand."""

    def make_product(weight):
        def product(x):
            terms = x.float()[:, None] * weight.float()
            return (terms if x.shape[0] > 1 else terms.flip(-1)).sum(-1).bfloat16()

        return product

    ordinary, x = torch.randn(64, 2048).bfloat16(), torch.randn(2, 2048).bfloat16()
    product = make_product(ordinary)
    assert (product(x)[:1] != product(x[:1])).float().mean() < 0.05
    assert safe_rows(make_product, ordinary) == 2


def test_the_probe_uses_all_bits_of_float64():
    """Products of numbers that float32 holds are exact in float64: with those, a fused multiply-add and a rounded product look alike."""

    def make_product(weight):
        def product(x):
            high = x.float().double() if x.shape[0] > 1 else x
            return (high[:, None] * weight + (x - high)[:, None] * weight).cumsum(-1)[..., -1]

        return product

    assert safe_rows(make_product, torch.zeros(64, 12, dtype=torch.float64)) != 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("dim", [4, 37, 192, 5000])
def test_a_packed_norm_is_the_norm_and_gives_a_row_the_same_bits_in_any_company(dim, dtype):
    norm, x = RMSNorm(dim, 1e-5).to(dtype), torch.randn(MAX_ROWS, dim, dtype=torch.float64).to(dtype)
    norm.weight.data.normal_()
    x[0] *= 1e-3  # where eps counts
    with torch.inference_mode():
        expected = norm(x)
        norm.pack()
        alone = torch.cat([norm(row.clone()) for row in x.split(1)])
        torch.testing.assert_close(alone, expected)
        for rows in range(1, MAX_ROWS + 1):
            for first in range(0, MAX_ROWS - rows + 1, 3):
                assert torch.equal(norm(x[first : first + rows]), alone[first : first + rows])


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("hidden_dim", [33, 4008, 11008])
def test_silu_gives_a_row_the_same_bits_in_any_company(hidden_dim, threads):
    before, gate = torch.get_num_threads(), torch.randn(MAX_ROWS, 2 * hidden_dim)
    torch.set_num_threads(threads)
    try:
        alone = torch.cat([row_silu(gate[i : i + 1, :hidden_dim]) for i in range(MAX_ROWS)])
        for rows in range(1, MAX_ROWS + 1):
            for first in range(0, MAX_ROWS - rows + 1, 3):
                assert torch.equal(row_silu(gate[first : first + rows, :hidden_dim]), alone[first : first + rows])
    finally:
        torch.set_num_threads(before)


def test_a_wide_model_is_exact_on_three_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        model = tiny_model(tiny_config(n_layers=2, hidden_dim=11008), damp_from=1, damping=0.3)
        full = torch.cat([r.logits for r in generate(model, [1, 2], max_new_tokens=24, eos=())])
        drafted = torch.cat([r.logits for r in generate(model, [1, 2], exit_layer=1, draft_len=7, max_new_tokens=24, eos=())])
        assert torch.equal(full, drafted)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("bad", [
    dict(exit_layer=4), dict(exit_layer=-1), dict(exit_layer=1, draft_len=0), dict(exit_layer=1, draft_len=MAX_ROWS),
    dict(max_new_tokens=0), dict(exit_layer=1, min_confidence=1.0), dict(no_verify=True), dict(exit_layer=1, min_confidence=-0.1),
])  # fmt: skip
def test_settings_that_cannot_run_are_refused_before_the_first_round(bad):
    with pytest.raises(ValueError):
        generate(tiny_model(tiny_config()), [1, 2], **bad)


def test_a_cache_that_is_used_or_too_small_is_refused():
    model = tiny_model(tiny_config())
    make = lambda length, draft_len: new_cache(model.config, length, draft_len, model.dtype, model.device)
    used = make(256, 6)
    used.accept(1)
    for cache in used, make(64, 6), make(256, 5):
        with pytest.raises(ValueError):
            generate(model, [1] * 30, exit_layer=1, draft_len=6, max_new_tokens=99, cache=cache)


@pytest.mark.parametrize("prompt", [[], [61], [-1], [0] * 256])
def test_prompts_that_cannot_run_are_refused_before_the_first_round(prompt):
    with pytest.raises(ValueError):
        generate(tiny_model(tiny_config()), prompt)
