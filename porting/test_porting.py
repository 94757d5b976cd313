"""The porting kit: two implementations keep every rule; check.py names what a faulty one breaks."""

import copy
import json
import os
import re
import shutil
import subprocess
import sys
from functools import partial
from itertools import product

import check
import golden
import numpy as np
import numpy_decode
import pytest
import torch
from check import EXIT, HEAD
from helpers import on_threads, tiny_config, tiny_model
from numpy_decode import Decoder, Llama
from safetensors.numpy import load_file

from decode import Sampling, generate, gumbel
from exact import pack
from model import load_checkpoint, save_checkpoint

PORTING = golden.PORTING
COMMITTED = check.committed()
CASES = {case["name"]: case for case in COMMITTED["cases"]}
README, SPEC = ((PORTING / name).read_text() for name in ("README.md", "SPEC.md"))


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    with on_threads(1):
        yield


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
def test_reference_and_port_keep_every_rule(dtype):
    """With exact tokens, so the two agree with each other as well."""
    port = numpy_decode.trace(numpy_decode.load_golden(dtype), COMMITTED)
    for trace in (golden.trace(dtype), port):
        report = check.check(json.loads(json.dumps(trace)))
        assert report.broken is None and report.compared == report.golden
        assert str(report).startswith(f"every rule holds: {len(CASES)} of {len(CASES)} cases")


@pytest.mark.parametrize("exact", [False, True])
def test_generate_gives_the_golden_rounds(exact):
    keys = "drafted", "accepted", "emitted"
    for dtype in golden.DTYPES.values():
        folders = [folder for folder in golden.GOLDEN.iterdir() if folder.is_dir()]
        models = {folder.name: load_checkpoint(folder, dtype) for folder in folders}
        for case in CASES.values():
            model, s = models[case.get("model", "model")], dict(case["settings"])
            if not s["max_new_tokens"]:
                continue  # generate refuses it
            s["sampling"] = Sampling(*map(s.pop, ("temperature", "top_k", "top_p", "seed")))
            s["draft_len"] = max(1, s["draft_len"])
            rounds = generate(pack(model) if exact else model, case["prompt"], **s)
            found = [[getattr(r, key) for key in keys] for r in rounds]
            assert found == [[r[key] for key in keys] for r in case["rounds"]], case["name"]


@pytest.fixture
def aside(tmp_path, monkeypatch):
    """golden/ in another place, which golden.py reads and writes."""
    folder = shutil.copytree(golden.GOLDEN, tmp_path / "golden")
    monkeypatch.setattr(golden, "GOLDEN", folder)
    return folder


def test_golden_files_are_written_as_committed(aside):
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
    assert sum(file.stat().st_size for file in aside.rglob("*.*")) < 1.5e6


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


# --------------------------------------------------------------------------------------------------
# Planted faults: what a porter gets wrong. README.md lists them by their docstrings.


def fault(says, base=Decoder, **methods):
    """A class with other methods, which says what is wrong with it."""
    return type("Fault", (base,), {"__doc__": says, **methods})


def within(method, **changes):
    """The method, with other attributes of self while it runs: functions of self."""

    def changed(self, *args):
        with pytest.MonkeyPatch.context() as patch:
            for name, value in changes.items():
                patch.setattr(self, name, value(self), raising=False)
            return method(self, *args)

    return changed


def one_too_many(self, drafted, logits):
    emitted = Decoder.accept(self, drafted, logits)
    row = len(emitted)
    more = [self.pick(logits[row], len(self.tokens) + row)] if row <= len(drafted) else []
    return emitted + more


def the_drafts(self, drafted, logits):
    emitted = Decoder.accept(self, drafted, logits)
    last = len(emitted) - 1
    return emitted[:-1] + drafted[last : last + 1] if last < len(drafted) else emitted


def queries_late(self):
    drafted = Decoder.draft(self)
    self.queries = np.roll(self.queries, 1, 0)
    return drafted


def last_row_not_run(self):
    drafted = Decoder.draft(self)
    self.queries[len(drafted)] = self.queries[0] if drafted else 0
    return drafted


