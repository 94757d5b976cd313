"""The logic of bench.py: what it writes, reads and computes. No time is looked at."""

import random
import re
import sys

import pytest
import torch
from helpers import tiny_config, tiny_model

import bench
import bench_engine
from decode import Round, Run, new_cache
from model import Config, Llama, linear_product
from tokenizer import Tokenizer


def sweep(*options: str):
    """bench.py sweep on the shipped checkpoint with one short prompt."""
    return bench.sweep(bench.parser().parse_args(["sweep", *options]), None, [[1, 2]])


@pytest.fixture
def measured(monkeypatch) -> list:
    """Settings of the cells that a sweep measures, without any decoding."""
    cells = []

    def decoded(model, prompts, count, note="", **settings):
        if settings:
            cells.append((settings["exit_layer"], settings["draft_len"]))
        return Run([7] * count, [Round([7], 1, [7, 7], None, 0.0, 0.0, 24)] * 4, 1 / settings.get("exit_layer", 1))

    monkeypatch.setattr(bench, "decode_all", decoded)
    monkeypatch.setattr(Llama, "pack", lambda self: self)
    return cells


def test_a_sweep_goes_on_where_it_was_stopped(measured, tmp_path, monkeypatch):
    file = str(tmp_path / "cells.csv")
    whole = bench.decode_all

    def killed(*given, **settings):
        if settings.get("exit_layer") == 4:
            raise KeyboardInterrupt
        return whole(*given, **settings)

    monkeypatch.setattr(bench, "decode_all", killed)
    with pytest.raises(KeyboardInterrupt):
        sweep("--csv", file, "--exits", "2,4", "--drafts", "3,5")
    assert measured == [(2, 3), (2, 5)]
    monkeypatch.setattr(bench, "decode_all", whole)
    first = sweep("--csv", file, "--exits", "2,4", "--drafts", "3,5", "--png", str(tmp_path / "cells.png"))
    assert measured == [(2, 3), (2, 5), (4, 3), (4, 5)]
    assert [(c["exit_layer"], c["speedup"], c["identical"]) for c in first["cells"]] == [(2, 2.0, True)] * 2 + [(4, 4.0, True)] * 2
    assert (tmp_path / "cells.png").read_bytes().startswith(b"\x89PNG")
    assert sweep("--csv", file, "--exits", "2,4", "--drafts", "3,5") == first
    assert len(measured) == 4


@pytest.mark.parametrize("change", [("--tokens", "9"), ("--min-confidence", "0.4"), ("--dtype", "float64")])
def test_a_table_of_other_settings_is_refused(measured, tmp_path, change):
    file = tmp_path / "cells.csv"
    common = ("--csv", str(file), "--exits", "2", "--drafts", "3", "--dtype", "float32")
    sweep(*common)
    before = file.read_text()
    with pytest.raises(ValueError, match="holds cells of") as refused:
        sweep(*common, *change)
    assert "\n" not in str(refused.value) and file.read_text() == before
    file.write_text(before.rstrip()[:-20])
    with pytest.raises(ValueError, match="line 2: not a whole cell"):
        sweep(*common)


def test_prompts_come_from_text_and_jsonl(shipped, tmp_path):
    tokenizer = Tokenizer(shipped)
    text, lines = tmp_path / "prompts.txt", tmp_path / "prompts.jsonl"
    text.write_text("import os\nimport re\n\n\n  \ndef f(x):\n")
    lines.write_text('{"prompt": "import os\\nimport re"}\n\n{"prompt": "def f(x):", "id": 3}\n')
    wanted = [tokenizer.encode("import os\nimport re"), tokenizer.encode("def f(x):")]
    assert bench.file_prompts(text, tokenizer) == bench.file_prompts(lines, tokenizer) == wanted
    for spoiled in ('{"prompt": 3}', '"prompt"', "prompt", ""):
        lines.write_text(spoiled)
        with pytest.raises(ValueError, match=r"prompts\.jsonl"):
            bench.file_prompts(lines, tokenizer)


def rounds(alpha: float, draft_len: int, count: int) -> list[Round]:
    """Rounds in which a guess is accepted with probability alpha once those before it were."""
    rng, found = random.Random(0), []
    for _ in range(count):
        accepted = 0
        while accepted < draft_len and rng.random() < alpha:
            accepted += 1
        found.append(Round([0] * draft_len, accepted, [0] * (accepted + 1), None, 0.0, 0.0, 1))
    return found


def test_the_ideal_speedup_is_the_formula_and_what_a_simulation_gives():
    assert bench_engine.expected_tokens(0.5, 2) == 1.75
    assert bench_engine.ideal_speedup(0.5, 2, draft=0.25, verify=0.75) == pytest.approx(1.4)
    assert bench_engine.ideal_speedup(0.5, 2, draft=0.25, verify=0.75, row=0.5) == pytest.approx(1.0)
    assert bench_engine.expected_tokens(1.0, 6) == 7
    for alpha, draft_len in ((0.6, 4), (0.8, 6), (0.95, 3)):
        found = rounds(alpha, draft_len, 20000)
        emitted = sum(len(r.emitted) for r in found) / len(found)
        assert emitted == pytest.approx(bench_engine.expected_tokens(alpha, draft_len), rel=0.01)
        assert bench_engine.accepted_each(found) == pytest.approx(alpha, abs=0.01)


def test_the_damping_of_an_acceptance_is_bracketed_and_found():
    for fall in (0.1, 1.0, 20.0):
        for target in (0.6, 0.8, 0.95):
            tried = []
            damping = bench_engine.find_damping(lambda x: tried.append(x) or 1 / (1 + fall * x), target)
            assert abs(1 / (1 + fall * damping) - target) <= 0.02
            assert len(tried) <= 16
    with pytest.raises(ValueError, match="no damping"):
        bench_engine.find_damping(lambda x: 0.7, 0.6)


