"""Early exit runs fewer layers, the lens says what the model says, a trace holds the rounds."""

import json
from types import SimpleNamespace

import check
import pytest
import torch
from helpers import decode, tiny_config, tiny_model

from decode import Round, Sampling, generate, new_cache, next_token
from exact import pack
from extras import early_exit, lens, trace
from extras.early_exit import generate_confident, keep_layers
from extras.lens import choose_exit, exits, layers_needed
from extras.trace import boxes, piece, trace_json
from model import load_checkpoint
from support.console import load

COMMANDS = dict(trace=trace, lens=lens, early_exit=early_exit)
PROMPT = "def f(x):"


@pytest.fixture
def cli(command, small):
    """cli("trace", "--exit", "2") -> code, out, err of a command on the small checkpoint."""
    return lambda name, *args: command(
        COMMANDS[name].main, "--ckpt", str(small), "--prompt", PROMPT, *args
    )


# --------------------------------------
# Early exit


def test_kept_layers_are_a_model():
    whole, x = tiny_model(), torch.arange(7)[None]
    h, before = whole.embed(x), whole(x)
    for l in (0, 2, 3):
        h = whole.run_layers(h, l, l + 1)
    thin = keep_layers(whole, (0, 2, 3))
    assert torch.equal(thin(x), whole.unembed(h)) and thin.config.n_layers == 3
    assert not thin.training and thin.layers[1] is whole.layers[2]
    assert torch.equal(whole(x), before) and whole.config.n_layers == 4
    pack(whole)
    assert keep_layers(whole, (0, 1)).row_attention is whole.row_attention


def confident(model, confidence, exit_layer=2, prompt=(7, 3), temperature=0.0, eos=()):
    sampling = Sampling(temperature, seed=5)
    settings = dict(exit_layer=exit_layer, max_new_tokens=40, sampling=sampling, eos=eos)
    return list(generate_confident(model, list(prompt), confidence, settings))


@pytest.mark.parametrize("confidence, temperature", [(0.25, 0.0), (0.25, 1.0), (1e-9, 0), (1, 0)])
def test_a_token_leaves_at_the_first_sure_exit(monkeypatch, confidence, temperature):
    """By hand: every exit's confidence, and keys and values as if its last state entered each."""
    caches = []
    keep = lambda *shape: caches.append(new_cache(*shape)) or caches[-1]
    monkeypatch.setattr(early_exit, "new_cache", keep)
    model = pack(tiny_model(tiny_config(n_layers=16), damp_from=3))
    layers, prompt = 16, [7, 3, 9]
    found = confident(model, confidence, 3, prompt, temperature)
    with torch.inference_mode():
        cache = new_cache(model, 64, 0)
        model.run_layers(model.embed(torch.tensor(prompt[:-1])), 0, layers, cache)
        text = prompt + [token for token, _ in found]
        for place, (token, depth) in enumerate(found, len(prompt) - 1):
            h, sure = model.embed(torch.tensor([text[place]])), []
            for l in range(layers):
                h = model.run_layers(h, l, l + 1, cache, place)
                logits = model.unembed(h)[0]
                if l + 1 == depth:
                    left = h
                    assert next_token(logits, place + 1, Sampling(temperature, seed=5)) == token
                if l + 1 > depth:
                    model.run_layers(left, l, l + 1, cache, place)
                sure.append(logits.softmax(-1).max().item() >= confidence)
            exits = [3, 5, 7, 9, 11, 13, 15, 16]
            assert depth == next((e for e in exits if sure[e - 1]), 16)
    length, depths = caches[0].length, {depth for _, depth in found}
    assert length == len(prompt) - 1 + 40
    assert len(depths) > 2 if confidence == 0.25 else depths == {16 if confidence == 1 else 3}
    for ours, by_hand in ((caches[0].keys, cache.keys), (caches[0].values, cache.values)):
        torch.testing.assert_close(ours[:, :, :length], by_hand[:, :, :length])


