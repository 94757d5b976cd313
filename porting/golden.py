"""Golden vectors for ports: what the reference drafts, verifies, accepts and keeps on a tiny checkpoint, case by case.

    python porting/golden.py                          write porting/golden/ anew: the checkpoint, cases.json, two files of vectors
    python porting/golden.py --verify                 exit code 1 and one line if the reference no longer gives what is committed
    python porting/golden.py --trace OUT [--dtype T]  the reference's own trace, for check.py (SPEC.md, section 10)

Other machines sum in other orders, so vectors are compared within a tolerance, and tokens exactly. That is sound because no
choice was close: a case whose prompt leads to a token, a filter or a confidence stop that hangs on less than MARGIN is
drawn again with another prompt. So float32 and float64 have the same tokens, and cases.json holds them once.
"""

import argparse
import json
import shutil
import sys
import tempfile
from functools import lru_cache
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import load_file, save_file
from torch import Tensor

PORTING = Path(__file__).parent
sys.path[:0] = [str(PORTING.parent), str(PORTING.parent / "tests")]

from check import TOLERANCE
from helpers import tiny_model

from cache import KVQCache
from decode import Sampling, generate, gumbel, keep_likely, new_cache
from drafters import EarlyExit, Pick
from model import Config, Llama, load_checkpoint, save_checkpoint

GOLDEN = PORTING / "golden"
DTYPES = {"float64": torch.float64, "float32": torch.float32}
MARGIN = 0.02  # in logits, and a tenth of it in probability

# Nothing here is a default that a port might have built in: the heads are wider than dim, norm and rope have numbers of their
# own. The fourth root of 625 is 5, so every mathematics library finds the same rotary frequencies.
SHAPE = Config(vocab_size=64, dim=24, hidden_dim=40, n_layers=5, n_heads=4, n_kv_heads=2, head_dim=8, max_len=96, norm_eps=1e-3, rope_theta=625.0)


def settings(exit_layer: int, draft_len: int, max_new_tokens: int = 8, **changes: Any) -> dict:
    """The settings of a case (SPEC.md, 10.1): greedy and without an EOS, but for what `changes` says."""
    plain = dict(temperature=0.0, top_k=0, top_p=1.0, seed=0, min_confidence=0.0, eos=[])
    return dict(exit_layer=exit_layer, draft_len=draft_len, max_new_tokens=max_new_tokens) | plain | changes


