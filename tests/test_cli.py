"""The command line: what goes where, what is exact, and one clear line for bad input."""

import io
import json
import os
import re
import resource
import select
import shlex
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT
from helpers import reference_decode, write_rows

from decode import Round, Sampling
from extras import kangaroo, lens
from model import load_checkpoint
from support import console, decode_command
from support.tokenizer import Tokenizer, visible

PROMPT = "def f(x):"
SHORT = ["--prompt", PROMPT, "--max-new-tokens", "30"]
DRAFTED = [*SHORT, "--exit", "2", "--min-confidence", "0"]
SAMPLED = ["--temperature", "0.8", "--top-k", "50", "--top-p", "0.9", "--seed", "7"]
COLOURS = ("\033[32m", "\033[94m", "\033[2m", "\033[0m")
SETTINGS = "generation_config.json"


OWN = """
from decode import NoDraft
class Own(NoDraft):
    def draft(self, tokens, limit, pick):
        return tokens[-1:] * limit, 0
class Liar(NoDraft):
    def draft(self, tokens, limit, pick):
        return tokens[-1:], 2
"""


@pytest.fixture(scope="session")
def ckpt(small, tmp_path_factory):
    """The small checkpoint, whose text never ends, with drafters in own.py."""
    path = shutil.copytree(small, tmp_path_factory.mktemp("cli") / "ckpt")
    (path / SETTINGS).write_text('{"eos_token_id": []}')
    (path / "own.py").write_text(OWN)
    return path


@pytest.fixture
def cli(ckpt, command, monkeypatch):
    """cli("--full", stdin=b"...") -> code, out and err of decode.py on the small checkpoint."""

    def call(*args, stdin: bytes | None = b"", on=ckpt, reader=io.BytesIO):
        text = None if stdin is None else io.TextIOWrapper(reader(stdin), encoding="utf-8")
        monkeypatch.setattr(sys, "stdin", text)
        return command(decode_command.main, "--ckpt", str(on), *args)

    return call


@pytest.fixture
def terminal(monkeypatch):
    """terminal(True) makes stdout a terminal, terminal(False) a pipe."""
    monkeypatch.delenv("NO_COLOR", raising=False)

    def switch(on: bool) -> None:
        monkeypatch.setattr(type(sys.stdout), "isatty", lambda self: on, raising=False)

    return switch


def uncoloured(text: str) -> str:
    for code in COLOURS:
        text = text.replace(code, "")
    return text


def assert_one_line(run):
    assert run.code == 2 and run.out == "", run
    assert run.err.startswith("decode.py: ") and run.err.count("\n") == 1, run.err
    assert 20 < len(run.err) < 520 and run.err[:-1].isprintable(), run.err


# --------------------------------------
# Text


def test_text_goes_to_stdout_and_statistics_to_stderr(cli):
    run = cli(*DRAFTED)
    assert run.code == 0 and len(run.out) > 5 and "\033[" not in run.out
    prompt = r"\nprompt: \d tokens in .* s: \d+ tokens/s \| first new token after .* s\n"
    tokens = r"30 tokens in .* s: \d+ tokens/s \| \d+% of the drafted tokens accepted \| "
    tokens += r".* tokens per round \| exit 2, draft 6, greedy\n"
    assert re.fullmatch(prompt + tokens, run.err)


@pytest.mark.parametrize("how, sampling", [([], Sampling()), (SAMPLED, Sampling(0.8, 50, 0.9, 7))])
def test_text_is_that_of_decoding_by_hand_however_it_is_made(cli, ckpt, how, sampling):
    model, tokenizer = load_checkpoint(ckpt, torch.float64), Tokenizer(ckpt)
    prompt, options = tokenizer.encode(PROMPT), [*SHORT, *how, "--dtype", "float64"]
    ids, _, _ = reference_decode(model, prompt, 30, sampling)
    found = json.loads(cli(*options, "--full", "--json").out)
    assert found["ids"] == ids and found["settings"]["prompt_ids"] == prompt
    text = tokenizer.decode(prompt + ids)
    for drafting in ("", "--exit 3 --draft 15", "--full --exit 2", "--no-exact"):
        assert cli(*options, *drafting.split()).out == text[len(PROMPT) :] + "\n"


