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
from itertools import zip_longest
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
    "4.3": "sampling: argmax(filter(logits / T) + g(seed, the token's position)), g of 4.4",
    "4.3.1": "the k largest logits are kept, and what equals the last",
    "4.3.2": "of the rest, renormalised, the likeliest are kept until they sum to top p",
    "5.0": "a round drafts at most limit = min(d, end - n - 1) tokens",
    "5.1": "layers 0..E-1 run all k + 1 rows, the last drafted token's too",
    "5.1.2": "q_i is the hidden state that enters layer E",
    "5.1.3": "drafting stops at the limit and after EOS, no sooner and no later",
    "5.1.4": "drafting stops where the exit's top probability is not above the threshold",
    "5.2": "row q_i goes through layers E..L-1 at position n-1+i, and sees none after it",
    "5.2.1": "verification does not run layers 0..E-1 again",
    "5.3": "the verifier's tokens are emitted up to and with the first that was not foreseen",
    "5.4": "length grows by the number of emitted tokens",
    "6.2": "prefill runs x_0..x_{n-2} through all layers; length := n - 1",
    "7.1": "the text ends with an EOS",
    "7.3": "the text ends at the length cap, and not before",
    "7.4": "the text ends where the context is full, and not before",
    "7.5": "plain decoding drafts nothing",
    # Of SERVING.md:
    "12.1": "a sequence gives the rounds that it gives alone",
    "12.2": "a token's noise comes from its sequence's seed and its own position",
    "12.3": "temperature, top k and top p are the sequence's own",
    "12.4": "d and limit are the sequence's own",
    "12.5": "the confidence threshold is the sequence's own",
    "12.6": "EOS ids are the sequence's own",
    "12.7": "rows go back to the sequence that they came from",
    "12.8": "a row has its own position, and sees its own sequence alone",
    "12.9": "accepted tokens and length are the sequence's own",
    "12.10": "a sequence leaves its lane with its last round, and leaves nothing to the next",
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
    layer: int | str | None = None
    position: int | None = None
    case: str | None = None
    round: int | None = None
    hint: str = ""
    row: np.ndarray | None = None  # what was found, where rows of numbers differ
    error: float = 0.0  # of the largest number of the row

    def __str__(self):
        places = [
            f"{name} {at}".replace("layer the", "the")
            for name in ("case", "round", "layer", "position")
            if (at := getattr(self, name)) is not None
        ]
        text = f"{', '.join(places) or 'filters'}: rule {self.rule} is broken ({RULES[self.rule]})"
        text += f": expected {self.expected}, found {self.found}{self.hint}"
        if self.rule == "1.3" and PRECISE < self.error < ROUGH:
            text += " (as near as products in TF32 or bfloat16: 8.6)"
        return text


