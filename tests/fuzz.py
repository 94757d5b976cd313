"""Fuzzing what is read: checkpoints and training runs as nobody should leave them.

    python tests/fuzz.py                            4,000 cases; exit code 1 if one fails
    python tests/fuzz.py --first 1200 --cases 100   cases 1200 to 1299 alone

A case is a function of its number. It changes a valid directory, reads it, and decodes or trains.
It must end in what was asked for or in one clear line, within five seconds of processor time and
512 MB above the start. Where transformers is installed it reads the same directory: what it loads
must not be refused here, and logits, ids and EOS must be equal, but for what is KNOWN.
"""

import argparse
import collections
import faulthandler
import io
import os
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
os.environ["HF_HUB_OFFLINE"] = "1"

import numpy as np
import torch
from chat_table import CONVERSATIONS
from damage import Maker, pick, training

from decode import generate
from extras.chat import Chat
from model import load_checkpoint
from support.console import default_settings, load
from support.tokenizer import Tokenizer

try:
    import transformers

    transformers.logging.set_verbosity(100)
    transformers.logging.disable_progress_bar()
except ImportError:
    transformers = None  # type: ignore[assignment]

KNOWN = {  # pattern of a case and its differences: why they stay
    r"logits: 'config: [\w ]+ must be": "numbers no Llama has, which transformers computes with",
    r"config: (model_type|hidden_act|quantization|rope type)": "models that are not built here",
    r"nested too deep|\[{100}": "JSON nested deeper than 100",
    r"generation_config.*eos: ": "an EOS beside something that is no id: the setting is not used",
    r"(extra|additional)_special.*(?!\1)(extra|additional)_special": "two such lists: one counts",
    r"added_tokens_decoder', '|spoiled .*tokenizer_config": "a damaged token: it renumbers others",
    r"not a sentencepiece model": "a damaged tokenizer.model, which sentencepiece refuses",
}

# --------------------------------------
# What is read

INPUT = torch.tensor([[1, 2, 3, 70, 9, 258, 1]])
PROMPTS = ("the fox", " <s>the</s> fox<|im_end|> <think>\n[PAD]a<new>", "", "漢é\n\n  x")


class Refused(str):
    """One clear line, said by this code."""


def read(call: Callable, *more: type[Exception]) -> Any:
    """What a call gives, or Refused. What is neither is raised."""
    try:
        return call()
    except (ValueError, *more) as error:
        text = str(error)
        assert text.isprintable() and 10 < len(text) < 600, f"not one clear line: {error!r:.600}"
        return Refused(text)


def train(path: Path) -> None:
    """Goes on with a stopped run."""
    going_on, save = training(path)
    going_on.train(save)


def decode(path: Path) -> None:
    """Decodes a few tokens, as the command does."""
    model, tokenizer = load(path, torch.float32, "cpu")
    settings = default_settings(path, model.config, tokenizer) | dict(max_new_tokens=4)
    ids = tokenizer.encode("the fox")
    for r in generate(model, ids, **settings):
        assert r.logits is not None and r.logits.shape[1] == model.config.vocab_size
        tokenizer.decode(ids + r.emitted)


def ours_of(path: Path, messages: list) -> dict:
    """By aspect, what this code reads, or Refused."""
    model = read(lambda: load_checkpoint(path, torch.float32))
    tokenizer = read(lambda: Tokenizer(path))
    found = dict(logits=model, ids=tokenizer, chat=tokenizer)
    if not isinstance(tokenizer, Refused):
        found["ids"] = [tokenizer.file.parse(text) for text in PROMPTS]
        found["start"] = tokenizer.encode("")
        chat = lambda: Chat(path, tokenizer).ids(messages, add_generation_prompt=True)
        found["chat"] = read(chat)
    if not isinstance(model, Refused):
        found["logits"] = model(INPUT % model.config.vocab_size)
        if not isinstance(tokenizer, Refused):
            ends = default_settings(path, model.config, tokenizer)["eos"]
            found["eos"] = {t for t in ends if t < model.config.vocab_size}
    return found


