"""Breaks the code on purpose, one fault at a time, in a copy: the named test must go red.

python tests/mutants.py            every fault; exit code 1 if one survives
python tests/mutants.py decode     those with this word in their fault, file or test
"""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
LEFT_OUT = shutil.ignore_patterns(".git", ".venv", "runs", "checkpoints", "__pycache__", ".*_cache")

EXACT = "exactness::bitwise_plain_whoever_drafts[early exit]"
ALWAYS = "exactness::a_draft_by_the_model_is_always_right"
BUDGET = "exactness::a_round_ends_with_budget_context_and_text"
PASSES = "exactness::short_passes_are_padded_or_run_row_by_row"
ATTENTION = "exactness::attention_keeps_rows_apart[1]"
BLOCKS = "exactness::attention_runs_blocks_within_a_view"
MIXING = "exactness::attention_that_mixes_rows_is_padded"
ANSWER = "drafters::a_wrong_answer_is_refused"
OWN = "drafters::a_drafters_own_cache_follows_the_text"
PARALLEL = "parallel::drafted_text_is_bitwise_plain_text[1]"
CACHED = "model::decoding_over_the_cache_is_the_ports"
FORWARD = "model::forward_is_the_ports"

# fault, file, code as it is, code as it breaks, the test that must see it: test_FILE.py::test_NAME
MUTANTS = [
    ("accept a token that was not foreseen", "decode.py", "if token != guess or",
     "if guess is None or", EXACT),
    ("keep a rejected entry", "decode.py", "cache.commit(len(emitted))",
     "cache.commit(len(emitted) + (len(emitted) <= len(guesses)))", EXACT),
    ("exit query off by one", "decode.py", "cache.queries[row],", "cache.queries[max(row - 1, 0)],",
     EXACT),
    ("draft uses layer E + 1", "decode.py", "h, 0, exit_layer,", "h, 0, exit_layer + 1,", EXACT),
    ("wrong noise position in the draft", "decode.py", "(logits, position + 1)",
     "(logits, position)", ALWAYS),
    ("wrong noise position in the verifier", "decode.py", "position + row)\n        emitted",
     "position)\n        emitted", EXACT),
    ("key of the draft's last token missing", "decode.py", "range(limit + 1):",
     "range(max(limit, 1)):", ALWAYS),
    ("verifier starts a position late", "decode.py", "cache, cache.length)",
     "cache, cache.length + 1)", EXACT),
    ("the doubtful token is drafted", "decode.py", "<= min_confidence:", "<= min_confidence / 2:",
     "exactness::a_draft_stops_before_the_doubtful_token"),
    ("a round may pass the budget", "decode.py", "len(tokens) - 1)", "len(tokens))", BUDGET),
    ("text goes on after EOS", "decode.py", "!= guess or token in eos:", "!= guess:", BUDGET),
    ("layers that did not run are believed", "decode.py",
     "cache.query_layer[:rows] != [ran] * rows", "not any(cache.query_layer)", ANSWER),
    ("too many guesses are taken", "decode.py", "rows > room or", "", ANSWER),
    ("unknown guesses are taken", "decode.py", "all(0 <= token < vocab for",
     "all(token < vocab for", ANSWER),
    ("exit queries of an earlier round count", "cache.py",
     "self.query_layer = [0] * len(self.queries)", "pass", ANSWER),
    ("mask shows the next position", "model.py", "<= positions[start:, None]",
     "< positions[start:, None] + 2", CACHED),
    ("packed mask off by one", "exact.py", "> ends[:, None]", "> ends[:, None] + 1",
     CACHED),
    ("unembed without the norm", "model.py", "self.lm_head(self.norm(h))", "self.lm_head(h)",
     FORWARD),
    ("queries rotated, keys not", "model.py", "rotate(k, cos, sin), v", "k, v", FORWARD),
    ("values are keys", "cache.py", "start + len(v)] = v", "start + len(v)] = k",
     "model::the_cache_gives_back_what_was_written"),
    ("no padding to the safe row count", "exact.py", "if rows < self.min_rows:",
     "if rows < 0:", PASSES),
    ("rows together where none is safe", "exact.py", "x.split(1)", "x.split(2)", PASSES),
    ("ordinary attention in an exact pass", "exact.py", "if rows > MAX_ROWS:\n        return row",
     "if rows > 1:\n        return row", ATTENTION),
    ("a view as long as the pass", "exact.py", "view_len(start + first + 1)",
     "view_len(start + rows)", BLOCKS),
    ("rows that straddle a view's end", "exact.py", "first + width, view - start, rows",
     "first + width, rows", ATTENTION),
    ("queries are not padded", "exact.py", "-ends.shape[0] % pad_to", "0", MIXING),
    ("attention is not tried", "exact.py", "if all(keeps(", "if all(True or keeps(", MIXING),
    ("attention's padding is not the one found", "exact.py", "pad_to=safe_padding(model))",
     "pad_to=8)", MIXING),
    ("a norm by pow", "exact.py", ".add_(self.floor).sqrt_()",
     ".add_(self.floor).pow_(0.25).square_()", "exactness::sixteen_rows_are_exact_at_any_scale"),
    ("silu over rows together", "exact.py", "gate.numel() >= 32768", "False",
     "exactness::silu_keeps_rows_apart"),
    ("an adapter remembers rejected tokens", "extras/kangaroo.py", "self.own.rewind(known)",
     "self.own.rewind(self.own.length)", OWN),
    ("a draft model remembers rejected tokens", "extras/drafters.py", "self.own.rewind(",
     "self.own.rewind(self.own.length or ", OWN),
    ("skipped layers get no keys", "extras/early_exit.py", "range(depth, c.n_layers):",
     "range(depth + 1, c.n_layers):",
     "extras::a_token_leaves_at_the_first_sure_exit"),
    ("interleaved rotary pairs", "support/checkpoint.py", "half_head, 2)).transpose(1, 2)",
     "half_head, 2))", "loading"),
    ("half a character is streamed", "support/tokenizer.py", "unsure = min(", "unsure = 0 * min(",
     "tokenizer::streamed_parts_join_to_the_text"),
    ("deep exits weigh less", "train.py", "sum(range(l + 1))", "sum(range(l))",
     "train::exit_weights_are_layerskips"),
    ("a skipped sample is changed", "train.py", "h.index_copy(0, index,",
     "h.index_copy(0, index.flip(0),",
     "train::a_skipped_sample_passes_unchanged"),
    ("exits that do not teach the head", "train.py", "self.llama.unembed(h).float()",
     "self.llama.unembed(h).float() * 0.5",
     "train::loss_and_gradient_are_the_formulas"),
    ("a foreign checkpoint is trained over", "support/runs.py", "is_dir() and not ours and",
     "is_dir() and ours and", "train::foreign_files_are_not_written_over"),
    ("the optimiser's state is not resumed", "support/runs.py",
     'found.update({f"{key}.{name}": value for key, value in state.items()})', "pass",
     "resume::ctrl_c_saves_and_the_run_goes_on"),
    ("a layer that all samples skip is trained", "train.py", "if used[l]:", "if True:",
     "train::a_layer_that_all_skip_does_not_run"),
    ("each process adds its own part first", "extras/parallel.py", "total = parts[0].to(",
     "total = part.to(", "parallel::parts_are_added_in_the_order_of_the_ranks"),
    ("logits of one process", "extras/parallel.py", "parts = gathered(super().unembed(h))",
     "parts = super().unembed(h).repeat(dist.get_world_size(), 1, 1)", PARALLEL),
    ("tokens of other processes are embedded", "extras/parallel.py",
     "added(h.masked_fill(elsewhere[..., None], 0))", "added(h)", PARALLEL),
    ("a part of the next process", "support/checkpoint.py", "before = number * ",
     "before = (number + 1) * ", "parallel::a_part_that_is_read_is_that_of_the_whole[4-1]"),
    ("a user's special tokens are special", "extras/chat.py",
     r'rf"{OPEN}\g<0>{CLOSE}"', r'r"\g<0>"',
     "chat_templates::special_tokens_come_from_the_template_alone"),
]  # fmt: skip


