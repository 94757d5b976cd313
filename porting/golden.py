"""Golden vectors for ports: what the reference does in each case of golden/cases.json.

    python porting/golden.py                          compute golden/'s rounds and vectors anew
    python porting/golden.py --verify                 exit code 1 if the reference gives others now
    python porting/golden.py --trace OUT [--dtype T]  the reference's own trace, for check.py

Given are the checkpoints in golden/, names, prompts and settings, and the batches. A case in which
a token, a filter or a confidence stop hangs on less than MARGIN is refused (SPEC.md, 10.6). So
float32 and float64 have the same tokens.
"""

import argparse
import functools
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import load_file, save
from torch import Tensor

PORTING = Path(__file__).parent
sys.path.insert(0, str(PORTING.parent))

from check import GOLDEN, PARTS, TOLERANCE, committed, error

from decode import Sampling, accept, draft, gumbel, keep_likely, new_cache, next_token, verify
from model import Llama, load_checkpoint, prefill

DTYPES = {"float64": torch.float64, "float32": torch.float32}
MARGIN = 0.02  # in logits, and a tenth of it in probability
KEEP_KV = "plain plain-sampled prompt-of-1 all-rejected-sampled greedy-E3-d4 eos-in-accepted-run"
KEEP_KV += " linear-plain llama3-plain"

Vectors = dict[str, np.ndarray]


class Watched:
    """What draft and verify need of a model; notes its layer runs and what its exit says."""

    def __init__(self, model: Llama):
        self.model, self.config, self.embed = model, model.config, model.embed
        self.runs, self.said = np.zeros(model.config.n_layers, int), list[Tensor]()

    def run_layers(self, h: Tensor, first: int, last: int, *where: Any) -> Tensor:
        self.runs[first:last] += len(h)
        return self.model.run_layers(h, first, last, *where)

    def unembed(self, h: Tensor) -> Tensor:
        self.said.append(self.model.unembed(h))
        return self.said[-1]


def margin(logits: Tensor, position: int, sampling: Sampling) -> float:
    """By how much the token chosen from logits (vocab,) leads the second; 0 where filters decide.

    A token at the edge of top_k or top_p may be in on one machine and out on another. That is
    harmless unless it could win, so each filter is also tried a little wider and narrower.
    """
    if sampling.temperature == 0:
        first, second = logits.double().topk(2).values.tolist()
        return first - second
    scaled, k, p = logits.double() / sampling.temperature, sampling.top_k, sampling.top_p
    leads, chosen = [], set()
    for top_k in (k - 1, k + 1) if k else (0,):
        for top_p in (p - MARGIN / 10, p + MARGIN / 10) if p < 1 else (1.0,):
            noisy = keep_likely(scaled, top_k, top_p) + gumbel(sampling.seed, position, len(scaled))
            best = noisy.topk(2)
            leads.append(float(best.values[0] - best.values[1]))
            chosen.add(int(best.indices[0]))
    return min(leads) if len(chosen) == 1 else 0.0


@torch.inference_mode()
def decode(model: Llama, prompt: list[int], s: dict) -> tuple[list[dict], Vectors, float]:
    """One case: rounds, vectors (the rows of all rounds joined), and the narrowest choice."""
    c, e, tokens, margins = model.config, s["exit_layer"], list(prompt), list[float]()
    sampling = Sampling(s["temperature"], s["top_k"], s["top_p"], s["seed"])
    eos, sure = c.eos if s["eos"] is None else s["eos"], s["min_confidence"]

    def pick(logits: Tensor, position: int) -> int:
        margins.append(margin(logits, position, sampling))
        return next_token(logits, position, sampling)

    end = min(len(prompt) + s["max_new_tokens"], c.max_len)
    cache = new_cache(model, end, s["draft_len"])
    found: dict[str, list] = {"logits": [], "exit_queries": [], "layer_runs": []}
    rounds: list[dict] = []
    prefill(model, cache, prompt[:-1])
    while len(tokens) < end and not (rounds and tokens[-1] in eos):
        watched: Any = Watched(model)
        n, guesses = len(tokens), list[int]()
        if e:
            limit = min(s["draft_len"], end - n - 1)
            guesses = draft(watched, cache, tokens[-1], limit, pick, e, sure, eos)
            found["exit_queries"].append(cache.queries[: len(guesses) + 1].numpy().copy())
            tops = [float(x.float().softmax(-1).max()) for x in watched.said if sure]
            margins += [10 * abs(top - sure) for top in tops]
        logits = verify(watched, cache, tokens[-1:] + guesses, e)
        emitted = accept(guesses, logits, n, pick, eos)
        start, accepted = cache.length, sum(a == b for a, b in zip(guesses, emitted))
        cache.commit(len(emitted))
        tokens += emitted
        r = dict(drafted=guesses, accepted=accepted, emitted=emitted)
        rounds.append(r | dict(start=start, length=cache.length))
        found["logits"].append(logits.numpy())
        found["layer_runs"].append(watched.runs[None])
    vectors = {kind: np.concatenate(rows) for kind, rows in found.items() if rows}
    for kind in ("keys", "values"):
        vectors[kind] = getattr(cache, kind)[:, :, : cache.length].numpy().copy()
    return rounds, vectors, min(margins, default=1.0)


def replay(dtype: str, *parts: str) -> Iterator[tuple[dict, list[dict], Vectors]]:
    """Each case of these parts of golden/ (of all if none is named): rounds and vectors of now.

    Raises ValueError on a choice that hangs on less than MARGIN.
    """
    load = functools.cache(load_checkpoint)
    for case in committed(GOLDEN, parts or PARTS)["cases"]:
        name = case.get("model", "model")
        model = load(GOLDEN / name, DTYPES[dtype])
        rounds, vectors, narrowest = decode(model, case["prompt"], case["settings"])
        if narrowest < MARGIN and name != "ties":
            name = f"{dtype}, case {case['name']}"
            raise ValueError(f"{name}: a choice hangs on {narrowest:.1e}, less than {MARGIN}")
        yield case, rounds, vectors


