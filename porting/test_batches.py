"""Batches: the NumPy port's keep every rule; a fault of batching is named by a rule that helps."""

import json
import re
import sys
from contextlib import suppress

import check
import numpy_decode
import pytest
from test_porting import COMMITTED, PORTING, in_readme, planted, put

BATCHES = {b["name"]: b for b in COMMITTED["batches"]}


def trace(name, port=numpy_decode, dtype="float64"):
    """The trace of one batch; a faulty port that falls over has the steps up to there."""
    model, group, steps = port.Llama(check.GOLDEN / "model", dtype), BATCHES[name], []
    waiting = port.sequences(model, group, COMMITTED["cases"])
    with suppress(ValueError, IndexError, TypeError):
        for step in port.Batch(model, group["lanes"], group["slots"]).steps(waiting):
            steps.append(step)
            if len(steps) > 100:
                break
    found = {"format": "layerskip-trace-1", "dtype": dtype}
    return json.loads(json.dumps(found | {"batches": [{"name": name, "steps": steps}]}))


def entries(trace) -> list[dict]:
    """The rounds of a trace's first batch."""
    return [e for step in trace["batches"][0]["steps"] for e in step]


# --------------------------------------------------------------------------------------------------
# Planted faults, as edits of numpy_decode.py. README.md lists them.

LANES = "[o for o in self.batch.lanes if o]"  # for a sequence that knows its batch:
KNOWS = {"self.lanes[lane], s.length =": "s.batch = self\n        self.lanes[lane], s.length ="}
DRAFTED = "                self.draft(group)\n"
VERIFIED = "for s, logits in zip(group, self.verify(group)):"
RUN = "return self.model.run_rows(h, first, last, self,"
ENDED = "return len(self.tokens) >= self.end or self.tokens[-1] in self.eos"
HELD = "del s.table[positions:]\n"
JOINED = "self.run(self.model.embed(s.tokens[:-1]), 0, self.model.n_layers, rows)\n"
SURE = 'self.settings["min_confidence"]'


def picks(settings="self.settings", position="len(self.tokens) + row"):
    """Tokens are chosen with these settings, and the noise of this position."""
    return KNOWS | {
        "(logits, n + row, self.settings)": f"(logits, {position}, {settings})",
        "(logits[row], len(self.tokens) + row, self.settings)":
            f"(logits[row], {position}, {settings})",
    }  # fmt: skip


def of_first(*names):
    """Settings of the first lane."""
    return f"self.settings | {{name: {LANES}[0].settings[name] for name in {names}}}"


def eos_of(ids):
    """EOS ids, from those of every lane."""
    return KNOWS | {
        "self.eos = model.eos if": "self.own = model.eos if",
        "class Sequence(Decoder):\n": f"class Sequence(Decoder):\n    eos = property("
        f"lambda self: (lambda ids: {ids})([o.own for o in {LANES}]))\n",
    }


def joins_as(change):
    """A sequence that joins takes something from the one that had its lane."""
    return {JOINED: f"""{JOINED}
        had = vars(self).setdefault("had", {{}})
        before, had[lane] = had.get(lane, s), s
        {change}
"""}  # fmt: skip


def shares(count, which):
    """A sequence that joins shares its first `count` slots with others that had a round."""
    return {JOINED: f"""{JOINED}
        for o in self.lanes:
            if o and o.drafted and {which}:
                s.table[:{count}] = o.table[:{count}]
"""}  # fmt: skip


