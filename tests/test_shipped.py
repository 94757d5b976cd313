"""The shipped checkpoint, on held-out prompts: the text of the full model, whichever layer drafts."""

import json
from functools import cache

import pytest
import torch

from data import held_out_prompts
from decode import Sampling, generate
from model import load_checkpoint
from tokenizer import Tokenizer

SETTINGS = [(2, 5, 0.3), (3, 8, 0.3), (4, 4, 0.0), (6, 3, 0.5), (8, 6, 0.0)]  # exit layer, draft length, confidence


@cache
def load(shipped, dtype, threads: int):
    """A packed model and the prompts; kept, as packing asks the machine which row counts are safe with this many threads."""
    return load_checkpoint(shipped, dtype).pack(), held_out_prompts(20, Tokenizer(shipped), 64)


def share_accepted(shipped, dtype, temperature: float, numbers: range, threads: int) -> float:
    """Decodes held-out prompts plainly and drafted, compares every token and logit, returns the share of drafts accepted."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        (model, prompts), drafted, accepted = load(shipped, dtype, threads), 0, 0
        for number in numbers:
            exit_layer, draft_len, confidence = SETTINGS[number % len(SETTINGS)]
            common = dict(max_new_tokens=200, sampling=Sampling(temperature, top_p=0.95, seed=number), eos=())
            full = list(generate(model, prompts[number], **common))
            rounds = list(generate(model, prompts[number], exit_layer=exit_layer, draft_len=draft_len, min_confidence=confidence, **common))
            assert [t for r in rounds for t in r.emitted] == [r.emitted[0] for r in full]
            assert torch.equal(torch.cat([r.logits for r in rounds]), torch.cat([r.logits for r in full]))
            drafted += sum(len(r.drafted) for r in rounds)
            accepted += sum(r.accepted for r in rounds)
    finally:
        torch.set_num_threads(before)
    return accepted / drafted


@pytest.mark.parametrize("temperature, first", [(0.0, 0), (0.0, 5), (0.0, 10), (0.0, 15), (0.8, 0)])
def test_twenty_held_out_prompts_decode_to_identical_streams(shipped, temperature, first):
    """All greedily, a quarter of them sampled too, in the other type; tests/soak.py does more, and takes longer."""
    dtype = torch.float32 if (first // 5 % 2) ^ (temperature > 0) else torch.bfloat16
    assert 0.2 < share_accepted(shipped, dtype, temperature, range(first, first + 5), 1) < 1


@pytest.mark.threads
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_streams_are_identical_on_several_threads(shipped, dtype, temperature):
    assert 0.2 < share_accepted(shipped, dtype, temperature, range(2), max(torch.get_num_threads(), 2)) < 1


def test_the_checkpoint_is_small_and_says_how_it_was_made(shipped):
    names = {"config.json", "model.safetensors", "tokenizer.model", "generation_config.json", "training.json"}
    assert {p.name for p in shipped.iterdir()} == names
    assert sum(p.stat().st_size for p in shipped.iterdir()) <= 32 * 2**20
    record, config = json.loads((shipped / "training.json").read_text()), load_checkpoint(shipped).config
    assert record["command"].startswith("python train.py") and {"seed", "steps"} <= set(record)
    assert len(record["held_out_loss_per_exit"]) == len(record["held_out_agreement_per_exit"]) == config.n_layers >= 24