def doubts_below(self, logits):
    sure = self.settings["min_confidence"]
    return numpy_decode.softmax(logits.astype(np.float32)).max() < sure


# To be changed while it drafts.
drafting = dict(draft=within(Decoder.draft, drafting=lambda s: True), drafting=False)


def second_best(self, logits, position):
    second = int(np.argsort(logits)[-2])
    return second if self.drafting else Decoder.pick(self, logits, position)


def verify_from(first):
    """Verification of the embedded tokens by the layers from first(self) on."""

    def verify(self, drafted):
        h = self.model.embed(self.tokens[-1:] + drafted)
        h = self.model.run_layers(h, first(self), self.model.n_layers, self, self.length)
        return self.model.unembed(h)

    return verify


def verify_late(self, drafted):
    h = self.queries[: len(drafted) + 1]
    self.layer_runs[self.exit] += len(h)  # so that the numbers must tell
    h = self.model.run_layers(h, self.exit + 1, self.model.n_layers, self, self.length)
    return self.model.unembed(h)


def verify_unmasked(self, drafted):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(numpy_decode.np, "where", lambda unseen, masked, score: score)
        return Decoder.verify(self, drafted)


def rewind_by(count):
    """A rewind that then moves length by count(drafted, emitted)."""

    def rewind(self, drafted, emitted):
        Decoder.rewind(self, drafted, emitted)
        self.length += count(drafted, emitted)

    return rewind


def keep_rejected(self, drafted, emitted):
    Decoder.rewind(self, drafted, emitted)
    if len(emitted) <= len(drafted):
        self.keys[2, :, self.length - 1] = self.keys[2, :, self.length]


def other_settings(change):
    """A constructor that takes what change(settings) says."""
    return lambda self, model, prompt, s: Decoder.__init__(self, model, prompt, s | change(s))


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


def keys_late(layers):
    """Methods that store keys late in the layers of self after a rejection."""

    def init(self, *how):
        Decoder.__init__(self, *how)
        self.keys = self.keys.view(LateKeys)

    def rewind(self, drafted, emitted):
        Decoder.rewind(self, drafted, emitted)
        self.keys.layers = layers(self) if len(emitted) <= len(drafted) else range(0)

    return dict(__init__=init, rewind=rewind)


def prefill_short(self):
    Decoder.prefill(self)
    self.keys[-1], self.values[-1] = 0, 0


def prefill_long(self):
    self.tokens.append(0)
    Decoder.prefill(self)
    self.tokens.pop()


def prefill_late(self):
    Decoder.prefill(self)
    for x in (self.keys, self.values):
        x[:, :, 1 : self.length + 1] = x[:, :, : self.length].copy()


RowsLate = fault("exit queries are stored one row late", draft=queries_late)
PrefillShort = fault("prefill leaves out the last layer", prefill=prefill_short)
PrefillLong = fault("prefill also runs x_{n-1}", prefill=prefill_long)

# The golden rounds that show a fault.
rejected = lambda r, s: r["accepted"] < len(r["drafted"])
ends = lambda r, s: r["emitted"][-1] in (s["eos"] or [11])
in_doubt = lambda r, s: len(r["drafted"]) < s["draft_len"]
two = lambda r, s: len(r["emitted"]) > 1
any_round = lambda r, s: True
second = lambda r, s: r["start"] > 0
drafts = lambda r, s: len(r["drafted"]) > 0

