"""Drafters: none of them can change the text, and each guesses what it should."""

import sys
from functools import partial
from itertools import product

import pytest
import torch
from helpers import tiny_config, tiny_model
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from decode import Sampling, generate, new_cache
from exact import RowLinear, pack
from extras import kangaroo
from extras.drafters import (
    POSSIBLE,
    Drafter,
    EarlyExit,
    Jacobi,
    LookupExit,
    PromptLookup,
    SkipLayers,
    TwoModels,
    parse_drafter,
    search_skips,
)
from extras.early_exit import keep_layers
from extras.kangaroo import Adapter, Kangaroo, load_adapter, save_adapter, train_step
from model import save_checkpoint
from support.checkpoint import CheckpointError

TEMPERATURES = pytest.mark.parametrize("temperature", [0.0, 1.0])


def decode(model, prompt, drafter=None, temperature=0.0, count=60, **how):
    """All rounds of a generation, with no end of text unless `how` has one."""
    how = dict(draft_len=5, eos=()) | how
    sampling = Sampling(temperature, seed=5)
    return list(
        generate(model, prompt, drafter=drafter, max_new_tokens=count, sampling=sampling, **how)
    )


def text_of(rounds):
    return [token for r in rounds for token in r.emitted]


def random_adapter(model, exit_layer=2):
    torch.manual_seed(1)
    return Adapter(model.config, exit_layer).to(model.dtype)


def exit_of(model, kind):
    """Drafts of two layers that know the first 20 tokens alone."""
    first = torch.nn.Linear(model.config.dim, 20, bias=False)
    first.weight.data = model.model.embed_tokens.weight[:20]
    return partial(kind, exit_layer=2, head=RowLinear({}, first))


DRAFTERS = {  # for a packed model of 4 layers, whose last two add little
    "two models": lambda model: partial(TwoModels, other=keep_layers(model, range(2))),
    "skip layers": lambda model: partial(SkipLayers, attention={2, 3}, mlp={3}),
    "kangaroo": lambda model: partial(Kangaroo, adapter=random_adapter(model)),
    "lookup": lambda model: PromptLookup,
    "exit of a small head": lambda model: exit_of(model, EarlyExit),
    "lookup and exit": lambda model: exit_of(model, LookupExit),
    "jacobi": lambda model: Jacobi,
}


CASES = [  # prompt, most new tokens, confidence, and whether a token near the end ends the text
    ([3], 70, 0.0, False),
    ([1, 2] * 12, 45, 0.2, False),
    (list(range(30)), 99, 0.0, True),
]


@pytest.mark.parametrize("who", DRAFTERS)
def test_whoever_drafts_tokens_and_logits_are_plain_decodings_to_the_bit(who):
    """Over the end of a view of the cache, of the context, of the budget, and of the text."""
    fates = set()
    for dtype, temperature in product((torch.float32, torch.bfloat16), (0.0, 1.0)):
        for seed, (prompt, count, confidence, ends) in enumerate(CASES):
            config = tiny_config(vocab_size=37, max_len=70, n_kv_heads=1 + seed % 2)
            model = pack(tiny_model(config, seed, damp_from=2, dtype=dtype))
            plain = decode(model, prompt, None, temperature, count)
            ids = text_of(plain)
            eos = (ids[-9],) if ends else ()
            kept = ids.index(ids[-9]) + 1 if ends else len(ids)
            how = dict(eos=eos, min_confidence=confidence)
            rounds = decode(model, prompt, DRAFTERS[who](model), temperature, count, **how)
            assert text_of(rounds) == ids[:kept]
            drafted, alone = (torch.cat([r.logits for r in x]) for x in (rounds, plain))
            assert torch.equal(drafted, alone[:kept])
            for r in rounds:
                if r.drafted:
                    all_right = r.accepted == len(r.drafted)
                    fates.add("all" if all_right else "some" if r.accepted else "none")
    assert fates == {"all", "some", "none"}, "the cases must cover every fate of a draft"


@TEMPERATURES
def test_a_draft_model_that_is_the_model_is_always_right(temperature):
    model = pack(tiny_model(tiny_config()))
    rounds = decode(model, [3, 1, 4], partial(TwoModels, other=model), temperature)
    assert [len(r.drafted) for r in rounds] == [5] * 10
    assert all(r.accepted == 5 for r in rounds)