def test_a_confident_exit_stops_with_the_text():
    """And with the context."""
    model = pack(tiny_model(tiny_config(max_len=30), damp_from=2))
    tokens = lambda eos=(): [token for token, _ in confident(model, 0.3, eos=eos)]
    free = tokens()
    assert len(free) == 28 and tokens((free[5],)) == free[: free.index(free[5]) + 1]


def test_the_command_counts_layers_per_token(cli, small):
    few = ("early_exit", "--max-new-tokens", "9", "--confidence")
    always, never = cli(*few, "0.00001", "--exit", "1"), cli(*few, "1")
    assert always.code == 0 and "\033" not in always.out and len(never.out) > 5
    assert "1.00 of 4 layers" in always.err and "4.00 of 4 layers" in never.err
    pruned = cli(*few, "1", "--keep-every", "2")
    assert "2.00 of 2 layers per token" in pruned.err
    model, tokenizer = load(small)
    ids = tokenizer.encode(PROMPT)
    said = decode(pack(keep_layers(model, (0, 2))), ids, max_new_tokens=9, eos=(2,)).ids
    text = tokenizer.decode(ids + said)[len(PROMPT) :]
    assert pruned.out.rstrip("\n") == text.rstrip("\n")


# --------------------------------------
# Lens


@pytest.mark.parametrize("most, prefilled, passes", [
    ((512, 16), 0, [12]), ((512, 16), 8, [8, 4]), ((5, 3), 11, [5, 5, 1, 1]),
])  # fmt: skip
def test_exits_say_what_their_layers_say(monkeypatch, most, prefilled, passes):
    """In the passes of generate."""
    monkeypatch.setattr(lens, "PREFILL_ROWS", most[0])
    monkeypatch.setattr(lens, "MAX_ROWS", most[1])
    model, tokens = tiny_model(dtype=torch.float64), [3, 14, 15, 9, 26, 5, 35, 8, 9, 7, 9, 32]
    with torch.inference_mode():
        h = [model.run_layers(model.embed(torch.tensor([tokens])), 0, e) for e in range(1, 5)]
        probability, expected = model.unembed(torch.cat(h)).softmax(-1).max(-1)
    rows, embed = [], model.embed
    monkeypatch.setattr(model, "embed", lambda tokens: rows.append(len(tokens)) or embed(tokens))
    said, sure = exits(model, tokens, prefilled)
    assert rows == passes and torch.equal(said, expected)
    assert torch.allclose(sure.double(), probability, atol=1e-5)


@pytest.mark.parametrize("seed", range(3))
def test_the_last_row_is_the_text_in_ties(seed):
    """Half of these heads' rows are doubles of the other half, so that nearly every choice ties."""
    model = tiny_model(None, seed, dtype=torch.bfloat16)
    model.lm_head.weight.data[30:60] = model.lm_head.weight.data[:30]
    prompt = [seed, 2, 3, 4, 5]
    new = decode(pack(model), prompt, max_new_tokens=40).ids
    said, _ = exits(model, prompt + new, len(prompt) - 1)
    assert said[-1, len(prompt) - 1 : -1].tolist() == new


def test_layers_needed_on_a_table_made_by_hand():
    columns = [[7, 7, 7, 7], [1, 7, 7, 7], [7, 1, 7, 7], [7, 7, 1, 7], [1, 1, 7, 7], [1, 1, 1, 7]]
    assert layers_needed(torch.tensor(columns).T).tolist() == [1, 2, 3, 4, 3, 4]


def test_a_token_is_one_printable_piece(shipped):
    _, tokenizer = load(shipped)
    shown = [piece(tokenizer, token) for token in range(tokenizer.vocab_size)]
    assert all(text and not set(text) & set("\n\t \033\r") for text in shown)
    ids = tokenizer.encode("a  b\n\tc", bos=False)
    assert "".join(piece(tokenizer, token) for token in ids).lstrip("·") == "a··b⏎→c"
    assert piece(tokenizer, 1) == "<1>"


