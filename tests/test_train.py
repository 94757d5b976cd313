"""Schedules against values worked out by hand from the papers, and what a step does to a model."""

import json
import math
import shutil
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import SMALL, config_option, tiny_config, tiny_model, write_rows
from hypothesis import given
from hypothesis import strategies as st

import train
from exact import pack
from model import load_checkpoint
from support import data, train_command
from support.tokenizer import Tokenizer
from train import LAYERSKIP, RECIPES, Recipe

SHAPE = config_option(**SMALL, vocab_size=400)


def dropouts(recipe: Recipe, t: int, layers: int = 5, steps: int = 101) -> list[float]:
    return [train.layer_dropout(l, t, layers, steps, recipe) for l in range(layers)]


# --------------------------------------
# Schedules


def test_layerskips_dropout_grows():
    # D(l) = 2^(l/4) - 1 = 0, 0.189207, 0.414214, 0.681793, 1
    depth = np.array([0, 0.1892071, 0.4142136, 0.6817928, 1])
    assert dropouts(LAYERSKIP["continual"], 17) == pytest.approx(0.1 * depth, abs=1e-7)
    # S(t) = 2^(t/100) - 1: 0 at the start, 0.4142136 halfway, 1 at the end
    for t, s in ((0, 0), (50, 0.4142136), (100, 1)):
        assert dropouts(LAYERSKIP["scratch"], t) == pytest.approx(0.1 * s * depth, abs=1e-7)


def test_the_other_recipes_drop_as_published():
    assert dropouts(RECIPES["layerdrop"], 3) == dropouts(RECIPES["layerdrop"], 90) == [0.2] * 5
    assert dropouts(RECIPES["plain"], 50) == dropouts(RECIPES["lite"], 50) == [0] * 5
    # theta(t) = 0.5 exp(-100 t / T) + 0.5; T = 101, t = 1: exp(-0.990099) = 0.371540,
    # so theta = 0.685770
    for t, theta in ((0, 1), (1, 0.685770), (100, 0.5)):
        wanted = [(l / 5) * (1 - theta) for l in range(5)]
        assert dropouts(RECIPES["pld"], t) == pytest.approx(wanted, abs=1e-6)
    together = {name for name, r in RECIPES.items() if r.dropout_unit == "batch"}
    assert together == {"layerdrop", "pld"}
    assert [name for name, r in RECIPES.items() if r.rescale] == ["pld"]


def test_the_published_settings_of_layerskip():
    found = {phase: (r.p_max, r.e_scale, r.rotation, r.exits) for phase, r in LAYERSKIP.items()}
    rows = (0.1, 0.2, 0, "all"), (0.1, 0.2, 8, "all"), (0.1, 1.0, 16, "all")
    assert found == dict(zip(("scratch", "continual", "finetune"), rows))


def weights_of(t: int, layers: int, steps: int = 100, **settings) -> dict[int, float]:
    return train.exit_weights(t, layers, steps, Recipe(**settings))


def test_exit_weights_are_layerskips():
    # L = 4, e_scale = 0.5: e = 0, 0.5, 1.5, then 3 + 0.5 (0 + 1 + 2) = 4.5
    found = weights_of(0, 4, exits="1,2,3", rotation=1, e_scale=0.5)
    assert found == pytest.approx({2: 0.5 / 6.5, 3: 1.5 / 6.5, 4: 4.5 / 6.5})


def test_exit_weights_may_be_uniform_or_the_lasts():
    found = weights_of(0, 4, exits="1,3", rotation=1, e_scale=0.25, uniform_exits=True)
    assert found == pytest.approx({1: 1 / 6, 3: 1 / 6, 4: 4 / 6})
    eighths = dict.fromkeys((8, 12, 16, 20, 24, 28, 32), 1 / 7)
    assert train.exit_weights(5, 32, 10, RECIPES["lite"]) == pytest.approx(eighths)
    for name in ("plain", "layerdrop", "pld"):
        assert train.exit_weights(3, 6, 10, RECIPES[name]) == {6: 1.0}


