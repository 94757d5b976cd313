"""The contract: speculative decoding gives the bits of full-model decoding."""

import math
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import zip_longest
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from helpers import (
    DRAFTERS,
    DTYPES,
    decode,
    fates,
    on_threads,
    reference_decode,
    same_bits,
    text_of,
    tiny_config,
    tiny_model,
)
from hypothesis import given, settings
from hypothesis import strategies as st

import decode as front
import exact
from decode import Sampling, generate, new_cache
from exact import (
    BLOCK_ROWS,
    MAX_ROWS,
    VIEW,
    PackedNorm,
    RowLinear,
    pack,
    row_silu,
    safe_padding,
)
from extras.early_exit import keep_layers
from model import Llama, RMSNorm, rotate
from support.trials import safe_rows

threads = pytest.mark.threads
SCALES = st.floats(-4, 2).map(lambda power: 10.0**power)  # of activations


def part(share):
    """A law on one in so many of the usual number of examples."""
    return settings(max_examples=max(settings().max_examples // share, 1))


# --------------------------------------
# Whole generations


@st.composite
def cases(draw):
    """A random model, prompt and settings of generate.

    The lengths are such that the ends of cache views, of the context and of the budget fall inside
    rounds. Half of the cases decode in passes of MAX_ROWS rows.
    """
    pick = lambda *choices: draw(st.sampled_from(choices))
    n_layers, n_kv_heads = draw(st.integers(2, 8)), pick(1, 2, 3)
    config = tiny_config(
        vocab_size=pick(5, 37, 200),
        dim=pick(12, 24, 50, 64),
        hidden_dim=pick(20, 33, 64, 100),
        n_layers=n_layers,
        n_heads=n_kv_heads * pick(1, 2, 3, 4, 8),
        n_kv_heads=n_kv_heads,
        head_dim=pick(4, 6, 16, 64),
        max_len=pick(70, 150),
        norm_eps=pick(1e-6, 1e-5, 1e-2, 1.0),
        tied=draw(st.booleans()),
    )
    exit_layer, damping = draw(st.integers(1, n_layers - 1)), pick(0.0, 0.03, 0.1, 0.3, 1.0)
    scale, seed = st.just(1.0) | SCALES, draw(st.integers(0, 99))
    scales = draw(st.tuples(scale, scale, scale))
    model = tiny_model(config, seed, exit_layer, damping, pick(*DTYPES), scales)
    token = st.integers(0, config.vocab_size - 1)
    how = dict(draft_len=MAX_ROWS - 1, min_confidence=0.0, max_new_tokens=60, eos=())
    if draw(st.booleans()):
        how = dict(
            draft_len=draw(st.integers(1, MAX_ROWS - 1)),
            min_confidence=pick(0.0, 0.0, 0.3, 0.8),
            max_new_tokens=pick(1, 2, 9, 40, 80),
            eos=tuple(draw(st.lists(token, max_size=1))),
        )
    how["sampling"] = Sampling(pick(0.0, 0.0, 0.4, 1.0, 2.0), pick(0, 1, 4), pick(1.0, 0.7), seed)
    prompt = draw(st.lists(token, min_size=1, max_size=pick(1, 17, 66)))
    return how | dict(model=model, prompt_ids=prompt, exit_layer=exit_layer)


def by_hand(case, model):
    about = case["max_new_tokens"], case["sampling"], case["eos"]
    return reference_decode(model, case["prompt_ids"], *about)


def watched(**request):
    """The rounds of generate, each with the cache that it works on."""
    caches, make = [], front.new_cache
    keep = lambda *shape: caches.append(make(*shape)) or caches[-1]
    with mock.patch.object(front, "new_cache", keep):
        for r in generate(**request):
            yield r, caches[0]


WHO = [pytest.param(who, marks=threads if who == "early exit" else []) for who in DRAFTERS]


@pytest.mark.parametrize("who", WHO)
def test_bitwise_plain_whoever_drafts(who):
    seen = set()

    @part(1 if who == "early exit" else 3)
    @given(cases())
    def law(case):
        model, prompt = pack(case["model"]), case["prompt_ids"]
        drafter = DRAFTERS[who](model, case.pop("exit_layer"))
        plain, rounds = by_hand(case, model), []
        for r, cache in watched(**case, **drafter):
            rounds.append(r)
            assert len(r.emitted) - r.accepted in (0, 1)
            assert cache.length == len(prompt) + len(text_of(rounds).ids) - 1
            for ours, reference in ((cache.keys, plain[2].keys), (cache.values, plain[2].values)):
                assert torch.equal(ours[:, :, : cache.length], reference[:, :, : cache.length])
        assert same_bits(text_of(rounds), plain)
        seen.update(fates(rounds))

    law()
    assert seen == {"all", "some", "none"}, "the examples must cover every fate of a draft"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [1e-4, 1e-3, 1e-2, 0.1, 1.0, 10.0, 100.0])
def test_sixteen_rows_are_exact_at_any_scale(dtype, scale):
    """Hidden states from far below to far above sqrt(eps) of the norms."""
    model = pack(tiny_model(None, 0, 2, 0.3, dtype, scales=(scale, scale, 1.0)))
    drafted = decode(model, [3, 1, 4], exit_layer=2, draft_len=MAX_ROWS - 1)
    assert len(drafted.rounds[0].drafted) == MAX_ROWS - 1
    assert same_bits(drafted, decode(model, [3, 1, 4]))


@part(4)
@given(cases())
def test_an_exit_alone_is_its_layers_own_decoding(case):
    thin = keep_layers(pack(case["model"]), range(case["exit_layer"]))
    found = text_of(generate(**case | dict(model=thin, exit_layer=0)))
    assert same_bits(found, by_hand(case, thin))


# The output alone cannot show a fault of the draft, such as noise of a wrong position or a missing
# key. But if later layers add nothing, exit and full logits are the same, and none is rejected.
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("who", ["early exit", "two models", "skip layers"])
def test_a_draft_by_the_model_is_always_right(who, dtype, temperature):
    model = pack(tiny_model(damp_from=2, damping=0.0, dtype=dtype))
    how = DRAFTERS[who](model, 2) | dict(sampling=Sampling(temperature, seed=5))
    rounds = decode(model, [3, 1, 4], **how).rounds
    assert [len(r.drafted) for r in rounds] == [r.accepted for r in rounds] == [5] * 10


def test_a_draft_stops_before_the_doubtful_token():
    """By a full recomputation: each drafted token was surer than 0.25, the one after it was not."""
    model, tokens = tiny_model(damp_from=2), [3, 1]
    how = dict(exit_layer=2, draft_len=8, max_new_tokens=80, min_confidence=0.25)
    rounds = decode(model, tokens, **how).rounds
    lengths = {len(r.drafted) for r in rounds}
    assert min(lengths) < 8 and len(lengths) > 2
    for r in rounds:
        text, drafted = tokens + r.drafted, len(r.drafted)
        h = model.run_layers(model.embed(torch.tensor([text])), 0, 2)
        sure = model.unembed(h)[0, len(tokens) - 1 :].softmax(-1).amax(-1)
        assert (sure[:drafted] > 0.25 - 1e-4).all()
        assert drafted == 8 or len(text) == 2 + 80 - 1 or sure[drafted] <= 0.25 + 1e-4
        tokens = tokens + r.emitted


@pytest.mark.parametrize("limit", range(1, 12))
def test_a_round_ends_with_budget_context_and_text(limit):
    model = pack(tiny_model(tiny_config(max_len=40), damp_from=1, damping=0.0))
    run = lambda prompt, **how: decode(model, prompt, exit_layer=1, **how).ids
    assert len(run([7], max_new_tokens=limit)) == limit
    assert len(run([7] * (40 - limit))) == limit
    free = run([7], max_new_tokens=30)
    ended = run([7], max_new_tokens=30, eos=(free[limit],))
    assert ended == free[: free.index(free[limit]) + 1]


def requests(count):
    """Requests of different lengths, exits, drafts and samplings."""
    for n in range(count):
        how = dict(exit_layer=n % 4, draft_len=1 + n, sampling=Sampling(n % 2, seed=n))
        yield dict(prompt_ids=[n + 1] * (1 + 40 * n), max_new_tokens=150, eos=()) | how


@threads
def test_threads_write_what_each_writes_alone():
    model = pack(tiny_model(tiny_config(max_len=2048), damp_from=2, damping=0.3))
    text = lambda how: text_of(generate(model, **how))
    assert all(map(same_bits, ThreadPoolExecutor(8).map(text, requests(8)), map(text, requests(8))))


def test_generators_that_take_turns_share_no_cache():
    model = pack(tiny_model(tiny_config(max_len=512), damp_from=2, damping=0.3))
    turns = zip_longest(*(generate(model, **how) for how in requests(4)))  # a round of each
    for how, rounds in zip(requests(4), zip(*turns), strict=True):
        assert same_bits(text_of(filter(None, rounds)), text_of(generate(model, **how)))
    with pytest.raises(TypeError, match="cache"):  # what a caller could share is not to be had
        next(generate(model, [1], cache=None))


# --------------------------------------
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


@part(2)
@given(generators, dtypes, widths, SCALES, st.sampled_from([1e-6, 1e-5, 1e-2]))
def test_a_packed_norm_keeps_rows_apart(generator, dtype, dim, scale, eps):
    norm, x = RMSNorm(dim, eps).to(dtype), random_rows(generator, dtype, dim)
    norm.weight.data.normal_(generator=generator).mul_(scale)
    packed = PackedNorm(norm)
    torch.testing.assert_close(packed(x), norm(x).detach())
    same_in_any_company(lambda first, last: packed(x[first:last]))


@pytest.mark.parametrize("count", THREADS)
@part(2)
@given(generators, dtypes, widths | st.sampled_from([4008, 11008]))
def test_silu_keeps_rows_apart(count, generator, dtype, hidden_dim):
    rows = random_rows(generator, dtype, 2 * hidden_dim)
    with on_threads(count):
        torch.testing.assert_close(row_silu(rows), F.silu(rows.double()).to(dtype))
        same_in_any_company(lambda first, last: row_silu(rows[first:last].chunk(2, -1)[0]))


@part(2)
@given(generators, dtypes, st.integers(1, 9), st.integers(1, 40), st.integers(0, 200))
def test_rotation_sums_and_gates_keep_rows_apart(generator, dtype, heads, half, start):
    config = tiny_config(n_heads=heads, n_kv_heads=1, head_dim=2 * half, n_layers=1)
    model = tiny_model(config, dtype=dtype)
    x, y = (random_rows(generator, dtype, heads, 2 * half) for _ in range(2))
    same_in_any_company(lambda i, j: rotate(x[i:j], *model.rotary(start + i, j - i)))
    same_in_any_company(lambda i, j: x[i:j] + y[i:j])
    same_in_any_company(lambda i, j: x[i:j] * y[i:j])


# 1 to 16 rows over scores that are flat, ordinary and saturated. From most starts some pass looks
# over the end of a view; the model gives them the width that it found safe.
@pytest.mark.parametrize("count", THREADS)
@part(4)
@given(
    generators,
    dtypes,
    st.integers(1, 3),
    st.integers(1, 9),
    st.sampled_from([2, 4, 6, 16, 64, 80]),
    st.integers(0, 3 * VIEW - MAX_ROWS) | st.integers(VIEW - MAX_ROWS, VIEW),
)
def test_attention_keeps_rows_apart(count, generator, dtype, groups, heads, head_dim, start):
    shape = dict(n_layers=1, n_heads=groups * heads, n_kv_heads=groups, head_dim=head_dim)
    with on_threads(count):
        model = pack(tiny_model(tiny_config(**shape), dtype=dtype))
        cache = new_cache(model, 3 * VIEW, 0)
        for x in (cache.keys, cache.values):
            x.copy_(torch.randn(x.shape, generator=generator))
        q = random_rows(generator, dtype, groups * heads, head_dim)
        k, v = (random_rows(generator, dtype, groups, head_dim) for _ in range(2))

        def attend(first, last):
            rows = slice(first, last)
            attention = model.row_attention(cache, start + first, last - first)
            return attention(0, q[rows], k[rows], v[rows])

        same_in_any_company(attend)


# Attentions that give a row other bits: by what the number of queries leaves of 8, by that number,
# by the other rows. No padding helps the last, which takes the mean over rows off and puts it back.
@pytest.mark.parametrize("by, padding, heights", [
    ("eights", 8, {8, 16}),
    ("queries", 16, {16}),
    ("rows", 0, {2}),
])  # fmt: skip
def test_attention_that_mixes_rows_is_padded(monkeypatch, by, padding, heights):
    ran, plain = [], exact.grouped_attention

    def mixing(q, keys, values, mask):
        ran.append(len(mask))
        mixed = plain(q, keys, values, mask)
        mixed = mixed * (1 + len(mask) % {"eights": 8, "queries": 64, "rows": 1}[by] / 64)
        return mixed - mixed.mean(0) + mixed.mean(0) if by == "rows" else mixed

    monkeypatch.setattr(exact, "grouped_attention", mixing)
    config = tiny_config(head_dim=16)  # two heads a group
    for dtype in DTYPES:
        assert safe_padding(tiny_model(config, dtype=dtype)) == padding
    model = pack(tiny_model(config, damp_from=2, damping=0.3))
    ran.clear()
    drafted = decode(model, [3, 1, 4], exit_layer=2, draft_len=MAX_ROWS - 1)
    assert set(ran) == heights and {"some", "none"} <= fates(drafted.rounds)
    assert same_bits(drafted, decode(model, [3, 1, 4]))


def test_attention_runs_blocks_within_a_view():
    blocks = lambda start, rows: [*exact.blocks(start, rows, BLOCK_ROWS)]
    assert blocks(0, 1) == [(0, 1, VIEW)] and blocks(VIEW, 8) == [(0, 8, 2 * VIEW)]
    assert blocks(VIEW - 3, 16) == [(0, 3, VIEW), (3, 11, 2 * VIEW), (11, 16, 2 * VIEW)]
    assert exact.view_len(VIEW) == VIEW


@pytest.mark.parametrize("count", THREADS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(64, 96), (256, 640), (192, 2048), (100, 33), (2048, 256)])
def test_a_product_keeps_rows_apart(dtype, shape, count):
    linear = torch.nn.Linear(*shape, bias=False, dtype=dtype)
    with on_threads(count):
        product = RowLinear({}, linear)
        x = random_rows(torch.Generator().manual_seed(0), dtype, shape[0])
        expected = linear(x).detach()
        torch.testing.assert_close(product(x), expected, rtol=2**-7, atol=1e-3)
        same_in_any_company(lambda first, last: product(x[first:last]))


