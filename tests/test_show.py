"""What a person sees: the lens says what the model says, the trace holds what the rounds hold, files are whole or not there."""

import io
import json
import sys
from types import SimpleNamespace

import pytest
import torch
from helpers import tiny_config, tiny_model
from test_cli import SHORT, assert_one_line, ckpt, cli  # noqa: F401

import decode
import show
from decode import Sampling, generate
from model import load_checkpoint
from show import GREENS, REDS, Lens, Trace, exits, fit, layers_needed, visible, whole_file
from tokenizer import Tokenizer

TRACED = [*SHORT, "--exit", "2", "--draft", "4", "--min-confidence", "0"]


@pytest.mark.parametrize("pieces", [(512, 16), (5, 3)])
def test_every_exit_says_what_its_layers_say(monkeypatch, pieces):
    monkeypatch.setattr(show, "PREFILL_ROWS", pieces[0])
    monkeypatch.setattr(show, "MAX_ROWS", pieces[1])
    model, tokens = tiny_model(tiny_config(), dtype=torch.float64), [3, 14, 15, 9, 26, 5, 35, 8, 9, 7, 9, 32]
    with torch.inference_mode():
        logits = [model.unembed(model.run_layers(model.embed(torch.tensor([tokens])), 0, e))[0] for e in range(1, 5)]
    said, sure = exits(model, tokens, 8)
    assert torch.equal(said, torch.stack([x.argmax(-1) for x in logits]))
    assert torch.allclose(sure.double(), torch.stack([x.softmax(-1).amax(-1) for x in logits]), atol=1e-5)


@pytest.mark.parametrize("seed", range(4))
def test_the_last_row_is_the_full_models_text_though_two_tokens_tie(seed):
    """Half of these heads' rows are doubles of the other half, in bfloat16, so that nearly every choice is a tie."""
    model = tiny_model(tiny_config(), seed, dtype=torch.bfloat16)
    model.lm_head.weight.data[30:60] = model.lm_head.weight.data[:30]
    prompt = [seed, 2, 3, 4, 5]
    said = [t for r in generate(model, prompt, max_new_tokens=40) for t in r.emitted]
    assert exits(model, prompt + said, len(prompt) - 1)[0][-1, len(prompt) - 1 : -1].tolist() == said


def test_layers_needed_on_a_table_made_by_hand():
    columns = [[7, 7, 7, 7], [1, 7, 7, 7], [7, 1, 7, 7], [7, 7, 1, 7], [1, 1, 7, 7], [1, 1, 1, 7]]
    assert layers_needed(torch.tensor(columns).T).tolist() == [1, 2, 3, 4, 3, 4]


def by_hand(said, needed):
    """A Lens of a table, without a model."""
    lens = Lens.__new__(Lens)
    lens.said, lens.tokens, lens.needed = said, [" " + str(t) for t in range(len(said[0]))], torch.tensor(needed)
    lens.agrees = torch.tensor([[a == b for a, b in zip(row, said[-1])] for row in said])
    lens.sure = torch.full(lens.agrees.shape, 0.99)
    return lens


def test_the_table_marks_agreement_and_its_blocks_fit_the_terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    lens = by_hand([["a", "漢字漢字", "c"] * 3, ["b", "漢字漢字", "d"] * 3], [2, 1, 2] * 3)
    lines = lens.text().splitlines()
    assert [line.split() for line in lines[:4]] == [
        ["exit", *"01234"], ["1", "a", "✓漢字漢…", "c", "a", "✓漢字漢…"],
        ["2", "✓b", "✓漢字漢…", "✓d", "✓b", "✓漢字漢…"], ["needs", *"21221"],
    ]  # fmt: skip
    assert len(lines) == 9 and lines[5].split() == ["exit", *"5678"]
    assert lens.statistics().splitlines()[1:] == ["    1 to 1   " + "█" * 20 + " 3", "    2 to 2   " + "█" * 40 + " 6"]
    assert "1.67 of 2 on average over 9 tokens" in lens.statistics()


def test_tokens_are_shown_on_one_line_without_control_characters():
    assert visible("a b\n\tc\033[31m\r\x00\u202e") == "a·b⏎→c\ufffd[31m\ufffd\ufffd\ufffd"
    assert fit("abc", 5) == "abc  " and fit("abcdef", 5) == "abcd…" and fit("漢字漢", 5) == "漢字…"
    assert fit("e\u0301", 3) == "e\u0301  " and fit("abcde", 5) == "abcde"


