"""What every exit would say at every position (LayerSkip, arXiv 2404.16710, figure 2).

    python -m extras.lens --prompt "def add(a, b):" --png lens.png

`decode.py --exit auto` reads a prompt in the same way.
"""

import shutil
import sys
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from itertools import pairwise, product, takewhile
from pathlib import Path
from timeit import repeat
from typing import BinaryIO
from unicodedata import east_asian_width

import torch
from torch import Tensor

from checkpoint import whole_file
from command import BLUE, DIM, command_errors, run
from decode import generate, new_cache
from exact import MAX_ROWS, pack
from extras.trace import paint, parser, piece, start
from model import PREFILL_ROWS, Llama
from tokenizer import Tokenizer

BLACK_ON = "\033[38;5;16;48;5;{}m"  # both colours are set, so it reads on any terminal
GREENS, REDS = (194, 157, 120, 83), (224, 217, 210, 203)  # pale to full
CELL = 8  # columns of a token: a sign and "·return"
SHORTEST, LONGEST = 16, 128  # tokens of a prompt that choose_exit needs and reads


@torch.inference_mode()
def exits(model: Llama, tokens: list[int], prefilled: int = 0) -> tuple[Tensor, Tensor]:
    """The likeliest next token after each token, and its probability, after 1..L layers: (L, T).

    The first `prefilled` tokens run as in prefill, the rest in passes that exact.pack makes exact.
    With len(prompt) - 1, the last row is what generate says, near-ties included.
    """
    layers, count = model.config.n_layers, len(tokens)
    cache = new_cache(model.config, count, 0, model.dtype, model.device)
    said, sure = torch.zeros(layers, count, dtype=torch.long), torch.zeros(layers, count)
    ends = [*range(0, prefilled, PREFILL_ROWS), *range(prefilled, count, MAX_ROWS), count]
    for first, end in pairwise(ends):
        h = model.embed(torch.tensor(tokens[first:end], device=model.device))
        for l in range(layers):
            h = model.run_layers(h, l, l + 1, cache, first)
            logits = model.unembed(h)
            said[l, first:end] = logits.argmax(-1)
            sure[l, first:end] = logits.float().softmax(-1).amax(-1)
    return said, sure


def layers_needed(said: Tensor) -> Tensor:
    """For each token, the fewest layers E such that exits E..L all say what L says. (L, T) -> (T,).

    An exit that changes its mind later does not count (section 3 of the paper).
    """
    return len(said) + 1 - (said == said[-1]).flip(0).cumprod(0).sum(0)


@torch.inference_mode()
def choose_exit(model: Llama, prompt_ids: list[int], settings: dict) -> dict:
    """exit_layer and draft_len of most tokens per second, for --exit auto.

    Each exit's guesses after the prompt's first token and last LONGEST are held against the last
    layer's, and the rounds that they would make are timed. A prompt of fewer than SHORTEST tokens
    does not tell: both stay as in `settings`. Raises ValueError for a model of one layer.
    """
    if len(prompt_ids) < SHORTEST:
        return dict(exit_layer=settings["exit_layer"], draft_len=settings["draft_len"])
    said, probability = exits(model, prompt_ids[:1] + prompt_ids[1:][-LONGEST:])
    right, sure = (said == said[-1]).tolist(), (probability > settings["min_confidence"]).tolist()
    layers, count = said.shape
    if layers < 2:
        raise ValueError("a model of one layer has no exit to choose")
    seconds, speed = pass_seconds(model), {}
    for e, d in product(range(1, layers), range(1, MAX_ROWS)):
        place, spent = 0, 0.0
        while place < count:
            drafted = sum(takewhile(bool, sure[e - 1][place : place + d]))
            spent += (drafted + 1) * seconds(e, 1) + seconds(layers - e, drafted + 1)
            place += sum(takewhile(bool, right[e - 1][place : place + drafted])) + 1
        speed[e, d] = place / spent
    e, d = max(speed, key=speed.__getitem__)
    return dict(exit_layer=e, draft_len=d)


def pass_seconds(model: Llama) -> Callable[[int, int], float]:
    """Seconds of a pass, by its layers and rows: linear between four that are timed here."""
    many, half = MAX_ROWS // 2, max(1, model.config.n_layers // 2)
    cache = new_cache(model.config, many, 0, model.dtype, model.device)

    def timed(layers: int, rows: int) -> float:
        x = torch.zeros(rows, dtype=torch.long, device=model.device)
        run_layers = lambda: model.run_layers(model.embed(x), 0, layers, cache)
        return min(repeat(lambda: int(model.unembed(run_layers()).argmax()), number=1, repeat=4))

    a, b, c, d = (timed(*shape) for shape in product((0, half), (1, many)))

    def seconds(layers: int, rows: int) -> float:
        x, y = layers / half, (rows - 1) / (many - 1)
        return max((1 - x) * (a + y * (b - a)) + x * (c + y * (d - c)), a)

    return seconds


