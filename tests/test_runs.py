"""What a run leaves, what it goes on with, and how it is stopped."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from helpers import write_rows
from test_files_of_others import change, made
from tokenizers import Tokenizer as Fast

from extras import kangaroo
from model import load_checkpoint
from support.console import default_settings
from support.runs import RunDirectory
from support.tokenizer import Tokenizer
from support.train_command import drafting, main
from train import RECIPES, Recipe

PAIRS = [{"prompt": f"Q {i}", "completion": f" yes{i}"} for i in range(400)]
SMALL = "--steps 2 --seq 16 --batch 2 --no-compile --no-bf16 --exits 2,3".split()


@pytest.fixture
def work(tmp_path, monkeypatch):
    """A directory to work in with a checkpoint "a" and data pairs.jsonl; signals are kept."""
    monkeypatch.chdir(tmp_path)
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    made(tmp_path / "a")
    write_rows(tmp_path / "pairs.jsonl", PAIRS)
    yield tmp_path
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def run(work, command):
    """What train.py says, which must end with this exit code."""

    def call(*options: object, code: int = 0) -> str:
        found = command(main, "--out", "o", *SMALL, *map(str, options))
        assert found.code == code, found.err
        return found.err

    return call


def read(name: str) -> dict:
    def refuse(constant: str) -> float:
        raise AssertionError(f"{constant} is no JSON")

    return json.loads(Path(name).read_text(), parse_constant=refuse)


TUNE = ("--init", "a", "--data", "pairs.jsonl")


def test_a_tuned_checkpoint_has_what_training_does_not_change(run):
    settings = {"eos_token_id": [258, 256], "temperature": 2.0, "top_p": 1.0, "odd": [1.0]}
    change(Path("a/generation_config.json"), **settings)
    change(Path("a/config.json"), pad_token_id=259)
    for name in ("chat_template.jinja", "special_tokens_map.json", "added_tokens.json"):
        Path("a", name).write_text("{}")
    run(*TUNE)
    for name in ("chat_template.jinja", "special_tokens_map.json", "added_tokens.json"):
        assert Path("o", name).read_text() == "{}"
    for name in ("tokenizer_config.json", "tokenizer.json"):
        assert Path("o", name).read_bytes() == Path("a", name).read_bytes()
    assert read("o/config.json")["pad_token_id"] == 259
    found = read("o/generation_config.json")
    # 257 is the EOS that training wrote: the model says it at the end of a text.
    assert found | settings | {"eos_token_id": [258, 256, 257]} == found
    assert "2.0" in Path("o/generation_config.json").read_text(), "transformers wants a float"
    model, tokenizer = load_checkpoint("o"), Tokenizer("o")
    chosen = default_settings(Path("o"), model.config, tokenizer)
    assert chosen["exit_layer"] in (2, 3) and chosen["eos"][:3] == (258, 256, 257)
    assert chosen["draft_len"] == found["num_assistant_tokens"]
    assert chosen["min_confidence"] == found["assistant_confidence_threshold"]


@pytest.mark.parametrize("name", ["generation_config.json", "config.json"])
def test_eos_and_bos_are_those_of_inits_files_where_its_tokenizer_names_none(run, name):
    """In what is trained on, texts and answers, and in what is saved."""
    file = Path("a/tokenizer.json")
    file.write_text(file.read_text().replace("<s>", "<in>").replace("</s>", "<out>"))
    Path("a/tokenizer_config.json").write_text(json.dumps({"chat_template": "{{ messages }}"}))
    change(Path("a/config.json"), eos_token_id=None, bos_token_id=None)
    change(Path("a", name), eos_token_id=[257, 7], bos_token_id=256)
    talk = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    rows = write_rows(Path("both.jsonl"), [*PAIRS, *[{"messages": talk}] * 200])
    run("--init", "a", "--data", rows)
    texts = [np.fromfile(f"o/{part}.bin", np.uint16) for part in ("train", "held_out")]
    assert sum((ids == 257).sum() for ids in texts) == 600
    run("--init", "a", "--data", rows, "--steps", 3)
    tokenizer = Tokenizer("o")
    assert (tokenizer.bos, tokenizer.eos) == (256, 257)
    found = read("o/generation_config.json")
    assert (found["bos_token_id"], found["eos_token_id"]) == (256, [257, 7])


@pytest.mark.parametrize("content", ["{", None])
def test_settings_that_nobody_can_read_do_not_stop_a_run(run, content):
    if content:
        Path("a/generation_config.json").write_text(content)
    run(*TUNE)
    assert read("o/generation_config.json")["eos_token_id"] == 257


def test_the_exit_to_draft_with_is_the_best_of_those_that_were_trained():
    """The agreements are those of the shipped checkpoint, whose best exit was measured."""
    shipped = {1: 0.26, 2: 0.45, 3: 0.52, 4: 0.56, 6: 0.64, 8: 0.67, 12: 0.80, 24: 1.0}
    even = Recipe(exits="all", uniform_exits=True)
    choose = lambda agreements, recipe: drafting(
        {exit: {"loss": 1.0, "agreement": share} for exit, share in agreements.items()}, recipe
    )
    assert choose(shipped, even) == {
        "assistant_early_exit": 6,
        "num_assistant_tokens": 7,
        "assistant_confidence_threshold": 0.25,
    }
    first = {1: 1.0, 2: 0.1, 3: 0.1, 4: 1.0}
    assert choose(first, even)["assistant_early_exit"] == 1
    assert choose(first, RECIPES["layerskip"])["assistant_early_exit"] > 1, "e(0) = 0"
    assert choose({1: 0.5, 2: 1.0}, RECIPES["layerskip"])["assistant_early_exit"] == 1


def test_a_held_out_loss_is_a_number_where_few_tokens_have_one(run):
    rows = [{"prompt": "x" * 300 + str(i), "completion": " y"} for i in range(200)]
    run("--init", "a", "--data", write_rows(Path("long.jsonl"), rows), "--seq", 8, "--batch", 1)
    for row in read("o/training.json")["held_out"].values():
        assert row["loss"] > 0 and 0 <= row["agreement"] <= 1
    assert "NaN" not in Path("o/metrics.jsonl").read_text()


def test_a_run_goes_on_with_the_same_data_wherever_it_is_and_not_for_less(run, work):
    run(*TUNE)
    Path("there").mkdir()
    Path("link").symlink_to("a")
    Path("pairs.jsonl").rename("there/other.jsonl")
    same = ("--init", work / "link", "--data", "./there/other.jsonl", "--out", work / "o")
    assert "going on from step 2 of 3" in run(*same, "--steps", 3)
    assert read("o/training.json")["steps"] == 3
    assert "other settings (steps)" in run(*same, "--steps", 2, code=2)
    write_rows(Path("pairs.jsonl"), [*PAIRS[:-1], {"text": "new"}])
    assert "o holds tokens of other data" in run(*TUNE, "--steps", 4, code=2)
    before = {file: file.read_bytes() for file in Path("a").iterdir()}
    assert "--out is --init" in run("--init", "link", "--out", "./a", code=2)
    assert before == {file: file.read_bytes() for file in Path("a").iterdir()}


def test_conversations_are_tuned_on_and_need_a_template(run):
    say = lambda role, text: {"role": role, "content": text}
    rows = [{"messages": [say("user", f"q{i}"), say("assistant", f"a{i}")]} for i in range(200)]
    file = write_rows(Path("chats.jsonl"), rows)
    run("--init", "a", "--data", file)
    said = run("--data", file, "--out", "scratch", code=2)
    assert "conversations need the chat template of an --init" in said
    Path("a/tokenizer_config.json").unlink()
    assert "chats.jsonl:1: " in run("--init", "a", "--data", file, "--out", "bare", code=2)


def test_a_run_that_is_asked_to_end_saves(work):
    command = [sys.executable, str(ROOT / "train.py"), "--out", "o", *SMALL, *TUNE]
    process = subprocess.Popen([*command, "--steps", "100000"], stderr=subprocess.PIPE)
    metrics, end = Path("o/metrics.jsonl"), time.monotonic() + 100
    while not (metrics.exists() and "losses" in metrics.read_text()):
        assert time.monotonic() < end and process.poll() is None
        time.sleep(0.02)
    process.terminate()
    said = process.communicate(timeout=100)[1].decode()
    assert process.returncode == 130 and "the same command goes on from there" in said
    assert read("o/training.json")["steps"] > 0 and Path("o/state.safetensors").exists()


def test_what_a_killed_save_left_is_deleted_and_nothing_else(run):
    run(*TUNE)
    ours, others = f"o/.{'0a' * 8}.tmp", ["o/.a.tmp", "o/notes.tmp", f"o/.{'0A' * 8}.tmp", "o/.x"]
    for name in (ours, *others):
        Path(name).write_text("a")
    with_lock = RunDirectory("o", "a")
    with_lock.lock()
    assert not Path(ours).exists() and all(Path(name).exists() for name in others)
    Path(ours).write_text("a")
    assert "another run trains in o" in run(*TUNE, "--steps", 3, code=2)
    assert Path(ours).exists(), "another run may be writing it"
    with_lock.close()


def test_a_tokenizer_with_more_tokens_than_the_model_trains_on_text_without_them(run):
    file = Path("a/tokenizer.json")
    fast = Fast.from_file(str(file))
    fast.add_special_tokens([f"<{i}>" for i in range(60)])
    fast.save(str(file))
    run(*TUNE)
    rows = write_rows(Path("b.jsonl"), [{"text": "a <50> b <51>"}] * 300)
    said = run("--init", "a", "--data", rows, "--out", "b", code=2)
    assert "has tokens that the model lacks" in said


def test_commands_start_and_a_run_trains_where_there_is_no_fcntl(work):
    code = "import sys; sys.modules['fcntl'] = None; import decode, support.decode_command; "
    code += "import extras.kangaroo, extras.sharded; from support.train_command import main; main()"
    command = [sys.executable, "-c", code, "--out", "o", *SMALL, *TUNE]
    subprocess.run(command, env=os.environ | {"PYTHONPATH": str(ROOT)}, check=True)
    assert Path("o/model.safetensors").exists()


def test_ctrl_c_keeps_what_an_adapter_has_learned(work, monkeypatch, command):
    steps, step = [], kangaroo.train_step

    def step_and_stop(*args):
        if torch.is_grad_enabled():
            steps.append(1)
            if len(steps) == 3:
                os.kill(os.getpid(), signal.SIGINT)
        return step(*args)

    monkeypatch.setattr(kangaroo, "train_step", step_and_stop)
    options = "--ckpt a --data pairs.jsonl --exit 2 --steps 500 --batch 2 --seq 16 --out k"
    run = command(kangaroo.main, *options.split())
    assert run.code == 130 and len(steps) == 3
    assert "the adapter, stopped early, is in k" in run.err
    adapter = kangaroo.load_adapter("k", load_checkpoint("a"))
    assert adapter.self_attn.o_proj.weight.any(), "it has learned"