def wanted() -> list[tuple[str, int, dict, set[str]]]:
    """(name, prompt length, settings, events that must occur) of every case; eos -1 stands for a token of the text, -2 for the prompt's last."""
    cases: list[tuple[str, int, dict, set[str]]] = [("plain", 5, settings(0, 0), set()), ("plain-sampled", 1, settings(0, 0, temperature=0.9, seed=3), set())]
    samplings: list[tuple[int, dict]] = [(1, dict(temperature=1.0)), (3, dict(temperature=0.7, top_k=12)), (6, dict(temperature=1.2, top_p=0.9))]
    for e in range(1, SHAPE.n_layers):
        for d in (1, 2, 4, 8):
            cases.append((f"greedy-E{e}-d{d}", 1 + (3 * e + d) % 12, settings(e, d), set()))
        for d, how in samplings:
            cases.append((f"sampled-E{e}-d{d}", 2 + (e + 2 * d) % 9, settings(e, d, seed=10 * e + d, **how), set()))
    sampled: dict = dict(temperature=0.8, top_k=20, top_p=0.95, seed=2**64 - 1)
    return cases + [
        ("top-k-top-p-largest-seed", 7, settings(2, 5, 16, **sampled), {"some accepted"}),
        ("prompt-of-1", 1, settings(2, 4), {"some accepted"}),
        ("prompt-of-1-all-rejected", 1, settings(1, 3), {"all rejected"}),
        ("prompt-of-1-new-token-1", 1, settings(2, 4, 1), {"limit 0"}),
        ("prompt-of-60-crosses-64", 60, settings(2, 5), {"some accepted"}),
        ("prompt-of-64-sampled", 64, settings(3, 4, **sampled), set()),
        ("prompt-of-65", 65, settings(2, 4), set()),
        ("longest-draft", 6, settings(3, 15, 17), {"all accepted"}),
        ("all-accepted", 4, settings(4, 3), {"all accepted"}),
        ("all-rejected-sampled", 4, settings(1, 2, temperature=1.0, seed=8), {"all rejected"}),
        ("confidence", 5, settings(2, 6, min_confidence=0.3), {"in doubt", "all accepted"}),
        ("confidence-sampled", 5, settings(3, 6, min_confidence=0.4, temperature=0.7, seed=4), {"in doubt"}),
        ("nothing-drafted", 5, settings(2, 4, min_confidence=0.5), {"nothing drafted", "in doubt"}),
        ("never-sure", 3, settings(2, 4, 6, min_confidence=0.99), {"nothing drafted"}),
        ("eos-in-accepted-run", 6, settings(3, 6, eos=[-1]), {"eos accepted"}),
        ("eos-in-accepted-run-sampled", 6, settings(3, 6, eos=[-1], temperature=0.8, seed=6), {"eos accepted"}),
        ("eos-drafted-and-rejected", 6, settings(1, 6, eos=[-1]), {"eos rejected"}),
        ("eos-is-the-verifiers", 6, settings(1, 4, eos=[-1]), {"eos the verifier's"}),
        ("eos-in-prompt", 6, settings(2, 4, eos=[-2]), set()),
        ("eos-two-ids-plain", 4, settings(0, 0, eos=[-1, 63]), set()),
        ("cap-inside-round", 8, settings(3, 6, 8), {"capped"}),
        ("cap-limit-0", 8, settings(3, 3, 9), {"limit 0", "all accepted"}),
        ("context-full", 88, settings(2, 5, 64), {"context full", "some accepted"}),
        ("context-full-sampled", 90, settings(3, 4, 64, **sampled), {"context full"}),
        ("context-full-plain", 93, settings(0, 0, 64), {"context full"}),
        ("context-one-left", 95, settings(2, 5, 64), {"context full", "limit 0"}),
    ]


KEEP_KV = {"plain", "prompt-of-1", "all-rejected-sampled", "greedy-E3-d4", "eos-in-accepted-run"}


class Recorder(EarlyExit):
    """EarlyExit that notes what its rounds leave: exit queries, logits of every row, and how narrow each choice was."""

    def __init__(self, model: Llama, cache: KVQCache, eos: tuple[int, ...] = (), min_confidence: float = 0.0, *, exit_layer: int, sampling: Sampling, notes: dict[str, list]):
        super().__init__(model, cache, eos, min_confidence, exit_layer=exit_layer)
        self.sampling, self.notes = sampling, notes

    def draft(self, tokens: list[int], limit: int, pick: Pick) -> tuple[list[int], int]:
        def noted(logits: Tensor, position: int) -> int:
            self.notes["margins"].append(margin(logits, position, self.sampling))
            return pick(logits, position)

        def unembed(h: Tensor) -> Tensor:
            logits = self.model.unembed(h)
            if self.min_confidence:
                self.notes["margins"].append(10 * abs(float(logits.float().softmax(-1).max()) - self.min_confidence))
            return logits

        self.notes["starts"].append(self.cache.length)
        return self.chain(self.step, unembed, tokens[-1], limit, noted), self.exit_layer

    def verified(self, tokens: list[int], emitted: list[int], logits: Tensor, hidden: dict[int, Tensor], pick: Pick) -> None:
        self.notes["logits"].append(logits.numpy().copy())
        self.notes["queries"].append(self.cache.queries[: len(logits)].numpy().copy())
        self.notes["margins"] += [margin(row, len(tokens) + i, self.sampling) for i, row in enumerate(logits)]