@dataclass
class Report:
    """What was held against the golden vectors, and the first broken rule."""

    dtype: str
    tolerance: float
    given: dict[str, list[str]]  # names of cases and batches
    not_given: dict[str, list[str]]
    broken: Broken | None = None
    rounds: int = 0
    golden: Counter = field(default_factory=Counter)  # arrays by name
    compared: Counter = field(default_factory=Counter)  # those of them in the trace
    right: list[str] = field(default_factory=list)  # plain cases with right logits

    def __str__(self):
        if self.broken:
            return str(self.broken)
        batches, cases = map(len, self.given.values())
        whole = not self.not_given["cases"] and self.compared == self.golden
        text = "every rule holds" if whole else "no rule is broken, as far as the trace goes"
        text += f": {cases} of {cases + len(self.not_given['cases'])} cases, {self.rounds} rounds"
        text += f", {batches} batches" * (batches > 0) + "; compared: tokens, lengths"
        text += "".join(f", {self.compared[k]} of {n} {k}" for k, n in self.golden.items())
        if not any(self.compared[k] for k in ("logits", "exit_queries", "keys", "values")):
            text += "; tokens alone do not show low precision, wrong padding or dead rows made live"
        for kind, names in self.not_given.items():
            more = f" and {len(names) - 3} more" * (len(names) > 3)
            text += f"; {kind} not given: {', '.join(names[:3])}{more}" if names else ""
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
    """A golden case, and the trace of it so far. Walks both in the order of section 5."""

    def __init__(self, golden: dict, vectors: dict, report: Report, group: str = ""):
        self.golden, self.report = golden, report
        self.name, self.s, self.tokens = golden["name"], golden["settings"], golden["prompt"]
        self.label = f"{group}, sequence {self.name}" if group else self.name
        self.folder = GOLDEN / golden.get("model", "model")
        c = json.loads((self.folder / "config.json").read_text())
        self.layers, context = c["num_hidden_layers"], c["max_position_embeddings"]
        self.eos = c["eos_token_id"] if self.s["eos"] is None else self.s["eos"]
        self.end = min(len(self.tokens) + self.s["max_new_tokens"], context)
        self.cap = "7.4" if self.end == context else "7.3"
        self.choice = "4.3" if self.s["temperature"] else "4.2"
        self.rotary = "11.4.5" if "model" in golden else "11.4"
        self.asks = ""  # where to look if the next queries or logits are wrong
        self.row = 0  # of the golden vectors: the first of this round
        self.number = 0  # of this round
        kinds = ("exit_queries", "logits", "keys", "values")
        self.vectors: Any = {kind: vectors.get(f"{self.name}.{kind}") for kind in kinds}
        self.stored: dict[str, np.ndarray] = {}  # keys and values of the trace

    @property
    def now(self) -> dict | None:
        """The golden round that comes next, if any."""
        rounds = self.golden["rounds"]
        return rounds[self.number] if self.number < len(rounds) else None

    def array(self, owner: dict, kind: str, free: int) -> np.ndarray | None:
        """Numbers of the trace in the golden shape, but for the size of dimension `free`.

        None where the trace or the golden vectors have none. Raises Malformed on another shape.
        """
        golden = self.vectors[kind]
        if golden is None or not self.counted(kind, owner):
            return None
        try:
            x = np.array(owner[kind], dtype=np.float64)
            x = x if x.size else golden.compress([], free)  # [] hides the sizes that follow
            same = x.any(free).shape == golden.any(free).shape
        except (TypeError, ValueError, OverflowError):
            same = False
        if not same:
            raise Malformed(f"case {self.name}: {kind} are not numbers shaped as {golden.shape}")
        return x

    def counted(self, kind: str, owner: dict) -> bool:
        """Whether the trace has an array that golden/ has; the report counts both."""
        self.report.golden[kind] += 1
        self.report.compared[kind] += kind in owner
        return kind in owner

    def fail(self, rule: str, *what: Any, **more: Any) -> NoReturn:
        """Raises Broken. what: expected, found, and layer and position as far as known."""
        raise Broken(rule, *what, **{"case": self.label, "round": self.number, **more})

    def compare(self, rule: str, what: str, golden: Any, found: Any, *at: Any, **more: Any) -> None:
        """Raises Broken where vectors differ; Malformed for float32 numbers called float64."""
        off = error(golden, found)
        if not off.max() > self.report.tolerance:
            return
        if self.report.dtype == "float64" and off.max() < ANGLES:
            if found.size > 8 and (found == np.float32(found)).all():
                raise Malformed(f"case {self.name}: {what} has float32 numbers: say so in dtype")
            rule = "1.3"
            more["hint"] = " (as near as with angles formed in float64: 11.4)"
        i = np.unravel_index(off.argmax(), off.shape)
        expected = f"{golden[i]:.9g} in {what} at {np.array(i).tolist()}"
        more |= dict(row=found, error=float(off.max()))
        self.fail(rule, expected, f"{found[i]:.9g}", *at, **more)

    def walk(self, traced: dict) -> None:
        """All rounds, and what is live between them."""
        for kind in ("keys", "values"):
            if (x := self.array(traced, kind, 2)) is not None:
                self.stored[kind] = x
        self.kept(0, len(self.tokens) - 1, "6.2")
        for r in traced["rounds"]:
            self.step(r)
        self.finish()

    def finish(self) -> None:
        """After the last round of the trace."""
        if self.now:
            self.fail(self.cap, "another round", "the end of the text", None, len(self.tokens))

    def step(self, r: dict) -> None:
        """The next round."""
        n, drafts, g, first = len(self.tokens), self.s["exit_layer"], self.now, self.number == 0
        if g is None:
            rule = "7.1" if self.tokens[-1] in self.eos else self.cap
            self.fail(rule, "the end of the text", "another round", None, n)
        if r.get("start", n - 1) != n - 1:
            self.fail("6.2" if first else "3.1", n - 1, r["start"])
        try:
            self.draft(r, g, n)
            if not drafts and r["length"] == g["length"]:  # else 5.4 is the cause
                self.kept(n - 1, n, "3.2")
            self.verify(r, g, n)
            self.accept(r, g, n)
        except Broken as broken:
            ahead = r["length"] - len(r["emitted"]) - (n - 1)
            if first and ahead > 0 and broken.rule in ("1.3", "4.2", "4.3", "5.1.2"):
                broken.rule, broken.hint = "6.2", f" (length is {ahead} ahead)"
            raise
        if r["length"] != g["length"]:
            hint = " (is length n - 1 after prefill? 6.2)" * (first and "start" not in r)
            self.fail("5.4", g["length"], r["length"], hint=hint)
        if drafts:
            self.kept(n - 1, g["length"], "3.2")
        if g["accepted"] < len(g["drafted"]):
            self.asks = " (after a rejection, is each key at its own position? 5.4, 3.2)"
        self.tokens, self.row = self.tokens + r["emitted"], self.row + len(g["drafted"]) + 1
        self.number += 1
        self.report.rounds += 1

    def draft(self, r: dict, g: dict, n: int) -> None:
        """5.0 and 5.1, row by row."""
        drafted, want, e = r["drafted"], g["drafted"], self.s["exit_layer"]
        if not e:
            if drafted or r.get("exit_queries"):
                self.fail("7.5", "no drafted tokens and no exit queries", "some")
            return
        limit = min(self.s["draft_len"], self.end - n - 1)
        queries = self.array(r, "exit_queries", 0)
        for i, (token, found) in enumerate(zip_longest([*want, None], drafted)):
            if queries is not None and i < len(queries):
                golden = self.vectors["exit_queries"][self.row + i]
                self.compare("5.1.2", f"q_{i}", golden, queries[i], e, n - 1 + i, hint=self.asks)
            if found == token:
                continue
            if token is not None and found is not None:
                self.fail(self.choice, f"drafted token {token}", found, EXIT, n + i)
            rule = "5.1.4" if self.s["min_confidence"] else "5.1.3"
            if token is None:  # too late
                rule = "5.1.3" if i and want[-1] in self.eos else "5.1.4"
                rule = "5.0" if i == limit else rule
            self.fail(rule, f"{len(want)} drafted tokens", len(drafted), EXIT, n - 1 + i)
        if queries is not None and len(queries) != len(want) + 1:
            self.fail("5.1", f"{len(want) + 1} exit queries", len(queries), e)

    def verify(self, r: dict, g: dict, n: int) -> None:
        """5.2: runs of layers; logits of the emitted rows at least, of all k + 1 if given."""
        rows, e = len(g["drafted"]) + 1, self.s["exit_layer"]
        runs = r["layer_runs"] if self.counted("layer_runs", r) else [rows] * self.layers
        if len(runs) != self.layers:
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
        rule, hint = "5.2", self.asks
        if not e:
            same_model_right = "plain-sampled" in self.report.right and self.rotary == "11.4"
            rule = "6.2" if same_model_right and self.number == 0 < n - 1 else "1.3"
            hint = " (see 11.6, or 11.3 in the last layer)" * bool(self.stored)  # which are right
            hint = " (see 11.4.5)" if self.rotary == "11.4.5" else hint  # all else has been shown
        for i, row in enumerate(logits):
            golden = self.vectors["logits"][self.row + i]
            self.compare(rule, f"logits_{i}", golden, row, HEAD, n - 1 + i, hint=hint)

    def accept(self, r: dict, g: dict, n: int) -> None:
        """3.4, 4, 5.3 and 7.1, token by token."""
        emitted, want = r["emitted"], g["emitted"]
        for i, (token, found) in enumerate(zip_longest(want, emitted)):
            if None in (token, found):
                rule = "7.1" if token is None and want[-1] in self.eos else "5.3"
                self.fail(rule, want, emitted, None, n + i)
            if found != token:
                rule = "3.4" if r["drafted"][i : i + 1] == [found] else self.choice
                self.fail(rule, f"token {token}", found, HEAD, n + i)
        if r["accepted"] != g["accepted"]:
            self.fail("5.3", f"{g['accepted']} accepted", r["accepted"])

    def kept(self, first: int, last: int, rule: str) -> None:
        """Keys and values that became live at positions first..last-1; 6.2: by prefill.

        Where no draft has run, a wrong row that is neither empty nor another position's comes of a
        wrong model: of layer l where keys or values alone are wrong, else of the layer before.
        """
        wrong: dict[str, np.ndarray] = {}  # (L, last - first)
        for kind, x in self.stored.items():
            golden = self.vectors[kind]
            if x.shape[2] < last:
                self.fail(rule, f"{kind} at {golden.shape[2]} positions", x.shape[2])
            off = error(golden[:, :, first:last], x[:, :, first:last]).max((1, 3))
            wrong[kind] = off > self.report.tolerance
        for layer, p in np.argwhere(sum(wrong.values()))[:1].tolist():
            kinds, position = [kind for kind in wrong if wrong[kind][layer, p]], first + p
            golden = self.vectors[kinds[0]][layer].swapaxes(0, 1)  # (positions, Hkv, hd)
            found, what = self.stored[kinds[0]][layer, :, position], f"{kinds[0]} of layer {layer}"
            number, hint = None if rule == "6.2" else self.number, ""
            elsewhere = error(golden, found).max((1, 2)).min() <= self.report.tolerance
            if (rule == "6.2" or not self.s["exit_layer"]) and found.any() and not elsewhere:
                rule, see = "1.3", self.rotary if position else "11.5: k_proj"
                if kinds == ["values"]:
                    see = "11.5: v_proj"
                elif len(kinds) == 2:
                    see = "11.5, 11.4" if position else "11.3, 11.1; 11.5: o_proj"
                    see, layer = (see, layer - 1) if layer else ("11.1, 11.2", 0)
                hint = f" (see {see})"
            at = layer, position
            self.compare(rule, what, golden[position], found, *at, hint=hint, round=number)


