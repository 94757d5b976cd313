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

COMMITTED = check.committed()
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


# --------------------------------------------------------------------------------------------------
# Planted faults. README.md lists them by their docstrings.


def others(s):
    return [o for o in s.batch.lanes if o]


class Neighbour(Sequence):
    """A sequence that knows its batch."""

    batch: Batch


class Knows(Batch):
    """A batch whose sequences know it."""

    def join(self, lane, s):
        s.batch = self
        super().join(lane, s)


class LogitsInAnotherOrder(Knows):
    """logits of a verification go back in the reverse order of the lanes"""

    def verify(self, group):
        return super().verify(group[::-1])


class QueriesOfAnotherLane(Knows):
    """exit queries are stored for the lane in the opposite place"""

    def draft(self, group):
        super().draft(group)
        swapped = [s.queries.copy() for s in group[::-1]]
        for s, queries in zip(group, swapped):
            s.queries[: len(s.drafted) + 1] = queries[: len(s.drafted) + 1]


class SeedOfTheFirstLane(Neighbour):
    """all lanes take the seed of the first"""

    def pick(self, logits, position):
        s = self.settings
        self.settings = s | {"seed": others(self)[0].settings["seed"]}
        token = super().pick(logits, position)
        self.settings = s
        return token


class NoiseByLane(Neighbour):
    """noise is drawn by lane, not by position"""

    def pick(self, logits, position):
        return super().pick(logits, self.batch.lanes.index(self))


class NoiseOfTheLongest(Neighbour):
    """noise is drawn by the position of the longest lane"""

    def pick(self, logits, position):
        ahead = max(len(o.tokens) for o in others(self)) - len(self.tokens)
        return super().pick(logits, position + ahead)


class NoiseByRow(Neighbour):
    """noise is drawn by the row of the round, not by position"""

    def pick(self, logits, position):
        return super().pick(logits, position - len(self.tokens))


class TemperatureOfTheFirstLane(Neighbour):
    """all lanes take temperature, top k and top p of the first"""

    def pick(self, logits, position):
        s, first = self.settings, others(self)[0].settings
        self.settings = s | {key: first[key] for key in ("temperature", "top_k", "top_p")}
        token = super().pick(logits, position)
        self.settings = s
        return token


class SmallestLimit(Neighbour):
    """all lanes have the smallest limit of the batch"""

    @property
    def limit(self):
        return min(min(o.settings["draft_len"], o.end - len(o.tokens) - 1) for o in others(self))


class StopsTogether(Knows):
    """all lanes stop drafting with the first that stops"""

    def draft(self, group):
        super().draft(group)
        fewest = min(len(s.drafted) for s in group)
        for s in group:
            del s.drafted[fewest:]


class ThresholdOfTheLastLane(Neighbour):
    """all lanes take the confidence threshold of the last"""

    def doubts(self, logits):
        sure = others(self)[-1].settings["min_confidence"]
        return sure > 0 and numpy_decode.softmax(logits.astype(np.float32)).max() <= sure


class EveryonesEos(Neighbour):
    """an EOS of any lane ends every lane"""

    own: list

    @property
    def eos(self):
        return sorted({token for o in others(self) for token in o.own})

    @eos.setter
    def eos(self, ids):
        self.own = ids


class EosOfTheFirstLane(EveryonesEos):
    """all lanes take the EOS ids of the first"""

    @property
    def eos(self):
        return others(self)[0].own

    @eos.setter
    def eos(self, ids):
        self.own = ids


class FewestAccepted(Knows):
    """all lanes accept as many as the lane that accepts fewest"""

    def verify(self, group):
        logits = super().verify(group)
        fewest = min(len(s.accept(s.drafted, x)) for s, x in zip(group, logits))
        for s in group:
            s.fewest = fewest
        return logits


class AcceptsFewest(Neighbour):
    """all lanes accept as many as the lane that accepts fewest"""

    fewest = None

    def accept(self, drafted, logits):
        return super().accept(drafted, logits)[: self.fewest]

    def finish(self, drafted, logits):
        r = super().finish(drafted, logits)
        self.fewest = None
        return r


