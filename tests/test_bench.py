"""The measurements: what they compute, compare and print. No time is looked at."""

import re
import shutil
from argparse import Namespace
from importlib.util import find_spec

import pytest
import torch
from helpers import tiny_config

from bench import __main__ as bench
from bench import common, contexts, decoding, engine, peers, tasks
from decode import Round, new_cache
from model import Llama, rotate
from support.console import Totals
from support.data import Document
from support.tokenizer import Tokenizer


@pytest.fixture
def run(monkeypatch, command, small):
    """run("COMMAND --options") -> code, out, err on the small checkpoint and small prompts."""
    prompts = lambda count, tokenizer, length: [[1, n + 3, 40, 7] * 4 for n in range(count)]
    monkeypatch.setattr(tasks, "held_out_prompts", prompts)
    monkeypatch.setattr(contexts, "held_out_prompts", prompts)
    monkeypatch.setitem(common.SHAPES, "8m", tiny_config(vocab_size=99, tied=True))
    monkeypatch.setattr(decoding, "auto_dtype", lambda device: torch.bfloat16)

    def main(line: str):
        options = ["--runs", "1"] + ["--dtype", "float32"] * ("train" not in line)
        options += [] if "--shape" in line else ["--ckpt", str(small)]
        name, *words = line.split()
        return command(bench.main, name, *options, *words)

    return main


SIZE = "--prompts 2 --tokens 10"
PLAIN = ["plain", "plain, not exact", "plain, bfloat16"]


def column(text: str, name: str) -> list[str]:
    """The values of a column in all tables of a text."""
    found, place = [], None
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.split("|")[1:-1]]
        if not cells:
            place = None
        elif place is None:
            place = cells.index(name)
        elif set(cells[0]) != {"-"}:
            found.append(cells[place])
    return found


def test_edits_show_what_to_repeat_and_chats_use_the_template(small, tmp_path):
    shutil.copytree(small, tmp_path, dirs_exist_ok=True)
    (tmp_path / "chat_template.jinja").write_text("{{ messages[0].content }}")
    tokenizer = Tokenizer(tmp_path)
    for task, wanted in (("edit", tasks.edits(6)), ("chat", tasks.QUESTIONS[:6])):
        args = Namespace(task=task, ckpt=tmp_path, prompts=6, prompts_file=None, chat=False)
        ids = tasks.prompts(args, tokenizer, 0)
        assert [tokenizer.decode(one) for one in ids] == list(wanted) and len(set(wanted)) == 6
    code, more, table = tasks.edits(3)
    assert all("```python\ndef " in text for text in (code, more)) and "Ada Byron, ada2@" in table
    with pytest.raises(ValueError, match="no chat template"):
        tasks.prompts(Namespace(**vars(args) | dict(ckpt=small)), tokenizer, 0)


def test_drafted_ways_are_compared_with_plain_ones(run):
    text = run(f"sweep --exits 1 3 --drafts 2 {SIZE}").out
    assert re.match(r".+, bfloat16 instructions: (yes|no), \d+ threads\n", text)
    identical = dict(zip(column(text, "way"), column(text, "identical")))
    ways = dict.fromkeys(["--exit 1 --draft 2", "--exit 3 --draft 2"], "yes")
    assert identical == dict.fromkeys(PLAIN, "") | ways
    assert "1.00 (1.00 to 1.00)" in column(text, "speedup")


def test_speedup_is_greedy_and_sampled(run):
    text = run(f"speedup --drafter lookup {SIZE}").out
    assert sorted(column(text, "way")) == sorted(2 * [*PLAIN, "drafted", "lookup"])
    assert sorted(column(text, "identical")) == 6 * [""] + 4 * ["yes"]


def test_every_drafter_has_a_row_greedy_and_sampled(run, small):
    text = run(f"drafters --prompts 1 --tokens 8 --tries 2 --drafter model:{small}").out
    ways = column(text, "way")
    drafters = ["early exit", "exit auto", "lookup", "lookup+exit", "jacobi", "lookahead"]
    drafters.append(f"model:{small}")
    assert ways[:10] == PLAIN + drafters and ways[10].startswith("skip ")
    assert ways[:11] == ways[11:] and text.count("temperature 0.8") == 1
    assert column(text, "identical") == 2 * (3 * [""] + 8 * ["yes"])


def test_a_drafted_text_that_is_not_the_plain_one_is_exit_code_1(run, monkeypatch):
    def spoiled(model, prompts, count, **settings):
        found = common.decode_all(model, prompts, count, **settings)
        found.ids[-1] += "exit_layer" in settings
        return found

    monkeypatch.setattr(decoding, "decode_all", spoiled)
    line = f"sweep --exits 1 --drafts 2 {SIZE}"
    assert "not the plain text" in run(line).code  # a text is exit code 1


