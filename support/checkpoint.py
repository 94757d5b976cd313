"""Files <-> checked fields of model.Config and named tensors. Knows no Llama.

Two layouts are read, the first is written:

    Hugging Face   config.json, and model.safetensors or the shards that an index names
    Meta           params.json, and consolidated.*.safetensors, each with a part of every tensor

Everything from outside is checked here, so model.py trusts what it is given. Tensors have Hugging
Face's names without `model.` in front: that is taken off and put on here.
"""

import json
import os
import re
import secrets
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Size, Tensor

FLOATS = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
META_NAMES = {
    "tok_embeddings": "embed_tokens",
    "norm": "norm",
    "output": "lm_head",
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "attention_norm": "input_layernorm",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj",
    "ffn_norm": "post_attention_layernorm",
}
LIBRARY = (SafetensorError, OSError, RuntimeError, MemoryError)
WRONG_KIND = (ValueError, TypeError, LookupError, ArithmeticError)
NOT_CONTENT = {  # how a file begins that stands where another should
    b"version https://git-lfs": "a Git LFS pointer, not the file: run `git lfs pull`",
    b"<!doctype html": "a web page, not the file: download it again",
}


class CheckpointError(ValueError):
    """A checkpoint that cannot be used, in one line: what is wrong and what to do."""

    def __init__(self, message: str):
        # Names in files may hold line breaks, escape codes or a million characters.
        super().__init__(re.sub(r"[\s\x00-\x1f\x7f-\x9f]+", " ", message)[:480])


@contextmanager
def _refusing(what: str) -> Iterator[None]:
    """Makes failures of libraries CheckpointError: `what` is wrong, then the reason."""
    try:
        yield
    except CheckpointError:
        raise
    except (*LIBRARY, *WRONG_KIND) as error:
        raise CheckpointError(f"{what}: {str(error) or 'out of memory'}") from None


def whole(number: str) -> int | float:
    """A number of JSON. Some writers give whole numbers as 19.0."""
    value = float(number)
    return int(value) if value.is_integer() else value


def parse_object(text: str, name: str, parse_float: Callable = whole) -> dict:
    """The JSON object in the text of the file `name`. Raises CheckpointError if it holds none."""
    depths = accumulate((c in "[{") - (c in "]}") for c in text)
    with _refusing(f"{name} is not a JSON object"):
        if max(depths, default=0) > 100:  # would exhaust the stack, here or in a message
            raise ValueError("it is nested too deep")
        if isinstance(found := json.loads(text, parse_float=parse_float), dict):
            return found
        raise ValueError(f"it is a {type(found).__name__}")


def read_json(file: Path, parse_float: Callable = whole) -> dict:
    """The JSON object in a file. Raises CheckpointError if there is none."""
    with _refusing(f"{file} cannot be read"):
        if not os.path.isfile(file):
            raise ValueError("there is no such file")
        return parse_object(file.read_text(encoding="utf-8-sig"), str(file), parse_float)


def advice(file: Path, parse_float: Callable = whole) -> dict:
    """The JSON object in a file that nothing needs; {} if there is none. Says so if it is bad."""
    try:
        return read_json(file, parse_float) if os.path.lexists(file) else {}
    except CheckpointError as error:
        print(f"not used: {error}", file=sys.stderr)
        return {}


@contextmanager
def whole_file(path: str | Path) -> Iterator[BinaryIO]:
    """A file to write bytes to, which is at `path` if all went well and leaves no trace if not.

    It takes the place and the permissions of the old file at the end. A link stays a link. Raises
    ValueError when the directory is missing or `path` is there and is no regular file.
    """
    target = Path(os.path.realpath(path))
    if not target.parent.is_dir() or (os.path.lexists(target) and not target.is_file()):
        raise ValueError(f"{path} cannot be written: it must be a file in a directory that exists")
    aside = target.with_name(f".{secrets.token_hex(8)}.tmp")
    file = open(aside, "xb")  # x: never an old file
    try:
        with file:
            mode = os.stat(target if target.exists() else aside).st_mode & 0o777
            yield file
        with open(aside, "r+b") as written:  # by name: save_file puts a new file there
            os.fsync(written.fileno())
        os.chmod(aside, mode)
        os.replace(aside, target)
    finally:
        aside.unlink(missing_ok=True)


