"""Which rule of SPEC.md does a port break first? Holds its trace against the golden vectors.

    python porting/check.py TRACE.json    exit code 0: no rule is broken; 1: one is; 2: not a trace

It needs NumPy and safetensors alone. SPEC.md, section 10, has the format of traces. Filters come
first, then plain cases, then the others in the trace's order, then batches (SERVING.md, 20).
"""

import argparse
import json
from collections import Counter
from collections.abc import Iterable
from copy import copy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

GOLDEN = Path(__file__).parent / "golden"
PARTS = ("", "more-")  # of golden/: the cases and vectors of each are in files of their own
TOLERANCE = {"float64": 1e-6, "float32": 2e-5}  # of the largest number of a row, or of 1: 10.5
ANGLES = 1e-5  # float64 vectors that are off by less have another model, not another decoder
PRECISE, ROUGH = 5e-5, 2e-2  # between them errors look like products of few bits
HEAD, EXIT = "the head", "the head after layer E-1"  # places beside the layers

RULES = {
    "1.3": "embed, the layers and unembed are those of section 11",
    "3.1": "between rounds, all known tokens but the last are live",
    "3.2": "live keys and values are those of plain decoding",
    "3.4": "emitted tokens are the verifier's, never the draft's",
    "4.2": "greedy: the largest logit, the lowest index among equals",
    "4.3": "sampling: argmax(filter(logits / T) + g(seed, position of the token)), g as in 4.4",
    "4.3.1": "the k largest logits are kept, and what equals the last of them",
    "4.3.2": "of what is left, renormalised, the likeliest are kept until their sum reaches top p",
    "5.0": "a round drafts at most limit = min(d, end - n - 1) tokens",
    "5.1": "layers 0..E-1 run for each of the k + 1 rows, the last drafted token's too",
    "5.1.2": "q_i is the hidden state that enters layer E",
    "5.1.3": "drafting stops at the limit and after EOS, no sooner and no later",
    "5.1.4": "drafting stops where the exit's top probability is at or below the threshold",
    "5.2": "row q_i goes through layers E..L-1 at position n-1+i, and sees none after it",
    "5.2.1": "verification does not run layers 0..E-1 again",
    "5.3": "the verifier's tokens are emitted up to and with the first that was not foreseen",
    "5.4": "length grows by the number of emitted tokens",
    "6.2": "prefill runs x_0..x_{n-2} through all layers; length := n - 1",
    "7.1": "the text ends with an EOS",
    "7.3": "the text ends at the length cap, and not before",
    "7.4": "the text ends where the context is full, and not before",
    "7.5": "plain decoding drafts nothing",
}
BATCH_RULES = {  # of SERVING.md
    "12.1": "a sequence gives the rounds that it gives alone",
    "12.2": "a token's noise comes from its sequence's seed and its own position",
    "12.3": "temperature, top k and top p are the sequence's own",
    "12.4": "d and limit are the sequence's own",
    "12.5": "the confidence threshold is the sequence's own",
    "12.6": "EOS ids are the sequence's own",
    "12.7": "rows go back to the sequence that they came from",
    "12.8": "a row has its own position, and sees its own sequence alone",
    "12.9": "accepted tokens and length are the sequence's own",
    "12.10": "a sequence leaves its lane with its last round, and the next one keeps nothing of it",
    "13.1": "a slot belongs to one position of one sequence",
    "13.2": "a round's k + 1 rows have slots, reserved before drafting",
    "13.3": "a live position keeps its slot",
    "13.4": "slots are free after their sequence's last round, not before",
    "13.5": "a shared prefix is live in all who share it, and is not written (13.6)",
}


class Malformed(ValueError):
    """Not a trace of the golden cases."""


@dataclass(eq=False)
class Broken(Exception):
    """A broken rule: its number, what was seen, and where, as far as there is a where."""

    rule: str
    expected: object
    found: object
    round: int | None = None
    layer: int | str | None = None
    position: int | None = None
    case: str | None = None
    row: np.ndarray | None = None  # what was found, where rows of numbers differ
    error: float = 0.0  # of the largest number of the row
    part: str = ""  # of section 11, where rule 1.3 is broken

    def __str__(self):
        places = [
            f"{name} {at}".replace("layer the", "the")
            for name in ("case", "round", "layer", "position")
            if (at := getattr(self, name)) is not None
        ]
        rule = {**RULES, **BATCH_RULES}[self.rule]
        text = f"{', '.join(places) or 'filters'}: rule {self.rule} is broken ({rule})"
        text += f": expected {self.expected}, found {self.found}"
        if self.rule == "1.3" and self.part:
            text += f" (see {self.part})"
        if self.rule == "1.3" and PRECISE < self.error < ROUGH:
            text += " (as near as products in TF32 or bfloat16: 8.6)"
        return text