def is_red(copy: Path, *tests: str) -> bool:
    """Whether one of the tests fails in this copy of the repository."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "--hypothesis-profile=red"]
    for test in tests:
        file, _, name = test.partition("::")
        command.append(f"tests/test_{file}.py" + f"::test_{name}" * bool(name))
    # No bytecode: of files of one size in one second, Python takes the old one's.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    code = subprocess.run(command, capture_output=True, cwd=copy, env=environment).returncode
    if code not in (0, 1):
        raise SystemExit(f"pytest could not run {', '.join(tests)}: exit code {code}")
    return code == 1


def main() -> None:
    words = " ".join(sys.argv[1:])
    mutants = [m for m in MUTANTS if words in " ".join((m[0], m[1], m[4]))]
    for fault, file, code, *_ in MUTANTS:
        found = (ROOT / file).read_text().count(code)
        assert found == 1, f"{fault}: the code to break occurs {found} times in {file}"
    survivors = 0
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "repo"
        shutil.copytree(ROOT, copy, ignore=LEFT_OUT)
        if is_red(copy, *dict.fromkeys(test for *_, test in mutants)):
            raise SystemExit("a test is red before any fault is planted")
        for fault, file, code, broken, test in mutants:
            text = (copy / file).read_text()
            (copy / file).write_text(text.replace(code, broken))
            red = is_red(copy, test)
            (copy / file).write_text(text)
            survivors += not red
            print(f"{'caught  ' if red else 'SURVIVED'}  {fault:40} {test}", flush=True)
    print(f"{len(mutants) - survivors} passed, {survivors} failed")
    raise SystemExit(survivors > 0)


if __name__ == "__main__":
    main()
