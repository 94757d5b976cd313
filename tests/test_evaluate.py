"""Evaluate measures what a few lines over the three verbs measure, and asks lm-eval as hf does."""

import csv
from argparse import Namespace
from importlib.util import find_spec
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from helpers import config_option, write_rows

from bench.engine import ideal_speedup
from extras import evaluate
from extras.evaluate import Judge
from support import train_command
from support.console import default_settings, load

REAL = ROOT / "checkpoints" / "smollm2"
TEXTS = ["def f(x):\n    return x\n", "import os\n" * 30, "x = 'naïve ½ 🎉'\n"]


@pytest.fixture
def run(command, small):
    """run("--data", file) -> code, out, err on the small checkpoint, in float32."""
    return lambda *words: command(
        evaluate.main, "--ckpt", str(small), "--dtype", "float32", *map(str, words)
    )


@pytest.fixture
def target(small):
    """target(settings=...) -> what a Judge takes: the small model, which drafts with 2 layers."""
    model, tokenizer = load(small, "float32", "cpu")
    settings = default_settings(small, model.config, tokenizer)
    how: dict = dict(model=model, tokenizer=tokenizer, settings=settings)
    return lambda **changes: Namespace(**how | changes)


def table(file) -> list[dict]:
    return list(csv.DictReader(file.read_text().splitlines()))


def asked(*args) -> SimpleNamespace:
    """A request of lm-eval."""
    return SimpleNamespace(args=args)


# --------------------------------------
# Texts


@torch.inference_mode()
def test_losses_are_those_of_six_lines_over_the_three_verbs(run, small, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate, "pass_seconds", lambda model: lambda layers, rows: layers + rows)
    monkeypatch.setattr(evaluate, "ROWS", 7)
    file = write_rows(tmp_path / "texts.jsonl", [{"text": text} for text in TEXTS])
    found = run("--data", file, "--csv", tmp_path / "t.csv", "--png", tmp_path / "t.png")
    assert found.code == 0, found.err
    assert (tmp_path / "t.png").read_bytes().startswith(b"\x89PNG")

    model, tokenizer = load(small, "float32", "cpu")
    said, losses = {e: [] for e in (1, 2, 3, 4)}, {e: [] for e in (1, 2, 3, 4)}
    for x in (torch.tensor([[*tokenizer.encode(text), tokenizer.eos]]) for text in TEXTS):
        for e in said:
            logits = model.unembed(model.run_layers(model.embed(x[:, :-1]), 0, e))[0]
            losses[e].append(F.cross_entropy(logits, x[0, 1:], reduction="none"))
            said[e].append(logits.argmax(-1))

    rows = table(tmp_path / "t.csv")
    assert [int(row["exit"]) for row in rows] == [1, 2, 3, 4] and len(found.out.split("\n")) == 9
    for e, row in enumerate(rows, 1):
        loss, agrees = torch.cat(losses[e]).mean(), torch.cat(said[e]) == torch.cat(said[4])
        a = agrees.double().mean().item()
        best = max(5 * ideal_speedup(a, d, (d + 1) * (e + 1), 5 - e + d) for d in range(1, 16))
        wanted = loss, loss.exp(), a, best if e < 4 else 1
        assert [float(x) for x in [*row.values()][1:]] == pytest.approx([*map(float, wanted)])
    assert 0 < a != float(rows[1]["agreement"]) > float(rows[0]["agreement"])


def test_long_texts_are_cut_and_prompts_have_no_loss(run, small, tmp_path):
    """Each token but the first is judged once, after those of its piece."""
    row = {"prompt": "x = 1\n" * 30, "completion": "y = 2\n" * 50}
    file = write_rows(tmp_path / "rows.jsonl", [row] * 2)
    assert run("--data", file, "--csv", tmp_path / "t.csv", "--limit", 1, "--exits", 2).code == 0
    rows = table(tmp_path / "t.csv")
    assert [row["exit"] for row in rows] == ["2", "4"]
    model, tokenizer = load(small, "float32", "cpu")
    ids = torch.tensor([*tokenizer.encode(row["prompt"] + row["completion"]), tokenizer.eos])
    size, begin = model.config.max_len - 2, len(tokenizer.encode(row["prompt"]))
    assert begin < size < len(ids) - 1 < 2 * size
    first, second = model(ids[None, :size])[0], model(ids[None, size:-1])[0]
    losses = F.cross_entropy(torch.cat([first, second]), ids[1:], reduction="none")
    assert float(rows[1]["loss"]) == pytest.approx(losses[begin - 1 :].mean().item(), rel=1e-5)


# --------------------------------------
# lm-eval


