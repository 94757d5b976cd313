"""Schedules against values worked out by hand from the paper, and what a step does to a model."""

import json
import math
import sys

import numpy as np
import pytest
import torch
from helpers import tiny_config, tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st

import data
import train
from model import load_checkpoint
from tokenizer import Tokenizer


def test_layer_dropout_grows_exponentially_from_zero_to_p_max():
    rates = [train.layer_dropout(l, 5, 0.2) for l in range(5)]
    # 2^(l/4) - 1 = 0, 0.189207, 0.414214, 0.681793, 1
    assert rates == pytest.approx([0, 0.0378414, 0.0828427, 0.1363586, 0.2], abs=1e-7)


def test_exit_weights_are_the_papers():
    # L = 4, e_scale = 0.5: e = 0, 0.5, 1.5, then 3 + 0.5 (0 + 1 + 2) = 4.5
    weights = train.exit_weights(0, 4, [1, 2, 3], rotation=1, e_scale=0.5, uniform=False)
    assert weights == pytest.approx({2: 0.5 / 6.5, 3: 1.5 / 6.5, 4: 4.5 / 6.5})


def test_uniform_exit_weights():
    assert train.exit_weights(0, 4, [1, 3], 1, e_scale=0.25, uniform=True) == pytest.approx({1: 1 / 6, 3: 1 / 6, 4: 4 / 6})


def test_rotation_trains_every_exit_once_per_period_and_the_last_always():
    steps = [set(train.exit_weights(t, 9, list(range(2, 9)), rotation=3, e_scale=1.0, uniform=False)) for t in range(6)]
    assert steps[:3] == steps[3:] == [{2, 5, 8, 9}, {3, 6, 9}, {4, 7, 9}]


@given(st.integers(2, 40), st.integers(0, 100), st.integers(1, 10), st.floats(0, 2), st.booleans())
def test_exit_weights_sum_to_one(n_layers, t, rotation, e_scale, uniform):
    weights = train.exit_weights(t, n_layers, list(range(1, n_layers)), rotation, e_scale, uniform)
    assert sum(weights.values()) == pytest.approx(1) and n_layers in weights and min(weights.values()) > 0


def test_a_skipped_sample_passes_unchanged_and_the_others_as_without_dropout():
    model = tiny_model(tiny_config())
    layer, h = model.model.layers[0], torch.randn(4, 6, 24)
    cos, sin = model.rotary(0, 6)
    everyone = layer(h, cos, sin)
    out = train.run_with_dropout(layer, h, cos, sin, torch.tensor([True, False, True, False]))
    assert torch.equal(out[[1, 3]], h[[1, 3]]) and torch.allclose(out[[0, 2]], everyone[[0, 2]], atol=1e-6)
    assert torch.equal(train.run_with_dropout(layer, h, cos, sin, torch.zeros(4, dtype=torch.bool)), h)


def test_skipped_samples_do_not_pay_for_the_layer():
    seen = []

    def layer(h, cos, sin):
        seen.append(len(h))
        return h

    for kept in ([True] * 4, [True, False, False, True], [False] * 4):
        train.run_with_dropout(layer, torch.zeros(4, 2, 3), None, None, torch.tensor(kept))
    assert seen == [4, 2]


def test_the_share_of_skipped_samples_is_the_schedules():
    """8 samples, 5 layers, 400 steps: the mean of the kept samples per layer lies within four standard errors."""
    model, p_max, counts = tiny_model(tiny_config(n_layers=5)), 0.6, torch.zeros(5)
    drop = [train.layer_dropout(l, 5, p_max) for l in range(5)]
    index = {id(layer): l for l, layer in enumerate(model.model.layers)}

    def block(layer, h, cos, sin, attend):
        counts[index[id(layer)]] += len(h)
        return h + 0 * layer.input_layernorm.weight.sum()

    tokens, generator = torch.zeros(8, 3, dtype=torch.long), torch.Generator().manual_seed(0)
    for _ in range(400):
        train.train_step(model, tokens, tokens, {5: 1.0}, drop, generator, block, train.exit_loss)
    for l in range(5):
        error = math.sqrt(drop[l] * (1 - drop[l]) * 3200) or 1e-9
        assert abs(counts[l].item() - 3200 * (1 - drop[l])) <= 4 * error
    assert drop[0] == 0 and counts[0] == 3200


def test_the_loss_is_the_weighted_sum_and_its_gradient_reaches_every_parameter():
    model = tiny_model(tiny_config(tied=True))
    x, y = torch.randint(61, (3, 7)), torch.randint(61, (3, 7))
    weights = {1: 0.2, 3: 0.3, 4: 0.5}
    plain = lambda layer, *a: layer(*a)
    losses = train.train_step(model, x, y, weights, [0.0] * 4, torch.Generator(), plain, train.exit_loss)
    found = {name: p.grad.clone() for name, p in model.named_parameters()}
    assert all(g.abs().max() > 0 for g in found.values())
    model.zero_grad()
    total, h = 0.0, model.embed(x)
    for l in range(4):
        h = model.run_layers(h, l, l + 1)
        if l + 1 in weights:
            probability = model.unembed(h).log_softmax(-1).gather(-1, y[..., None]).mean()
            assert losses[l + 1] == pytest.approx(-probability.item(), rel=1e-4)
            total = total - weights[l + 1] * probability
    total.backward()
    for name, p in model.named_parameters():
        assert torch.allclose(p.grad, found[name], atol=1e-5), name


