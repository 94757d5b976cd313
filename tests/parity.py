"""Parity with transformers: 200 random configs and checkpoints that it wrote, and the way back.

    make parity          installs transformers and runs this

For each config: float64 logits within 1e-9 and float32 within 1e-5, relative to the largest; 32
greedy tokens equal in float64, drafted; and what save_checkpoint writes gives transformers the same
logits. Before that, the ids of the conversations in chat_table.py against apply_chat_template. Exit
code 1 where one of these does not hold.
"""

import dataclasses
import json
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from itertools import product
from multiprocessing import get_context
from pathlib import Path

import jinja2
import numpy as np

sys.path[:0] = [str(Path(__file__).parent.parent), str(Path(__file__).parent)]

import torch
import transformers
from chat_table import CONVERSATIONS, TEMPLATES
from chat_table import KINDS as TOKENIZERS
from helpers import decode

from exact import pack
from extras.chat import Chat
from model import load_checkpoint, save_checkpoint

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()


def wide_norm(self, x):
    """transformers' RMSNorm in the type of its input.

    As shipped it works in float32 even in a float64 model: then no comparison is closer than 1e-7.
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
    return self.weight * normed.to(x.dtype)


transformers.models.llama.modeling_llama.LlamaRMSNorm.forward = wide_norm
KINDS = (
    "Llama 1/2, multi-head",
    "Llama 2 70B, grouped",
    "Code Llama",
    "Llama 3",
    "Llama 3.1, scaled rope",
    "Llama 3.2, tied",
    "head_dim",
    "linear rope",
)


def random_config(number: int) -> tuple[dict, float, dict]:
    """Arguments of LlamaConfig, theta and scale of rope for a case; every kind comes round."""
    random, kind = np.random.default_rng(number), KINDS[number % len(KINDS)]
    pick = lambda *choices: random.choice(choices).item()
    kv_heads = pick(1, 2, 3)
    group = 1 if "multi-head" in kind else pick(2, 4) if "grouped" in kind else pick(1, 2, 4)
    head_dim, heads = pick(4, 8, 16), kv_heads * group
    config = dict(
        vocab_size=pick(64, 101),
        hidden_size=heads * head_dim,
        intermediate_size=pick(24, 50),
        num_hidden_layers=pick(2, 3, 4),
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=256,
        rms_norm_eps=pick(1e-5, 1e-6),
        tie_word_embeddings="tied" in kind or ("Llama 3" not in kind and pick(True, False)),
        initializer_range=0.2,
    )
    theta = {"Code Llama": 1e6}.get(kind, 5e5 if "Llama 3" in kind else 1e4)
    scaling: dict = {"rope_type": "default"}
    if "scaled" in kind or "tied" in kind:
        scaling = dict(
            rope_type="llama3",
            factor=pick(8.0, 32.0),
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=pick(16, 64),  # short: positions lie beyond it
        )
    if kind == "linear rope":
        scaling = dict(rope_type="linear", factor=pick(2.0, 4.0))
    if kind == "head_dim":
        config["head_dim"] = pick(2, 6, 32)
    return config, theta, scaling


def write(reference, theta: float, scaling: dict, old: bool, sharded: bool, path: Path) -> None:
    """Saves with transformers; `old` rewrites config.json in the dialect of transformers 4."""
    reference.save_pretrained(path, max_shard_size="20KB" if sharded else "5GB")
    if old:
        written = json.loads((path / "config.json").read_text())
        written.pop("rope_parameters", None)
        written["rope_scaling"] = None if scaling["rope_type"] == "default" else scaling
        written |= dict(rope_theta=theta, torch_dtype=written.pop("dtype", "float64"))
        (path / "config.json").write_text(json.dumps(written))


def relative(a: torch.Tensor, b: torch.Tensor, most: float, what: str) -> float:
    error = ((a - b).abs().max() / b.abs().max()).item()
    assert error < most, f"{what} logits differ by {error:.1e}"
    return error


@torch.no_grad()
def check(number: int, path: Path) -> tuple[float, float]:
    """Relative errors of the logits in float64 and float32.

    Raises AssertionError where a law does not hold.
    """
    config, theta, scaling = random_config(number)
    torch.manual_seed(number)
    rope, read = {"rope_theta": theta, **scaling}, transformers.LlamaForCausalLM.from_pretrained
    settings = transformers.LlamaConfig(**config, rope_parameters=rope, attn_implementation="sdpa")
    reference = transformers.LlamaForCausalLM(settings).double().eval()
    write(reference, theta, scaling, number % 2 == 0, number % 3 == 0, path / "hf")
    tokens = torch.randint(config["vocab_size"], (2, 100))
    expected, what = reference(tokens).logits, f"case {number}:"

    model, narrow = load_checkpoint(path / "hf"), load_checkpoint(path / "hf", torch.float32)
    assert model.dtype == torch.float64
    error64 = relative(model(tokens), expected, 1e-9, f"{what} float64")
    theirs = reference.float()(tokens).logits
    error32 = relative(narrow(tokens), theirs, 1e-5, f"{what} float32")

    how = dict(do_sample=False, eos_token_id=None, pad_token_id=0, max_new_tokens=32)
    prompt, mask = tokens[:1, :20], torch.ones(1, 20)
    greedy = read(path / "hf", dtype=torch.float64).generate(prompt, attention_mask=mask, **how)
    drafting = pack(load_checkpoint(path / "hf"))
    ids = decode(drafting, prompt[0].tolist(), exit_layer=1, max_new_tokens=32).ids
    assert ids == greedy[0, 20:].tolist(), f"{what} greedy tokens differ"

    save_checkpoint(model, path / "back")
    again = load_checkpoint(path / "back")
    assert dataclasses.replace(again.config, eos=model.config.eos) == model.config
    same = torch.equal(read(path / "back", dtype=torch.float64)(tokens).logits, expected)
    assert same, f"{what} transformers reads other logits from what was saved here"
    return error64, error32


def check_one(number: int) -> tuple[float, float]:
    """`check` in a directory of its own."""
    with tempfile.TemporaryDirectory() as path:
        return check(number, Path(path))


# --------------------------------------
# Chats


def ids_or_refusal(ask: Callable[[], list[int]]) -> list[int] | str:
    """The ids of a conversation, or "refused" where the template raises an exception."""
    try:
        return list(ask())
    except (ValueError, jinja2.TemplateError):
        return "refused"


def check_chats() -> int:
    """Ids of the table of chats against apply_chat_template(tokenize=True): how many are equal.

    Where messages name special tokens, with its sanitize_control_tokens. Raises AssertionError
    where ids differ.
    """
    count = 0
    for (kind, make), (template, source) in product(TOKENIZERS.items(), TEMPLATES.items()):
        with tempfile.TemporaryDirectory() as path:
            make(Path(path))
            (Path(path) / "chat_template.jinja").write_text(source, encoding="utf-8")
            slow = "sentencepiece" in kind
            name = "LlamaTokenizer" if slow else "PreTrainedTokenizerFast"
            reference = getattr(transformers, name).from_pretrained(path)
            chat = Chat(Path(path))
        for title, messages in CONVERSATIONS.items():
            chat.messages = messages[:-1]
            found = ids_or_refusal(lambda: chat.ask(messages[-1]["content"]))
            text = "".join(m["content"] for m in messages)
            for guard in {True, any(token in text for token in chat.tokenizer.added)}:
                how = dict(add_generation_prompt=True, sanitize_control_tokens=guard)
                wanted = ids_or_refusal(
                    lambda: reference.apply_chat_template(messages, return_dict=False, **how)
                )
                where = f"{kind}, {template}, {title}, guard {guard}: {found} is not {wanted}"
                assert found == wanted, where
                count += 1
    return count


def main() -> None:
    cases = int(sys.argv[1]) if len(sys.argv) > 1 else 200
    print(f"{check_chats()} conversations have transformers' ids")
    errors = []
    how = dict(mp_context=get_context("spawn"), initializer=torch.set_num_threads, initargs=(1,))
    with ProcessPoolExecutor(**how) as pool:
        for found in pool.map(check_one, range(cases)):
            errors.append(found)
            print(f"\r{len(errors)}/{cases} configs", end="", file=sys.stderr, flush=True)
    worst64, worst32 = map(max, zip(*errors))
    worst = f"{worst64:.1e} (float64) and {worst32:.1e} (float32)"
    print(f"\ntransformers {transformers.__version__}: logits within {worst}")
    print(f"{cases} passed, 0 failed")


if __name__ == "__main__":
    main()
