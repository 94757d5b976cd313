"""The real model, SmolLM2-135M-Instruct, against transformers; and every drafter on it.

    make real                                        makes the checkpoint, and runs this
    python tests/real.py --context 8000 --prompts 10    drafters alone, after 2,000 to 8,000 tokens

In float32: logits of 20 texts within 1e-5 relative to the largest, and greedy text equal, of
prompts and of chats; tokens of 2,000 strings equal; streamed text equal to decoded text; what
save_checkpoint writes gives transformers the same logits. Then each drafter's tokens and logits
against plain decoding's, in both types, eager and compiled. Exit code 1 where one does not hold.
"""

import argparse
import itertools
import pydoc_data.topics
import sys
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from unittest.mock import patch

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import numpy as np
import torch
import transformers
from helpers import DRAFTERS, decode, same_bits

import decode as front
from bench.tasks import held_out_prompts
from cache import KVQCache
from decode import Sampling
from exact import pack
from extras.chat import Chat
from extras.compiled import compile_model
from model import Llama, load_checkpoint, prefill, save_checkpoint
from support.data import read_files, stdlib_files
from support.tokenizer import Stream, Tokenizer

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
CKPT, EXIT, NEW = ROOT / "checkpoints" / "smollm2", 8, 64
LANGUAGES = (
    "機械学習のモデルは、次の単語を予測します。",
    "大型语言模型一次生成一个词元。",
    "언어 모델은 다음 단어를 예측한다.",
    "Языковая модель предсказывает слово.",
    "🎉🚀 ¿Qué tal? 👩‍👩‍👧‍👦 naïve café ½ ≤ ∑ \u200b\t\r\n",
    "عربي मानक ไทย Ünïcödé <|im_end|> [INST] <s>",
)
QUESTIONS = (
    "Hello, how are you?",
    "What is the capital of France?",
    "Write a Python function that reverses a list.",
    "Name three colours.\n\nOne per line.",
    "Translate to French: good morning",
)


def texts() -> list[str]:
    """20 texts of 10 to 4,000 tokens: code, prose, other scripts."""
    code = [d.text for d in read_files(stdlib_files()[::9]) if len(d.text) > 16_000]
    prose = list(pydoc_data.topics.topics.values())
    parts = [code[i][: 500 * 2**i] for i in range(6)] + [prose[i][: 60 * 2**i] for i in range(7)]
    mixed = "\n".join(LANGUAGES) + code[7][:200]
    return [*parts, *LANGUAGES, mixed]


def strings(count: int) -> list[str]:
    """Cuts of the texts at random places, whatever they cut."""
    random, whole = np.random.default_rng(0), "\n".join(texts())
    starts, lengths = random.integers(0, len(whole), count), random.integers(0, 200, count)
    return [whole[a : a + b] for a, b in zip(starts, lengths)]


def greedy(reference: transformers.LlamaForCausalLM, ids: list[int], eos: int | None) -> list[int]:
    """transformers' next tokens."""
    x, plain = torch.tensor([ids]), dict(do_sample=False, pad_token_id=0)
    out = reference.generate(
        x, attention_mask=torch.ones_like(x), max_new_tokens=NEW, eos_token_id=eos, **plain
    )
    return out[0, len(ids) :].tolist()