def test_no_verify_is_the_early_exit_alone(cli, ckpt):
    options = [*SHORT, "--exit", "1", "--dtype", "float64", "--json"]
    found = json.loads(cli(*options, "--no-verify").out)
    model, prompt = load_checkpoint(ckpt, torch.float64), found["settings"]["prompt_ids"]
    model.layers, model.config = model.layers[:1], replace(model.config, n_layers=1)
    ids, _, _ = reference_decode(model, prompt, 30, Sampling())
    assert found["ids"] == ids and found["acceptance"] is None
    assert len(found["rounds"]) == len(ids)
    assert ids != json.loads(cli(*options, "--full").out)["ids"]


# --------------------------------------
# Comparing, drafters, settings


WHO = [
    "--dtype float32 --exit 2",
    "--dtype bfloat16 --exit 2",
    "--drafter lookup+exit --temperature 0.7",
    "--drafter kangaroo:{} --temperature 0.7",
    "--drafter {}/own.py:Own --temperature 0.7",
]


@pytest.mark.parametrize("who", WHO)
def test_compare_says_identical_and_how_fast_whoever_drafts(cli, ckpt, tmp_path, who):
    torch.manual_seed(0)
    kangaroo.save_adapter(kangaroo.Adapter(load_checkpoint(ckpt).config, 2), tmp_path, {})
    shutil.copy(ckpt / "own.py", tmp_path)
    options = [*SHORT, "--min-confidence", "0", *who.format(tmp_path).split()]
    run = cli(*options, "--compare")
    assert "identical to the full model (30 tokens, logits equal to the last bit), " in run.err
    assert "NOT" not in run.err and "times its speed" in run.err and "full model: 30 t" in run.err
    assert "drafted tokens accepted" in run.err and run.out == cli(*options, "--full").out
    found = json.loads(cli(*options, "--json").out)["settings"]
    assert found["drafter"] in options + ["exit"]
    assert found["min_confidence"] == 0  # an adapter's own would be another


IDENTICAL = "\nidentical to the full model (4 tokens"


@pytest.mark.parametrize(
    "full_ids, logits, said",
    [
        ([5, 6, 9, 8], 0, "NOT identical to the full model after 2 tokens, "),
        ([5, 6, 7], 0, "NOT identical to the full model after 3 tokens, "),
        ([5, 6, 7, 8], 1, IDENTICAL + "), "),
        ([5, 6, 7, 8], 0, IDENTICAL + ", logits equal to the last bit), "),
    ],
)
def test_compare_says_where_texts_part(cli, monkeypatch, full_ids, logits, said):
    runs: list = []

    def generate(*args, **settings):
        full = len(runs) % 4 == 3  # two runs warm up, then come the drafted and the full one
        runs.append(settings)
        for token in full_ids if full else [5, 6, 7, 8]:
            yield Round([], [token], torch.full((1, 3), float(full * logits)))

    monkeypatch.setattr(decode_command, "generate", generate)
    assert said in cli(*SHORT, "--compare").err
    found = json.loads(cli(*SHORT, "--compare", "--json").out)
    assert found["identical"] == (full_ids == [5, 6, 7, 8]) and found["full_ids"] == full_ids
    assert [r["max_new_tokens"] for r in runs] == 2 * [16, 16, 30, 30]
    assert [r["exit_layer"] for r in runs] == 4 * [1, 0]