def test_lens_shows_prompt_and_continuation(cli):
    full = cli(*SHORT[:2], "--full", "--max-new-tokens", "5", "--json")
    ids = json.loads(full.out)
    run = cli(*SHORT[:2], "--lens", "--max-new-tokens", "5")
    assert run.code == 0 and "\033" not in run.out
    assert f"of 4 on average over {len(ids['settings']['prompt_ids']) + 5} tokens" in run.err
    alone = cli(*SHORT[:2], "--lens", "--max-new-tokens", "0")
    assert f"over {len(ids['settings']['prompt_ids'])} tokens" in alone.err and "+" not in alone.out.splitlines()[0]
    assert f"over {len(ids['settings']['prompt_ids']) + 12} tokens" in cli(*SHORT[:2], "--lens").err


def test_each_generated_token_stands_right_of_the_last_layers_word(cli, ckpt, monkeypatch):
    monkeypatch.setenv("COLUMNS", "1000")
    header, *rows, _ = cli(*SHORT[:2], "--lens", "--max-new-tokens", "5").out.rstrip().splitlines()
    known = len(Tokenizer(ckpt).encode("def f(x):"))
    cells = [[line[6 + 9 * t :][:9].strip() for t in range(known + 5)] for line in (header, *rows)]
    assert [t for t in range(known + 5) if cells[0][t].startswith("+")] == [*range(known, known + 5)]
    for t in range(known, known + 5):
        assert cells[-1][t - 1] == "✓" + cells[0][t][1:]


def test_a_terminal_gets_shades_unless_no_color_is_set(cli, monkeypatch):
    monkeypatch.setattr(type(sys.stdout), "isatty", lambda self: True, raising=False)
    monkeypatch.delenv("NO_COLOR", raising=False)
    lens, trace = cli(*SHORT, "--lens").out, cli(*TRACED, "--trace").out
    assert any(f"48;5;{g}m✓" in lens for g in GREENS) and any(f"48;5;{r}m " in lens for r in REDS)
    assert "\033[32m[✓" in trace and "\033[31m[✗" in trace and "\033[94m[+" in trace
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\033" not in cli(*SHORT, "--lens").out + cli(*TRACED, "--trace").out