# --------------------------------------
# config.json <-> the fields of model.Config

KEYS = {  # field: key of config.json
    "vocab_size": "vocab_size",
    "dim": "hidden_size",
    "hidden_dim": "intermediate_size",
    "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads",
    "n_kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "max_len": "max_position_embeddings",
    "norm_eps": "rms_norm_eps",
    "tied": "tie_word_embeddings",
    "bos": "bos_token_id",
}
ROPE_KEYS = {
    "rope_type": "rope_type",
    "rope_factor": "factor",
    "rope_low_freq_factor": "low_freq_factor",
    "rope_high_freq_factor": "high_freq_factor",
    "rope_original_len": "original_max_position_embeddings",
}
RANGES: dict[str, tuple] = {  # bounds of fields; whole numbers where the bounds are
    **dict.fromkeys("vocab_size dim hidden_dim n_heads n_kv_heads head_dim".split(), (1, 1 << 20)),
    **dict.fromkeys(("max_len", "rope_original_len"), (1, 1 << 27)),
    "n_layers": (1, 1024),
    "norm_eps": (1e-12, 1.0),
    "rope_theta": (1.0, 1e12),
    **dict.fromkeys(("rope_factor", "rope_low_freq_factor", "rope_high_freq_factor"), (1e-3, 1e6)),
}


def _bad(text: str) -> CheckpointError:
    return CheckpointError("config: " + text)


def config_fields(c: dict) -> dict:
    """Fields of model.Config from the keys of config.json, as transformers 4 or 5 writes them.

    Raises CheckpointError for what is no Llama that runs here, and for an impossible shape.
    """
    if c.get("model_type") != "llama":
        raise _bad(f"model_type must be 'llama', not {c.get('model_type')!r:.40}")
    for key in ("attention_bias", "mlp_bias", "quantization_config"):
        if c.get(key):
            raise _bad(f"{key} is not supported")
    if c.get("hidden_act", "silu") not in ("silu", "swish"):  # one function
        raise _bad(f"hidden_act {c['hidden_act']!r:.40} is not supported, only silu")
    rope = c.get("rope_scaling") or c.get("rope_parameters") or {}  # as transformers has it
    if not isinstance(rope, dict):
        raise _bad("the rope parameters are not a JSON object")
    found = {name: c[key] for name, key in KEYS.items() if c.get(key) is not None}
    for name in ("vocab_size", "dim", "hidden_dim", "n_layers", "n_heads"):
        if name not in found:
            raise _bad(f"{KEYS[name]} is missing")
    if "head_dim" not in found:
        dim, heads = found["dim"], found["n_heads"]
        if type(dim) is not int or type(heads) is not int or heads < 1 or dim % heads:
            raise _bad(f"hidden_size {dim!r:.40} does not divide into {heads!r:.40} heads")
        found["head_dim"] = dim // heads
    found["rope_type"] = kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "linear", "llama3"):
        raise _bad(f"rope type {kind!r:.40} is none of default, linear and llama3")
    found["rope_theta"] = rope.get("rope_theta", c.get("rope_theta", 10000.0))
    wanted = {"linear": ("rope_factor",), "llama3": tuple(ROPE_KEYS)[1:]}
    usual = {"rope_original_len": found.get("max_len")}
    for name in wanted.get(kind, ()):
        found[name] = rope.get(ROPE_KEYS[name], usual.get(name))
        if found[name] is None:
            raise _bad(f"rope {ROPE_KEYS[name]} is missing")
    found = {"n_kv_heads": found["n_heads"], "norm_eps": 1e-6, "tied": False} | found
    _check_ranges(found)
    for name in ("bos", "eos"):  # advice: ids such as -1 are no reason to refuse a model
        ids = c.get(f"{name}_token_id")
        ids = [t for t in (ids if isinstance(ids, list) else [ids]) if type(t) is int]
        found[name] = tuple(t for t in ids if 0 <= t < found["vocab_size"])
    return found | {"bos": next(iter(found["bos"]), None)}