def test_exit_auto_chooses_what_no_option_says(cli, monkeypatch):
    seen, real = [], lens.choose_exit
    choose_exit = lambda *how: seen.append(how) or real(*how)
    monkeypatch.setattr(lens, "choose_exit", choose_exit)
    options = "--exit auto --draft 3 --min-confidence 0.25 --compare --json".split()
    found = json.loads(cli("--prompt", PROMPT * 5, *SHORT[2:], *options).out)
    settings, ((_, ids, given),) = found["settings"], seen
    assert found["identical"] and 1 <= settings["exit_layer"] <= 3 and settings["draft_len"] == 3
    assert (ids, given["min_confidence"]) == (settings["prompt_ids"], 0.25) and len(ids) >= 16


def test_defaults_come_with_the_checkpoint_and_options_beat_them(cli, ckpt, tmp_path):
    def settings(text: str, *options) -> tuple:
        (shutil.copytree(ckpt, tmp_path, dirs_exist_ok=True) / SETTINGS).write_text(text)
        found = json.loads(cli(*SHORT, *options, "--json", on=tmp_path).out)["settings"]
        names = ("exit_layer", "draft_len", "min_confidence", "eos")
        return tuple(found[name] for name in names)

    stored = dict(assistant_early_exit=3, num_assistant_tokens=2, eos_token_id=[2, 5])
    stored = json.dumps(stored | dict(assistant_confidence_threshold=0.0))
    given = "--exit", "1", "--draft", "5", "--min-confidence", "0.5"
    assert settings("{}") == (1, 6, 0.3, [Tokenizer(ckpt).eos])
    assert settings(stored) == (3, 2, 0.0, [2, 5])
    assert settings(stored, *given) == (1, 5, 0.5, [2, 5])
    # 20 is transformers' own default, longer than a pass here may be.
    assert settings('{"num_assistant_tokens": 20, "eos_token_id": 0}')[1::2] == (15, [0])


# --------------------------------------
# JSON, stdin, conversation


def test_json_is_one_object_with_every_field(cli, ckpt):
    drafts = ["--exit", "2", "--draft", "4", "--min-confidence", "0", "--seed", "3"]
    run = cli(*SHORT, "--json", "--compare", *drafts)
    found = json.loads(run.out)
    plain = {"text", "ids", "rounds", "settings", "seconds", "tokens_per_second", "acceptance"}
    plain |= {"prompt_seconds", "first_token_seconds"}
    assert found.keys() == plain | {"full_ids", "identical", "speedup"}
    assert run.err == "" and run.out.count("\n") == 1
    assert found["identical"] is True and found["full_ids"] == found["ids"]
    rounds = [Round(r["drafted"], r["emitted"], None) for r in found["rounds"]]
    assert [r["accepted"] for r in found["rounds"]] == [r.accepted for r in rounds]
    assert [token for r in rounds for token in r.emitted] == found["ids"]
    drafted = [len(r.drafted) for r in rounds]
    assert found["acceptance"] == sum(r.accepted for r in rounds) / sum(drafted)
    assert found["seconds"] * found["tokens_per_second"] == pytest.approx(len(found["ids"]))
    wanted = dict(exit_layer=2, draft_len=max(drafted), max_new_tokens=30, prompt=PROMPT)
    wanted |= dict(sampling=dict(temperature=0.0, top_k=0, top_p=1.0, seed=3), ckpt=str(ckpt))
    assert found["settings"] | wanted == found["settings"] and max(drafted) == 4
    assert cli(*SHORT).out == found["text"] + "\n"
    assert json.loads(cli(*SHORT, "--json").out).keys() == plain


EACH = [True, False, False, False, True, False, False, False, True]


def test_a_conversation_goes_on_after_what_cannot_run(cli):
    lines = [PROMPT, "", "return x", "x" * 400, "caf\udce9", "\ud7ff", "return x\r"]
    stdin = ("\ufeff" + "\n".join(lines)).encode(errors="surrogateescape")
    run = cli("--interactive", "--max-new-tokens", "30", stdin=stdin)
    good = [PROMPT, "return x", lines[5], "return x"]
    texts = [cli("--max-new-tokens", "30", "--prompt", text).out for text in good]
    assert run.code == 0 and run.out == "".join(texts)
    refused = [line for line in run.err.splitlines() if line.startswith("decode.py: ")]
    assert [word in line for line in refused for word in ("empty", "tokens", "UTF-8")] == EACH
    assert run.err.count("first new token") == 4


