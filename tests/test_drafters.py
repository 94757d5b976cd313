"""Drafters: what each guesses and learns, what it may answer, and its name on the command line.

That none of them changes the text is a law of test_exactness.py.
"""

from functools import partial

import pytest
import torch
from helpers import (
    DRAFTERS,
    corpus,
    decode,
    fates,
    random_adapter,
    same_bits,
    tiny_config,
    tiny_model,
)
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import decode as front
from decode import NoDraft, Sampling, new_cache
from exact import pack
from extras import kangaroo
from extras.drafters import (
    FORMS,
    Jacobi,
    LookupExit,
    PromptLookup,
    SkipLayers,
    parse_drafter,
    search_skips,
)
from extras.kangaroo import Kangaroo, load_adapter, save_adapter, train_step
from model import load_checkpoint, save_checkpoint
from support.checkpoint import CheckpointError

# --------------------------------------
# What each guesses


@torch.inference_mode()
def test_skipped_sublayers_are_left_out(monkeypatch):
    """By a model in which they add zero."""
    model, zeros = tiny_model(dtype=torch.float64), tiny_model(dtype=torch.float64)
    for l, layer in enumerate(zeros.layers):
        layer.self_attn.o_proj.weight.data *= l not in (0, 2)
        layer.mlp.down_proj.weight.data *= l not in (1, 2)
    x = torch.tensor([[3, 1, 4, 1, 5]])
    expected, cache = zeros(x)[0], new_cache(model, 5, 0)
    thin = partial(SkipLayers, attention={0, 2}, mlp={1, 2})
    found = thin(model, cache).run_layers(model.embed(x[0]), 0, 4, cache, 0)
    torch.testing.assert_close(model.unembed(found), expected)
    seen, unembed = [], model.unembed
    monkeypatch.setattr(model, "unembed", lambda h: seen.append(unembed(h)) or seen[-1])
    decode(model, [3], drafter=thin, max_new_tokens=2)
    torch.testing.assert_close(seen[0][0], expected[0])


def test_the_search_finds_idle_sublayers():
    model = tiny_model(damp_from=2, damping=0.0)
    tokens = torch.randint(61, (2, 20), generator=torch.Generator().manual_seed(0))
    seen = []
    attention, mlp, agreement = search_skips(model, tokens, 150, on_try=lambda *a: seen.append(a))
    assert attention == mlp == {2, 3} and agreement == 1.0 and len(seen) == 150


@pytest.mark.parametrize("text, limit, copy", [
    ("123459234", 2, "59"),
    ("23489347234", 1, "8"),  # after three equal tokens, though that is older
    ("4774814", 3, "814"),  # the latest place
    ("123", 4, ""),
    ("66", 4, "6666"),  # a copy goes on with itself
    ("15656", 5, "56565"),
])  # fmt: skip
def test_lookup_copies_after_the_longest_match(text, limit, copy):
    found = PromptLookup(None, None).draft([*map(int, text)], limit, None)
    assert found == ([*map(int, copy)], 0)


@given(st.lists(st.integers(0, 3), min_size=1, max_size=60), st.integers(1, 9))
def test_lookup_grows_with_the_text(tokens, limit):
    growing = PromptLookup(None, None)
    for end in range(1, len(tokens) + 1, 3):
        found = growing.draft(tokens[:end], limit, None)
        assert found == PromptLookup(None, None).draft(tokens[:end], limit, None)
        ends_alike = lambda place, n: tokens[place - n : place] == tokens[end - n : end]
        places = ((place, n) for n in (3, 2, 1) for place in range(end - 1, n - 1, -1))
        first = next((tokens[place] for place, n in places if ends_alike(place, n)), None)
        assert found[0][:1] == ([] if first is None else [first])