def theirs_of(path: Path, messages: list) -> dict:
    """By aspect, what transformers reads; nothing of what it refuses or makes up."""
    found: dict = {}

    def model() -> None:
        how = dict(dtype=torch.float32, output_loading_info=True)
        read, about = transformers.AutoModelForCausalLM.from_pretrained(path, **how)
        logits = read(INPUT % read.config.vocab_size).logits
        if logits.isfinite().all() and not about["missing_keys"] | about["mismatched_keys"]:
            found["logits"], ends = logits, read.generation_config.eos_token_id
            ends, vocab = ends if isinstance(ends, list) else [ends], logits.shape[2]
            ends = {t for t in ends if type(t) in (int, float) and 0 <= t < vocab}
            found.update(dict(eos=ends) if ends else {})

    def tokenizer() -> None:
        fast = (path / "tokenizer.json").is_file()
        if fast or (path / "tokenizer.model").is_file():
            name = "PreTrainedTokenizerFast" if fast else "LlamaTokenizer"
            read = getattr(transformers, name).from_pretrained(path)
            found["ids"] = [read.encode(text, add_special_tokens=False) for text in PROMPTS]
            found.update(dict(start=read.encode("")) if fast else {})
            how = dict(return_dict=False, add_generation_prompt=True, sanitize_control_tokens=True)
            found["chat"] = read.apply_chat_template(messages, **how)

    if any(map(Path.is_fifo, path.iterdir())):  # it would wait for ever
        return found
    for part in (lambda: transformers.AutoConfig.from_pretrained(path), model, tokenizer):
        signal.setitimer(signal.ITIMER_PROF, 10)  # ends what takes longer
        try:
            part()
        except BaseException as error:  # a panic is no Exception
            if isinstance(error, KeyboardInterrupt):
                raise
            if part not in (model, tokenizer):
                break
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
            while torch._C._len_torch_function_stack():  # a device that it had set
                torch._C._pop_torch_function_stack()
    return found


@torch.no_grad()
def differences(path: Path, messages: list) -> list[str]:
    """Where this code and transformers differ. transformers says less of a start, and more ends."""
    ours, found = ours_of(path, messages), []
    for aspect, wanted in (theirs_of(path, messages) if transformers else {}).items():
        said = ours.get(aspect, wanted)
        if aspect == "logits" and not isinstance(said, Refused):
            same = said.shape == wanted.shape and torch.allclose(said, wanted, 1e-3, 1e-4)
        else:
            same = (wanted[: len(said)] if aspect == "start" else wanted) == said
        if not same:
            found.append(f"{aspect}: {said!r:.300} is not {wanted!r:.300}")
    return found


def check(number: int, maker: Maker) -> collections.Counter:
    """Makes a case and reads it: how it ended. Says what failed and what differs."""
    chance, started = np.random.default_rng(number), time.process_time()
    ends, what, work = collections.Counter(), f"case {number}", maker.work
    faulthandler.dump_traceback_later(900, exit=True, file=sys.__stderr__)  # of what never ends
    try:
        with redirect_stderr(io.StringIO()):
            what += f", {maker.make(number, chance)}"
            if (work / "data.json").exists():
                ended = read(lambda: train(work), OSError)
            else:
                ended = read(lambda: decode(work))
            seconds = time.process_time() - started
            assert seconds < 5, f"took {seconds:.1f} seconds"
            ends["refused" if isinstance(ended, Refused) else "read"] += 1
            if (work / "config.json").exists() and not (work / "lock").exists():
                talk = CONVERSATIONS[pick(chance, CONVERSATIONS)]
                if found := differences(work, talk):
                    said = f"{what}: {'; '.join(found)}"
                    known = [why for seen, why in KNOWN.items() if re.search(seen, said, re.S)]
                    ends["differs, known: " + known[0] if known else "differs"] += 1
                    if not known:
                        print(said, flush=True)
    except BaseException as error:
        ends["failed"] += 1
        print(f"{what}: {error!r:.300}", flush=True)
        if isinstance(error, KeyboardInterrupt):
            raise
    finally:
        faulthandler.cancel_dump_traceback_later()
        shutil.rmtree(work, ignore_errors=True)
    return ends


def main() -> None:
    options = argparse.ArgumentParser(description="Reads damaged checkpoints and runs.")
    options.add_argument("--first", type=int, default=0)
    options.add_argument("--cases", type=int, default=4000)
    args = options.parse_args()
    torch.set_num_threads(1)
    signal.signal(signal.SIGPROF, lambda *_: (_ for _ in ()).throw(TimeoutError()))
    ends: collections.Counter = collections.Counter()
    with tempfile.TemporaryDirectory() as base:
        with redirect_stderr(io.StringIO()):
            maker = Maker(Path(base))
        for source in maker.sources[:-1]:
            decode(source)
            if source.name != "meta":
                assert not (found := differences(source, CONVERSATIONS["a message"])), found
        statm = Path("/proc/self/statm")
        if statm.exists():
            used = int(statm.read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (used + (512 << 20), resource.RLIM_INFINITY))
        for number in range(args.first, args.first + args.cases):
            ends += check(number, maker)
    print(f"cases {args.first} to {number}, {'with' if transformers else 'without'} transformers:")
    print("\n".join(f"{count:6} {name}" for name, count in sorted(ends.items())))
    raise SystemExit(ends["failed"] + ends["differs"] > 0)


if __name__ == "__main__":
    main()
