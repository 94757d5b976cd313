"""What drafters guess. That their guesses cannot change the text is test_exactness.py's law; here: that they guess well."""

import json
import runpy
import shutil
import sys
from functools import partial

import pytest
import torch
from conftest import ROOT
from helpers import tiny_config, tiny_model
from safetensors.torch import load_file, save_file

import kangaroo
from decode import Sampling, generate, new_cache, sublayers
from drafters import AutoExit, Drafter, Jacobi, PromptLookup, SkipLayers, TwoModels, run_lengths, search_skips
from kangaroo import Adapter, Kangaroo
from model import CheckpointError, Layer, Llama, load_checkpoint, save_checkpoint


def decode(model, prompt, drafter, temperature=0.0, count=60, draft_len=5, **how):
    return list(generate(model, prompt, drafter=drafter, draft_len=draft_len, max_new_tokens=count, sampling=Sampling(temperature, seed=5), eos=(), **how))


def twin(model: Llama) -> Llama:
    other = Llama(model.config).to(model.dtype).eval()
    other.load_state_dict(model.state_dict())
    return other


def test_a_copy_of_early_layers_learns_to_foresee_the_model(tmp_path, monkeypatch, capsys):
    """docs/bound.py: a draft model from a model's own first layers, trained on its distribution."""
    save_checkpoint(tiny_model(tiny_config(vocab_size=2048)), tmp_path / "full")
    shutil.copy(ROOT / "checkpoints" / "pystdlib" / "tokenizer.model", tmp_path / "full")
    (tmp_path / "text").mkdir()
    for number in range(30):
        (tmp_path / "text" / f"{number}.py").write_text("def f(x):\n    return x + 1\n\n\n" * 20)
    out = tmp_path / "draft"
    options = f"--ckpt {tmp_path}/full --exit 1 --data {tmp_path}/text --out {out} --steps 20 --batch 2 --seq 32 --lr 1e-2"
    monkeypatch.setattr(sys, "argv", ["bound.py", *options.split()])
    monkeypatch.setattr(Layer, "compile", lambda layer: None)
    runpy.run_path(str(ROOT / "docs" / "bound.py"), run_name="__main__")
    first, last = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    assert last["held_out_loss"] < first["held_out_loss"] - 0.1 and last["agreement"] > first["agreement"]
    draft = load_checkpoint(out)
    assert draft.config.n_layers == 1 and json.loads((out / "training.json").read_text())["tokens"] == 20 * 2 * 32


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_draft_model_that_is_the_model_is_always_right(temperature):
    """And stays right with two turns of wrong guesses between: its cache follows the verified text."""
    model = tiny_model(tiny_config())
    other = twin(model)
    rounds = decode(model, [3, 1, 4], partial(TwoModels, other=other), temperature)
    assert [len(r.drafted) for r in rounds] == [5] * 10 and all(r.accepted == 5 for r in rounds)

    class Misled(TwoModels):
        def draft(self, tokens, limit, pick):
            drafted, leaves = super().draft(tokens, limit, pick)
            self.rounds = getattr(self, "rounds", 0) + 1
            if self.rounds % 2 == 0 and drafted:  # what it ran is then not what it proposes
                wrong = (drafted[1] + 1) % 61 if len(drafted) > 1 else drafted[0]
                return [*drafted[:1], wrong, *drafted[2:]], leaves
            return drafted, leaves

    model = tiny_model(tiny_config())
    rounds = decode(model, [3, 1, 4], partial(Misled, other=twin(model)), temperature)
    assert all(r.accepted == len(r.drafted) for r in rounds[::2]) and any(r.accepted < len(r.drafted) for r in rounds[1::2])


def test_a_draft_model_with_another_vocabulary_is_refused():
    with pytest.raises(ValueError, match="one vocabulary"):
        decode(tiny_model(tiny_config()), [1], partial(TwoModels, other=tiny_model(tiny_config(vocab_size=60))))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_model_that_skips_what_adds_nothing_is_always_right(temperature):
    model = tiny_model(tiny_config(n_layers=5), damp_from=3, damping=0.0)
    rounds = decode(model, [3, 1], partial(SkipLayers, attention={3, 4}, mlp={3, 4}), temperature)
    assert all(r.accepted == len(r.drafted) == 5 for r in rounds)
    other = decode(tiny_model(tiny_config(n_layers=5)), [3, 1], partial(SkipLayers, attention={1}, mlp={2}), temperature)
    assert any(r.accepted < len(r.drafted) for r in other)


def test_prompt_lookup_copies_what_came_after_the_same_tokens():
    look = PromptLookup(None, None)
    assert look.draft([1, 2, 3, 4, 5, 9, 2, 3, 4], 2, None) == ([5, 9], 0)
    assert look.draft([4, 7, 7, 4, 8, 1, 4], 3, None) == ([8, 1, 4], 0), "the latest place"
    assert look.draft([1, 2, 3], 4, None) == ([], 0)
    assert look.draft([6, 6], 4, None) == ([6], 0)