@torch.inference_mode()
def test_a_draft_models_cache_follows_the_verified_text():
    """Its guesses are those of one pass over the text, after accepted and rejected drafts alike."""
    model = tiny_model(tiny_config(), damp_from=2, damping=0.3, dtype=torch.float64)
    other, tokens, fates = keep_layers(model, range(2)), [3, 1, 4], set()
    for r in decode(model, tokens, partial(TwoModels, other=other)):
        text = tokens + r.drafted
        said = other(torch.tensor([text]))[0].argmax(-1).tolist()
        assert said[len(tokens) - 1 : len(text) - 1] == r.drafted
        tokens += r.emitted
        fates.add("all" if r.accepted == 5 else "some" if r.accepted else "none")
    assert fates == {"all", "some", "none"}


@TEMPERATURES
def test_a_model_that_skips_what_adds_nothing_is_always_right(temperature):
    model = pack(tiny_model(tiny_config(n_layers=5), damp_from=3, damping=0.0))
    nothing = partial(SkipLayers, attention={3, 4}, mlp={3, 4})
    rounds = decode(model, [3, 1], nothing, temperature)
    assert all(r.accepted == len(r.drafted) == 5 for r in rounds)
    something = decode(model, [3, 1], partial(SkipLayers, attention={1}, mlp={2}), temperature)
    assert any(r.accepted < len(r.drafted) for r in something)


@torch.inference_mode()
def test_skipped_sublayers_are_left_out():
    model = tiny_model(tiny_config(), dtype=torch.float64)
    for l, layer in enumerate(model.model.layers):  # what adds zero is as good as left out
        layer.self_attn.o_proj.weight.data *= l not in (0, 2)
        layer.mlp.down_proj.weight.data *= l not in (1, 2)
    x = torch.tensor([[3, 1, 4, 1, 5]])
    expected = model(x)
    for l, layer in enumerate(model.model.layers):
        layer.self_attn.o_proj.weight.data += l in (0, 2)
        layer.mlp.down_proj.weight.data += l in (1, 2)
    drafts = []

    class Seen(SkipLayers):
        def unembed(self, h):
            drafts.append(self.model.unembed(h)[0])
            return drafts[-1][None]

        def draft(self, tokens, limit, pick):
            self.unembed = lambda h: Seen.unembed(self, h)
            return super().draft(tokens, limit, pick)

    thin = partial(Seen, attention={0, 2}, mlp={1, 2})
    cache = new_cache(model.config, 5, 0, model.dtype, model.device)
    h = thin(model, cache).run_layers(model.embed(x[0]), 0, 4, cache, 0)
    torch.testing.assert_close(model.unembed(h), expected[0])
    decode(model, [3], thin, count=2)
    torch.testing.assert_close(drafts[0], expected[0, 0])


def test_the_search_finds_the_sublayers_that_add_nothing():
    model = tiny_model(tiny_config(n_layers=4), damp_from=2, damping=0.0)
    tokens = torch.randint(61, (2, 20), generator=torch.Generator().manual_seed(0))
    seen = []
    attention, mlp, agreement = search_skips(model, tokens, 150, on_try=lambda *a: seen.append(a))
    assert attention == mlp == {2, 3} and agreement == 1.0 and len(seen) == 150


def test_prompt_lookup_copies_what_came_after_the_longest_match():
    look = lambda *tokens, limit: PromptLookup(None, None).draft([*tokens], limit, None)
    assert look(1, 2, 3, 4, 5, 9, 2, 3, 4, limit=2) == ([5, 9], 0)
    assert look(2, 3, 4, 8, 9, 3, 4, 7, 2, 3, 4, limit=1) == ([8], 0), "three, though older"
    assert look(4, 7, 7, 4, 8, 1, 4, limit=3) == ([8, 1, 4], 0), "the latest place"
    assert look(1, 2, 3, limit=4) == ([], 0)
    assert look(6, 6, limit=4) == ([6, 6, 6, 6], 0), "a copy goes on with itself"
    assert look(1, 5, 6, 5, 6, limit=5) == ([5, 6, 5, 6, 5], 0)