def test_peers_have_a_row_each_where_they_are_installed(run):
    text = run(f"peers {SIZE}").out
    names = [f"this code, {kind}" for kind in ("plain", "drafted", "lookup")]
    if find_spec("transformers"):
        names += [f"transformers, {kind}" for kind in ("plain", "drafted")]
    if find_spec("llama_cpp") and find_spec("gguf"):
        names.append("llama.cpp, plain")
    assert sorted(column(text, "way")) == sorted(names)
    assert set(column(text, "same text")) == {"yes"}


def test_peers_read_a_prompt_once_whatever_the_turns(run, monkeypatch):
    prefill, read = peers.prefill, list[tuple]()
    counted = lambda *how: read.append(how) or prefill(*how)
    monkeypatch.setattr(peers, "prefill", counted)
    text = run(f"peers {SIZE} --context 30 --runs 2").out
    assert len(read) == 2 * 3 and set(column(text, "same text")) == {"yes"}


def test_edits_of_a_context_show_a_text_and_begin_its_copy(shipped):
    tokenizer = Tokenizer(shipped)
    t = Namespace(ckpt=shipped, shape=None, context=400, tokens=112, prompts=[[]] * 3)
    for ids in contexts.long_prompts(t, "edit", 512):
        asked, _, shown = tokenizer.decode(ids).partition(contexts.REQUEST)
        assert not asked and 380 < len(ids) <= 400
        begun = shown.rindex(shown[:40].replace("self", "this"))
        assert begun > 40 and "self" not in shown[begun:]
    assert {len(ids) for ids in contexts.long_prompts(t, "code", 512)} == {400}
    with pytest.raises(ValueError, match="more than the 511"):
        contexts.long_prompts(t, "code", 511)


def test_random_weights_decode_plainly_and_absent_peers_are_named(run, monkeypatch):
    monkeypatch.setattr(common, "find_spec", lambda name: None)
    found = run(f"peers {SIZE} --shape 8m")
    assert column(found.out, "way") == ["this code, plain"]
    lines = found.err.splitlines()
    assert lines[2:] == ["turn 0 of 1, 1 rows", "turn 1 of 1, 1 rows"]
    for line, name in zip(lines[:2], ("transformers", "llama_cpp"), strict=True):
        assert line.startswith(f"bench: {name} is not installed: ")


def test_roofline_has_a_row_for_each_pass(run):
    passes = ["plain", "draft", "verify", "all rows"]
    assert column(run("roofline --shape 8m").out, "pass") == passes


def test_more_guesses_are_right_with_less_damping(run):
    text = run("ideal --shape 8m --draft 3 --prompts 2 --tokens 20").out
    alpha = [float(value) for value in column(text, "alpha")]
    assert column(text, "damping") == ["0.40", "0.20", "0.05"] and alpha[2] > alpha[0] + 0.2
    assert column(text, "identical") == 3 * ["yes"]


def test_kinds_of_training_are_compared_with_the_first(run, monkeypatch):
    monkeypatch.setattr(peers, "installed", lambda package: True)
    monkeypatch.setattr(peers, "transformers_step", lambda args: 8.0)
    monkeypatch.setattr(peers, "recipe_step", lambda args, recipe, _: 16.0 / len(recipe))
    monkeypatch.setattr(peers, "timed_steps", lambda step: Totals([0] * 8, times=[step]))
    text = run("train --compile").out
    assert ", compiled, medians of 1 turns" in text
    assert column(text, "way") == ["transformers", "plain", "layerskip"]
    assert [value[:4] for value in column(text, "speedup")] == ["1.00", "2.50", "4.50"]


@pytest.mark.parametrize("name", ["plain", "layerskip", "transformers"])
def test_a_turn_of_training_is_so_many_updates(name, small, tmp_path, monkeypatch):
    for size, value in dict(STEPS=3, BATCH=2, LENGTH=16).items():
        monkeypatch.setattr(peers, size, value)
    updates, update = [], torch.optim.AdamW.step
    counted = lambda *given, **named: updates.append(1) or update(*given, **named)
    monkeypatch.setattr(torch.optim.AdamW, "step", counted)
    args = Namespace(ckpt=small, compile=False, device=torch.device("cpu"), dtype=torch.float32)
    if name == "transformers":
        pytest.importorskip(name)
        step = peers.transformers_step(args)
    else:
        step = peers.recipe_step(args, name, tmp_path)
    turn = peers.timed_steps(step)
    assert len(updates) == 3 and len(turn.ids) == 3 * 2 * 16 and turn.seconds > 0


@pytest.mark.parametrize("line", [
    f"speedup {SIZE} --exit 4", "sweep --prompts 0", f"peers {SIZE} --device nowhere"
])  # fmt: skip
def test_what_cannot_be_measured_is_one_line(run, line):
    found = run(line)
    assert found.code == 2 and re.fullmatch("bench: .*\n", found.err) and not found.out