@dataclass
class Report:
    """What was held against the golden vectors, and the first broken rule.

    Counts arrays by name: golden ones, those of them in the trace, and what is not compared.
    """

    dtype: str
    tolerance: float
    missing: list[str]  # golden cases that the trace lacks
    no_batches: list[str]  # golden batches that it lacks
    broken: Broken | None = None
    cases: int = 0
    rounds: int = 0
    batches: int = 0
    golden: Counter = field(default_factory=Counter)
    compared: Counter = field(default_factory=Counter)
    unused: Counter = field(default_factory=Counter)
    right: set[str] = field(default_factory=set)  # plain cases with logits that keep every rule

    def __str__(self):
        if self.broken:
            return str(self.broken)
        whole = not self.missing and self.compared == self.golden
        text = "every rule holds" if whole else "no rule is broken, as far as the trace goes"
        text += f": {self.cases} of {self.cases + len(self.missing)} cases, {self.rounds} rounds"
        text += f", {self.batches} batches" * (self.batches > 0)
        text += "; compared: tokens, lengths"
        text += "".join(f", {self.compared[k]} of {n} {k}" for k, n in self.golden.items())
        if not self.compared.keys() - {"layer_runs", "filters"}:
            text += "; tokens alone do not show low precision, wrong padding or dead rows made live"
        if self.unused:
            text += "; given, but without golden ones: "
            text += ", ".join(f"{times} {kind}" for kind, times in self.unused.items())
        for kind, missing in (("batches", self.no_batches), ("cases", self.missing)):
            more = f" and {len(missing) - 3} more" * (len(missing) > 3)
            text += f"; {kind} not given: {', '.join(missing[:3])}{more}" if missing else ""
        return text


def committed(folder: Path = GOLDEN, parts: Iterable[str] = PARTS) -> dict[str, list]:
    """Cases, filters and batches of golden/."""
    found = [json.loads((folder / f"{part}cases.json").read_text()) for part in parts]
    keys = ("cases", "filters", "batches")
    return {key: [x for part in found for x in part.get(key, [])] for key in keys}


def error(golden: np.ndarray, found: np.ndarray) -> np.ndarray:
    """Differences of rows (..., n), relative to the largest number of a row or to 1: 10.5.

    NaN differs from everything.
    """
    scale = np.maximum(1, np.abs(golden).max(-1, keepdims=True))
    return np.nan_to_num(np.abs(found - golden) / scale, nan=np.inf)


