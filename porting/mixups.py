"""Which mix-up of sequences explains what is wrong in a batch? For check.py (SERVING.md, 12).

Each sequence is right alone, so what one of them does in a batch is looked for in the others.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np

CHOICE = ("temperature", "top_k", "top_p")


def mixup(broken: Any, e: dict, own: Any, others: list, before: Any) -> tuple[str, str]:
    """The rule that entry e of a trace breaks, and words that say why it seems so.

    broken: the rule of SPEC.md. own, others: the cases of this step, as they stand before it.
    before: the case that had the lane before own, or None.
    """
    others = [before] * (before is not None and own.number == 0) + others
    seen = [(o, found) for o in others for found in of_another(broken, e, own, o)]
    for o, (rule, says) in sorted(seen, key=lambda x: x[1][0] == "12.4"):  # the weakest evidence
        left, more = o is before, {rule for _, (rule, _) in seen} - {rule}
        also = f"; or {', '.join(sorted(more))}" if more else ""
        also = ", which has left" * left + also
        return "12.10" if left else rule, f" ({says} of {o.name}{also})"
    if broken.rule.startswith("7.") or broken.rule in ("3.1", "6.2"):
        return "12.10", ""
    if broken.rule in ("4.2", "4.3", "3.4") and own.s["temperature"]:
        for what, p in (("its lane", e["lane"]), ("its row", row_of(broken, own))):
            if picked(broken, own, own.s, p):
                return "12.2", f" (by noise of {what}, {p})"
    if broken.row is not None and others:
        return "12.8", f" (rule {broken.rule}; after another in the lane or slots also 12.10, 13.4)"
    return broken.rule, " (12.1: right where it is alone?)"


def of_another(broken: Any, e: dict, own: Any, o: Any) -> Iterator[tuple[str, str]]:
    """Rules, and what of sequence o would explain that they are broken."""
    g = o.now or {"drafted": [], "emitted": [], "start": o.golden["rounds"][-1]["length"]}
    drafted, emitted = len(e["drafted"]), len(e["emitted"])
    wants = own.now or g
    if broken.row is not None:
        for kind in ("exit_queries", "logits"):
            rows = o.vectors[kind]
            rows = rows if rows is None else rows[o.row : o.row + len(g["drafted"]) + 1]
            if rows is not None and rows.shape[1:] == broken.row.shape:
                if np.abs(rows - broken.row).max(-1).min(initial=1) < 1e-4:
                    yield "12.7", kind.replace("_", " ")
    elif broken.rule in ("4.2", "4.3", "3.4"):
        if any(g[key] and e[key] == g[key] for key in ("drafted", "emitted")):
            yield "12.7", "the tokens"
        if picked(broken, own, own.s | {"seed": o.s["seed"]}, broken.position):
            yield "12.2", "by the seed"
        if picked(broken, own, own.s | {key: o.s[key] for key in CHOICE}, broken.position):
            yield "12.3", "by temperature, top k and top p"
        if picked(broken, own, own.s, len(o.tokens) + row_of(broken, own)):
            yield "12.2", "by noise of the position"
    elif broken.rule in ("5.0", "5.1.3", "5.1.4"):
        more = drafted > len(wants["drafted"])
        yield from by_eos(e["drafted"], wants["drafted"], own, o)
        top, own_sure, sure = confidence(own, drafted), *(x.s["min_confidence"] for x in (own, o))
        if (more and broken.rule == "5.1.4") or (not more and 0 < sure and own_sure < top <= sure):
            if own_sure != sure:
                yield "12.5", f"threshold {sure}"
        elif o.now and drafted in (len(g["drafted"]), o.s["draft_len"], o.end - len(o.tokens) - 1):
            yield "12.4", "as many as by d, limit or k"
    elif broken.rule in ("5.3", "7.1", "5.4"):
        yield from by_eos(e["emitted"], wants["emitted"], own, o)
        if len(g["emitted"]) in (emitted, e["length"] - len(own.tokens) + 1):
            yield "12.9", "as many as the tokens"
    elif broken.rule in ("3.1", "6.2") and e.get("start") == g["start"]:
        yield "12.9", "the length"


def by_eos(found: list[int], wants: list[int], own: Any, o: Any) -> Iterator[tuple[str, str]]:
    """Whether an EOS of o ended these tokens of own, or one of own did not."""
    if len(found) < len(wants) and found and found[-1] in o.eos:
        yield "12.6", f"{found[-1]}, an EOS,"
    if len(found) > len(wants) and wants and wants[-1] in own.eos:
        yield "12.6", f"goes on after {wants[-1]}, no EOS"


def row_of(broken: Any, own: Any) -> int:
    """The row of the round that chose the token."""
    return broken.position - len(own.tokens)


def exit_logits(own: Any, row: int) -> np.ndarray:
    """What the exit says of a row, from the golden exit query."""
    from numpy_decode import Llama

    return Llama(own.folder, "float64").unembed(own.vectors["exit_queries"][own.row + row])


def confidence(own: Any, row: int) -> float:
    """The exit's largest probability at a row; 2 where there is no such row."""
    if own.now is None or row > len(own.now["drafted"]):
        return 2.0
    x = exit_logits(own, row)
    return float(1 / np.exp(x - x.max()).sum())


def picked(broken: Any, own: Any, settings: dict, position: int) -> bool:
    """Whether these settings and this position lead to the token that was found."""
    from numpy_decode import pick

    row = row_of(broken, own)
    at_head = broken.layer == "the head"
    logits = own.vectors["logits"][own.row + row] if at_head else exit_logits(own, row)
    return pick(logits, position, settings) == broken.found