E, NO_EOS = "E", lambda s: []
# Each fault, and where it is seen: case, rule, the first golden round that shows it (None: whose
# limit is below d), layer and position (of n known tokens; k and a are n and the drafted or the
# accepted ones).
FAULTS = {
    fault("one token more is emitted after a rejection", accept=one_too_many):
        [("greedy-E2-d4", "5.3", rejected, None, "a+1")],
    fault("the rejected token is emitted, not the verifier's", accept=the_drafts):
        [("sampled-E2-d3", "3.4", rejected, HEAD, "a")],
    RowsLate: [("greedy-E3-d4", "5.1.2", drafts, E, "n-1")],
    fault("the last drafted token is not run through the draft's layers", draft=last_row_not_run):
        [("all-accepted", "5.1.2", drafts, E, "k-1")],
    fault("drafting goes on after a drafted EOS", draft=within(Decoder.draft, eos=NO_EOS)):
        [("eos-in-accepted-run", "5.1.3", ends, EXIT, "k-1")],
    fault("a round may emit one token more than are wanted",
          draft=within(Decoder.draft, end=lambda s: s.end + 1)):
        [("cap-inside-round", "5.0", None, EXIT, "k-1")],
    fault("the confidence threshold is ignored", doubts=lambda s, logits: False):
        [("confidence", "5.1.4", in_doubt, EXIT, "k-1"),
         ("never-sure", "5.1.4", in_doubt, EXIT, "n-1")],
    fault("drafting stops below the threshold, not at it (< for <=)", doubts=doubts_below):
        [("confidence-at-threshold", "5.1.4", drafts, EXIT, "k-1")],
    fault("the token before the doubtful one is dropped too",
          draft=lambda s: Decoder.draft(s)[:-1]):
        [("confidence", "5.1.4", drafts, EXIT, "k-2")],
    fault("the draft takes the noise of the position after the token's", **drafting,
          pick=lambda s, logits, p: Decoder.pick(s, logits, p + s.drafting)):
        [("sampled-E2-d6", "4.3", drafts, EXIT, "n")],
    fault("the seed loses its last two bits",
          __init__=other_settings(lambda s: {"seed": s["seed"] & ~3})):
        [("plain-sampled", "4.3", any_round, HEAD, "n")],
    fault("after a rejection, the draft's keys are stored one position late",
          **keys_late(lambda s: range(s.exit))):
        [("prompt-of-1", "5.1.2", second, E, "n-1")],
    fault("after a rejection, the verifier's keys are stored one position late",
          **keys_late(lambda s: range(s.exit, s.model.n_layers) if s.exit else range(0))):
        [("prompt-of-1", "5.2", second, HEAD, "n-1")],
    fault("all rows of a verification take the noise of the first",
          accept=within(Decoder.accept, pick=lambda s: (
              lambda logits, p, pick=s.pick: pick(logits, len(s.tokens))))):
        [("sampled-E4-d6", "4.3", two, HEAD, "n+1")],
    fault("the draft takes the second largest logit", **drafting, pick=second_best):
        [("greedy-E2-d2", "4.2", drafts, EXIT, "n")],
    fault("of equal largest logits the last is taken",
          pick=lambda s, logits, p: len(logits) - 1 - int(logits[::-1].argmax())):
        [("ties-drafted", "4.2", drafts, EXIT, "n+2")],
    fault("verification starts from embeddings, not from exit queries",
          verify=verify_from(lambda s: s.exit)):
        [("greedy-E2-d4", "5.2", drafts, HEAD, "n-1")],
    fault("verification runs layers 0..E-1 again (the text is right, the work is not)",
          verify=verify_from(lambda s: 0)):
        [("greedy-E2-d4", "5.2.1", drafts, 0, None)],
    fault("verification starts one layer late", verify=verify_late):
        [("greedy-E1-d2", "5.2", drafts, HEAD, "n-1")],
    fault("rows of a verification have the positions after their own",
          verify=within(Decoder.verify, length=lambda s: s.length + 1)):
        [("prompt-of-60-crosses-64", "5.2", drafts, HEAD, "n-1")],
    fault("rows of a verification see the rows after them", verify=verify_unmasked):
        [("greedy-E2-d4", "5.2", drafts, HEAD, "n-1")],
    fault("length grows by one token less than was emitted", rewind=rewind_by(lambda *_: -1)):
        [("plain-sampled", "5.4", any_round, None, None),
         ("plain", "5.4", any_round, None, None),
         ("all-rejected-sampled", "5.4", any_round, None, None)],
    fault("rejected rows stay live",
          rewind=rewind_by(lambda drafted, emitted: len(drafted) + 1 - len(emitted))):
        [("greedy-E2-d8", "5.4", rejected, None, None)],
    fault("the last live key of layer 2 becomes the rejected one after it", rewind=keep_rejected):
        [("all-rejected-sampled", "3.2", rejected, 2, "a-1")],
    PrefillShort:
        [("greedy-E3-d4", "6.2", "prefill", 4, 0), ("plain", "6.2", "prefill", 4, 0)],
    fault("prefill's keys and values stand one position late", prefill=prefill_late):
        [("plain", "6.2", "prefill", 0, 1)],
    PrefillLong: [("plain", "6.2", any_round, None, None)],
    fault("tokens after an EOS are emitted", accept=within(Decoder.accept, eos=NO_EOS)):
        [("eos-in-accepted-run", "7.1", ends, None, "a")],
    fault("the checkpoint's own EOS is ignored where eos is null",
          __init__=other_settings(lambda s: {"eos": s["eos"] or []})):
        [("eos-of-the-checkpoint", "5.1.3", drafts, EXIT, "n+2"),
         ("eos-of-the-checkpoint-plain", "7.1", "after", None, 4)],
}  # fmt: skip
SEEN = [(fault, *seen) for fault, places in FAULTS.items() for seen in places]