def test_jacobi_guesses_what_the_verifier_said_beyond_its_correction():
    jacobi, pick = Jacobi(None, None), lambda logits, position: int(logits.argmax())
    assert jacobi.draft([5], 3, pick) == ([5, 5, 5], 0)
    logits = torch.eye(9)[[4, 7, 8, 2]]  # rows of [5] and the guesses; 4 is not 5: one token emitted
    jacobi.verified([5], [4], logits, {}, pick)
    assert jacobi.draft([5, 4], 4, pick) == ([7, 8, 2, 4], 0)


def test_exit_auto_judges_exits_by_what_was_verified():
    """Layers from 3 on add nothing, so exits 3 and up are always right, and the ones before are not."""
    model = tiny_model(tiny_config(n_layers=8), damp_from=3, damping=0.0)
    made = []

    def drafter(*args):
        made.append(AutoExit(*args, exit_layer=5))
        return made[0]

    rounds = decode(model, [3, 1], drafter, temperature=1.0, count=150, draft_len=8)
    auto = made[0]
    share = {e: sum(auto.right[e]) / len(auto.right[e]) for e in auto.exits}
    assert auto.exits == [1, 2, 3, 4, 5] and all(share[e] == 1 for e in (3, 4, 5)) and share[1] < 0.9
    assert auto.exit_layer == 3 and auto.draft_len > 3, "the first that is always right, and long drafts"
    assert all(r.accepted == len(r.drafted) for r in rounds[1:])


def test_exit_auto_stops_drafting_where_no_exit_is_ever_right(monkeypatch):
    monkeypatch.setattr("drafters.pass_seconds", lambda model: (lambda rows: 1e-3, lambda rows: 1e-3))
    model = tiny_model(tiny_config(n_layers=8, vocab_size=200), seed=3)
    rounds = decode(model, [3, 1], partial(AutoExit, exit_layer=2), count=200)
    assert sum(len(r.drafted) for r in rounds[40:]) < 0.2 * len(rounds[40:])


def test_run_lengths_count_what_follows():
    assert run_lengths([True, True, False, True]) == [2, 1, 0, 1] and run_lengths([]) == []


def test_exit_auto_plays_the_last_tokens_again(monkeypatch):
    """A guess is right ten times, then wrong five times: long drafts pay at first costs, none where drafting is dear."""
    model = tiny_model(tiny_config(n_layers=4))
    auto = AutoExit(model, None, exit_layer=1)
    auto.exits = [1]
    auto.sure[1].extend([True] * 45)
    auto.right[1].extend(([True] * 10 + [False] * 5) * 3)
    monkeypatch.setattr("drafters.pass_seconds", lambda model: (lambda rows: 1.0, lambda rows: 0.0))
    # per 15 tokens and in layers run, d = 4: 5 + 3 s, gains of 5, 5, 1 x 5: 56 s
    # d = 1: 2 + 3 s for gains of 2 x 5 and 1 x 5: 50 s; d = 2: 3 + 3 s, gains of 3, 3, 3, 2, 1 x 4: 48 s; plain: 4 s a token: 60 s
    assert auto.best() == (1, 2)
    monkeypatch.setattr("drafters.pass_seconds", lambda model: (lambda rows: rows, lambda rows: 0.0))
    assert auto.best() == (1, 0), "verifying is as dear as decoding"


def test_a_drafter_of_ones_own_is_a_class_with_one_method():
    class Again(Drafter):
        """Guesses that the last two tokens come again and again."""

        def draft(self, tokens, limit, pick):
            return (tokens[-2:] * limit)[:limit], 0

    model = tiny_model(tiny_config())
    own = [t for r in decode(model, [3, 1], Again) for t in r.emitted]
    assert own == [t for r in generate(model, [3, 1], max_new_tokens=60, eos=()) for t in r.emitted]


# ----------------------------------------------------------------------------------------------------------- kangaroo


def silent_adapter(model: Llama, exit_layer: int) -> Adapter:
    """An adapter that adds nothing: the plain exit."""
    adapter = Adapter(model.config, exit_layer).to(model.dtype)
    with torch.no_grad():
        adapter.self_attn.o_proj.weight.zero_()
        adapter.norm.weight.copy_(model.model.norm.weight)
    return adapter


