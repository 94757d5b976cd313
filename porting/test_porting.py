"""The porting kit: two implementations keep every rule; check.py names what a faulty one breaks."""

import copy
import json
import os
import re
import shutil
import subprocess
import sys
from contextlib import suppress
from itertools import product
from types import ModuleType

import check
import golden
import numpy as np
import numpy_decode
import pytest
import torch
from helpers import on_threads, tiny_config, tiny_model
from safetensors.numpy import load_file

from decode import Sampling, generate, gumbel
from exact import pack
from model import load_checkpoint, save_checkpoint

PORTING = golden.PORTING
COMMITTED = check.committed()
CASES = {case["name"]: case for case in COMMITTED["cases"]}
README, SPEC, PORT = (
    (PORTING / name).read_text() for name in ("README.md", "SPEC.md", "numpy_decode.py")
)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    with on_threads(1):
        yield


@pytest.fixture(scope="module")
def replayed():
    """What the reference does now, by dtype and part of golden/."""
    which = product(golden.DTYPES, check.PARTS)
    return {(dtype, part): list(golden.replay(dtype, part)) for dtype, part in which}


@pytest.fixture
def once(replayed, monkeypatch):
    """golden.py takes the reference's answers from there."""
    found = lambda dtype, parts: [x for part in parts for x in replayed[dtype, part]]
    again = lambda dtype, *parts: copy.deepcopy(found(dtype, parts or check.PARTS))
    monkeypatch.setattr(golden, "replay", again)


def checked(trace):
    return check.check(trace).broken


def command(module, monkeypatch, *args) -> int:
    """The exit code of a script's main."""
    monkeypatch.setattr(sys, "argv", [module.__name__, *map(str, args)])
    try:
        module.main()
    except SystemExit as stop:
        return stop.code
    return 0


# --------------------------------------------------------------------------------------------------
# The reference, the port and the golden vectors


@pytest.mark.parametrize("dtype", golden.DTYPES)
@pytest.mark.parametrize("module", [golden, numpy_decode])
def test_reference_and_port_keep_every_rule(module, dtype, request, tmp_path, monkeypatch):
    """With exact tokens, so the two agree with each other as well."""
    if module is golden:
        request.getfixturevalue("once")
    args = "--trace", tmp_path / "trace", "--dtype", dtype
    assert command(module, monkeypatch, *args) == 0
    report = check.check(json.loads((tmp_path / "trace").read_text()))
    assert report.broken is None and report.compared == report.golden
    assert str(report).startswith(f"every rule holds: {len(CASES)} of {len(CASES)} cases")