@pytest.mark.parametrize("safe, rows, passes", [
    (5, 1, [5]), (5, 4, [5]), (5, 5, [5]), (5, MAX_ROWS, [MAX_ROWS]), (0, 5, [1] * 5),
])  # fmt: skip
def test_short_passes_are_padded_or_run_row_by_row(safe, rows, passes, monkeypatch):
    """Up to the safe number of rows; alone where none is safe."""
    monkeypatch.setattr(exact, "safe_rows", lambda way, weight, most: safe)
    plain, ran = torch.nn.Linear(12, 7, bias=False), []
    linear, x = RowLinear({}, plain), torch.randn(rows, 12)
    product = linear.product
    linear.product = lambda x: ran.append(len(x)) or product(x)
    torch.testing.assert_close(linear(x), plain(x).detach())
    assert ran == passes


def test_one_probe_serves_all_weights_of_a_shape(monkeypatch):
    tried = []
    try_it = lambda way, weight, most: tried.append(weight.shape) or 1
    monkeypatch.setattr(exact, "safe_rows", try_it)
    pack(tiny_model(tiny_config(n_layers=6)))
    assert len(tried) == len(set(tried)) == 5  # qkv, o, gate and up, down, head


# Products that sum in another order: below five rows, at some places of a pass, or for a row
# alone, where few bfloat16 results of random inputs differ. Products of float32 numbers are exact
# in float64 and would hide a fused multiply-add, the last of these.