class SeesEveryLane(Knows):
    """rows see the slots of other lanes up to their own position"""

    def run(self, h, first, last, rows):
        where = self.model.run_rows

        def run_rows(h, first, last, cache, positions, slots, unseen):
            for row, p in enumerate(positions):
                for s in self.lanes:
                    unseen[row, s.table[: p + 1] if s else []] = False
            return where(h, first, last, cache, positions, slots, unseen)

        self.model.run_rows = run_rows
        h = super().run(h, first, last, rows)
        del self.model.run_rows
        return h


class PositionsOfTheLongest(Knows):
    """drafted rows take the rotary positions of the longest lane"""

    def run(self, h, first, last, rows):
        where = self.model.run_rows
        ahead = max(s.length for s, _ in rows)

        def run_rows(h, first, last, cache, positions, slots, unseen):
            late = [ahead - s.length for s, _ in rows]
            return where(h, first, last, cache, positions + late, slots, unseen)

        self.model.run_rows = run_rows if last < self.model.n_layers else where
        h = super().run(h, first, last, rows)
        del self.model.run_rows
        return h


class GoesOnWhenFinished(Neighbour):
    """a finished lane has one more round"""

    late = False

    def ended(self):
        was, self.late = self.late, super().ended()
        self.end += self.late
        return was


class KeepsTheLanesLength(Knows):
    """a new sequence goes on from the length that its lane had"""

    kept: dict

    def join(self, lane, s):
        super().join(lane, s)
        self.kept = getattr(self, "kept", {})
        if lane in self.kept:
            s.length = self.kept[lane].length
        self.kept[lane] = s


class KeepsTheLanesSeed(Knows):
    """a new sequence takes the seed that its lane had"""

    kept: dict

    def join(self, lane, s):
        super().join(lane, s)
        self.kept = getattr(self, "kept", {})
        s.settings = s.settings | {"seed": self.kept.get(lane, s).settings["seed"]}
        self.kept[lane] = s


class SlotsNotTaken(Knows):
    """slots that are given stay free"""

    def hold(self, s, positions):
        free = [*self.free]
        super().hold(s, positions)
        self.free = [*free]


class FreesTheLastPage(Knows):
    """the slot of the last live position is given back with the rejected ones"""

    def hold(self, s, positions):
        super().hold(s, positions - (0 < positions == s.length and len(s.drafted) > 0))


class FreesAnotherLane(Knows):
    """with a finished sequence, the slots of the lane after it are freed"""

    def hold(self, s, positions):
        super().hold(s, positions)
        if not positions and s in self.lanes:
            other = self.lanes[(self.lanes.index(s) + 1) % len(self.lanes)]
            self.free += other.table if other else []


class SharesAnotherPrefix(Knows):
    """slots of the first positions are shared with a sequence of other tokens"""

    shared = 2

    def join(self, lane, s):
        super().join(lane, s)
        for o in others(s):
            if o is not s and (self.shared == 2 or o.tokens[: s.length + 1] == s.tokens):
                s.table[: self.shared] = o.table[: self.shared]


class SharesThePromptsLast(SharesAnotherPrefix):
    """the last position of a prompt is shared, and the first round writes it"""

    shared = 5


class LeavesEarly(Neighbour):
    """a lane is left after two rounds where another sequence waits"""

    rounds = 0

    def ended(self):
        self.rounds += 1
        return super().ended() or self.rounds == 2


class ReservesOneSlot(Knows):
    """one slot is reserved for a round, as for plain decoding"""

    def step(self):
        entries = super().step()
        for e in entries:
            e["slots"] = e["slots"][: e["start"] + 1]
        return entries


class MovesLivePositions(Knows):
    """live positions get other slots, and their content stays behind"""

    def hold(self, s, positions):
        if positions > len(s.table) and s.length > 12 and self.free:
            self.free.insert(0, s.table[3])
            s.table[3] = self.free.pop()
        super().hold(s, positions)


