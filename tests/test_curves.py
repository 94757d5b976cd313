"""What training shows: a line at each save, and the curves of its runs."""

import pytest
from helpers import config_option, corpus, write_rows
from matplotlib.colors import same_color

from extras import curves
from support import train_command
from support.train_command import worth


def found(*losses: float) -> dict:
    """What evaluate finds of exits 1, 2, ...: agreement grows with the exit."""
    parts = enumerate(losses, 1)
    return {str(e): dict(loss=x, agreement=e / len(losses)) for e, x in parts}


ROWS = [
    {"step": 1, "losses": {"1": 9.0, "3": 8.0}, "norm": 1.0},
    {"step": 2, "losses": {"3": 7.0}, "norm": 1.0},
    {"step": 2, "held_out": found(6.5, 6.0, 5.5)},
    {"step": 3, "losses": {"2": 6.0, "3": 5.0}, "norm": 1.0},
    {"step": 3, "held_out": found(5.5, 5.0, 4.5)},
]


def write(folder, rows):
    folder.mkdir()
    return write_rows(folder / "metrics.jsonl", rows).parent


# --------------------------------------
# Training


def test_a_save_is_a_line_of_its_metrics(command, tmp_path):
    shape = dict(n_layers=6, dim=16, hidden_dim=32, n_heads=2, n_kv_heads=1, vocab_size=280)
    how = f"--out {tmp_path}/run --data {corpus(tmp_path)} --seq 16 --batch 2 --no-compile "
    how += "--steps 5 --save-every 2"
    run = command(train_command.main, *how.split(), *config_option(**shape))
    lines = [line for line in run.err.splitlines() if "held out" in line]
    _, saves = curves.read_run(tmp_path / "run")
    assert run.code == 0 and [s["step"] for s in saves] == [2, 4, 5]
    assert [line.strip() for line in lines] == [worth(s["held_out"]) for s in saves]


def test_a_save_is_told_by_four_exits_and_the_last():
    assert worth(found(5.0, 4.0)).endswith("1:5.00 50%  2:4.00 100%")
    for layers in (3, 5, 6, 12, 24, 81):
        shown = [part.split(":")[0] for part in worth(found(*range(layers))).split() if ":" in part]
        shown = shown[1:]  # the heading
        assert shown[0] == "1" and shown[-1] == str(layers) and len(shown) <= 5


# --------------------------------------
# Curves


def test_curves_are_the_rows_of_two_runs(tmp_path, command, figures):
    a, b = write(tmp_path / "a", ROWS), write(tmp_path / "b", ROWS[:3])
    file = tmp_path / "curves.png"
    run = command(curves.main, str(a), str(b), "--png", str(file))
    assert run.code == 0 and file.read_bytes().startswith(b"\x89PNG")
    assert run.out.splitlines() == [
        f"{a}, step 3: {worth(ROWS[4]['held_out'])}",
        f"{b}, step 2: {worth(ROWS[2]['held_out'])}",
    ]
    lines = [[line.get_xydata().tolist() for line in axis.lines] for axis in figures[0].axes]
    over_steps = [[[1, 8], [2, 7], [3, 5]], [[2, 5.5], [3, 4.5]], [[1, 8], [2, 7]], [[2, 5.5]]]
    loss = [[[1, 5.5], [2, 5], [3, 4.5]], [[1, 6.5], [2, 6], [3, 5.5]]]
    agreement = [[[e, e / 3] for e in (1, 2, 3)]] * 2
    assert lines == [over_steps, loss, agreement]
    colours = [line.get_color() for line in figures[0].axes[0].lines]
    assert [same_color(colours[0], c) for c in colours] == [True, True, False, False]
    assert all(axis.get_xlabel() and axis.get_title() for axis in figures[0].axes)
    named = figures[0].axes[0].get_legend().get_texts()
    assert [text.get_text() for text in named] == [str(a), str(b)]


@pytest.mark.parametrize("rows", [None, ROWS[:2]])
def test_what_is_no_run_is_one_line(tmp_path, command, rows):
    folder = tmp_path / "run"
    if rows:  # without a save
        write(folder, rows)
    run = command(curves.main, str(folder), "--png", str(tmp_path / "c.png"))
    assert run.code == 2 and run.err.count("\n") == 1 and "run" in run.err and not run.out
    assert not (tmp_path / "c.png").exists()