# Each fault: what is changed, the batch that shows it, its rule, and words that help.
FAULTS = {
    "logits of a verification go back in the reverse order of the lanes": (
        {"self.verify(group)": "self.verify(group[::-1])"}, "one-exit", "12.7", "(logits of lane-"),
    "exit queries are stored for the lane in the opposite place": (
        {DRAFTED: f"""{DRAFTED}
                for s, q in zip(group, [s.queries.copy() for s in group[::-1]]):
                    s.queries[: len(s.drafted) + 1] = q[: len(s.drafted) + 1]
"""}, "one-exit", "12.7", "(exit queries of lane-"),
    "all lanes take the seed of the first": (
        picks(of_first("seed")), "one-exit", "12.2", "(by the seed of lane-"),
    "noise is drawn by lane, not by position": (
        picks(position="self.batch.lanes.index(self)"),
        "one-exit", "12.2", "(by noise of its lane, "),
    "noise is drawn by the row of the round, not by position": (
        picks(position="row"), "one-exit", "12.2", "(by noise of its row, "),
    "noise is drawn by the position of the longest lane": (
        picks(position=f"max(len(o.tokens) for o in {LANES}) + row"),
        "few-slots", "12.2", "(by noise of the position of lane-"),
    "all lanes take temperature, top k and top p of the first": (
        picks(of_first("temperature", "top_k", "top_p")),
        "one-exit", "12.3", "(by temperature, top k and top p of lane-"),
    "all lanes have the smallest limit of the batch": (
        KNOWS | {'return min(self.settings["draft_len"], self.end - len(self.tokens) - 1)':
        f"""return min(
            min(o.settings["draft_len"], o.end - len(o.tokens) - 1) for o in {LANES})"""},
        "one-exit", "12.4", "(as many as by d, limit or k of lane-"),
    "all lanes stop drafting with the first that stops": (
        {DRAFTED: f"""{DRAFTED}
                for s in group:
                    del s.drafted[min(len(o.drafted) for o in group) :]
"""}, "one-exit", "12.4", "(as many as by d, limit or k of lane-"),
    "all lanes take the confidence threshold of the last": (
        KNOWS | {SURE: SURE.replace("self", f"{LANES}[-1]")},
        "one-exit", "12.5", "(threshold "),
    "an EOS of any lane ends every lane": (
        eos_of("sorted(set().union(*ids))"), "one-exit", "12.6", ", an EOS, of lane-"),
    "all lanes take the EOS ids of the first": (
        eos_of("ids[0]"), "one-exit", "12.6", "no EOS of lane-"),
    "a lane is left after two rounds where another sequence waits": (
        {ENDED: f"self.past = getattr(self, 'past', 0) + 1\n        {ENDED} or self.past == 2"},
        "one-exit", "12.1", "(by an EOS of another? 12.6)"),
    "all lanes accept as many as the lane that accepts fewest": (
        {VERIFIED: """found = self.verify(group)
            for s in group:
                s.fewest = min(len(o.accept(o.drafted, x)) for o, x in zip(group, found))
            for s, logits in zip(group, found):""",
         "self.accept(drafted, logits)": "self.accept(drafted, logits)[: self.fewest]"},
        "one-exit", "12.9", "(as many as the tokens of lane-"),
    "rows see the slots of other lanes up to their own position": (
        {"unseen[row, s.table[: p + 1]] = False": """for o in filter(None, self.lanes):
                unseen[row, o.table[: p + 1]] = False"""}, "one-exit", "12.8", "(rule 5"),
    "drafted rows take the rotary positions of the longest lane": (
        {RUN: f"""if last < self.model.n_layers:
            positions = positions + [max(o.length for o, _ in rows) - s.length for s, _ in rows]
        {RUN}"""}, "one-exit", "12.8", "(rule 5.1.2;"),
    "a finished lane has one more round": (
        {ENDED: ENDED.replace("return", "was, self.late = getattr(self, 'late', False),")
         + "\n        self.end += self.late\n        return was"}, "one-exit", "12.10", ""),
    "a new sequence goes on from the length that its lane had": (
        joins_as("s.length = before.length"), "few-slots", "12.10", ""),
    "a new sequence takes the seed that its lane had": (
        joins_as("s.settings = s.settings | {'seed': before.settings['seed']}"),
        "few-slots", "12.10", "(by the seed of lane-"),
    "slots that are given stay free": (
        {"[self.free.pop() for _ in": "[self.free[-1 - i] for i in"}, "few-slots", "13.1", ""),
    "one slot is reserved for a round, as for plain decoding": (
        {"slots=[*s.table]": "slots=s.table[: s.length + 1]"},
        "few-slots", "13.2", "start + k + 1 = 6 slots, found 3"),
    "the slot of the last live position is given back with the rejected ones": (
        {"0 if s.ended() else s.length": "0 if s.ended() else s.length - (len(s.drafted) > 0)"},
        "few-slots", "13.3", ""),
    "live positions get other slots, and their content stays behind": (
        {HELD: f"""{HELD}
        if positions > len(s.table) and s.length > 12 and self.free:
            self.free.insert(0, s.table[3])
            s.table[3] = self.free.pop()
"""}, "few-slots", "13.3", ""),
    "with a finished sequence, the slots of the lane after it are freed": (
        {HELD: f"""{HELD}
        if not positions and s in self.lanes:
            other = self.lanes[(self.lanes.index(s) + 1) % len(self.lanes)]
            self.free += other.table if other else []
"""}, "few-slots", "13.4", "of lane-"),
    "a new sequence shares slots of the first positions with one of other tokens": (
        shares(2, "True"), "few-slots", "13.1", "after other tokens"),
    "the last position of a prompt is shared, and the first round writes it": (
        shares(5, "o.tokens[: s.length + 1] == s.tokens"), "few-slots", "13.5", "of lane-"),
}  # fmt: skip