def margin(logits: Tensor, position: int, sampling: Sampling) -> float:
    """By how much the token chosen from logits (vocab,) leads the second, whether the filter is a little wider or narrower; 0 if it then changes.

    A token at the edge of top_k or top_p may be in on one machine and out on another: that is harmless unless it could win.
    """
    if sampling.temperature == 0:
        first, second = logits.double().topk(2).values.tolist()
        return first - second
    scaled, k, p = logits.double() / sampling.temperature, sampling.top_k, sampling.top_p
    leads, chosen = [], set()
    for top_k in (k - 1, k + 1) if k else (0,):
        for top_p in (p - MARGIN / 10, p + MARGIN / 10) if p < 1 else (1.0,):
            best = (keep_likely(scaled, top_k, top_p) + gumbel(sampling.seed, position, len(scaled))).topk(2)
            leads.append(float(best.values[0] - best.values[1]))
            chosen.add(int(best.indices[0]))
    return min(leads) if len(chosen) == 1 else 0.0


def decode(model: Llama, prompt: list[int], s: dict) -> tuple[list[dict], dict[str, np.ndarray], float]:
    """One case through decode.generate: rounds, vectors (rows of all rounds joined), and the narrowest choice."""
    c = model.config
    sampling = Sampling(s["temperature"], s["top_k"], s["top_p"], s["seed"])
    cache = new_cache(c, c.max_len, s["draft_len"], model.dtype, model.device)
    notes: dict[str, list] = {"starts": [], "margins": [], "logits": [], "queries": []}

    def recorder(model: Llama, cache: KVQCache, eos: tuple[int, ...], min_confidence: float) -> Recorder:
        return Recorder(model, cache, eos, min_confidence, exit_layer=s["exit_layer"], sampling=sampling, notes=notes)

    rounds, tokens = [], list(prompt)
    how: dict = dict(drafter=recorder, draft_len=s["draft_len"], min_confidence=s["min_confidence"]) if s["exit_layer"] else {}
    for r in generate(model, prompt, max_new_tokens=s["max_new_tokens"], sampling=sampling, eos=tuple(s["eos"]), cache=cache, **how):
        if not s["exit_layer"] and r.logits is not None:
            notes["starts"].append(cache.length - 1)
            notes["logits"].append(r.logits.numpy().copy())
            notes["margins"].append(margin(r.logits[0], len(tokens), sampling))
        tokens += r.emitted
        rounds.append(dict(drafted=r.drafted, accepted=r.accepted, emitted=r.emitted, start=notes["starts"][-1], length=cache.length))
    vectors = {"logits": np.concatenate(notes["logits"])}
    if notes["queries"]:
        vectors["exit_queries"] = np.concatenate(notes["queries"])
    vectors["keys"], vectors["values"] = (x[:, :, : cache.length].numpy().copy() for x in (cache.keys, cache.values))
    return rounds, vectors, min(notes["margins"])


def events(prompt: list[int], s: dict, rounds: list[dict]) -> set[str]:
    """What a case shows, in the words of section 7."""
    found, n, end = set(), len(prompt), min(len(prompt) + s["max_new_tokens"], SHAPE.max_len)
    for r in rounds if s["exit_layer"] else []:
        limit, k, a = min(s["draft_len"], end - n - 1), len(r["drafted"]), r["accepted"]
        last = r["drafted"][-1] if k else None
        shown = {
            "limit 0": limit == 0,
            "capped": 0 < k == limit < s["draft_len"],
            "nothing drafted": k == 0 < limit,
            "in doubt": 0 < k < limit and last not in s["eos"],
            "all accepted": 0 < k == a < len(r["emitted"]),
            "some accepted": 0 < a < k,
            "all rejected": a == 0 < k,
            "eos accepted": 1 < k == a == len(r["emitted"]),
            "eos rejected": last in s["eos"] and a < k,
            "eos the verifier's": r["emitted"][-1] in s["eos"] and a < len(r["emitted"]),
        }
        found |= {event for event, here in shown.items() if here}
        n += len(r["emitted"])
    length = len(prompt) + sum(len(r["emitted"]) for r in rounds)
    return found | ({"context full"} if length == SHAPE.max_len else set())


