"""What a person sees of a generation, and of the model inside it.

    Show            the text as it comes, coloured by who foresaw it
    Trace           a line a round: what was drafted, accepted, rejected, and how long it took; trace_json is the same as data
    Lens            what every exit would say at every position (LayerSkip, arXiv 2404.16710, figure 2), as text or a figure

Text goes to stdout, what is said about it to stderr; colours only to a terminal, and not where NO_COLOR is set.
"""

import json
import os
import shutil
import sys
import unicodedata
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import torch
from torch import Tensor

from cache import KVQCache
from model import MAX_ROWS, PREFILL_ROWS, Llama
from tokenizer import Stream, Tokenizer

if TYPE_CHECKING:
    from decode import Round

GREEN, RED, BLUE, DIM, PLAIN = "\033[32m", "\033[31m", "\033[94m", "\033[2m", "\033[0m"
BLACK_ON = "\033[38;5;16;48;5;{}m"  # both colours are set, so it reads on a dark terminal and on a light one
GREENS, REDS = (194, 157, 120, 83), (224, 217, 210, 203)  # of the 256 colours, from pale to full


def colours() -> bool:
    """Whether stdout takes colours."""
    return sys.stdout.isatty() and "NO_COLOR" not in os.environ


def paint(text: str, colour: str) -> str:
    """Text in a colour (an escape code), where stdout takes colours."""
    return f"{colour}{text}{PLAIN}" if colours() else text


@contextmanager
def whole_file(path: Path | None) -> Iterator[BinaryIO | None]:
    """A file to write bytes to, which is at `path` when all went well and leaves no trace when not. None: None.

    Opened at once, so that a path that cannot be written is refused before there is anything to lose. ValueError where there
    is something else than a file.
    """
    if path is None:
        yield None
        return
    path = path.resolve()  # a link stays a link
    if not path.parent.is_dir():
        raise ValueError(f"{path} cannot be written: there is no directory {path.parent}")
    if path.exists() and not path.is_file():
        raise ValueError(f"{path} is there and is not a file")
    aside = path.with_name(path.name + ".new")
    try:
        with open(aside, "wb") as file:
            yield file
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


# ---------------------------------------------------------------------------------------------------------------------
# Tokens on one line


def visible(text: str) -> str:
    """Text with its white space shown, and no control characters: a model may say anything, escape codes too."""
    text = text.translate({ord("\n"): "⏎", ord("\t"): "→", ord(" "): "·"})
    return "".join(c if c.isprintable() else "\ufffd" for c in text)


def piece(tokenizer: Tokenizer, token: int) -> str:
    """What a token adds to a text, made visible; <id> when that is nothing (BOS, EOS)."""
    before = tokenizer.encode("a", bos=False)[-1:]  # a lone piece would lose its leading space
    return visible(tokenizer.decode([*before, token])[len(tokenizer.decode(before)) :]) or f"<{token}>"


def fit(text: str, width: int) -> str:
    """Text cut or padded to `width` columns of a terminal; East Asian characters take two, accents none."""
    columns = [0 if unicodedata.combining(c) else 1 + (unicodedata.east_asian_width(c) in "WF") for c in text]
    if sum(columns) > width:
        kept = next(n for n in range(len(text), -1, -1) if sum(columns[:n]) < width)
        text, columns = text[:kept] + "…", [*columns[:kept], 1]
    return text + " " * (width - sum(columns))


# ---------------------------------------------------------------------------------------------------------------------
# Rounds


class Show:
    """Streams rounds to stdout as text. On a terminal, tokens that the draft foresaw are green, the verifier's own blue."""

    def __init__(self, tokenizer: Tokenizer, prompt_ids: list[int], drafts: bool):
        self.stream, self.drafts = Stream(tokenizer, prompt_ids), drafts

    def prompt(self, text: str) -> None:
        """What comes before the first round: on a terminal the prompt, dim, and what the colours mean."""
        if sys.stdout.isatty():
            if self.drafts and colours():
                print(f"{GREEN}drafted and accepted{PLAIN}, {BLUE}the verifier's own{PLAIN}\n", file=sys.stderr)
            self._print(text, DIM)

    def __call__(self, r: "Round") -> None:
        for place, token in enumerate(r.emitted):
            self._print(self.stream.feed([token]), GREEN if place < r.accepted else BLUE)

    def finish(self) -> None:
        """What comes after the last round: text that was held back, and the end of the line."""
        self._print(self.stream.finish(), BLUE)
        print(flush=True)

    def _print(self, text: str, colour: str) -> None:
        if text:
            print(paint(text, colour) if self.drafts else text, end="", flush=True)


