"""LayerSkip decoding in NumPy alone: the port to read after SPEC.md, whose rules the numbers are.

Tokens are exact. Equal bits (section 8) are not tried.

    python porting/numpy_decode.py --trace OUT [--dtype float32]    the golden cases, for check.py
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from check import GOLDEN, committed

Array = np.ndarray


def read_tensors(file: Path) -> dict[str, Array]:
    """The tensors of a safetensors file (11.8)."""
    raw = file.read_bytes()
    start, tensors = 8 + int.from_bytes(raw[:8], "little"), {}
    types = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}
    header = json.loads(raw[8:start])
    for name in header.keys() - {"__metadata__"}:
        first, last = header[name]["data_offsets"]
        x = np.frombuffer(raw[start + first : start + last], types[header[name]["dtype"]])
        if x.dtype == "<u2":  # bfloat16 is the upper half of float32
            x = (x.astype(np.uint32) << 16).view(np.float32)
        tensors[name] = x.reshape(header[name]["shape"])
    return tensors


def softmax(x: Array) -> Array:
    """Over the last dimension."""
    x = np.exp(x - x.max(-1, keepdims=True))
    return x / x.sum(-1, keepdims=True)


def keep_likely(logits: Array, s: dict) -> Array:
    """4.3: filter(logits / T), float64 (V,), -inf where a token is not kept. s: settings."""
    x = logits.astype(np.float64) / s["temperature"]
    if 0 < s["top_k"] < len(x):
        x[x < np.sort(x)[-s["top_k"]]] = -np.inf
    if s["top_p"] < 1:
        order = np.argsort(-x, kind="stable")
        likely = softmax(x)[order]
        x[order[np.cumsum(likely) - likely >= s["top_p"]]] = -np.inf
    return x


def pick(logits: Array, position: int, s: dict) -> int:
    """4.1 to 4.4: the token at a position, from logits (V,). s: settings."""
    if s["temperature"] == 0:
        return int(logits.argmax())
    x = keep_likely(logits, s)
    random = np.random.Generator(np.random.Philox(key=s["seed"], counter=[0, 0, 0, position]))
    u = random.random(len(x)) * (1 - 2.0**-53) + 2.0**-54
    return int((x - np.log(-np.log(u))).argmax())


def scaled(frequency: Array, rope: dict) -> Array:
    """11.4.5: float32 (hd / 2,)."""
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return frequency
    share: Any = 0  # of the original frequency
    if kind == "llama3":
        turns = rope["original_max_position_embeddings"] / (2 * np.pi / frequency)
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        share = ((turns - low) / (high - low)).clip(0, 1)
    return (1 - share) * frequency / rope["factor"] + share * frequency


class Llama:
    """embed, layer and unembed (1.3 and 11), from a checkpoint with Hugging Face's names."""

    def __init__(self, folder: Path, dtype: str):
        c = json.loads((folder / "config.json").read_text())
        rope = c.get("rope_parameters") or c.get("rope_scaling") or {}
        self.n_layers, self.dim = c["num_hidden_layers"], c["hidden_size"]
        self.context, self.eps = c["max_position_embeddings"], c["rms_norm_eps"]
        heads, eos = c["num_attention_heads"], c.get("eos_token_id")
        self.kv_heads = c.get("num_key_value_heads") or heads
        self.head_dim = c.get("head_dim") or self.dim // heads
        self.eos = eos if isinstance(eos, list) else [] if eos is None else [eos]
        self.dtype = np.dtype(dtype)
        theta = np.float32(rope.get("rope_theta", c.get("rope_theta", 10000.0)))
        pairs = np.arange(0, self.head_dim, 2, dtype=np.float32) / np.float32(self.head_dim)
        self.frequency = scaled(1 / theta**pairs, rope)
        files = map(read_tensors, folder.glob("*.safetensors"))
        self.w = {name: x.astype(dtype) for file in files for name, x in file.items()}
        self.w.setdefault("lm_head.weight", self.w["model.embed_tokens.weight"])  # a tied head

    def norm(self, h: Array, name: str) -> Array:
        """11.1: RMSNorm of rows h (T, dim)."""
        return h / np.sqrt((h * h).mean(-1, keepdims=True) + self.eps) * self.w[f"{name}.weight"]

    def linear(self, h: Array, name: str) -> Array:
        """11.2: h (T, in) times a stored weight (out, in), transposed."""
        return h @ self.w[f"{name}.weight"].T

    def rotate(self, x: Array, positions: Array) -> Array:
        """11.4: x (T, heads, hd), turned by positions (T,)."""
        angle = positions.astype(np.float32)[:, None, None] * self.frequency
        wide = angle.astype(np.float64)
        cos, sin = (f(wide).astype(np.float32).astype(self.dtype) for f in (np.cos, np.sin))
        a, b = np.split(x, 2, -1)
        return np.concatenate([a * cos - b * sin, b * cos + a * sin], -1)

    def embed(self, tokens: list[int]) -> Array:
        """Hidden states (T, dim) of T tokens."""
        return self.w["model.embed_tokens.weight"][tokens]

    def run_layers(self, h: Array, first: int, last: int, cache: "Decoder", start: int) -> Array:
        """Layers [first, last) on rows h (T, dim) of one text, at positions from `start`."""
        positions = np.arange(start, start + len(h))
        cache.layer_runs[first:last] += len(h)
        unseen = np.arange(start + len(h)) > positions[:, None]  # 3.3
        return self.run_rows(h, first, last, cache, positions, positions, unseen)

    def run_rows(
        self, h: Array, first: int, last: int, cache: Any, at: Array, slots: Array, unseen: Array
    ) -> Array:
        """Layers [first, last) on rows h (T, dim) at positions (T,). Their keys go to slots (T,).

        unseen (T, S): which of the first S slots a row does not see.
        """
        for l in range(first, last):
            name = f"model.layers.{l}"
            x = self.norm(h, f"{name}.input_layernorm")
            parts = (self.linear(x, f"{name}.self_attn.{part}_proj") for part in "qkv")
            q, k, v = (part.reshape(len(h), -1, self.head_dim) for part in parts)
            cache.keys[l, :, slots] = self.rotate(k, at)
            cache.values[l, :, slots] = v
            keys, values = (x[l, :, : unseen.shape[1]] for x in (cache.keys, cache.values))
            shared = self.rotate(q, at).reshape(len(h), self.kv_heads, -1, self.head_dim)
            score = np.einsum("tkgd,ksd->tkgs", shared, keys) * self.head_dim**-0.5  # 11.5
            score = np.where(unseen[:, None, None], -np.inf, score)
            mixed = np.einsum("tkgs,ksd->tkgd", softmax(score), values).reshape(len(h), -1)
            h = h + self.linear(mixed, f"{name}.self_attn.o_proj")
            x = self.norm(h, f"{name}.post_attention_layernorm")
            gate, up = (self.linear(x, f"{name}.mlp.{part}_proj") for part in ("gate", "up"))
            h = h + self.linear(gate / (1 + np.exp(-gate)) * up, f"{name}.mlp.down_proj")
        return h

    def unembed(self, h: Array) -> Array:
        """Logits (T, V) of hidden states (T, dim) after any layer."""
        return self.linear(self.norm(h, "model.norm"), "lm_head")