def find(models: dict[str, Llama], number: int, length: int, s: dict, must: set[str]) -> tuple[dict, dict]:
    """The first of the random prompts whose case shows what it must, by a wide margin, alike in both types."""
    model, attempts = models["float64"], count()
    while True:
        random = np.random.Generator(np.random.Philox(key=number, counter=[0, 0, 0, next(attempts)]))
        prompt, here = random.integers(1, SHAPE.vocab_size, length).tolist(), dict(s)
        if -1 in s["eos"] or -2 in s["eos"]:
            text = [t for r in decode(model, prompt, s | {"eos": []})[0] for t in r["drafted"] + r["emitted"]]
            chosen = prompt[-1] if -2 in s["eos"] else text[random.integers(len(text) // 2, len(text))]
            here["eos"] = [chosen, *s["eos"][1:]]
        rounds, vectors, narrowest = decode(model, prompt, here)
        if narrowest < MARGIN or not must <= events(prompt, here, rounds):
            continue
        if s["eos"] and -2 not in s["eos"] and len(rounds) < 2:
            continue
        again, single, narrowest = decode(models["float32"], prompt, here)
        if again == rounds and narrowest > MARGIN / 2:
            return dict(prompt=prompt, settings=here, rounds=rounds), {"float64": vectors, "float32": single}


def load_models(path: Path) -> dict[str, Llama]:
    """The checkpoint in each type."""
    return {name: load_checkpoint(path, dtype) for name, dtype in DTYPES.items()}


def write(folder: Path) -> None:
    """Everything below `folder`, from nothing."""
    save_checkpoint(tiny_model(SHAPE, seed=1, damp_from=2, damping=0.25), folder / "model")
    models, cases = load_models(folder / "model"), []
    tensors: dict[str, dict[str, np.ndarray]] = {name: {} for name in DTYPES}
    for number, (name, length, s, must) in enumerate(wanted()):
        case, vectors = find(models, number, length, s, must)
        cases.append({"name": name} | case)
        for dtype in DTYPES:
            tensors[dtype] |= {f"{name}.{kind}": x for kind, x in kept(name, vectors[dtype]).items()}
    (folder / "cases.json").write_text(dump({"format": "layerskip-golden-1", "cases": cases}))
    for dtype in DTYPES:
        save_file(tensors[dtype], folder / f"{dtype}.safetensors")


def kept(name: str, vectors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Those of a case's vectors that are committed: keys and values of a few cases alone."""
    return {kind: x for kind, x in vectors.items() if kind not in ("keys", "values") or name in KEEP_KV}


def dump(cases: dict) -> str:
    """JSON with a line for each round, so that a changed one shows in a diff."""
    blocks = []
    for case in cases["cases"]:
        head = ", ".join(f"{json.dumps(key)}: {json.dumps(case[key])}" for key in ("name", "prompt", "settings"))
        blocks.append(f'{{{head}, "rounds": [\n' + ",\n".join("  " + json.dumps(r) for r in case["rounds"]) + "\n]}")
    return f'{{"format": {json.dumps(cases["format"])}, "cases": [\n' + ",\n".join(blocks) + "\n]}\n"


@lru_cache
def replay(dtype: str) -> list[tuple[dict, list[dict], dict[str, np.ndarray], float]]:
    """Each committed case, and what the reference makes of it now: rounds, vectors, narrowest choice."""
    model, cases = load_models(GOLDEN / "model")[dtype], json.loads((GOLDEN / "cases.json").read_text())["cases"]
    found = ((case, *decode(model, case["prompt"], case["settings"])) for case in cases)
    return [(case, rounds, kept(case["name"], vectors), narrowest) for case, rounds, vectors, narrowest in found]


def drift() -> str | None:
    """One line on the first difference between the reference and the committed vectors; None when there is none."""
    for dtype in DTYPES:
        tensors, used = load_file(GOLDEN / f"{dtype}.safetensors"), set()
        if [case["name"] for case, *_ in replay(dtype)] != [name for name, *_ in wanted()]:
            return "cases.json does not hold the cases of golden.py, in its order"
        for case, rounds, vectors, narrowest in replay(dtype):
            if rounds != case["rounds"]:
                first = next((i for i, (a, b) in enumerate(zip(rounds, case["rounds"])) if a != b), min(len(rounds), len(case["rounds"])))
                return f"{dtype}, case {case['name']}: round {first} is no longer what cases.json says"
            if narrowest < MARGIN / 2:
                return f"{dtype}, case {case['name']}: a choice hangs on {narrowest:.1e}, less than {MARGIN / 2}"
            for name, x in ((f"{case['name']}.{kind}", x) for kind, x in vectors.items()):
                used.add(name)
                if name not in tensors or tensors[name].shape != x.shape or tensors[name].dtype != x.dtype:
                    return f"{dtype}.safetensors: {name} is missing or has another shape or type"
                off = np.abs(x - tensors[name]) / np.maximum(1, np.abs(tensors[name]).max(-1, keepdims=True))
                if not off.max() <= TOLERANCE[dtype]:
                    return f"{dtype}.safetensors: {name} is off by {off.max():.1e}, more than {TOLERANCE[dtype]}"
        if tensors.keys() - used:
            return f"{dtype}.safetensors holds {min(tensors.keys() - used)}, which no case has"
    return None


def trace(dtype: str) -> dict:
    """The reference's trace of the golden cases (SPEC.md, 10.2)."""
    cases = []
    for case, rounds, vectors, _ in replay(dtype):
        row, traced = 0, []
        for r in rounds:
            rows, row = slice(row, row + len(r["drafted"]) + 1), row + len(r["drafted"]) + 1
            traced.append(r | {kind: vectors[kind][rows].tolist() for kind in ("exit_queries", "logits") if kind in vectors})
        whole = {kind: vectors[kind].tolist() for kind in ("keys", "values") if kind in vectors}
        cases.append(dict(name=case["name"], prompt=case["prompt"], settings=case["settings"], rounds=traced) | whole)
    return {"format": "layerskip-trace-1", "dtype": dtype, "cases": cases}


def main() -> None:
    p = argparse.ArgumentParser(prog="golden.py", description="Write, verify or replay the golden vectors for ports.")
    p.add_argument("--verify", action="store_true", help="compare the reference with what is committed instead of writing it")
    p.add_argument("--trace", type=Path, metavar="OUT", help="write the reference's trace of the golden cases instead")
    p.add_argument("--dtype", choices=DTYPES, default="float64", help="of the trace (default %(default)s)")
    args = p.parse_args()
    torch.set_num_threads(1)  # the bits of a product depend on the number of threads
    try:
        act(args)
    except (OSError, ValueError) as error:
        p.exit(2, f"golden.py: {error}\n")


def act(args: argparse.Namespace) -> None:
    """The command: verifies, traces or writes."""
    if args.verify:
        found = drift()
        print(f"golden.py: {found or 'the reference gives what is committed'}", file=sys.stderr if found else sys.stdout)
        raise SystemExit(bool(found))
    if args.trace:
        args.trace.write_text(json.dumps(trace(args.dtype)))
        return
    with tempfile.TemporaryDirectory() as aside:  # a run that is stopped leaves the old vectors whole
        write(Path(aside) / "golden")
        shutil.copytree(Path(aside) / "golden", GOLDEN, dirs_exist_ok=True)
    for file in sorted(file for file in GOLDEN.rglob("*") if file.is_file()):
        print(f"{file.relative_to(PORTING.parent)}  {file.stat().st_size} bytes")


if __name__ == "__main__":
    main()