class Trace:
    """A line a round on stdout, with a box a token, in place of the text. Takes the place of Show."""

    ACCEPTED, REJECTED, UNSEEN, OWN = ("✓", GREEN), ("✗", RED), ("-", DIM), ("+", BLUE)

    def __init__(self, tokenizer: Tokenizer, prompt_ids: list[int], drafts: bool):
        self.tokenizer, self.rounds = tokenizer, 0

    def prompt(self, text: str) -> None:
        """What comes before the first round: what the signs mean."""
        print("drafted: ✓ accepted, ✗ rejected, - not looked at; + the verifier's own\n", file=sys.stderr)

    def __call__(self, r: "Round") -> None:
        self.rounds += 1
        boxes = [paint(f"[{sign}{piece(self.tokenizer, token)}]", colour) for token, (sign, colour) in self.boxes(r)]
        times = f"draft {1e3 * r.draft_seconds:6.1f} ms  verify {1e3 * r.verify_seconds:6.1f} ms"
        print(f"{self.rounds:4}  {times}  {' '.join(boxes)}", flush=True)

    def boxes(self, r: "Round") -> list[tuple[int, tuple[str, str]]]:
        """Tokens of a decode.Round, each with its sign and colour. Emitted are those with ✓ or +, in this order.

        An EOS that was accepted is the last that is looked at: nothing is rejected then, and the verifier adds nothing.
        """
        own = r.emitted[r.accepted :]
        fates = [self.ACCEPTED] * r.accepted + [self.REJECTED] * len(own) + [self.UNSEEN] * len(r.drafted)
        return [*zip(r.drafted, fates), *((token, self.OWN) for token in own)]

    def finish(self) -> None:
        """Nothing comes after the last round."""


def trace_json(rounds: list, prompt_ids: list[int], settings: dict) -> bytes:
    """A run as data, with the settings (generate's) that repeat it: the format that porting/check.py reads.

    `length` is the number of live positions after the round: all known tokens but the last (porting/SPEC.md, 3.1).
    """
    names = ("exit_layer", "draft_len", "max_new_tokens", "min_confidence")
    repeat = {**{name: settings[name] for name in names}, **asdict(settings["sampling"]), "eos": list(settings["eos"])}
    entries, length = [], len(prompt_ids) - 1
    for r in rounds:
        length += len(r.emitted)
        fields = ("drafted", "accepted", "emitted", "draft_seconds", "verify_seconds")
        entries.append({**{name: getattr(r, name) for name in fields}, "length": length})
    case = {"name": "decode.py", "prompt": prompt_ids, "settings": repeat, "rounds": entries}
    return json.dumps({"format": "layerskip-trace-1", "cases": [case]}).encode() + b"\n"


# ---------------------------------------------------------------------------------------------------------------------
# Exits


@torch.inference_mode()
def exits(model: Llama, tokens: list[int], prefilled: int) -> tuple[Tensor, Tensor]:
    """The likeliest next token after each of `tokens`, and its probability, at the exits behind 1..L layers: (L, T) both.

    The first `prefilled` tokens run in the pieces of a prefill, the rest in passes that are held to the bit. With
    len(prompt) - 1 the last row is then what generate says after the prompt, near-ties included.
    """
    c = model.config
    cache = KVQCache(c.n_layers, c.n_kv_heads, c.head_dim, c.dim, len(tokens), 0, model.dtype, model.device)
    said, sure = [], []
    while cache.length < len(tokens):
        in_prompt = cache.length < prefilled
        end = min(cache.length + PREFILL_ROWS, prefilled) if in_prompt else cache.length + MAX_ROWS
        rows = tokens[cache.length : end]
        hidden: dict = dict.fromkeys(range(1, c.n_layers + 1))
        model.run_layers(model.embed(torch.tensor(rows, device=model.device)), 0, c.n_layers, cache, cache.length, hidden)
        cache.accept(len(rows))
        for h in hidden.values():  # an exit at a time: at a vocabulary of 128k its logits take 250 MB
            logits = model.unembed(h)
            said.append(logits.argmax(-1).cpu())
            sure.append(logits.float().softmax(-1).amax(-1).cpu())
    words, confidence = (torch.stack([torch.cat(found[l :: c.n_layers]) for l in range(c.n_layers)]) for found in (said, sure))
    return words, confidence


def layers_needed(said: Tensor) -> Tensor:
    """For each token, the fewest layers E such that exits E..L all say what the last one says. said (L, T) -> (T,).

    An exit that says it too early and changes its mind does not count: the paper calls such layers hesitant (section 3, where
    a Llama 1 7B needs 23.45 of its 32 layers on average over a text that it writes).
    """
    settled = (said == said[-1]).flip(0).cumprod(0).sum(0)
    return len(said) + 1 - settled