def place(case: dict, shows) -> tuple[int, dict[str, int]]:
    """The first golden round that shows a fault, and its n, k and a."""
    n, s = len(case["prompt"]), case["settings"]
    end = min(n + s["max_new_tokens"], 96)
    for number, r in enumerate(case["rounds"]):
        if shows(r, s) if shows else end - n - 1 < s["draft_len"]:
            return number, dict(n=n, k=n + len(r["drafted"]), a=n + r["accepted"])
        n += len(r["emitted"])
    raise AssertionError(f"{case['name']} does not show the fault")


def run(ports, decoder, *names: str, without: str = "", **changes) -> dict:
    """The trace of a faulty port; one that falls over its own fault has the rounds up to there.

    Without some arrays: their names.
    """
    traced = []
    for case in (CASES[name] for name in names):
        model, rounds = ports[case.get("model", "model")], []
        d = decoder(model, case["prompt"], case["settings"])
        try:
            for r in d.rounds():
                rounds.append({key: x for key, x in r.items() if key not in without.split()})
        except (ValueError, IndexError):
            pass
        traced.append({key: case[key] for key in ("name", "prompt", "settings")})
        traced[-1]["rounds"] = rounds
        for kind in {"keys", "values"} - {*without.split()}:
            traced[-1][kind] = getattr(d, kind)[:, :, : d.length].tolist()
    return {"format": "layerskip-trace-1", "dtype": "float64", "cases": traced} | changes


KEYS = "keys values"  # to leave out


@pytest.mark.parametrize(
    "fault, name, rule, shows, layer, position",
    SEEN,
    ids=[f"{name}-{fault.__doc__}" for fault, name, *_ in SEEN],
)
def test_a_planted_fault_is_named(
    ports, fault, name, rule, shows, layer, position
):
    broken = checked(run(ports, fault, name))
    assert broken is not None, "the fault was not seen"
    if isinstance(shows, str):
        number = None if shows == "prefill" else len(CASES[name]["rounds"])
    else:
        number, known = place(CASES[name], shows)
        position = position and eval(position, known)
    layer = CASES[name]["settings"]["exit_layer"] if layer == E else layer
    found = broken.rule, broken.round, broken.layer, broken.position
    assert found == (rule, number, layer, position), str(broken)
    assert str(broken).startswith(f"case {name}") and f"rule {rule} is broken" in str(broken)


keep_likely = numpy_decode.keep_likely


def drops_the_crossing_token(logits, temperature, top_k, top_p):
    x = keep_likely(logits, temperature, top_k, 1.0)
    order = np.argsort(-x, kind="stable")
    beyond = np.cumsum(numpy_decode.softmax(x)[order]) > top_p + 1e-9
    x[order[beyond & (np.arange(len(x)) > 0) & (top_p < 1)]] = -np.inf
    return x


