"""This code beside other programs: peers, train."""

import re
import tempfile
from argparse import Namespace
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from importlib import import_module
from itertools import islice
from pathlib import Path
from time import perf_counter
from timeit import timeit
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from bench.common import Table, Works, compare, decode_all, engine, installed, target, title
from bench.contexts import long_prompts
from bench.decoding import named
from cache import KVQCache
from decode import new_cache
from exact import MAX_ROWS
from model import Llama, prefill, rotary_frequencies, save_checkpoint
from support.checkpoint import read_json
from support.console import Totals
from support.runs import RunDirectory
from support.train_command import compile, parser, prepare

Ids = list[int]
Peer = tuple[Callable[[Ids], Any], Callable[[Any, Ids, int], Totals]]  # read once; decode


def peers(args: Namespace) -> list[Table]:
    """transformers and llama.cpp on the same weights and prompts, plain and drafted.

    Greedy, with the same type, threads and draft. tokens/s is of new tokens: prompts are read once,
    before. transformers' drafts read them anew, so it drafts without --context alone. Drafted text
    is compared with the program's plain text, and that with this code's. Random weights decode
    plainly.
    """
    t = target(Namespace(**vars(args) | ({"task": "code"} if args.context else {})))
    model, ways, kinds = t.load(t.dtype), dict[str, Peer](), {"plain": dict[str, Any]()}
    if t.context:
        t.prompts = long_prompts(t, args.task, model.config.max_len)
    if not t.shape:  # whose exits foresee nothing
        kinds |= {"drafted": t.settings, **named(t, ["lookup"])}
    length = max(map(len, t.prompts)) + t.tokens
    for compiled in ["", ", compiled"] if t.compile else [""]:
        own = engine(t, t.load(t.dtype), bool(compiled))
        ways |= {f"this code, {k}{compiled}": ours(own, length, s) for k, s in kinds.items()}
    with tempfile.TemporaryDirectory() as name:  # what is loaded from it outlives it
        folder = Path(name)
        if installed("transformers"):
            save_checkpoint(model, folder)
            for k in [*kinds][: 1 if t.context else 2]:
                ways[f"transformers, {k}"] = transformers_of(folder, t, kinds[k])
        if t.device.type == "cpu" and installed("llama_cpp") and installed("gguf"):
            write_gguf(model, folder / "gguf")
            ways["llama.cpp, plain"] = llama_cpp_of(folder / "gguf", length)
    read: dict[str, float] = {}
    works: Works = {name: partial(apart, t, name, read, {}, *way) for name, way in ways.items()}
    same = {n: re.sub("drafted|lookup", "plain", n) for n in works}
    same |= {n: "this code, plain" for n in works if n.endswith("plain")}
    rows = compare(works, t.runs, same, equal="same text")
    rows = [row | {"s to read": read[row["way"]]} for row in rows]
    return [(title(t, f"{args.task} after {len(t.prompts[0])} tokens"), rows)]


@torch.inference_mode()
def apart(t: Namespace, name: str, read: dict, kept: dict, get: Callable, go: Callable) -> Totals:
    """New tokens after all prompts and their seconds; in read[name], those of reading."""
    total, seconds = Totals(), 0.0
    for number, prompt in enumerate(t.prompts):
        began = perf_counter()
        kept[number] = kept.get(number) or get(prompt)
        started = perf_counter()
        made = go(kept[number], prompt, t.tokens)
        total.times.append(perf_counter() - started)
        total.ids, total.rounds = total.ids + made.ids, total.rounds + made.rounds
        seconds += started - began
    read.setdefault(name, seconds)
    return total


def ours(model: Llama, length: int, settings: dict) -> Peer:
    """generate, with a cache that is kept."""

    def get(prompt: Ids) -> KVQCache:
        kept = new_cache(model, length, MAX_ROWS - 1)
        prefill(model, kept, prompt[:-1])
        return kept

    def go(kept: KVQCache, prompt: Ids, count: int) -> Totals:
        kept.rewind(len(prompt) - 1)
        with patch.multiple("decode", new_cache=lambda *_: kept, prefill=lambda *_: None):
            return decode_all(model, [prompt], count, **settings)

    return get, go