def fit(text: str, width: int) -> str:
    """Text cut or padded to `width` columns of a terminal. East Asian characters take two."""
    columns = lambda text: sum(1 + (east_asian_width(c) in "WF") for c in text)
    if columns(text) > width:
        while columns(text) >= width:
            text = text[:-1]
        text += "…"
    return text + " " * (width - columns(text))


class Lens:
    """What each exit would say after each token of a prompt and of what follows it."""

    def __init__(
        self, model: Llama, tokenizer: Tokenizer, prompt_ids: list[int], new_ids: list[int]
    ):
        tokens, known = prompt_ids + new_ids, len(prompt_ids)
        said, self.sure = exits(model, tokens, known - 1)
        self.agrees, self.needed = said == said[-1], layers_needed(said)
        self.said = [[piece(tokenizer, token) for token in row] for row in said.tolist()]
        self.tokens = [" +"[i >= known] + piece(tokenizer, t) for i, t in enumerate(tokens)]

    def blocks(self, width: int) -> list[range]:
        """The columns, in blocks of `width`."""
        every = range(len(self.tokens))
        return [every[first : first + width] for first in every[::width]]

    def text(self) -> str:
        """The table, in blocks as wide as the terminal. ✓ is agreement with the last layer."""
        names = [" exit ", *(f"{e:5} " for e in range(1, len(self.said) + 1)), "needs "]
        lines, columns = [], shutil.get_terminal_size().columns
        for block in self.blocks(max(1, (columns - 6) // (CELL + 1))):
            lines += [" ".join(row).rstrip() for row in zip(names, *map(self.column, block))] + [""]
        return "\n".join(lines)

    def column(self, t: int) -> list[str]:
        """The cells of one token, from the top down. The deeper a colour, the surer the exit."""
        cells = [paint(fit(self.tokens[t], CELL), BLUE if self.tokens[t][0] == "+" else DIM)]
        for row, agrees, sure in zip(self.said, self.agrees[:, t], self.sure[:, t]):
            colour = (GREENS if agrees else REDS)[min(3, int(4 * sure))]
            cells.append(paint(fit("✓ "[not agrees] + row[t], CELL), BLACK_ON.format(colour)))
        return [*cells, fit(f" {self.needed[t]}", CELL)]

    def statistics(self) -> str:
        """Layers needed per token: the mean and the quartiles."""
        ordered, count = sorted(self.needed.tolist()), len(self.tokens)
        a, b, c = (ordered[count * part // 4] for part in (1, 2, 3))
        mean = f"{sum(ordered) / count:.2f} of {len(self.said)} on average over {count} tokens"
        return f"layers needed: {mean}; a quarter of them {a} at most, half {b}, three quarters {c}"

    def draw(self, file: BinaryIO) -> None:
        """The table as a PNG: green agrees, red does not, and a line at the layers needed."""
        from matplotlib.figure import Figure  # only here

        layers, blocks = len(self.said), self.blocks(13)
        figure = Figure((9, len(blocks) * (0.165 * layers + 0.4)), layout="constrained")
        shades = torch.where(self.agrees, self.sure, -self.sure).numpy()
        how: dict = dict(cmap="RdYlGn", vmin=-1.4, vmax=1.4, aspect="auto")
        font: dict = dict(ha="center", va="center", size=7.5, family="monospace", parse_math=False)
        for axis, block in zip(figure.subplots(len(blocks), squeeze=False)[:, 0], blocks):
            left, right = block[0] - 0.5, block[-1] + 0.5
            axis.imshow(shades[:, block], extent=(left, right, layers + 0.5, 0.5), **how)
            for t in block:
                for row, word in enumerate([self.tokens[t], *(words[t] for words in self.said)]):
                    axis.text(t, row, fit(word, CELL).strip(), **font)
            edges = [t - 0.5 for t in (*block, block[-1] + 1)]
            axis.stairs(self.needed[block].numpy() - 0.5, edges, baseline=None, color="black")
            axis.set(xlim=(left, left + 13), ylim=(layers + 0.5, -0.5), xticks=[], ylabel="exit")
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Glyph")  # a box stands for what the font lacks
            figure.savefig(file, dpi=200, format="png")


def main() -> None:
    p = parser("lens", "Show what every exit would say next, over a prompt and what follows.", 12)
    p.add_argument("--png", type=Path, metavar="FILE", help="draw the table, too")
    args = p.parse_args()
    with command_errors(p.prog), whole_file(args.png) if args.png else nullcontext() as file:
        model, tokenizer, ids, settings = start(args)
        settings |= dict(exit_layer=0, max_new_tokens=args.max_new_tokens or 1)
        said = run(generate(pack(model), ids, **settings)).ids[: args.max_new_tokens]
        lens = Lens(model, tokenizer, ids, [t for t in said if t not in settings["eos"]])
        print(lens.text())
        print(lens.statistics(), file=sys.stderr)
        if file:
            lens.draw(file)


if __name__ == "__main__":
    main()
