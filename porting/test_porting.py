"""The porting kit: two implementations keep every rule; check.py names what a faulty one breaks."""

import copy
import json
import re
import shutil
import subprocess
import sys
from itertools import product

import check
import golden
import numpy as np
import numpy_decode
import pytest
import torch
from check import EXIT, HEAD
from helpers import tiny_config, tiny_model
from numpy_decode import Decoder, Llama
from safetensors.numpy import load_file

from decode import Sampling, generate, gumbel
from exact import pack
from model import load_checkpoint, save_checkpoint

ROOT = golden.PORTING.parent

COMMITTED = check.committed()
CASES = {case["name"]: case for case in COMMITTED["cases"]}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def ports():
    return numpy_decode.load_golden("float64")


@pytest.fixture(scope="module")
def whole(ports):
    """The NumPy port's trace of everything, as check.py reads it."""
    return json.loads(json.dumps(numpy_decode.trace(ports, COMMITTED)))


def checked(trace):
    return check.check(trace).broken


# --------------------------------------------------------------------------------------------------
# The reference, the port and the golden vectors


def test_the_reference_gives_the_committed_vectors():
    assert golden.drift() is None


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_the_reference_and_the_numpy_port_keep_every_rule(dtype):
    """With exact tokens, so the two agree with each other as well."""
    port = numpy_decode.trace(numpy_decode.load_golden(dtype), COMMITTED)
    for trace in (golden.trace(dtype), port):
        report = check.check(json.loads(json.dumps(trace)))
        assert report.broken is None and report.compared == report.golden
        assert str(report).startswith(f"every rule holds: {len(CASES)} of {len(CASES)} cases")


@pytest.mark.parametrize("exact", [False, True])
def test_generate_gives_the_golden_rounds(exact):
    for dtype in golden.DTYPES.values():
        folders = [folder for folder in golden.GOLDEN.iterdir() if folder.is_dir()]
        models = {folder.name: load_checkpoint(folder, dtype) for folder in folders}
        for case in CASES.values():
            model, s = models[case.get("model", "model")], case["settings"]
            if not s["max_new_tokens"]:
                continue  # generate refuses it
            how = {key: s[key] for key in ("exit_layer", "max_new_tokens", "min_confidence", "eos")}
            how["sampling"] = Sampling(s["temperature"], s["top_k"], s["top_p"], s["seed"])
            how["draft_len"] = max(1, s["draft_len"])
            rounds = generate(pack(model) if exact else model, case["prompt"], **how)
            found = [(r.drafted, r.accepted, r.emitted) for r in rounds]
            wanted = [(r["drafted"], r["accepted"], r["emitted"]) for r in case["rounds"]]
            assert found == wanted, case["name"]


@pytest.fixture
def aside(tmp_path, monkeypatch):
    """golden/ in another place, which golden.py reads and writes."""
    folder = shutil.copytree(golden.GOLDEN, tmp_path / "golden")
    monkeypatch.setattr(golden, "GOLDEN", folder)
    return folder


def test_golden_files_are_written_alike_twice_and_as_committed(aside):
    golden.write()
    first = {file.name: file.read_bytes() for file in aside.iterdir() if file.is_file()}
    golden.write()
    assert {name: (aside / name).read_bytes() for name in first} == first
    for part, (dtype, tolerance) in product(check.PARTS, check.TOLERANCE.items()):
        cases, file = f"{part}cases.json", f"{part}{dtype}.safetensors"
        assert first[cases] == (check.GOLDEN / cases).read_bytes()
        stored, wanted = (load_file(folder / file) for folder in (aside, check.GOLDEN))
        assert stored.keys() == wanted.keys()
        assert all(check.error(wanted[key], stored[key]).max() <= tolerance for key in wanted)


def test_a_case_with_a_close_choice_is_refused(aside, monkeypatch):
    monkeypatch.setattr(golden, "MARGIN", 0.5)
    with pytest.raises(ValueError, match="a choice hangs on"):
        golden.write()