def test_a_line_of_the_lens_tells_every_exit(cli, small):
    """And how many layers are needed. Each word stands from its exit on until the next word."""
    model, tokenizer = load(small)
    ids, run = tokenizer.encode(PROMPT), cli("lens", "--max-new-tokens", "5")
    assert run.code == 0 and "\033" not in run.out
    header, *lines = [line.split() for line in run.out.splitlines()]
    new = decode(pack(model), ids, max_new_tokens=5, eos=(2,)).ids
    said, _ = exits(model, ids + new, len(ids) - 1)
    needed = layers_needed(said).tolist()
    assert header[0] == "needs" and f"needs {sum(needed) / len(needed):.2f} of 4" in run.err
    tokens = [piece(tokenizer, t) for t in ids] + ["+" + piece(tokenizer, t) for t in new]
    assert [line[:2] for line in lines] == [[str(e), token] for e, token in zip(needed, tokens)]
    for t, (_, _, *rest) in enumerate(lines):
        words = dict(zip(map(int, rest[::2]), rest[1::2]))
        shown = [words[max(e for e in words if e <= exit_layer)] for exit_layer in range(1, 5)]
        assert shown == [piece(tokenizer, row[t]) for row in said.tolist()]


# --------------------------------------
# --exit auto


def chosen(monkeypatch, right, sure, seconds):
    """(exit_layer, draft_len) for 4 layers, of which the first is right and sure as given.

    The second and third are always sure and never right. seconds(layers, rows) is a pass.
    """
    said, probability = torch.ones(4, len(right), dtype=torch.long), torch.ones(4, len(right))
    said[0], said[3], probability[0] = ~torch.tensor(right), 0, torch.tensor(sure).float()
    monkeypatch.setattr(lens, "exits", lambda model, tokens: (said, probability))
    monkeypatch.setattr(lens, "pass_seconds", lambda model: seconds)
    settings = dict(exit_layer=5, draft_len=9, min_confidence=0.5)
    found = choose_exit(SimpleNamespace(config=tiny_config()), [0] * len(right), settings)
    return found["exit_layer"], found["draft_len"]


def test_exit_auto_makes_the_most_of_a_prompt(monkeypatch):
    """The first exit is right ten times, then wrong five times, three times over.

    Where only layers cost, a round with k guesses takes k + 4. Per 15 tokens of the prompt, d = 1
    makes 10 rounds of 5, d = 2 makes 8 of 6, d = 3 makes 7 of 7.
    """
    right, always = ([True] * 10 + [False] * 5) * 3, [True] * 45
    assert chosen(monkeypatch, right, always, lambda layers, rows: layers) == (1, 2)
    assert chosen(monkeypatch, right, always, lambda layers, rows: layers * rows) == (1, 1)
    # A doubtful guess is not drafted, so a long draft costs nothing where the exit is wrong.
    assert chosen(monkeypatch, right, right, lambda layers, rows: layers) == (1, 10)


def test_exit_auto_reads_the_end_of_a_long_prompt(monkeypatch):
    model = tiny_model(tiny_config(n_layers=8), damp_from=3)
    settings = dict(exit_layer=5, draft_len=9, min_confidence=0.3, eos=(2,))
    assert choose_exit(model, [3] * 15, settings) == dict(exit_layer=5, draft_len=9)
    shallow, plain = tiny_model(tiny_config(n_layers=1)), dict(exit_layer=0, draft_len=9)
    assert choose_exit(shallow, [3] * 40, settings | plain) == plain, "it has no exit"
    found = choose_exit(model, [3, 1, 4, 1] * 4, settings)  # timed on this machine
    assert 1 <= found["exit_layer"] <= 7 and 1 <= found["draft_len"] <= 15
    read, prompt = [], list(range(60)) * 4
    monkeypatch.setattr(lens, "exits", lambda m, tokens: read.append(tokens) or exits(m, tokens))
    choose_exit(model, prompt, settings)
    assert read == [prompt[:1] + prompt[-128:]]


# --------------------------------------
# Trace

ROUNDS = [  # drafted, emitted, signs
    ([1, 2, 3, 4], [1, 9], "✓✗--+"),
    ([1, 2], [1, 2, 9], "✓✓+"),
    ([], [9], "+"),
    ([1, 5], [1, 5], "✓✓"),  # ends with an accepted EOS
    ([1, 5, 7], [1, 5], "✓✓-"),  # drafted beyond one
]