def _check_ranges(found: dict) -> None:
    """Raises CheckpointError where a field is out of its range or does not fit another."""
    for name in found.keys() & RANGES.keys():
        (low, high), value = RANGES[name], found[name]
        kinds = (int,) if isinstance(low, int) else (int, float)
        if type(value) not in kinds or not low <= value <= high:
            kind = "a whole number" if kinds == (int,) else "a number"
            raise _bad(f"{name} must be {kind} from {low} to {high}, not {value!r:.40}")
        found[name] = type(low)(value)
    heads, groups = found["n_heads"], found["n_kv_heads"]
    if heads % groups:
        raise _bad(f"{heads} heads do not divide into {groups} key/value heads")
    if found["head_dim"] % 2:
        raise _bad(f"head_dim must be even for rotary positions, not {found['head_dim']}")
    low, high = (found.get(f"rope_{side}_freq_factor", side) for side in ("low", "high"))
    if found["rope_type"] == "llama3" and low >= high:
        raise _bad("rope low_freq_factor must be below high_freq_factor")
    if not isinstance(found["tied"], bool):
        raise _bad(f"tie_word_embeddings must be true or false, not {found['tied']!r:.40}")


def config_json(fields: dict, dtype: torch.dtype) -> dict:
    """The keys of a config.json that transformers 4 and 5 both read."""
    c: dict = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu"}
    c |= {key: fields[name] for name, key in KEYS.items()}
    c |= {"rope_theta": fields["rope_theta"], "rope_scaling": None}
    if fields["rope_type"] != "default":
        names = ROPE_KEYS if fields["rope_type"] == "llama3" else ("rope_type", "rope_factor")
        c["rope_scaling"] = {ROPE_KEYS[name]: fields[name] for name in names}
    eos = list(fields["eos"])
    c["eos_token_id"] = None if not eos else eos[0] if len(eos) == 1 else eos
    return c | {"torch_dtype": str(dtype).removeprefix("torch.")}


def generation_config(path: str | Path) -> dict:
    """Settings of generation_config.json, {} without one. Unusable ones are named on stderr."""
    count = lambda v, least=1: type(v) is int and v >= least  # of True, the type is bool
    usable = {
        "assistant_early_exit": count,
        "num_assistant_tokens": count,
        "assistant_confidence_threshold": lambda v: type(v) in (int, float) and 0 <= v < 1,
        "eos_token_id": lambda v: all(count(t, 0) for t in (v if isinstance(v, list) else [v])),
    }
    file = Path(path) / "generation_config.json"
    found = advice(file)
    found = {key: found[key] for key in usable if found.get(key) is not None}
    for key in [key for key, value in found.items() if not usable[key](value)]:
        print(f"not used: {file}: {key} {found.pop(key)!r:.40}", file=sys.stderr)
    return found


@dataclass(frozen=True)
class Stored:
    """One tensor of a checkpoint, whole in one file or in parts over several."""

    name: str  # in the files
    files: tuple[Path, ...]
    shape: tuple[int, ...]  # of the whole tensor
    dtype: torch.dtype
    join: int = 0  # the dimension along which parts join
    half_head: int = 0  # hd / 2 where rotary pairs are interleaved, else 0

    def read(self, dim: int = 0, first: int = 0, last: int = 1 << 40) -> Tensor:
        """The tensor, or what it has of indices first..last-1 of a dimension, in its stored type.

        Interleaved rotary pairs, rows 2i and 2i + 1 of a head, become half-split: i and i + hd/2.
        CheckpointError where a number is not finite.
        """
        parts = []
        for number, file in enumerate(self.files):
            with _refusing(f"{file}: {self.name} cannot be read"):
                # Opened anew: what was read stays in memory while a file is open.
                with safe_open(file, framework="pt") as tensors:
                    stored = tensors.get_slice(self.name)
                    before = number * stored.get_shape()[dim] if dim == self.join else 0
                    some = slice(max(first - before, 0), max(last - before, 0))
                    part = stored[:, some] if dim else stored[some]
                # NaN and infinity spoil the sum, a fast pass. Large numbers may: look again.
                if not part.sum().isfinite() and not part.isfinite().all():
                    raise CheckpointError(f"{file}: {self.name} holds NaN or infinite values")
                parts.append(part)
        with _refusing(f"{self.files[0]}: {self.name} cannot be read"):
            # A copy: a part is a view of the mapped file, at any address.
            whole = torch.cat(parts, self.join) if len(parts) > 1 else parts[0].clone()
            if not self.half_head:
                return whole
            return whole.unflatten(0, (-1, self.half_head, 2)).transpose(1, 2).flatten(0, 2)


