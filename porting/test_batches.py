"""Batches: the NumPy port's keep every rule; a fault of batching is named by a rule that helps."""

import json
import re
import sys

import check
import golden
import numpy as np
import numpy_decode
import pytest
from numpy_decode import Batch, Sequence
from test_porting import COMMITTED, PORTING, fault, in_readme, put, within

BATCHES = {b["name"]: b for b in COMMITTED["batches"]}


@pytest.fixture(scope="module")
def model():
    return numpy_decode.Llama(golden.GOLDEN / "model", "float64")


def trace(model, name, batch=Batch, sequence=Sequence):
    """The trace of one batch; a faulty port that falls over has the steps up to there."""
    cases, group = {case["name"]: case for case in COMMITTED["cases"]}, BATCHES[name]
    waiting = [
        sequence(n, model, cases[n]["prompt"], cases[n]["settings"]) for n in group["sequences"]
    ]
    steps: list = []
    try:
        for step in batch(model, group["lanes"], group["slots"]).steps(waiting):
            steps.append(step)
            if len(steps) > 100:
                break
    except (ValueError, IndexError, TypeError):
        pass
    found = {"format": "layerskip-trace-1", "batches": [{"name": name, "steps": steps}]}
    return json.loads(json.dumps(found))


def entries(trace) -> list[dict]:
    """The rounds of a trace's first batch."""
    return [e for step in trace["batches"][0]["steps"] for e in step]


# --------------------------------------------------------------------------------------------------
# Planted faults. README.md lists them by their docstrings.


class Knows(Batch):
    """A batch whose sequences know it."""

    def join(self, lane, s):
        s.batch = self
        super().join(lane, s)


def lanes(s):
    return [o for o in s.batch.lanes if o]


def sequence_fault(says, **methods):
    return Knows, fault(says, Sequence, **methods)


def batch_fault(says, **methods):
    return fault(says, Knows, **methods), Sequence


def queries_swapped(self, group):
    Batch.draft(self, group)
    swapped = [s.queries.copy() for s in group[::-1]]
    for s, queries in zip(group, swapped):
        s.queries[: len(s.drafted) + 1] = queries[: len(s.drafted) + 1]


def picks_with(*names):
    """A choice with these settings of the first lane."""
    of_first = lambda s: s.settings | {name: lanes(s)[0].settings[name] for name in names}
    return within(Sequence.pick, settings=of_first)


def picks_at(position):
    """A choice with the noise of position(self, position)."""
    return lambda s, logits, p: Sequence.pick(s, logits, position(s, p))


def smallest_limit(s):
    return min(min(o.settings["draft_len"], o.end - len(o.tokens) - 1) for o in lanes(s))


def stops_together(self, group):
    Batch.draft(self, group)
    fewest = min(len(s.drafted) for s in group)
    for s in group:
        del s.drafted[fewest:]


def last_threshold(self, logits):
    sure = lanes(self)[-1].settings["min_confidence"]
    return sure > 0 and numpy_decode.softmax(logits.astype(np.float32)).max() <= sure


def eos_of(choose):
    """The EOS ids that choose(those of every lane) gives."""
    keep = lambda s, ids: setattr(s, "own", ids)
    return property(lambda s: choose([o.own for o in lanes(s)]), keep)


class FewestAccepted(Knows):
    """all lanes accept as many as the lane that accepts fewest"""

    def verify(self, group):
        logits = super().verify(group)
        fewest = min(len(s.accept(s.drafted, x)) for s, x in zip(group, logits))
        for s in group:
            s.fewest = fewest
        return logits


class AcceptsFewest(Sequence):
    fewest = None

    def accept(self, drafted, logits):
        return super().accept(drafted, logits)[: self.fewest]

    def finish(self, drafted, logits):
        r = super().finish(drafted, logits)
        self.fewest = None
        return r


def run_with(change):
    """A pass whose positions are change(batch, rows, last, positions, unseen)."""

    def run(self, h, first, last, rows):
        where = self.model.run_rows

        def run_rows(h, first, last, cache, positions, slots, unseen):
            positions = change(self, rows, last, positions, unseen)
            return where(h, first, last, cache, positions, slots, unseen)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(self.model, "run_rows", run_rows)
            return Batch.run(self, h, first, last, rows)

    return run


def sees_every_lane(self, rows, last, positions, unseen):
    for row, p in enumerate(positions):
        for s in self.lanes:
            unseen[row, s.table[: p + 1] if s else []] = False
    return positions


def longest_positions(self, rows, last, positions, unseen):
    lengths = [s.length for s, _ in rows]
    ahead = [max(lengths) - length for length in lengths]
    return positions + ahead if last < self.model.n_layers else positions