FILTERS = {  # logits, temperature, top k, top p
    "the token whose probability crosses top p is dropped": (drops_the_crossing_token, "4.3.2"),
    "a token is kept although those before it already sum to top p": (
        lambda x, t, k, p: keep_likely(x, t, k, min(1.0, p + 1e-9)), "4.3.2"),
    "top k keeps k + 1": (lambda x, t, k, p: keep_likely(x, t, k + (k > 0), p), "4.3.1"),
    "top k keeps k although the next is equal": (
        lambda x, t, k, p: keep_likely(x - 1e-6 * np.arange(len(x)) * (k > 0), t, k, p), "4.3.1"),
    "probabilities are not renormalised after top k": (
        lambda x, t, k, p: np.minimum(keep_likely(x, t, 0, p), keep_likely(x, t, k, 1.0)), "4.3.2"),
    "filters see logits that are not divided by the temperature": (
        lambda x, t, k, p: keep_likely(x, 1.0, k, p), "4.3.2"),
}  # fmt: skip


@pytest.mark.parametrize("says", FILTERS)
def test_a_wrong_filter_is_named(whole, says):
    settings, (wrong, rule) = ("temperature", "top_k", "top_p"), FILTERS[says]
    kept = [
        np.flatnonzero(wrong(np.array(f["logits"]), *(f[s] for s in settings)) > -np.inf).tolist()
        for f in COMMITTED["filters"]
    ]
    broken = checked(whole | {"filters": kept})
    assert broken.rule == rule and str(broken).startswith("filters: rule 4.3.")


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


class FewBits(Llama):
    """Rounds the inputs of products to the ten bits of TF32."""

    def linear(self, h, name):
        few = (h.astype(np.float32).view(np.uint32) & 0xFFFFE000).view(np.float32)
        return super().linear(few.astype(h.dtype), name)


class PositionsNotScaled(Llama):
    """scaled rotary positions are not scaled"""

    factor = 1

    def __init__(self, folder, dtype):
        super().__init__(folder, dtype)
        theta = {"linear": 10000.0, "llama3": 100.0}[folder.name]
        pairs = np.arange(0, 8, 2, dtype=np.float32) / np.float32(8)
        self.frequency = 1 / theta**pairs / self.factor


def swapped(self, h, name):
    other = {"gate": "up", "up": "gate"}
    return Llama.linear(self, h, re.sub("(gate|up)(?=_proj)", lambda m: other[m[0]], name))


model_fault = partial(fault, base=Llama)
MODELS = {  # rule of section 11, which a trace with keys and values shows; first wrong row
    InterleavedPairs: ("11.4", 0, 1),
    HeadsTakeTurns: ("11.5", 0, 1),
    model_fault("attention scores are not divided by sqrt(hd)", linear=lambda s, h, name: (
        Llama.linear(s, h, name) * (s.head_dim**0.5 if "q_proj" in name else 1))): ("11.5", 0, 1),
    model_fault("SwiGLU's gate and up are swapped", linear=swapped): ("11.3", 0, 0),
    model_fault("eps is a usual one, not the checkpoint's",
                norm=within(Llama.norm, eps=lambda s: 1e-6)): ("11.1", 0, 0),
    model_fault("the final norm is left out",
                unembed=lambda s, h: s.linear(h, "lm_head")): ("", HEAD, 0),
}  # fmt: skip
EveryPairScaled = fault("llama3's scaling divides every pair", PositionsNotScaled, factor=8)
WRONG_MODELS = *MODELS, AnglesInFloat64, PositionsNotScaled, EveryPairScaled


@pytest.mark.parametrize("without", ["", KEYS])
@pytest.mark.parametrize("fault, name", [
    (PositionsNotScaled, "linear"), (PositionsNotScaled, "llama3"), (EveryPairScaled, "llama3"),
])  # fmt: skip
def test_a_wrong_scaling_is_named_by_its_step(fault, name, without):
    ports = {name: fault(golden.GOLDEN / name, "float64")}
    broken = checked(run(ports, Decoder, f"{name}-plain", without=without))
    assert broken.rule == "1.3" and "(see 11.4.5)" in str(broken), str(broken)