@torch.no_grad()
def against_transformers(tokenizer: Tokenizer) -> str:
    """Everything that transformers has too. Raises AssertionError where it differs."""
    read = transformers.LlamaForCausalLM.from_pretrained
    reference = read(CKPT, dtype=torch.float32).eval()
    theirs = transformers.AutoTokenizer.from_pretrained(CKPT)
    model, worst, longest = load_checkpoint(CKPT, torch.float32), 0.0, 0
    for text in strings(2000):
        ids = tokenizer.encode(text)
        assert ids == theirs(text).input_ids, f"other tokens for {text!r}"
        stream = Stream(tokenizer, [])
        parts = [stream.feed([token]) for token in ids] + [stream.finish()]
        assert "".join(parts) == tokenizer.decode(ids), f"streamed otherwise: {text!r}"
    with tempfile.TemporaryDirectory() as folder:
        save_checkpoint(model, folder)
        again = read(folder, dtype=torch.float32).eval()
        for text in texts():
            x = torch.tensor([tokenizer.encode(text)])
            expected = reference(x).logits
            error = ((model(x) - expected).abs().max() / expected.abs().max()).item()
            assert error < 1e-5, f"logits differ by {error:.1e} for {text[:40]!r}"
            assert torch.equal(again(x).logits, expected), "what was saved gives other logits"
            worst, longest = max(worst, error), max(longest, x.shape[1])
    pack(model)
    for prompt in held_out_prompts(20, tokenizer, 64):
        ids = decode(model, prompt, exit_layer=EXIT, max_new_tokens=NEW).ids
        assert ids == greedy(reference, prompt, None), "greedy text differs"
    chat = Chat(CKPT)
    for question in QUESTIONS:
        turns = [*chat.messages, dict(role="user", content=question)]
        ids = theirs.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
        assert chat.ask(question) == ids, f"another rendering of {question!r}"
        answer = decode(model, ids, max_new_tokens=NEW, eos=chat.ends).ids
        assert answer == greedy(reference, ids, chat.ends[0]), "the answer differs"
        chat.keep(question, tokenizer.decode(answer[:-1]))
    said = f"logits of 20 texts (up to {longest:,} tokens) within {worst:.1e} of transformers'"
    return f"{said}; 2,000 strings, 20 greedy texts and {len(QUESTIONS)} chat answers equal"


def starts(tokenizer: Tokenizer, count: int, context: int) -> list[list[int]]:
    """Prompts: code and requests to repeat, or, for a context, 2,000 to so many tokens of code."""
    if context:
        code = "".join(d.text for d in itertools.islice(read_files(stdlib_files()), 60))
        ids, random = tokenizer.encode(code), np.random.default_rng(0)
        lengths = np.linspace(2000, context, count).astype(int)
        return [ids[(at := random.integers(len(ids) - n)) : at + n] for n in lengths]
    asked = [Chat(CKPT).ask(f"Repeat this:\n{t[:200]}") for t in texts()[: count // 2]]
    return held_out_prompts(count - count // 2, tokenizer, 64) + asked


def prefill_once(kept: dict, model: Llama, cache: KVQCache, tokens: list[int]) -> None:
    """model.prefill, which copies what it left for the same model and tokens the last time."""
    key = id(model), *tokens
    if key not in kept:
        prefill(model, cache, tokens)
        kept.clear()
        kept[key] = [x[:, :, : len(tokens)].clone() for x in (cache.keys, cache.values)]
    else:
        for x, known in zip((cache.keys, cache.values), kept[key]):
            x[:, :, : len(tokens)] = known
        cache.commit(len(tokens))


def drafted(tokenizer: Tokenizer, count: int, tokens: int, context: int) -> Iterator[int]:
    """Tokens of each drafted run. Raises AssertionError where one is not plain decoding's."""
    prompts = starts(tokenizer, count, context)
    for compiled, dtype in itertools.product((True, False), (torch.float32, torch.bfloat16)):
        model = load_checkpoint(CKPT, dtype)
        model = compile_model(model, EXIT) if compiled else pack(model)
        for number, ids in enumerate(prompts if compiled else prompts[::5]):  # eager is slow
            how = dict(max_new_tokens=tokens, sampling=Sampling(0.8 * (number % 2), seed=number))
            plain = decode(model, ids, **how)
            for who, make in DRAFTERS.items():
                found = decode(model, ids, **how, **make(model, EXIT))
                assert same_bits(found, plain), f"{who}, {dtype}, compiled {compiled}, differs"
                yield len(found.ids)


def main() -> None:
    p = argparse.ArgumentParser(prog="real.py", description=__doc__.splitlines()[0])
    p.add_argument("--prompts", type=int, default=20, help="for each drafter and type, compiled")
    p.add_argument("--tokens", type=int, default=100, help="new tokens of each")
    p.add_argument("--context", type=int, default=0, metavar="N", help="of the longest prompt")
    args, tokenizer = p.parse_args(), Tokenizer(CKPT)
    if not args.context:
        print(against_transformers(tokenizer), flush=True)
    runs, total = 0, 0
    with patch.object(front, "prefill", partial(prefill_once, {})):
        for count in drafted(tokenizer, args.prompts, args.tokens, args.context):
            runs, total = runs + 1, total + count
            print(f"\r{runs} drafted runs", end="", file=sys.stderr, flush=True)
    print(f"\n{total:,} tokens in {runs} runs of {len(DRAFTERS)} drafters: 0 differences")


if __name__ == "__main__":
    main()