@given(st.lists(st.integers(0, 3), min_size=1, max_size=60), st.integers(1, 9))
def test_prompt_lookup_of_a_growing_text_is_that_of_the_whole(tokens, limit):
    growing = PromptLookup(None, None)
    for end in range(1, len(tokens) + 1, 3):
        found = growing.draft(tokens[:end], limit, None)
        assert found == PromptLookup(None, None).draft(tokens[:end], limit, None)
        latest = [n for n in (3, 2, 1) if n < end]
        places = (
            p
            for n in latest
            for p in range(end - 1, n - 1, -1)
            if tokens[p - n : p] == tokens[end - n : end]
        )
        assert found[0][:1] == [tokens[p] for p in places][:1]


def test_copies_are_used_while_they_hold_more_than_the_exit_foresees(monkeypatch):
    hybrid = LookupExit(tiny_model(tiny_config()), None, exit_layer=1)
    monkeypatch.setattr(hybrid.exit, "draft", lambda *_: ([8, 8], 1))
    text = [1, 2, 3, 4, 5, 1, 2, 3]
    assert hybrid.draft(text[:-1], 4, None) == ([8, 8], 1), "nothing to copy"
    hybrid.verified(text[:-1], [3], None, None)
    for _ in range(40):  # copies that are wrong lose trust, and are still looked at
        copying = hybrid.draft(text, 4, None) == ([4, 5, 1, 2], 0)
        hybrid.verified(text, [9] if copying else [8, 8, 9], None, None)
    assert hybrid.draft(text, 4, None) == ([8, 8], 1)
    for _ in range(40):  # the text becomes what a copy would have been
        copying = hybrid.draft(text, 4, None) == ([4, 5, 1, 2], 0)
        hybrid.verified(text, [4, 5, 1, 2, 7] if copying else [4], None, None)
    assert hybrid.draft(text, 4, None) == ([4, 5, 1, 2], 0)


def test_jacobi_guesses_what_the_verifier_said_beyond_its_correction():
    jacobi, pick = Jacobi(None, None), lambda logits, position: int(logits.argmax())
    assert jacobi.draft([5], 3, pick) == ([5, 5, 5], 0)
    logits = torch.eye(9)[[4, 7, 8, 2]]  # rows of [5] and the guesses: 4 is not 5, one emitted
    jacobi.verified([5], [4], logits, pick)
    assert jacobi.draft([5, 4], 4, pick) == ([7, 8, 2, 4], 0)


def test_a_drafter_of_ones_own_is_a_class_with_one_method():
    class Again(Drafter):
        """Guesses that the last two tokens come again and again."""

        def draft(self, tokens, limit, pick):
            return (tokens[-2:] * limit)[:limit], 0

    model = pack(tiny_model(tiny_config()))
    assert text_of(decode(model, [3, 1], Again)) == text_of(decode(model, [3, 1]))


# --------------------------------------------------------------------------------------------------
# The option


@pytest.fixture
def made(tmp_path):
    """A model, and beside it a checkpoint and an adapter for it."""
    model = tiny_model(tiny_config())
    save_checkpoint(model, tmp_path / "other")
    save_checkpoint(tiny_model(tiny_config(vocab_size=60)), tmp_path / "foreign")
    save_adapter(random_adapter(model), tmp_path / "adapter", {})
    return model


def test_an_option_names_the_drafter_and_its_own_settings(made, tmp_path):
    plain = text_of(decode(pack(made), [3, 1]))
    for text, drafter in {
        "lookup": PromptLookup,
        "exit": EarlyExit,
        "lookup+exit": LookupExit,
        "jacobi": Jacobi,
        f"model:{tmp_path}/other": TwoModels,
        f"kangaroo:{tmp_path}/adapter": Kangaroo,
        "skip:attn:3": SkipLayers,
    }.items():
        settings = parse_drafter(text, made)
        assert getattr(settings["drafter"], "func", settings["drafter"]) is drafter
        own = dict(exit_layer=2, draft_len=6, min_confidence=0.6) if drafter is Kangaroo else {}
        own |= dict(exit_layer=1) if "exit" in text else {}
        assert settings == dict(drafter=settings["drafter"], exit_layer=0) | own
        assert text_of(decode(made, [3, 1], **settings)) == plain