def test_the_search_finds_the_sublayers_that_add_nothing():
    model = tiny_model(tiny_config(n_layers=4), damp_from=2, damping=0.0)
    attention, mlp, agreement = search_skips(model, torch.randint(61, (2, 20), generator=torch.Generator().manual_seed(0)), 150)
    assert attention == mlp == {2, 3} and agreement == 1.0


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_an_adapter_that_adds_nothing_drafts_what_the_exit_drafts(temperature):
    model = tiny_model(tiny_config(), damp_from=2)
    adapter = silent_adapter(model, 2)
    plain = list(generate(model, [3, 1, 4], exit_layer=2, draft_len=5, max_new_tokens=60, sampling=Sampling(temperature, seed=5), eos=()))
    rounds = decode(model, [3, 1, 4], partial(Kangaroo, adapter=adapter), temperature)
    assert [r.drafted for r in rounds] == [r.drafted for r in plain] and any(r.accepted < len(r.drafted) for r in rounds)


@torch.inference_mode()
def test_an_adapters_cache_is_its_attention_over_the_whole_text():
    """Guesses of a random adapter are those of one pass over the verified text, after accepted and rejected drafts alike."""
    torch.manual_seed(0)
    model = tiny_model(tiny_config(), damp_from=2, dtype=torch.float64)
    adapter = Adapter(model.config, 2).double()
    tokens = [3, 1, 4]
    for r in decode(model, [3, 1, 4], partial(Kangaroo, adapter=adapter), draft_len=3):
        text = tokens + r.drafted
        h = model.run_layers(model.embed(torch.tensor([text])), 0, 2)
        guesses = kangaroo.logits_of(model, adapter(h, *model.rotary(0, len(text))))[0].argmax(-1).tolist()
        assert guesses[len(tokens) - 1 : len(text) - 1] == r.drafted
        tokens += r.emitted


def test_training_an_adapter_makes_it_foresee_the_model():
    torch.manual_seed(0)
    model = tiny_model(tiny_config(n_layers=3), damp_from=1, damping=0.4).requires_grad_(False)
    before = {name: p.clone() for name, p in model.named_parameters()}
    adapter = silent_adapter(model, 1)
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=1e-2, weight_decay=0.0)
    tokens, history = torch.randint(61, (8, 24)), []
    for _ in range(40):
        loss = kangaroo.train_step(model, adapter, tokens)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        history.append(loss.item())
    full = model(tokens).log_softmax(-1)
    least = -(full.exp() * full).sum(-1).mean().item()  # the entropy of the target: no loss is lower
    assert least < history[-1] < least + 0.6 * (history[0] - least)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters()), "the model is frozen"


def test_an_adapter_is_saved_and_loaded_and_bad_ones_are_one_line(tmp_path):
    model = tiny_model(tiny_config(), dtype=torch.bfloat16)
    adapter = silent_adapter(model, 2)
    kangaroo.save_adapter(adapter, tmp_path, {})
    loaded = kangaroo.load_adapter(tmp_path, model)
    assert loaded.exit_layer == 2 and all(torch.equal(a, b) for a, b in zip(adapter.parameters(), loaded.parameters()))
    with pytest.raises(CheckpointError, match="another shape"):
        kangaroo.load_adapter(tmp_path, tiny_model(tiny_config(dim=32)))
    for damage in (
        lambda: save_file(load_file(tmp_path / "adapter.safetensors"), tmp_path / "adapter.safetensors", metadata={"exit_layer": "4"}),
        lambda: save_file(load_file(tmp_path / "adapter.safetensors"), tmp_path / "adapter.safetensors"),
        lambda: (kangaroo.save_adapter(adapter, tmp_path, {}), (tmp_path / "adapter.safetensors").write_bytes(b"12345678901")),
        lambda: (tmp_path / "adapter.safetensors").unlink(),
        lambda: (adapter.norm.weight.data.fill_(float("nan")), kangaroo.save_adapter(adapter, tmp_path, {})),
    ):
        damage()
        with pytest.raises(CheckpointError) as refused:
            kangaroo.load_adapter(tmp_path, model)
        assert "\n" not in str(refused.value)


@pytest.mark.parametrize("text, found", [("attn:3,4,mlp:7", ({3, 4}, {7})), ("mlp:1", (set(), {1})), ("mlp:1,attn:0,2", ({0, 2}, {1}))])
def test_sublayers_are_read(text, found):
    assert sublayers(text) == {"attention": found[0], "mlp": found[1]}


@pytest.mark.parametrize("bad", ["3", "attn", "attn:x", "ffn:3", "attn:3;4", ""])
def test_sublayers_that_are_none_are_refused(bad):
    with pytest.raises(ValueError, match="--skip takes"):
        sublayers(bad)


def test_a_drafters_cache_is_not_asked_for_more_than_it_holds():
    model = tiny_model(tiny_config(max_len=40))
    cache = new_cache(model.config, 40, 5, model.dtype, model.device)
    rounds = decode(model, [1] * 30, partial(TwoModels, other=twin(model)), cache=cache)
    assert sum(len(r.emitted) for r in rounds) == 10