def test_the_figure_is_a_whole_png(cli, tmp_path):
    run = cli(*SHORT[:2], "--max-new-tokens", "2", "--lens-png", str(tmp_path / "lens.png"))
    assert run.code == 0 and "exit" in run.out and "on average" in run.err
    assert [f.name for f in tmp_path.iterdir()] == ["lens.png"]
    assert (tmp_path / "lens.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.filterwarnings("error:Glyph")
def test_the_figure_takes_any_token():
    file = io.BytesIO()
    by_hand([["$x_{$", "漢字", "\\"], ["$$", "a^b", "%"]], [2, 2, 2]).draw(file)
    assert file.getvalue().startswith(b"\x89PNG")


ROUNDS = {  # drafted, accepted, emitted: signs
    "one wrong": ([1, 2, 3, 4], 1, [1, 9], "✓✗--+"),
    "all right": ([1, 2], 2, [1, 2, 9], "✓✓+"),
    "all wrong": ([1, 2], 0, [9], "✗-+"),
    "nothing drafted": ([], 0, [9], "+"),
    "ends with an accepted EOS": ([1, 5], 2, [1, 5], "✓✓"),
    "drafted beyond an accepted EOS": ([1, 5, 7], 2, [1, 5], "✓✓-"),
}


@pytest.mark.parametrize("case", ROUNDS)
def test_boxes_hold_exactly_the_tokens_of_the_round(case):
    drafted, accepted, emitted, signs = ROUNDS[case]
    boxes = Trace(None, [], True).boxes(SimpleNamespace(drafted=drafted, accepted=accepted, emitted=emitted))
    assert "".join(sign for _, (sign, _) in boxes) == signs
    assert [token for token, (sign, _) in boxes if sign in "✓+"] == emitted
    assert [token for token, (sign, _) in boxes if sign != "+"] == drafted


def test_the_trace_is_lines_of_boxes_in_place_of_the_text(cli):
    found, run = json.loads(cli(*TRACED, "--json").out), cli(*TRACED, "--trace")
    assert run.code == 0 and "\033" not in run.out and "30 tokens in" in run.err and "not looked at" in run.err
    assert len(run.out.splitlines()) == len(found["rounds"])
    for number, (line, r) in enumerate(zip(run.out.splitlines(), found["rounds"]), 1):
        assert line.split()[0] == str(number) and line.count(" ms ") == 2
        assert line.count("[✓") == r["accepted"] and line.count("[") >= len(r["drafted"]) + len(r["emitted"]) - r["accepted"]
    run = cli("--interactive", "--trace", "--max-new-tokens", "5", stdin=b"def f\nreturn x\n")
    assert run.code == 0 and run.out.count("   1  draft") == 2


@pytest.mark.parametrize("how", [[], ["--temperature", "0.9", "--top-p", "0.9", "--top-k", "40", "--seed", "3"], ["--full"], ["--json"], ["--trace"]])
def test_a_trace_file_repeats_the_run(cli, ckpt, tmp_path, how):
    file = tmp_path / "trace.json"
    assert cli(*SHORT, *(how if how == ["--full"] else TRACED[4:] + how), "--dtype", "float32", "--trace-json", str(file)).code == 0
    found = json.loads(file.read_bytes())
    assert found["format"] == "layerskip-trace-1" and len(found["cases"]) == 1
    case = found["cases"][0]
    assert case["name"] == "decode.py" and case["prompt"] == Tokenizer(ckpt).encode("def f(x):")
    names = ["temperature", "top_k", "top_p", "seed"]
    assert {*case["settings"]} == {"exit_layer", "draft_len", "max_new_tokens", "min_confidence", "eos", *names}
    settings = {name: value for name, value in case["settings"].items() if name not in names}
    sampling = Sampling(**{name: case["settings"][name] for name in names})
    rounds = list(generate(load_checkpoint(ckpt, torch.float32), case["prompt"], sampling=sampling, **settings))
    assert [(r.drafted, r.accepted, r.emitted) for r in rounds] == [(r["drafted"], r["accepted"], r["emitted"]) for r in case["rounds"]]
    known = len(case["prompt"])
    for r in case["rounds"]:
        known += len(r["emitted"])
        assert r["length"] == known - 1 and r["draft_seconds"] >= 0 < r["verify_seconds"]
    assert known == len(case["prompt"]) + 30


def test_a_file_is_whole_or_not_there(tmp_path):
    file = tmp_path / "f"
    for before in (None, b"old"):
        with pytest.raises(KeyboardInterrupt), whole_file(file) as out:
            out.write(b"half")
            raise KeyboardInterrupt
        assert [f.read_bytes() for f in tmp_path.iterdir()] == ([] if before is None else [before])
        file.write_bytes(b"old")
    (tmp_path / "link").symlink_to(file)
    with whole_file(tmp_path / "link") as out:
        out.write(b"new")
    assert file.read_bytes() == b"new" and (tmp_path / "link").is_symlink()
    assert {f.name for f in tmp_path.iterdir()} == {"f", "link"}


@pytest.mark.parametrize("option", ["--trace-json", "--lens-png"])
@pytest.mark.parametrize("path", ["missing/f", ".", "/dev/null", "a\0b", "n" * 300])
def test_a_path_that_cannot_be_written_is_refused_before_generating(cli, tmp_path, monkeypatch, option, path):
    monkeypatch.setattr(decode, "generate", None)
    monkeypatch.chdir(tmp_path)
    assert_one_line(cli(*SHORT, option, path))
    assert not [*tmp_path.iterdir()]


CLASHES = [
    "--lens --interactive", "--lens --json", "--lens --compare", "--lens --full", "--lens --exit 2", "--lens --lookup", "--lens --trace",
    "--lens --no-verify", "--lens --min-confidence 0", "--lens-png x --trace-json y", "--lens-png x --draft 3", "--lens --max-new-tokens -1",
    "--trace --json", "--trace --no-verify", "--trace-json x --exit-confidence 0.5", "--trace-json x --lookup", "--trace-json x --exit auto",
    "--interactive --trace-json x", "--interactive --lens-png x",
]  # fmt: skip


@pytest.mark.parametrize("options", CLASHES)
def test_what_makes_no_sense_together_is_one_line(cli, tmp_path, monkeypatch, options):
    monkeypatch.chdir(tmp_path)
    assert_one_line(cli(*options.split()))
    assert not [*tmp_path.iterdir()]


def test_a_prompt_that_fills_the_context_can_be_looked_at_but_not_more(cli):
    assert_one_line(cli("--lens", "--prompt", "x " * 400, "--max-new-tokens", "0"))