def test_rotation_trains_each_exit_once_a_period():
    steps = [set(weights_of(t, 9, exits="2,3,4,5,6,7,8", rotation=3)) for t in range(6)]
    assert steps[:3] == steps[3:] == [{2, 5, 8, 9}, {3, 6, 9}, {4, 7, 9}]
    once = [set(weights_of(t, 5, exits="2,3,4", rotation=0)) for t in range(4)]
    assert once == [{2, 5}, {3, 5}, {4, 5}, {2, 5}]


def test_the_gradual_curriculum_adds_layers():
    gradual = dict(exits="all", curriculum="gradual", uniform_exits=True)
    active = [sorted(weights_of(t, 4, 80, **gradual)) for t in (0, 9, 10, 20, 30, 79)]
    assert active == [[4], [4], [3, 4], [2, 3, 4], [1, 2, 3, 4], [1, 2, 3, 4]]


RECIPE = st.builds(
    Recipe,
    exits=st.just("all"),
    curriculum=st.sampled_from(["rotational", "gradual"]),
    rotation=st.integers(0, 10),
    e_scale=st.floats(0, 2),
    uniform_exits=st.booleans(),
)


@given(st.integers(2, 40), st.integers(0, 99), RECIPE)
def test_exit_weights_sum_to_one(layers, t, recipe):
    weights = train.exit_weights(t, layers, 100, recipe)
    assert sum(weights.values()) == pytest.approx(1)
    assert layers in weights and min(weights.values()) > 0


# --------------------------------------
# Dropout


def test_a_skipped_sample_passes_unchanged():
    model = tiny_model(tiny_config())
    layer, h = model.layers[0], torch.randn(4, 6, 24)
    cos, sin = model.rotary(0, 6)
    everyone = layer(h, cos, sin)
    out = train.run_with_dropout(layer, h, cos, sin, torch.tensor([True, False, True, False]))
    assert torch.equal(out[[1, 3]], h[[1, 3]])
    torch.testing.assert_close(out[[0, 2]], everyone[[0, 2]])
    nobody = torch.zeros(4, dtype=torch.bool)  # as in one of several processes
    assert torch.equal(train.run_with_dropout(layer, h, cos, sin, nobody), h)
    # PLD divides the branch by its keep probability.
    halves = train.run_with_dropout(layer, h, cos, sin, ~nobody, keep=0.5)
    torch.testing.assert_close(halves, h + 2 * (everyone - h))


def test_skipped_samples_do_not_pay_for_the_layer():
    seen, layer = [], lambda h, cos, sin: seen.append(len(h)) or h
    for mask in ([True] * 4, [True, False, False, True], [False] * 4):
        train.run_with_dropout(layer, torch.zeros(4, 2, 3), None, None, torch.tensor(mask))
    assert seen == [4, 2, 0]


def test_a_layer_that_all_skip_does_not_run():
    model, seen = tiny_model(tiny_config()), []
    x, mask = torch.randint(61, (3, 7)), np.ones((4, 3), bool)
    mask[2] = False
    for l, layer in enumerate(model.layers):
        layer.register_forward_hook(lambda *_, l=l: seen.append(l))
    train.Objective(model)(x, x, mask, mask.any(1), [1.0] * 4, {4: 1.0})
    assert seen == [0, 1, 3]


def test_samples_are_kept_as_scheduled():
    """8 samples, 5 layers, 400 steps: the mean per layer lies within four standard errors."""
    drop = [0.0, 0.1, 0.3, 0.6, 0.9]
    drawn = {
        unit: np.stack([train.draw_mask(0, t, drop, 8, unit) for t in range(400)])
        for unit in ("sample", "batch")
    }
    kept, together = drawn["sample"], drawn["batch"]
    for l, p in enumerate(drop):
        assert abs(kept[:, l].sum() - 3200 * (1 - p)) <= 4 * (math.sqrt(p * (1 - p) * 3200) or 1e-9)
    assert (together == together[:, :, :1]).all() and abs(together[:, 3, 0].mean() - 0.4) < 0.1
    assert (kept != together).any() and (train.draw_mask(1, 0, drop, 8, "sample") != kept[0]).any()


