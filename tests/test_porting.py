"""The porting kit: golden vectors hold, check.py passes two implementations, and names the rule that a faulty port breaks."""

import copy
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT
from helpers import tiny_config, tiny_model
from safetensors.numpy import load_file

sys.path.insert(0, str(ROOT / "porting"))

import check
import golden
import numpy_decode
from numpy_decode import Decoder

from decode import generate, gumbel
from model import save_checkpoint

CASES = {case["name"]: case for case in json.loads((golden.GOLDEN / "cases.json").read_text())["cases"]}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def port():
    return numpy_decode.Llama(golden.GOLDEN / "model", "float64")


def test_the_reference_gives_the_committed_vectors():
    assert golden.drift() is None


def test_drift_is_seen_and_exits_1(monkeypatch, capsys):
    case, rounds, vectors, narrowest = golden.replay("float64")[3]
    first, rest = golden.replay("float64")[:3], golden.replay("float64")[4:]
    for changed, says in (
        ((case, rounds, vectors | {"logits": vectors["logits"] + 1e-2}, narrowest), "more than 1e-05"),
        ((case, rounds[:-1], vectors, narrowest), f"round {len(rounds) - 1} is no longer"),
        ((case, rounds, vectors, 1e-3), "hangs on 1.0e-03"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(golden, "replay", lambda dtype: [*first, changed, *rest])
            patch.setattr(sys, "argv", ["golden.py", "--verify"])
            with pytest.raises(SystemExit) as stop:
                golden.main()
        error = capsys.readouterr().err
        assert stop.value.code == 1 and says in error and case["name"] in error and error.count("\n") == 1


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_the_reference_and_the_numpy_port_keep_every_rule(dtype):
    """With exact tokens, so the two agree with each other as well."""
    assert check.check(golden.trace(dtype)) is None
    trace = numpy_decode.trace(numpy_decode.Llama(golden.GOLDEN / "model", dtype), list(CASES.values()))
    assert check.check(json.loads(json.dumps(trace))) is None and len(trace["cases"]) == len(CASES)


def test_the_cases_show_every_edge_of_section_7():
    shown = set().union(*(golden.events(case["prompt"], case["settings"], case["rounds"]) for case in CASES.values()))
    edges = "limit 0, capped, nothing drafted, in doubt, all accepted, some accepted, all rejected, eos accepted, eos rejected, eos the verifier's, context full"
    assert shown == set(edges.split(", "))
    drafts = {(case["settings"]["exit_layer"], case["settings"]["draft_len"]) for case in CASES.values()}
    assert {(e, d) for e in range(1, golden.SHAPE.n_layers) for d in (1, 2, 4, 8)} | {(0, 0), (3, 15)} <= drafts
    assert any(len(case["prompt"]) < 64 < len(case["prompt"]) + sum(len(r["emitted"]) for r in case["rounds"]) for case in CASES.values())


# ---------------------------------------------------------------------------------------------------------------------
# Planted faults: what a porter gets wrong


class AcceptsOneTooMany(Decoder):
    def accept(self, drafted, logits):
        emitted = super().accept(drafted, logits)
        if len(emitted) <= len(drafted):
            emitted.append(self.pick(logits[len(emitted)], len(self.tokens) + len(emitted)))
        return emitted


class EmitsTheDraftsToken(Decoder):
    def accept(self, drafted, logits):
        emitted = super().accept(drafted, logits)
        return emitted[:-1] + drafted[len(emitted) - 1 : len(emitted)] if len(emitted) <= len(drafted) else emitted


class QueriesOffByOneRow(Decoder):
    def draft(self):
        drafted = super().draft()
        self.queries = np.roll(self.queries, 1, 0)
        return drafted


class LastRowNotRun(Decoder):
    def draft(self):
        drafted = super().draft()
        self.queries[len(drafted)] = self.queries[0] if drafted else 0
        return drafted


class DraftsAfterEos(Decoder):
    def draft(self):
        eos, self.eos = self.eos, []
        drafted, self.eos = super().draft(), eos
        return drafted


class PassesTheBudget(Decoder):
    def draft(self):
        self.end += 1
        drafted = super().draft()
        self.end -= 1
        return drafted


class IgnoresConfidence(Decoder):
    def __init__(self, model, prompt, settings):
        super().__init__(model, prompt, settings | {"min_confidence": 0})


class DoubtsOneTooLate(Decoder):
    """Drops the last draft token of a round that could have gone on, as if the exit had been in doubt about it."""

    def draft(self):
        return super().draft()[:-1] or []


class DraftNoiseOneLate(Decoder):
    drafting = False

    def draft(self):
        self.drafting = True
        drafted = super().draft()
        self.drafting = False
        return drafted

    def pick(self, logits, position):
        return super().pick(logits, position + self.drafting)


class VerifierNoiseOfTheRound(Decoder):
    def accept(self, drafted, logits):
        pick = self.pick
        self.pick = lambda logits, position: pick(logits, len(self.tokens))
        emitted = super().accept(drafted, logits)
        del self.pick
        return emitted


class DraftsSecondBest(DraftNoiseOneLate):
    def pick(self, logits, position):
        return int(np.argsort(logits)[-2]) if self.drafting else super().pick(logits, position)


class VerifierFromTheEmbedding(Decoder):
    def verify(self, drafted):
        h = self.model.embed(self.tokens[-1:] + drafted)
        return self.model.unembed(self.model.run_layers(h, self.exit, self.model.n_layers, self, self.length))


class VerifierSkipsLayerE(Decoder):
    def verify(self, drafted):
        h = self.queries[: len(drafted) + 1]
        return self.model.unembed(self.model.run_layers(h, self.exit + 1, self.model.n_layers, self, self.length))


class VerifierOnePositionLate(Decoder):
    def verify(self, drafted):
        self.length += 1
        logits = super().verify(drafted)
        self.length -= 1
        return logits


class LengthNotRewound(Decoder):
    def rewind(self, drafted, emitted):
        super().rewind(drafted, emitted)
        self.length += len(drafted) + 1 - len(emitted)


class KeepsARejectedKey(Decoder):
    """Compacts the cache from the wrong end: the last live key of layer 2 becomes the rejected one after it."""

    def rewind(self, drafted, emitted):
        super().rewind(drafted, emitted)
        if len(emitted) <= len(drafted):
            self.keys[2, :, self.length - 1] = self.keys[2, :, self.length]


class NeverWritesTwice(Decoder):
    """Layer 0 keeps the first key that was ever written at a position, a rejected token's it may be."""

    def rewind(self, drafted, emitted):
        first = self.length
        self.seen = getattr(self, "seen", np.zeros_like(self.keys[0]))
        for position in range(first, first + len(drafted) + 1):
            if not self.seen[:, position].any():
                self.seen[:, position] = self.keys[0, :, position]
        self.keys[0, :, first : first + len(emitted)] = self.seen[:, first : first + len(emitted)]
        super().rewind(drafted, emitted)


class PrefillStopsBeforeTheLastLayer(Decoder):
    def prefill(self):
        super().prefill()
        self.keys[-1], self.values[-1] = 0, 0


class GoesOnAfterEos(Decoder):
    def accept(self, drafted, logits):
        eos, self.eos = self.eos, []
        emitted, self.eos = super().accept(drafted, logits), eos
        return emitted


def rejected(r, s):
    return r["accepted"] < len(r["drafted"])


def ends(r, s):
    return r["emitted"][-1] in s["eos"]


def drafts_two(r, s):
    return len(r["drafted"]) > 1


def in_doubt(r, s):
    return len(r["drafted"]) < s["draft_len"]


def emits_two(r, s):
    return len(r["emitted"]) > 1


def drafts(r, s):
    return len(r["drafted"]) > 0


E, L = "E", golden.SHAPE.n_layers
FAULTS = [  # fault, case, rule, the first golden round that shows it, layer, position (n: tokens known, k: drafted, a: accepted)
    (AcceptsOneTooMany, "greedy-E2-d4", "5.3", rejected, None, lambda n, k, a: n + a + 1),
    (EmitsTheDraftsToken, "sampled-E2-d3", "3.4", rejected, L, lambda n, k, a: n + a),
    (QueriesOffByOneRow, "greedy-E3-d4", "5.1.2", drafts, E, lambda n, k, a: n - 1),
    (LastRowNotRun, "all-accepted", "5.1.2", drafts, E, lambda n, k, a: n - 1 + k),
    (DraftsAfterEos, "eos-in-accepted-run", "5.1.3", ends, E, lambda n, k, a: n - 1 + k),
    (PassesTheBudget, "cap-inside-round", "5.0", None, E, lambda n, k, a: n - 1 + k),
    (IgnoresConfidence, "confidence", "5.1.4", in_doubt, E, lambda n, k, a: n - 1 + k),
    (IgnoresConfidence, "never-sure", "5.1.4", in_doubt, E, lambda n, k, a: n - 1),
    (DoubtsOneTooLate, "confidence", "5.1.4", drafts, E, lambda n, k, a: n - 1 + k - 1),
    (DraftNoiseOneLate, "sampled-E2-d6", "4.3", drafts, E, lambda n, k, a: n),
    (VerifierNoiseOfTheRound, "sampled-E4-d6", "4.3", emits_two, L, lambda n, k, a: n + 1),
    (DraftsSecondBest, "greedy-E2-d2", "4.2", drafts, E, lambda n, k, a: n),
    (VerifierFromTheEmbedding, "greedy-E2-d4", "5.2", drafts, L, lambda n, k, a: n - 1),
    (VerifierSkipsLayerE, "greedy-E1-d2", "5.2", drafts, L, lambda n, k, a: n - 1),
    (VerifierOnePositionLate, "prompt-of-60-crosses-64", "5.2", drafts, L, lambda n, k, a: n - 1),
    (LengthNotRewound, "greedy-E2-d8", "5.4", rejected, None, None),
    (KeepsARejectedKey, "all-rejected-sampled", "3.2", rejected, 2, lambda n, k, a: n - 1 + a),
    (PrefillStopsBeforeTheLastLayer, "greedy-E3-d4", "6.2", None, L - 1, 0),
    (GoesOnAfterEos, "eos-in-accepted-run", "7.1", ends, None, lambda n, k, a: n + a),
]  # fmt: skip


def place(case: dict, shows) -> tuple[int, int, int, int]:
    """(round, n, k, a) of the first golden round that `shows`; of the first whose limit is below d where that is None."""
    n, s = len(case["prompt"]), case["settings"]
    end = min(n + s["max_new_tokens"], golden.SHAPE.max_len)
    for number, r in enumerate(case["rounds"]):
        if shows(r, s) if shows else end - n - 1 < s["draft_len"]:
            return number, n, len(r["drafted"]), r["accepted"]
        n += len(r["emitted"])
    raise AssertionError(f"{case['name']} does not show the fault")


def run(port, fault, name: str) -> dict:
    """The trace of a faulty port on one case; a port that falls over its own fault has the rounds up to there."""
    case = CASES[name]
    decoder, rounds = fault(port, case["prompt"], case["settings"]), []
    try:
        for r in decoder.rounds():
            rounds.append(r)
    except (ValueError, IndexError):
        pass
    whole = {kind: getattr(decoder, kind)[:, :, : decoder.length].tolist() for kind in ("keys", "values")}
    return {"format": "layerskip-trace-1", "dtype": "float64", "cases": [{k: case[k] for k in ("name", "prompt", "settings")} | {"rounds": rounds} | whole]}


@pytest.mark.parametrize(("fault", "name", "rule", "shows", "layer", "position"), FAULTS, ids=[f"{f[0].__name__}-{f[1]}" for f in FAULTS])
def test_a_planted_fault_is_named_by_its_rule_and_place(port, fault, name, rule, shows, layer, position):
    broken = check.check(run(port, fault, name))
    assert broken is not None, "the fault was not seen"
    if rule == "6.2":
        expected = None, layer, position
    else:
        number, n, k, a = place(CASES[name], shows)
        expected = number, CASES[name]["settings"]["exit_layer"] if layer == E else layer, position and position(n, k, a)
    assert (broken.rule, broken.round, broken.layer, broken.position) == (rule, *expected), str(broken)
    assert str(broken).startswith(f"case {name}") and f"rule {rule} is broken" in str(broken)


@pytest.mark.parametrize("shown", ["keys", "queries", "logits", "tokens"])
def test_what_a_trace_shows_decides_how_early_a_stale_key_is_found(port, shown):
    """In its own round and layer with keys, in the next round's first query, then its first logits, without."""
    trace = run(port, NeverWritesTwice, "all-rejected-sampled")
    number, n, _, a = place(CASES["all-rejected-sampled"], rejected)
    after = number + 1  # its first row is written over a rejected one
    n += a + 1
    if shown == "keys":
        broken = check.check(trace)
        assert (broken.rule, broken.round, broken.layer, broken.position) == ("3.2", after, 0, n - 1)
        return
    for kind in ("keys", "values"):
        del trace["cases"][0][kind]
    for r in trace["cases"][0]["rounds"]:
        if shown != "queries":
            del r["exit_queries"]
        if shown == "tokens":
            del r["logits"]
    broken = check.check(trace)
    if shown == "tokens":
        assert broken.round > after and broken.rule == "4.3" and "give " in str(broken)
    else:
        assert broken.round > after and (broken.rule, broken.layer) == (("5.1.2", 1) if shown == "queries" else ("5.2", L))


MUTATIONS = [  # what is written down wrongly, case, rule
    (lambda rounds: rounds.pop(), "cap-limit-0", "7.3"),
    (lambda rounds: rounds.pop(), "context-full", "7.4"),
    (lambda rounds: rounds.append(rounds[-1]), "context-full", "7.4"),
    (lambda rounds: rounds.append(rounds[-1]), "eos-is-the-verifiers", "7.1"),
    (lambda rounds: rounds[0].update(accepted=rounds[0]["accepted"] + 1), "greedy-E4-d8", "5.3"),
    (lambda rounds: rounds[0].update(emitted=rounds[0]["emitted"][:-1]), "all-accepted", "5.3"),
    (lambda rounds: rounds[0].update(start=rounds[0]["start"] + 1), "prompt-of-65", "6.2"),
    (lambda rounds: rounds[1].update(start=rounds[1]["start"] + 1), "greedy-E1-d1", "3.1"),
    (lambda rounds: rounds[0].update(drafted=[1]), "plain", "7.5"),
    (lambda rounds: rounds[0]["exit_queries"].pop(), "greedy-E1-d1", "5.1"),
    (lambda rounds: rounds[0]["logits"].pop(), "all-accepted", "5.2"),
    (lambda rounds: rounds[0]["logits"][0].__setitem__(5, float("nan")), "plain", "5.2"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "name", "rule"), MUTATIONS, ids=[f"{rule}-{name}" for _, name, rule in MUTATIONS])
def test_a_changed_trace_is_named_by_its_rule(port, change, name, rule):
    trace = run(port, Decoder, name)
    assert check.check(trace) is None
    change(trace["cases"][0]["rounds"])
    assert check.check(trace).rule == rule


def test_missing_live_keys_break_a_rule(port):
    trace = run(port, Decoder, "plain")
    trace["cases"][0]["keys"] = [[head[:-1] for head in layer] for layer in trace["cases"][0]["keys"]]
    broken = check.check(trace)
    assert (broken.rule, broken.round) == ("3.2", len(CASES["plain"]["rounds"]) - 1) and "keys at 12 positions" in str(broken)


def test_every_rule_that_check_names_has_a_fault():
    assert {rule for _, _, rule, *_ in [*FAULTS, *MUTATIONS]} == set(check.RULES)


def philox(seed: int, position: int, count: int) -> list[float]:
    """The doubles of rule 4.4, word by word (Salmon et al., Parallel random numbers: as easy as 1, 2, 3)."""
    doubles, word = [], (1 << 64) - 1
    for block in range(1, 1 - -count // 4):
        a, b, c, d, k0, k1 = block, 0, 0, position, seed, 0
        for _ in range(10):
            first, second = 0xD2E7470EE14C6C93 * a, 0xCA5A826395121157 * c
            a, b, c, d = (second >> 64) ^ b ^ k0, second & word, (first >> 64) ^ d ^ k1, first & word
            k0, k1 = (k0 + 0x9E3779B97F4A7C15) & word, (k1 + 0xBB67AE8584CAA73B) & word
        doubles += [(x >> 11) * 2.0**-53 for x in (a, b, c, d)]
    return doubles[:count]


def test_the_noise_is_what_the_specification_says():
    assert philox(7, 12, 3) == [0.7385486957837498, 0.15046096288704514, 0.4163315925880591]
    for seed, position in ((7, 12), (2**64 - 1, 3), (0, 0)):
        u = np.array(philox(seed, position, 66))
        assert np.array_equal(-np.log(-np.log(u * (1 - 2.0**-53) + 2.0**-54)), gumbel(seed, position, 66).numpy())


# ---------------------------------------------------------------------------------------------------------------------
# Command lines


def script(*args) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *map(str, args)], capture_output=True, text=True, cwd="/")


def test_check_exits_0_1_and_2_in_one_line_each(port, tmp_path):
    trace = tmp_path / "trace.json"
    for decoder, code, says in ((Decoder, 0, "every rule holds: 1 cases"), (QueriesOffByOneRow, 1, "round 0, layer 2, position 6: rule 5.1.2 is broken")):
        trace.write_text(json.dumps(run(port, decoder, "top-k-top-p-largest-seed")))
        ran = script(ROOT / "porting" / "check.py", trace)
        assert ran.returncode == code and says in ran.stdout and ran.stdout.count("\n") == 1 and not ran.stderr
    trace.write_text('{"format": ')
    ran = script(ROOT / "porting" / "check.py", trace)
    assert ran.returncode == 2 and ran.stderr.startswith("check.py: ") and ran.stderr.count("\n") == 1 and not ran.stdout


@pytest.mark.parametrize(
    "change",
    [
        lambda t: [],
        lambda t: t | {"format": "layerskip-trace-2"},
        lambda t: t | {"dtype": "float16"},
        lambda t: t | {"cases": []},
        lambda t: t | {"cases": [3]},
        lambda t: t | {"cases": [t["cases"][0] | {"name": "unheard-of"}]},
        lambda t: t | {"cases": [t["cases"][0] | {"prompt": [1]}]},
        lambda t: t | {"cases": [t["cases"][0] | {"settings": {}}]},
        lambda t: t | {"cases": [t["cases"][0] | {"rounds": None}]},
        lambda t: t | {"cases": [t["cases"][0] | {"rounds": [5]}]},
        lambda t: t | {"cases": [t["cases"][0] | {"keys": "all"}]},
        lambda t: t["cases"][0]["rounds"][0].update(drafted=[1.5]) or t,
        lambda t: t["cases"][0]["rounds"][0].update(length=None) or t,
        lambda t: t["cases"][0]["rounds"][0].update(logits=[[1, 2]]) or t,
        lambda t: t["cases"][0]["rounds"][0].update(exit_queries=[[1], [2, 3]]) or t,
    ],
)
def test_what_is_not_a_trace_is_refused(port, change):
    trace = copy.deepcopy(run(port, Decoder, "prompt-of-1"))
    with pytest.raises(check.Malformed):
        check.check(change(trace))


def test_checking_and_porting_need_no_torch(tmp_path):
    program = "import sys; sys.path.insert(0, sys.argv[1]); import check, numpy_decode; assert not {'torch', 'decode', 'model'} & set(sys.modules)"
    assert script("-c", program, ROOT / "porting").returncode == 0
    assert len((ROOT / "porting" / "numpy_decode.py").read_text().splitlines()) < 210


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("tied", [True, False])
def test_the_port_reads_checkpoints_and_says_what_the_reference_says(dtype, tied, tmp_path):
    model = tiny_model(tiny_config(tied=tied, eos=(7,), n_kv_heads=1), damp_from=2, dtype=dtype)
    save_checkpoint(model, tmp_path)
    weights = numpy_decode.Llama(tmp_path, "float64").w
    assert all(np.array_equal(weights[name], p.detach().double().numpy()) for name, p in model.named_parameters())
    said = [t for r in generate(model.double(), [3, 1, 4], exit_layer=2, max_new_tokens=12) for t in r.emitted]
    ran = script(ROOT / "porting" / "numpy_decode.py", "--ckpt", tmp_path, "--prompt-ids", "3,1,4", "--max-new-tokens", 12)
    assert ran.stdout == ",".join(map(str, said)) + "\n"


@pytest.mark.parametrize("args", [["--exit", 9], ["--draft", 0], ["--prompt-ids", "1,x"], ["--prompt-ids", "64"], ["--prompt-ids=-1"], ["--ckpt", "/nowhere"]])
def test_the_ports_bad_input_is_one_line_and_exit_code_2(args):
    ran = script(ROOT / "porting" / "numpy_decode.py", *args)
    assert ran.returncode == 2 and ran.stderr.count("\n") == 1 and ran.stderr.startswith("numpy_decode.py: ")


def test_golden_files_are_small():
    size = {file.name: file.stat().st_size for file in golden.GOLDEN.rglob("*") if file.is_file()}
    assert sum(size.values()) < 1 << 20 and size["model.safetensors"] < 200_000
    assert set(load_file(golden.GOLDEN / "float64.safetensors")) == set(load_file(golden.GOLDEN / "float32.safetensors"))
