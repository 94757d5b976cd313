"""How good each exit is: on texts, on tasks of lm-eval, on summaries (docs/evaluate.md).

python -m extras.evaluate --data FILE --png exits.png
"""

import argparse
import csv
import logging
from collections.abc import Iterator, Sequence
from copy import deepcopy
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from io import TextIOWrapper
from itertools import islice
from math import exp
from pathlib import Path
from typing import IO, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from bench.common import markdown, progress
from bench.engine import ideal_speedup
from decode import Sampling, check_request, generate
from exact import MAX_ROWS, pack
from extras.early_exit import keep_layers
from extras.lens import pass_seconds
from extras.trace import wanted
from model import Llama
from support import decode_command
from support.console import Totals, collect, command_errors
from support.data import encode, read_corpus, read_prompts
from support.decode_command import Session
from support.tokenizer import Stream, Tokenizer
from support.train_command import conversations

WINDOW = 2048  # the most tokens of --data that see each other
ROWS = 1024  # that are unembedded at once: logits are large
LENGTHS = "max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens"


def windows(ids: Sequence, size: int) -> Iterator[tuple[Sequence, int]]:
    """Parts of ids with `size` inputs, and how many of a part's last ids are targets.

    Each id but the first is a target once. The last part begins early enough to be whole.
    """
    for first in range(1, len(ids), size):
        last = min(first + size, len(ids))
        yield ids[max(last - size - 1, 0) : last], last - first