class Batch:
    """One traced batch: its sequences beside their golden cases, their lanes and slots."""

    def __init__(self, slots: int, cases: dict[str, Case]):
        self.count, self.cases = slots, cases
        self.lane: dict[str, int] = {}  # of each sequence that has joined
        self.before: dict[str, Case | None] = {}  # who had that lane before it
        self.tables: dict[str, list[int]] = {}  # live slots of the sequences that have not ended

    def walk(self, steps: list[list[dict]]) -> None:
        """All steps."""
        for number, step in enumerate(steps):
            later = {e["sequence"] for other in steps[number:] for e in other}
            for e in step:
                self.place(e, later)
            for e in step:
                self.slots(e, step)
            now = {e["sequence"]: copy(self.cases[e["sequence"]]) for e in step}
            for e in step:
                case = self.cases[e["sequence"]]
                try:
                    case.step(e)
                except Broken as broken:
                    self.explain(broken, e, now)
                    raise
                live = e["length"] if case.now else 0
                self.tables[case.name] = e.get("slots", [])[:live]
        for name in self.cases:
            self.finish(name)

    def explain(self, broken: Broken, e: dict, now: dict[str, Case]) -> None:
        """Gives it the rule of a mix-up that explains it. now: the cases before this step."""
        own = now.pop(e["sequence"])
        try:
            from mixups import mixup  # beside this file

            broken.rule, hint = mixup(broken, e, own, [*now.values()], self.before[own.name])
        except ImportError as missing:
            hint = f" (a mix-up? {missing.name}.py, which could tell, is not here)"
        broken.hint += hint

    def finish(self, name: str) -> None:
        """12.1: nothing is left of a sequence that has had its last round."""
        try:
            self.cases[name].finish()
        except Broken as broken:
            broken.rule, broken.hint = "12.1", " (by an EOS of another? 12.6)"
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
        """13.1 to 13.5."""
        own, count = self.cases[e["sequence"]], self.count
        if not own.counted("slots", e):
            return
        table, known = e["slots"], self.tables.get(own.name, [])
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