class Decoder:
    """One generation over a KVQ cache (2).

    keys and values (L, Hkv, positions, hd), queries (d + 1, dim), length: what is live.
    """

    def __init__(self, model: Llama, prompt: list[int], settings: dict):
        self.model, self.settings, self.tokens = model, settings, list(prompt)
        self.exit, eos = settings["exit_layer"], settings["eos"]
        self.eos = model.eos if eos is None else eos  # 10.4
        self.end = min(len(prompt) + settings["max_new_tokens"], model.context)
        shape = (2, model.n_layers, model.kv_heads, self.end, model.head_dim)
        self.keys, self.values = np.zeros(shape, model.dtype)
        self.queries = np.zeros((settings["draft_len"] + 1, model.dim), model.dtype)
        self.layer_runs, self.length = np.zeros(model.n_layers, int), 0

    def prefill(self) -> None:
        """6.2: every known token but the last."""
        if len(self.tokens) > 1:
            h = self.model.embed(self.tokens[:-1])
            self.model.run_layers(h, 0, self.model.n_layers, self, 0)
        self.length = len(self.tokens) - 1

    @property
    def limit(self) -> int:
        """5.0"""
        return min(self.settings["draft_len"], self.end - len(self.tokens) - 1)

    def guess(self, drafted: list[int], h: Array) -> bool:
        """5.1.2 to 5.1.5 for h (dim,) of the last row: adds a token. False: drafting stops."""
        row, n, sure = len(drafted), len(self.tokens), self.settings["min_confidence"]
        self.queries[row] = h
        if row == self.limit or (drafted and drafted[-1] in self.eos):
            return False
        logits = self.model.unembed(h)
        if sure > 0 and softmax(logits.astype(np.float32)).max() <= sure:  # 5.1.4
            return False
        drafted.append(pick(logits, n + row, self.settings))
        return True

    def draft(self) -> list[int]:
        """5.1: layers [0, E) leave keys, values and an exit query for every row, the last too.

        7.5: E = 0 drafts nothing.
        """
        drafted: list[int] = []
        drafting = self.exit > 0
        while drafting:
            h = self.model.embed([[*self.tokens, *drafted][-1]])
            h = self.model.run_layers(h, 0, self.exit, self, self.length + len(drafted))
            drafting = self.guess(drafted, h[0])
        return drafted

    def rows(self, drafted: list[int]) -> Array:
        """What verification starts from: exit queries q_0..q_k, or the embedded token."""
        return self.queries[: len(drafted) + 1] if self.exit else self.model.embed(self.tokens[-1:])

    def verify(self, drafted: list[int]) -> Array:
        """5.2: logits (k + 1, V) from layers [E, L), which go on from the exit queries."""
        h = self.rows(drafted)
        h = self.model.run_layers(h, self.exit, self.model.n_layers, self, self.length)
        return self.model.unembed(h)

    def accept(self, drafted: list[int], logits: Array) -> list[int]:
        """5.3: the verifier's tokens, as far as the draft foresaw them, and one more."""
        emitted = []
        for row, foreseen in enumerate([*drafted, None]):
            emitted.append(pick(logits[row], len(self.tokens) + row, self.settings))
            if emitted[-1] != foreseen or emitted[-1] in self.eos:
                break
        return emitted

    def finish(self, drafted: list[int], logits: Array) -> dict:
        """5.3 and 5.4; the round, as in 10.2."""
        start, emitted = self.length, self.accept(drafted, logits)
        self.length += len(emitted)  # 5.4: what was rejected is forgotten by not being counted
        self.tokens += emitted
        accepted = sum(a == b for a, b in zip(drafted, emitted))
        r = dict(drafted=drafted, accepted=accepted, emitted=emitted)
        r |= dict(start=start, length=self.length, layer_runs=self.layer_runs.tolist())
        if self.exit:
            r["exit_queries"] = self.queries[: len(drafted) + 1].tolist()
        return r | {"logits": logits.tolist()}

    def ended(self) -> bool:
        """5.5, after a round."""
        return len(self.tokens) >= self.end or self.tokens[-1] in self.eos

    def rounds(self) -> Iterator[dict]:
        """Draft, verify, accept, rewind until the text ends; yields rounds."""
        self.prefill()
        while len(self.tokens) < self.end:
            self.layer_runs[:] = 0
            drafted = self.draft()
            yield self.finish(drafted, self.verify(drafted))
            if self.ended():
                return