class Case:
    """One traced case beside the golden one. Walks both in the order of section 5."""

    def __init__(self, traced: dict, golden: dict, vectors: dict, report: Report):
        self.traced, self.golden, self.report = traced, golden, report
        self.name, self.s, self.tokens = golden["name"], golden["settings"], golden["prompt"]
        self.label = self.name
        self.folder = GOLDEN / golden.get("model", "model")
        c = json.loads((self.folder / "config.json").read_text())
        self.layers, context = c["num_hidden_layers"], c["max_position_embeddings"]
        self.eps = c["rms_norm_eps"]
        self.eos = c["eos_token_id"] if self.s["eos"] is None else self.s["eos"]
        self.end = min(len(self.tokens) + self.s["max_new_tokens"], context)
        self.cap = "7.4" if self.end == context else "7.3"
        self.choice = "4.3" if self.s["temperature"] else "4.2"
        self.asks = ""  # where to look if the next queries or logits are wrong
        self.row = 0  # of the golden vectors: the first of this round
        self.number = 0  # of this round
        kinds = ("exit_queries", "logits", "keys", "values")
        self.vectors: Any = {kind: vectors.get(f"{self.name}.{kind}") for kind in kinds}
        found = {kind: self.array(traced, kind, 2) for kind in ("keys", "values")}
        self.stored = {kind: x for kind, x in found.items() if x is not None}

    def array(self, owner: dict, kind: str, free: int) -> np.ndarray | None:
        """Numbers of the trace in the golden shape, but for the size of dimension `free`.

        None where the trace or the golden vectors have none. Raises Malformed on another shape.
        """
        golden = self.vectors[kind]
        if golden is None:
            self.report.unused.update([kind] * (kind in owner))
            return None
        self.report.golden[kind] += 1
        if kind not in owner:
            return None
        self.report.compared[kind] += 1
        try:
            x = np.array(owner[kind], dtype=np.float64)
        except (TypeError, ValueError, OverflowError):
            raise Malformed(f"case {self.name}: {kind} is not an array of numbers") from None
        if not x.size:  # an empty list hides the sizes that follow
            x = golden.compress([], free)
        if x.ndim != golden.ndim or x.any(free).shape != golden.any(free).shape:
            raise Malformed(f"case {self.name}: {kind} {x.shape} is not shaped as {golden.shape}")
        return x

    def compare(self, rule: str, what: str, golden: Any, found: Any, *where: Any) -> None:
        """Raises Broken where vectors differ; Malformed for float32 numbers called float64."""
        off = error(golden, found)
        if not off.max() > self.report.tolerance:
            return
        near = self.report.dtype == "float64" and off.max() < ANGLES
        if near and found.size > 8 and (found == np.float32(found)).all():
            raise Malformed(f"case {self.name}: {what} has float32 numbers: say so in dtype")
        at = np.unravel_index(off.argmax(), off.shape)
        expected = f"{golden[at]:.9g} in {what} at {[int(i) for i in at]}"
        hint = self.asks if rule in ("5.1.2", "5.2") else ""
        hint = " (as near as with angles formed in float64: 11.4)" if near else hint
        rule = "1.3" if near else rule
        found_at = f"{found[at]:.9g}{hint}", *where, self.label, found, float(off.max())
        raise Broken(rule, expected, *found_at)

    def fail(self, rule: str, expected: object, found: object, *where: Any) -> NoReturn:
        """Raises Broken. where: layer and position, as far as known."""
        layer, position = (*where, None, None)[:2]
        raise Broken(rule, expected, found, self.number, layer, position, self.label)

    def walk(self) -> None:
        """All rounds, and what is live between them."""
        self.kept(0, len(self.tokens) - 1, "6.2", None)
        for r in self.traced["rounds"]:
            self.step(r)
        self.finish()

    def step(self, r: dict) -> None:
        """The next round."""
        n, drafts, g, number = len(self.tokens), self.s["exit_layer"], self.now, self.number
        if g is None:
            rule = "7.1" if self.tokens[-1] in self.eos else self.cap
            self.fail(rule, "the end of the text", "another round", None, n)
        if r.get("start", n - 1) != n - 1:
            self.fail("3.1" if number else "6.2", n - 1, r["start"])
        try:
            self.draft(r, g, n)
            if not drafts and r["length"] == g["length"]:  # else 5.4 is the cause
                self.kept(n - 1, n, "3.2", number)
            self.verify(r, g, n)
            self.accept(r, g, n)
        except Broken as broken:
            ahead = r["length"] - len(r["emitted"]) - (n - 1)
            if number == 0 and ahead > 0 and broken.rule in ("1.3", "4.2", "4.3", "5.1.2"):
                broken.rule, broken.found = "6.2", f"{broken.found}, length {ahead} ahead"
            raise
        if r["length"] != g["length"]:
            ask = " (is length n - 1 after prefill? 6.2)" * (number == 0 and "start" not in r)
            self.fail("5.4", g["length"], f"{r['length']}{ask}")
        if drafts:
            self.kept(n - 1, g["length"], "3.2", number)
        if g["accepted"] < len(g["drafted"]):
            self.asks = " (after a rejection, is each key at its own position? 5.4, 3.2)"
        self.tokens, self.row = self.tokens + r["emitted"], self.row + len(g["drafted"]) + 1
        self.number += 1
        self.report.rounds += 1

    @property
    def now(self) -> dict | None:
        """The golden round that comes next, if any."""
        rounds = self.golden["rounds"]
        return rounds[self.number] if self.number < len(rounds) else None

    def finish(self) -> None:
        """After the last round of the trace."""
        if self.now:
            self.fail(self.cap, "another round", "the end of the text", None, len(self.tokens))

    def draft(self, r: dict, g: dict, n: int) -> None:
        """5.0 and 5.1, row by row."""
        drafted, want, e = r["drafted"], g["drafted"], self.s["exit_layer"]
        if not e:
            if drafted or r.get("exit_queries"):
                self.fail("7.5", "no drafted tokens and no exit queries", "some")
            return
        limit = min(self.s["draft_len"], self.end - n - 1)
        queries = self.array(r, "exit_queries", 0)
        for i in range(len(want) + 1):
            if queries is not None and i < len(queries):
                golden = self.vectors["exit_queries"][self.row + i]
                self.compare("5.1.2", f"q_{i}", golden, queries[i], self.number, e, n - 1 + i)
            if i in (len(want), len(drafted)) and len(want) != len(drafted):
                rule = "5.1.4" if self.s["min_confidence"] else "5.1.3"
                if i == len(want):  # too late
                    rule = "5.1.3" if i and want[-1] in self.eos else "5.1.4"
                    rule = "5.0" if i == limit else rule
                self.fail(rule, f"{len(want)} drafted tokens", len(drafted), EXIT, n - 1 + i)
            if i < len(want) and drafted[i] != want[i]:
                self.fail(self.choice, f"drafted token {want[i]}", drafted[i], EXIT, n + i)
        if queries is not None and len(queries) != len(want) + 1:
            self.fail("5.1", f"{len(want) + 1} exit queries", len(queries), e)

    def verify(self, r: dict, g: dict, n: int) -> None:
        """5.2: runs of layers; logits of the emitted rows at least, of all k + 1 if given."""
        rows, e = len(g["drafted"]) + 1, self.s["exit_layer"]
        self.report.golden["layer_runs"] += 1
        self.report.compared["layer_runs"] += "layer_runs" in r
        runs = r.get("layer_runs", [rows] * self.layers)
        if not whole_numbers(runs) or len(runs) != self.layers:
            raise Malformed(f"case {self.name}, round {self.number}: layer_runs is no count each")
        for layer, times in enumerate(runs):
            if times != rows:
                rule = "5.2" if layer >= e else "5.2.1" if times > rows else "5.1"
                self.fail(rule, f"{rows} rows through this layer", times, layer)
        logits = self.array(r, "logits", 0)
        if logits is None:
            return
        if not len(g["emitted"]) <= len(logits) <= rows:
            self.fail("5.2", f"logits of {rows} rows", len(logits), HEAD)
        rows_right = "plain-sampled" in self.report.right and "model" not in self.golden
        rule = "5.2" if e else "6.2" if rows_right and self.number == 0 < n - 1 else "1.3"
        for i, row in enumerate(logits):
            golden = self.vectors["logits"][self.row + i]
            try:
                self.compare(rule, f"logits_{i}", golden, row, self.number, HEAD, n - 1 + i)
            except Broken as broken:
                if self.stored:  # then the keys and values of every layer are right
                    broken.part = "11.6, or 11.3 in the last layer"
                    broken.part += "; or does prefill run x_{n-1} too, 6.2?" * (self.number == 0)
                if "model" in self.golden:
                    broken.part = "11.4.5"  # the other plain cases come before
                raise

    def accept(self, r: dict, g: dict, n: int) -> None:
        """3.4, 4, 5.3 and 7.1, token by token."""
        emitted, want = r["emitted"], g["emitted"]
        for i, token in enumerate(want):
            if i == len(emitted):
                self.fail("5.3", want, emitted, None, n + i)
            if emitted[i] != token:
                rule = "3.4" if r["drafted"][i : i + 1] == [emitted[i]] else self.choice
                self.fail(rule, f"token {token}", emitted[i], HEAD, n + i)
        if len(emitted) > len(want):
            rule = "7.1" if want[-1] in self.eos else "5.3"
            self.fail(rule, want, emitted, None, n + len(want))
        if r["accepted"] != g["accepted"]:
            self.fail("5.3", f"{g['accepted']} accepted", r["accepted"])

    def kept(self, first: int, last: int, rule: str, number: int | None) -> None:
        """Keys and values that became live at positions first..last-1.

        Where no draft has run, a wrong row that is neither empty nor another position's comes of a
        wrong model: of layer l where keys or values alone are wrong, else of the layer before.
        """
        for kind, x in self.stored.items():
            if x.shape[2] < last:
                expected = f"{kind} at {self.vectors[kind].shape[2]} positions"
                self.fail(rule, expected, x.shape[2])
        undrafted = number is None or not self.s["exit_layer"]
        for layer, position in np.ndindex(self.layers, last):
            wrong: list[Broken] = []
            for kind, x in self.stored.items() if position >= first else ():
                golden, found = self.vectors[kind][layer].swapaxes(0, 1), x[layer, :, position]
                try:
                    self.compare(rule, kind, golden[position], found, number, layer, position)
                except Broken as broken:
                    wrong.append(broken)
                    near = error(golden, found).max((1, 2)).min() <= self.report.tolerance
                    if undrafted and found.any() and not near:
                        broken.rule = "1.3"
            if wrong:
                worst = wrong[0]
                if len(wrong) == 2:
                    worst.part = "11.5, 11.4" if position else "11.3, 11.1; 11.5: o_proj"
                    worst.part = worst.part if layer else "11.1, 11.2"
                    if layer and worst.rule == "1.3":
                        worst.layer = layer - 1
                        worst.expected = f"{worst.expected} of layer {layer}"
                elif "values" in str(worst.expected):
                    worst.part = "11.5: v_proj"
                else:
                    worst.part = "11.4.5" if "model" in self.golden else "11.4"
                    worst.part = worst.part if position else "11.5: k_proj"
                raise worst