# --------------------------------------
# Files of prompts, stops


@pytest.mark.parametrize("how", ["--drafter lookup", "--exit auto --compare"])
def test_a_file_of_prompts_is_answered_but_for_what_cannot_run(cli, tmp_path, how):
    rows = {"text": "x " * 400}, {"prompt": PROMPT, "id": 7}, {"prompt": "return x"}
    file = write_rows(tmp_path / "prompts.jsonl", rows)
    options = ["--max-new-tokens", "20", *how.split(), "--stop", "x"]
    alone = [cli("--prompt", text, *options) for text in (PROMPT, "return x")]
    run, found = (cli("--prompts-file", str(file), *options, *x) for x in ([], ["--json"]))
    assert (run.code, run.out) == (2, "".join(one.out for one in alone))
    (refused,) = [line for line in run.err.splitlines() if line.startswith("decode.py: ")]
    assert refused.startswith("decode.py: prompt 1: a prompt of") and "\nprompt 3 of 3:" in run.err
    assert run.err.count("\nidentical to the full model") == 2 * ("--compare" in how)
    lines = [json.loads(line) for line in found.out.splitlines()]
    assert [line["settings"]["prompt"] for line in lines] == [PROMPT, "return x"]
    assert (found.code, found.err) == (2, refused + "\n")
    assert [line["text"] + "\n" for line in lines] == [one.out for one in alone]


def test_the_text_ends_before_a_stop_whoever_drafts(cli):
    sampled, whole = [*SHORT, *SAMPLED], json.loads(cli(*SHORT, *SAMPLED, "--json").out)["text"]
    stop = whole[11:14]
    options = [*sampled, "--stop", "never there", "--stop", stop, "--stop", whole[20]]
    run = cli(*options, "--compare", "--exit", "2")
    assert run.out == whole[: whole.find(stop)] + "\n" and "\nidentical to the full" in run.err
    drafted, plain = (json.loads(cli(*options, x, "--json").out) for x in ("--compare", "--full"))
    assert drafted["full_ids"] == plain["ids"] and len(plain["ids"]) < 30
    assert drafted["text"] + "\n" == run.out and drafted["settings"]["stop"][1] == stop


# --------------------------------------
# What a person is told


@pytest.mark.parametrize("right, count", [(1, 20), (2, 20), (0, 19)])
def test_exits_that_seem_untrained_are_named(cli, monkeypatch, right, count):
    """Where under a tenth of at least 40 guesses hold."""
    rounds = [Round([5, 6], [5, 6, 7], None)] * right + [Round([5, 6], [7], None)] * (count - right)
    monkeypatch.setattr(decode_command, "generate", lambda *_, **how: iter(rounds))
    said = "exits seem untrained: try --drafter lookup or --full\n"
    assert (said in cli(*SHORT).err) == (right < 2 and count > 19)


@pytest.mark.parametrize("on", [False, True])
def test_a_terminal_alone_hears_that_a_long_prompt_is_read(cli, terminal, monkeypatch, on):
    class Now(console.Timer):
        def start(self):
            self.function(*self.args)
            self.finished.set()

    monkeypatch.setattr(console, "Timer", Now)
    terminal(on)
    line, *more = cli(*SHORT).err.split("\r")
    assert bool(more) == on == bool(re.fullmatch(r"reading \d+ tokens \.\.\.", line))
    assert not on or (more[0] == " " * len(line) and more[1].startswith("\nprompt: "))