def judged(model: Llama, h: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """After hidden states h (R, dim): log-probabilities of targets (R,), and likeliest ids (R,)."""
    found = []
    for x, y in zip(h.split(ROWS), targets.split(ROWS)):
        logits = model.unembed(x).float()
        found.append((-F.cross_entropy(logits, y, reduction="none").double(), logits.argmax(-1)))
    likely, said = map(torch.cat, zip(*found))
    return likely, said


@torch.inference_mode()
def data_rows(args: argparse.Namespace, s: Session, exits: list[int]) -> list[dict]:
    """Loss, perplexity, agreement with the last layer, and speedup to expect of each exit.

    Documents are encoded as for training. Raises ValueError where no token has a loss.
    """
    model, last = s.model, s.model.config.n_layers
    size, render = min(model.config.max_len - 2, WINDOW), conversations(args.ckpt)
    sums, count = {e: torch.zeros(2) for e in sorted({*exits, last})}, 0
    for document in islice(read_corpus(args.data), args.limit):
        ids, learned = encode(document, s.tokenizer, render)
        for (part, n), (flags, _) in zip(windows(ids, size), windows(learned, size)):
            check_request(model.config, [*part])
            x, kept = torch.tensor(part, device=model.device), torch.tensor(flags[-n:])
            h, depth, found = model.embed(x[None, :-1]), 0, {}
            for e in sums:
                h, depth = model.run_layers(h, depth, e), e
                found[e] = judged(model, h[0, -n:][kept], x[-n:][kept])
            for e, (likely, said) in found.items():
                sums[e] += torch.stack([-likely.sum(), (said == found[last][1]).sum()]).cpu()
            count += sum(flags[-n:])
            progress(f"{count} tokens")
    if not count:
        raise ValueError("the data has no token with a loss")
    rows: list[dict] = []
    for e, (loss, agreement) in ((e, (total / count).tolist()) for e, total in sums.items()):
        rows.append(dict(exit=e, loss=loss, perplexity=exp(loss), agreement=agreement))
    if len(rows) > 1:
        seconds = pass_seconds(pack(model))  # timed here
    for row in rows:
        e, promised = row["exit"], [1.0]
        for d in range(1, MAX_ROWS) if e < last else ():
            costs = (d + 1) * seconds(e, 1), seconds(last - e, d + 1)
            promised.append(ideal_speedup(row["agreement"], d, *costs) * seconds(last, 1))
        row["expected speedup"] = max(promised[1:], default=1.0)
    return rows


class Judge:
    """Answers lm-eval as its own model `hf` does, by the first `depth` layers.

    Likelihoods are the plain model's. Texts are a packed copy's, drafted as generate's `settings`
    say.
    """

    def __init__(
        self, model: Llama, tokenizer: Tokenizer, settings: dict, depth: int, batch: int = 1
    ):
        super().__init__()
        self.model, self.tokenizer, self.settings = model, tokenizer, settings
        self.depth, self.batch, self.size = depth, batch, model.config.max_len
        self.first: Any = tokenizer.eos if tokenizer.bos is None else tokenizer.bos

    def loglikelihood(self, requests: list) -> list[tuple[float, bool]]:
        """For (context, continuation): log-probability, and whether it is the greedy one."""
        return self.score([self.pair(*request.args) for request in requests])

    def pair(self, context: str, continuation: str) -> tuple[list[int], int]:
        """Ids of both, and how many are the continuation's, as is the space between them."""
        text = context.rstrip()
        continuation = context[len(text) :] + continuation
        if not text:
            ids = self.tokenizer.encode(continuation, bos=False)
            ids = [self.first] * (ids[:1] != [self.first]) + ids
            return ids, len(ids) - 1
        ids = self.tokenizer.encode(text)
        rest = self.tokenizer.encode(text + continuation)[len(ids) :]
        return ids + rest, len(rest)

    def loglikelihood_rolling(self, requests: list) -> list[float]:
        """For (text,): log-probability, in windows of the model's context."""
        texts = [[self.first, *self.tokenizer.encode(request.args[0])] for request in requests]
        parts = [[*windows(ids, self.size)] for ids in texts]
        found = iter(self.score([part for text in parts for part in text]))
        return [sum(next(found)[0] for _ in text) for text in parts]

    @torch.inference_mode()
    def score(self, rows: list) -> list[tuple[float, bool]]:
        """For (ids, n): log-probability of the last n ids, and whether each is the likeliest.

        Ids too many for the context lose their start. ValueError where n alone is too many.
        """
        found: dict[int, tuple[float, bool]] = {}
        order = sorted(range(len(rows)), key=lambda place: -len(rows[place][0]))
        while order:
            progress(f"exit {self.depth}: {len(found)} of {len(rows)} likelihoods")
            places, order = order[: self.batch], order[self.batch :]
            texts = [torch.tensor(rows[place][0][-self.size - 1 :]) for place in places]
            x = pad_sequence(texts, batch_first=True).to(self.model.device)  # on the right
            hidden = self.model.run_layers(self.model.embed(x[:, :-1]), 0, self.depth)
            for place, text, ids, h in zip(places, texts, x, hidden):
                start, end = len(text) - rows[place][1], len(text)
                if start < 1:
                    raise ValueError(f"a continuation of more than {self.size} tokens")
                likely, said = judged(self.model, h[start - 1 : end - 1], ids[start:end])
                found[place] = likely.sum().item(), torch.equal(said, ids[start:end])
        return [found[place] for place in range(len(rows))]

    def generate_until(self, requests: list) -> list[str]:
        """For (context, lm-eval's settings): the text that follows."""
        found = []
        for seed, request in enumerate(requests):
            progress(f"exit {self.depth}: {seed} of {len(requests)} texts")
            found.append(self.text(*request.args, seed))
        return found

    def text(self, context: str, how: dict, seed: int = 0) -> str:
        """What follows a context, up to one of `until`. A context too long loses its start.

        Tokens are looked at one by one, so the end does not depend on rounds.
        """
        count = next((how[name] for name in LENGTHS if how.get(name)), 256)
        if count >= self.size:
            raise ValueError(f"{count} new tokens are asked for: the context has {self.size}")
        ids = self.tokenizer.encode(context)[count - self.size :] or [self.first]
        until = how.get("until") or []
        until = [until] if isinstance(until, str) else [*filter(None, until)]
        named = ("temperature", "top_k", "top_p") if how.get("do_sample") is not False else ()
        sampling = Sampling(seed=seed, **{name: how[name] for name in named if name in how})
        settings = self.settings | dict(max_new_tokens=count, sampling=sampling)
        rounds = generate(keep_layers(packed(self.model), range(self.depth)), ids, **settings)
        text, stream = "", Stream(self.tokenizer, [])
        for token in (token for r in rounds for token in r.emitted):
            text += stream.feed([token])
            if any(end in text for end in until):
                break
        text += stream.finish()
        for end in until:
            text = text.partition(end)[0]
        return text


@cache
def packed(model: Llama) -> Llama:
    """A copy that decodes to the bit."""
    return pack(deepcopy(model))


def task_rows(args: argparse.Namespace, s: Session, exits: list[int]) -> list[dict]:
    """The metrics of each task: of the exits alone, and of the full model."""
    lm_eval, lm = import_module("lm_eval"), import_module("lm_eval.api.model").LM
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    kind: Any = type("Judge", (Judge, lm), {})
    folder, last, rows = args.include_path, s.model.config.n_layers, []
    try:  # a task is a program, and may fail in any way
        manager = lm_eval.tasks.TaskManager(include_path=folder, include_defaults=not folder)
        how = dict(tasks=args.tasks, task_manager=manager, limit=args.limit, bootstrap_iters=100)
        for e in sorted({*exits, last}):
            settings = s.settings if e == last else s.settings | dict(exit_layer=0)
            judge = kind(s.model, s.tokenizer, settings, e, args.batch)
            row = dict(exit=e)
            for task, found in lm_eval.simple_evaluate(judge, **how)["results"].items():
                numbers = {k: v for k, v in found.items() if "," in k and not isinstance(v, str)}
                row |= {f"{task} {k.removesuffix(',none')}": v for k, v in numbers.items()}
            rows.append(row)
    except Exception as error:
        raise ValueError(f"lm-eval: {type(error).__name__}: {error}") from error
    return rows


def summary_rows(args: argparse.Namespace, s: Session, exits: list[int]) -> list[dict]:
    """ROUGE (F1) and speed of the full model, of exits alone, and of what they draft."""
    names = ["rouge1", "rouge2", "rougeL"]
    rouge = import_module("rouge_score.rouge_scorer").RougeScorer(names)
    texts = read_prompts(args.summaries)[: args.limit]
    if not all(isinstance(text.get("reference"), str) for text in texts):
        raise ValueError(f"{args.summaries} has a row without a reference")
    prompts = [s.encode(text["prompt"]) for text in texts]
    for ids in prompts:
        check_request(s.model.config, ids)
    model, plain = pack(s.model), s.settings | dict(exit_layer=0)
    ways, rows, said = {f"{model.config.n_layers} layers": (model, plain)}, [], []
    for e in exits:
        ways[f"{e} layers alone"] = keep_layers(model, range(e)), plain
        ways[f"{e} layers draft"] = model, s.settings | dict(exit_layer=e)
    for way, (used, how) in ways.items():
        collect(generate(used, prompts[0], **how | dict(max_new_tokens=8)))  # not timed cold
        total, scores, starts = Totals(), list[dict](), [0]
        for ids, text in zip(prompts, texts):
            progress(f"{way}: {len(scores)} of {len(texts)}")
            collect(generate(used, ids, **how), into=total)
            answer = s.tokenizer.decode(total.ids[starts[-1] :])
            starts.append(len(total.ids))
            scores.append(rouge.score(text["reference"], answer))
        row: dict = {"way": way}
        for name in names:
            row[name] = sum(score[name].fmeasure for score in scores) / len(scores)
        row |= {"tokens/s": total.tokens_per_second, "accepted": total.acceptance}
        row["tokens per round"] = len(total.ids) / len(total.rounds)
        said.append(total.ids)
        row["identical"] = said[-1] == said[0] if how["exit_layer"] else None
        rows.append(row)
    return rows


def draw(file: IO[bytes], rows: list[dict]) -> None:
    """A PNG: each column of numbers over the first column."""
    from matplotlib.figure import Figure

    first, *names = rows[0]
    names = [name for name in names if isinstance(rows[0][name], float)]
    figure = Figure((3.4 * len(names), 3.2), layout="constrained")
    for axis, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names):
        axis.plot([row[first] for row in rows], [row[name] for row in rows], marker=".")
        axis.set(title=name, xlabel=first)
    figure.savefig(file, dpi=110, format="png")