def check(trace: dict, tolerance: float | None = None) -> Report:
    """Holds a trace against the golden vectors. Raises Malformed."""
    if not isinstance(trace, dict) or trace.get("format") != "layerskip-trace-1":
        raise Malformed('the trace is not a JSON object with "format": "layerskip-trace-1"')
    dtype, batches = trace.get("dtype", "float64"), trace.get("batches", [])
    cases = trace.get("cases", [] if batches else None)
    if dtype not in [*TOLERANCE]:
        raise Malformed(f"dtype is {dtype!r:.40}, not float64 or float32")
    if not isinstance(cases, list) or (not cases and not batches):
        raise Malformed('"cases" is not a list of cases')
    wanted = committed()
    golden = {case["name"]: case for case in wanted["cases"]}
    names = [well_formed(case, golden) for case in cases]
    if len(set(names)) < len(names):
        raise Malformed(f"case {Counter(names).most_common(1)[0][0]} is there twice")
    missing = [name for name in golden if name not in names]
    grouped = well_formed_batches(batches, wanted["batches"], golden)
    from safetensors.numpy import load_file  # here: --help needs it not

    left = [b["name"] for b in wanted["batches"] if all(b is not group for _, group in grouped)]
    report = Report(dtype, TOLERANCE[dtype] if tolerance is None else tolerance, missing, left)
    vectors: dict = {}
    for part in PARTS:
        vectors |= load_file(GOLDEN / f"{part}{dtype}.safetensors")
    try:
        check_filters(trace.get("filters"), wanted["filters"], report)
        check_cases(cases, golden, vectors, report)
        rows = {k: x for k, x in vectors.items() if k.endswith(("logits", "exit_queries"))}
        for traced, group in grouped:
            sequences = {n: Case({}, golden[n], rows, report) for n in group["sequences"]}
            for name, case in sequences.items():
                case.label = f"{group['name']}, sequence {name}"
            Batch(traced, group, sequences).walk()
            report.batches += 1
    except Broken as broken:
        report.broken = broken
    return report


