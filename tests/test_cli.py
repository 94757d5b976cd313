"""The command line: every mode, and one clear line for bad input."""

import io
import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT
from helpers import tiny_config, tiny_model

import data
import decode
import kangaroo
from model import load_checkpoint, save_checkpoint


@pytest.fixture(scope="module")
def ckpt(tmp_path_factory):
    """A small checkpoint whose first two of four layers foresee most of what the whole says."""
    path = tmp_path_factory.mktemp("ckpt")
    tokenizer = data.train_tokenizer(["def f(x):\n    return x + 1\n" * 40], 290, path / "tokenizer.model")
    config = tiny_config(vocab_size=tokenizer.vocab_size, bos=1, max_len=200, tied=True)
    save_checkpoint(tiny_model(config, damp_from=2, dtype=torch.bfloat16), path)
    return path


@pytest.fixture
def cli(ckpt, capsys, monkeypatch):
    """cli("--full", stdin=b"...") -> code, out, err of decode.py on the small checkpoint."""

    def call(*args, stdin=b"", on=ckpt):
        monkeypatch.setattr(sys, "argv", ["decode.py", "--ckpt", str(on), *args])
        reader = None if stdin is None else io.TextIOWrapper(io.BytesIO(stdin), encoding="utf-8", errors="surrogateescape")
        monkeypatch.setattr(sys, "stdin", reader)
        code = 0
        try:
            decode.main()
        except SystemExit as stop:
            code = stop.code
        out, err = capsys.readouterr()
        return SimpleNamespace(code=code, out=out, err=err)

    return call


SHORT = ["--prompt", "def f(x):", "--max-new-tokens", "30"]


def test_text_goes_to_stdout_and_statistics_to_stderr(cli):
    run = cli(*SHORT, "--exit", "2", "--min-confidence", "0")
    assert run.code == 0 and len(run.out) > 5 and "\033[" not in run.out
    assert "30 tokens in" in run.err and "accepted" in run.err and "tokens per round" in run.err


def test_compiled_text_is_compared_too(cli):
    run = cli(*SHORT, "--exit", "2", "--compile", "--compare")
    assert run.code == 0 and "compiling for exits 2" in run.err and "identical to the full model (30 tokens, logits equal to the last bit)" in run.err


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64", "auto"])
@pytest.mark.parametrize("how", [[], ["--temperature", "0.8", "--top-p", "0.9", "--top-k", "50", "--seed", "7"]])
def test_every_exit_and_draft_length_prints_the_full_models_text(cli, dtype, how):
    full = cli(*SHORT, *how, "--dtype", dtype, "--full").out
    for exit_layer, draft_len in (1, 3), (2, 8), (3, 1):
        assert cli(*SHORT, *how, "--dtype", dtype, "--exit", str(exit_layer), "--draft", str(draft_len)).out == full


def test_compare_says_identical_and_how_fast(cli):
    run = cli(*SHORT, "--compare", "--exit", "2")
    assert "identical to the full model (30 tokens, logits equal to the last bit)" in run.err
    assert "NOT" not in run.err and "times its speed" in run.err


def test_seeds_matter_and_repeat(cli):
    one, again, other = (cli(*SHORT, "--temperature", "1", "--seed", s).out for s in "112")
    assert one == again != other


@pytest.mark.parametrize("who", ["--exit auto", "--draft-ckpt CKPT", "--skip attn:2,3,mlp:3", "--lookup", "--jacobi", "--adapter ADAPTER"])
def test_whoever_drafts_the_text_is_the_full_models(cli, ckpt, tmp_path, who):
    torch.manual_seed(0)
    model = load_checkpoint(ckpt)
    kangaroo.save_adapter(kangaroo.Adapter(model.config, 2), tmp_path, {})
    options = who.replace("CKPT", str(ckpt)).replace("ADAPTER", str(tmp_path)).split()
    options += ["--min-confidence", "0"]
    run = cli(*SHORT, *options, "--compare", "--temperature", "0.7")
    assert run.code == 0 and "identical to the full model" in run.err and "drafted tokens accepted" in run.err
    found = json.loads(cli(*SHORT, *options, "--json").out)
    assert found["settings"]["drafter"] and found["acceptance"] is not None


@pytest.mark.parametrize("bad", ["--exit some", "--skip x", "--skip attn:9", "--adapter none", "--draft-ckpt none", "--lookup --jacobi", "--lookup --exit 2", "--adapter none --full"])
def test_drafters_that_cannot_be_are_one_clear_message(cli, bad):
    run = cli(*SHORT, *bad.split())
    assert run.code == 2 and "decode.py: " in run.err.splitlines()[-1] and "Traceback" not in run.err and not run.out