FAULTS = [
    (LogitsInAnotherOrder, Neighbour, "one-exit", "12.7"),
    (QueriesOfAnotherLane, Neighbour, "one-exit", "12.7"),
    (Knows, SeedOfTheFirstLane, "one-exit", "12.2"),
    (Knows, NoiseByLane, "one-exit", "12.2"),
    (Knows, NoiseByRow, "one-exit", "12.2"),
    (Knows, NoiseOfTheLongest, "few-slots", "12.2"),
    (Knows, TemperatureOfTheFirstLane, "one-exit", "12.3"),
    (Knows, SmallestLimit, "one-exit", "12.4"),
    (StopsTogether, Neighbour, "one-exit", "12.4"),
    (Knows, ThresholdOfTheLastLane, "one-exit", "12.5"),
    (Knows, EveryonesEos, "one-exit", "12.6"),
    (Knows, EosOfTheFirstLane, "one-exit", "12.6"),
    (Knows, LeavesEarly, "one-exit", "12.1"),
    (FewestAccepted, AcceptsFewest, "one-exit", "12.9"),
    (SeesEveryLane, Neighbour, "one-exit", "12.8"),
    (PositionsOfTheLongest, Neighbour, "one-exit", "12.8"),
    (Knows, GoesOnWhenFinished, "one-exit", "12.10"),
    (KeepsTheLanesLength, Neighbour, "few-slots", "12.10"),
    (KeepsTheLanesSeed, Neighbour, "few-slots", "12.10"),
    (SlotsNotTaken, Neighbour, "few-slots", "13.1"),
    (ReservesOneSlot, Neighbour, "few-slots", "13.2"),
    (FreesTheLastPage, Neighbour, "few-slots", "13.3"),
    (MovesLivePositions, Neighbour, "few-slots", "13.3"),
    (FreesAnotherLane, Neighbour, "few-slots", "13.4"),
    (SharesAnotherPrefix, Neighbour, "few-slots", "13.1"),
    (SharesThePromptsLast, Neighbour, "few-slots", "13.5"),
]


def fault_of(batch, sequence):
    return sequence if batch is Knows else batch


@pytest.mark.parametrize(
    ("batch", "sequence", "name", "rule"),
    FAULTS,
    ids=[fault_of(batch, sequence).__name__ for batch, sequence, *_ in FAULTS],
)
def test_a_planted_fault_of_batching_is_named(model, batch, sequence, name, rule):
    broken = check.check(trace(model, name, batch, sequence)).broken
    assert broken is not None, "the fault was not seen"
    assert broken.rule == rule, str(broken)


def test_every_batch_rule_that_check_names_has_a_fault_and_is_in_the_text():
    assert {rule for *_, rule in FAULTS} == set(check.BATCH_RULES)
    text = (golden.PORTING / "SERVING.md").read_text()
    for rule in check.BATCH_RULES:
        assert re.search(rf"^{re.escape(rule)} ", text, re.MULTILINE), rule


def test_the_readme_lists_the_planted_faults_of_batching():
    text = (golden.PORTING / "README.md").read_text()
    text = text.partition("## Planted faults of batching")[2].partition("\n## ")[0]
    found = re.findall(r"^\| ([a-zEX].*) \| ([\d.]+) \|$", text, re.MULTILINE)
    assert set(found) == {(fault_of(b, s).__doc__, rule) for b, s, _, rule in FAULTS}


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
    for e in (e for step in found["batches"][0]["steps"] for e in step):
        for key in ("slots", "logits", "exit_queries", "layer_runs", "start"):
            e.pop(key, None)
    assert check.check(found).broken is None


def test_the_report_counts_slots_and_names_the_batches_that_are_not_given(model):
    found = trace(model, "few-slots")
    entries = sum(map(len, found["batches"][0]["steps"]))
    del found["batches"][0]["steps"][0][0]["slots"]
    report = str(check.check(found))
    assert f"{entries - 1} of {entries} slots" in report
    assert "batches not given: one-exit, exits-in-groups" in report