def test_the_prompts_seconds_are_those_before_the_first_draft(cli, monkeypatch):
    clock = iter(range(100))
    monkeypatch.setattr(console, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    found = json.loads(cli(*SHORT, "--json", "--full").out)
    # Read at 0 (collect), 1 and 2 (from the start to the first draft), 3 (the first round).
    assert (found["prompt_seconds"], found["first_token_seconds"]) == (1, 3)
    assert found["seconds"] == 3 - 1 + 29


# --------------------------------------
# Interrupts and terminals


@pytest.fixture
def interrupt(monkeypatch):
    """interrupt(9) makes Ctrl-C come after so many rounds, of warm-up, draft and comparison."""
    count, real = [0], decode_command.generate

    def after(limit: int) -> list[int]:
        def interrupted(*args, **settings):
            for r in real(*args, **settings):
                count[0] += 1
                if count[0] == limit + 1:
                    raise KeyboardInterrupt
                yield r

        monkeypatch.setattr(decode_command, "generate", interrupted)
        return count

    return after


SLOW = ["--exit", "1", "--draft", "1"]


@pytest.mark.parametrize("how", ["", "--compare", "--compare --json"])
@pytest.mark.parametrize("after", [0, 1, 35, 70])
def test_an_interrupt_shows_what_was_done_and_claims_nothing(cli, interrupt, how, after):
    count = interrupt(after)
    run = cli(*SHORT, *SLOW, *how.split())
    finished = count[0] <= after
    assert run.code == (0 if finished else 130)
    assert finished or ("identical" not in run.err and "full model" not in run.err)
    if "--json" in how:
        assert (run.out != "") == finished and run.err == ""
    else:
        assert run.out == "" or run.out.endswith("\n")
        assert (run.out != "") == ("tokens/s" in run.err) == (after > 32 * bool(how))


@pytest.mark.parametrize("after", [0, 35, 65])
def test_an_interrupt_ends_an_answer_and_not_the_conversation(cli, interrupt, after):
    """In the warm-up, in the answer and in the comparison."""
    interrupt(after)
    how = ["--interactive", "--compare", *SLOW, *SHORT[2:]]
    run = cli(*how, stdin=f"{PROMPT}\n{PROMPT}\n".encode())
    assert run.code == 0 and run.err.count("identical to the full model (30") == 1


def test_an_interrupt_at_the_prompt_is_quiet(cli):
    class Typing(io.BytesIO):
        def readline(self, *_):
            raise KeyboardInterrupt

    run = cli("--interactive", reader=Typing)
    assert (run.code, run.out, run.err) == (130, "", "")


def test_a_terminal_gets_prompt_and_colours(cli, terminal):
    terminal(False)
    plain = cli(*DRAFTED).out
    assert not any(code in plain for code in COLOURS)  # of the model's own bytes one may be ESC
    terminal(True)
    coloured = cli(*DRAFTED).out
    assert all(code in coloured for code in COLOURS)
    assert coloured.startswith(f"\033[2m{PROMPT}\033[0m")
    assert uncoloured(coloured) == PROMPT + visible(plain)
    assert "\033[32m" not in cli(*SHORT, "--full").out  # green is for accepted drafts


@pytest.mark.parametrize("coloured", [True, False])
def test_a_terminal_gets_no_control_characters(cli, ckpt, terminal, monkeypatch, coloured):
    codes = "\x1b]0;owned\x07\r\x9b2J\x00\x7f"
    rounds = [Round([], [t], None) for t in Tokenizer(ckpt).encode("a" + codes, bos=False)]
    monkeypatch.setattr(decode_command, "generate", lambda *_, **how: iter(rounds))
    prompt = ["--prompt", f"x\t\n{codes}"]
    terminal(False)
    assert codes in cli(*prompt).out
    terminal(True)
    monkeypatch.setenv("NO_COLOR", "" if coloured else "1")
    out = cli(*prompt).out
    text = uncoloured(out)
    assert (out != text) == coloured
    assert text.startswith("x\t\n") and text.count(r"\x1b]0;owned\x07\x0d\x9b2J\x00\x7f") == 2
    assert all(c.isprintable() for c in text.replace("\t", "").replace("\n", ""))


# --------------------------------------
# Bad input

# One for each place that refuses; what else it refuses is tested there.
BAD = f"""--ckpt \x1b[31m\x07
--ckpt {"x" * 5000}
--device cuda:77
--device meta
--exit {"9" * 5000}
--draft 16
--stop x --stop ""
--prompts-file none.jsonl
--top-p nan
--prompt ""
--prompt "{"x " * 400}"
--prompt caf\udce9
--drafter no.py:Own
--drafter OWN:Liar
--no-verify --drafter lookup
--exit auto --drafter lookup
--chat"""


@pytest.mark.parametrize("options", BAD.splitlines(), ids=lambda options: options[:40])
def test_bad_input_is_one_line_and_exit_code_two(cli, ckpt, terminal, options):
    terminal(True)  # it gets no prompt that cannot run
    assert_one_line(cli(*shlex.split(options.replace("OWN", f"{ckpt}/own.py"))))


@pytest.mark.parametrize("stdin", [b"abc\xff\xfe", b"", None])
def test_a_bad_prompt_on_stdin_is_one_line(cli, stdin):
    assert_one_line(cli("-", stdin=stdin))


def test_stdin_may_be_closed_where_nobody_reads_it(cli):
    assert cli(*SHORT, stdin=None).out == cli(*SHORT).out
    assert_one_line(cli("--interactive", stdin=None))


@pytest.mark.parametrize("options", ["- --prompt x", "--full --compare", "prompt"])
def test_options_that_clash_are_refused_with_the_usage(cli, options):
    run = cli(*options.split())
    assert run.code == 2 and run.out == "" and run.err.startswith("usage: decode.py "), run
    assert run.err.splitlines()[-1].startswith("decode.py: error: ")


def with_context(ckpt: Path, path: Path, length: int) -> Path:
    """A copy of the checkpoint whose context is so long."""
    file = shutil.copytree(ckpt, path) / "config.json"
    found = json.loads(file.read_text()) | dict(max_position_embeddings=length)
    file.write_text(json.dumps(found))
    return path


def test_memory_that_is_not_there_is_one_line(cli, ckpt, tmp_path):
    """The keys of 10^8 positions take 51 GB, which the process may not have."""
    long, limits = with_context(ckpt, tmp_path / "a", 2**27), resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (40 << 30, limits[1]))
    try:
        assert_one_line(cli("--max-new-tokens", "100000000", "--dtype", "float64", on=long))
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)