def below_five(weight, x):
    terms = x * torch.linspace(-1, 1, x.shape[1])
    return (terms if len(x) >= 5 else terms.flip(-1)).cumsum(-1)[:, -1:]


def by_place(weight, x):
    terms = x * torch.linspace(-1, 1, x.shape[1])
    rows = [row if i % 4 else row.flip(-1) for i, row in enumerate(terms)]
    return torch.stack(rows).cumsum(-1)[:, -1:]


def alone_otherwise(weight, x):
    terms = x.float()[:, None] * weight.float()
    return (terms if len(x) > 1 else terms.flip(-1)).sum(-1).bfloat16()


def fused(weight, x):
    high = x.float().double() if len(x) > 1 else x
    return (high[:, None] * weight + (x - high)[:, None] * weight).cumsum(-1)[..., -1]


@pytest.mark.parametrize("product, shape, dtype, safe", [
    (below_five, (1, 200), torch.float64, {8}),
    (by_place, (1, 200), torch.float64, {0}),
    (alone_otherwise, (64, 2048), torch.bfloat16, {2}),
    (fused, (64, 12), torch.float64, {0, *range(2, MAX_ROWS + 1)}),
])  # fmt: skip
def test_the_probe_finds_safe_row_counts(product, shape, dtype, safe):
    weight, x = torch.randn(shape).to(dtype), torch.randn(2, shape[1]).to(dtype)
    if product is alone_otherwise:
        assert (product(weight, x)[:1] != product(weight, x[:1])).float().mean() < 0.05
    assert safe_rows(lambda weight: partial(product, weight), weight, MAX_ROWS) in safe


