"""How good each exit is: on texts, on tasks of lm-eval, on summaries (docs/evaluate.md).

python -m extras.evaluate --data FILE --png exits.png
"""

from argparse import Namespace
from copy import deepcopy
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from itertools import islice
from math import exp
from pathlib import Path
from typing import IO, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from bench.common import markdown, progress, write_csv
from bench.engine import ideal_speedup
from decode import check_request, generate
from exact import MAX_ROWS, pack
from extras.early_exit import keep_layers
from extras.lens import pass_seconds
from extras.trace import parser, start, wanted
from model import Llama
from support.console import Totals, collect, command_errors
from support.data import encode, read_corpus, read_prompts
from support.tokenizer import Stream
from support.train_command import conversations

WINDOW = 2048  # tokens of --data that see each other
ROWS = 1024  # that are unembedded at once
BATCH = 8  # likelihoods found together
ROUGE = ["rouge1", "rouge2", "rougeL"]


def judged(model: Llama, h: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """After hidden states h (R, dim): log-probabilities of targets (R,), and likeliest ids (R,)."""
    found = []
    for x, y in zip(h.split(ROWS), targets.split(ROWS)):
        logits = model.unembed(x).float()
        found.append((-F.cross_entropy(logits, y, reduction="none"), logits.argmax(-1)))
    likely, said = map(torch.cat, zip(*found))
    return likely, said


@torch.inference_mode()
def data_rows(t: Namespace) -> list[dict]:
    """Loss, perplexity, agreement with the last layer, and ideal speedup of each exit.

    Documents are encoded as for training. ValueError where no token has a loss.
    """
    model, c, count, rows = t.model, t.model.config, 0, []
    last, size, render = c.n_layers, min(c.max_len - 2, WINDOW), conversations(t.ckpt)
    exits = sorted({*(t.exits or range(1, last)), last})
    sums = {e: torch.zeros(2, dtype=torch.float64) for e in exits}
    for document in islice(read_corpus(t.data), t.limit):
        ids, learned = encode(document, t.tokenizer, render)
        for at in range(0, len(ids) - 1, size):
            x = torch.tensor(ids[at : at + size + 1], device=model.device)
            kept = torch.tensor(learned[at + 1 : at + size + 1])
            check_request(c, x.tolist())
            h, depth, found = model.embed(x[None, :-1]), 0, {}
            for e in exits:
                h, depth = model.run_layers(h, depth, e), e
                found[e] = [y.cpu()[kept] for y in judged(model, h[0], x[1:])]
            for e, (likely, said) in found.items():
                agreed = (said == found[last][1]).sum()
                sums[e] += torch.stack([-likely.double().sum(), agreed])
            count += int(kept.sum())
            progress(f"{count} tokens")
    if not count:
        raise ValueError("no token has a loss")
    seconds = pass_seconds(pack(model)) if last > 1 else max
    for e, total in sums.items():
        loss, agreement = (total / count).tolist()
        costs = lambda d: ((d + 1) * seconds(e, 1), seconds(last - e, d + 1))
        speedup = max(ideal_speedup(agreement, d, *costs(d)) for d in range(1, MAX_ROWS))
        row = dict(exit=e, loss=loss, perplexity=exp(loss), agreement=agreement)
        rows.append(row | {"ideal speedup": speedup * seconds(last, 1) if e < last else 1.0})
    return rows


packed = cache(lambda model: pack(deepcopy(model)))  # a copy that decodes to the bit


class Judge:
    """The first `depth` layers as a model of lm-eval, whose TemplateLM has the rest.

    Likelihoods are the plain model's, texts a packed copy's, drafted by t.settings.
    """

    eot_token_id = prefix_token_id = 0

    def __init__(self, t: Namespace, depth: int):
        super().__init__()
        self.model, self.encode, self.t, self.depth = t.model, t.tokenizer.encode, t, depth
        self.size = t.model.config.max_len
        bos, eos = t.tokenizer.bos, t.tokenizer.eos
        self.prefix_token_id = (eos if bos is None else bos) or 0

    def tok_encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return self.encode(text, add_special_tokens)

    def loglikelihood_rolling(self, requests: list) -> list[float]:
        utils, parts = import_module("lm_eval.utils"), []
        for (text,) in (request.args for request in requests):
            cut = self.encode(text), self.prefix_token_id, self.size, 1
            pairs = utils.get_rolling_token_windows(*cut)
            parts.append([(None, *utils.make_disjoint_window(pair)) for pair in pairs])
        found = iter(self._loglikelihood_tokens([part for text in parts for part in text]))
        return [sum(next(found)[0] for _ in text) for text in parts]

    @torch.inference_mode()
    def _loglikelihood_tokens(self, rows: list, **_: Any) -> list[tuple[float, bool]]:
        """For (text, context, ids): log-probability of ids, and whether each is the likeliest.

        A context too long loses its start.
        """
        found: dict[int, tuple[float, bool]] = {}
        order = sorted(range(len(rows)), key=lambda n: -len(rows[n][1] + rows[n][2]))
        while places := order[len(found) : len(found) + BATCH]:
            progress(f"exit {self.depth}: {len(found)} of {len(rows)} likelihoods")
            texts = [torch.tensor((rows[n][1] + rows[n][2])[-self.size - 1 :]) for n in places]
            x = pad_sequence(texts, batch_first=True).to(self.model.device)  # on the right
            hidden = self.model.run_layers(self.model.embed(x[:, :-1]), 0, self.depth)
            for n, text, h, ids in zip(places, texts, hidden, x[:, 1:]):
                end = len(text) - 1
                begin = end - len(rows[n][2])
                assert begin >= 0, f"a continuation is longer than the context of {self.size}"
                likely, said = (y[begin:] for y in judged(self.model, h[:end], ids[:end]))
                found[n] = likely.sum().item(), torch.equal(said, ids[begin:end])
        return [found[n] for n in range(len(rows))]

    def generate_until(self, requests: list) -> list[str]:
        """For (context, settings): the text that follows, up to one of `until`."""
        texts, model = list[str](), keep_layers(packed(self.model), range(self.depth))
        alone = dict(exit_layer=0) if self.depth < self.model.config.n_layers else {}
        for context, how in (request.args for request in requests):
            progress(f"exit {self.depth}: {len(texts)} of {len(requests)} texts")
            assert not how.get("do_sample"), "tasks that sample are not run"
            count = how.get("max_gen_toks") or how.get("max_new_tokens") or 256
            ids = self.encode(context)[-max(self.size - count, 1) :] or [self.prefix_token_id]
            ends = how.get("until") or []
            ends = [*filter(None, [ends] if type(ends) is str else ends)]
            settings = self.t.settings | dict(max_new_tokens=count) | alone
            stream, text = Stream(self.t.tokenizer, [], ends), ""
            for r in generate(model, ids, **settings):
                text += stream.feed(r.emitted)
                if stream.stopped:
                    break
            texts.append(text + stream.finish())
        return texts


def task_rows(t: Namespace) -> list[dict]:
    """Metrics of each task: of exits alone, and of the full model."""
    api, evaluator = import_module("lm_eval.api.model"), import_module("lm_eval.evaluator")
    kind: Any = type("Judge", (Judge, api.TemplateLM), {})
    try:  # a task is a program, and may fail in any way
        progress("lm-eval looks for tasks")
        own = dict(include_path=t.include_path, include_defaults=not t.include_path)
        tasks = import_module("lm_eval.tasks").TaskManager(**own)
        how, rows = dict(tasks=t.tasks, limit=t.limit, task_manager=tasks), []
        for e in sorted({*t.exits, t.model.config.n_layers}):
            rows.append(row := dict(exit=e))
            for task, found in evaluator.simple_evaluate(kind(t, e), **how)["results"].items():
                numbers = {k: v for k, v in found.items() if "," in k and not isinstance(v, str)}
                row |= {f"{task} {k.removesuffix(',none')}": float(v) for k, v in numbers.items()}
    except Exception as error:
        raise ValueError(f"lm-eval: {type(error).__name__}: {error}") from error
    return rows


def summary_rows(t: Namespace) -> list[dict]:
    """ROUGE (F1) and speed of the full model, of exits alone, and of what they draft."""
    rouge = import_module("rouge_score.rouge_scorer").RougeScorer(ROUGE)
    texts = read_prompts(t.summaries)[: t.limit]
    if not all(isinstance(text.get("reference"), str) for text in texts):
        raise ValueError(f"{t.summaries} has a row without a reference")
    prompts = [t.tokenizer.encode(text["prompt"]) for text in texts]
    for ids in prompts:
        check_request(t.model.config, ids)
    model, plain, own = pack(t.model), t.settings | dict(exit_layer=0), t.settings["exit_layer"]
    ways = {f"{model.config.n_layers} layers": (model, plain)}
    for e in t.exits or [own] * (own > 0):
        ways[f"{e} layers alone"] = keep_layers(model, range(e)), plain
        ways[f"{e} layers draft"] = model, plain | dict(exit_layer=e)
    rows, full = list[dict](), list[int]()
    for way, (used, how) in ways.items():
        collect(generate(used, prompts[0], **how | dict(max_new_tokens=8)))  # not timed cold
        total, row = Totals(), {"way": way, **dict.fromkeys(ROUGE, 0.0)}
        for number, (ids, text) in enumerate(zip(prompts, texts)):
            progress(f"{way}: {number} of {len(texts)}")
            begin = len(total.ids)
            collect(generate(used, ids, **how), into=total)
            score = rouge.score(text["reference"], t.tokenizer.decode(total.ids[begin:]))
            row |= {name: row[name] + score[name].fmeasure / len(texts) for name in ROUGE}
        row |= {"tokens/s": total.tokens_per_second, "accepted": total.acceptance}
        row |= {"tokens per round": len(total.ids) / len(total.rounds)}
        full = full or total.ids
        rows.append(row | {"identical": total.ids == full})
    return rows


def draw(file: IO[bytes], rows: list[dict], about: str) -> None:
    """A PNG: each column of numbers over the first column."""
    from matplotlib.figure import Figure

    first, *names = rows[0]
    names = [name for name in names if isinstance(rows[0][name], float)]
    figure = Figure((3.4 * len(names), 3.2), layout="constrained")
    for axis, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names):
        axis.plot([row[first] for row in rows], [row[name] for row in rows], marker=".")
        axis.set(title=name, xlabel=first)
    figure.suptitle(about)
    figure.savefig(file, dpi=110, format="png")