# --------------------------------------
# Loss


def loss_of(model, x, y, weights):
    """J, and each exit's summed loss, of one batch without dropout."""
    layers = model.config.n_layers
    whole = np.ones((layers, len(x)), bool)
    return train.Objective(model)(x, y, whole, whole.any(1), [1.0] * layers, weights)


@pytest.mark.parametrize("tied", [True, False])
def test_loss_and_gradient_are_the_formulas(tied, monkeypatch):
    monkeypatch.setattr(train, "LOGITS", 61 * 5)  # five rows at a time
    model = tiny_model(tiny_config(tied=tied))
    x, y = torch.randint(61, (3, 7)), torch.randint(61, (3, 7))
    y[0, :4] = data.IGNORED
    weights = {1: 0.2, 3: 0.3, 4: 0.5}
    total, sums = loss_of(model, x, y, weights)
    total.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    expected, h, losses = 0.0, model.embed(x), dict(zip(weights, sums.tolist()))
    for l in range(4):
        h = model.run_layers(h, l, l + 1)
        if weight := weights.get(l + 1):
            likelihood = model.unembed(h).flatten(0, 1).log_softmax(-1)
            target = F.one_hot(y.flatten().clamp(min=0), 61)
            loss = -(target * likelihood).sum(-1)[y.flatten() != data.IGNORED].sum()
            assert losses[l + 1] == pytest.approx(loss.item(), rel=1e-4)
            expected = expected + weight * loss
    expected.backward()
    assert total.item() == pytest.approx(expected.item(), rel=1e-5)
    for name, p in model.named_parameters():
        assert found[name].abs().max() > 0 and torch.allclose(p.grad, found[name], atol=1e-4), name


def test_there_is_one_set_of_logits_for_all_exits(monkeypatch):
    """Each exit's rows are unembedded ten at a time, and again for the backward pass."""
    monkeypatch.setattr(train, "LOGITS", 61 * 10)
    model, sizes, kept = tiny_model(tiny_config()), [], []
    unembed = model.unembed
    monkeypatch.setattr(model, "unembed", lambda h: sizes.append(len(h)) or unembed(h))
    x = torch.randint(61, (4, 8))
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        loss = loss_of(model, x, x, {1: 0.2, 2: 0.2, 3: 0.2, 4: 0.4})[0]
    assert kept and all(shape[-1:] != (61,) or shape == (24, 61) for shape in kept)
    loss.backward()
    assert len(sizes) == 2 * 4 * 4 and max(sizes) == 10 and sum(sizes) == 2 * 4 * 32


def test_a_packed_model_does_not_train():
    with pytest.raises(ValueError, match="packed"):
        train.Objective(pack(tiny_model(tiny_config())))


# --------------------------------------
# Data


def test_crops_are_a_function_of_seed_and_step(tmp_path):
    np.arange(10_000, dtype=np.uint16).tofile(tmp_path / "some.bin")
    tokens = data.Tokens(tmp_path / "some.bin", 1 << 16)
    x, y = tokens.crops(4, 16, seed=1, step=7)
    assert torch.equal(x[:, 1:], y[:, :-1]) and torch.equal(x, tokens.crops(4, 16, 1, 7)[0])
    drawn = [tokens.crops(16, 16, seed, step)[0] for seed in range(2) for step in range(20)]
    assert len(torch.cat(drawn)[:, 0].unique()) > 600, "steps and seeds draw other places"


def test_nothing_is_learned_of_a_prompt(tokenizer, tmp_path):
    rows = (dict(prompt=f"add {n} and {n}: ", completion=f"it is {2 * n}") for n in range(200))
    file = write_rows(tmp_path / "pairs.jsonl", rows)
    trained, _ = data.write_tokens(data.read_corpus([str(file)]), tokenizer, tmp_path)
    kinds = trained.ids[trained.learned], trained.ids
    learned, whole = (tokenizer.decode(ids.tolist()) for ids in kinds)
    assert "it is 20" in learned and "add" not in learned and "add" in whole
    x, y = trained.crops(8, 30, 0, 0)
    counted = y[:, :-1] != data.IGNORED
    assert (~counted).any() and torch.equal(y[:, :-1][counted], x[:, 1:][counted])


