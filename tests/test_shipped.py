"""The shipped checkpoint on held-out prompts: the full model's text, whoever drafts."""

import json
from functools import cache

import pytest
import torch
from helpers import DRAFTERS, decode, on_threads, same_bits

from bench.tasks import held_out_prompts
from decode import Sampling
from exact import pack
from model import load_checkpoint
from support.tokenizer import Tokenizer

SETTINGS = [  # who drafts, exit layer, draft length, confidence
    ("early exit", 2, 5, 0.3),
    ("early exit", 3, 15, 0.3),
    ("lookup+exit", 4, 4, 0.0),
    ("early exit", 6, 3, 0.5),
    ("early exit", 8, 6, 0.0),
]


@cache
def load(shipped, dtype, threads: int):
    """A packed model and the prompts, once: packing asks which row counts are safe."""
    return pack(load_checkpoint(shipped, dtype)), held_out_prompts(20, Tokenizer(shipped), 64)


def share_accepted(shipped, dtype, temperature, numbers, tokens=100, threads=1) -> float:
    """Decodes held-out prompts plainly and drafted; the share of drafted tokens accepted."""
    rounds = []
    with on_threads(threads):
        model, prompts = load(shipped, dtype, threads)
        for number in numbers:
            who, e, draft_len, confidence = SETTINGS[number % len(SETTINGS)]
            sampling = Sampling(temperature, top_p=0.95, seed=number)
            common = dict(max_new_tokens=tokens, sampling=sampling)
            plain = decode(model, prompts[number], **common)
            how = DRAFTERS[who](model, e) | dict(draft_len=draft_len, min_confidence=confidence)
            drafted = decode(model, prompts[number], **how, **common)
            assert same_bits(drafted, plain)
            rounds += drafted.rounds
    return sum(r.accepted for r in rounds) / sum(len(r.drafted) for r in rounds)


@pytest.mark.parametrize("temperature, first", [(0, 0), (0, 5), (0, 10), (0, 15), (0.8, 0)])
def test_twenty_prompts_decode_to_equal_streams(shipped, temperature, first):
    """All greedily, a quarter of them sampled too, in the other type; tests/soak.py does more."""
    dtype = torch.float32 if (first // 5 % 2) ^ (temperature > 0) else torch.bfloat16
    assert 0.2 < share_accepted(shipped, dtype, temperature, range(first, first + 5)) < 1


@pytest.mark.threads
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_streams_are_identical_on_several_threads(shipped, dtype, temperature):
    threads = max(torch.get_num_threads(), 2)
    assert 0.2 < share_accepted(shipped, dtype, temperature, range(1), 60, threads) < 1


def test_the_checkpoint_says_how_it_was_made(shipped):
    weights = {"config.json", "model.safetensors", "tokenizer.model"}
    names = weights | {"generation_config.json", "training.json"}
    assert {p.name for p in shipped.iterdir()} == names
    assert sum(p.stat().st_size for p in shipped.iterdir()) <= 32 * 2**20
    record = json.loads((shipped / "training.json").read_text())
    layers = load_checkpoint(shipped).config.n_layers
    assert record["command"].startswith("python train.py") and {"seed", "steps"} <= record.keys()
    assert list(record["held_out"]) == [str(exit) for exit in range(1, layers + 1)]