def kept(case: dict, vectors: Vectors) -> Vectors:
    """Those of a case's vectors that are committed: keys and values of a few cases alone."""
    kinds = [] if case.get("model") == "ties" else ["logits", "exit_queries"]
    kinds += ["keys", "values"] if case["name"] in KEEP_KV.split() else []
    return {f"{case['name']}.{kind}": vectors[kind] for kind in kinds if kind in vectors}


def filters(*parts: str) -> list[dict]:
    """The filters of cases.json, with the ids that the reference keeps."""
    found = committed(GOLDEN, parts or PARTS)["filters"]
    for f in found:
        scaled = torch.tensor(f["logits"], dtype=torch.float64) / f["temperature"]
        f["kept"] = keep_likely(scaled, f["top_k"], f["top_p"]).isfinite().nonzero()[:, 0].tolist()
    return found


def write() -> None:
    """Computes golden/'s rounds, kept ids and vectors anew."""
    files: dict[str, bytes] = {}
    for part in PARTS:
        cases = {}
        for dtype in DTYPES:
            found = list(replay(dtype, part))
            tensors: Vectors = {}
            for case, _, vectors in found:
                tensors |= kept(case, vectors)
            files[f"{part}{dtype}.safetensors"] = save(tensors)
            cases[dtype] = [case | {"rounds": rounds} for case, rounds, _ in found]
        if cases["float64"] != cases["float32"]:
            raise ValueError("the rounds in float32 are not those in float64")
        files[f"{part}cases.json"] = dump(cases["float64"], part).encode()
    for name, data in files.items():
        (GOLDEN / name).write_bytes(data)


def dump(cases: list[dict], part: str) -> str:
    """JSON with a line for each round, so that a changed one shows in a diff."""
    blocks = []
    for case in cases:
        head = json.dumps({key: case[key] for key in case if key != "rounds"})[:-1]
        rounds = ",\n".join("  " + json.dumps(r) for r in case["rounds"])
        blocks.append(f'{head}, "rounds": [\n{rounds}\n]}}')
    lists = {"cases": blocks, "filters": [*map(json.dumps, filters(part))]}
    lists["batches"] = [*map(json.dumps, committed(GOLDEN, [part])["batches"])]
    joined = {key: ",\n".join(lines) for key, lines in lists.items() if lines}
    text = ", ".join(f'"{key}": [\n{lines}\n]' for key, lines in joined.items())
    return f'{{"format": "layerskip-golden-1", {text}}}\n'


def drift() -> str | None:
    """One line on the first difference between the reference and what is committed, if any."""
    if committed(GOLDEN)["filters"] != filters():
        return "the filters are no longer as in cases.json"
    for dtype in DTYPES:
        golden: Vectors = {}
        for part in PARTS:
            golden |= load_file(GOLDEN / f"{part}{dtype}.safetensors")
        tensors: Vectors = {}
        for case, rounds, vectors in replay(dtype):
            if rounds != case["rounds"]:
                return f"{dtype}, case {case['name']}: rounds are no longer as in cases.json"
            tensors |= kept(case, vectors)
        if {k: x.shape for k, x in tensors.items()} != {k: x.shape for k, x in golden.items()}:
            return f"the vectors in {dtype} have other names or shapes than the cases"
        for key, x in tensors.items():
            if not (off := error(golden[key], x).max()) <= TOLERANCE[dtype]:
                return f"{dtype}: {key} is off by {off:.1e}, more than {TOLERANCE[dtype]}"
    return None


def trace(dtype: str) -> dict:
    """The reference's trace of the golden cases (SPEC.md, 10.2)."""
    cases = []
    for case, rounds, vectors in replay(dtype):
        row = 0
        for r, runs in zip(rounds, vectors.get("layer_runs", [])):
            rows = slice(row, row := row + len(r["drafted"]) + 1)
            r["layer_runs"] = runs.tolist()
            for kind in vectors.keys() & {"exit_queries", "logits"}:
                r[kind] = vectors[kind][rows].tolist()
        cases.append({key: case[key] for key in ("name", "prompt", "settings")})
        cases[-1]["rounds"] = rounds
        if case["name"] in KEEP_KV.split():
            cases[-1] |= {kind: vectors[kind].tolist() for kind in ("keys", "values")}
    found = {"format": "layerskip-trace-1", "dtype": dtype, "cases": cases}
    return found | {"filters": [f["kept"] for f in filters()]}


def main() -> None:
    p = argparse.ArgumentParser(prog="golden.py", description="Golden vectors for ports.")
    p.add_argument("--verify", action="store_true", help="compare with what is committed instead")
    p.add_argument("--trace", type=Path, metavar="OUT", help="write the reference's trace instead")
    p.add_argument("--dtype", choices=DTYPES, default="float64", help="of the trace: %(default)s")
    args = p.parse_args()
    torch.set_num_threads(1)  # the bits of a product depend on the number of threads
    try:
        if args.verify:
            found = drift()
            print(found or "the reference gives what is committed")
            raise SystemExit(bool(found))
        if args.trace:
            args.trace.write_text(json.dumps(trace(args.dtype)))
        else:
            write()
    except (OSError, ValueError) as problem:
        p.exit(2, f"golden.py: {problem}\n")


if __name__ == "__main__":
    main()