def test_a_speedup_is_the_median_ratio_to_the_fastest_plain_way():
    times = {"plain": [9, 2, 4, 8], "plain, slow": [1, 5, 5, 9], "drafted": [9, 1, 1, 8]}
    turns, order = {name: iter(values) for name, values in times.items()}, []

    def work(name):
        order.append(name)
        return Totals([5] * 8, times=[next(turns[name])])

    works = {name: lambda name=name: work(name) for name in times}
    rows = common.compare(works, 3, {"drafted": "plain"})
    assert order == 4 * list(times)
    assert rows[0]["tokens/s"] == [4, 2, 1]  # the first turn does not count
    assert rows[1]["speedup"] == [0.4, 0.8, 8 / 9]
    assert rows[2]["speedup"] == [2, 4, 1]
    assert column(common.markdown("", rows), "tokens/s")[0] == "2.00 (1.00 to 4.00)"
    assert [row["identical"] for row in rows] == [None, None, True]


def test_a_table_leaves_out_empty_columns():
    rows = [{"way": "a", "x": None, "y": [1.5, 1.0, 200.0]}, {"way": "b", "x": None, "y": None}]
    table = common.markdown("T", rows).split("\n")
    assert table[:3] == ["T", "", "| way | y                  |"]
    assert table[4:] == ["| a   | 1.50 (1.00 to 200) |", "| b   |                    |"]


def rounds(alpha: float, draft_len: int, count: int) -> list[Round]:
    """Rounds in which a guess is right with probability alpha once those before it were."""
    right = torch.rand(count, draft_len, generator=torch.Generator().manual_seed(0)) < alpha
    accepted = right.long().cumprod(1).sum(1).tolist()
    return [Round([0] * draft_len, [0] * number + [1], None) for number in accepted]


def test_the_ideal_speedup_is_the_formula_and_what_a_simulation_gives():
    assert engine.ideal_speedup(1.0, 6, draft=1.5, verify=0.5) == 3.5  # d + 1 tokens, 2 plain steps
    assert engine.ideal_speedup(0.0, 6, draft=1.5, verify=0.5) == 0.5  # one token
    assert engine.ideal_speedup(0.5, 2, draft=0.0, verify=1.0) == 1.75
    for alpha, draft_len in ((0.6, 4), (0.95, 3)):
        found = rounds(alpha, draft_len, 20000)
        emitted = sum(len(r.emitted) for r in found) / len(found)
        ideal = engine.ideal_speedup(alpha, draft_len, draft=0.5, verify=0.75)
        assert emitted / 1.25 == pytest.approx(ideal, rel=0.01)
        assert engine.accepted_each(found) == pytest.approx(alpha, abs=0.01)


@pytest.mark.parametrize("tied", [True, False])
def test_bytes_that_must_be_read_are_those_of_the_tensors(tied):
    model = Llama(tiny_config(tied=tied)).bfloat16()
    cache = new_cache(model, 128, 3)
    weights = sum(p.nbytes for layer in model.layers[1:3] for p in layer.parameters())
    head = model.norm.weight.nbytes + model.lm_head.weight.nbytes
    live = cache.keys[1:3, :, :77].numel() * 2 + cache.values[1:3, :, :77].numel() * 2
    assert engine.pass_bytes(model, 2, 77) == weights + head + live


def test_a_gguf_turns_neighbours_where_this_code_turns_halves():
    heads, dim, angle = 3, 8, torch.rand(1, 1, 4, dtype=torch.float64)
    weight, x = torch.randn(heads * dim, 20, dtype=torch.float64), torch.randn(20).double()
    cos, sin = torch.cat([angle, angle], -1).cos(), torch.cat([-angle, angle], -1).sin()
    turned = rotate((weight @ x).view(1, heads, dim), cos, sin)
    pairs = (peers.pairs_together(weight, dim) @ x).view(1, heads, dim // 2, 2)
    turn = torch.polar(torch.ones_like(angle), angle)
    expected = torch.view_as_real(torch.view_as_complex(pairs) * turn)
    mine = peers.pairs_together(turned.view(-1, 1), dim).view(1, heads, dim // 2, 2)
    torch.testing.assert_close(mine, expected)


@pytest.mark.parametrize("start", [[1], []])
def test_held_out_prompts_are_ids_of_one_length(shipped, monkeypatch, start):
    tokenizer = Tokenizer(shipped)
    encode = tokenizer.encode
    ids = lambda text, bos=True: start * bos + encode(text, bos=False)
    monkeypatch.setattr(tokenizer, "encode", ids)
    text = "\n" * 300 + "\n    def f(x):\n        return x\n"
    document = Document("a.py", text, kept_back=True)
    monkeypatch.setattr(tasks, "read_files", lambda files: [document])
    (prompt,) = tasks.held_out_prompts(1, tokenizer, 8)
    assert len(prompt) == 8 and all(type(token) is int for token in prompt)
    assert (prompt[0] == 1) == bool(start)