@pytest.mark.parametrize("fault", MODELS)
@pytest.mark.parametrize("without", ["", KEYS])
def test_a_wrong_model_is_blamed(fault, without):
    """On the layer with keys and values; on the head, by the plain case's logits, without."""
    ports = {"model": fault(golden.GOLDEN / "model", "float64")}
    see, layer, position = MODELS[fault]
    broken = checked(run(ports, Decoder, "greedy-E3-d4", "plain", "plain-sampled", without=without))
    assert (broken.case, broken.rule) == ("plain-sampled", "1.3"), str(broken)
    assert (broken.layer, broken.position) == (HEAD if without else layer, position), str(broken)
    if not without and layer != HEAD:  # a drafted case alone, by its prefill
        broken = checked(run(ports, Decoder, "all-rejected-sampled"))
        assert (broken.rule, broken.layer, broken.position) == ("1.3", layer, position), str(broken)
        assert f"(see {see}" in str(broken)


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_products_of_few_bits_are_asked_for(dtype):
    ports = {"model": FewBits(golden.GOLDEN / "model", dtype)}
    broken = checked(run(ports, Decoder, "plain", dtype=dtype))
    assert broken.rule == "1.3" and "TF32 or bfloat16" in str(broken)


def test_angles_in_float64_are_named():
    ports = {"model": AnglesInFloat64(golden.GOLDEN / "model", "float64")}
    broken = checked(run(ports, Decoder, *(n for n, case in CASES.items() if "model" not in case)))
    assert broken.rule == "1.3" and "angles formed in float64" in str(broken)


def test_a_wrong_prefill_is_blamed_by_logits(ports):
    broken = checked(run(ports, PrefillShort, "plain", "plain-sampled", without=KEYS))
    assert (broken.case, broken.rule, broken.layer) == ("plain", "6.2", HEAD)


@pytest.mark.parametrize("without", ["", KEYS, KEYS + " exit_queries logits"])
@pytest.mark.parametrize("name", ["plain-sampled", "plain", "greedy-E3-d4"])
def test_a_long_prefill_is_named_without_start(ports, name, without):
    broken = checked(run(ports, PrefillLong, name, without=without + " start"))
    assert broken.round == 0 and "6.2" in str(broken), str(broken)
    # Two rows of one token have equal logits.
    shows = "logits" not in without and name != "plain-sampled"
    assert broken.rule == ("6.2" if shows else "5.4")


@pytest.mark.parametrize("without, rule, layer", [
    ("", "3.2", 0),
    (KEYS, "5.1.2", 1),
    (KEYS + " exit_queries", "5.2", HEAD),
    (KEYS + " exit_queries logits", "4.3", None),
])  # fmt: skip
def test_the_more_is_shown_the_earlier_a_stale_key(ports, without, rule, layer):
    """In its own round and layer with keys; in the next round's first query or logits without."""
    name = "all-rejected-sampled"
    broken = checked(run(ports, NeverWritesTwice, name, without=without))
    number, known = place(CASES[name], rejected)
    after = number + 1  # its first row is written over a rejected one
    assert broken.rule == rule and broken.layer == (broken.layer if layer is None else layer)
    if not without:
        assert (broken.round, broken.position) == (after, known["a"])
        return
    assert broken.round > after and "nearer the cause: give filters, keys, values" in str(broken)
    assert ("after a rejection" in str(broken)) == ("logits" not in without)
    nearer = str(broken).partition("nearer")[2]
    assert ("exit_queries" in nearer) == ("exit_queries" in without)


def put(trace, path, value):
    """Changes what stands at a path, "cases.0.name", to a value, or to value(it)."""
    *way, last = (int(key) if key.isdigit() else key for key in path.split("."))
    for key in way:
        trace = trace[key]
    trace[last] = value(trace[last]) if callable(value) else value