def check_cases(cases: list[dict], golden: dict, vectors: dict, report: Report) -> None:
    """Plain cases come first. Raises Broken."""
    order = lambda case: (case["settings"]["exit_layer"] > 0, len(case["prompt"]) > 1)
    for case in sorted(cases, key=order):
        drafts, before = case["settings"]["exit_layer"] > 0, report.compared["logits"]
        try:
            Case(case, golden[case["name"]], vectors, report).walk()
        except Broken as broken:
            more = [k for k, n in report.golden.items() if report.compared[k] < n]
            more = [k for k in more if (k, broken.rule) != ("filters", "1.3")]
            more += ["logits of plain cases"] * (drafts and not report.right)
            if more and broken.rule in ("1.3", "3.2", "4.2", "4.3", "5.1.2", "5.2", "6.2"):
                broken.found = f"{broken.found} (nearer the cause: give {', '.join(more)})"
            raise
        report.cases += 1
        if not drafts and report.compared["logits"] > before:
            report.right.add(case["name"])


class Batch:
    """One traced batch: its sequences beside their golden cases, their lanes and slots."""

    def __init__(self, traced: dict, wanted: dict, cases: dict[str, Case]):
        self.traced, self.wanted, self.cases = traced, wanted, cases
        self.lane: dict[str, int] = {}  # of each sequence that has joined
        self.before: dict[str, Case | None] = {}  # who had that lane before it
        self.tables: dict[str, list[int]] = {}  # live slots of the sequences that have not ended

    def walk(self) -> None:
        """All steps."""
        steps = self.traced["steps"]
        for number, step in enumerate(steps):
            later = {e["sequence"] for other in steps[number:] for e in other}
            for e in step:
                self.place(e, later)
            for e in step:
                self.slots(e, step)
            now = {e["sequence"]: copy(self.cases[e["sequence"]]) for e in step}
            for e in step:
                name = e["sequence"]
                try:
                    self.cases[name].step(e)
                except Broken as broken:
                    own = now.pop(name)
                    rule, says = mixed_up(broken, e, own, [*now.values()], self.before[name])
                    broken.rule, broken.found = rule, f"{broken.found}{says}"
                    raise
                case = self.cases[name]
                self.tables[name] = e.get("slots", [])[: e["length"] if case.now else 0]
        for name in self.cases:
            self.finish(name)

    def finish(self, name: str) -> None:
        """12.1: nothing is left of a sequence that has had its last round."""
        try:
            self.cases[name].finish()
        except Broken as broken:
            broken.rule, broken.found = "12.1", f"{broken.found} (by an EOS of another? 12.6)"
            raise

    def place(self, e: dict, later: set[str]) -> None:
        """12.10: nobody else is in the lane, and the sequence has not been in another."""
        name, lane = e["sequence"], e["lane"]
        there = [other for other in self.lane if self.lane[other] == lane and other != name]
        if name not in self.lane:
            self.before[name] = self.cases[there[-1]] if there else None
        for other in there:
            if other not in later:
                self.finish(other)  # it left too early: this one does not come too early
            elif self.cases[other].now:
                self.cases[name].fail("12.10", f"lane {lane} is free", f"{other} in it")
        if self.lane.setdefault(name, lane) != lane:
            self.cases[name].fail("12.10", f"lane {self.lane[name]}", lane)

    def slots(self, e: dict, step: list[dict]) -> None:
        """13.1 to 13.4."""
        own, table, count = self.cases[e["sequence"]], e.get("slots"), self.wanted["slots"]
        own.report.golden["slots"] += 1
        if table is None:
            return
        own.report.compared["slots"] += 1
        known = self.tables.get(own.name, [])
        rows = len(own.tokens) + len(e["drafted"])
        if len(table) < rows:
            own.fail("13.2", f"start + k + 1 = {rows} slots", len(table))
        if len(set(table)) < len(table) or not all(0 <= slot < count for slot in table):
            own.fail("13.1", f"different slots below {count}", table)
        for p, (before, slot) in enumerate(zip(known, table)):
            if slot != before:
                own.fail("13.3", f"slot {before}", slot, None, p)
        now = {x["sequence"]: x["slots"] for x in step if "slots" in x}
        for name, other in (self.tables | now).items():
            case = self.cases[name]
            for q, slot in enumerate(other):
                if slot not in table or name == own.name:
                    continue
                p = table.index(slot)
                same = p == q and own.tokens[: p + 1] == case.tokens[: p + 1]
                if same and p < min(len(own.tokens), len(case.tokens)) - 1:  # live in both
                    continue
                kept = q < len(self.tables.get(name, []))  # live since the step before, or longer
                rule, text = "13.4" if kept else "13.1", f"slot {slot}, of position {q} of {name}"
                if table[0] == other[0]:  # meant as a shared prefix
                    rule = "13.5" if same else "13.1"
                    text += "" if same else ", after other tokens (or was it freed too early? 13.4)"
                if kept or p >= len(known):
                    own.fail(rule, "a free slot", text, None, p)