def test_what_a_round_must_reserve_is_counted_in_drafted_tokens(model):
    broken = check.check(trace(model, "few-slots", ReservesOneSlot)).broken
    assert "start + k + 1 = 6 slots, found 3" in str(broken), str(broken)


@pytest.mark.parametrize("absent", ["mixups", "numpy_decode"])
def test_without_the_files_beside_it_check_names_the_decoders_rule(model, absent, monkeypatch):
    found = trace(model, "one-exit", sequence=NoiseByRow, batch=Knows)
    monkeypatch.setitem(sys.modules, absent, None)
    broken = check.check(found).broken
    assert broken.rule == "4.3" and f"{absent}.py, which could tell" in str(broken)


def test_the_batches_show_what_they_are_for(model):
    """Sequences wait, join in the middle and leave; a slot has had several owners."""
    for name, group in BATCHES.items():
        steps = trace(model, name)["batches"][0]["steps"]
        owners: dict = {}
        for e in (e for step in steps for e in step):
            for slot in e["slots"]:
                owners.setdefault(slot, set()).add(e["sequence"])
        assert (
            len(group["sequences"]) > group["lanes"] == max(map(len, steps)) or name == "few-slots"
        )
        assert max(map(len, owners.values())) > 2
        assert len({len(step) for step in steps}) > 1


def test_a_prefix_may_share_slots_where_it_is_live_and_the_same(model):
    """lane-seed-5 and lane-seed-11 have one prompt."""
    found = trace(model, "few-slots")
    shared = {}
    for e in (e for step in found["batches"][0]["steps"] for e in step):
        if e["sequence"].startswith("lane-seed"):
            table = shared.setdefault("prompt", e["slots"][:4])
            e["slots"] = [*table, *(slot + 48 for slot in e["slots"][4:])]
        else:
            e["slots"] = [slot + 48 for slot in e["slots"]]
    group = next(b for b in COMMITTED["batches"] if b["name"] == "few-slots")
    with pytest.MonkeyPatch.context() as patch:
        wider = [b | {"slots": 96} if b is group else b for b in COMMITTED["batches"]]
        patch.setattr(check, "committed", lambda: COMMITTED | {"batches": wider})
        assert check.check(found).broken is None
        for step in found["batches"][0]["steps"]:
            for e in step:
                if e["sequence"] == "lane-greedy":
                    e["slots"][0] = shared["prompt"][0]
        assert check.check(found).broken is None  # their owners have left
        for step in found["batches"][0]["steps"]:
            for e in step:
                if e["sequence"] == "lane-confidence":  # is there with both, and has other tokens
                    e["slots"][0] = shared["prompt"][0]
        assert check.check(found).broken.rule in ("13.1", "13.4")


@pytest.mark.parametrize(
    "change",
    [
        lambda b: [],
        lambda b: [3],
        lambda b: [b | {"name": "unheard-of"}],
        lambda b: [b | {"steps": 3}],
        lambda b: [b | {"steps": [3]}],
        lambda b: [b | {"steps": [[{"sequence": "plain", "lane": 0}]]}],
        lambda b: b["steps"][0][0].update(lane=3) or [b],
        lambda b: b["steps"][0][0].update(lane="0") or [b],
        lambda b: b["steps"][0][0].update(slots=[0.5]) or [b],
        lambda b: b["steps"][0][1].update(lane=b["steps"][0][0]["lane"]) or [b],
        lambda b: b["steps"][0][0].update(drafted=None) or [b],
    ],
)
def test_what_is_not_a_batch_is_refused(model, change):
    found = trace(model, "one-exit")
    with pytest.raises(check.Malformed):
        check.check(found | {"batches": change(found["batches"][0])})


def test_a_sequence_that_never_comes_or_stops_too_early_is_named(model):
    found = trace(model, "one-exit")
    found["batches"][0]["steps"][-2:] = []
    broken = check.check(found).broken
    assert broken.rule == "12.1" and "lane-confidence" in str(broken)