def main() -> None:
    about = "How good is each exit? Other options are as in decode.py."
    p = argparse.ArgumentParser(prog="python -m extras.evaluate", description=about)
    add = p.add_mutually_exclusive_group(required=True).add_argument
    add("--data", nargs="+", metavar="FILE", help="loss and agreement on texts, as of train.py")
    add("--tasks", nargs="+", metavar="NAME", help="tasks of lm-eval")
    add("--summaries", type=Path, metavar="FILE", help="ROUGE on .jsonl: prompt, reference")
    add = p.add_argument
    add("--exits", type=int, nargs="+", default=[], metavar="E", help="exits (data: all)")
    add("--include-path", type=Path, metavar="DIR", help="tasks of a folder, not lm-eval's own")
    add("--limit", type=int, metavar="N", help="the first N documents of each")
    add("--batch", type=int, default=8, metavar="N", help="likelihoods together; %(default)s")
    add("--csv", type=Path, metavar="FILE", help="write the table")
    add("--png", type=Path, metavar="FILE", help="draw it")
    options = decode_command.parser()._option_string_actions
    for name in "ckpt chat exit draft min-confidence full no-verify max-new-tokens dtype".split():
        p._add_action(options[f"--{name}"])
    args = p.parse_args()
    work, package = data_rows, "torch"
    if args.tasks:
        work, package = task_rows, "lm-eval"
    if args.summaries:
        work, package = summary_rows, "rouge-score"
    with command_errors(p.prog), wanted(args.csv) as table, wanted(args.png) as png:
        if not find_spec(package.replace("-", "_")):
            raise ImportError(f"this needs a package: pip install {package}")
        if args.chat and args.tasks:
            raise ValueError("--tasks are without a chat template: leave out --chat")
        if args.batch < 1 or (args.limit or 1) < 1:
            raise ValueError("--batch and --limit must be at least 1")
        whole = vars(decode_command.parser().parse_args([])) | vars(args) | dict(no_exact=True)
        s = Session(argparse.Namespace(**whole), "")
        last, own = s.model.config.n_layers, s.settings["exit_layer"]
        exits = args.exits or [*range(1, last + 1)] * bool(args.data)
        exits = exits or [own] * bool(args.summaries and own)
        if not all(0 < e <= last for e in exits):
            raise ValueError(f"--exits must be from 1 to {last}")
        rows = work(args, s, exits)
        progress("")
        kept = [{k: v for k, v in row.items() if "_stderr" not in k} for row in rows]
        print(markdown(f"{args.ckpt.name}, {str(s.model.dtype)[6:]}", kept))
        if table:
            writer = csv.DictWriter(TextIOWrapper(table, write_through=True), rows[0])
            writer.writeheader()
            writer.writerows(rows)
        if png:
            draw(png, kept)


if __name__ == "__main__":
    main()