@pytest.mark.parametrize("n_heads, n_kv_heads", [(4, 4), (4, 2), (3, 1)])
def test_training_attention_is_the_models(n_heads, n_kv_heads):
    q, k, v = torch.randn(2, 9, n_heads, 8), torch.randn(2, 9, n_kv_heads, 8), torch.randn(2, 9, n_kv_heads, 8)
    assert torch.allclose(train.train_attention(q, k, v), train.batch_attention(q, k, v), atol=1e-5)


def test_crops_are_a_function_of_seed_and_step():
    tokens = np.arange(10_000, dtype=np.uint16)
    x, y = data.crops(tokens, 4, 16, seed=1, step=7)
    assert torch.equal(x[:, 1:], y[:, :-1]) and x.shape == y.shape == (4, 16)
    assert torch.equal(x, data.crops(tokens, 4, 16, 1, 7)[0])
    starts = torch.cat([data.crops(tokens, 16, 16, seed, step)[0][:, 0] for seed in range(2) for step in range(20)])
    assert len(starts.unique()) > 600, "steps and seeds draw other places"


def test_held_out_files_are_never_trained_on(monkeypatch, tmp_path):
    written = []
    monkeypatch.setattr(train, "write_tokens", lambda texts, tokenizer, path: written.append(set(texts)))
    monkeypatch.setattr(train, "train_tokenizer", lambda texts, vocab, path: written.append(set(texts)) or type("T", (), dict(vocab_size=vocab)))
    train.prepare_data(tmp_path, 400)
    for_tokenizer, trained, held_out = written
    assert for_tokenizer == trained and len(trained) > 10 * len(held_out) > 50
    assert len(trained & held_out) <= 1, "the empty text of an empty __init__.py may be in both"


def test_a_vocabulary_that_cannot_be_trained_is_refused_and_leaves_nothing(tmp_path):
    with pytest.raises(ValueError) as refused:
        data.train_tokenizer(["abc"], 100, tmp_path / "tokenizer.model")
    assert "\n" not in str(refused.value) and not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Tokenizer:
    texts = data.read_texts(data.stdlib_files()[:20])
    return data.train_tokenizer(texts, 600, tmp_path_factory.mktemp("tokenizer") / "tokenizer.model")


@settings(max_examples=200)
@given(st.text(st.characters(exclude_characters="\u2581", exclude_categories=["Cs"])))
def test_the_trained_tokenizer_gives_back_every_text(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_indentation_and_source_files_survive_the_tokenizer(tokenizer):
    for text in ["        return x\n\n\n    def f(self):\n\tpass\n", *data.read_texts(data.stdlib_files()[40:60])]:
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_training_runs_from_the_command_line_and_its_checkpoint_loads(tmp_path, monkeypatch):
    shape = "--layers 3 --dim 32 --hidden-dim 48 --heads 2 --kv-heads 1 --head-dim 16 --vocab 400".split()
    command = ["train.py", "--out", str(tmp_path), "--steps", "3", "--batch", "2", "--seq", "32", "--no-compile", *shape]
    monkeypatch.setattr(sys, "argv", command)
    train.main()
    model, record = load_checkpoint(tmp_path), json.loads((tmp_path / "training.json").read_text())
    assert model.config.n_layers == 3 and model.dtype == torch.bfloat16
    assert record["steps"] == 3 and len(record["held_out_loss_per_exit"]) == 3
    assert record["held_out_agreement_per_exit"][-1] == 1.0 and "--steps 3" in record["command"]
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 3


def test_training_makes_the_loss_fall():
    model = tiny_model(tiny_config(n_layers=2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    x = torch.randint(61, (4, 16), generator=torch.Generator().manual_seed(0))
    history = []
    for step in range(30):
        weights = train.exit_weights(step, 2, [1], 1, 1.0, True)
        history.append(train.train_step(model, x, x.roll(-1, 1), weights, [0, 0.1], torch.Generator(), lambda l, *a: l(*a), train.exit_loss))
        optimizer.step()
        optimizer.zero_grad()
    assert all(history[-1][exit] < 0.5 * history[0][exit] for exit in (1, 2))


@pytest.mark.parametrize("bad", ["--steps 0", "--exits 24", "--exits a", "--exits 0", "--p-max 1", "--rotation 0", "--seq 600", "--minutes -1", "--heads 3 --kv-heads 2", "--e-scale nan"])
def test_bad_training_settings_are_one_line_and_write_no_checkpoint(tmp_path, monkeypatch, capsys, bad):
    monkeypatch.setattr(train, "prepare_data", lambda out, vocab: (np.zeros(9999, np.uint16), np.zeros(9999, np.uint16), type("T", (), dict(vocab_size=400, bos=1, eos=2))))
    monkeypatch.setattr(sys, "argv", ["train.py", "--out", str(tmp_path / "run"), *bad.split()])
    with pytest.raises(SystemExit) as stop:
        train.main()
    err = capsys.readouterr().err
    assert stop.value.code == 2 and err.startswith("train.py: ") and err.count("\n") == 1
    assert not (tmp_path / "run" / "model.safetensors").exists()
