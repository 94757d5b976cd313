"""LayerSkip decoding in NumPy alone: the port to read after SPEC.md, whose rules the numbers are. Tokens are exact; bits (section 8) are not tried.

    python porting/numpy_decode.py --trace OUT [--dtype float32]                        the golden cases, for check.py
    python porting/numpy_decode.py --ckpt DIR --prompt-ids 1,2,3 --exit 2 --draft 4     the ids of one generation
"""

import argparse
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np


def read_tensors(file: Path) -> dict[str, np.ndarray]:
    """The tensors of a safetensors file: 8 bytes of header length, a JSON header, raw little-endian data."""
    raw = file.read_bytes()
    start, tensors, types = 8 + int.from_bytes(raw[:8], "little"), {}, {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}
    header = json.loads(raw[8:start])
    for name in header.keys() - {"__metadata__"}:
        first, last = header[name]["data_offsets"]
        x = np.frombuffer(raw[start + first : start + last], types[header[name]["dtype"]])
        x = (x.astype(np.uint32) << 16).view(np.float32) if x.dtype == "<u2" else x  # bfloat16 is the upper half of float32
        tensors[name] = x.reshape(header[name]["shape"])
    return tensors


def softmax(x: np.ndarray) -> np.ndarray:
    """Over the last dimension."""
    x = np.exp(x - x.max(-1, keepdims=True))
    return x / x.sum(-1, keepdims=True)


class Llama:
    """embed, layer and unembed (1.3), from a checkpoint with Hugging Face's names. Scaled rotary positions are refused (ValueError)."""

    def __init__(self, folder: Path, dtype: str):
        c = json.loads((folder / "config.json").read_text())
        rope = c.get("rope_parameters") or c.get("rope_scaling") or {}
        if rope.get("rope_type", rope.get("type", "default")) != "default":
            raise ValueError("scaled rotary positions are left to the next port")
        self.n_layers, self.dim, self.context, self.eps = (c[key] for key in ("num_hidden_layers", "hidden_size", "max_position_embeddings", "rms_norm_eps"))
        heads, eos = c["num_attention_heads"], c.get("eos_token_id")
        self.kv_heads, self.head_dim = c.get("num_key_value_heads") or heads, c.get("head_dim") or self.dim // heads
        self.eos, self.dtype = eos if isinstance(eos, list) else [] if eos is None else [eos], np.dtype(dtype)
        self.frequency = 1 / np.float32(rope.get("rope_theta", c.get("rope_theta", 10000.0))) ** (np.arange(0, self.head_dim, 2, dtype=np.float32) / np.float32(self.head_dim))
        self.w = {name: x.astype(dtype) for file in folder.glob("*.safetensors") for name, x in read_tensors(file).items()}
        self.w.setdefault("lm_head.weight", self.w["model.embed_tokens.weight"])  # a tied head

    def norm(self, h: np.ndarray, name: str) -> np.ndarray:
        """RMSNorm of rows h (T, dim)."""
        return h / np.sqrt((h * h).mean(-1, keepdims=True) + self.eps) * self.w[f"{name}.weight"]

    def linear(self, h: np.ndarray, name: str) -> np.ndarray:
        """h (T, in) times a stored weight (out, in), transposed."""
        return h @ self.w[f"{name}.weight"].T

    def rotate(self, x: np.ndarray, start: int) -> np.ndarray:
        """Rotary positions on x (T, heads, hd): first and second half are the pairs; float32 angles in every dtype (10.5)."""
        angle = np.arange(start, start + len(x), dtype=np.float32)[:, None, None] * self.frequency
        cos, sin = np.cos(angle).astype(self.dtype), np.sin(angle).astype(self.dtype)
        a, b = np.split(x, 2, -1)
        return np.concatenate([a * cos - b * sin, b * cos + a * sin], -1)

    def embed(self, tokens: list[int]) -> np.ndarray:
        """Hidden states (T, dim) of T tokens."""
        return self.w["model.embed_tokens.weight"][tokens]

    def run_layers(self, h: np.ndarray, first: int, last: int, cache: "Decoder", start: int) -> np.ndarray:
        """Layers [first, last) on rows h (T, dim) at positions from `start`, which see the cache and leave their keys and values in it."""
        rows, end = len(h), start + len(h)
        unseen = np.arange(end) > np.arange(start, end)[:, None, None, None]  # 3.3
        for l in range(first, last):
            at = f"model.layers.{l}"
            x = self.norm(h, f"{at}.input_layernorm")
            q, k, v = (self.linear(x, f"{at}.self_attn.{name}_proj").reshape(rows, -1, self.head_dim) for name in "qkv")
            shared = self.rotate(q, start).reshape(rows, self.kv_heads, -1, self.head_dim)  # (T, Hkv, heads that share them, hd)
            cache.keys[l, :, start:end], cache.values[l, :, start:end] = self.rotate(k, start).swapaxes(0, 1), v.swapaxes(0, 1)
            score = np.einsum("tkgd,ksd->tkgs", shared, cache.keys[l, :, :end]) * self.head_dim**-0.5
            mixed = np.einsum("tkgs,ksd->tkgd", softmax(np.where(unseen, -np.inf, score)), cache.values[l, :, :end])
            h = h + self.linear(mixed.reshape(rows, -1), f"{at}.self_attn.o_proj")
            x = self.norm(h, f"{at}.post_attention_layernorm")
            gate = self.linear(x, f"{at}.mlp.gate_proj")
            h = h + self.linear(gate / (1 + np.exp(-gate)) * self.linear(x, f"{at}.mlp.up_proj"), f"{at}.mlp.down_proj")
        return h

    def unembed(self, h: np.ndarray) -> np.ndarray:
        """Logits (T, V) of hidden states (T, dim) after any layer."""
        return self.linear(self.norm(h, "model.norm"), "lm_head")