def test_a_small_head_is_the_first_rows_of_the_head(made):
    """With all rows drafts are those of the exit; with some, they are of those tokens alone."""
    model = tiny_model(tiny_config())
    drafts = [
        [r.drafted for r in decode(model, [3, 1], **parse_drafter("exit", model, 2, size))]
        for size in (None, 61, 9)
    ]
    assert drafts[0] == drafts[1] and any(t > 8 for draft in drafts[1] for t in draft)
    assert all(t < 9 for draft in drafts[2] for t in draft)
    for size in (0, 62):
        with pytest.raises(ValueError, match="from 1 to 61"):
            parse_drafter("exit", model, 2, size)
    with pytest.raises(ValueError, match="leave it out"):
        parse_drafter("lookup", model, 2, 9)


@pytest.mark.parametrize(
    "text, attention, mlp",
    [
        ("attn:2,3,mlp:1", {2, 3}, {1}),
        ("mlp:1", set(), {1}),
        ("mlp:1,attn:0,2,mlp:3", {0, 2}, {1, 3}),
    ],
)
def test_the_sublayers_of_an_option_are_read(text, attention, mlp):
    found = parse_drafter("skip:" + text, tiny_model(tiny_config()))["drafter"].keywords
    assert found == dict(attention=attention, mlp=mlp)


SKIPS = ["", "3", "attn", "attn:", "attn:x", "ffn:3", "attn:3;4", "attn:3,", "attn:-1", "attn:4"]
OTHERS = ["", "look", "lookup:", "model", "model:", "kangaroo:", "model:none", "kangaroo:none"]


@pytest.mark.parametrize("text", [*OTHERS, *("skip:" + x for x in SKIPS), "model:foreign"])
def test_an_option_that_cannot_be_is_one_clear_line(made, tmp_path, monkeypatch, text):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError) as refused:
        parse_drafter(text, made)
    line = str(refused.value)
    assert "\n" not in line and ("none" in text or "must" in line)
    if text in OTHERS[:6] or text in ("skip:", "skip:attn:x"):
        assert POSSIBLE in line


# --------------------------------------------------------------------------------------------------
# Kangaroo


def silent_adapter(model, exit_layer=2):
    """An adapter that adds nothing: the plain exit."""
    adapter = Adapter(model.config, exit_layer).to(model.dtype)
    with torch.no_grad():
        adapter.self_attn.o_proj.weight.zero_()
        adapter.norm.weight.copy_(model.model.norm.weight)
    return adapter


@TEMPERATURES
def test_an_adapter_that_adds_nothing_drafts_what_the_exit_drafts(temperature):
    model = tiny_model(tiny_config(), damp_from=2)
    drafter = partial(Kangaroo, adapter=silent_adapter(model))
    for confidence in (0.0, 0.2):
        how = dict(temperature=temperature, min_confidence=confidence)
        plain = decode(model, [3, 1, 4], exit_layer=2, **how)
        rounds = decode(model, [3, 1, 4], drafter, **how)
        assert [r.drafted for r in rounds] == [r.drafted for r in plain]
        assert confidence or any(r.accepted < len(r.drafted) for r in rounds)


@torch.inference_mode()
@pytest.mark.parametrize("prompt", [[3], [3, 1, 4]])
@pytest.mark.parametrize("accepts_all", [False, True])
def test_an_adapters_cache_is_its_attention_over_the_whole_text(prompt, accepts_all, monkeypatch):
    """Its guesses are those of one pass over the text, after accepted and rejected drafts alike.

    A rule that accepts whatever is drafted leaves the last guess of a draft, which was not
    unembedded, in the text.
    """

    def accept(guesses, logits, position, pick, eos):
        return [*guesses, int(logits[-1].argmax())]

    if accepts_all:
        monkeypatch.setattr("decode.accept", accept)
    model = tiny_model(tiny_config(), damp_from=2, dtype=torch.float64)
    adapter = random_adapter(model)
    tokens, fates = list(prompt), set()
    for r in decode(model, prompt, partial(Kangaroo, adapter=adapter), draft_len=3, count=40):
        text = tokens + r.drafted
        h = model.run_layers(model.embed(torch.tensor([text])), 0, 2)
        logits = model.lm_head(adapter(h, *model.rotary(0, len(text))))[0]
        assert logits.argmax(-1)[len(tokens) - 1 : len(text) - 1].tolist() == r.drafted
        tokens += r.emitted
        fates.add(r.accepted == len(r.drafted))
    assert fates == ({True} if accepts_all else {True, False})