@pytest.mark.parametrize("drafted, emitted, signs", ROUNDS)
def test_boxes_hold_the_tokens_of_a_round(drafted, emitted, signs):
    found = boxes(Round(drafted, emitted, None))
    assert "".join(sign for sign, _ in found) == signs
    assert [token for sign, token in found if sign in "✓+"] == emitted
    assert [token for sign, token in found if sign != "+"] == drafted


HOW = ["--exit 1 --draft 4 --min-confidence 0 --temperature 0.9 --seed 3", "--full"]
NAMES = ["temperature", "top_k", "top_p", "seed"]


@pytest.mark.parametrize("how", HOW)
def test_a_trace_repeats_the_run(cli, small, tmp_path, how):
    file = tmp_path / "trace.json"
    (tmp_path / "trace.json.new").write_text("mine")
    run = cli("trace", *how.split(), "--max-new-tokens", "30", "--json", str(file))
    assert run.code == 0 and "\033" not in run.out and "30 tokens in" in run.err
    assert {f.name for f in tmp_path.iterdir()} == {"trace.json", "trace.json.new"}
    case = json.loads(file.read_bytes())["cases"][0]
    model, tokenizer = load(small)
    assert case["prompt"] == tokenizer.encode(PROMPT)
    how, known = case["settings"], len(case["prompt"])
    sampling = Sampling(**{name: how.pop(name) for name in NAMES})
    rounds = decode(pack(model), case["prompt"], sampling=sampling, **how).rounds
    assert max(len(r.drafted) for r in rounds) <= 4
    for line, r, written in zip(run.out.splitlines(), rounds, case["rounds"], strict=True):
        known += len(r.emitted)
        told = dict(drafted=r.drafted, accepted=r.accepted, emitted=r.emitted, length=known - 1)
        assert written == told and line.count("[✓") == r.accepted
    assert known == len(case["prompt"]) + 30


def test_the_checker_of_ports_reads_a_trace():
    """A golden case, decoded here and written by trace_json, breaks no rule; a changed one does."""
    cases = check.committed()["cases"]
    case = next(c for c in cases if c["settings"]["exit_layer"] and c["settings"]["temperature"])
    settings = {**case["settings"], "eos": tuple(case["settings"]["eos"])}
    settings["sampling"] = Sampling(**{name: settings.pop(name) for name in NAMES})
    model = pack(load_checkpoint(check.GOLDEN / "model", torch.float32))
    rounds = list(generate(model, case["prompt"], **settings))
    written = json.loads(json.dumps(trace_json(rounds, case["prompt"], settings)))
    written["cases"][0]["name"] = case["name"]
    assert check.check(written).broken is None
    written["cases"][0]["rounds"][0]["length"] += 1
    assert check.check(written).broken.rule == "5.4"


# --------------------------------------
# The commands


UNWRITABLE = [("trace", "--json", "missing/f"), ("trace", "--json", "."), ("lens", "--png", "a\0b")]


@pytest.mark.parametrize("name, option, path", UNWRITABLE)
def test_an_unwritable_path_is_refused_first(cli, tmp_path, monkeypatch, name, option, path):
    monkeypatch.setattr(COMMANDS[name], "start", None)
    monkeypatch.chdir(tmp_path)
    run = cli(name, option, path)
    assert run.code == 2 and run.err.count("\n") == 1 and not run.out and not [*tmp_path.iterdir()]


BAD = """trace --exit 4
trace --temperature -1
lens --max-new-tokens -1
lens --ckpt none
lens --prompt=\udcff
early_exit --confidence 0
early_exit --keep-every 0"""


@pytest.mark.parametrize("options", [*BAD.splitlines(), "lens --prompt=" + "x" * 2000])
def test_what_cannot_run_is_one_line(cli, options):
    run = cli(*options.split())
    assert run.code == 2 and not run.out
    lines = [line for line in run.err.splitlines() if not line.startswith(("usage:", " ", "✓"))]
    assert len(lines) == 1 and ": " in lines[0]