class Sequence(Decoder):
    """A text in a batch (12.0). table: its slots."""

    def __init__(self, name: str, *how: Any):
        super().__init__(*how)
        self.name, self.table, self.drafted = name, list[int](), list[int]()


class Batch:
    """Sequences that share passes and slots (SERVING.md, 12 and 13).

    keys and values (L, Hkv, slots, hd). free: nobody's slots.
    """

    def __init__(self, model: Llama, lanes: int, slots: int):
        self.model, self.free = model, list(range(slots))
        self.lanes: list = [None] * lanes
        shape = (2, model.n_layers, model.kv_heads, slots, model.head_dim)
        self.keys, self.values = np.zeros(shape, model.dtype)

    def hold(self, s: Sequence, positions: int) -> None:
        """Gives s slots for so many positions."""
        self.free += s.table[positions:]
        del s.table[positions:]
        s.table += [self.free.pop() for _ in range(positions - len(s.table))]

    def run(self, h: Array, first: int, last: int, rows: list) -> Array:
        """Layers [first, last) on h (T, dim), for rows (sequence, position)."""
        unseen = np.ones((len(rows), self.keys.shape[2]), bool)
        for row, (s, p) in enumerate(rows):
            unseen[row, s.table[: p + 1]] = False  # 12.8
            s.layer_runs[first:last] += 1
        positions, slots = np.array([(p, s.table[p]) for s, p in rows]).T
        return self.model.run_rows(h, first, last, self, positions, slots, unseen)

    def join(self, lane: int, s: Sequence) -> None:
        """12.10, with prefill."""
        self.lanes[lane], s.length = s, len(s.tokens) - 1
        self.hold(s, s.length)
        if s.length:
            rows = [(s, p) for p in range(s.length)]
            self.run(self.model.embed(s.tokens[:-1]), 0, self.model.n_layers, rows)

    def draft(self, group: list[Sequence]) -> None:
        """5.1 for one E: a pass is the next row of those that still draft."""
        while group:
            h = self.model.embed([[*s.tokens, *s.drafted][-1] for s in group])
            rows = [(s, s.length + len(s.drafted)) for s in group]
            h = self.run(h, 0, group[0].exit, rows)
            group = [s for s, query in zip(group, h) if s.guess(s.drafted, query)]

    def verify(self, group: list[Sequence]) -> list[Array]:
        """5.2 for one E: logits (k + 1, V) of each."""
        starts = [s.rows(s.drafted) for s in group]
        rows = [(s, s.length + i) for s, h in zip(group, starts) for i in range(len(h))]
        h = self.run(np.concatenate(starts), group[0].exit, self.model.n_layers, rows)
        return np.split(self.model.unembed(h), np.cumsum([len(h) for h in starts])[:-1])  # 12.7

    def step(self) -> list[dict]:
        """A round of every sequence (20.3)."""
        entries, live = [], [s for s in self.lanes if s]
        for s in live:
            s.drafted, s.layer_runs[:] = [], 0
            self.hold(s, s.length + s.limit + 1)  # 13.2
        for e in sorted({s.exit for s in live}):  # 12.11
            group = [s for s in live if s.exit == e]
            if e:
                self.draft(group)
            for s, logits in zip(group, self.verify(group)):
                entry = dict(sequence=s.name, lane=self.lanes.index(s), slots=[*s.table])
                entries.append(entry | s.finish(s.drafted, logits))
                self.hold(s, 0 if s.ended() else s.length)  # 13.3, 13.4
        self.lanes = [s if s and s.table else None for s in self.lanes]
        return entries

    def steps(self, waiting: list[Sequence]) -> Iterator[list[dict]]:
        """One joins where a lane and slots for its end are free."""
        while waiting or any(self.lanes):
            for lane, s in enumerate(self.lanes):
                ends = [other.end for other in (*self.lanes, *waiting[:1]) if other]
                if not s and waiting and sum(ends) <= self.keys.shape[2]:
                    self.join(lane, waiting.pop(0))
            yield self.step()


