"""The one verification rule: token = argmax(filter(logits / T) + gumbel(seed, position))."""

import math

import pytest
import torch
from helpers import DTYPES
from hypothesis import given
from hypothesis import strategies as st

from decode import Sampling, accept, gumbel, keep_likely, next_token

LOGITS = torch.tensor([2.0, 1.5, 1.4, 0.5, 0.0, -0.3, -1.0, -2.0, 0.9, 0.7])


@pytest.mark.parametrize("sampling", [
    Sampling(0.6),
    Sampling(1.7, top_k=4),
    Sampling(1.3, 6, 0.9, 11),
])  # fmt: skip
def test_tokens_follow_the_filtered_softmax(sampling):
    """By a chi-square test against a filter by hand: top_k first, then top_p of what is left."""
    draws, counts = 20_000, torch.zeros(len(LOGITS))
    for position in range(draws):
        counts[next_token(LOGITS, position, sampling)] += 1
    likely, order = (LOGITS / sampling.temperature).double().sort(descending=True)
    likely = likely[: sampling.top_k or None].softmax(-1)
    kept = (likely.cumsum(-1) - likely < sampling.top_p).sum()
    expected, counts = likely[:kept] / likely[:kept].sum() * draws, counts[order]
    assert counts[kept:].sum() == 0
    chi_square = ((counts[:kept] - expected) ** 2 / expected).sum().item()
    degrees = int(kept) - 1
    assert chi_square < degrees + 4 * math.sqrt(2 * degrees)  # about one in twenty thousand


@pytest.mark.parametrize("dtype", DTYPES)
def test_temperature_zero_takes_the_first_best(dtype):
    assert next_token(LOGITS.to(dtype), 3, Sampling(0.0, seed=9)) == 0
    tied = torch.tensor([0.0, 2.0, 1.0, 2.0] * 9, dtype=dtype)
    assert next_token(tied, 3, Sampling(0.0, top_k=2, top_p=0.1)) == 1


def test_a_token_depends_on_its_row_alone():
    """Not on other rows, nor on what was drawn before."""
    sampling, rows = Sampling(1.0, 5, 0.9, seed=3), torch.randn(16, 100)
    tokens = [next_token(row, 7 + i, sampling) for i, row in enumerate(rows)]
    assert tokens[::-1] == [next_token(rows[i].clone(), 7 + i, sampling) for i in range(15, -1, -1)]
    assert tokens != [next_token(row, 8 + i, sampling) for i, row in enumerate(rows)]


def test_noise_depends_on_seed_and_position():
    assert torch.equal(gumbel(3, 5, 100), gumbel.__wrapped__(3, 5, 100))
    assert torch.equal(gumbel(3, 5, 100)[:50], gumbel(3, 5, 50))
    places = [(seed, position) for seed in range(4) for position in range(30)]
    streams = torch.stack([gumbel(*place, 64) for place in places])
    assert len(streams.flatten().unique()) == streams.numel(), "no two places share a draw"
    assert (torch.corrcoef(streams) - torch.eye(len(streams))).abs().max() < 0.6


logit_lists = st.lists(st.floats(-20, 20), min_size=1, max_size=30)


@given(logit_lists, st.integers(0, 40), st.floats(0.01, 1))
def test_filters_keep_the_likeliest(logits, top_k, top_p):
    logits = torch.tensor(logits, dtype=torch.float64)
    kept = keep_likely(logits, top_k, top_p)
    alive = kept > -math.inf
    assert alive.any() and torch.equal(kept[alive], logits[alive])
    assert logits[alive].min() >= (logits[~alive].max() if (~alive).any() else -math.inf)
    if top_k:
        last = logits.topk(min(top_k, len(logits))).values[-1]
        assert alive.sum() <= max(top_k, (logits >= last).sum())
    elif top_p < 1:
        probability = logits.softmax(-1)
        assert probability[alive].sum() >= top_p - 1e-9
        assert probability[alive].sum() - probability[alive].min() < top_p + 1e-9


@given(st.lists(st.integers(0, 3), max_size=8), st.lists(st.integers(0, 3), min_size=9, max_size=9))
def test_emitted_tokens_are_the_verifiers(guesses, said):
    """Or up to an EOS: here 3."""
    logits = torch.nn.functional.one_hot(torch.tensor(said), 4).float()[: len(guesses) + 1]
    emitted = accept(guesses, logits, 0, lambda row, position: int(row.argmax()), (3,))
    assert emitted == said[: len(emitted)]
    right = [guess == token != 3 for guess, token in zip(guesses, said)]
    assert len(emitted) == (right.index(False) if False in right else len(guesses)) + 1


WRONG = {
    "temperature": [-1, math.inf, math.nan, 5e-324, "1"],
    "top_k": [-1, 2.5, True],
    "top_p": [0, 1.1],
    "seed": [-1, 1 << 64],
}


@pytest.mark.parametrize("name, value", [(name, x) for name, xs in WRONG.items() for x in xs])
def test_impossible_sampling_is_refused_by_name(name, value):
    with pytest.raises((TypeError, ValueError), match=name):
        Sampling(**{name: value})