class Decoder:
    """One generation over a KVQ cache (2): keys and values (L, Hkv, positions, hd), queries (d + 1, dim), length of what is live."""

    def __init__(self, model: Llama, prompt: list[int], settings: dict):
        self.model, self.settings, self.tokens = model, settings, list(prompt)
        self.exit, self.eos, self.end = settings["exit_layer"], settings["eos"], min(len(prompt) + settings["max_new_tokens"], model.context)
        self.keys, self.values = np.zeros((2, model.n_layers, model.kv_heads, self.end, model.head_dim), model.dtype)
        self.queries, self.length = np.zeros((settings["draft_len"] + 1, model.dim), model.dtype), 0

    def pick(self, logits: np.ndarray, position: int) -> int:
        """4.1 to 4.4. The position is that of the token picked."""
        temperature, top_k, top_p = (self.settings[key] for key in ("temperature", "top_k", "top_p"))
        if temperature == 0:
            return int(logits.argmax())
        x = logits.astype(np.float64) / temperature
        if 0 < top_k < len(x):
            x[x < np.sort(x)[-top_k]] = -np.inf
        if top_p < 1:
            order = np.argsort(-x, kind="stable")
            likely = softmax(x)[order]
            x[order[np.cumsum(likely) - likely >= top_p]] = -np.inf
        u = np.random.Generator(np.random.Philox(key=self.settings["seed"], counter=[0, 0, 0, position])).random(len(x))  # 4.4
        return int((x - np.log(-np.log(u * (1 - 2.0**-53) + 2.0**-54))).argmax())

    def prefill(self) -> None:
        """6.2: every known token but the last."""
        if len(self.tokens) > 1:
            self.model.run_layers(self.model.embed(self.tokens[:-1]), 0, self.model.n_layers, self, 0)
        self.length = len(self.tokens) - 1

    def draft(self) -> list[int]:
        """5.1: layers [0, E) leave keys, values and an exit query for every row, the last one included. 7.5: E = 0 drafts nothing."""
        n, sure, token = len(self.tokens), self.settings["min_confidence"], self.tokens[-1]
        drafted: list[int] = []
        limit = min(self.settings["draft_len"], self.end - n - 1)  # 5.0: a round emits one token more than it drafts
        for row in range(limit + 1 if self.exit else 0):
            h = self.model.run_layers(self.model.embed([token]), 0, self.exit, self, self.length + row)
            self.queries[row] = h[0]
            if row == limit or (drafted and token in self.eos):
                break
            logits = self.model.unembed(h)[0]
            if sure > 0 and softmax(logits.astype(np.float32)).max() <= sure:
                break
            token = self.pick(logits, n + row)
            drafted.append(token)
        return drafted

    def verify(self, drafted: list[int]) -> np.ndarray:
        """5.2: logits (k + 1, V) from layers [E, L), which go on from the exit queries in one pass."""
        h = self.queries[: len(drafted) + 1] if self.exit else self.model.embed(self.tokens[-1:])
        return self.model.unembed(self.model.run_layers(h, self.exit, self.model.n_layers, self, self.length))

    def accept(self, drafted: list[int], logits: np.ndarray) -> list[int]:
        """5.3: the verifier's tokens, as far as the draft foresaw them, and one more."""
        emitted = []
        for row, foreseen in enumerate([*drafted, None]):
            emitted.append(self.pick(logits[row], len(self.tokens) + row))
            if emitted[-1] != foreseen or emitted[-1] in self.eos:
                break
        return emitted

    def rewind(self, drafted: list[int], emitted: list[int]) -> None:
        """5.4: what was rejected is forgotten by not being counted."""
        self.length += len(emitted)
        self.tokens += emitted

    def rounds(self) -> Iterator[dict]:
        """Draft, verify, accept, rewind until the text ends; yields the rounds as a trace has them (10.2)."""
        self.prefill()
        while len(self.tokens) < self.end:
            start, drafted = self.length, self.draft()
            logits = self.verify(drafted)
            emitted = self.accept(drafted, logits)
            self.rewind(drafted, emitted)
            queries = {"exit_queries": self.queries[: len(drafted) + 1].tolist()} if self.exit else {}
            tokens = dict(drafted=drafted, accepted=sum(a == b for a, b in zip(drafted, emitted)), emitted=emitted)
            yield tokens | dict(start=start, length=self.length) | queries | {"logits": logits.tolist()}
            if emitted[-1] in self.eos:
                return