def test_a_long_text_comes_in_documents(tmp_path):
    (tmp_path / "long.txt").write_text(text := "a line of text\n" * 20_000)
    found = list(data.read_corpus([str(tmp_path / "long.txt")]))
    assert "".join(d.text for d in found) == text and {d.held_out for d in found} == {True, False}


def test_held_out_documents_are_never_trained_on(tokenizer, tmp_path):
    numbered = ((f"{n}.py", f"def f{n}(x):\n    return x + {n}\n") for n in range(300))
    documents = [data.Document(*about) for about in numbered]
    trained, held_out = data.write_tokens(documents, tokenizer, tmp_path)
    texts = {True: "", False: ""}
    for d in documents:
        texts[d.held_out] += d.text
    assert tokenizer.decode(trained.ids.tolist()) == texts[False]
    assert tokenizer.decode(held_out.ids.tolist()) == texts[True]
    assert len(trained) > 8 * len(held_out) > 0


def test_an_impossible_vocabulary_leaves_nothing(tmp_path):
    with pytest.raises(ValueError) as refused:
        data.train_tokenizer(["abc"], 100, tmp_path / "tokenizer.model")
    assert "\n" not in str(refused.value) and not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Tokenizer:
    texts = [d.text for d in data.read_files(data.stdlib_files()[:20])]
    return data.train_tokenizer(texts, 600, tmp_path_factory.mktemp("a") / "tokenizer.model")