def trace(dtype: str) -> dict:
    """The trace of everything in golden/ (10.2, 20.2), with keys and values of short cases."""
    golden, traced, batches = committed(), [], []
    models = {folder.name: Llama(folder, dtype) for folder in GOLDEN.iterdir() if folder.is_dir()}
    for case in golden["cases"]:
        d = Decoder(models[case.get("model", "model")], case["prompt"], case["settings"])
        traced.append({key: case[key] for key in ("name", "prompt", "settings")})
        traced[-1]["rounds"] = list(d.rounds())
        if len(d.tokens) < 32:
            for kind in ("keys", "values"):
                traced[-1][kind] = getattr(d, kind)[:, :, : d.length].tolist()
    for b in golden["batches"]:
        waiting = sequences(models["model"], b, golden["cases"])
        steps = Batch(models["model"], b["lanes"], b["slots"]).steps(waiting)
        batches.append({"name": b["name"], "steps": list(steps)})
    found = {"format": "layerskip-trace-1", "dtype": dtype, "cases": traced, "batches": batches}
    return found | {"filters": kept(golden["filters"])}


def kept(filters: list[dict]) -> list[list[int]]:
    """The ids that golden filters keep."""
    found = [keep_likely(np.array(f["logits"]), f) > -np.inf for f in filters]
    return [np.flatnonzero(x).tolist() for x in found]


def sequences(model: Llama, batch: dict, cases: list[dict]) -> list[Sequence]:
    """Those of a golden batch."""
    of = {case["name"]: (case["prompt"], case["settings"]) for case in cases}
    return [Sequence(name, model, *of[name]) for name in batch["sequences"]]


def main() -> None:
    p = argparse.ArgumentParser(prog="numpy_decode.py", description="LayerSkip decoding in NumPy.")
    p.add_argument("--trace", type=Path, metavar="OUT", required=True, help="where to write it")
    p.add_argument("--dtype", choices=["float64", "float32"], default="float64")
    args = p.parse_args()
    try:
        args.trace.write_text(json.dumps(trace(args.dtype)))
    except OSError as error:
        p.exit(2, f"numpy_decode.py: {error}\n")


if __name__ == "__main__":
    main()