def test_copies_are_used_while_they_beat_the_exit(monkeypatch):
    hybrid, text = LookupExit(tiny_model(), None, exit_layer=1), [1, 2, 3, 4, 5, 1, 2, 3]
    monkeypatch.setattr(hybrid.exit, "draft", lambda *_: ([8, 8], 1))
    exit, copy = ([8, 8], 1), ([4, 5, 1, 2], 0)
    assert hybrid.draft(text[:-1], 4, None) == exit, "nothing to copy"
    hybrid.verified(text[:-1], [3], None, None)
    for said, other, best in (  # after a copy, after the exit's guesses, what is best then
        ([9], [8, 8, 9], exit),  # copies that are wrong lose trust, and are still looked at
        ([4, 5, 1, 2, 7], [4], copy),  # the text becomes what a copy would have been
    ):
        for _ in range(40):
            copying = hybrid.draft(text, 4, None) == copy
            hybrid.verified(text, said if copying else other, None, None)
        assert hybrid.draft(text, 4, None) == best


def test_jacobi_guesses_what_was_said_beyond():
    jacobi, pick = Jacobi(None, None), lambda logits, position: int(logits.argmax())
    assert jacobi.draft([5], 3, pick) == ([5, 5, 5], 0)
    logits = torch.eye(9)[[4, 7, 8, 2]]  # rows of [5] and the guesses: 4 is not 5, one emitted
    jacobi.verified([5], [4], logits, pick)
    assert jacobi.draft([5, 4], 4, pick) == ([7, 8, 2, 4], 0)


# --------------------------------------
# What a drafter may answer


class Honest(NoDraft):
    """Runs two layers on the last token and one guess, and says so."""

    def draft(self, tokens, limit, pick):
        return front.draft(self.model, self.cache, tokens[-1], min(limit, 1), pick, 2), 2


def answering(change):
    """Honest in the first round, then with its answer changed."""

    class Changed(Honest):
        def draft(self, tokens, limit, pick):
            return super().draft(tokens, limit, pick) if len(tokens) < 3 else change(self, tokens)

    return Changed


def honestly(drafter, tokens):
    return Honest.draft(drafter, tokens, 1, lambda logits, position: 7)[0]


