"""Breaks the code on purpose, one fault at a time, in a copy, and checks that the named test goes red.

    python tests/mutants.py            every fault; exit code 1 if one survives
"""

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
EXACT = "test_exactness.py::test_tokens_logits_and_cache_are_bitwise_the_full_models_whoever_drafts"
ALWAYS = "test_exactness.py::test_a_draft_that_equals_the_full_model_is_always_accepted"
CACHE = "test_model.py::test_reading_the_cache_copies_nothing"
PADDED = "test_exactness.py::test_a_short_pass_is_padded_to_the_safe_row_count"
ORACLE = "test_model.py::test_decoding_over_the_cache_is_the_oracles_token_for_token"
BUDGET = "test_exactness.py::test_a_round_never_emits_past_the_budget_the_context_or_the_end_of_text"

KANGAROO = "test_drafters.py::test_an_adapter_that_adds_nothing_drafts_what_the_exit_drafts"
TWO = "test_drafters.py::test_a_draft_model_that_is_the_model_is_always_right"
COMPILED = "test_compiled.py::test_compiled_tokens_and_logits_are_bitwise_the_compiled_full_models"
ATTENTION = "test_compiled.py::test_widened_attention_is_attention_whose_rows_do_not_meet"
WIDENED = "test_compiled.py::test_widened_products_are_products_whose_rows_do_not_meet"
AUTO_COMPILED = "test_compiled.py::test_exit_auto_finds_its_exits_compiled"
JUDGE = "test_drafters.py::test_exit_auto_judges_exits_by_what_was_verified"

# fault, file, code as it is, code as it breaks, the test that must see it
MUTANTS = [
    ("accept one token too many", "decode.py", "        if token != foreseen or token in eos:\n            break", "        if token in eos or (row and emitted[-2] != drafted[row - 1]):\n            break", EXACT),
    ("keep a rejected entry", "decode.py", "cache.accept(len(emitted))  #", "cache.accept(len(emitted) + (len(emitted) <= len(drafted)))  #", EXACT),
    ("exit query off by one", "drafters.py", "self.cache.length + row, seen)\n        self.cache.put_query(row, h[0])", "self.cache.length + row, seen)\n        self.cache.put_query(max(row - 1, 0), h[0])", EXACT),
    ("mask off by one, too much", "model.py", "[line[middle - p : middle - p + view]", "[line[middle - p - 1 : middle - p - 1 + view]", ORACLE),
    ("mask off by one, too little", "model.py", "for p in range(start, start + rows)]", "for p in (max(p, 1) - 1 for p in range(start, start + rows))]", ORACLE),
    ("draft uses layer E + 1", "drafters.py", "0, self.exit_layer, self.cache, self.cache.length + row, seen)", "0, self.exit_layer + 1, self.cache, self.cache.length + row, seen)", EXACT),
    ("wrong noise position in the draft", "drafters.py", "position = self.cache.length + 1", "position = self.cache.length", ALWAYS),
    ("wrong noise position in the verifier", "decode.py", "pick(logits[row], position + row)", "pick(logits[row], position)", EXACT),
    ("padding row written on", "model.py", "(0, 0, 0, short)))[: x.shape[0]]", "(0, 0, 0, short)))", PADDED),
    ("unembed without the norm", "model.py", "(self.head or self.lm_head)(self.model.norm(h))", "(self.head or self.lm_head)(h)", ORACLE),
    ("no padding to the safe row count", "model.py", "short = self.min_rows - x.shape[0]", "short = 0", PADDED),
    ("ordinary attention in an exact pass", "model.py", "self.row_by_row = exact and rows <= MAX_ROWS", "self.row_by_row = False", EXACT),
    ("key of the draft's last token missing", "drafters.py", "            if row == limit or (drafted", "            if row == limit and drafted:\n                self.cache.put_query(row, self.embed(0)[0])\n            if row == limit or (drafted", EXACT),
    ("verifier starts a position late", "decode.py", "exit_layer, depth, cache, cache.length, hidden)", "exit_layer, depth, cache, cache.length + 1, hidden)", EXACT),
    ("a round may pass the budget", "decode.py", "end - len(tokens) - 1)  #", "end - len(tokens))  #", BUDGET),
    ("text goes on after EOS", "decode.py", "        if token != foreseen or token in eos:", "        if token != foreseen:", BUDGET),
    ("queries rotated, keys not", "model.py", "q, k = rotate(qk, cos, sin).split((n_heads, n_kv_heads), -2)", "q, k = rotate(qk, cos, sin).split((n_heads, n_kv_heads), -2); k = qk.split((n_heads, n_kv_heads), -2)[1]", ORACLE),
    ("an adapter remembers rejected tokens", "kangaroo.py", "        self.own.rewind(self.cache.length)\n", "        self.own.rewind(self.own.length)\n", KANGAROO),
    ("a draft model remembers rejected tokens", "drafters.py", "self.own.rewind(same)", "self.own.rewind(self.own.length)", TWO),
    ("an exit is judged by the next position", "drafters.py", "len(tokens) + row) == token)\n", "len(tokens) + row + 1) == token)\n", JUDGE),
    ("compiled attention of another layer", "compiled.py", "k, v, index), q.shape[1])", "k, v, first), q.shape[1])", COMPILED),
    ("sums of several places out of order", "widened.cpp", "y[row * out + i + place * part]", "y[row * out + i * PLACES + place]", WIDENED),
    ("rows that see what follows them", "widened.cpp", "start + task / groups + 1", "start + rows", ATTENTION),
    ("a row that sums part of the first row", "widened.cpp", "load<Floats>(x + row * in + j + 8 * k)", "load<Floats>(x + (k ? row : 0) * in + j + 8 * k)", WIDENED),
    ("an exit is seen a piece late", "compiled.py", "if seen and end in seen:", "if seen and start in seen:", AUTO_COMPILED),
    ("views of an earlier length", "cache.py", "if rows not in self.shared or self.shared[rows][0] != end:", "if rows not in self.shared:", CACHE),
    ("what a drafter left is trusted when it left nothing", "drafters.py", "tokens[-1], limit, pick), 0\n\n    def run", "tokens[-1], limit, pick), 1\n\n    def run", EXACT),
]  # fmt: skip


def main() -> None:
    survivors = 0
    for fault, file, code, broken, test in MUTANTS:
        with tempfile.TemporaryDirectory() as copy:
            copy = Path(copy) / "repo"
            shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".git", ".venv", "runs", "checkpoints", "__pycache__"))
            text = (copy / file).read_text()
            assert text.count(code) == 1, f"{fault}: the code to break occurs {text.count(code)} times"
            (copy / file).write_text(text.replace(code, broken))
            run = subprocess.run([sys.executable, "-m", "pytest", "-q", "-x", f"{copy}/tests/{test}"], capture_output=True, cwd=copy)
        red = run.returncode == 1
        survivors += not red
        print(f"{'caught  ' if red else 'SURVIVED'}  {fault:40} {test}", flush=True)
    print(f"{len(MUTANTS) - survivors} passed, {survivors} failed")
    raise SystemExit(survivors > 0)


if __name__ == "__main__":
    main()