def one_more_round(self):
    was, self.late = self.late, Sequence.ended(self)
    self.end += self.late
    return was


def joins_as(change):
    """A sequence that joins takes something from the one that had its lane: change(both)."""

    def join(self, lane, s):
        Knows.join(self, lane, s)
        self.kept = getattr(self, "kept", {})
        change(s, self.kept.get(lane, s))
        self.kept[lane] = s

    return join


def takes_length(s, before):
    s.length = before.length


def takes_seed(s, before):
    s.settings = s.settings | {"seed": before.settings["seed"]}


def frees_too_many(self, s, positions):
    Batch.hold(self, s, positions - (0 < positions == s.length and len(s.drafted) > 0))


def frees_another(self, s, positions):
    Batch.hold(self, s, positions)
    if not positions and s in self.lanes:
        other = self.lanes[(self.lanes.index(s) + 1) % len(self.lanes)]
        self.free += other.table if other else []


def shares(count, same):
    """A sequence that joins shares the slots of its first `count` positions with the others."""

    def join(self, lane, s):
        Knows.join(self, lane, s)
        for o in lanes(s):
            if o.drafted and (not same or o.tokens[: s.length + 1] == s.tokens):  # had a round
                s.table[:count] = o.table[:count]

    return join


def two_rounds(self):
    self.rounds += 1
    return Sequence.ended(self) or self.rounds == 2


def reserves_one(self):
    found = Batch.step(self)
    for e in found:
        e["slots"] = e["slots"][: e["start"] + 1]
    return found


def moves_live(self, s, positions):
    if positions > len(s.table) and s.length > 12 and self.free:
        self.free.insert(0, s.table[3])
        s.table[3] = self.free.pop()
    Batch.hold(self, s, positions)


FAULTS = [
    ("one-exit", "12.7", *batch_fault(
        "logits of a verification go back in the reverse order of the lanes",
        verify=lambda s, group: Batch.verify(s, group[::-1]))),
    ("one-exit", "12.7", *batch_fault(
        "exit queries are stored for the lane in the opposite place", draft=queries_swapped)),
    ("one-exit", "12.2", *sequence_fault(
        "all lanes take the seed of the first", pick=picks_with("seed"))),
    ("one-exit", "12.2", *sequence_fault(
        "noise is drawn by lane, not by position",
        pick=picks_at(lambda s, p: s.batch.lanes.index(s)))),
    ("one-exit", "12.2", *sequence_fault(
        "noise is drawn by the row of the round, not by position",
        pick=picks_at(lambda s, p: p - len(s.tokens)))),
    ("few-slots", "12.2", *sequence_fault(
        "noise is drawn by the position of the longest lane",
        pick=picks_at(lambda s, p: p + max(len(o.tokens) for o in lanes(s)) - len(s.tokens)))),
    ("one-exit", "12.3", *sequence_fault(
        "all lanes take temperature, top k and top p of the first",
        pick=picks_with("temperature", "top_k", "top_p"))),
    ("one-exit", "12.4", *sequence_fault(
        "all lanes have the smallest limit of the batch", limit=property(smallest_limit))),
    ("one-exit", "12.4", *batch_fault(
        "all lanes stop drafting with the first that stops", draft=stops_together)),
    ("one-exit", "12.5", *sequence_fault(
        "all lanes take the confidence threshold of the last", doubts=last_threshold)),
    ("one-exit", "12.6", *sequence_fault(
        "an EOS of any lane ends every lane", eos=eos_of(lambda ids: sorted(set().union(*ids))))),
    ("one-exit", "12.6", *sequence_fault(
        "all lanes take the EOS ids of the first", eos=eos_of(lambda ids: ids[0]))),
    ("one-exit", "12.1", *sequence_fault(
        "a lane is left after two rounds where another sequence waits",
        ended=two_rounds, rounds=0)),
    ("one-exit", "12.9", FewestAccepted, AcceptsFewest),
    ("one-exit", "12.8", *batch_fault(
        "rows see the slots of other lanes up to their own position",
        run=run_with(sees_every_lane))),
    ("one-exit", "12.8", *batch_fault(
        "drafted rows take the rotary positions of the longest lane",
        run=run_with(longest_positions))),
    ("one-exit", "12.10", *sequence_fault(
        "a finished lane has one more round", ended=one_more_round, late=False)),
    ("few-slots", "12.10", *batch_fault(
        "a new sequence goes on from the length that its lane had", join=joins_as(takes_length))),
    ("few-slots", "12.10", *batch_fault(
        "a new sequence takes the seed that its lane had", join=joins_as(takes_seed))),
    ("few-slots", "13.1", *batch_fault(
        "slots that are given stay free", hold=within(Batch.hold, free=lambda s: [*s.free]))),
    ("few-slots", "13.2", *batch_fault(
        "one slot is reserved for a round, as for plain decoding", step=reserves_one)),
    ("few-slots", "13.3", *batch_fault(
        "the slot of the last live position is given back with the rejected ones",
        hold=frees_too_many)),
    ("few-slots", "13.3", *batch_fault(
        "live positions get other slots, and their content stays behind", hold=moves_live)),
    ("few-slots", "13.4", *batch_fault(
        "with a finished sequence, the slots of the lane after it are freed",
        hold=frees_another)),
    ("few-slots", "13.1", *batch_fault(
        "a new sequence shares slots of the first positions with one of other tokens",
        join=shares(2, same=False))),
    ("few-slots", "13.5", *batch_fault(
        "the last position of a prompt is shared, and the first round writes it",
        join=shares(5, same=True))),
]  # fmt: skip


