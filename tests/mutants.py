"""Breaks the code on purpose, one fault at a time, in a copy: the named test must go red.

python tests/mutants.py            every fault; exit code 1 if one survives
"""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
LEFT_OUT = shutil.ignore_patterns(".git", ".venv", "runs", "checkpoints", "__pycache__", ".*_cache")

EXACT = (
    "test_exactness.py::"
    "test_tokens_logits_and_cache_are_bitwise_the_full_models_whoever_drafts[early exit]"
)
SCALES = "test_exactness.py::test_passes_of_sixteen_rows_are_exact_at_any_scale_of_activations"
ALWAYS = "test_exactness.py::test_a_draft_that_equals_the_full_model_is_always_accepted"
DOUBT = "test_exactness.py::test_a_confident_draft_stops_before_the_doubtful_token"
BUDGET = (
    "test_exactness.py::test_a_round_never_emits_past_the_budget_the_context_or_the_end_of_text"
)
PADDED = "test_exactness.py::test_a_short_pass_is_padded_to_the_safe_row_count"
ALONE = "test_exactness.py::test_where_no_row_count_is_safe_each_row_runs_alone"
ATTENTION = "test_exactness.py::test_attention_keeps_rows_apart"
SILU = "test_exactness.py::test_silu_keeps_rows_apart"
ORACLE = "test_model.py::test_decoding_over_the_cache_is_the_oracles"
FORWARD = "test_model.py::test_forward_is_the_oracles"
VIEWS = "test_model.py::test_the_cache_gives_back_what_was_written_and_copies_nothing"
KANGAROO = "test_drafters.py::test_an_adapter_that_adds_nothing_drafts_what_the_exit_drafts"
OWN = "test_drafters.py::test_an_adapters_cache_is_its_attention_over_the_whole_text"
TWO = "test_drafters.py::test_a_draft_models_cache_follows_the_verified_text"
LITE = (
    "test_extras.py::"
    "test_a_token_leaves_at_the_first_exit_that_is_sure_and_fills_the_layers_it_skips"
)
STREAM = "test_tokenizer.py::test_streamed_parts_join_to_what_the_ids_add_to_the_context"
META = "test_loading.py"
WEIGHTS = "test_train.py::test_exit_weights_are_layerskips"
DROPOUT = "test_train.py::test_a_skipped_sample_passes_unchanged_and_the_others_as_without_dropout"
LOSS = "test_train.py::test_the_loss_is_the_weighted_sum_and_its_gradient_that_of_the_formula"
INIT = "test_train.py::test_a_checkpoint_that_no_run_made_is_not_written_over"
CHAT = "test_chat.py::test_special_tokens_of_a_user_are_text"
SKIPPED = "test_train.py::test_a_layer_that_all_samples_skip_does_not_run"
RESUME = "test_resume.py::test_ctrl_c_saves_and_the_same_command_goes_on_to_the_same_bits"