def test_a_fault_of_the_code_is_not_taken_for_bad_input(cli, monkeypatch):
    def fail(*args):
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(decode_command, "collect", fail)
    with pytest.raises(RuntimeError, match="shapes"):
        cli(*SHORT)


# --------------------------------------
# Real processes


def process(ckpt, *args, redirect="", **how) -> subprocess.Popen:
    """decode.py as a shell starts it, with its streams redirected."""
    shell = ["sh", "-c", f'exec "$@" {redirect}', "sh"]
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"}
    pipes = dict(stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE) | how
    command = [*shell, sys.executable, str(ROOT / "decode.py"), "--ckpt", str(ckpt), *args]
    return subprocess.Popen(command, env=environment, **pipes)


def test_a_process_in_a_pipeline_reads_and_writes_bytes(ckpt):
    run = process(ckpt, "-", "--json", *SHORT[2:], stdin=subprocess.PIPE, cwd="/")
    out, err = run.communicate("é\n ".encode())
    assert (run.returncode, err) == (0, b"") and json.loads(out)["settings"]["prompt"] == "é\n "


def test_a_program_can_talk_with_it_in_json(ckpt):
    pipes = dict(stdin=subprocess.PIPE, stderr=subprocess.DEVNULL)
    run = process(ckpt, "--interactive", "--json", "--max-new-tokens", "2", **pipes)
    for prompt in ("def f", "é"):
        run.stdin.write(prompt.encode() + b"\n")
        run.stdin.flush()
        assert select.select([run.stdout], [], [], 100)[0], "no answer while the input is open"
        assert json.loads(run.stdout.readline())["settings"]["prompt"] == prompt
    assert run.communicate() == (b"", None) and run.returncode == 0