def said(batch, sequence) -> str:
    return (sequence if batch is Knows else batch).__doc__


@pytest.mark.parametrize("name, rule, batch, sequence", FAULTS, ids=[said(*f[2:]) for f in FAULTS])
def test_a_planted_fault_of_batching_is_named(model, name, rule, batch, sequence):
    broken = check.check(trace(model, name, batch, sequence)).broken
    assert broken is not None, "the fault was not seen"
    assert broken.rule == rule, str(broken)


def test_every_batch_rule_has_a_fault_and_a_text():
    assert {rule for _, rule, *_ in FAULTS} == set(check.BATCH_RULES)
    text = (PORTING / "SERVING.md").read_text()
    for rule in check.BATCH_RULES:
        assert re.search(rf"^{re.escape(rule)} ", text, re.MULTILINE), rule


def test_the_readme_lists_the_faults_of_batching():
    named = {(said(batch, sequence), rule) for _, rule, batch, sequence in FAULTS}
    assert in_readme("Planted faults of batching") == named


# --------------------------------------------------------------------------------------------------
# What holds, and what is not a batch


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("name", BATCHES)
def test_a_batch_alone_keeps_every_rule(name, dtype):
    model = numpy_decode.Llama(golden.GOLDEN / "model", dtype)
    report = check.check(trace(model, name) | {"dtype": dtype})
    assert report.broken is None and report.batches == 1 and report.compared["logits"] > 20


def test_tokens_and_lanes_are_enough(model):
    found = trace(model, "few-slots")
    for e in entries(found):
        for key in ("slots", "logits", "exit_queries", "layer_runs", "start"):
            e.pop(key, None)
    assert check.check(found).broken is None


def test_the_report_counts_slots_and_names_the_batches_that_are_not_given(model):
    found = trace(model, "few-slots")
    count = len(entries(found))
    del entries(found)[0]["slots"]
    report = str(check.check(found))
    assert f"{count - 1} of {count} slots" in report
    assert "batches not given: one-exit, exits-in-groups" in report


def test_what_a_round_must_reserve_is_counted_in_drafted_tokens(model):
    fault = batch_fault("one slot for a round", step=reserves_one)
    broken = check.check(trace(model, "few-slots", *fault)).broken
    assert "start + k + 1 = 6 slots, found 3" in str(broken), str(broken)


@pytest.mark.parametrize("absent", ["mixups", "numpy_decode"])
def test_without_the_files_beside_it_check_names_the_decoders_rule(model, absent, monkeypatch):
    by_row = sequence_fault("noise by row", pick=picks_at(lambda s, p: p - len(s.tokens)))
    found = trace(model, "one-exit", *by_row)
    monkeypatch.setitem(sys.modules, absent, None)
    broken = check.check(found).broken
    assert broken.rule == "4.3" and f"{absent}.py, which could tell" in str(broken)


def test_a_live_prefix_may_share_slots(model, monkeypatch):
    """lane-seed-5 and lane-seed-11 have one prompt."""
    found, shared = trace(model, "few-slots"), []
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
def test_what_is_not_a_batch_is_refused(model, path, value):
    found = trace(model, "one-exit")
    put(found, path, value)
    with pytest.raises(check.Malformed):
        check.check(found)


def test_a_missing_sequence_is_named(model):
    found = trace(model, "one-exit")
    found["batches"][0]["steps"][-2:] = []
    broken = check.check(found).broken
    assert broken.rule == "12.1" and "lane-confidence" in str(broken)