def test_likelihoods_of_a_batch_are_those_of_single_rows(target):
    """And of the model's logits: by every exit, of a text that is cut at its start, too."""
    encode = target().tokenizer.encode
    rows = [(None, encode(text), encode(f"y{i} = ", bos=False)) for i, text in enumerate(TEXTS)]
    rows += [(None, encode("a b c d " * 200), [7, 8, 9]), (None, [1], [5])]
    for depth in (2, 4):
        single, batch = [], Judge(target(), depth)._loglikelihood_tokens(rows)
        for row in rows:
            single += Judge(target(), depth)._loglikelihood_tokens([row])
        model = target().model
        for (_, context, ids), one, many in zip(rows, single, batch):
            x = torch.tensor([(context + ids)[-model.config.max_len - 1 :]])
            h = model.run_layers(model.embed(x[:, :-1]), 0, depth)
            logits = model.unembed(h)[0, -len(ids) :].log_softmax(-1)
            likely = logits.gather(1, torch.tensor(ids)[:, None]).sum().item()
            assert one[0] == pytest.approx(likely, rel=1e-5) == pytest.approx(many[0], rel=1e-5)
            assert one[1] == many[1] == (logits.argmax(-1).tolist() == ids)


def test_answers_do_not_depend_on_who_drafts_and_end_at_until(target):
    full = target(settings=target().settings | dict(exit_layer=0))
    drafted = target(settings=target().settings | dict(exit_layer=2, min_confidence=0.0))

    def answers(who, depth=4, **how) -> list[str]:
        asks = [asked(c, dict(max_gen_toks=30) | how) for c in ("def f(x):\n", "import os\n")]
        return Judge(who, depth).generate_until(asks)

    texts, alone = answers(full), answers(drafted, 2)
    assert texts == answers(drafted) != alone == answers(full, 2) and all(texts)
    for end in (texts[0][7:9], texts[1][11:12], [texts[0][-3:], texts[1][9:13], ""]):
        ends = [end] if isinstance(end, str) else end[:2]
        cut = [text[: min(text.find(x) % 1000 for x in ends)] for text in texts]
        assert answers(full, until=end) == answers(drafted, until=end) == cut


has_lm_eval = pytest.mark.skipif(not find_spec("lm_eval"), reason="lm-eval: `make lm-eval`")
TASKS = "local_choice", "local_answer", "local_pages"


@has_lm_eval
def test_a_rolling_likelihood_has_all_the_context_there_is(target):
    """Token 1 + n of the text sees the context before it: the last window is no short one."""
    t, text = target(), "a = b + c\n" * 90
    ids, size = [t.tokenizer.bos, *t.tokenizer.encode(text)], t.model.config.max_len
    rest = len(ids) - 1 - 2 * size
    assert 0 < rest < size
    parts = (ids[: size + 1], size), (ids[size : 2 * size + 1], size), (ids[-size - 1 :], rest)
    (found,), total = Judge(t, 4).loglikelihood_rolling([asked(text)]), 0.0
    for part, n in parts:
        logits = t.model(torch.tensor([part[:-1]]))[0].log_softmax(-1)[-n:]
        total += logits.gather(1, torch.tensor(part[-n:])[:, None]).sum().item()
    assert found == pytest.approx(total, rel=1e-5)