def test_confident_exit_says_how_many_layers_it_ran(cli):
    run = cli(*SHORT, "--exit-confidence", "0.1", "--exit", "1")
    assert run.code == 0 and "layers per token, from 1 to 4" in run.err
    assert cli(*SHORT, "--exit-confidence", "1").out == cli(*SHORT, "--full").out


@pytest.mark.parametrize("kept", ["0::2", "0,2", "0:1,2"])
def test_every_other_layer_alone_is_a_model_of_half_the_layers(cli, kept):
    run = cli(*SHORT, "--keep-layers", kept, "--compare")
    assert run.code == 0 and "identical to the full model" in run.err
    assert run.out == cli(*SHORT, "--keep-layers", "0,2", "--full").out != cli(*SHORT, "--full").out


@pytest.mark.parametrize("bad", ["x", "0,9", "", "0::0", "0:2:1:1", "3", "--exit-confidence 2", "--exit-confidence -1"])
def test_layers_and_confidence_that_cannot_be_are_one_line(cli, bad):
    run = cli(*SHORT, *(bad.split() if bad.startswith("--") else ["--keep-layers", bad]))
    assert run.code == 2 and run.err.startswith("decode.py: ") and run.err.count("\n") == 1 and not run.out


def test_no_verify_is_another_decoding(cli):
    run = cli(*SHORT, "--no-verify", "--exit", "1", "--json")
    assert run.out != cli(*SHORT, "--full", "--json").out
    found = json.loads(run.out)
    assert found["acceptance"] is None and len(found["ids"]) == len(found["rounds"]) == 30


def test_json_is_one_object_with_every_field(cli):
    run = cli(*SHORT, "--json", "--compare", "--exit", "2", "--draft", "4", "--seed", "3")
    found = json.loads(run.out)
    assert set(found) == {
        "text", "ids", "rounds", "settings", "seconds", "tokens_per_second", "acceptance", "full_ids", "identical", "speedup"
    }  # fmt: skip
    assert found["identical"] is True and found["full_ids"] == found["ids"]
    assert [t for r in found["rounds"] for t in r["emitted"]] == found["ids"] and len(found["ids"]) == 30
    assert found["settings"]["exit_layer"] == 2 and found["settings"]["draft_len"] == 4
    assert cli(*SHORT).out == found["text"] + "\n"
    assert not {"full_ids", "identical", "speedup"} & set(json.loads(cli(*SHORT, "--json").out))


def test_the_prompt_comes_from_stdin(cli):
    assert cli("-", "--max-new-tokens", "30", stdin=b"def f(x):").out == cli(*SHORT).out


def test_interactive_completes_one_prompt_after_another(cli):
    run = cli("--interactive", "--max-new-tokens", "30", stdin=b"def f(x):\n\nreturn x\n" + b"x" * 400 + b"\nreturn x\n")
    assert run.code == 0 and run.out.startswith(cli(*SHORT).out)
    assert run.err.count("tokens/s") == 3 and "the context of 200" in run.err