class Lens:
    """What every exit would say after every token of a text: layers from top to bottom, tokens from left to right.

    The text is a prompt and what was generated after it, possibly nothing; each column stands below the token that goes in.
    """

    CELL = 7  # columns of a token: enough for "·return"

    def __init__(self, model: Llama, tokenizer: Tokenizer, prompt_ids: list[int], new_ids: list[int]):
        tokens = prompt_ids + new_ids
        said, self.sure = exits(model, tokens, len(prompt_ids) - 1)
        self.agrees, self.needed = said == said[-1], layers_needed(said)
        self.said = [[piece(tokenizer, token) for token in row] for row in said.tolist()]
        self.tokens = [(" " if place < len(prompt_ids) else "+") + piece(tokenizer, t) for place, t in enumerate(tokens)]

    def blocks(self, most: int) -> list[range]:
        """The columns in blocks of at most so many, all about as wide."""
        total = len(self.tokens)
        wide = -(-total // -(-total // most))
        return [range(first, min(first + wide, total)) for first in range(0, total, wide)]

    def text(self) -> str:
        """The table, in blocks as wide as the terminal, or 110 columns. ✓ marks agreement with the last layer."""
        columns, lines = shutil.get_terminal_size((110, 0)).columns, []
        for block in self.blocks(max(1, (columns - 6) // (self.CELL + 2))):
            header = [paint(fit(self.tokens[t], self.CELL + 1), BLUE if self.tokens[t][0] == "+" else DIM) for t in block]
            lines.append(" ".join([" exit ", *header]))
            for layer in range(len(self.said)):
                lines.append(" ".join([f"{layer + 1:5} ", *(self.cell(layer, t) for t in block)]))
            lines += [" ".join(["needs ", *(f" {int(self.needed[t]):<{self.CELL}}" for t in block)]), ""]
        return "\n".join(line.rstrip() for line in lines)

    def cell(self, layer: int, t: int) -> str:
        """What the exit behind layer `layer` (from 0) says after token t, CELL + 1 columns wide; the deeper the colour, the surer."""
        agrees, shade = self.agrees[layer, t], min(3, int(4 * self.sure[layer, t]))
        text = fit("✓ "[not agrees] + self.said[layer][t], self.CELL + 1)
        return paint(text, BLACK_ON.format((GREENS if agrees else REDS)[shade]))

    def statistics(self) -> str:
        """Layers needed per token: the mean, and how many tokens need how many layers, in at most 8 bins."""
        layers, needed = len(self.said), self.needed.tolist()
        width = -(-layers // 8)
        counts = Counter((n - 1) // width for n in needed)
        lines = [f"layers needed per token: {sum(needed) / len(needed):.2f} of {layers} on average over {len(needed)} tokens"]
        for b in range(-(-layers // width)):
            bar = "█" * round(40 * counts[b] / max(counts.values()))
            lines.append(f"{b * width + 1:5} to {min(layers, (b + 1) * width):<3} " + f"{bar} {counts[b]}".strip())
        return "\n".join(lines)

    def draw(self, file: BinaryIO) -> None:
        """The table as a PNG, 1800 pixels wide to be shown at 900, with a line at the layers that each token needs.

        The ground is white and opaque: dark letters on pale cells read the same on a light page and on a dark one.
        """
        import matplotlib  # only here

        matplotlib.use("Agg")
        from matplotlib import pyplot

        layers, blocks = len(self.said), self.blocks(13)
        figure, axes = pyplot.subplots(len(blocks), 1, figsize=(9, 0.4 + len(blocks) * (0.165 * layers + 0.4)), layout="constrained", squeeze=False)
        strength = 0.1 + 0.75 * self.sure[..., None]
        colour = torch.where(self.agrees[..., None], torch.tensor([0.2, 0.75, 0.35]), torch.tensor([0.95, 0.45, 0.35]))
        ground = (1 - strength * (1 - colour)).numpy()
        text = dict(ha="center", va="center", fontsize=7.5, family="monospace", parse_math=False)
        for axis, block in zip(axes[:, 0], blocks):
            axis.imshow(ground[:, block.start : block.stop], aspect="auto", extent=(block.start - 0.5, block.stop - 0.5, layers + 0.5, 0.5))
            for t in block:
                axis.text(t, 0, fit(self.tokens[t], self.CELL + 1).strip(), **text, weight="bold")
                for layer in range(layers):
                    dim = "black" if self.agrees[layer, t] else "dimgray"
                    axis.text(t, layer + 1, fit(self.said[layer][t], self.CELL + 1).strip(), **text, color=dim)
            edges = [t - 0.5 for t in [*block, block.stop]]
            axis.stairs(self.needed[block.start : block.stop].numpy() - 0.5, edges, baseline=None, color="black", linewidth=1.2)
            axis.set(xlim=(block.start - 0.5, block.start + len(blocks[0]) - 0.5), xticks=[], ylabel="exit layer")
            axis.set_yticks([1, *range(4, layers + 1, 4)])
            axis.tick_params(labelsize=7.5, length=2)
            axis.spines[:].set_visible(False)
        figure.suptitle("what each exit would say next; green: the last layer's word; deeper: more confident; below the line it stays", fontsize=8.5)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Glyph")  # the font lacks some scripts: a box stands for the character
            figure.savefig(file, dpi=200, format="png")
        pyplot.close(figure)
