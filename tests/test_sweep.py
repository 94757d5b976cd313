"""`python -m bench sweep`: prompts of one's own, the winner, its files. Speeds are made up."""

import csv
import json
import shutil

import pytest
from helpers import tiny_model

from bench import __main__ as bench
from bench import common, decoding, tasks
from exact import pack
from support import decode_command
from support.tokenizer import Tokenizer

KEPT = {"bos_token_id": 1, "eos_token_id": [2, 7], "top_p": 0.9, "assistant_early_exit": 1}
SPEEDS = {  # way: tokens/s of three turns
    "plain": [10, 20, 30],
    "plain, not exact": [9, 9, 9],
    "--exit 1 --draft 2": [11, 19, 29],
    "--exit 1 --draft 5": [12, 18, 41],
    "--exit 3 --draft 2": [20, 40, 40],
    "--exit 3 --draft 5": [19, 30, 39],
}


def made(speeds: dict, identical: bool = True) -> list[dict]:
    """Rows of compare with these speeds."""
    speedup = lambda name: [a / b for a, b in zip(speeds[name], speeds["plain"])]
    equal = lambda name: identical if "--exit" in name else None
    return [
        {"way": n, "tokens/s": v, "speedup": speedup(n), "accepted": 0.5, "identical": equal(n)}
        for n, v in speeds.items()
    ]


@pytest.fixture
def ckpt(small, tmp_path):
    """A checkpoint with settings and a chat template of its own."""
    shutil.copytree(small, path := tmp_path / "ckpt")
    (path / "generation_config.json").write_text(json.dumps(KEPT))
    template = "<s>{% for m in messages %}{{ m.content }}</s>{% endfor %}"
    (path / "chat_template.jinja").write_text(template)
    return path


@pytest.fixture
def sweep(monkeypatch, command, ckpt):
    """sweep("--write", ...) -> code, out, err, of exits 1 and 3 and drafts of 5 and 2."""
    monkeypatch.setattr(tasks, "held_out_prompts", lambda *_: [[1, 3, 40, 7]] * 2)
    monkeypatch.setattr(decoding, "compare", lambda works, turns, same: made(SPEEDS))
    words = "sweep --exits 3 1 --drafts 5 2 --confidence 0.4 --dtype float32 --tokens 9".split()
    return lambda *more: command(bench.main, *words, "--ckpt", str(ckpt), *map(str, more))


@pytest.mark.parametrize("speeds, ranks", [
    ({"a": [2, 2, 2], "b": [3, 3, 3], "c": [1, 3, 1]}, ["b best", "a None", "c within noise"]),
    ({"a": [9, 1, 5], "b": [8, 2, 6]}, ["b best", "a within noise"]),
    ({"a": [9, 1, 5], "b": [8, 0.5, 4]}, ["a best", "b None"]),  # turn by turn
    ({"a": [9, 9], "b": [1, 1]}, ["a best", "b within noise"]),  # two turns tell nothing
])  # fmt: skip
def test_within_noise_is_as_fast_as_the_best_in_a_turn(speeds, ranks):
    rows = decoding.ranked([{"way": name, "tokens/s": values} for name, values in speeds.items()])
    assert [f"{row['way']} {row['rank']}" for row in rows] == ranks


def test_csv_and_png_are_the_table(sweep, tmp_path, figures):
    table, picture = tmp_path / "a.csv", tmp_path / "a.png"
    run = sweep("--csv", table, "--png", picture)
    assert run.code == 0 and picture.read_bytes().startswith(b"\x89PNG")
    rows = list(csv.DictReader(table.open(newline="")))
    assert [row["way"] for row in rows] == sorted(SPEEDS, key=lambda n: -sorted(SPEEDS[n])[1])
    first = ["3", "2", "--exit 3 --draft 2", "40", "2.0", "0.5", "True", "best", "20", "40"]
    assert list(rows[0].values()) == first and list(rows[0])[-2:] == ["lowest", "highest"]
    assert all(row["exit"] == "" for row in rows if "plain" in row["way"])
    (axis,) = figures[0].axes
    lines = {line.get_label(): line.get_xydata().tolist() for line in axis.lines}
    assert lines.pop("plain decoding")[0][1] == 20
    assert lines == {"draft 2": [[1, 19], [3, 40]], "draft 5": [[1, 18], [3, 30]]}
    bars = [segment.tolist() for bar in axis.collections for segment in bar.get_segments()]
    ranges = [[1, 11, 29], [1, 12, 41], [3, 19, 39], [3, 20, 40]]
    assert sorted(bars) == [[[e, low], [e, high]] for e, low, high in ranges]
    assert "Best: --exit 3 --draft 2 --min-confidence 0.4. --write keeps it" in run.out
    assert "exit 1" not in run.out.split("\n\n")[1] and "x up to 9 tokens" in run.out