more, less = lambda x: x + 1, lambda x: x[:-1]
MUTATIONS = [  # of the rounds: what is written down wrongly, case, rule
    ("", less, "cap-limit-0", "7.3"),
    ("", less, "context-full", "7.4"),
    ("", lambda rounds: rounds + rounds[-1:], "context-full", "7.4"),
    ("", lambda rounds: rounds + rounds[-1:], "eos-is-the-verifiers", "7.1"),
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
def test_a_changed_trace_is_named_by_its_rule(ports, path, value, name, rule):
    trace = run(ports, Decoder, name)
    assert checked(trace) is None
    put(trace, "cases.0.rounds" + path, value)
    assert checked(trace).rule == rule


def test_missing_live_keys_break_a_rule(ports):
    trace = run(ports, Decoder, "plain")
    case = trace["cases"][0]
    case["keys"] = [[head[:-1] for head in layer] for layer in case["keys"]]
    broken = checked(trace)
    assert (broken.rule, broken.round) == ("3.2", len(CASES["plain"]["rounds"]) - 1)
    assert "keys at 12 positions" in str(broken)


def test_every_rule_has_a_fault_and_a_text():
    named = {seen[2] for seen in SEEN} | {rule for *_, rule in [*MUTATIONS, *FILTERS.values()]}
    assert named | {"1.3"} == set(check.RULES)
    for rule in check.RULES:
        above, _, last = rule.rpartition(".")
        section = SPEC.split(f"\n{above} " if above.count(".") else f"\n## {above}. ")[1]
        step = rf"^  {last}\. " if above.count(".") else rf"^{re.escape(rule)} "
        assert re.search(step, section, re.MULTILINE), rule


def in_readme(heading: str) -> set[tuple[str, str]]:
    """The planted faults and rules that a section of README.md lists."""
    text = README.partition(f"## {heading}\n")[2].partition("\n## ")[0]
    return set(re.findall(r"^\| ([a-zES].*) \| ([\d.]+) \|$", text, re.MULTILINE))


def test_the_readme_lists_the_faults():
    named = {(fault.__doc__, rule) for fault, _, rule, *_ in SEEN}
    named |= {(says, rule) for says, (_, rule) in FILTERS.items()}
    named |= {(fault.__doc__, "1.3") for fault in WRONG_MODELS}
    assert in_readme("Planted faults") == named


# --------------------------------------------------------------------------------------------------
# What check.py says, and refuses


def test_the_report_counts_what_was_compared(ports, whole):
    """And names what was not."""
    trace = run(ports, Decoder, "greedy-E3-d4", "greedy-E1-d1")
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
        "given, but without golden ones: 1 keys, 1 values",
    ):
        assert says in report
    left = f"plain, plain-sampled, greedy-E1-d2 and {len(CASES) - 5} more"
    assert report.endswith(f"cases not given: {left}")
    report = str(check.check(whole | {"cases": whole["cases"][1:]}))
    assert report.startswith("no rule is broken, as far as the trace goes")
    assert report.endswith(f"cases not given: {whole['cases'][0]['name']}")


def test_empty_exit_queries_are_none(whole):
    trace = copy.deepcopy(whole)
    trace["cases"][0]["rounds"][0]["exit_queries"] = []
    assert check.check(trace).compared == check.check(whole).compared


@pytest.mark.parametrize("name", ["plain", "greedy-E1-d1"])
def test_float32_numbers_must_say_so(name):
    """Unless they are near enough."""
    trace = run(numpy_decode.load_golden("float32"), Decoder, name)
    nameless = {key: trace[key] for key in trace if key != "dtype"}
    for wrong in (trace, nameless):
        with pytest.raises(check.Malformed, match="has float32 numbers: say so in dtype"):
            check.check(wrong)
    assert checked(trace | {"dtype": "float32"}) is None
    assert check.check(trace, tolerance=1e-4).broken is None
    assert check.check(trace | {"dtype": "float32"}, tolerance=1e-9).broken.rule != "6.2"


def test_without_a_dtype_float64_is_meant(ports):
    trace = run(ports, Decoder, "plain")
    del trace["dtype"]
    assert checked(trace) is None
    logits = trace["cases"][0]["rounds"][0]["logits"]
    logits[0][5] += 1.5e-5 * max(1, *map(abs, logits[0]))
    assert checked(trace).rule == "1.3" and checked(trace | {"dtype": "float32"}) is None