def test_damping_sets_what_the_exit_foresees():
    damped = bench_engine.Damped(tiny_model(tiny_config()), 2, Llama.pack)
    accepted = []
    for damping in (0.0, 0.3, 3.0):
        damped.damp(damping)
        r = bench_engine.decode_all(damped.model, [[1, 2, 3]], 60, exit_layer=2, draft_len=4, sampling=bench_engine.Sampling(1.0))
        accepted.append(bench_engine.accepted_each(r.rounds))
    assert accepted[0] == 1 and accepted[0] > accepted[1] > accepted[2]


@pytest.mark.parametrize("tied", [True, False])
def test_bytes_that_must_be_read_are_those_of_the_tensors(tied):
    c = tiny_config(tied=tied)
    model, cache = Llama(c).bfloat16(), new_cache(c, 128, 3, torch.bfloat16, "cpu")
    weights = sum(p.nbytes for layer in model.model.layers[1:3] for p in layer.parameters())
    head = model.model.norm.weight.nbytes + model.lm_head.weight.nbytes
    live = cache.keys[1:3, :, :77].numel() * 2 + cache.values[1:3, :, :77].numel() * 2
    assert (bench_engine.layer_bytes(c, 2, 2), bench_engine.head_bytes(c, 2), bench_engine.kv_bytes(c, 2, 77, 2)) == (weights, head, live)
    assert bench_engine.pass_bytes(c, 2, 77, 2) == weights + head + live
    assert all(bench_engine.cache_bytes(c, n, 3, 2) == new_cache(c, n, 3, torch.bfloat16, "cpu").nbytes for n in (1, 64, 77, 128))


def test_peak_of_memory_counts_what_lives_at_once(monkeypatch, capsys):
    def work():
        a = torch.empty(1000, 1000)
        b = torch.empty(500, 1000)
        del a, b
        torch.empty(250, 1000)

    assert bench_engine.peak_bytes(work) == 6_000_000
    monkeypatch.setitem(bench_engine.SHAPES, "small", Config(1024, 96, 192, 6, 3, 1, 32, tied=True))
    args = bench.parser().parse_args(["memory", "--shape", "small", "--tokens", "16", "--dtype", "float32"])
    for length in (2, 64):  # the widest pass is a verification; the prompt
        assert bench_engine.memory(args, None, [list(range(3, 3 + length))])["within"], capsys.readouterr().out


def test_the_clock_gives_each_phase_its_own_time(monkeypatch):
    class Parts:
        def inner(self):
            now[0] += 2

        def outer(self):
            now[0] += 1
            self.inner()
            self.inner()

    now, clock, before = [0.0], bench_engine.Clock(), Parts.outer
    monkeypatch.setattr(bench_engine.time, "perf_counter", lambda: now[0])
    with clock.patched((Parts, "inner", "in"), (Parts, "outer", "out", "draft")):
        Parts().outer()
        Parts().inner()
    assert clock.seconds == {("draft", "out"): 1, ("draft", "in"): 4, (None, "in"): 2}
    assert clock.calls == {("draft", "out"): 1, ("draft", "in"): 2, (None, "in"): 1}
    assert Parts.outer is before


def test_damping_reaches_a_graph_that_holds_a_products_weight():
    damped = bench_engine.Damped(tiny_model(tiny_config()), 1, lambda model: model.pack())
    for product, weight in damped.late:
        product.take(linear_product, weight.clone(), exact=False)
    product, weight = damped.late[-1]
    held, x = product.product, torch.randn(3, weight.shape[1])
    for damping in (0.5, 2.0):
        damped.damp(damping)
        assert torch.equal(held(x), x @ (weight * damping).T)


def test_a_pause_follows_each_attention(monkeypatch):
    now = iter(range(100))
    monkeypatch.setattr(bench_engine.time, "perf_counter", lambda: next(now))
    monkeypatch.setattr(bench_engine.compiled, "attend_widened", lambda *given: given)
    with bench_engine.pausing(5):
        assert bench_engine.compiled.attend_widened(1, 2) == (1, 2) and next(now) == 6
    assert bench_engine.compiled.attend_widened(1, 2) == (1, 2) and next(now) == 7


@pytest.mark.parametrize("what", ["roofline", "ideal --alphas 0.8 --prompts 1 --tokens 24", "exactness --prompts 1 --tokens 4", "scale", "profile --prompts 1 --tokens 8"])
def test_the_engines_tables_have_a_line_for_each_shape(what, monkeypatch, capsys):
    monkeypatch.setattr(bench_engine, "CONTEXTS", (64, 128))
    for name, layers in (("one", 2), ("other", 3)):
        monkeypatch.setitem(bench_engine.SHAPES, name, Config(2048, 96, 192, layers, 3, 1, 32, tied=True))
    monkeypatch.setattr(sys, "argv", ["bench.py", *what.split(), "--shape", "one,other", "--dtype", "float32", *["--runs", "1"][: 0 if "profile" in what else 2]])
    bench.main()
    out = capsys.readouterr().out
    assert all(re.search(rf"^\|? ?{name}\b.*\d", out, re.M) for name in ("one", "other")), out
    assert len(re.findall(r"^\|-", out, re.M)) == {"roofline": 2, "ideal": 2, "exactness": 1, "scale": 3, "profile": 2}[what.split()[0]]


def test_nothing_to_measure_is_one_line(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["bench.py", "sweep", "--prompts", "0"])
    with pytest.raises(SystemExit) as stop:
        bench.main()
    assert stop.value.code == 2 and capsys.readouterr().err == "bench.py: --prompts, --tokens and --runs must be at least 1\n"