# --------------------------------------
# A checkpoint directory


def read_checkpoint(path: str | Path) -> tuple[dict, dict[str, Stored]]:
    """Fields of model.Config, and the tensors by name, of a checkpoint directory.

    As in transformers, a tied head that is stored with other values is not tied, and one that is
    stored alone is the embedding too. Raises CheckpointError where the directory does not hold a
    Llama's shape and floats in safetensors.
    """
    config, tensors = _read_files(Path(path))
    fields = config_fields(config)
    table, head = "embed_tokens.weight", "lm_head.weight"
    if fields["tied"] and head in tensors:
        a, b = tensors.setdefault(table, tensors[head]), tensors[head]
        same = a.shape == b.shape and a.dtype == b.dtype
        fields["tied"] = a is b or (same and torch.equal(a.read(), b.read()))
    if fields["tied"]:
        tensors.pop(head, None)
    return fields, tensors


def check_tensors(path: str | Path, tensors: dict, shapes: dict[str, Size]) -> None:
    """Raises CheckpointError unless `tensors` are those of `shapes`, by name and shape."""
    for names, what in (
        (shapes.keys() - tensors.keys(), "lacks the tensor"),
        (tensors.keys() - shapes.keys(), "has the unexpected tensor"),
    ):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise CheckpointError(f"{path} {what} {min(names)}{more}")
    for name, shape in shapes.items():
        if tensors[name].shape != shape:
            found, wanted = tensors[name].shape, tuple(shape)
            raise CheckpointError(f"{path}: {name} is {found}, the config says {wanted}")


def write_checkpoint(path: str | Path, fields: dict, weights: dict[str, Tensor]) -> None:
    """Writes config.json and model.safetensors, each whole or not at all."""
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    dtype = weights["embed_tokens.weight"].dtype
    named = {
        name if name.startswith("lm_head.") else "model." + name: w.cpu().contiguous()
        for name, w in weights.items()
    }
    with whole_file(path / "model.safetensors") as file:
        save_file(named, file.name, metadata={"format": "pt"})
    with whole_file(path / "config.json") as file:
        file.write(json.dumps(config_json(fields, dtype), indent=2).encode() + b"\n")


def _read_files(path: Path) -> tuple[dict, dict[str, Stored]]:
    """The keys of config.json and all tensors of a directory, by name, not yet checked."""
    if not os.path.isdir(path):
        raise CheckpointError(f"there is no checkpoint directory {path}")
    meta = not os.path.exists(path / "config.json") and os.path.exists(path / "params.json")
    config = read_json(path / ("params.json" if meta else "config.json"))
    files = _weight_files(path, meta)
    for file in files:
        refuse_stand_in(file)
    found: dict[str, list[Stored]] = {}
    for file in files:
        with _refusing(f"{file} is no safetensors file"), safe_open(file, "pt") as tensors:
            for name in tensors.keys():
                if name.endswith(("rotary_emb.inv_freq", "rope.freqs")):
                    continue  # tables that follow from the config
                part = tensors.get_slice(name)
                kind, shape = part.get_dtype(), tuple(part.get_shape())
                if kind not in FLOATS:
                    raise CheckpointError(f"{file}: {name} is stored as {kind}, not as floats")
                found.setdefault(name, []).append(Stored(name, (file,), shape, FLOATS[kind]))
    for name, parts in found.items():
        kinds = {(part.shape, part.dtype) for part in parts}
        if len(kinds) > 1 or len(parts) != (len(files) if meta else 1):
            raise CheckpointError(f"{path}: the shards do not hold {name} as they should")
    if meta:
        return _from_meta(config, found)
    return config, {name.removeprefix("model."): parts[0] for name, parts in found.items()}


@_refusing("no checkpoint")
def refuse_stand_in(file: Path) -> None:
    """Raises CheckpointError for a file that a download left in another's place."""
    if os.path.isfile(file):
        with open(file, "rb") as opened:
            start = opened.read(32).lower()
        for sign, what in NOT_CONTENT.items():
            if start.startswith(sign):
                raise CheckpointError(f"{file} is {what}")