def test_training_an_adapter_makes_it_foresee_a_model_that_stays_as_it_is():
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


def test_an_adapter_is_saved_whole_and_loaded(tmp_path):
    model = tiny_model(tiny_config(), dtype=torch.bfloat16)
    adapter = silent_adapter(model)
    (tmp_path / "adapter.safetensors.new").write_bytes(b"mine")
    for _ in range(2):
        save_adapter(adapter, tmp_path, dict(steps=3))
    loaded = load_adapter(tmp_path, model)
    assert loaded.exit_layer == 2
    assert all(torch.equal(a, b) for a, b in zip(adapter.parameters(), loaded.parameters()))
    assert (tmp_path / "adapter.safetensors.new").read_bytes() == b"mine"
    assert len(list(tmp_path.iterdir())) == 2


def test_an_adapter_that_does_not_fit_is_one_clear_line(tmp_path):
    model = tiny_model(tiny_config())
    adapter, file = silent_adapter(model), tmp_path / "adapter.safetensors"

    def assert_refused(model=model):
        with pytest.raises(CheckpointError) as refused:
            load_adapter(tmp_path, model)
        assert "\n" not in str(refused.value) and "adapter.safetensors" in str(refused.value)

    assert_refused()
    save_adapter(adapter, tmp_path, {})
    load_adapter(tmp_path, model)
    assert_refused(tiny_model(tiny_config(dim=32)))
    weights = load_file(file)
    for header in (None, {"exit_layer": "4"}, {"exit_layer": "two"}, {"exit_layer": "-1"}):
        save_file(weights, file, metadata=header)
        assert_refused()
    save_file({**weights, "more": torch.zeros(2)}, file, metadata={"exit_layer": "2"})
    assert_refused()
    file.write_bytes(b"12345678901")
    assert_refused()


@pytest.fixture
def train(shipped, tmp_path, monkeypatch, capsys):
    """train("--steps", "9") -> exit code and stderr of the command on a small model and corpus."""
    ckpt, corpus = tmp_path / "ckpt", tmp_path / "corpus"
    save_checkpoint(tiny_model(tiny_config(vocab_size=2048), damp_from=2, damping=0.3), ckpt)
    (ckpt / "tokenizer.model").write_bytes((shipped / "tokenizer.model").read_bytes())
    corpus.mkdir()
    for number in range(60):
        (corpus / f"{number}.py").write_text("def f(x):\n    return x + 1\n\n\n" * 20)

    def call(*options):
        common = f"kangaroo --ckpt {ckpt} --data {corpus} --out {tmp_path}/out --seq 16 --batch 4"
        monkeypatch.setattr(sys, "argv", [*common.split(), *options])
        code = 0
        try:
            kangaroo.main()
        except SystemExit as stop:
            code = stop.code
        return code, capsys.readouterr().err

    return call


def test_the_command_trains_an_adapter_that_decode_can_use(train, tmp_path):
    losses = []
    for steps in ("1", "80"):
        code, said = train("--steps", steps, "--lr", "0.02")
        assert code == 0
        losses.append(float(said.split("held-out loss ")[-1].split(",")[0]))
    assert losses[1] < losses[0]
    model = tiny_model(tiny_config(vocab_size=2048), damp_from=2, damping=0.3)
    settings = parse_drafter(f"kangaroo:{tmp_path}/out", model)
    assert settings["drafter"].keywords["adapter"].exit_layer == 2


@pytest.mark.parametrize(
    "bad",
    ["--exit 0", "--exit 4", "--steps 0", "--lr -1", "--seq 99999", "--ckpt none", "--data none"],
)
def test_training_that_cannot_be_is_one_clear_line_and_leaves_no_adapter(train, tmp_path, bad):
    code, said = train("--steps", "2", *bad.split())
    assert code == 2 and said.count("\n") == 1 and said.startswith("python -m extras.kangaroo: ")
    assert not (tmp_path / "out" / "adapter.safetensors").exists()