@given(st.text(st.characters(exclude_characters="\u2581", exclude_categories=["Cs"])))
def test_a_trained_tokenizer_gives_back_every_text(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


# --------------------------------------
# Runs

FEW = "--data docs --batch 2 --seq 32 --steps 3"


def options(out, text: str, shape=SHAPE) -> list[str]:
    return ["--out", str(out), "--no-compile", *text.split(), *shape]


@pytest.fixture
def run(command):
    """run(out, "--steps 3", shape) trains."""
    return lambda *how: command(train_command.main, *options(*how))


@pytest.fixture
def refused(run):
    """What the one line says that a run which cannot be ends with."""

    def call(*how) -> str:
        found = run(*how)
        last = found.err.splitlines()[-1]
        assert found.code == 2 and last.startswith("train.py: ") and "Traceback" not in found.err
        return last

    return call


def rows_of(out) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def record_of(out) -> dict:
    return json.loads((out / "training.json").read_text())


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The directory of a run of three steps."""
    out = tmp_path_factory.mktemp("trained") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["train.py", *options(out, FEW)])
        train_command.main()
    return out


@pytest.fixture
def again(trained, tmp_path):
    """A copy of it."""
    return shutil.copytree(trained, tmp_path / "run")


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_trains(again, run, recipe):
    (again / "state.safetensors").unlink()
    run(again, f"{FEW} --recipe {recipe} --steps 30 --lr 3e-3")
    model, record = load_checkpoint(again), record_of(again)
    assert model.config.n_layers == 3 and model.dtype == torch.bfloat16
    assert record["steps"] == 30 and record["recipe"]["p_max"] == RECIPES[recipe].p_max
    exits = [str(exit) for exit in train.exit_layers(RECIPES[recipe], 3) or (1, 2)]
    assert list(record["held_out"]) == [*exits, "3"]
    assert record["held_out"]["3"]["agreement"] == 1.0
    losses = [row["losses"]["3"] for row in rows_of(again) if "losses" in row]
    assert len(losses) == 30 and np.mean(losses[-5:]) < losses[0] - 0.02


def test_a_checkpoint_is_trained_further(trained, tmp_path, run):
    run(tmp_path, f"{FEW} --steps 2 --init {trained} --phase finetune --lr 1e-12", ())
    one, two = load_checkpoint(trained), load_checkpoint(tmp_path)
    assert one.config == two.config
    assert all(map(torch.equal, one.parameters(), two.parameters()))
    assert len({(run / "tokenizer.model").read_bytes() for run in (trained, tmp_path)}) == 1
    record = record_of(tmp_path)
    assert record["recipe"]["e_scale"] == 1.0
    begun = {"step": 0, "held_out": record["held_out"]}  # it has learned nothing since
    assert rows_of(tmp_path)[0] == begun


def test_an_infinite_loss_leaves_the_last_state(tmp_path, monkeypatch, refused):
    whole = train.Trainer.train_step

    def poisoned(trainer):
        if trainer.step == 3:
            next(iter(trainer.parameters.values())).data[:] = math.nan
        return whole(trainer)

    monkeypatch.setattr(train.Trainer, "train_step", poisoned)
    assert "step 4" in refused(tmp_path, FEW + " --steps 6 --save-every 2")
    assert record_of(tmp_path)["steps"] == 2
    assert all(p.isfinite().all() for p in load_checkpoint(tmp_path).parameters())


FOREIGN = ["model.safetensors", "params.json", "tokenizer.json", "x.safetensors"]


@pytest.mark.parametrize("foreign", FOREIGN)
def test_foreign_files_are_not_written_over(tmp_path, refused, foreign):
    (tmp_path / foreign).write_bytes(b"somebody's")
    assert "choose another --out" in refused(tmp_path, FEW)
    assert [file.read_bytes() for file in tmp_path.iterdir()] == [b"somebody's"]


DAMAGED = [
    ("data.json", b"[]"),
    ("train.bin", b""),
    ("train.bin", b"\xff\xff" * 5000),
    ("held_out.bin", b""),
    ("state.safetensors", b"\0" * 64),
]


@pytest.mark.parametrize("name, content", DAMAGED)
def test_a_damaged_file_is_one_line(again, refused, name, content):
    (again / name).write_bytes(content)
    if name != "state.safetensors":
        (again / "state.safetensors").unlink()
    last = refused(again, FEW)
    assert name in last or "choose another --out" in last


def test_damaged_rows_of_metrics_are_dropped(again, run):
    metrics = again / "metrics.jsonl"
    whole = metrics.read_text()
    metrics.write_text("{}\n" + whole + '{"step": 99}\n{"step"')
    run(again, FEW)
    assert metrics.read_text() == whole


def test_what_cannot_be_allocated_is_one_line(again, refused):
    huge = dict(dim=2**14, n_heads=2**20, head_dim=2**10, vocab_size=400)
    refused(again, FEW, config_option(**SMALL | huge))


def test_a_run_that_ended_in_its_data_starts_again(tmp_path, run, refused):
    short = tmp_path / "short.txt"
    short.write_text("x = 1\n" * 400)
    refused(tmp_path / "run", f"{FEW} --data {short}")
    (tmp_path / "run" / "tokenizer.model").write_bytes(b"half of")
    run(tmp_path / "run", FEW)
    assert load_checkpoint(tmp_path / "run").config.n_layers == 3


BAD = """--steps 0|--exits 24|--p-max 1|--seq 600|--config no.json|--config {odd}|--config {one}
--batch 3 --accumulate 2|--recipe lite --phase finetune|--data no/such|--init no/such"""


@pytest.mark.parametrize("bad", BAD.replace("\n", "|").split("|"))
def test_bad_settings_are_one_line(tmp_path, refused, bad):
    one, odd = (config_option(**SMALL | x)[1] for x in (dict(n_layers=1), dict(dim=-1)))
    last = refused(tmp_path / "run", "--data none " + bad.format(one=one, odd=odd), ())
    words = [word.strip("-") for word in bad.split() if len(word) > 2]
    assert any(word in last for word in (*words, "model of one layer"))
    assert not (tmp_path / "run" / "model.safetensors").exists()