def check(trace: Any, tolerance: float | None = None) -> Report:
    """Holds a trace against the golden vectors. Raises Malformed."""
    wanted = committed()
    golden, groups = ({x["name"]: x for x in wanted[key]} for key in ("cases", "batches"))
    try:
        cases, batches = well_formed(trace, golden, groups, len(wanted["filters"]))
    except (KeyError, TypeError, AttributeError) as problem:
        text = "the trace is not as in SPEC.md, 10.2, or SERVING.md, 20.2"
        raise Malformed(f"{text}: {problem!r:.60}") from None
    from safetensors.numpy import load_file  # here: --help needs it not

    dtype, vectors = trace.get("dtype", "float64"), dict[str, np.ndarray]()
    for part in PARTS:
        vectors |= load_file(GOLDEN / f"{part}{dtype}.safetensors")
    given = {"batches": [x["name"] for x in batches], "cases": [x["name"] for x in cases]}
    left = {k: [x["name"] for x in wanted[k] if x["name"] not in given[k]] for k in given}
    report = Report(dtype, TOLERANCE[dtype] if tolerance is None else tolerance, given, left)
    try:
        check_filters(trace.get("filters"), wanted["filters"], report)
        check_cases(cases, golden, vectors, report)
        for b in batches:
            name, group = b["name"], groups[b["name"]]
            sequences = {n: Case(golden[n], vectors, report, name) for n in group["sequences"]}
            Batch(group["slots"], sequences).walk(b["steps"])
    except Broken as broken:
        report.broken = broken
    return report