@_refusing("no checkpoint")
def _weight_files(path: Path, meta: bool) -> list[Path]:
    """The weight files of a directory, in order."""
    names, index = sorted(os.listdir(path)), "model.safetensors.index.json"
    wanted = r"consolidated.*\.safetensors" if meta else r"model\.safetensors"
    shards = [name for name in names if re.fullmatch(wanted, name)]
    if index in names and not shards and not meta:
        shard_of = read_json(path / index).get("weight_map")
        if not isinstance(shard_of, dict):
            raise CheckpointError(f"{path / index} has no weight_map from tensors to files")
        shards = sorted({str(name) for name in shard_of.values()})
    for name in shards:
        if Path(name).name != name or not os.path.isfile(path / name):
            raise CheckpointError(f"{path} should hold the weight file {name!r:.80}, but does not")
    if not shards:
        pickles = [name for name in names if name.endswith((".pth", ".bin", ".pt", ".ckpt"))]
        what = f"only pickles, which can run any code ({pickles[0]})" if pickles else "none"
        if others := [name for name in names if name.endswith(".safetensors")]:
            what = f"{others[0]!r:.80} without {index}, which lists shards: get that too"
        raise CheckpointError(f"{path} must hold weights in safetensors, but holds {what}")
    return [path / name for name in shards]


@_refusing("params.json or a tensor is missing a value or has a wrong one")
def _from_meta(c: dict, found: dict[str, list[Stored]]) -> tuple[dict, dict[str, Stored]]:
    """Config and tensors from params.json and the shards of each tensor.

    Meta does not say the context and the scale of rope: they follow from the published models.
    """
    if c.get("quantization_args") or c.get("moe") or c.get("vision_chunk_size"):
        raise CheckpointError("params.json: only dense, unquantised text models are supported")
    dim, heads, theta = c["dim"], c["n_heads"], c.get("rope_theta", 10000.0)
    tensors = {}
    for name, parts in found.items():
        match = re.fullmatch(r"(layers\.\d+\.)?(.+)\.weight", name)
        if not match or match[2] not in META_NAMES:
            raise CheckpointError(f"{parts[0].files[0]}: {name} is unexpected")
        layer, inner = match[1], META_NAMES[match[2]]
        shape = list(parts[0].shape)
        half = dim // heads // 2 if inner in ("self_attn.q_proj", "self_attn.k_proj") else 0
        # Llama 2 shards the embedding along dim, Llama 3 along the vocabulary.
        narrow = inner == "embed_tokens" and shape[1:] != [dim]
        join = int(narrow or inner in ("self_attn.o_proj", "mlp.down_proj"))
        if len(shape) == 1:
            parts = parts[:1]  # vectors are the same in every shard
        shape[join] *= len(parts)
        files = tuple(part.files[0] for part in parts)
        tensor = Stored(name, files, tuple(shape), parts[0].dtype, join, half)
        tensors[(layer or "") + inner + ".weight"] = tensor
    hidden = int(float(c.get("ffn_dim_multiplier", 1)) * int(2 * 4 * dim / 3))
    config = {
        "model_type": "llama",
        "vocab_size": tensors["embed_tokens.weight"].shape[0],
        "hidden_size": dim,
        "intermediate_size": -(-hidden // c["multiple_of"]) * c["multiple_of"],
        "num_hidden_layers": c["n_layers"],
        "num_attention_heads": heads,
        "num_key_value_heads": c.get("n_kv_heads"),
        "max_position_embeddings": {1e6: 16384, 5e5: 8192}.get(theta, 4096),
        "rms_norm_eps": c["norm_eps"],
        "rope_theta": theta,
        "tie_word_embeddings": "lm_head.weight" not in tensors,
    }
    if c.get("use_scaled_rope"):
        config["max_position_embeddings"] = 131072
        config["rope_scaling"] = {
            "rope_type": "llama3",
            "factor": c.get("rope_scaling_factor", 8.0 if dim >= 4096 else 32.0),  # 3.1; 3.2
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        }
    return config, tensors