@pytest.mark.parametrize("module", [golden, numpy_decode])
def test_a_trace_that_cannot_be_written_exits_2(module, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(module, "trace", lambda dtype: {})
    assert command(module, monkeypatch, "--trace", tmp_path / "none" / "trace") == 2
    said = capsys.readouterr().err
    assert said.startswith(f"{module.__name__}.py: ") and said.count("\n") == 1


@pytest.mark.parametrize("exact, dtype", [(False, torch.float64), (True, torch.float32)])
def test_generate_gives_the_golden_rounds(exact, dtype):
    keys = "drafted", "accepted", "emitted"
    folders = [folder for folder in golden.GOLDEN.iterdir() if folder.is_dir()]
    models = {folder.name: load_checkpoint(folder, dtype) for folder in folders}
    if exact:
        models = {name: pack(model) for name, model in models.items()}
    for case in CASES.values():
        s = dict(case["settings"])
        if not s["max_new_tokens"]:
            continue  # generate refuses it
        s["sampling"] = Sampling(*map(s.pop, ("temperature", "top_k", "top_p", "seed")))
        s["draft_len"] = max(1, s["draft_len"])
        rounds = generate(models[case.get("model", "model")], case["prompt"], **s)
        found = [[getattr(r, key) for key in keys] for r in rounds]
        assert found == [[r[key] for key in keys] for r in case["rounds"]], case["name"]


@pytest.fixture
def aside(tmp_path, monkeypatch):
    """golden/ in another place, which golden.py reads and writes."""
    folder = shutil.copytree(golden.GOLDEN, tmp_path / "golden")
    monkeypatch.setattr(golden, "GOLDEN", folder)
    return folder


def test_golden_files_are_written_as_committed(aside, once):
    for file in aside.glob("*.safetensors"):
        file.unlink()
    for file in aside.glob("*.json"):
        file.write_text(file.read_text() + " ")
    golden.write()
    for part, (dtype, tolerance) in product(check.PARTS, check.TOLERANCE.items()):
        cases, file = f"{part}cases.json", f"{part}{dtype}.safetensors"
        assert (aside / cases).read_bytes() == (check.GOLDEN / cases).read_bytes()
        stored, wanted = (load_file(folder / file) for folder in (aside, check.GOLDEN))
        assert stored.keys() == wanted.keys()
        assert all(check.error(wanted[key], stored[key]).max() <= tolerance for key in wanted)
    assert sum(file.stat().st_size for file in aside.rglob("*.*")) < 1.5e6


def test_the_reference_gives_the_same_bytes_again(replayed):
    which = "float32", check.PARTS[-1]
    for (_, _, vectors), (_, _, first) in zip(golden.replay(*which), replayed[which], strict=True):
        assert vectors.keys() == first.keys()
        assert all(x.tobytes() == first[kind].tobytes() for kind, x in vectors.items())


def test_a_case_with_a_close_choice_is_refused(aside, monkeypatch):
    monkeypatch.setattr(golden, "MARGIN", 0.5)
    with pytest.raises(ValueError, match="a choice hangs on"):
        golden.write()


def test_drift_is_seen_and_exits_1(aside, once, monkeypatch, capsys):
    assert golden.drift() is None
    case, rounds, vectors = golden.replay("float64")[0]
    for changed, says in (
        ((case, rounds, vectors | {"logits": vectors["logits"] + 1e-4}), "more than 1e-06"),
        ((case, rounds, vectors | {"logits": vectors["logits"][1:]}), "other names or shapes"),
        ((case, rounds[:-1], vectors), f"case {case['name']}: rounds are no longer"),
    ):
        with monkeypatch.context() as patch:
            others = golden.replay("float64")[1:]
            patch.setattr(golden, "replay", lambda dtype: [changed, *others])
            assert command(golden, patch, "--verify") == 1
        assert says in capsys.readouterr().out
    text = (aside / "cases.json").read_text()
    (aside / "cases.json").write_text(text.replace('"kept": [1]', '"kept": [2]', 1))
    assert golden.drift() == "the filters are no longer as in cases.json"


# --------------------------------------------------------------------------------------------------
# Planted faults: what a porter gets wrong. README.md lists them.

GROWN = "self.tokens += emitted"
STORES_QUERY = "self.queries[row] = h"
VERIFIES = "self.model.run_layers(h, self.exit, self.model.n_layers, self, self.length)"
ROWS = "self.queries[: len(drafted) + 1] if self.exit else self.model.embed(self.tokens[-1:])"
KEYS_STORED = "cache.keys[l, :, slots] ="
GROWS = "self.length += len(emitted)"
FINDS_TOP_P = 'np.cumsum(likely) - likely >= s["top_p"]'
late_in = lambda layers: {  # keys are stored one position late in them, after a rejection
    GROWN: f"{GROWN}\n        self.late = len(emitted) <= len(drafted)",
    KEYS_STORED: f"cache.keys[l, :, slots + ({layers} and getattr(cache, 'late', 0))] =",
}
PREFILL_LONG = {
    "if len(self.tokens) > 1:\n            h = self.model.embed(self.tokens[:-1])":
        "if self.tokens:\n            h = self.model.embed(self.tokens)",
    "        self.length = len(self.tokens) - 1": "        self.length = len(self.tokens)",
}
PREFILL_SHORT = {"self.model.n_layers, self, 0)": "self.model.n_layers - 1, self, 0)"}
ROW_LATE = {STORES_QUERY: "self.queries[(row + 1) % len(self.queries)] = h"}
FEW_BITS = {"return h @ self": """few = h.astype(np.float32).view(np.uint32) & 0xFFFFE000
        return few.view(np.float32).astype(h.dtype) @ self"""}  # the ten bits of TF32
NEVER_WRITES_TWICE = {GROWN: f"""{GROWN}
        self.seen = getattr(self, "seen", self.keys[0] * 0)
        fresh, live = ~self.seen.any((0, 2)), slice(start, self.length)
        self.seen[:, fresh] = self.keys[0][:, fresh]
        self.keys[0][:, live] = self.seen[:, live]"""}  # layer 0 keeps the first key of a position
EXIT = "the head after layer E-1"

# Each fault: what is changed in numpy_decode.py, and what check.py then says of some cases.
FAULTS = {
    "one token more is emitted after a rejection": (
        {"if emitted[-1] != foreseen or": "if emitted[:row] != drafted[:row] or"},
        "greedy-E2-d4, round 0, position 12: rule 5.3"),
    "the rejected token is emitted, not the verifier's": (
        {"self.eos:\n                break": """self.eos:
                if foreseen is not None:
                    emitted[-1] = foreseen
                break"""},
        "sampled-E2-d3, round 1, the head, position 14: rule 3.4"),
    "exit queries are stored one row late": (
        ROW_LATE, "greedy-E3-d4, round 0, layer 3, position 1: rule 5.1.2"),
    "the last drafted token is not run through the draft's layers": (
        {STORES_QUERY: "self.queries[row] = h * (row < self.limit)"},
        "all-accepted, round 0, layer 4, position 6: rule 5.1.2"),
    "drafting goes on after a drafted EOS": (
        {" or (drafted and drafted[-1] in self.eos)": ""},
        f"eos-in-accepted-run, round 1, {EXIT}, position 8: rule 5.1.3"),
    "a round may emit one token more than are wanted": (
        {"self.end - len(self.tokens) - 1)": "self.end - len(self.tokens))"},
        f"cap-inside-round, round 1, {EXIT}, position 14: rule 5.0"),
    "the confidence threshold is ignored": (
        {"if sure > 0 and": "if sure > 1 and"},
        f"confidence, round 0, {EXIT}, position 5: rule 5.1.4",
        f"never-sure, round 0, {EXIT}, position 2: rule 5.1.4"),
    "drafting stops below the threshold, not at it (< for <=)": (
        {".max() <= sure": ".max() < sure"},
        f"confidence-at-threshold, round 0, {EXIT}, position 2: rule 5.1.4"),
    "the token before the doubtful one is dropped too": (
        {"<= sure:  # 5.1.4": "<= sure:\n            del drafted[-1:]"},
        f"confidence, round 0, {EXIT}, position 4: rule 5.1.4"),
    "the draft takes the noise of the position after the token's": (
        {"pick(logits, n + row, ": "pick(logits, n + row + 1, "},
        f"sampled-E2-d6, round 0, {EXIT}, position 7: rule 4.3"),
    "the seed loses its last two bits": (
        {'key=s["seed"]': 'key=s["seed"] & ~3'},
        "plain-sampled, round 0, the head, position 1: rule 4.3"),
    "after a rejection, the draft's keys are stored one position late": (
        late_in("l < cache.exit"), "prompt-of-1, round 1, layer 2, position 2: rule 5.1.2"),
    "after a rejection, the verifier's keys are stored one position late": (
        late_in("l >= cache.exit > 0"), "prompt-of-1, round 1, the head, position 2: rule 5.2"),
    "all rows of a verification take the noise of the first": (
        {"pick(logits[row], len(self.tokens) + row, ": "pick(logits[row], len(self.tokens), "},
        "sampled-E4-d6, round 0, the head, position 10: rule 4.3"),
    "the draft takes the second largest logit": (
        {"pick(logits, n + row, self.settings)": "int(np.argsort(logits)[-2])"},
        f"greedy-E2-d2, round 0, {EXIT}, position 9: rule 4.2"),
    "of equal largest logits the last is taken": (
        {"int(logits.argmax())": "len(logits) - 1 - int(logits[::-1].argmax())"},
        f"ties-drafted, round 0, {EXIT}, position 4: rule 4.2"),
    "verification starts from embeddings, not from exit queries": (
        {ROWS: "self.model.embed(self.tokens[-1:] + drafted)"},
        "greedy-E2-d4, round 0, the head, position 10: rule 5.2"),
    "verification runs layers 0..E-1 again (the text is right, the work is not)": (
        {ROWS: "self.model.embed(self.tokens[-1:] + drafted)",
         VERIFIES: VERIFIES.replace("self.exit", "0")},
        "greedy-E2-d4, round 0, layer 0: rule 5.2.1"),
    "verification starts one layer late": (
        {VERIFIES: VERIFIES.replace("self.exit", "self.exit + 1"),
         "cache.layer_runs[first:last]": "cache.layer_runs[max(first - 1, 0) : last]"},
        "greedy-E1-d2, round 0, the head, position 5: rule 5.2"),
    "rows of a verification have the positions after their own": (
        {VERIFIES: VERIFIES.replace("self.length", "self.length + 1")},
        "prompt-of-60-crosses-64, round 0, the head, position 59: rule 5.2"),
    "rows of a verification see the rows after them": (
        {"> positions[:, None]": "> positions[:, None] + 99 * first"},
        "greedy-E2-d4, round 0, the head, position 10: rule 5.2"),
    "length grows by one token less than was emitted": (
        {GROWS: f"{GROWS} - 1"}, "plain-sampled, round 0: rule 5.4", "plain, round 0: rule 5.4",
        "all-rejected-sampled, round 0: rule 5.4"),
    "rejected rows stay live": (
        {GROWS: "self.length += len(drafted) + 1"}, "greedy-E2-d8, round 0: rule 5.4"),
    "the last live key of layer 2 becomes the rejected one after it": (
        {GROWN: f"""{GROWN}
        if len(emitted) <= len(drafted):
            self.keys[2, :, self.length - 1] = self.keys[2, :, self.length]"""},
        "all-rejected-sampled, round 0, layer 2, position 4: rule 3.2"),
    "prefill leaves out the last layer": (
        PREFILL_SHORT, "greedy-E3-d4, layer 4, position 0: rule 6.2",
        "plain, layer 4, position 0: rule 6.2"),
    "prefill's keys and values stand one position late": (
        {"self, 0)\n": """self, 0)
            for x in (self.keys, self.values):
                x[:, :, 1:] = x[:, :, :-1]
"""},
        "plain, layer 0, position 1: rule 6.2"),
    "prefill also runs x_{n-1}": (PREFILL_LONG, "plain, round 0: rule 6.2"),
    "tokens after an EOS are emitted": (
        {" or emitted[-1] in self.eos": ""}, "eos-in-accepted-run, round 1, position 9: rule 7.1"),
    "the checkpoint's own EOS is ignored where eos is null": (
        {"model.eos if eos is None else eos": "eos or []"},
        f"eos-of-the-checkpoint, round 0, {EXIT}, position 3: rule 5.1.3",
        "eos-of-the-checkpoint-plain, round 3, position 4: rule 7.1"),
    "the token whose probability crosses top p is dropped": (
        {FINDS_TOP_P: 'np.cumsum(likely) > s["top_p"]'}, "filters: rule 4.3.2"),
    "a token is kept although those before it already sum to top p": (
        {FINDS_TOP_P: f"{FINDS_TOP_P} + 1e-9"}, "filters: rule 4.3.2"),
    "top k keeps k + 1": ({'[-s["top_k"]]': '[-s["top_k"] - 1]'}, "filters: rule 4.3.1"),
    "top k keeps k although the next is equal": (
        {'x[x < np.sort(x)[-s["top_k"]]]': 'x[np.argsort(-x, kind="stable")[s["top_k"] :]]'},
        "filters: rule 4.3.1"),
    "probabilities are not renormalised after top k": (
        {"softmax(x)[order]": 'softmax(logits / s["temperature"])[order]'}, "filters: rule 4.3.2"),
    "filters see logits that are not divided by the temperature": (
        {'logits.astype(np.float64) / s["temperature"]': "logits.astype(np.float64)"},
        "filters: rule 4.3.2"),
    "rotary angles are formed in float64": (
        {"theta = np.float32(": "theta = np.float64(",
         "dtype=np.float32) / np.float32(self.head_dim)": "dtype=float) / self.head_dim",
         "positions.astype(np.float32)": "positions"},
        "prompt-of-64-sampled, round 0, the head, position 63: rule 1.3"
        " (as near as with angles formed in float64: 11.4)"),
    "scaled rotary positions are not scaled": (
        {"scaled(1 / theta**pairs, rope)": "1 / theta**pairs"},
        "linear-plain, layer 0, position 1: rule 1.3 (see 11.4.5)",
        "llama3-plain, layer 0, position 1: rule 1.3 (see 11.4.5)"),
    "llama3's scaling divides every pair": (
        {"((turns - low) / (high - low)).clip(0, 1)": "0"},
        "llama3-plain, layer 0, position 1: rule 1.3 (see 11.4.5)"),
}
SCALED = [*FAULTS][-2:]
at_layer_0 = lambda position, see: [
    f"{name}, layer 0, position {position}: rule 1.3 (see {see}"
    for name in (f"plain-sampled, round {position}", "all-rejected-sampled")
]
MODELS = {  # of section 11; a drafted case alone shows them by its prefill
    "rotary pairs are (2i, 2i + 1)": (
        {"a, b = np.split(x, 2, -1)": "a, b = x[..., ::2], x[..., 1::2]",
         "np.concatenate([a * cos - b * sin, b * cos + a * sin], -1)":
         "np.stack([a * cos - b * sin, b * cos + a * sin], -1).reshape(x.shape)"},
        *at_layer_0(1, "11.4)")),
    "query head h reads key/value head h % Hkv": (
        {"self.kv_heads, -1, self.head_dim)": "-1, self.kv_heads, self.head_dim).swapaxes(1, 2)"},
        *at_layer_0(1, "11.5")),
    "attention scores are not divided by sqrt(hd)": (
        {" * self.head_dim**-0.5": ""}, *at_layer_0(1, "11.5")),
    "SwiGLU's gate and up are swapped": (
        {'("gate", "up")': '("up", "gate")'}, *at_layer_0(0, "11.3")),
    "eps is a usual one, not the checkpoint's": (
        {'c["rms_norm_eps"]': "1e-6"}, *at_layer_0(0, "11.1")),
    "the final norm is left out": (
        {'self.norm(h, "model.norm")': "h"},
        "plain-sampled, round 0, the head, position 0: rule 1.3"),
}
FAULTS |= MODELS
SEEN = [(says, where) for says, (_, *places) in FAULTS.items() for where in places]
KEYS = "keys values"  # to leave out


def planted(edits: dict[str, str]) -> ModuleType:
    """numpy_decode.py with other words in some places."""
    source, port = PORT, ModuleType("planted")
    for old, new in edits.items():
        assert source.count(old) == 1, old
        source = source.replace(old, new)
    exec(compile(source, "planted", "exec"), vars(port))
    return port


def run(*names: str, port=numpy_decode, without: str = "", dtype: str = "float64") -> dict:
    """A port's trace of cases and filters, without some arrays.

    One that falls over its own fault has the rounds up to there.
    """
    traced = []
    for case in (CASES[name] for name in names):
        model, rounds = port.Llama(check.GOLDEN / case.get("model", "model"), dtype), []
        d = port.Decoder(model, case["prompt"], case["settings"])
        with suppress(ValueError, IndexError):
            for r in d.rounds():
                rounds.append({key: x for key, x in r.items() if key not in without.split()})
        traced.append(copy.deepcopy({key: case[key] for key in ("name", "prompt", "settings")}))
        traced[-1]["rounds"] = rounds
        for kind in {"keys", "values"} - {*without.split()}:
            traced[-1][kind] = getattr(d, kind)[:, :, : d.length].tolist()
    return {"format": "layerskip-trace-1", "dtype": dtype, "cases": traced}


@pytest.mark.parametrize("says, where", SEEN, ids=[f"{w}-{says}" for says, w in SEEN])
def test_a_planted_fault_is_named(says, where):
    name, port = re.split("[,:]", where)[0], planted(FAULTS[says][0])
    if name == "filters":
        broken = checked(run("plain") | {"filters": port.kept(COMMITTED["filters"])})
    else:
        broken, where = checked(run(name, port=port)), f"case {where}"
    where, _, hint = where.partition(" (")
    assert str(broken).startswith(f"{where} is broken") and hint in str(broken), str(broken)


@pytest.mark.parametrize("says", MODELS)
def test_a_wrong_model_is_blamed_by_plain_logits_alone(says):
    edits, where, *_ = MODELS[says]
    names, p = ("greedy-E3-d4", "plain", "plain-sampled"), re.findall(r"position (\d)", where)[0]
    broken = str(checked(run(*names, port=planted(edits), without=KEYS)))
    assert broken.startswith(f"case plain-sampled, round {p}, the head, position {p}: rule 1.3")


@pytest.mark.parametrize("says, name", [*product(SCALED, ["llama3"]), (SCALED[0], "linear")])
def test_a_wrong_scaling_is_named_by_logits_too(says, name):
    broken = checked(run(f"{name}-plain", port=planted(FAULTS[says][0]), without=KEYS))
    assert broken.rule == "1.3" and "(see 11.4.5)" in str(broken), str(broken)


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_products_of_few_bits_are_asked_for(dtype):
    broken = checked(run("plain", port=planted(FEW_BITS), dtype=dtype))
    assert broken.rule == "1.3" and "TF32 or bfloat16" in str(broken)


def test_a_wrong_prefill_is_blamed_by_logits():
    broken = checked(run("plain", "plain-sampled", port=planted(PREFILL_SHORT), without=KEYS))
    assert (broken.case, broken.rule, broken.layer) == ("plain", "6.2", check.HEAD)


@pytest.mark.parametrize("without", ["", KEYS, KEYS + " exit_queries logits"])
@pytest.mark.parametrize("name", ["plain-sampled", "plain", "greedy-E3-d4"])
def test_a_long_prefill_is_named_without_start(name, without):
    broken = checked(run(name, port=planted(PREFILL_LONG), without=without + " start"))
    assert broken.round == 0 and "6.2" in str(broken), str(broken)
    # Two rows of one token have equal logits.
    shows = "logits" not in without and name != "plain-sampled"
    assert broken.rule == ("6.2" if shows else "5.4")


@pytest.mark.parametrize("without, where", [
    ("", "round 1, layer 0, position 5: rule 3.2"),
    (KEYS, "round 2, layer 1, position 6: rule 5.1.2"),
    (KEYS + " exit_queries", "round 2, the head, position 6: rule 5.2"),
    (KEYS + " exit_queries logits", "rule 4.3"),
])  # fmt: skip
def test_the_more_is_shown_the_earlier_a_stale_key(without, where):
    """In its own round and layer with keys; in the next round's first query or logits without."""
    port = planted(NEVER_WRITES_TWICE)
    broken = str(checked(run("all-rejected-sampled", port=port, without=without)))
    assert where in broken
    hint = f"nearer the cause: give {', '.join(['filters', *without.split()])}"
    assert hint in broken
    assert ("after a rejection" in broken) == ("5." in where)


def put(trace, path, value):
    """Changes what stands at a path, "cases.0.name", to a value, or to value(it)."""
    *way, last = (int(key) if key.isdigit() else key for key in path.split("."))
    for key in way:
        trace = trace[key]
    trace[last] = value(trace[last]) if callable(value) else value


more, less, again = lambda x: x + 1, lambda x: x[:-1], lambda x: x + x[-1:]
MUTATIONS = [  # of the rounds: what is written down wrongly, case, rule
    ("", less, "cap-limit-0", "7.3"),
    ("", less, "context-full", "7.4"),
    ("", again, "context-full", "7.4"),
    ("", again, "eos-is-the-verifiers", "7.1"),
    (".0.accepted", more, "greedy-E4-d8", "5.3"),
    (".0.emitted", less, "all-accepted", "5.3"),
    (".0.start", more, "prompt-of-65", "6.2"),
    (".1.start", more, "greedy-E1-d1", "3.1"),
    (".0.drafted", [1], "plain", "7.5"),
    (".0.exit_queries", [[1.0] * 24], "plain", "7.5"),
    (".0.exit_queries", less, "greedy-E1-d1", "5.1"),
    (".0.layer_runs", [1, 2, 2, 2, 2], "greedy-E1-d1", "5.1"),
    (".0.layer_runs", [2, 2, 2, 2, 1], "greedy-E1-d1", "5.2"),
    (".0.logits", less, "all-accepted", "5.2"),
    (".0.logits.0.5", float("nan"), "plain", "1.3"),
    (".0.logits.0.5", None, "greedy-E1-d1", "5.2"),
]


@pytest.mark.parametrize("path, value, name, rule", MUTATIONS)
def test_a_changed_trace_is_named_by_its_rule(path, value, name, rule):
    trace = run(name)
    assert checked(trace) is None
    put(trace, "cases.0.rounds" + path, value)
    assert checked(trace).rule == rule


def test_missing_live_keys_break_a_rule():
    trace = run("plain")
    put(trace, "cases.0.keys", lambda keys: [[head[:-1] for head in layer] for layer in keys])
    broken = checked(trace)
    assert (broken.rule, broken.round) == ("3.2", len(CASES["plain"]["rounds"]) - 1)
    assert "keys at 12 positions" in str(broken)


def rule_of(where: str) -> str:
    """The rule in such words as FAULTS has."""
    return re.findall(r"rule ([\d.]+)", where)[0]


def test_every_rule_has_a_fault_and_a_text():
    named = {rule_of(where) for _, where in SEEN} | {rule for *_, rule in MUTATIONS}
    assert named == {rule for rule in check.RULES if int(rule.partition(".")[0]) < 12}
    for rule in named:
        above, _, last = rule.rpartition(".")
        section = SPEC.split(f"\n{above} " if above.count(".") else f"\n## {above}. ")[1]
        step = rf"^  {last}\. " if above.count(".") else rf"^{re.escape(rule)} "
        assert re.search(step, section, re.MULTILINE), rule


def in_readme(heading: str) -> set[tuple[str, str]]:
    """The planted faults and rules that a section of README.md lists."""
    text = README.partition(f"## {heading}\n")[2].partition("\n## ")[0]
    return set(re.findall(r"^\| ([a-zES].*) \| ([\d.]+) \|$", text, re.MULTILINE))


def test_the_readme_lists_the_faults():
    assert in_readme("Planted faults") == {(says, rule_of(where)) for says, where in SEEN}


# --------------------------------------------------------------------------------------------------
# What check.py says, and refuses


def test_the_report_counts_what_was_compared():
    """And names what was not."""
    trace = run("greedy-E3-d4", "greedy-E1-d1")
    rounds = [r for case in trace["cases"] for r in case["rounds"]]
    del trace["cases"][0]["values"], rounds[0]["logits"], rounds[0]["layer_runs"]
    n, report = len(rounds), str(check.check(trace))
    for says in (
        f"no rule is broken, as far as the trace goes: 2 of {len(CASES)} cases, {n} rounds",
        f"{n} of {n} exit_queries",
        f"{n - 1} of {n} layer_runs",
        f"{n - 1} of {n} logits",
        "1 of 1 keys, 0 of 1 values",
        "0 of 18 filters",
    ):
        assert says in report
    left = f"plain, plain-sampled, greedy-E1-d2 and {len(CASES) - 5} more"
    assert report.endswith(f"cases not given: {left}")
    assert "tokens alone do not show" in str(check.check(run("plain", without=KEYS + " logits")))


def test_a_plain_case_may_have_empty_exit_queries():
    trace = run("plain")
    compared = check.check(trace).compared
    put(trace, "cases.0.rounds.0.exit_queries", [])
    assert checked(trace) is None and check.check(trace).compared == compared


@pytest.mark.parametrize("name", ["plain", "greedy-E1-d1"])
def test_float32_numbers_must_say_so(name):
    """Unless they are near enough. Without a dtype float64 is meant."""
    trace = run(name, dtype="float32")
    nameless = {key: trace[key] for key in trace if key != "dtype"}
    for wrong in (trace | {"dtype": "float64"}, nameless):
        with pytest.raises(check.Malformed, match="has float32 numbers: say so in dtype"):
            check.check(wrong)
    assert checked(trace) is None
    assert check.check(nameless, tolerance=1e-4).broken is None
    assert check.check(trace, tolerance=1e-9).broken.rule != "6.2"


case, r = "cases.0.", "cases.0.rounds.0."
SEED = "seed is 1.8446744073709552e+19, in cases.json 18446744073709551615"


@pytest.mark.parametrize("path, value, says", [
    ("format", "layerskip-trace-2", "format"),
    ("dtype", "float16", "dtype is 'float16'"),
    ("dtype", ["float64"], "10.2"),
    ("cases", [], "once: []"),
    ("cases", [3], "10.2"),
    ("cases", lambda cases: cases * 2, "each once"),
    ("filters", [[1]], "18 lists"),
    ("filters", 5, "10.2"),
    (case + "name", "unheard-of", "unheard-of"),
    (case + "prompt", [1], "prompt is [1]"),
    (case + "settings", {}, "is absent"),
    (case + "settings.seed", 2.0**64, SEED),
    (case + "settings.seed", -1, "seed is -1"),
    (case + "settings.typo", 1, "typo is 1, in cases.json absent"),
    (case + "rounds", None, "10.2"),
    (case + "rounds", [5], "10.2"),
    (case + "keys", "all", "keys"),
    (case + "keys", lambda keys: np.swapaxes(keys, 1, 2), "keys"),
    (r + "drafted", [1.5], "round 0: drafted"),
    (r + "length", None, "round 0: length"),
    (r + "layer_runs", [1], "layer_runs"),
    (r + "layer_runs", [1.5] * 5, "layer_runs"),
    (r + "logits", [[1, 2]], "logits"),
    (r + "logits", 3, "logits"),
    (r + "exit_queries", [[1], [2, 3]], "exit_queries"),
])  # fmt: skip
def test_what_is_not_a_trace_is_refused(path, value, says):
    trace = run("top-k-top-p-largest-seed" if "settings" in path else "prompt-of-1")
    put(trace, path, value)
    with pytest.raises(check.Malformed, match=re.escape(says)):
        check.check(trace)


def philox(seed: int, position: int, count: int) -> list[float]:
    """The doubles of rule 4.4, word by word."""
    doubles, word = [], (1 << 64) - 1
    for block in range(1, 1 - -count // 4):
        a, b, c, d, k0, k1 = block, 0, 0, position, seed, 0
        for _ in range(10):
            first, second = 0xD2E7470EE14C6C93 * a, 0xCA5A826395121157 * c
            a, b = (second >> 64) ^ b ^ k0, second & word
            c, d = (first >> 64) ^ d ^ k1, first & word
            k0, k1 = (k0 + 0x9E3779B97F4A7C15) & word, (k1 + 0xBB67AE8584CAA73B) & word
        doubles += [(x >> 11) * 2.0**-53 for x in (a, b, c, d)]
    return doubles[:count]


def test_the_noise_is_what_the_specification_says():
    assert all(f"{u!r}" in SPEC for u in philox(7, 12, 3))
    for seed, position in ((7, 12), (2**64 - 1, 3), (0, 0)):
        u = np.array(philox(seed, position, 66))
        noise = -np.log(-np.log(u * (1 - 2.0**-53) + 2.0**-54))
        assert np.array_equal(noise, gumbel(seed, position, 66).numpy())


# --------------------------------------------------------------------------------------------------
# Command lines, and other checkpoints


def script(name: str, *args, lacks: str = "") -> subprocess.CompletedProcess:
    """Runs a script of porting/ elsewhere; `lacks` is a folder of modules that are not there."""
    command = [sys.executable, str(PORTING / name), *map(str, args)]
    environment = os.environ | {"PYTHONPATH": str(lacks)}
    return subprocess.run(command, capture_output=True, text=True, cwd="/", env=environment)


@pytest.mark.parametrize("text, code, says", [
    (json.dumps(run("prompt-of-1")), 0, "no rule is broken, as far as the trace goes: 1 of "),
    (json.dumps(run("prompt-of-1", port=planted(ROW_LATE))), 1, "rule 5.1.2 is broken"),
    ('{"format": ', 2, "check.py: "),
], ids=[0, 1, 2])  # fmt: skip
def test_check_says_one_line_and_exits(text, code, says, tmp_path):
    (tmp_path / "trace.json").write_text(text)
    ran = script("check.py", tmp_path / "trace.json")
    assert ran.returncode == code and says in (ran.stderr if code == 2 else ran.stdout)
    assert (ran.stdout + ran.stderr).count("\n") == 1


def test_help_needs_no_safetensors_and_porting_no_torch(tmp_path):
    for missing in ("torch", "safetensors"):
        (tmp_path / f"{missing}.py").write_text("raise ImportError")
    for name in ("check.py", "numpy_decode.py"):
        ran = script(name, "--help", lacks=tmp_path)
        assert ran.returncode == 0 and "usage: " in ran.stdout, ran.stderr
    assert script("golden.py", "--help").returncode == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("tied", [True, False])
def test_the_port_reads_every_type(dtype, tied, tmp_path):
    model = tiny_model(tiny_config(tied=tied, eos=(7,), n_kv_heads=1), dtype=dtype)
    save_checkpoint(model, tmp_path)
    port = numpy_decode.Llama(tmp_path, "float64")
    for name, p in model.named_parameters():
        stored = name if name.startswith("lm_head") else "model." + name
        assert np.array_equal(port.w[stored], p.detach().double().numpy())
    assert port.eos == [7] and ("lm_head.weight" in dict(model.named_parameters())) != tied