def transformers_of(folder: Path, t: Namespace, settings: dict) -> Peer:
    """transformers' greedy generate with a checkpoint, drafting where there are settings."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    theirs = transformers.LlamaForCausalLM.from_pretrained(folder, dtype=t.dtype)
    how: dict = dict(do_sample=False, pad_token_id=0, num_assistant_tokens_schedule="constant")
    if settings:
        how["assistant_early_exit"] = settings["exit_layer"]
        how["num_assistant_tokens"] = settings["draft_len"]
        how["assistant_confidence_threshold"] = settings["min_confidence"]
    theirs.to(t.device).generation_config = transformers.GenerationConfig(**how)

    def get(prompt: Ids) -> Any:
        ids = torch.tensor([prompt[:-1]], device=t.device)
        return None if settings else theirs(ids, use_cache=True, logits_to_keep=1).past_key_values

    def go(kept: Any, prompt: Ids, count: int) -> Totals:
        ids = torch.tensor([prompt], device=t.device)
        how = dict(attention_mask=torch.ones_like(ids), past_key_values=kept, max_new_tokens=count)
        if kept:
            kept.crop(len(prompt) - 1 - kept.get_seq_length())
        return Totals(theirs.generate(ids, **how)[0, len(prompt) :].tolist())

    return get, go


def llama_cpp_of(file: Path, length: int) -> Peer:
    """llama.cpp's greedy decoding of a GGUF file, one row a step, with PyTorch's threads."""
    threads = torch.get_num_threads()
    how: dict = dict(n_ctx=length, n_threads=threads, n_threads_batch=threads, verbose=False)
    theirs = import_module("llama_cpp").Llama(str(file), **how)

    def get(prompt: Ids) -> None:  # holds one prompt
        if theirs.input_ids[: len(prompt)].tolist() != prompt:
            theirs.reset()
            theirs.eval(prompt[:-1])

    def go(_: None, prompt: Ids, count: int) -> Totals:
        return Totals(list(islice(theirs.generate(prompt, temp=0.0), count)))

    return get, go


def write_gguf(model: Llama, file: Path) -> None:
    """A plain model, in float32 or bfloat16, as a GGUF file without a tokenizer.

    Keys, names and the order of rows in q and k are those of llama.cpp's convert_hf_to_gguf.
    Vectors are float32, as llama.cpp wants them.
    """
    c, gguf = model.config, import_module("gguf")
    writer = gguf.GGUFWriter(file, "llama")
    keys: dict = dict(tokenizer_model="no_vocab", layer_norm_rms_eps=c.norm_eps)
    keys |= dict(vocab_size=c.vocab_size, context_length=c.max_len)
    keys |= dict(embedding_length=c.dim, feed_forward_length=c.hidden_dim, block_count=c.n_layers)
    keys |= dict(head_count=c.n_heads, head_count_kv=c.n_kv_heads, rope_freq_base=c.rope_theta)
    keys |= dict.fromkeys(("key_length", "value_length", "rope_dimension_count"), c.head_dim)
    for key, value in keys.items():
        getattr(writer, f"add_{key}")(value)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, c.n_layers)
    tensors = {names.get_name(n, (".weight",)): p.detach() for n, p in model.named_parameters()}
    if c.rope_type != "default":  # what each pair's angle is divided by
        unscaled = rotary_frequencies(replace(c, rope_type="default"))
        tensors["rope_freqs.weight"] = unscaled / rotary_frequencies(c)
    for name, x in tensors.items():
        if name.endswith(("attn_q.weight", "attn_k.weight")):
            x = pairs_together(x, c.head_dim)
        if x.dim() > 1 and x.dtype == torch.bfloat16:  # NumPy has no such type: bytes
            bf16 = gguf.GGMLQuantizationType.BF16
            writer.add_tensor(name, x.view(torch.uint8).numpy(), raw_dtype=bf16)
        else:
            writer.add_tensor(name, x.float().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def pairs_together(weight: Tensor, head_dim: int) -> Tensor:
    """q or k (heads * hd, dim) with rows i and i + hd/2 of a head, which turn together, paired."""
    return weight.unflatten(0, (-1, 2, head_dim // 2)).transpose(1, 2).flatten(0, 2)


STEPS, BATCH, LENGTH = 10, 8, 512  # of a turn


def train(args: Namespace) -> list[Table]:
    """Training by the recipes plain and layerskip, and of transformers' Llama in a plain loop.

    The same shape, batch, AdamW, and bfloat16 autocast where the hardware has it.
    """
    steps: dict[str, Callable[[], object]] = {}
    with tempfile.TemporaryDirectory() as folder:
        if installed("transformers"):
            steps["transformers"] = transformers_step(args)
        for recipe in ("plain", "layerskip"):
            steps[recipe] = recipe_step(args, recipe, Path(folder))
        works: Works = {name: partial(timed_steps, step) for name, step in steps.items()}
        first = next(iter(works))
        rows = compare(works, args.runs, {}, base=first)
    about = f"{args.ckpt.name}, batches of {BATCH} x {LENGTH}{', compiled' * args.compile}"
    return [(f"{about}, medians of {args.runs} turns, speedup against {first}", rows)]


def timed_steps(step: Callable[[], object]) -> Totals:
    """A turn of steps as Totals: so many tokens, and the seconds that they take."""
    return Totals([0] * (STEPS * BATCH * LENGTH), times=[timeit(step, number=STEPS)])


def recipe_step(args: Namespace, recipe: str, folder: Path) -> Callable[[], object]:
    """One step of train.py with this recipe, in a directory of `folder`."""
    out, text = str(folder / recipe), folder / "text.txt"
    text.write_text(20 * Path(__file__).read_text())  # what is learned does not matter
    options = ["--recipe", recipe, "--init", str(args.ckpt), "--out", out, "--data", str(text)]
    options += ["--batch", str(BATCH), "--seq", str(LENGTH), "--steps", "100000"]
    trainer, _ = prepare(parser().parse_args(options), RunDirectory(out, args.ckpt))
    if args.compile:
        compile(trainer)
    return trainer.train_step


def transformers_step(args: Namespace) -> Callable[[], object]:
    """One step of a plain training loop over transformers' Llama."""
    import transformers

    config = transformers.LlamaConfig(**read_json(args.ckpt / "config.json"))
    model = transformers.LlamaForCausalLM(config).to(args.device)
    ids = torch.randint(config.vocab_size, (BATCH, LENGTH), device=args.device)
    narrow = args.dtype == torch.bfloat16
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    forward = torch.compile(model) if args.compile else model

    def step() -> float:
        with torch.autocast(args.device.type, torch.bfloat16, enabled=narrow):
            loss = forward(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()  # waits for a GPU, as train.py does

    return step