def main() -> None:
    more = "--exit", "--draft", "--min-confidence", "--full", "--no-verify", "--dtype", "--device"
    p = parser("evaluate", "How good is each exit?", 128, *more)
    p.set_defaults(no_exact=True)
    add = p.add_mutually_exclusive_group(required=True).add_argument
    add("--data", nargs="+", metavar="FILE", help="texts: loss, agreement, ideal speedup")
    add("--tasks", nargs="+", metavar="NAME", help="tasks of lm-eval")
    add("--summaries", type=Path, metavar="FILE", help="prompts, references: ROUGE, speed")
    add = p.add_argument
    add("--exits", type=int, nargs="+", default=[], metavar="E", help="alone; of --data: all")
    add("--include-path", type=Path, metavar="DIR", help="tasks of a folder, not lm-eval's")
    add("--limit", type=int, default=1 << 30, metavar="N", help="of each, the first N")
    add("--csv", type=Path, metavar="FILE", help="write the table")
    add("--png", type=Path, metavar="FILE", help="draw it")
    t = p.parse_args()
    with command_errors(p.prog), wanted(t.csv) as table, wanted(t.png) as png:
        needed = (t.tasks, "lm_eval"), (t.summaries, "rouge_score"), (t.png, "matplotlib")
        for given, name in needed:
            if given and not find_spec(name):
                raise ValueError(f"a package is missing: pip install {name.replace('_', '-')}")
        if t.limit < 1:
            raise ValueError("--limit must be at least 1")
        t.model, t.tokenizer, _, t.settings = start(t)
        last = t.model.config.n_layers - 1
        if not all(0 < e <= last for e in t.exits):
            raise ValueError(f"--exits must be from 1 to {last}")
        rows = (data_rows if t.data else task_rows if t.tasks else summary_rows)(t)
        progress("")
        shown = [{k: v for k, v in row.items() if "_stderr" not in k} for row in rows]
        about = f"{t.ckpt.name}, {str(t.model.dtype)[6:]}"
        print(markdown(about, shown))
        if table:
            write_csv(table, rows)
        if png:
            draw(png, shown, about)


if __name__ == "__main__":
    main()