def check_filters(given: Any, golden: list[dict], report: Report) -> None:
    """4.3 by itself: the ids that are kept of given logits."""
    report.golden["filters"], report.compared["filters"] = len(golden), len(given or [])
    for number, (found, f) in enumerate(zip(given or [], golden)):
        if sorted(found) != f["kept"]:
            rule = "4.3.2" if f["top_p"] < 1 else "4.3.1"
            raise Broken(rule, f"ids {f['kept']} from filter {number} of cases.json", found)


def check_cases(cases: list[dict], golden: dict, vectors: dict, report: Report) -> None:
    """Plain cases come first. Raises Broken."""
    order = lambda case: (case["settings"]["exit_layer"] > 0, len(case["prompt"]) > 1)
    for case in sorted(cases, key=order):
        drafts, before = case["settings"]["exit_layer"] > 0, report.compared["logits"]
        try:
            Case(golden[case["name"]], vectors, report).walk(case)
        except Broken as broken:
            more = [k for k, n in report.golden.items() if report.compared[k] < n]
            more = [k for k in more if (k, broken.rule) != ("filters", "1.3")]
            more += ["logits of plain cases"] * (drafts and not report.right)
            if more and broken.rule in ("1.3", "3.2", "4.2", "4.3", "5.1.2", "5.2", "6.2"):
                broken.hint += f" (nearer the cause: give {', '.join(more)})"
            raise
        if not drafts and report.compared["logits"] > before:
            report.right.append(case["name"])


def whole_numbers(x: Any) -> bool:
    """Whether x is a list of ints."""
    return isinstance(x, list) and all(type(item) is int for item in x)


def well_formed(trace: Any, golden: dict, groups: dict, filters: int) -> tuple[list, list]:
    """Cases and batches of a trace.

    Raises Malformed, or KeyError, TypeError or AttributeError, where it is not made as it should.
    """
    if trace["format"] != "layerskip-trace-1":
        raise Malformed('the trace has no "format": "layerskip-trace-1"')
    if (dtype := trace.get("dtype", "float64")) not in TOLERANCE:
        raise Malformed(f"dtype is {dtype!r:.40}, not float64 or float32")
    kept = trace.get("filters")
    if kept is not None and [*map(whole_numbers, kept)] != [True] * filters:
        raise Malformed(f"filters is not a list of {filters} lists of ids")
    cases, batches = trace.get("cases", []), trace.get("batches", [])
    names, rounds = [case["name"] for case in cases], []
    wrong = [name for name in names if name not in golden or names.count(name) > 1]
    if wrong or not (cases or batches):
        raise Malformed(f"these are not cases of cases.json, each once: {wrong!r:.60}")
    for name, case in zip(names, cases):
        given, wanted = ({"prompt": c["prompt"]} | c["settings"] for c in (case, golden[name]))
        for key in wanted | given:
            found, expected = (s.get(key, "absent") for s in (given, wanted))
            if found != expected:
                raise Malformed(f"case {name}: {key} is {found}, in cases.json {expected}")
        rounds += [(f"case {name}, round {i}", r) for i, r in enumerate(case["rounds"])]
    for b in batches:
        group = groups[b["name"]]
        allowed = {"sequence": {*group["sequences"]}, "lane": {*range(group["lanes"])}}
        for number, step in enumerate(b["steps"]):
            where = f"batch {b['name']}, step {number}"
            for key in allowed:
                found = [e[key] for e in step]
                if len(set(found)) < len(found) or not set(found) <= allowed[key]:
                    raise Malformed(f"{where}: {key} is there twice, or unknown: {found!r:.60}")
            rounds += [(where, e) for e in step]
    for where, r in rounds:
        for key in "drafted emitted layer_runs slots accepted length start".split():
            value = ({"layer_runs": [], "slots": [], "start": 0} | r).get(key)
            if not whole_numbers([value] if key in ("accepted", "length", "start") else value):
                raise Malformed(f"{where}: {key} is not made of whole numbers")
    return cases, batches


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
