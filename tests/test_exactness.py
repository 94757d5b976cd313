"""The contract: speculative decoding gives the bits of full-model decoding."""

import math
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from helpers import reference_decode, tiny_config, tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st

import decode
import exact
from cache import VIEW
from decode import Sampling, generate, new_cache
from exact import MAX_ROWS, PackedNorm, RowAttention, RowLinear, pack, row_silu, safe_rows
from extras.drafters import Jacobi, PromptLookup, SkipLayers, TwoModels
from extras.early_exit import keep_layers
from extras.kangaroo import Adapter, Kangaroo
from model import Llama, RMSNorm, rotate

threads = pytest.mark.threads
DTYPES = [torch.float32, torch.bfloat16, torch.float64]
SCALES = st.floats(-4, 2).map(lambda power: 10.0**power)  # of activations


@contextmanager
def on_threads(count):
    """Runs a block on `count` threads of torch."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


# --------------------------------------------------------------------------------------------------
# Whole generations


ONE_OR_ANY = st.just(1.0) | SCALES


@st.composite
def cases(draw, scale=ONE_OR_ANY):
    """A random model, prompt and settings of generate.

    The lengths are such that the ends of cache views, of the context and of the budget fall inside
    rounds. Half of the cases decode in passes of MAX_ROWS rows.
    """
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
        norm_eps=draw(st.sampled_from([1e-6, 1e-5, 1e-2, 1.0])),
        tied=draw(st.booleans()),
    )
    exit_layer = draw(st.integers(1, n_layers - 1))
    damping = draw(st.sampled_from([0.0, 0.03, 0.1, 0.3, 1.0]))
    scales = draw(st.tuples(scale, scale, scale))
    dtype = draw(st.sampled_from(DTYPES))
    model = tiny_model(config, draw(st.integers(0, 99)), exit_layer, damping, dtype, scales)
    longest = draw(st.sampled_from([1, 17, 66]))
    token = st.integers(0, config.vocab_size - 1)
    sampling = Sampling(
        draw(st.sampled_from([0.0, 0.0, 0.4, 1.0, 2.0])),
        draw(st.sampled_from([0, 1, 4])),
        draw(st.sampled_from([1.0, 0.7])),
        draw(st.integers(0, 9)),
    )
    how = dict(draft_len=MAX_ROWS - 1, min_confidence=0.0, max_new_tokens=60, eos=())
    if draw(st.booleans()):
        how = dict(
            draft_len=draw(st.integers(1, MAX_ROWS - 1)),
            min_confidence=draw(st.sampled_from([0.0, 0.0, 0.3, 0.8])),
            max_new_tokens=draw(st.sampled_from([1, 2, 9, 40, 80])),
            eos=tuple(draw(st.lists(token, max_size=1))),
        )
    prompt = draw(st.lists(token, min_size=1, max_size=longest))
    return how | dict(model=model, prompt_ids=prompt, sampling=sampling, exit_layer=exit_layer)


def random_adapter(model, exit_layer):
    torch.manual_seed(1)
    return Adapter(model.config, exit_layer).to(model.dtype)


def late_layers(model, exit_layer):
    layers = range(exit_layer, model.config.n_layers)
    return partial(SkipLayers, attention={layers[-1]}, mlp=set(layers))


DRAFTERS = {  # of a packed model whose layers from exit_layer on are damped
    "early exit": lambda model, exit_layer: None,
    "skip layers": late_layers,
    "two models": lambda model, _: partial(TwoModels, other=keep_layers(model, range(2))),
    "kangaroo": lambda model, e: partial(Kangaroo, adapter=random_adapter(model, e)),
    "prompt lookup": lambda model, exit_layer: PromptLookup,
    "jacobi": lambda model, exit_layer: Jacobi,
}


def watched(**request):
    """The rounds of generate, each with the cache that it works on."""
    caches = []

    def keep(*shape):
        caches.append(new_cache(*shape))
        return caches[-1]

    with mock.patch.object(decode, "new_cache", keep):
        for r in generate(**request):
            yield r, caches[0]


def emitted(rounds):
    return [token for r in rounds for token in r.emitted]


def logits_of(rounds):
    return torch.cat([r.logits for r in rounds])


WHO = [pytest.param(who, marks=threads if who == "early exit" else []) for who in DRAFTERS]


@pytest.mark.parametrize("who", WHO)
def test_tokens_logits_and_cache_are_bitwise_the_full_models_whoever_drafts(who):
    seen = set()
    share = 1 if who == "early exit" else 3

    @settings(max_examples=settings().max_examples // share)
    @given(cases())
    def law(case):
        model, prompt = pack(case["model"]), case["prompt_ids"]
        drafter = DRAFTERS[who](model, case["exit_layer"])
        about = case["max_new_tokens"], case["sampling"], case["eos"]
        tokens, logits, reference = reference_decode(model, prompt, *about)
        rounds = []
        for r, cache in watched(**case, drafter=drafter):
            rounds.append(r)
            assert r.accepted in (len(r.emitted), len(r.emitted) - 1)
            assert cache.length == len(prompt) + len(emitted(rounds)) - 1
            live = slice(0, cache.length)
            assert torch.equal(cache.keys[:, :, live], reference.keys[:, :, live])
            assert torch.equal(cache.values[:, :, live], reference.values[:, :, live])
            if r.drafted:
                every = r.accepted == len(r.drafted)
                seen.add("all" if every else "some" if r.accepted else "none")
        assert emitted(rounds) == tokens
        assert torch.equal(logits_of(rounds), logits)

    law()
    assert seen == {"all", "some", "none"}, "the examples must cover every fate of a draft"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [1e-4, 1e-3, 1e-2, 0.1, 1.0, 10.0, 100.0])
def test_passes_of_sixteen_rows_are_exact_at_any_scale_of_activations(dtype, scale):
    """Hidden states from far below to far above sqrt(eps) of the norms."""
    model = pack(tiny_model(tiny_config(), 0, 2, 0.3, dtype, scales=(scale, scale, 1.0)))
    how = dict(draft_len=MAX_ROWS - 1, max_new_tokens=60, eos=())
    plain = list(generate(model, [3, 1, 4], **how))
    drafted = list(generate(model, [3, 1, 4], exit_layer=2, **how))
    assert len(drafted[0].drafted) == MAX_ROWS - 1
    assert emitted(drafted) == emitted(plain)
    assert torch.equal(logits_of(drafted), logits_of(plain))


@settings(max_examples=settings().max_examples // 2)
@given(cases())
def test_an_early_exit_alone_is_the_first_layers_own_decoding(case):
    thin = keep_layers(pack(case["model"]), range(case["exit_layer"]))
    about = case["max_new_tokens"], case["sampling"], case["eos"]
    tokens, logits, _ = reference_decode(thin, case["prompt_ids"], *about)
    rounds = list(generate(**case | dict(model=thin, exit_layer=0)))
    assert emitted(rounds) == tokens
    assert torch.equal(logits_of(rounds), logits)


@settings(max_examples=settings().max_examples // 2)
@given(cases(scale=st.just(1.0)))  # at others attention may amplify rounding errors without bound
def test_an_unpacked_model_decodes_alike_where_no_two_logits_nearly_tie(case):
    model = case["model"].double()
    c, tokens, prompt = model.config, [], case["prompt_ids"]
    greedy = dict(sampling=Sampling(), eos=())
    for r in generate(**case | greedy):
        tokens += r.emitted
    with torch.inference_mode():
        rows = model(torch.tensor([prompt + tokens]))[0, len(prompt) - 1 : -1]
    assert len(tokens) == min(case["max_new_tokens"], c.max_len - len(prompt))
    for token, row in zip(tokens, rows):
        best, second = row.topk(2).values.tolist()
        if best - second < 1e-6 * abs(best):
            break
        assert token == row.argmax()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_draft_that_equals_the_full_model_is_always_accepted(dtype, temperature):
    """Later layers that add nothing make exit and full logits the same.

    What rejects a token then is a fault of the draft, which the output alone cannot show: noise of
    a wrong position, a missing key.
    """
    model = pack(tiny_model(tiny_config(), damp_from=2, damping=0.0, dtype=dtype))
    how = dict(exit_layer=2, draft_len=5, max_new_tokens=60, eos=())
    rounds = list(generate(model, [3, 1, 4], sampling=Sampling(temperature, seed=5), **how))
    assert [len(r.drafted) for r in rounds] == [5] * 10
    assert all(r.accepted == len(r.drafted) for r in rounds)


def test_a_confident_draft_stops_before_the_doubtful_token():
    """By a full recomputation: each drafted token was surer than 0.25, the one after it was not."""
    model, tokens = tiny_model(tiny_config(), damp_from=2), [3, 1]
    how = dict(exit_layer=2, draft_len=8, max_new_tokens=80, min_confidence=0.25, eos=())
    rounds = list(generate(model, tokens, **how))
    lengths = {len(r.drafted) for r in rounds}
    assert min(lengths) < 8 and len(lengths) > 2
    for r in rounds:
        for more in range(len(r.drafted) + 1):
            h = model.embed(torch.tensor([tokens + r.drafted[:more]]))
            top = model.unembed(model.run_layers(h, 0, 2))[0, -1].softmax(-1).max().item()
            if more < len(r.drafted):
                assert top > 0.25 - 1e-4
            elif len(r.drafted) < 8 and len(tokens) + more < 2 + 80 - 1:
                assert top <= 0.25 + 1e-4
        tokens = tokens + r.emitted


@pytest.mark.parametrize("limit", range(1, 12))
def test_a_round_never_emits_past_the_budget_the_context_or_the_end_of_text(limit):
    model = pack(tiny_model(tiny_config(max_len=40), damp_from=1, damping=0.0))

    def run(prompt, count, eos=()):
        how = dict(exit_layer=1, draft_len=5, max_new_tokens=count, eos=eos)
        return emitted(generate(model, prompt, **how))

    assert len(run([7], limit)) == limit
    assert len(run([7] * (40 - limit), 99)) == limit
    free = run([7], 30)
    assert run([7], 30, (free[limit],)) == free[: free.index(free[limit]) + 1]


@threads
def test_eight_generations_in_threads_give_the_texts_that_they_give_alone():
    model = pack(tiny_model(tiny_config(max_len=2048), damp_from=2, damping=0.3))

    def text(number):
        settings = dict(exit_layer=1 + number % 3, draft_len=1 + number, eos=())
        sampling = Sampling(number % 2, seed=number)
        prompt = [number + 1] * (1 + 40 * number)
        rounds = list(generate(model, prompt, sampling=sampling, max_new_tokens=150, **settings))
        return emitted(rounds), logits_of(rounds)

    together = list(ThreadPoolExecutor(8).map(text, range(8)))
    for number, (tokens, logits) in enumerate(together):
        alone = text(number)
        assert tokens == alone[0] and torch.equal(logits, alone[1])


def test_generators_that_take_turns_on_one_model_share_no_cache():
    model = pack(tiny_model(tiny_config(max_len=256), damp_from=2, damping=0.3))

    def start(number):
        settings = dict(exit_layer=number % 3, draft_len=3, eos=())
        return generate(model, [number + 1] * (1 + 7 * number), max_new_tokens=60, **settings)

    begun, texts = {number: start(number) for number in range(4)}, {}
    while begun:  # a round of each in turn
        for number, rounds in list(begun.items()):
            found = next(rounds, None)
            if found is None:
                del begun[number]
            else:
                texts.setdefault(number, []).append(found)
    for number, rounds in texts.items():
        alone = list(start(number))
        assert emitted(rounds) == emitted(alone)
        assert torch.equal(logits_of(rounds), logits_of(alone))
    with pytest.raises(TypeError, match="cache"):  # what a caller could share is not to be had
        next(generate(model, [1], cache=None))


# --------------------------------------------------------------------------------------------------
# Rows in company: every operation of a pass gives a row the bits that it gives it alone


def same_in_any_company(operation):
    """operation(first, last) -> results (last - first, ...) of these of MAX_ROWS rows."""
    with torch.inference_mode():
        alone = torch.cat([operation(i, i + 1) for i in range(MAX_ROWS)])
        for count in range(2, MAX_ROWS + 1):
            for first in range(MAX_ROWS - count + 1):
                together = operation(first, first + count)
                assert torch.equal(together, alone[first : first + count]), (first, count)


def random_rows(generator, dtype, *shape):
    """MAX_ROWS rows, each with a scale of its own from 1e-4 to 1e2."""
    scale = 10 ** (torch.rand(MAX_ROWS, *[1] * len(shape), generator=generator) * 6 - 4)
    x = torch.randn(MAX_ROWS, *shape, generator=generator, dtype=torch.float64)
    return (x * scale).to(dtype)


THREADS = [1, pytest.param(2, marks=threads), pytest.param(3, marks=threads)]
generators = st.integers(0, 9999).map(lambda seed: torch.Generator().manual_seed(seed))
dtypes = st.sampled_from(DTYPES)
widths = st.integers(1, 300) | st.sampled_from([576, 2048, 5000])


@given(generators, dtypes, widths, SCALES, st.sampled_from([1e-6, 1e-5, 1e-2]))
def test_a_packed_norm_is_the_norm_and_keeps_rows_apart(generator, dtype, dim, scale, eps):
    norm, x = RMSNorm(dim, eps).to(dtype), random_rows(generator, dtype, dim)
    norm.weight.data.normal_(generator=generator).mul_(scale)
    packed = PackedNorm(norm)
    torch.testing.assert_close(packed(x), norm(x).detach())
    same_in_any_company(lambda first, last: packed(x[first:last]))


@pytest.mark.parametrize("count", THREADS)
@given(generators, dtypes, widths | st.sampled_from([4008, 11008]))
def test_silu_keeps_rows_apart(count, generator, dtype, hidden_dim):
    rows = random_rows(generator, dtype, 2 * hidden_dim)
    with on_threads(count):
        torch.testing.assert_close(row_silu(rows), F.silu(rows.double()).to(dtype))
        same_in_any_company(lambda first, last: row_silu(rows[first:last].chunk(2, -1)[0]))


@given(generators, dtypes, st.integers(1, 9), st.integers(1, 40), st.integers(0, 200))
def test_rotation_residual_sums_and_gates_keep_rows_apart(generator, dtype, heads, half, start):
    config = tiny_config(n_heads=heads, n_kv_heads=1, head_dim=2 * half, n_layers=1)
    model = tiny_model(config, dtype=dtype)
    x, y = (random_rows(generator, dtype, heads, 2 * half) for _ in range(2))
    same_in_any_company(lambda i, j: rotate(x[i:j], *model.rotary(start + i, j - i)))
    same_in_any_company(lambda i, j: x[i:j] + y[i:j])
    same_in_any_company(lambda i, j: x[i:j] * y[i:j])


@pytest.mark.parametrize("count", THREADS)
@settings(max_examples=settings().max_examples // 4)
@given(
    generators,
    dtypes,
    st.integers(1, 3),
    st.integers(1, 9),
    st.sampled_from([2, 4, 6, 16, 64, 80]),
    st.integers(0, 3 * VIEW - MAX_ROWS),
)
def test_attention_keeps_rows_apart(count, generator, dtype, groups, heads, head_dim, start):
    """Over scores that are flat, ordinary and saturated, and over the end of a view."""
    cache = new_cache(
        tiny_config(n_layers=1, n_heads=groups * heads, n_kv_heads=groups, head_dim=head_dim),
        *(3 * VIEW, 0, dtype, torch.device("cpu")),
    )
    for x in (cache.keys, cache.values):
        x.copy_(torch.randn(x.shape, generator=generator))
    q = random_rows(generator, dtype, groups * heads, head_dim)
    k, v = (random_rows(generator, dtype, groups, head_dim) for _ in range(2))

    def attend(first, last):
        attention = RowAttention(cache, start + first, last - first)
        return attention(0, q[first:last], k[first:last], v[first:last])

    with on_threads(count):
        same_in_any_company(attend)


@pytest.mark.parametrize("count", THREADS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(64, 96), (256, 640), (192, 2048), (100, 33), (2048, 256)])
def test_a_product_of_rows_keeps_them_apart(dtype, shape, count):
    linear = torch.nn.Linear(*shape, bias=False, dtype=dtype)
    with on_threads(count):
        product = RowLinear({}, linear)
        x = random_rows(torch.Generator().manual_seed(0), dtype, shape[0])
        expected = linear(x).detach()
        torch.testing.assert_close(product(x), expected, rtol=2**-7, atol=1e-3)
        same_in_any_company(lambda first, last: product(x[first:last]))


def test_linear_layers_of_one_input_are_one_product_of_it():
    layers, x = [torch.nn.Linear(12, out, bias=False) for out in (5, 3, 8)], torch.randn(4, 12)
    expected = torch.cat([layer(x) for layer in layers], -1).detach()
    torch.testing.assert_close(RowLinear({}, *layers)(x), expected)


@pytest.mark.parametrize("rows", [1, 4, 5, MAX_ROWS])
def test_a_short_pass_is_padded_to_the_safe_row_count(rows, monkeypatch):
    monkeypatch.setattr(exact, "safe_rows", lambda way, weight: 5)
    plain, ran = torch.nn.Linear(12, 7, bias=False), []
    linear, x = RowLinear({}, plain), torch.randn(rows, 12)
    product = linear.product
    linear.product = lambda x: ran.append(len(x)) or product(x)
    torch.testing.assert_close(linear(x), plain(x).detach())
    assert ran == [max(rows, 5)]


def test_where_no_row_count_is_safe_each_row_runs_alone(monkeypatch):
    monkeypatch.setattr(exact, "safe_rows", lambda way, weight: 0)
    plain, ran = torch.nn.Linear(12, 7, bias=False), []
    linear, x = RowLinear({}, plain), torch.randn(5, 12)
    product = linear.product
    linear.product = lambda x: ran.append(len(x)) or product(x)
    torch.testing.assert_close(linear(x), plain(x).detach())
    assert ran == [1] * 5


def test_one_probe_serves_all_weights_of_a_shape(monkeypatch):
    tried = []
    monkeypatch.setattr(exact, "safe_rows", lambda way, weight: tried.append(weight.shape) or 1)
    pack(tiny_model(tiny_config(n_layers=6)))
    assert len(tried) == len(set(tried)) == 5  # qkv, o, gate and up, down, head


def test_the_probe_finds_the_row_counts_whose_bits_differ():
    """A product that sums in another order below five rows is found out, and five is the answer."""

    def product(x):
        terms = x * torch.linspace(-1, 1, x.shape[1])
        return (terms if x.shape[0] >= 5 else terms.flip(-1)).cumsum(-1)[:, -1:]

    assert safe_rows(lambda weight: product, torch.zeros(1, 200, dtype=torch.float64)) == 5


def test_the_probe_finds_a_product_whose_bits_depend_on_the_place():
    def product(x):
        terms = x * torch.linspace(-1, 1, x.shape[1])
        rows = [row if i % 4 else row.flip(-1) for i, row in enumerate(terms)]
        return torch.stack(rows).cumsum(-1)[:, -1:]

    assert safe_rows(lambda weight: product, torch.zeros(1, 200, dtype=torch.float64)) == 0


def test_the_probe_sees_an_order_of_summation_that_bfloat16_almost_hides():
    """A single row is summed from the other end; few bfloat16 results of random inputs differ."""

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
    """Products of float32 numbers are exact in float64: they hide a fused multiply-add."""

    def make_product(weight):
        def product(x):
            high = x.float().double() if x.shape[0] > 1 else x
            return (high[:, None] * weight + (x - high)[:, None] * weight).cumsum(-1)[..., -1]

        return product

    assert safe_rows(make_product, torch.zeros(64, 12, dtype=torch.float64)) != 1


@pytest.mark.parametrize("count", THREADS[1:])
def test_a_wide_model_is_exact_on_several_threads(count):
    with on_threads(count):
        config = tiny_config(n_layers=2, hidden_dim=11008)
        model = pack(tiny_model(config, damp_from=1, damping=0.3))
        how = dict(draft_len=15, max_new_tokens=34, eos=())
        plain, drafted = (generate(model, [1, 2], exit_layer=e, **how) for e in (0, 1))
        assert torch.equal(logits_of(plain), logits_of(drafted))


def test_packing_twice_is_packing_once_and_keeps_the_function():
    model, tokens = tiny_model(tiny_config(), dtype=torch.float64), torch.arange(9)[None]
    expected = model(tokens).detach()
    assert pack(model) is model
    modules = list(model.modules())
    assert pack(model) is model and list(model.modules()) == modules
    torch.testing.assert_close(model(tokens), expected)


# --------------------------------------------------------------------------------------------------
# What cannot run


@pytest.mark.parametrize("name, bad", [
    ("exit layer", dict(exit_layer=4)),
    ("exit layer", dict(exit_layer=-1)),
    ("exit layer", dict(exit_layer=1.0)),
    ("exit layer", dict(exit_layer=True)),
    ("exit layer", dict(exit_layer=torch.tensor(1))),
    ("draft length", dict(exit_layer=1, draft_len=0)),
    ("draft length", dict(exit_layer=1, draft_len=MAX_ROWS)),
    ("draft length", dict(exit_layer=1, draft_len=2.5)),
    ("draft length", dict(exit_layer=1, draft_len=True)),
    ("draft length", dict(drafter=PromptLookup, draft_len=MAX_ROWS)),
    ("new tokens", dict(max_new_tokens=0)),
    ("new tokens", dict(max_new_tokens=9.0)),
    ("confidence", dict(exit_layer=1, min_confidence=1.0)),
    ("confidence", dict(exit_layer=1, min_confidence=-0.1)),
    ("confidence", dict(exit_layer=1, min_confidence=math.nan)),
    ("confidence", dict(min_confidence="a")),
    ("draft length", dict(draft_len="x")),
    ("sampling", dict(sampling=None)),
    ("eos", dict(eos=5)),
    ("prompt", dict(prompt_ids=[])),
    ("prompt", dict(prompt_ids=[61])),
    ("prompt", dict(prompt_ids=[-1])),
    ("prompt", dict(prompt_ids=[0] * 256)),
    ("prompt", dict(prompt_ids=torch.tensor([1, 2]))),
    ("prompt", dict(prompt_ids=[torch.tensor(1)])),
    ("prompt", dict(prompt_ids="text")),
    ("prompt", dict(prompt_ids=[True])),
    ("prompt", dict(prompt_ids=[1.0])),
])  # fmt: skip
def test_a_request_that_cannot_run_is_refused_at_the_first_round_in_one_clear_line(name, bad):
    model = tiny_model(tiny_config())
    with pytest.raises((TypeError, ValueError), match=name) as refused:
        next(generate(**dict(model=model, prompt_ids=[1, 2]) | bad))
    assert str(refused.value).isprintable() and len(str(refused.value)) < 120


def test_a_model_whose_rows_are_summed_by_several_threads_is_not_packed():
    with torch.device("meta"):
        wide = Llama(tiny_config(dim=1 << 15, n_layers=1))
    with pytest.raises(ValueError, match="no-exact"):
        pack(wide)
