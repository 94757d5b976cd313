"""Which rule of SPEC.md does a port break first? Holds its trace of the golden cases against the golden vectors.

    python porting/check.py TRACE.json            exit code 0: every rule holds; 1: the first that does not; 2: not a trace

NumPy and safetensors are all that it needs. The format of traces is section 10 of SPEC.md. Rounds count from 0.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

GOLDEN = Path(__file__).parent / "golden"
TOLERANCE = {"float64": 1e-5, "float32": 1e-4}  # of the largest number of a row, or of 1: SPEC.md, 10.5

RULES = {
    "3.1": "between rounds, all known tokens but the last are live",
    "3.2": "live keys and values are those of plain decoding",
    "3.4": "emitted tokens are the verifier's, never the draft's",
    "4.2": "greedy: the largest logit",
    "4.3": "sampling: argmax(filter(logits / T) + g(seed, position of the token))",
    "5.0": "a round drafts at most limit = min(d, end - n - 1) tokens",
    "5.1": "layers 0..E-1 run for the last drafted token too: k + 1 exit queries",
    "5.1.2": "q_i is the hidden state that enters layer E",
    "5.1.3": "drafting stops at the limit and after EOS, no sooner and no later",
    "5.1.4": "drafting stops where the exit's top probability is at or below the threshold, and only there",
    "5.2": "rows q_0..q_k go through layers E..L-1 at positions n-1..n-1+k",
    "5.3": "the verifier's tokens are emitted up to and with the first that was not foreseen",
    "5.4": "length grows by the number of emitted tokens",
    "6.2": "prefill runs x_0..x_{n-2} through all layers; length := n - 1",
    "7.1": "the text ends with an EOS",
    "7.3": "the text ends at the length cap, and not before",
    "7.4": "the text ends where the context is full, and not before",
    "7.5": "plain decoding drafts nothing",
}


class Malformed(ValueError):
    """Not a trace of the golden cases."""


class Broken(Exception):
    """The first broken rule: its number, where (round, layer, position; None where there is no such thing), and what was seen."""

    def __init__(self, rule: str, expected: object, found: object, round: int | None = None, layer: int | None = None, position: int | None = None):
        self.rule, self.round, self.layer, self.position = rule, round, layer, position
        self.case: str | None = None
        self.expected, self.found = expected, found

    def __str__(self):
        places = [f"{name} {at}" for name in ("round", "layer", "position") if (at := getattr(self, name)) is not None]
        return f"{', '.join([f'case {self.case}', *places])}: rule {self.rule} is broken ({RULES[self.rule]}): expected {self.expected}, found {self.found}"


def compare(rule: str, golden: np.ndarray, found: np.ndarray, tolerance: float, **where: int | None) -> None:
    """Vectors (..., n) of one place: raises Broken where they differ. NaN differs from everything."""
    off = np.nan_to_num(np.abs(found - golden) / np.maximum(1, np.abs(golden).max(-1, keepdims=True)), nan=np.inf)
    if off.max() > tolerance:
        at = np.unravel_index(off.argmax(), off.shape)
        raise Broken(rule, f"{golden[at]:.9g} at {[int(i) for i in at]}", f"{found[at]:.9g}", **where)


class Case:
    """One traced case beside the golden one. Walks both in the order of section 5 and raises Broken at the first difference."""

    def __init__(self, traced: dict, golden: dict, vectors: dict[str, np.ndarray], layers: int, context: int, tolerance: float):
        self.traced, self.golden, self.layers, self.tolerance = traced, golden, layers, tolerance
        self.vectors: dict[str, Any] = {kind: vectors.get(f"{golden['name']}.{kind}") for kind in ("exit_queries", "logits", "keys", "values")}
        self.s, self.tokens, self.row = golden["settings"], list(golden["prompt"]), 0
        self.end = min(len(self.tokens) + self.s["max_new_tokens"], context)
        self.cap = "7.4" if self.end == context else "7.3"
        self.choice = "4.3" if self.s["temperature"] else "4.2"

    def array(self, owner: dict, kind: str, shape: tuple) -> np.ndarray | None:
        """Numbers of the trace, None where it has none; None in `shape` leaves a dimension open. Raises Malformed on another shape."""
        if kind not in owner:
            return None
        try:
            x = np.array(owner[kind], dtype=np.float64)
        except (TypeError, ValueError, OverflowError):
            raise Malformed(f"case {self.golden['name']}: {kind} is not an array of numbers") from None
        if len(x.shape) != len(shape) or any(b is not None and a != b for a, b in zip(x.shape, shape)):
            raise Malformed(f"case {self.golden['name']}: {kind} has shape {x.shape}, not {str(shape).replace('None', 'any')}")
        return x

    def walk(self) -> None:
        """All rounds, and what is live between them."""
        self.kept(0, len(self.tokens) - 1, "6.2", None)
        for number, r in enumerate(self.traced["rounds"]):
            if number == len(self.golden["rounds"]):
                raise Broken("7.1" if self.tokens[-1] in self.s["eos"] else self.cap, "the end of the text", "another round", number, position=len(self.tokens))
            g, n = self.golden["rounds"][number], len(self.tokens)
            if r.get("start", n - 1) != n - 1:
                raise Broken("3.1" if number else "6.2", n - 1, r["start"], number)
            self.draft(number, r, g, n)
            self.verify(number, r, g, n)
            self.accept(number, r, g, n)
            if r["length"] != g["length"]:
                raise Broken("5.4", g["length"], r["length"], number)
            self.kept(n - 1, g["length"], "3.2", number)
            self.tokens, self.row = self.tokens + r["emitted"], self.row + len(g["drafted"]) + 1
        if len(self.traced["rounds"]) < len(self.golden["rounds"]):
            raise Broken(self.cap, "another round", "the end of the text", len(self.traced["rounds"]), position=len(self.tokens))

    def draft(self, number: int, r: dict, g: dict, n: int) -> None:
        """5.0 and 5.1, row by row."""
        drafted, want, e = r["drafted"], g["drafted"], self.s["exit_layer"]
        if not e and drafted:
            raise Broken("7.5", [], drafted, number)
        limit = min(self.s["draft_len"], self.end - n - 1) if e else 0
        queries = None if self.vectors["exit_queries"] is None else self.array(r, "exit_queries", (None, self.vectors["exit_queries"].shape[1]))
        for i in range(len(want) + 1):
            here = dict(round=number, position=n - 1 + i)
            if queries is not None:
                if i == len(queries):
                    raise Broken("5.1", f"{len(want) + 1} exit queries", len(queries), layer=e, **here)
                compare("5.1.2", self.vectors["exit_queries"][self.row + i], queries[i], self.tolerance, layer=e, **here)
            if i in (len(want), len(drafted)) and len(want) != len(drafted):
                goes_on = "5.0" if i == limit else "5.1.3" if i and want[-1] in self.s["eos"] else "5.1.4"
                rule = goes_on if i == len(want) else "5.1.4" if self.s["min_confidence"] else "5.1.3"
                raise Broken(rule, f"{len(want)} drafted tokens", len(drafted), layer=e, **here)
            if i < len(want) and drafted[i] != want[i]:
                doubt = "" if queries is not None else " (give exit_queries to see whether 5.1.2 broke before)"
                raise Broken(self.choice, f"drafted token {want[i]}", f"{drafted[i]}{doubt}", number, e, n + i)

    def verify(self, number: int, r: dict, g: dict, n: int) -> None:
        """5.2: logits of the emitted rows at least, of all k + 1 if the trace has them."""
        logits = self.array(r, "logits", (None, self.vectors["logits"].shape[1]))
        if logits is None:
            return
        if not len(g["emitted"]) <= len(logits) <= len(g["drafted"]) + 1:
            raise Broken("5.2", f"logits of {len(g['drafted']) + 1} rows", len(logits), number, self.layers)
        for i, row in enumerate(logits):
            compare("5.2", self.vectors["logits"][self.row + i], row, self.tolerance, round=number, layer=self.layers, position=n - 1 + i)

    def accept(self, number: int, r: dict, g: dict, n: int) -> None:
        """3.4, 4, 5.3 and 7.1, token by token."""
        emitted, want = r["emitted"], g["emitted"]
        for i, token in enumerate(want):
            if i == len(emitted):
                raise Broken("5.3", want, emitted, number, position=n + i)
            if emitted[i] != token:
                rule = "3.4" if r["drafted"][i : i + 1] == [emitted[i]] else self.choice
                doubt = "" if "logits" in r else " (give logits to see whether 5.2 broke before)"
                raise Broken(rule, f"token {token}", f"{emitted[i]}{doubt}", number, self.layers, n + i)
        if len(emitted) > len(want):
            raise Broken("7.1" if want[-1] in self.s["eos"] else "5.3", want, emitted, number, position=n + len(want))
        if r["accepted"] != g["accepted"]:
            raise Broken("5.3", f"{g['accepted']} accepted", r["accepted"], number)

    def kept(self, first: int, last: int, rule: str, number: int | None) -> None:
        """Keys and values that became live at positions first..last-1."""
        for kind in ("keys", "values"):
            golden = self.vectors[kind]
            if golden is None or (found := self.array(self.traced, kind, (*golden.shape[:2], None, golden.shape[3]))) is None:
                continue
            if found.shape[2] < last:
                raise Broken(rule, f"{kind} at {golden.shape[2]} positions", found.shape[2], number)
            for position in range(first, last):
                for layer in range(self.layers):
                    compare(rule, golden[layer, :, position], found[layer, :, position], self.tolerance, round=number, layer=layer, position=position)


def check(trace: dict, tolerance: float | None = None) -> Broken | None:
    """The first broken rule of a trace; None when all hold. Raises Malformed."""
    if not isinstance(trace, dict) or trace.get("format") != "layerskip-trace-1":
        raise Malformed('the trace is not a JSON object with "format": "layerskip-trace-1"')
    dtype = trace.get("dtype", "float32")
    if dtype not in TOLERANCE:
        raise Malformed(f"the trace's dtype must be one of {', '.join(TOLERANCE)}, not {dtype!r:.40}")
    if not isinstance(trace.get("cases"), list) or not trace["cases"]:
        raise Malformed('"cases" must be a list of at least one case')
    golden = {case["name"]: case for case in json.loads((GOLDEN / "cases.json").read_text())["cases"]}
    config, vectors = json.loads((GOLDEN / "model" / "config.json").read_text()), load_file(GOLDEN / f"{dtype}.safetensors")
    tolerance = TOLERANCE[dtype] if tolerance is None else tolerance
    for case in trace["cases"]:
        well_formed(case, golden)
    for case in trace["cases"]:
        try:
            Case(case, golden[case["name"]], vectors, config["num_hidden_layers"], config["max_position_embeddings"], tolerance).walk()
        except Broken as broken:
            broken.case = case["name"]
            return broken
    return None


def well_formed(case: Any, golden: dict[str, dict]) -> None:
    """Raises Malformed unless `case` is a golden one, with rounds of the right kinds of values."""
    if not isinstance(case, dict) or not isinstance(case.get("name"), str) or case["name"] not in golden:
        raise Malformed(f"a case is not an object with a name of cases.json: {json.dumps(case)[:60]}")
    name = case["name"]
    for key in ("prompt", "settings"):
        if case.get(key) != golden[name][key]:
            raise Malformed(f"case {name}: {key} is not that of cases.json")
    if not isinstance(case.get("rounds"), list):
        raise Malformed(f"case {name}: rounds is not a list")
    for number, r in enumerate(case["rounds"]):
        for key in ("drafted", "emitted", "accepted", "length", "start"):
            value = r.get(key, 0 if key == "start" else None) if isinstance(r, dict) else None
            items = value if key in ("drafted", "emitted") else [value]
            if not isinstance(items, list) or not all(type(item) is int for item in items):
                raise Malformed(f"case {name}, round {number}: {key} is missing or not made of whole numbers")


def main() -> None:
    p = argparse.ArgumentParser(prog="check.py", description="Say which rule of SPEC.md a port's trace breaks first.")
    p.add_argument("trace", type=Path, metavar="TRACE.json")
    p.add_argument("--tolerance", type=float, help="largest relative difference of vectors (default: 1e-5 in float64, 1e-4 in float32)")
    args = p.parse_args()
    try:
        trace = json.loads(args.trace.read_text(encoding="utf-8"))
        broken = check(trace, args.tolerance)
    except (OSError, ValueError, RecursionError) as error:
        p.exit(2, f"check.py: {args.trace}: {error}\n")
    if broken:
        print(broken)
        raise SystemExit(1)
    rounds = [r for case in trace["cases"] for r in case["rounds"]]
    seen = ", ".join(f"{kind} in {sum(kind in r for r in rounds)}" for kind in ("exit_queries", "logits"))
    print(f"every rule holds: {len(trace['cases'])} cases, {len(rounds)} rounds, {seen}, keys given in {sum('keys' in case for case in trace['cases'])} cases")


if __name__ == "__main__":
    main()