def mixed_up(broken: Broken, *entry: Any) -> tuple[str, str]:
    """mixups.mixup. Without that file, or numpy_decode.py, the rule stays as it is."""
    try:
        from mixups import mixup  # beside this file

        return mixup(broken, *entry)
    except ImportError as missing:
        return broken.rule, f" (a mix-up? {missing.name}.py, which could tell, is not here)"


def check_filters(given: Any, golden: list[dict], report: Report) -> None:
    """4.3 by itself: the ids that are kept of given logits."""
    report.golden["filters"] = len(golden)
    if given is None:
        return
    if not isinstance(given, list) or [*map(whole_numbers, given)] != [True] * len(golden):
        raise Malformed(f"filters is not a list of {len(golden)} lists of ids")
    report.compared["filters"] = len(golden)
    for number, (found, f) in enumerate(zip(given, golden)):
        if sorted(found) != f["kept"]:
            rule = "4.3.2" if f["top_p"] < 1 else "4.3.1"
            raise Broken(rule, f"ids {f['kept']} from filter {number} of cases.json", found)


def whole_numbers(x: Any) -> bool:
    """Whether x is a list of ints."""
    return isinstance(x, list) and all(type(item) is int for item in x)


def well_formed(case: Any, golden: dict[str, dict]) -> str:
    """The name of a golden case, with rounds of the right kinds of values. Raises Malformed."""
    name = case.get("name") if isinstance(case, dict) else None
    if not isinstance(name, str) or name not in golden:
        raise Malformed(f"not a case with a name of cases.json: {json.dumps(case)[:60]}")
    if not isinstance(case.get("settings"), dict) or not isinstance(case.get("rounds"), list):
        raise Malformed(f"case {name}: settings is not an object, or rounds is not a list")
    given, wanted = ({"prompt": c.get("prompt")} | c["settings"] for c in (case, golden[name]))
    for key in wanted | given:
        found, expected = (json.dumps(s[key]) if key in s else "absent" for s in (given, wanted))
        if "absent" in (found, expected) or given[key] != wanted[key]:
            raise Malformed(f"case {name}: {key} is {found:.40}, in cases.json {expected:.40}")
    for number, r in enumerate(case["rounds"]):
        for key in "drafted emitted accepted length start".split():
            value = ({"start": 0} | r).get(key) if isinstance(r, dict) else None
            if not whole_numbers(value if key in ("drafted", "emitted") else [value]):
                raise Malformed(f"case {name}, round {number}: {key} is not made of whole numbers")
    return name