def test_the_winner_is_kept_and_decoded_with(sweep, ckpt, command):
    run, file = sweep("--write"), ckpt / "generation_config.json"
    assert run.code == 0 and f"Written to {file}" in run.out
    new = dict(assistant_early_exit=3, num_assistant_tokens=2, assistant_confidence_threshold=0.4)
    assert json.loads(file.read_text()) == KEPT | new
    words = "--json", "--ckpt", str(ckpt), "--max-new-tokens", "3"
    said = json.loads(command(decode_command.main, *words).out)["settings"]
    assert (said["exit_layer"], said["draft_len"], said["min_confidence"]) == (3, 2, 0.4)


@pytest.mark.parametrize("rows, code, text", [
    (made({**SPEEDS, "plain": [50, 50, 50]}), 0, "Plain decoding wins (plain): nothing"),
    (made(SPEEDS, identical=False), "bench: a drafted text is not the plain text", "Best: "),
])  # fmt: skip
def test_what_loses_or_is_wrong_is_not_written(sweep, ckpt, monkeypatch, rows, code, text):
    monkeypatch.setattr(decoding, "compare", lambda *_: rows)
    run = sweep("--write")
    assert run.code == code and text in run.out and "Written" not in run.out
    assert json.loads((ckpt / "generation_config.json").read_text()) == KEPT


def test_prompts_of_ones_own_end_as_the_checkpoint_says(sweep, ckpt, tmp_path, monkeypatch):
    seen = []
    ways = lambda works, *_: seen.append(works) or made(SPEEDS)
    monkeypatch.setattr(decoding, "compare", ways)
    (rows := tmp_path / "a.jsonl").write_text('{"prompt": "def f"}\n{"text": "x = </s>"}\n')
    (text := tmp_path / "b.txt").write_text("a\nb\n")
    run = sweep("--prompts-file", rows, text)
    assert "3 prompts x up to 9 tokens" in run.out and "of a.jsonl, prompts of b.txt" in run.out
    sweep("--prompts-file", rows, "--chat", "--prompts", "1", "--temperature", "0.5"), sweep()
    own, chat, built_in = (works["plain"].keywords for works in seen)
    tokenizer = Tokenizer(ckpt)
    assert own["prompts"] == [tokenizer.encode(x) for x in ("def f", "x = </s>", "a\nb\n")]
    (asked,) = chat["prompts"]
    assert asked[-1] == 2 and tokenizer.decode(asked) == "def f"
    assert chat["sampling"].temperature == 0.5 and chat["eos"] == (2, 7, 2)
    assert own["eos"] == built_in["eos"] == (2, 7) and built_in["prompts"] == [[1, 3, 40, 7]]


def test_compiled_every_exit_has_graphs_of_its_own(sweep, monkeypatch):
    made_for, used = {}, {}

    def compiled(model, exit_layer):
        return made_for.setdefault(exit_layer, pack(tiny_model(model.config)))

    monkeypatch.setattr(decoding, "compile_model", compiled)
    monkeypatch.setattr(common, "compile_model", compiled)
    keep = lambda works, *_: used.update(works) or made(SPEEDS)
    monkeypatch.setattr(decoding, "compare", keep)
    assert sweep("--compile").code == 0
    models = {name: work.keywords["model"] for name, work in used.items()}
    assert made_for.keys() == {0, 1, 3} and models["plain, compiled"] is made_for[0]
    for name in ("--exit 1 --draft 2", "--exit 3 --draft 5"):
        assert models[name] is made_for[int(name[7])]


@pytest.mark.parametrize("words, text", [
    ("--exits 2 4", "exit layer must be from 0 to 3, not 4"),
    ("--exits 0 1", "at least 1"),
    ("--confidence 1", "confidence must be from 0.0"),
    ("--drafts 16", "draft length must be from 1 to 15, not 16"),
    ("--temperature -1", "temperature must be"),
    ("--prompts-file {tmp}/none.jsonl", "no file of prompts at"),
    ("--prompts-file {tmp}/long.txt", "a prompt of 401 tokens"),
    ("--chat", "--chat goes with --prompts-file"),
    ("--png {tmp}", "cannot be written"),
    ("--write --ckpt {tmp}/damaged", "generation_config.json is not a JSON object"),
    ("--write --csv {tmp}/kept.csv", "ckpt cannot be written"),
])  # fmt: skip
def test_what_cannot_be_swept_is_one_line_before_anything_is_measured(
    sweep, ckpt, tmp_path, monkeypatch, words, text
):
    monkeypatch.setattr(decoding, "compare", None)
    shutil.copytree(ckpt, tmp_path / "damaged")
    (tmp_path / "damaged" / "generation_config.json").write_text("{")
    (tmp_path / "long.txt").write_text(" a b" * 200)
    (tmp_path / "kept.csv").write_text("kept")
    if words.startswith("--write --csv"):
        monkeypatch.setattr("os.access", lambda path, how: path != ckpt)
    run = sweep(*words.format(tmp=tmp_path).split())
    assert run.code == 2 and text in run.err.splitlines()[-1] and "Traceback" not in run.err
    assert (tmp_path / "kept.csv").read_text() == "kept" and not list(tmp_path.glob(".*.tmp"))
    assert json.loads((ckpt / "generation_config.json").read_text()) == KEPT