def test_drift_is_seen_and_exits_1(aside, monkeypatch, capsys):
    replayed = list(golden.replay("float64"))
    case, rounds, vectors = replayed.pop(0)
    for first, says in (
        ((case, rounds, vectors | {"logits": vectors["logits"] + 1e-4}), "more than 1e-06"),
        ((case, rounds, vectors | {"logits": vectors["logits"][1:]}), "other names or shapes"),
        ((case, rounds[:-1], vectors), f"case {case['name']}: rounds are no longer"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(golden, "replay", lambda *which: [first, *replayed])
            patch.setattr(sys, "argv", ["golden.py", "--verify"])
            with pytest.raises(SystemExit) as stop:
                golden.main()
        assert stop.value.code == 1 and says in capsys.readouterr().out
    text = (aside / "cases.json").read_text()
    (aside / "cases.json").write_text(text.replace('"kept": [1]', '"kept": [2]', 1))
    assert golden.drift() == "the filters are no longer as in cases.json"


def events(case: dict) -> set[str]:
    """What a case shows, in the words of section 7."""
    s, found, n = case["settings"], set(), len(case["prompt"])
    context = 64 if case.get("model") == "ties" else 96
    end, eos = min(n + s["max_new_tokens"], context), [13, 11] if s["eos"] is None else s["eos"]
    for r in case["rounds"]:
        limit, k, a = min(s["draft_len"], end - n - 1), len(r["drafted"]), r["accepted"]
        last = r["drafted"][-1] if k else None
        n += len(r["emitted"])
        if s["exit_layer"]:
            shown = {
                "limit 0": limit == 0,
                "capped": 0 < k == limit < s["draft_len"],
                "nothing drafted": k == 0 < limit,
                "in doubt": 0 < k < limit and last not in eos,
                "all accepted": 0 < k == a < len(r["emitted"]),
                "some accepted": 0 < a < k,
                "all rejected": a == 0 < k,
                "eos accepted": 1 < k == a == len(r["emitted"]),
                "eos rejected": last in eos and a < k,
                "eos the verifier's": r["emitted"][-1] in eos and a < len(r["emitted"]),
            }
            found |= {event for event, here in shown.items() if here}
    return found | ({"context full"} if n == context else set())


def test_the_cases_show_every_edge_of_section_7():
    edges = "limit 0, capped, nothing drafted, in doubt, all accepted, some accepted, all rejected"
    edges += ", eos accepted, eos rejected, eos the verifier's, context full"
    assert set().union(*map(events, CASES.values())) == set(edges.split(", "))
    settings = [case["settings"] for case in CASES.values()]
    grid = {(e, d) for e in range(1, 5) for d in (1, 2, 4, 8)} | {(0, 0), (3, 15)}
    assert grid <= {(s["exit_layer"], s["draft_len"]) for s in settings}
    assert any(s["seed"] == 2**64 - 1 for s in settings) and any(s["eos"] is None for s in settings)
    ends = [(len(c["prompt"]), c["rounds"][-1]["length"]) for c in CASES.values() if c["rounds"]]
    assert any(s["max_new_tokens"] == 0 for s in settings)
    assert any(prompt < 64 < last for prompt, last in ends)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_ties_are_exact_in_every_type(dtype):
    """Top probabilities after tokens 1, 2 and 15 are 1, 1/2 (3 and 5 tie) and 1/16 (all tie)."""
    logits = load_checkpoint(golden.GOLDEN / "ties", dtype)(torch.tensor([[1], [2], [15]]))[:, 0]
    top = logits.float().softmax(-1).max(-1).values
    assert top.tolist() == [1.0, 0.5, 1 / 16] and logits[1, 3] == logits[1, 5]


def test_the_specification_counts_cases_and_filters():
    text = " ".join((ROOT / "porting" / "SPEC.md").read_text().split())
    assert f"{len(CASES)} cases and {len(COMMITTED['filters'])} filters" in text
    kept = golden.KEEP_KV.split()
    assert f"golden ones for eight cases: {', '.join(kept[:-1])} and {kept[-1]}" in text


def test_golden_files_are_small():
    files = [file for file in golden.GOLDEN.rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) < 1.5e6
    for part in check.PARTS:
        stored = [
            load_file(golden.GOLDEN / f"{part}{dtype}.safetensors") for dtype in golden.DTYPES
        ]
        assert set(stored[0]) == set(stored[1])


# --------------------------------------------------------------------------------------------------
# Planted faults: what a porter gets wrong. README.md lists them by their docstrings.


class AcceptsOneTooMany(Decoder):
    """one token more is emitted after a rejection"""

    def accept(self, drafted, logits):
        emitted = super().accept(drafted, logits)
        if len(emitted) <= len(drafted):
            row = len(emitted)
            emitted.append(self.pick(logits[row], len(self.tokens) + row))
        return emitted


class EmitsTheDraftsToken(Decoder):
    """the rejected token is emitted, not the verifier's"""

    def accept(self, drafted, logits):
        emitted = super().accept(drafted, logits)
        last = len(emitted) - 1
        return emitted[:-1] + drafted[last : last + 1] if last < len(drafted) else emitted


class QueriesOffByOneRow(Decoder):
    """exit queries are stored one row late"""

    def draft(self):
        drafted = super().draft()
        self.queries = np.roll(self.queries, 1, 0)
        return drafted


class LastRowNotRun(Decoder):
    """the last drafted token is not run through the draft's layers"""

    def draft(self):
        drafted = super().draft()
        self.queries[len(drafted)] = self.queries[0] if drafted else 0
        return drafted


class DraftsAfterEos(Decoder):
    """drafting goes on after a drafted EOS"""

    def draft(self):
        eos, self.eos = self.eos, []
        drafted, self.eos = super().draft(), eos
        return drafted


class PassesTheBudget(Decoder):
    """a round may emit one token more than are wanted"""

    def draft(self):
        self.end += 1
        drafted = super().draft()
        self.end -= 1
        return drafted


class IgnoresConfidence(Decoder):
    """the confidence threshold is ignored"""

    def doubts(self, logits):
        return False


class DoubtsBelowAlone(Decoder):
    """drafting stops below the threshold, not at it (< for <=)"""

    def doubts(self, logits):
        sure = self.settings["min_confidence"]
        return numpy_decode.softmax(logits.astype(np.float32)).max() < sure


class DoubtsOneTooLate(Decoder):
    """the token before the doubtful one is dropped too"""

    def draft(self):
        return super().draft()[:-1] or []


class DraftNoiseOneLate(Decoder):
    """the draft takes the noise of the position after the token's"""

    drafting = False

    def draft(self):
        self.drafting = True
        drafted = super().draft()
        self.drafting = False
        return drafted

    def pick(self, logits, position):
        return super().pick(logits, position + self.drafting)


class VerifierNoiseOfTheRound(Decoder):
    """all rows of a verification take the noise of the first"""

    def accept(self, drafted, logits):
        pick = self.pick
        self.pick = lambda logits, position: pick(logits, len(self.tokens))
        emitted = super().accept(drafted, logits)
        del self.pick
        return emitted


class DraftsSecondBest(DraftNoiseOneLate):
    """the draft takes the second largest logit"""

    def pick(self, logits, position):
        second = int(np.argsort(logits)[-2])
        return second if self.drafting else super().pick(logits, position)


class LastOfEqualLogits(Decoder):
    """of equal largest logits the last is taken"""

    def pick(self, logits, position):
        return len(logits) - 1 - int(logits[::-1].argmax())


class VerifierFromTheEmbedding(Decoder):
    """verification starts from embeddings, not from exit queries"""

    def verify(self, drafted):
        h = self.model.embed(self.tokens[-1:] + drafted)
        h = self.model.run_layers(h, self.exit, self.model.n_layers, self, self.length)
        return self.model.unembed(h)


class VerifierRunsEveryLayer(Decoder):
    """verification runs layers 0..E-1 again (the text is right, the work is not)"""

    def verify(self, drafted):
        h = self.model.embed(self.tokens[-1:] + drafted)
        h = self.model.run_layers(h, 0, self.model.n_layers, self, self.length)
        return self.model.unembed(h)


class VerifierSkipsLayerE(Decoder):
    """verification starts one layer late"""

    def verify(self, drafted):
        h = self.queries[: len(drafted) + 1]
        self.layer_runs[self.exit] += len(h)  # so that the numbers must tell
        h = self.model.run_layers(h, self.exit + 1, self.model.n_layers, self, self.length)
        return self.model.unembed(h)


class VerifierOnePositionLate(Decoder):
    """rows of a verification have the positions after their own"""

    def verify(self, drafted):
        self.length += 1
        logits = super().verify(drafted)
        self.length -= 1
        return logits


class LengthOneShort(Decoder):
    """length grows by one token less than was emitted"""

    def rewind(self, drafted, emitted):
        super().rewind(drafted, emitted)
        self.length -= 1


class LengthNotRewound(Decoder):
    """rejected rows stay live"""

    def rewind(self, drafted, emitted):
        super().rewind(drafted, emitted)
        self.length += len(drafted) + 1 - len(emitted)


class VerifierSeesAllRows(Decoder):
    """rows of a verification see the rows after them"""

    def verify(self, drafted):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(numpy_decode.np, "where", lambda unseen, masked, score: score)
            return super().verify(drafted)


class KeepsARejectedKey(Decoder):
    """the last live key of layer 2 becomes the rejected one after it"""

    def rewind(self, drafted, emitted):
        super().rewind(drafted, emitted)
        if len(emitted) <= len(drafted):
            self.keys[2, :, self.length - 1] = self.keys[2, :, self.length]


class NoiseOfAnotherSeed(Decoder):
    """the seed loses its last two bits"""

    def __init__(self, model, prompt, settings):
        super().__init__(model, prompt, settings | {"seed": settings["seed"] & ~3})


class NeverWritesTwice(Decoder):
    """Layer 0 keeps the first key ever written at a position, a rejected token's it may be."""

    def rewind(self, drafted, emitted):
        first = self.length
        self.seen = getattr(self, "seen", np.zeros_like(self.keys[0]))
        for position in range(first, first + len(drafted) + 1):
            if not self.seen[:, position].any():
                self.seen[:, position] = self.keys[0, :, position]
        live = slice(first, first + len(emitted))
        self.keys[0, :, live] = self.seen[:, live]
        super().rewind(drafted, emitted)


class LateKeys(np.ndarray):
    """Keys (L, Hkv, positions, hd) that are stored one position late in some layers."""

    layers = range(0)

    def __setitem__(self, at, keys):
        if at[0] in self.layers:
            at = (*at[:2], at[2] + 1)
        super().__setitem__(at, keys)


class DraftKeysOneLate(Decoder):
    """after a rejection, the draft's keys are stored one position late"""

    def __init__(self, model, prompt, settings):
        super().__init__(model, prompt, settings)
        self.keys = self.keys.view(LateKeys)
        self.late = range(self.exit)

    def rewind(self, drafted, emitted):
        super().rewind(drafted, emitted)
        self.keys.layers = self.late if len(emitted) <= len(drafted) else range(0)


class VerifierKeysOneLate(DraftKeysOneLate):
    """after a rejection, the verifier's keys are stored one position late"""

    def __init__(self, model, prompt, settings):
        super().__init__(model, prompt, settings)
        self.late = range(self.exit, model.n_layers) if self.exit else range(0)


class PrefillStopsBeforeTheLastLayer(Decoder):
    """prefill leaves out the last layer"""

    def prefill(self):
        super().prefill()
        self.keys[-1], self.values[-1] = 0, 0


class PrefillRunsEveryToken(Decoder):
    """prefill also runs x_{n-1}"""

    def prefill(self):
        self.tokens.append(0)
        super().prefill()
        self.tokens.pop()


class PrefillOnePositionLate(Decoder):
    """prefill's keys and values stand one position late"""

    def prefill(self):
        super().prefill()
        for x in (self.keys, self.values):
            x[:, :, 1 : self.length + 1] = x[:, :, : self.length].copy()


class GoesOnAfterEos(Decoder):
    """tokens after an EOS are emitted"""

    def accept(self, drafted, logits):
        eos, self.eos = self.eos, []
        emitted, self.eos = super().accept(drafted, logits), eos
        return emitted


class IgnoresTheCheckpointsEos(Decoder):
    """the checkpoint's own EOS is ignored where eos is null"""

    def __init__(self, model, prompt, settings):
        super().__init__(model, prompt, settings)
        self.eos = settings["eos"] or []


def rejected(r, s):
    return r["accepted"] < len(r["drafted"])


def ends(r, s):
    return r["emitted"][-1] in (s["eos"] or [11])


def in_doubt(r, s):
    return len(r["drafted"]) < s["draft_len"]


def emits_two(r, s):
    return len(r["emitted"]) > 1


def always(r, s):
    return True


def second(r, s):
    return r["start"] > 0


def drafts(r, s):
    return len(r["drafted"]) > 0


# Fault, case, rule, the first golden round that shows it (None: whose limit is below d), layer, and
# position: n known tokens, k drafted and a accepted ones; ("k", -1) is n + k - 1.
E = "E"
FAULTS = [
    (AcceptsOneTooMany, "greedy-E2-d4", "5.3", rejected, None, ("a", 1)),
    (EmitsTheDraftsToken, "sampled-E2-d3", "3.4", rejected, HEAD, ("a", 0)),
    (QueriesOffByOneRow, "greedy-E3-d4", "5.1.2", drafts, E, ("n", -1)),
    (LastRowNotRun, "all-accepted", "5.1.2", drafts, E, ("k", -1)),
    (DraftsAfterEos, "eos-in-accepted-run", "5.1.3", ends, EXIT, ("k", -1)),
    (PassesTheBudget, "cap-inside-round", "5.0", None, EXIT, ("k", -1)),
    (IgnoresConfidence, "confidence", "5.1.4", in_doubt, EXIT, ("k", -1)),
    (IgnoresConfidence, "never-sure", "5.1.4", in_doubt, EXIT, ("n", -1)),
    (DoubtsBelowAlone, "confidence-at-threshold", "5.1.4", drafts, EXIT, ("k", -1)),
    (DoubtsOneTooLate, "confidence", "5.1.4", drafts, EXIT, ("k", -2)),
    (DraftNoiseOneLate, "sampled-E2-d6", "4.3", drafts, EXIT, ("n", 0)),
    (NoiseOfAnotherSeed, "plain-sampled", "4.3", always, HEAD, ("n", 0)),
    (DraftKeysOneLate, "prompt-of-1", "5.1.2", second, E, ("n", -1)),
    (VerifierKeysOneLate, "prompt-of-1", "5.2", second, HEAD, ("n", -1)),
    (VerifierNoiseOfTheRound, "sampled-E4-d6", "4.3", emits_two, HEAD, ("n", 1)),
    (DraftsSecondBest, "greedy-E2-d2", "4.2", drafts, EXIT, ("n", 0)),
    (LastOfEqualLogits, "ties-drafted", "4.2", drafts, EXIT, ("n", 2)),
    (VerifierFromTheEmbedding, "greedy-E2-d4", "5.2", drafts, HEAD, ("n", -1)),
    (VerifierRunsEveryLayer, "greedy-E2-d4", "5.2.1", drafts, 0, None),
    (VerifierSkipsLayerE, "greedy-E1-d2", "5.2", drafts, HEAD, ("n", -1)),
    (VerifierOnePositionLate, "prompt-of-60-crosses-64", "5.2", drafts, HEAD, ("n", -1)),
    (VerifierSeesAllRows, "greedy-E2-d4", "5.2", drafts, HEAD, ("n", -1)),
    (LengthOneShort, "plain-sampled", "5.4", always, None, None),
    (LengthOneShort, "plain", "5.4", always, None, None),
    (LengthOneShort, "all-rejected-sampled", "5.4", always, None, None),
    (LengthNotRewound, "greedy-E2-d8", "5.4", rejected, None, None),
    (KeepsARejectedKey, "all-rejected-sampled", "3.2", rejected, 2, ("a", -1)),
    (PrefillStopsBeforeTheLastLayer, "greedy-E3-d4", "6.2", "prefill", 4, 0),
    (PrefillStopsBeforeTheLastLayer, "plain", "6.2", "prefill", 4, 0),
    (PrefillOnePositionLate, "plain", "6.2", "prefill", 0, 1),
    (PrefillRunsEveryToken, "plain", "6.2", always, None, None),
    (GoesOnAfterEos, "eos-in-accepted-run", "7.1", ends, None, ("a", 0)),
    (IgnoresTheCheckpointsEos, "eos-of-the-checkpoint", "5.1.3", drafts, EXIT, ("n", 2)),
    (IgnoresTheCheckpointsEos, "eos-of-the-checkpoint-plain", "7.1", "after", None, 4),
]  # fmt: skip


def place(case: dict, shows) -> tuple[int, int, int, int]:
    """(round, n, k, a) of the first golden round that shows a fault."""
    n, s = len(case["prompt"]), case["settings"]
    end = min(n + s["max_new_tokens"], 96)
    for number, r in enumerate(case["rounds"]):
        if shows(r, s) if shows else end - n - 1 < s["draft_len"]:
            return number, n, len(r["drafted"]), r["accepted"]
        n += len(r["emitted"])
    raise AssertionError(f"{case['name']} does not show the fault")


def run(ports, fault, *names: str) -> dict:
    """The trace of a faulty port; one that falls over its own fault has the rounds up to there."""
    traced = []
    for case in (CASES[name] for name in names):
        model, rounds = ports[case.get("model", "model")], []
        decoder = fault(model, case["prompt"], case["settings"])
        try:
            for r in decoder.rounds():
                rounds.append(r)
        except (ValueError, IndexError):
            pass
        traced.append({key: case[key] for key in ("name", "prompt", "settings")})
        traced[-1]["rounds"] = rounds
        for kind in ("keys", "values"):
            traced[-1][kind] = getattr(decoder, kind)[:, :, : decoder.length].tolist()
    return {"format": "layerskip-trace-1", "dtype": "float64", "cases": traced}


@pytest.mark.parametrize(
    ("fault", "name", "rule", "shows", "layer", "position"),
    FAULTS,
    ids=[f"{fault.__name__}-{name}" for fault, name, *_ in FAULTS],
)
def test_a_planted_fault_is_named_by_its_rule_and_place(
    ports, fault, name, rule, shows, layer, position
):
    broken = checked(run(ports, fault, name))
    assert broken is not None, "the fault was not seen"
    if isinstance(shows, str):
        number = None if shows == "prefill" else len(CASES[name]["rounds"])
    else:
        number, n, k, a = place(CASES[name], shows)
        position = position and n + {"n": 0, "k": k, "a": a}[position[0]] + position[1]
    layer = CASES[name]["settings"]["exit_layer"] if layer == E else layer
    found = broken.rule, broken.round, broken.layer, broken.position
    assert found == (rule, number, layer, position), str(broken)
    assert str(broken).startswith(f"case {name}") and f"rule {rule} is broken" in str(broken)


def drops_the_crossing_token(logits, temperature, top_k, top_p):
    """the token whose probability crosses top p is dropped"""
    x = numpy_decode.keep_likely(logits, temperature, top_k, 1.0)
    order = np.argsort(-x, kind="stable")
    beyond = np.cumsum(numpy_decode.softmax(x)[order]) > top_p + 1e-9
    x[order[beyond & (np.arange(len(x)) > 0) & (top_p < 1)]] = -np.inf
    return x


def keeps_the_crossing_equal(logits, temperature, top_k, top_p):
    """a token is kept although those before it already sum to top p"""
    return numpy_decode.keep_likely(logits, temperature, top_k, min(1.0, top_p + 1e-9))


def one_more_of_the_top(logits, temperature, top_k, top_p):
    """top k keeps k + 1"""
    return numpy_decode.keep_likely(logits, temperature, top_k + (top_k > 0), top_p)


def no_ties_at_top_k(logits, temperature, top_k, top_p):
    """top k keeps k although the next is equal"""
    spread = logits - 1e-6 * np.arange(len(logits)) if top_k else logits
    return numpy_decode.keep_likely(spread, temperature, top_k, top_p)


def top_p_before_top_k(logits, temperature, top_k, top_p):
    """probabilities are not renormalised after top k"""
    x = numpy_decode.keep_likely(logits, temperature, 0, top_p)
    return np.where(numpy_decode.keep_likely(logits, temperature, top_k, 1.0) > -np.inf, x, -np.inf)


def filters_before_the_temperature(logits, temperature, top_k, top_p):
    """filters see logits that are not divided by the temperature"""
    return numpy_decode.keep_likely(logits, 1.0, top_k, top_p) / temperature


FILTERS = {
    drops_the_crossing_token: "4.3.2",
    keeps_the_crossing_equal: "4.3.2",
    one_more_of_the_top: "4.3.1",
    no_ties_at_top_k: "4.3.1",
    top_p_before_top_k: "4.3.2",
    filters_before_the_temperature: "4.3.2",
}


@pytest.mark.parametrize("fault", FILTERS)
def test_a_wrong_filter_is_named(whole, fault):
    settings = ("temperature", "top_k", "top_p")
    kept = [
        np.flatnonzero(fault(np.array(f["logits"]), *(f[s] for s in settings)) > -np.inf).tolist()
        for f in COMMITTED["filters"]
    ]
    broken = checked(whole | {"filters": kept})
    assert broken.rule == FILTERS[fault] and str(broken).startswith("filters: rule 4.3.")


class InterleavedPairs(Llama):
    """rotary pairs are (2i, 2i + 1)"""

    def rotate(self, x, positions):
        apart = np.concatenate([x[..., ::2], x[..., 1::2]], -1)
        halves = super().rotate(apart, positions).reshape(*x.shape[:-1], 2, -1)
        return halves.swapaxes(-1, -2).reshape(x.shape)


class AnglesInFloat64(Llama):
    """rotary angles are formed in float64"""

    def rotate(self, x, positions):
        turns = np.arange(self.head_dim // 2) * 2 / self.head_dim
        angle = positions[:, None, None] / 625.0**turns
        a, b = np.split(x, 2, -1)
        cos, sin = np.cos(angle), np.sin(angle)
        return np.concatenate([a * cos - b * sin, b * cos + a * sin], -1)


class HeadsTakeTurns(Llama):
    """query head h reads key/value head h % Hkv"""

    def linear(self, h, name):
        y = super().linear(h, name)
        if not name.endswith("q_proj"):
            return y
        turns = y.reshape(len(y), -1, self.kv_heads, self.head_dim)
        return turns.swapaxes(1, 2).reshape(y.shape)


class ScoresNotScaled(Llama):
    """attention scores are not divided by sqrt(hd)"""

    def linear(self, h, name):
        return super().linear(h, name) * (self.head_dim**0.5 if "q_proj" in name else 1)


class GateAndUpSwapped(Llama):
    """SwiGLU's gate and up are swapped"""

    def linear(self, h, name):
        parts = name.rpartition(".")[2]
        other = {"gate_proj": "up_proj", "up_proj": "gate_proj"}.get(parts, parts)
        return super().linear(h, name.replace(parts, other))


class UsualEps(Llama):
    """eps is a usual one, not the checkpoint's"""

    def norm(self, h, name):
        self.eps = 1e-6
        return super().norm(h, name)


class FinalNormLeftOut(Llama):
    """the final norm is left out"""

    def unembed(self, h):
        return self.linear(h, "lm_head")


MODELS = {  # layer, position of the first wrong row
    InterleavedPairs: (0, 1),
    HeadsTakeTurns: (0, 1),
    ScoresNotScaled: (0, 1),
    GateAndUpSwapped: (0, 0),
    UsualEps: (0, 0),
    FinalNormLeftOut: (HEAD, 0),
}
WRONG_PARTS = {  # of section 11, where a trace has keys and values
    InterleavedPairs: "11.4",
    HeadsTakeTurns: "11.5",
    ScoresNotScaled: "11.5",
    GateAndUpSwapped: "11.3",
    UsualEps: "11.1",
}


class PositionsNotScaled(Llama):
    """scaled rotary positions are not scaled"""

    def __init__(self, folder, dtype):
        super().__init__(folder, dtype)
        theta = {"linear": 10000.0, "llama3": 100.0}[folder.name]
        self.frequency = 1 / theta ** (np.arange(0, 8, 2, dtype=np.float32) / np.float32(8))


class EveryPairScaled(PositionsNotScaled):
    """llama3's scaling divides every pair"""

    def __init__(self, folder, dtype):
        super().__init__(folder, dtype)
        self.frequency = self.frequency / 8


WRONG_MODELS = *MODELS, AnglesInFloat64, PositionsNotScaled, EveryPairScaled


@pytest.mark.parametrize("shown", ["keys", "logits"])
@pytest.mark.parametrize(
    ("fault", "name"),
    [(PositionsNotScaled, "linear"), (PositionsNotScaled, "llama3"), (EveryPairScaled, "llama3")],
)
def test_a_wrong_scaling_is_named_by_its_step(fault, name, shown):
    case = f"{name}-plain"
    trace = run({name: fault(golden.GOLDEN / name, "float64")}, Decoder, case)
    if shown == "logits":
        del trace["cases"][0]["keys"], trace["cases"][0]["values"]
    broken = checked(trace)
    assert broken.rule == "1.3" and "(see 11.4.5)" in str(broken), str(broken)


@pytest.mark.parametrize("fault", MODELS)
@pytest.mark.parametrize("shown", ["keys", "logits"])
def test_a_wrong_model_is_blamed_and_not_prefill_or_the_decoder(fault, shown):
    """On the layer with keys and values; on the head, by the plain case's logits, without."""
    ports = {"model": fault(golden.GOLDEN / "model", "float64")}
    trace = run(ports, Decoder, "greedy-E3-d4", "plain", "plain-sampled")
    layer, position = MODELS[fault]
    if shown == "logits":
        for case in trace["cases"]:
            del case["keys"], case["values"]
        layer = HEAD
    broken = checked(trace)
    assert (broken.case, broken.rule) == ("plain-sampled", "1.3"), str(broken)
    assert (broken.layer, broken.position) == (layer, position), str(broken)
    if shown == "keys" and layer != HEAD:  # a drafted case alone, by its prefill
        broken = checked(run(ports, Decoder, "all-rejected-sampled"))
        assert (broken.rule, broken.layer, broken.position) == ("1.3", layer, position), str(broken)
        assert f"(see {WRONG_PARTS[fault]}" in str(broken)


class FewBits(Llama):
    """Rounds the inputs of products to the ten bits of TF32."""

    def linear(self, h, name):
        few = (h.astype(np.float32).view(np.uint32) & 0xFFFFE000).view(np.float32)
        return super().linear(few.astype(h.dtype), name)


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_products_of_few_bits_are_asked_for(dtype):
    trace = run({"model": FewBits(golden.GOLDEN / "model", dtype)}, Decoder, "plain")
    broken = checked(trace | {"dtype": dtype})
    assert broken.rule == "1.3" and "TF32 or bfloat16" in str(broken)


def test_angles_in_float64_are_told_from_a_broken_decoder():
    ports = {"model": AnglesInFloat64(golden.GOLDEN / "model", "float64")}
    broken = checked(run(ports, Decoder, *(n for n, case in CASES.items() if "model" not in case)))
    assert broken.rule == "1.3" and "angles formed in float64" in str(broken)


def test_a_wrong_prefill_is_blamed_by_logits_once_the_model_is_right_row_by_row(ports):
    trace = run(ports, PrefillStopsBeforeTheLastLayer, "plain", "plain-sampled")
    for case in trace["cases"]:
        del case["keys"], case["values"]
    broken = checked(trace)
    assert (broken.case, broken.rule, broken.layer) == ("plain", "6.2", HEAD)


@pytest.mark.parametrize("shown", ["keys", "logits", "tokens"])
@pytest.mark.parametrize("name", ["plain-sampled", "plain", "greedy-E3-d4"])
def test_a_prefill_that_runs_the_last_token_is_named_without_start(ports, name, shown):
    trace = run(ports, PrefillRunsEveryToken, name)
    for kind in ("keys", "values") if shown != "keys" else ():
        del trace["cases"][0][kind]
    for r in trace["cases"][0]["rounds"]:
        del r["start"]
        if shown == "tokens":
            r.pop("exit_queries", None)
            del r["logits"]
    broken = checked(trace)
    assert broken.round == 0 and "6.2" in str(broken), str(broken)
    shows = shown != "tokens" and name != "plain-sampled"  # two rows of one token have equal logits
    assert broken.rule == ("6.2" if shows else "5.4")


@pytest.mark.parametrize("shown", ["keys", "queries", "logits", "tokens"])
def test_what_a_trace_shows_decides_how_early_a_stale_key_is_found(ports, shown):
    """In its own round and layer with keys; in the next round's first query or logits without."""
    name = "all-rejected-sampled"
    trace = run(ports, NeverWritesTwice, name)
    number, n, _, a = place(CASES[name], rejected)
    after = number + 1  # its first row is written over a rejected one
    if shown == "keys":
        broken = checked(trace)
        found = broken.rule, broken.round, broken.layer, broken.position
        assert found == ("3.2", after, 0, n + a)
        return
    for kind in ("keys", "values"):
        del trace["cases"][0][kind]
    for r in trace["cases"][0]["rounds"]:
        if shown != "queries":
            del r["exit_queries"]
        if shown == "tokens":
            del r["logits"]
    broken = checked(trace)
    expected = {"queries": ("5.1.2", 1), "logits": ("5.2", HEAD), "tokens": ("4.3", broken.layer)}
    assert broken.round > after and (broken.rule, broken.layer) == expected[shown]
    assert "nearer the cause: give filters, keys, values" in str(broken)
    assert ("after a rejection" in str(broken)) == (shown != "tokens")
    assert ("exit_queries" in str(broken).partition("nearer")[2]) == (shown != "queries")


def change_round(at, **how):
    return lambda rounds: rounds[at].update({key: f(rounds[at]) for key, f in how.items()})


MUTATIONS = [  # what is written down wrongly, case, rule
    (lambda rounds: rounds.pop(), "cap-limit-0", "7.3"),
    (lambda rounds: rounds.pop(), "context-full", "7.4"),
    (lambda rounds: rounds.append(rounds[-1]), "context-full", "7.4"),
    (lambda rounds: rounds.append(rounds[-1]), "eos-is-the-verifiers", "7.1"),
    (change_round(0, accepted=lambda r: r["accepted"] + 1), "greedy-E4-d8", "5.3"),
    (change_round(0, emitted=lambda r: r["emitted"][:-1]), "all-accepted", "5.3"),
    (change_round(0, start=lambda r: r["start"] + 1), "prompt-of-65", "6.2"),
    (change_round(1, start=lambda r: r["start"] + 1), "greedy-E1-d1", "3.1"),
    (change_round(0, drafted=lambda r: [1]), "plain", "7.5"),
    (change_round(0, exit_queries=lambda r: r["logits"]), "plain", "7.5"),
    (change_round(0, exit_queries=lambda r: r["exit_queries"][:-1]), "greedy-E1-d1", "5.1"),
    (change_round(0, layer_runs=lambda r: [1, 2, 2, 2, 2]), "greedy-E1-d1", "5.1"),
    (change_round(0, layer_runs=lambda r: [2, 2, 2, 2, 1]), "greedy-E1-d1", "5.2"),
    (change_round(0, logits=lambda r: r["logits"][:-1]), "all-accepted", "5.2"),
    (lambda rounds: rounds[0]["logits"][0].__setitem__(5, float("nan")), "plain", "1.3"),
    (lambda rounds: rounds[0]["logits"][0].__setitem__(5, None), "greedy-E1-d1", "5.2"),
]


@pytest.mark.parametrize(
    ("change", "name", "rule"), MUTATIONS, ids=[f"{rule}-{name}" for _, name, rule in MUTATIONS]
)
def test_a_changed_trace_is_named_by_its_rule(ports, change, name, rule):
    trace = run(ports, Decoder, name)
    assert checked(trace) is None
    change(trace["cases"][0]["rounds"])
    assert checked(trace).rule == rule


def test_missing_live_keys_break_a_rule(ports):
    trace = run(ports, Decoder, "plain")
    case = trace["cases"][0]
    case["keys"] = [[head[:-1] for head in layer] for layer in case["keys"]]
    broken = checked(trace)
    assert (broken.rule, broken.round) == ("3.2", len(CASES["plain"]["rounds"]) - 1)
    assert "keys at 12 positions" in str(broken)


def test_every_rule_that_check_names_has_a_fault_and_is_in_the_specification():
    named = {rule for _, _, rule, *_ in [*FAULTS, *MUTATIONS]} | {*FILTERS.values(), "1.3"}
    assert named == set(check.RULES)
    text = (ROOT / "porting" / "SPEC.md").read_text()
    for rule in check.RULES:
        above, _, last = rule.rpartition(".")
        section = text.split(f"\n{above} " if above.count(".") else f"\n## {above}. ")[1]
        step = rf"^  {last}\. " if above.count(".") else rf"^{re.escape(rule)} "
        assert re.search(step, section, re.MULTILINE), rule


def test_the_readme_lists_the_planted_faults_with_their_rules():
    text = (ROOT / "porting" / "README.md").read_text()
    text = text.partition("## Planted faults")[2].partition("\n## ")[0]
    found = set(re.findall(r"^\| ([a-zS].*) \| ([\d.]+) \|$", text, re.MULTILINE))
    named = {(fault.__doc__, rule) for fault, _, rule, *_ in FAULTS} | set()
    named |= {(fault.__doc__, rule) for fault, rule in FILTERS.items()}
    assert found == named | {(fault.__doc__, "1.3") for fault in WRONG_MODELS}


# --------------------------------------------------------------------------------------------------
# What check.py says, and refuses


def test_a_trace_with_a_case_less_does_not_keep_every_rule(whole):
    assert str(check.check(whole)).startswith("every rule holds")
    report = str(check.check(whole | {"cases": whole["cases"][1:]}))
    assert report.startswith("no rule is broken, as far as the trace goes")
    assert report.endswith(f"cases not given: {whole['cases'][0]['name']}")


def test_the_report_counts_what_was_compared_and_names_what_was_not(ports):
    trace = run(ports, Decoder, "greedy-E3-d4", "greedy-E1-d1")
    rounds = [r for case in trace["cases"] for r in case["rounds"]]
    del trace["cases"][0]["values"], rounds[0]["logits"], rounds[0]["layer_runs"]
    n = len(rounds)
    says = f"no rule is broken, as far as the trace goes: 2 of {len(CASES)} cases, {n} rounds"
    counts = f"{n} of {n} exit_queries, {n - 1} of {n} layer_runs, {n - 1} of {n} logits"
    report = str(check.check(trace))
    assert report.startswith(says) and all(count in report for count in counts.split(", "))
    assert "1 of 1 keys, 0 of 1 values" in report and "0 of 18 filters" in report
    assert "given, but without golden ones: 1 keys, 1 values" in report
    left = f"plain, plain-sampled, greedy-E1-d2 and {len(CASES) - 5} more"
    assert report.endswith(f"cases not given: {left}")


def test_empty_exit_queries_in_a_plain_case_are_none(whole):
    trace = copy.deepcopy(whole)
    trace["cases"][0]["rounds"][0]["exit_queries"] = []
    assert check.check(trace).compared == check.check(whole).compared


@pytest.mark.parametrize("name", ["plain", "greedy-E1-d1"])
def test_float32_numbers_under_the_name_of_float64_are_refused(name):
    trace = run(numpy_decode.load_golden("float32"), Decoder, name)
    with pytest.raises(check.Malformed, match="has float32 numbers: say so in dtype"):
        check.check(trace)
    assert checked(trace | {"dtype": "float32"}) is None
    del trace["dtype"]
    with pytest.raises(check.Malformed, match="has float32 numbers: say so in dtype"):
        check.check(trace)


def test_float32_numbers_that_are_near_enough_or_say_so_are_not_refused(ports):
    trace = run(numpy_decode.load_golden("float32"), Decoder, "plain")
    assert check.check(trace, tolerance=1e-4).broken is None
    assert check.check(trace | {"dtype": "float32"}, tolerance=1e-9).broken.rule != "6.2"


def test_a_trace_without_a_dtype_is_held_to_the_tighter_tolerance(ports):
    trace = run(ports, Decoder, "plain")
    del trace["dtype"]
    assert checked(trace) is None
    logits = trace["cases"][0]["rounds"][0]["logits"]
    logits[0][5] += 1.5e-5 * max(1, *map(abs, logits[0]))
    assert checked(trace).rule == "1.3" and checked(trace | {"dtype": "float32"}) is None


def test_a_setting_that_differs_is_named(ports):
    trace = run(ports, Decoder, "top-k-top-p-largest-seed")
    for change, says in (
        ({"seed": 2.0**64}, "seed is 1.8446744073709552e+19, in cases.json 18446744073709551615"),
        ({"seed": -1}, "seed is -1"),
        ({"typo": 1}, "typo is 1, in cases.json absent"),
    ):
        changed = copy.deepcopy(trace)
        changed["cases"][0]["settings"] = trace["cases"][0]["settings"] | change
        with pytest.raises(check.Malformed, match=re.escape(says)):
            check.check(changed)


@pytest.mark.parametrize(
    "change",
    [
        lambda t: [],
        lambda t: t | {"format": "layerskip-trace-2"},
        lambda t: t | {"dtype": "float16"},
        lambda t: t | {"dtype": ["float64"]},
        lambda t: t | {"cases": []},
        lambda t: t | {"cases": [3]},
        lambda t: t | {"cases": t["cases"] * 2},
        lambda t: t | {"filters": [[1]]},
        lambda t: t | {"filters": 5},
        lambda t: t | {"cases": [t["cases"][0] | {"name": "unheard-of"}]},
        lambda t: t | {"cases": [t["cases"][0] | {"prompt": [1]}]},
        lambda t: t | {"cases": [t["cases"][0] | {"settings": {}}]},
        lambda t: t | {"cases": [t["cases"][0] | {"rounds": None}]},
        lambda t: t | {"cases": [t["cases"][0] | {"rounds": [5]}]},
        lambda t: t | {"cases": [t["cases"][0] | {"keys": "all"}]},
        lambda t: t["cases"][0].update(keys=np.swapaxes(t["cases"][0]["keys"], 1, 2)) or t,
        lambda t: t["cases"][0]["rounds"][0].update(drafted=[1.5]) or t,
        lambda t: t["cases"][0]["rounds"][0].update(length=None) or t,
        lambda t: t["cases"][0]["rounds"][0].update(layer_runs=[1]) or t,
        lambda t: t["cases"][0]["rounds"][0].update(logits=[[1, 2]]) or t,
        lambda t: t["cases"][0]["rounds"][0].update(logits=3) or t,
        lambda t: t["cases"][0]["rounds"][0].update(exit_queries=[[1], [2, 3]]) or t,
    ],
)
def test_what_is_not_a_trace_is_refused(ports, change):
    trace = copy.deepcopy(run(ports, Decoder, "prompt-of-1"))
    with pytest.raises(check.Malformed):
        check.check(change(trace))


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
    spec = (ROOT / "porting" / "SPEC.md").read_text()
    assert all(f"{u!r}" in spec for u in philox(7, 12, 3))
    for seed, position in ((7, 12), (2**64 - 1, 3), (0, 0)):
        u = np.array(philox(seed, position, 66))
        noise = -np.log(-np.log(u * (1 - 2.0**-53) + 2.0**-54))
        assert np.array_equal(noise, gumbel(seed, position, 66).numpy())


# --------------------------------------------------------------------------------------------------
# Command lines, and other checkpoints


def script(*args) -> subprocess.CompletedProcess:
    command = [sys.executable, *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, cwd="/")


def test_check_exits_0_1_and_2_in_one_line_each(ports, tmp_path):
    trace, name = tmp_path / "trace.json", "top-k-top-p-largest-seed"
    for decoder, code, says in (
        (Decoder, 0, "no rule is broken, as far as the trace goes: 1 of "),
        (QueriesOffByOneRow, 1, "round 0, layer 2, position 6: rule 5.1.2 is broken"),
    ):
        trace.write_text(json.dumps(run(ports, decoder, name)))
        ran = script(ROOT / "porting" / "check.py", trace)
        assert ran.returncode == code and says in ran.stdout and not ran.stderr
        assert ran.stdout.count("\n") == 1
    trace.write_text('{"format": ')
    ran = script(ROOT / "porting" / "check.py", trace)
    assert ran.returncode == 2 and ran.stderr.startswith("check.py: ") and not ran.stdout
    assert ran.stderr.count("\n") == 1


def test_the_two_traces_are_written_by_command_and_bad_paths_exit_2(tmp_path):
    for name in ("golden.py", "numpy_decode.py"):
        ran = script(ROOT / "porting" / name, "--trace", tmp_path / name, "--dtype", "float32")
        assert ran.returncode == 0 and checked(json.loads((tmp_path / name).read_text())) is None
        ran = script(ROOT / "porting" / name, "--trace", tmp_path / "none" / name)
        assert ran.returncode == 2 and ran.stderr.startswith(f"{name}: ")
        assert ran.stderr.count("\n") == 1


def test_help_needs_no_safetensors(tmp_path):
    (tmp_path / "safetensors.py").write_text("raise ImportError")
    program = "import runpy, sys; sys.path.insert(0, sys.argv.pop(1)); sys.argv.append('--help')"
    program += "; sys.argv.pop(0); runpy.run_path(sys.argv[0], run_name='__main__')"
    ran = script("-c", program, tmp_path, ROOT / "porting" / "check.py")
    assert ran.returncode == 0 and "TRACE.json" in ran.stdout, ran.stderr


def test_checking_and_porting_need_no_torch():
    program = "import sys; sys.path.insert(0, sys.argv[1]); import check, numpy_decode"
    program += "; assert not {'torch', 'decode', 'model'} & set(sys.modules)"
    assert script("-c", program, ROOT / "porting").returncode == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("tied", [True, False])
def test_the_port_reads_checkpoints_and_says_what_the_reference_says(dtype, tied, tmp_path):
    config = tiny_config(tied=tied, eos=(7,), n_kv_heads=1)
    model = tiny_model(config, damp_from=2, dtype=dtype)
    save_checkpoint(model, tmp_path)
    port = Llama(tmp_path, "float64")
    for name, p in model.named_parameters():
        stored = name if name.startswith("lm_head") else "model." + name
        assert np.array_equal(port.w[stored], p.detach().double().numpy())
    how = dict(exit_layer=2, draft_len=6, max_new_tokens=12, min_confidence=0.0, eos=None)
    said = [t for r in generate(model.double(), [3, 1, 4], **how) for t in r.emitted]
    decoder = Decoder(port, [3, 1, 4], how | dict(temperature=0))
    assert [t for r in decoder.rounds() for t in r["emitted"]] == said