def well_formed_batches(
    batches: Any, wanted: list[dict], golden: dict[str, dict]
) -> list[tuple[dict, dict]]:
    """The batches of a trace beside the golden ones. Raises Malformed."""
    names, found = {group["name"]: group for group in wanted}, []
    try:
        for b in batches:
            group = names[b["name"]]
            for number, step in enumerate(b["steps"]):
                at = f"batch {group['name']}, step {number}"
                for e in step:
                    name, lane = e["sequence"], e["lane"]
                    inside = name in group["sequences"] and lane in range(group["lanes"])
                    if not inside or not whole_numbers([lane, *e.get("slots", [])]):
                        raise Malformed(f"{at}: {name!r:.40} in lane {lane!r:.40}, or its slots")
                    case = {key: golden[name][key] for key in ("name", "prompt", "settings")}
                    well_formed(case | {"rounds": [e]}, golden)
                if any(len({e[key] for e in step}) < len(step) for key in ("sequence", "lane")):
                    raise Malformed(f"{at} has a lane or a sequence twice")
            found.append((b, group))
    except (KeyError, TypeError, AttributeError) as problem:
        raise Malformed(f"batches are not as in SERVING.md, 20.2: {problem!r:.60}") from None
    return found


def main() -> None:
    p = argparse.ArgumentParser(prog="check.py", description="Which rule does a trace break first?")
    p.add_argument("trace", type=Path, metavar="TRACE.json")
    p.add_argument("--tolerance", type=float, help="instead of those of 10.5")
    args = p.parse_args()
    try:
        report = check(json.loads(args.trace.read_text(encoding="utf-8")), args.tolerance)
    except (OSError, ValueError, RecursionError) as problem:
        p.exit(2, f"check.py: {args.trace}: {problem}\n")
    print(report)
    raise SystemExit(report.broken is not None)


if __name__ == "__main__":
    main()