@has_lm_eval
def test_tasks_run_on_the_full_model_and_on_exits_alone(run, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    own = ["--include-path", "tests/tasks", "--csv", tmp_path / "t.csv", "--limit", 2]
    found = run("--tasks", *TASKS, *own, "--exits", 2, "--png", tmp_path / "t.png")
    assert found.code == 0, found.err
    rows = table(tmp_path / "t.csv")
    assert [row["exit"] for row in rows] == ["2", "4"] and "local_choice acc" in found.out
    assert rows[0]["local_pages word_perplexity"] != rows[1]["local_pages word_perplexity"]
    assert "acc_stderr" not in found.out and "local_choice acc_stderr" in rows[0]
    bad = run("--tasks", "no_such_task", *own)
    assert bad.code == 2 and "no_such_task" in bad.err and "Traceback" not in bad.err


@has_lm_eval
@pytest.mark.skipif(not REAL.exists() or not find_spec("transformers"), reason="`make lm-eval`")
def test_the_full_model_answers_lm_eval_as_transformers_does(monkeypatch):
    """Likelihoods to 1e-6, relative, and texts exactly: batches of one, float32, SmolLM2."""
    from lm_eval import simple_evaluate
    from lm_eval.api.model import TemplateLM
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(evaluate, "BATCH", 1)
    model, tokenizer = load(REAL, "float32", "cpu")
    settings = default_settings(REAL, model.config, tokenizer)
    t = Namespace(model=model, tokenizer=tokenizer, settings=settings)
    ours = type("Ours", (Judge, TemplateLM), {})(t, model.config.n_layers)
    theirs = HFLM(pretrained=str(REAL), dtype="float32", batch_size=1, device="cpu")
    tasks = TaskManager(include_path="tests/tasks", include_defaults=False)
    how = dict(tasks=[*TASKS], task_manager=tasks, bootstrap_iters=0)
    a, b = (simple_evaluate(lm, **how) for lm in (ours, theirs))
    for task in TASKS:
        docs = zip(*(x["samples"][task] for x in (a, b)), strict=True)
        for one, other in ((x, y) for pair in docs for x, y in zip(*(d["resps"] for d in pair))):
            if task == "local_choice":
                (one, says), (other, said) = one[0], other[0]
                assert says == said
            exact = task == "local_answer"
            assert one == other if exact else one == pytest.approx(other, rel=1e-6)
        found = ({k: v for k, v in x["results"][task].items() if "," in k} for x in (a, b))
        ours, theirs = ({k: v for k, v in x.items() if "stderr" not in k} for x in found)
        assert ours == pytest.approx(theirs, rel=1e-5)


# --------------------------------------
# Summaries


@pytest.mark.skipif(not find_spec("rouge_score"), reason="rouge-score: `make lm-eval`")
def test_summaries_are_scored_and_drafted_ones_are_the_full_models(run, tmp_path, target):
    from rouge_score.rouge_scorer import RougeScorer

    prompts, full = ["def f(x):\n", "import os\n"], target().settings | dict(exit_layer=0)
    asks = [asked(prompt, dict(max_gen_toks=20)) for prompt in prompts]
    texts = Judge(target(settings=full), 4).generate_until(asks)
    rows = [dict(prompt=p, reference=f"{text} and more of it") for p, text in zip(prompts, texts)]
    file = write_rows(tmp_path / "s.jsonl", rows)
    how = ["--max-new-tokens", 20, "--min-confidence", 0, "--exits", 2, "--csv", tmp_path / "s.csv"]
    found = run("--summaries", file, *how)
    assert found.code == 0, found.err
    full, alone, drafted = table(tmp_path / "s.csv")
    names = [row["way"] for row in (full, alone, drafted)]
    assert names == ["4 layers", "2 layers alone", "2 layers draft"]
    scorer = RougeScorer(["rouge1", "rougeL"])
    for name in ("rouge1", "rougeL"):
        scores = [scorer.score(r["reference"], text)[name] for r, text in zip(rows, texts)]
        assert float(full[name]) == pytest.approx(sum(s.fmeasure for s in scores) / 2)
        assert full[name] == drafted[name] != alone[name]
    same = [row["identical"] for row in (full, alone, drafted)]
    assert same == ["True", "False", "True"]
    assert float(full["tokens per round"]) == 1 < float(drafted["tokens per round"])
    assert 0 < float(drafted["accepted"]) <= 1 and not full["accepted"]


# --------------------------------------
# Twins, and what cannot run


def test_exits_of_a_twin_that_was_trained_for_them_are_better(command, tmp_path):
    """Two tiny checkpoints, plain and LayerSkip, of the same data, seed and steps."""
    (corpus := tmp_path / "corpus").mkdir()
    for n in range(60):
        lines = (f"def f{(n * k) % 7}(x):\n    return x + {(n + k) % 5}\n\n\n" for k in range(20))
        (corpus / f"{n}.py").write_text("".join(lines))
    heads = dict(n_heads=2, n_kv_heads=1)
    shape = config_option(n_layers=6, dim=32, hidden_dim=64, vocab_size=280, **heads)
    how = [*shape, *"--steps 150 --seq 32 --batch 8 --lr 3e-3 --no-compile".split()]
    more, found = ["--limit", "3", "--dtype", "float32", "--csv", str(tmp_path / "t.csv")], []
    for recipe in ("plain", "layerskip"):
        out, data = str(tmp_path / recipe), ["--data", str(corpus)]
        assert command(train_command.main, "--out", out, *data, "--recipe", recipe, *how).code == 0
        assert command(evaluate.main, "--ckpt", out, *data, *more).code == 0
        rows = table(tmp_path / "t.csv")
        found.append([(float(row["loss"]), float(row["agreement"])) for row in rows[:3]])
    for (plain, agrees), (better, follows) in zip(*found):
        assert better < plain - 0.2 and follows > agrees + 0.03


FILES = {
    "empty.txt": "",
    "a.txt": "a = 1\n",
    "bare.jsonl": '{"prompt": "a"}\n',
    "good.jsonl": '{"prompt": "a", "reference": "b"}\n',
}
BAD = """
--data empty.txt
--data a.txt --exits 4
--data a.txt --limit 0
--data a.txt --csv missing/t.csv
--summaries bare.jsonl
--ckpt none --data a.txt
--tasks local_choice
--summaries good.jsonl
"""


@pytest.mark.parametrize("line", BAD.strip().splitlines())
def test_what_cannot_run_is_one_line_and_leaves_nothing(run, tmp_path, monkeypatch, line):
    monkeypatch.chdir(tmp_path)
    for name, text in FILES.items():
        (tmp_path / name).write_text(text)
    absent = line.startswith(("--tasks", "--summaries good"))
    monkeypatch.setattr(evaluate, "find_spec", lambda module: not absent)
    if absent or "missing" in line:
        monkeypatch.setattr(evaluate, "start", None)  # not even begun
    before = sorted(tmp_path.iterdir())
    found = run(*line.split())
    assert found.code == 2 and found.err.count("\n") == 1 and not found.out
    assert ("pip install" in found.err) == absent
    assert sorted(tmp_path.iterdir()) == before