def test_a_terminal_gets_colours_and_a_legend(cli, monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    for tty in (True, False):
        monkeypatch.setattr(type(sys.stdout), "isatty", lambda self: tty, raising=False)
        run = cli(*SHORT, "--exit", "2", "--min-confidence", "0")
        assert ("\033[32m" in run.out and "\033[94m" in run.out and "the verifier's own" in run.err) == tty
    plain = run.out
    monkeypatch.setattr(type(sys.stdout), "isatty", lambda self: True, raising=False)
    coloured = cli(*SHORT, "--exit", "2", "--min-confidence", "0").out
    for code in ("\033[32m", "\033[94m", "\033[0m", "\033[2m"):
        coloured = coloured.replace(code, "")
    assert coloured == "def f(x):" + plain


def test_defaults_come_with_the_checkpoint(cli, ckpt):
    file = ckpt / "generation_config.json"
    file.write_text('{"assistant_early_exit": 3, "num_assistant_tokens": 2, "assistant_confidence_threshold": 0.0, "eos_token_id": [2, 5]}')
    try:
        settings = json.loads(cli(*SHORT, "--json").out)["settings"]
        assert (settings["exit_layer"], settings["draft_len"], settings["min_confidence"], settings["eos"]) == (3, 2, 0.0, [2, 5])
        file.write_text('{"num_assistant_tokens": 20, "eos_token_id": 0}')  # 20 is transformers' own default
        settings = json.loads(cli(*SHORT, "--json").out)["settings"]
        assert settings["draft_len"] == 15 and settings["eos"] == [0]
        for bad in ("{", '{"eos_token_id": "x"}', '{"assistant_early_exit": 1.5}'):
            file.write_text(bad)
            assert_one_line(cli(*SHORT))
    finally:
        file.unlink()


def assert_one_line(run):
    assert run.code == 2 and run.out == "" and run.err.startswith("decode.py: ") and run.err.count("\n") == 1, run.err


BAD = {
    "missing directory": ["--ckpt", "/nonexistent"],
    "exit 0": ["--exit", "0"],
    "exit beyond the last layer": ["--exit", "4"],
    "negative exit": ["--exit", "-1"],
    "draft 0": ["--draft", "0"],
    "draft too long": ["--draft", "16"],
    "empty prompt": ["--prompt", ""],
    "prompt longer than the context": ["--prompt", "x " * 400],
    "prompt that is no text": ["--prompt", "\udcff"],
    "no tokens": ["--max-new-tokens", "0"],
    "confidence above one": ["--min-confidence", "1.5"],
    "negative temperature": ["--temperature", "-1"],
    "temperature nan": ["--temperature", "nan"],
    "top-p 0": ["--top-p", "0"],
    "negative top-k": ["--top-k", "-2"],
    "negative seed": ["--seed", "-1"],
    "unknown device": ["--device", "toaster"],
    "absent device": ["--device", "cuda:77"],
    "device without memory": ["--device", "meta"],
    "interactive and compare": ["--interactive", "--compare"],
    "a figure in no directory": ["--lens", "--lens-png", "/nonexistent/lens.png"],
    "prompt given twice": ["-", "--prompt", "x"],
    "interactive with a prompt": ["--interactive", "--prompt", "x"],
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_exit_code_two(cli, case):
    assert_one_line(cli(*BAD[case]))


def test_stdin_that_is_not_utf8_is_one_line(cli):
    assert_one_line(cli("-", stdin=b"abc\xff\xfe"))
    assert_one_line(cli("-", stdin=b""))
    assert_one_line(cli("-", stdin=None))


def test_a_line_that_is_not_utf8_does_not_end_the_conversation(cli):
    run = cli("--interactive", "--max-new-tokens", "30", stdin=b"caf\xe9\ndef f(x):\n")
    assert run.code == 0 and run.err.count("decode.py: ") == 1 and run.err.count("tokens/s") == 1


@pytest.mark.parametrize("how", [[], ["--compare"], ["--json"], ["--compare", "--json"]])
@pytest.mark.parametrize("after", [0, 1, 4, 50])
def test_an_interrupt_shows_what_was_done_and_claims_nothing(cli, monkeypatch, how, after):
    """After so many rounds, counted over warm-up, draft and comparison."""
    count, real = [0], decode.generate

    def interrupted(*args, **settings):
        for r in real(*args, **settings):
            if count[0] == after:
                raise KeyboardInterrupt
            count[0] += 1
            yield r

    monkeypatch.setattr(decode, "generate", interrupted)
    run = cli(*SHORT, "--exit", "1", "--min-confidence", "0", *how)
    finished = after == 50 and "--compare" not in how
    assert run.code == (0 if finished else 130)
    assert "identical" not in run.err and "Traceback" not in run.err
    assert (run.out != "") == finished or "--json" not in how


@pytest.mark.parametrize("file", ["config.json", "model.safetensors", "tokenizer.model"])
def test_a_missing_file_is_one_line(cli, ckpt, tmp_path, file):
    for source in ckpt.iterdir():
        if source.name != file:
            (tmp_path / source.name).write_bytes(source.read_bytes())
    run = cli(*SHORT, on=tmp_path)
    assert_one_line(run)


def test_a_tokenizer_larger_than_the_model_is_one_line(cli, ckpt, tmp_path):
    save_checkpoint(tiny_model(tiny_config(vocab_size=61)), tmp_path)
    (tmp_path / "tokenizer.model").write_bytes((ckpt / "tokenizer.model").read_bytes())
    assert_one_line(cli(*SHORT, on=tmp_path))


def test_the_real_process_pipes_and_exits_as_promised(ckpt):
    command = [sys.executable, str(ROOT / "decode.py"), "--ckpt", str(ckpt)]
    run = subprocess.run([*command, "--max-new-tokens", "5", "-"], input=b"def f", capture_output=True, cwd="/")
    assert run.returncode == 0 and run.stdout.endswith(b"\n") and b"5 tokens" in run.stderr
    run = subprocess.run([*command, "--exit", "99"], capture_output=True)
    assert run.returncode == 2 and run.stdout == b"" and run.stderr.count(b"\n") == 1