def trace(model: Llama, cases: list[dict], decoder: Callable[..., Decoder] = Decoder) -> dict:
    """The trace of golden cases (10.2); keys and values where the case is short."""
    traced = []
    for case in cases:
        d = decoder(model, case["prompt"], case["settings"])
        traced.append({key: case[key] for key in ("name", "prompt", "settings")} | {"rounds": list(d.rounds())})
        if len(d.tokens) < 32:
            traced[-1] |= {kind: getattr(d, kind)[:, :, : d.length].tolist() for kind in ("keys", "values")}
    return {"format": "layerskip-trace-1", "dtype": str(model.dtype), "cases": traced}


def main() -> None:
    p = argparse.ArgumentParser(prog="numpy_decode.py", description="Self-speculative decoding in NumPy; on the command line, greedy.")
    p.add_argument("--trace", type=Path, metavar="OUT", help="decode the golden cases and write their trace for check.py")
    p.add_argument("--ckpt", type=Path, metavar="DIR", help="checkpoint directory (default: the golden one)")
    p.add_argument("--dtype", choices=["float64", "float32"], default="float64")
    for name, kind, default in (("prompt-ids", str, "1,2,3"), ("exit", int, 2), ("draft", int, 4), ("max-new-tokens", int, 32)):
        p.add_argument(f"--{name}", type=kind, default=default, help="default %(default)s")
    args, golden = p.parse_args(), Path(__file__).parent / "golden"
    try:
        model, prompt = Llama(args.ckpt or golden / "model", args.dtype), [int(token) for token in args.prompt_ids.split(",")]
        if not 0 <= args.exit < model.n_layers or min(args.draft, args.max_new_tokens) < 1 or len(prompt) >= model.context or min(prompt) < 0:
            raise ValueError("the exit, the draft length, the number of tokens or the prompt does not fit this model")
        settings = dict(exit_layer=args.exit, draft_len=args.draft, max_new_tokens=args.max_new_tokens, min_confidence=0, temperature=0, top_k=0, top_p=1, eos=model.eos)
        if args.trace:
            args.trace.write_text(json.dumps(trace(model, json.loads((golden / "cases.json").read_text())["cases"])))
        else:
            print(*(token for r in Decoder(model, prompt, settings).rounds() for token in r["emitted"]), sep=",")
    except (OSError, ValueError, KeyError, IndexError) as error:
        p.exit(2, f"numpy_decode.py: {error}\n")


if __name__ == "__main__":
    main()