WRONG = {
    "a token beyond the vocabulary": lambda self, tokens: ([1, 61], 0),
    "a token below it": lambda self, tokens: ([-1], 0),
    "more guesses than draft_len": lambda self, tokens: ([1] * 6, 0),
    "layers that did not run": lambda self, tokens: ([1], 2),
    "more layers than ran": lambda self, tokens: (honestly(self, tokens), 3),
    "fewer layers than ran": lambda self, tokens: (honestly(self, tokens), 1),
    "layers of another guess": lambda self, tokens: (honestly(self, tokens) + [1], 2),
    "a negative number of layers": lambda self, tokens: ([1], -2),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_answer_is_refused(wrong):
    """After an honest round, whose exit queries must not count for the next."""
    model, rounds = pack(tiny_model()), []
    with pytest.raises(ValueError, match="a drafter") as refused:
        for r in front.generate(
            model, [3, 1], drafter=answering(WRONG[wrong]), draft_len=5, max_new_tokens=9, eos=()
        ):
            rounds.append(r)
    assert len(rounds) == 1 and str(refused.value).isprintable()


# --------------------------------------
# The option


@pytest.fixture
def made(tmp_path, monkeypatch):
    """A model, and in the working directory a checkpoint, an adapter and drafters for it."""
    monkeypatch.chdir(tmp_path)
    model = tiny_model()
    save_checkpoint(model, tmp_path / "other")
    save_checkpoint(tiny_model(tiny_config(vocab_size=60)), tmp_path / "foreign")
    save_adapter(random_adapter(model), tmp_path / "adapter", {})
    (tmp_path / "mine.py").write_text(
        "from decode import NoDraft\nCOUNT = 3\nclass Again(NoDraft):\n"
        "    def draft(self, tokens, limit, pick):\n        return tokens[-1:] * limit, 0\n"
    )
    (tmp_path / "broken.py").write_text("1 / 0")
    return model


OPTIONS = {
    "lookup": "PromptLookup",
    "exit": None,
    "lookup+exit": "LookupExit",
    "jacobi": "Jacobi",
    "model:other": "TwoModels",
    "kangaroo:adapter": "Kangaroo",
    "skip:attn:3": "SkipLayers",
    "mine.py:Again": "Again",
}


def test_an_option_names_drafter_and_settings(made):
    decode_few = partial(decode, max_new_tokens=12)
    plain = decode_few(pack(tiny_model()), [3, 1])
    options = {text: parse_drafter(text, made, 2) for text in OPTIONS}
    pack(made)
    for text, settings in options.items():
        drafter = settings["drafter"]
        assert getattr(getattr(drafter, "func", drafter), "__name__", None) == OPTIONS[text]
        own = dict(exit_layer=2 if "exit" in text else 0)
        if drafter and OPTIONS[text] == "Kangaroo":
            own = dict(exit_layer=2, draft_len=6, min_confidence=0.6)
        assert settings == dict(drafter=drafter) | own
        assert same_bits(decode_few(made, [3, 1], **settings), plain)


def test_the_sublayers_of_an_option_are_read():
    found = parse_drafter("skip:mlp:1,attn:0,2,mlp:3", tiny_model())["drafter"].keywords
    assert found == dict(attention={0, 2}, mlp={1, 3})


UNKNOWN = ["", "lookup:", "model", "kangaroo:", "skip:", "mine.py"]
SKIPS = ["3", "attn:", "attn:x", "ffn:3", "attn:-1", "attn:4"]
FILES = ["none.py:Again", "mine.py:None", "mine.py:COUNT", "broken.py:Again"]
OTHERS = ["window:0", "window:x", "model:none", "kangaroo:none", "model:foreign"]


@pytest.mark.parametrize("text", [*UNKNOWN, *("skip:" + x for x in SKIPS), *FILES, *OTHERS])
def test_an_impossible_option_is_one_line(made, text):
    with pytest.raises(ValueError) as refused:
        parse_drafter(text, made)
    assert str(refused.value).isprintable()
    assert (FORMS in str(refused.value)) == (text in UNKNOWN)


# --------------------------------------
# Kangaroo


def silent_adapter(model, exit_layer=2):
    """An adapter that adds nothing: the plain exit."""
    adapter = random_adapter(model, exit_layer)
    with torch.no_grad():
        adapter.self_attn.o_proj.weight.zero_()
        adapter.norm.weight.copy_(model.norm.weight)
    return adapter


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("confidence", [0.0, 0.2])
def test_a_silent_adapter_is_the_exit(temperature, confidence):
    model = tiny_model(damp_from=2)
    how = dict(sampling=Sampling(temperature, seed=5), min_confidence=confidence)
    drafter = partial(Kangaroo, adapter=silent_adapter(model))
    plain = decode(model, [3, 1, 4], exit_layer=2, **how).rounds
    rounds = decode(model, [3, 1, 4], drafter=drafter, **how).rounds
    assert [r.drafted for r in rounds] == [r.drafted for r in plain]
    assert confidence or fates(rounds) != {"all"}


def by_adapter(model, adapter):
    """What an adapter says after each token of a whole text."""
    early = lambda text: model.run_layers(model.embed(text), 0, 2)
    return lambda text: model.lm_head(adapter(early(text), *model.rotary(0, text.shape[1])))


# A rule that accepts whatever is drafted leaves the last guess of a draft, which was not
# unembedded, in the text.
@torch.inference_mode()
@pytest.mark.parametrize("accepts_all", [False, True])
@pytest.mark.parametrize("prompt", [[3], [3, 1, 4]])
@pytest.mark.parametrize("who", ["two models", "kangaroo"])
def test_a_drafters_own_cache_follows_the_text(who, prompt, accepts_all, monkeypatch):
    """Its guesses are those of one pass over the text, after accepted and rejected drafts alike."""
    if accepts_all:
        every = lambda guesses, logits, *_: [*guesses, int(logits[-1].argmax())]
        monkeypatch.setattr("decode.accept", every)
    model = tiny_model(damp_from=2, damping=0.3, dtype=torch.float64)
    settings, tokens = DRAFTERS[who](model, 2), list(prompt)
    (own,) = settings["drafter"].keywords.values()
    logits = own if who == "two models" else by_adapter(model, own)
    rounds = decode(model, prompt, **settings, draft_len=3).rounds
    for r in rounds:
        text = tokens + r.drafted
        said = logits(torch.tensor([text]))[0].argmax(-1).tolist()
        assert said[len(tokens) - 1 : len(text) - 1] == r.drafted
        tokens += r.emitted
    assert fates(rounds) == {"all"} if accepts_all else fates(rounds) > {"all"}


def test_training_makes_an_adapter_foresee():
    torch.manual_seed(0)
    model = tiny_model(tiny_config(n_layers=3), damp_from=1, damping=0.4).requires_grad_(False)
    before = {name: p.clone() for name, p in model.named_parameters()}
    adapter = silent_adapter(model, 1)
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=1e-2, weight_decay=0.0)
    tokens, history = torch.randint(61, (8, 24)), []
    for _ in range(40):
        loss, _ = train_step(model, adapter, tokens)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        history.append(loss.item())
    full = model(tokens).log_softmax(-1)
    least = -(full.exp() * full).sum(-1).mean().item()  # the target's entropy: no loss is lower
    assert least < history[-1] < least + 0.6 * (history[0] - least)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_an_adapter_is_saved_whole_and_must_fit(tmp_path):
    model, file = tiny_model(dtype=torch.bfloat16), tmp_path / "adapter.safetensors"

    def assert_refused(model=model):
        with pytest.raises(CheckpointError, match=r"adapter\.safetensors") as refused:
            load_adapter(tmp_path, model)
        assert str(refused.value).isprintable()

    assert_refused()
    adapter = silent_adapter(model)
    for _ in range(2):
        save_adapter(adapter, tmp_path, dict(steps=3))
    loaded = load_adapter(tmp_path, model)
    assert loaded.exit_layer == 2 and [*tmp_path.iterdir()] == [file]
    assert all(map(torch.equal, adapter.parameters(), loaded.parameters()))
    assert_refused(tiny_model(tiny_config(dim=32)))
    weights = load_file(file)
    for header in (None, {"exit_layer": "4"}, {"exit_layer": "two"}):
        save_file(weights, file, header)
        assert_refused()
    save_file({**weights, "more": torch.zeros(2)}, file, {"exit_layer": "2"})
    assert_refused()
    file.write_bytes(b"12345678901")
    assert_refused()


@pytest.fixture
def train(small, tmp_path, command):
    """train("--steps 9") -> code, out, err of the command on a small model and corpus."""
    where = f"--ckpt {small} --data {corpus(tmp_path)} --out {tmp_path}/out --seq 16 --batch 4 "
    return lambda options: command(kangaroo.main, *(where + options).split())


def test_the_command_trains_an_adapter(train, small, tmp_path):
    """That decode can use."""
    loss = lambda run: float(run.err.split("held-out loss ")[-1].split(",")[0])
    assert loss(train("--steps 80 --lr 0.02")) < loss(train("--steps 1 --lr 0.02"))
    settings = parse_drafter(f"kangaroo:{tmp_path}/out", load_checkpoint(small))
    assert settings["drafter"].keywords["adapter"].exit_layer == 2


@pytest.mark.parametrize("bad", ["--exit 4", "--seq 99999", "--data none"])
def test_impossible_training_leaves_no_adapter(train, tmp_path, bad):
    run = train(f"--steps 2 {bad}")
    assert run.code == 2 and run.err.count("\n") == 1 and "kangaroo: " in run.err
    assert not (tmp_path / "out" / "adapter.safetensors").exists()
