"""The one verification rule: token = argmax(filter(logits / T) + gumbel(seed, position))."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from decode import Sampling, gumbel, keep_likely, next_token

LOGITS = torch.tensor([2.0, 1.5, 1.4, 0.5, 0.0, -0.3, -1.0, -2.0, 0.9, 0.7])


@pytest.mark.parametrize("sampling", [Sampling(1.0), Sampling(0.6), Sampling(1.7, top_k=4), Sampling(1.0, top_p=0.8), Sampling(1.3, 6, 0.9, 11)])
def test_tokens_follow_the_filtered_softmax(sampling):
    draws = 50_000
    counts = torch.zeros(len(LOGITS))
    for position in range(draws):
        counts[next_token(LOGITS, position, sampling)] += 1
    scaled = (LOGITS / sampling.temperature).double()
    order = scaled.argsort(descending=True).tolist()  # filter by hand: top_k first, then top_p of what is left
    kept = order[: sampling.top_k] if sampling.top_k else order
    probability = [math.exp(scaled[i]) for i in kept]
    probability = [p / sum(probability) for p in probability]
    total, cut = 0.0, []
    for i, p in zip(kept, probability):
        if total < sampling.top_p:
            cut.append((i, p))
        total += p
    mass = sum(p for _, p in cut)
    expected = torch.zeros(len(LOGITS))
    for i, p in cut:
        expected[i] = draws * p / mass
    inside = expected > 0
    assert counts[~inside].sum() == 0
    chi_square = ((counts - expected)[inside] ** 2 / expected[inside]).sum().item()
    degrees = int(inside.sum()) - 1
    assert chi_square < degrees + 4 * math.sqrt(2 * degrees)  # about one in twenty thousand


def test_temperature_zero_is_the_likeliest_token():
    assert next_token(LOGITS, 3, Sampling(0.0, seed=9)) == 0


def test_noise_is_a_function_of_seed_and_position_alone():
    assert torch.equal(gumbel(3, 5, 100), gumbel.__wrapped__(3, 5, 100))
    assert torch.equal(gumbel(3, 5, 100)[:50], gumbel(3, 5, 50))
    streams = torch.stack([gumbel(seed, position, 64) for seed in range(4) for position in range(30)])
    assert len(streams.flatten().unique()) == streams.numel(), "no two places share a draw"
    correlation = torch.corrcoef(streams) - torch.eye(len(streams))
    assert correlation.abs().max() < 0.6


@given(st.lists(st.floats(-20, 20), min_size=1, max_size=30), st.integers(0, 40), st.floats(0.01, 1.0))
def test_filters_keep_the_likeliest_and_at_least_one(logits, top_k, top_p):
    logits = torch.tensor(logits, dtype=torch.float64)
    kept = keep_likely(logits, top_k, top_p)
    alive = kept > -math.inf
    assert alive.any() and torch.equal(kept[alive], logits[alive])
    assert logits[alive].min() >= (logits[~alive].max() if (~alive).any() else -math.inf)
    if top_k:
        assert alive.sum() <= max(top_k, (logits >= logits.topk(min(top_k, len(logits))).values[-1]).sum())
    if not top_k and top_p < 1:
        probability = logits.softmax(-1)
        assert probability[alive].sum() >= top_p - 1e-9
        assert probability[alive].sum() - probability[alive].min() < top_p + 1e-9


@pytest.mark.parametrize("bad", [dict(temperature=-1), dict(temperature=math.inf), dict(temperature=math.nan), dict(top_k=-1), dict(top_p=0), dict(top_p=1.1), dict(seed=-1)])
def test_impossible_sampling_is_refused(bad):
    with pytest.raises(ValueError):
        Sampling(**bad)