CLOSED = [(">&-", 2, "closed"), (">/dev/full", 2, "No space"), ("2>&-", 0, ""), ("2>&- >&-", 2, "")]


@pytest.mark.parametrize("redirect, code, said", CLOSED)
def test_streams_that_cannot_be_written_are_at_most_one_line(ckpt, redirect, code, said):
    run = process(ckpt, *SHORT, redirect=redirect)
    out, err = (stream.decode() for stream in run.communicate())
    assert run.returncode == code and said in err and err.count("\n") == bool(said)
    assert (out == "") == (code == 2) and "tokens/s" not in out


def test_a_reader_that_has_gone_ends_the_command_quietly(ckpt):
    run = process(ckpt, *SHORT)
    run.stdout.close()
    run.stdout = None
    assert run.communicate()[1] == b"" and run.returncode == 1


def test_ctrl_c_leaves_whole_lines_and_the_statistics(ckpt, tmp_path):
    long = with_context(ckpt, tmp_path / "a", 10**5)
    run = process(long, *SHORT[:2], "--max-new-tokens", "99999")
    first = run.stdout.read(20)
    run.send_signal(signal.SIGINT)
    out, err = run.communicate()
    assert run.returncode == 130 and len(first) == 20 and out.endswith(b"\n")
    assert b"tokens/s" in err and b"Traceback" not in err


def test_a_prompt_is_asked_for_on_a_terminal_beside_the_text(ckpt):
    keyboard, terminal = os.openpty()
    os.write(keyboard, PROMPT.encode() + b"\n\x04")  # Ctrl-D ends
    run = process(ckpt, "--interactive", *SHORT[2:], stdin=terminal)
    out, err = run.communicate()
    os.close(terminal), os.close(keyboard)
    assert run.returncode == 0 and err.count(b"prompt> ") == 2 and b"prompt" not in out
    assert out.endswith(b"\n") and err.count(b"first new token") == 1


# --------------------------------------
# Chats


def test_a_chat_keeps_what_was_said_and_ends_with_the_template(cli, ckpt, tmp_path):
    template = "{% for m in messages %}{{ m.content }}</s>{% endfor %}"
    shutil.copytree(ckpt, tmp_path, dirs_exist_ok=True)
    (tmp_path / "chat_template.jinja").write_text(template)
    tokenizer, chat = Tokenizer(tmp_path), ["--chat", "--max-new-tokens", "9", "--json"]
    turn = lambda text: [*tokenizer.encode(text, bos=False), tokenizer.eos]
    run = cli(*chat, "--interactive", stdin=b"f(x)\nx\n", on=tmp_path)
    first, second = map(json.loads, run.out.splitlines())
    assert first["settings"]["eos"] == [tokenizer.eos]
    assert first["settings"]["prompt_ids"] == turn("f(x)")
    assert second["settings"]["prompt_ids"] == turn("f(x)") + turn(first["text"]) + turn("x")
    again = cli(*chat, "--prompt", "f(x)", on=tmp_path)
    assert json.loads(again.out)["ids"] == first["ids"]
    # What was shown is kept, without the stop and what follows it.
    run = cli(*chat, "--interactive", "--stop", first["text"][3], stdin=b"f(x)\nx\n", on=tmp_path)
    shown, second = map(json.loads, run.out.splitlines())
    assert len(shown["text"]) < 4 and first["text"].startswith(shown["text"])
    assert second["settings"]["prompt_ids"] == turn("f(x)") + turn(shown["text"]) + turn("x")