@pytest.mark.parametrize("count", THREADS[1:])
def test_a_wide_model_is_exact_on_several_threads(count):
    with on_threads(count):
        model = pack(tiny_model(tiny_config(n_layers=2, hidden_dim=11008), 0, 1, 0.3))
        text = partial(decode, model, [1, 2], draft_len=15, max_new_tokens=34)
        assert same_bits(text(exit_layer=1), text())


def test_packing_twice_is_packing_once():
    model = tiny_model()
    assert pack(model) is model
    modules = list(model.modules())
    assert pack(model) is model and list(model.modules()) == modules


# --------------------------------------
# What cannot run

REFUSED = {
    ("exit_layer", "exit layer"): [4, -1, True, torch.tensor(1)],
    ("draft_len", "draft length"): [0, MAX_ROWS],
    ("max_new_tokens", "new tokens"): [0, 9.0],
    ("min_confidence", "confidence"): [1.0, math.nan],
    ("prompt_ids", "prompt"): [
        *([], [61], [-1], [0] * 256, [True], "text"),
        *(torch.tensor([1, 2]), [torch.tensor(1)]),
    ],
}


@pytest.mark.parametrize(
    "name, words, value", [(*names, value) for names, values in REFUSED.items() for value in values]
)
def test_a_bad_request_is_refused(name, words, value):
    request = dict(model=tiny_model(), prompt_ids=[1, 2]) | {name: value}
    with pytest.raises((TypeError, ValueError), match=words) as refused:
        next(generate(**request))
    assert str(refused.value).isprintable() and len(str(refused.value)) < 120


def test_a_model_too_wide_is_not_packed():
    with torch.device("meta"):
        wide = Llama(tiny_config(dim=1 << 15, n_layers=1))
    with pytest.raises(ValueError, match="no-exact"):
        pack(wide)