@pytest.mark.parametrize("says", FAULTS)
def test_a_planted_fault_of_batching_is_named(says):
    edits, name, rule, hint = FAULTS[says]
    broken = check.check(trace(name, planted(edits))).broken
    assert broken is not None, "the fault was not seen"
    assert broken.rule == rule and hint in str(broken), str(broken)


def test_every_batch_rule_has_a_fault_and_a_text():
    rules = {rule for _, _, rule, _ in FAULTS.values()}
    assert rules == {rule for rule in check.RULES if int(rule.partition(".")[0]) >= 12}
    text = (PORTING / "SERVING.md").read_text()
    for rule in rules:
        assert re.search(rf"^{re.escape(rule)} ", text, re.MULTILINE), rule


def test_the_readme_lists_the_faults_of_batching():
    named = {(says, rule) for says, (_, _, rule, _) in FAULTS.items()}
    assert in_readme("Planted faults of batching") == named


# --------------------------------------------------------------------------------------------------
# What holds, and what is not a batch


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("name", BATCHES)
def test_a_batch_alone_keeps_every_rule(name, dtype):
    report = check.check(trace(name, dtype=dtype))
    assert report.broken is None and "1 batches" in str(report) and report.compared["logits"] > 20


def test_tokens_and_lanes_are_enough():
    found = trace("few-slots")
    for e in entries(found):
        for key in ("slots", "logits", "exit_queries", "layer_runs", "start"):
            e.pop(key, None)
    assert check.check(found).broken is None


def test_the_report_counts_slots_and_names_the_batches_that_are_not_given():
    found = trace("few-slots")
    count = len(entries(found))
    del entries(found)[0]["slots"]
    report = str(check.check(found))
    assert f"{count - 1} of {count} slots" in report
    assert "batches not given: one-exit, exits-in-groups" in report


@pytest.mark.parametrize("absent", ["mixups", "numpy_decode"])
def test_without_the_files_beside_it_check_names_the_decoders_rule(absent, monkeypatch):
    found = trace("one-exit", planted(picks(position="row")))
    monkeypatch.setitem(sys.modules, absent, None)
    broken = check.check(found).broken
    assert broken.rule == "4.3" and f"{absent}.py, which could tell" in str(broken)


def test_a_live_prefix_may_share_slots(monkeypatch):
    """lane-seed-5 and lane-seed-11 have one prompt."""
    found, shared = trace("few-slots"), []
    for e in entries(found):
        e["slots"] = [slot + 48 for slot in e["slots"]]
        if e["sequence"].startswith("lane-seed"):
            shared = shared or [slot - 48 for slot in e["slots"][:4]]
            e["slots"][:4] = shared
    wider = [b | {"slots": 2 * b["slots"]} for b in BATCHES.values()]
    monkeypatch.setattr(check, "committed", lambda: COMMITTED | {"batches": wider})
    assert check.check(found).broken is None

    def give_first_slot(name):
        for e in entries(found):
            if e["sequence"] == name:
                e["slots"][0] = shared[0]
        return check.check(found).broken

    assert give_first_slot("lane-greedy") is None  # its owners have left
    # lane-confidence is there with both, and has other tokens
    assert give_first_slot("lane-confidence").rule in ("13.1", "13.4")


e = "batches.0.steps.0.0."


@pytest.mark.parametrize("path, value", [
    ("batches", []),
    ("batches", [3]),
    ("batches.0.name", "unheard-of"),
    ("batches.0.steps", 3),
    ("batches.0.steps", [3]),
    ("batches.0.steps", [[{"sequence": "plain", "lane": 0}]]),
    (e + "lane", 3),
    (e + "lane", "0"),
    (e + "lane", 1),
    (e + "slots", [0.5]),
    (e + "drafted", None),
])  # fmt: skip
def test_what_is_not_a_batch_is_refused(path, value):
    found = trace("one-exit")
    put(found, path, value)
    with pytest.raises(check.Malformed):
        check.check(found)


def test_a_missing_sequence_is_named():
    found = trace("one-exit")
    found["batches"][0]["steps"][-2:] = []
    broken = check.check(found).broken
    assert broken.rule == "12.1" and "lane-confidence" in str(broken)


def test_a_length_that_is_ahead_is_named_without_start():
    found = trace("few-slots")
    e = entries(found)[0]
    del e["start"], e["logits"], e["exit_queries"]
    e["drafted"][0], e["length"] = 1 - e["drafted"][0] % 2, e["length"] + 1
    broken = check.check(found).broken
    assert broken.rule == "12.10" and "(length is 1 ahead)" in str(broken)