# fault, file, code as it is, code as it breaks, the test that must see it
MUTANTS = [
    ("accept a token that was not foreseen", "decode.py",
     "if token != guess or token in eos:", "if guess is None or token in eos:", EXACT),
    ("keep a rejected entry", "decode.py",
     "cache.accept(len(emitted))", "cache.accept(len(emitted) + (len(emitted) <= len(guesses)))",
     EXACT),
    ("exit query off by one", "decode.py",
     "cache.put_query(row, h[0])", "cache.put_query(max(row - 1, 0), h[0])", EXACT),
    ("draft uses layer E + 1", "decode.py",
     "h, 0, exit_layer, cache, position)", "h, 0, exit_layer + 1, cache, position)", EXACT),
    ("wrong noise position in the draft", "decode.py",
     "token = pick(logits, position + 1)", "token = pick(logits, position)", ALWAYS),
    ("wrong noise position in the verifier", "decode.py",
     "pick(logits[row], position + row)", "pick(logits[row], position)", EXACT),
    ("key of the draft's last token missing", "decode.py",
     "for row in range(limit + 1):", "for row in range(max(limit, 1)):", EXACT),
    ("verifier starts a position late", "decode.py",
     "model.config.n_layers, cache, cache.length)",
     "model.config.n_layers, cache, cache.length + 1)", EXACT),
    ("the doubtful token is drafted", "decode.py",
     ".max() <= min_confidence:", ".max() <= min_confidence / 2:", DOUBT),
    ("a round may pass the budget", "decode.py",
     "end - len(tokens) - 1)", "end - len(tokens))", BUDGET),
    ("text goes on after EOS", "decode.py",
     "if token != guess or token in eos:", "if token != guess:", BUDGET),
    ("mask shows the next position", "model.py",
     "positions <= positions[start:, None]", "positions < positions[start:, None] + 2", ORACLE),
    ("packed mask off by one", "exact.py",
     "[line[middle - p : middle - p + view]", "[line[middle - p + 1 : middle - p + 1 + view]",
     ORACLE),
    ("unembed without the norm", "model.py",
     "self.lm_head(self.model.norm(h))", "self.lm_head(h)", FORWARD),
    ("queries rotated, keys not", "model.py",
     "return rotate(q, cos, sin), rotate(k, cos, sin), v", "return rotate(q, cos, sin), k, v",
     FORWARD),
    ("views of an earlier length", "cache.py",
     "if rows not in self._shared or self._shared[rows][0] != end:",
     "if rows not in self._shared:", EXACT),
    ("values are keys", "cache.py",
     "values[start : start + len(v)] = v", "values[start : start + len(v)] = k", VIEWS),
    ("no padding to the safe row count", "exact.py",
     "0 < self.min_rows <= rows:", "0 < self.min_rows:", PADDED),
    ("rows together where none is safe", "exact.py",
     "for row in x.split(1)", "for row in x.split(2)", ALONE),
    ("ordinary attention in an exact pass", "exact.py",
     "if rows > MAX_ROWS else None", "if rows > 1 else None", ATTENTION),
    ("a norm by hypot", "exact.py",
     "length.square_().add_(self.floor).sqrt_()",
     "length = torch.hypot(length, self.floor.sqrt())", SCALES),
    ("silu over rows together", "exact.py",
     "gate.numel() >= 32768:", "gate.numel() >= 1 << 40:", SILU),
    ("an adapter remembers rejected tokens", "extras/kangaroo.py",
     "self.own.rewind(known)", "self.own.rewind(self.own.length)", OWN),
    ("a draft model remembers rejected tokens", "extras/drafters.py",
     "self.own.rewind(", "self.own.rewind(self.own.length or ", TWO),
    ("skipped layers get no keys", "extras/early_exit.py",
     "for l in range(depth, c.n_layers):", "for l in range(depth + 1, c.n_layers):", LITE),
    ("interleaved rotary pairs", "checkpoint.py",
     "(-1, self.half_head, 2)).transpose(1, 2)", "(-1, self.half_head, 2))", META),
    ("half a character is streamed", "tokenizer.py",
     'unsure = min(len(text) - len(text.rstrip("\\ufffd")), 3)', "unsure = 0", STREAM),
    ("deep exits weigh less", "train.py",
     "recipe.e_scale * sum(range(l + 1))", "recipe.e_scale * sum(range(l))", WEIGHTS),
    ("a skipped sample is changed", "train.py",
     "h.index_copy(0, index, y)", "h.index_copy(0, index.flip(0), y)", DROPOUT),
    ("exits that do not teach the head", "train.py",
     "logits = self.llama.unembed(h).float()", "logits = self.llama.unembed(h).float() * 0.5",
     LOSS),
    ("a foreign checkpoint is trained over", "runs.py",
     "if self.out.is_dir() and not ours and", "if self.out.is_dir() and ours and", INIT),
    ("the optimiser's state is not resumed", "runs.py",
     'found.update({f"{key}.{name}": value for key, value in state.items()})', "pass", RESUME),
    ("a layer that all samples skip is trained", "train.py",
     "if used[l]:", "if True:", SKIPPED),
    ("a user's special tokens are special", "extras/chat.py",
     "apart = token[:1] + GUARD + token[1:]", "apart = token", CHAT),
]  # fmt: skip


def is_red(copy: Path, *tests: str) -> bool:
    """Whether one of the tests fails in this copy of the repository."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "--hypothesis-profile=red"]
    command += [f"tests/{test}" for test in tests]
    # No bytecode: of files of one size in one second, Python takes the old one's.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    code = subprocess.run(command, capture_output=True, cwd=copy, env=environment).returncode
    if code not in (0, 1):
        raise SystemExit(f"pytest could not run {', '.join(tests)}: exit code {code}")
    return code == 1


def main() -> None:
    survivors = 0
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "repo"
        shutil.copytree(ROOT, copy, ignore=LEFT_OUT)
        if is_red(copy, *dict.fromkeys(test for *_, test in MUTANTS)):
            raise SystemExit("a test is red before any fault is planted")
        for fault, file, code, broken, test in MUTANTS:
            text = (copy / file).read_text()
            found = text.count(code)
            assert found == 1, f"{fault}: the code to break occurs {found} times in {file}"
            (copy / file).write_text(text.replace(code, broken))
            red = is_red(copy, test)
            (copy / file).write_text(text)
            survivors += not red
            print(f"{'caught  ' if red else 'SURVIVED'}  {fault:40} {test}", flush=True)
    print(f"{len(MUTANTS) - survivors} passed, {survivors} failed")
    raise SystemExit(survivors > 0)


if __name__ == "__main__":
    main()