case, r = "cases.0.", "cases.0.rounds.0."


@pytest.mark.parametrize("path, value, says", [
    ("format", "layerskip-trace-2", ""),
    ("dtype", "float16", ""),
    ("dtype", ["float64"], ""),
    ("cases", [], ""),
    ("cases", [3], ""),
    ("cases", lambda cases: cases * 2, ""),
    ("filters", [[1]], ""),
    ("filters", 5, ""),
    (case + "name", "unheard-of", ""),
    (case + "prompt", [1], ""),
    (case + "settings", {}, ""),
    (case + "settings.seed", 2.0**64,
     "seed is 1.8446744073709552e+19, in cases.json 18446744073709551615"),
    (case + "settings.seed", -1, "seed is -1"),
    (case + "settings.typo", 1, "typo is 1, in cases.json absent"),
    (case + "rounds", None, ""),
    (case + "rounds", [5], ""),
    (case + "keys", "all", ""),
    (case + "keys", lambda keys: np.swapaxes(keys, 1, 2), ""),
    (r + "drafted", [1.5], ""),
    (r + "length", None, ""),
    (r + "layer_runs", [1], ""),
    (r + "logits", [[1, 2]], ""),
    (r + "logits", 3, ""),
    (r + "exit_queries", [[1], [2, 3]], ""),
])  # fmt: skip
def test_what_is_not_a_trace_is_refused(ports, path, value, says):
    name = "top-k-top-p-largest-seed" if "settings" in path else "prompt-of-1"
    trace = copy.deepcopy(run(ports, Decoder, name))
    put(trace, path, value)
    with pytest.raises(check.Malformed) as refused:
        check.check(trace)
    assert says in str(refused.value)


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


def test_check_exits_0_1_and_2_in_one_line_each(ports, tmp_path):
    trace, name = tmp_path / "trace.json", "top-k-top-p-largest-seed"
    for decoder, code, says in (
        (Decoder, 0, "no rule is broken, as far as the trace goes: 1 of "),
        (RowsLate, 1, "round 0, layer 2, position 6: rule 5.1.2 is broken"),
        (None, 2, ""),
    ):
        trace.write_text(json.dumps(run(ports, decoder, name)) if decoder else '{"format": ')
        ran = script("check.py", trace)
        assert ran.returncode == code and says in ran.stdout
        assert (ran.stdout + ran.stderr).count("\n") == 1
    assert ran.stderr.startswith("check.py: ") and not ran.stdout


@pytest.mark.parametrize("name", ["golden.py", "numpy_decode.py"])
def test_commands_write_traces_or_exit_2(name, tmp_path):
    ran = script(name, "--trace", tmp_path / name, "--dtype", "float32")
    assert ran.returncode == 0 and checked(json.loads((tmp_path / name).read_text())) is None
    ran = script(name, "--trace", tmp_path / "none" / name)
    assert ran.returncode == 2 and ran.stderr.startswith(f"{name}: ")
    assert ran.stderr.count("\n") == 1


def test_help_needs_no_safetensors_and_porting_no_torch(tmp_path):
    for missing in ("torch", "safetensors"):
        (tmp_path / f"{missing}.py").write_text("raise ImportError")
    for name in ("check.py", "numpy_decode.py"):
        ran = script(name, "--help", lacks=tmp_path)
        assert ran.returncode == 0 and "usage: " in ran.stdout, ran.stderr


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("tied", [True, False])
def test_the_port_reads_every_type(dtype, tied, tmp_path):
    model = tiny_model(tiny_config(tied=tied, eos=(7,), n_kv_heads=1), dtype=dtype)
    save_checkpoint(model, tmp_path)
    port = Llama(tmp_path, "float64")
    for name, p in model.named_parameters():
        stored = name if name.startswith("lm_head") else "model." + name
        assert np.array_equal(port.w[stored], p.detach().double().numpy())
    assert port.eos == [7] and ("lm_head.weight" in dict(model.named_parameters())) != tied
