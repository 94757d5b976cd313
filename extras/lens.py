"""What every exit would say at every position (LayerSkip, arXiv 2404.16710, figure 2).

    python -m extras.lens --prompt "def add(a, b):" --png lens.png

`decode.py --exit auto` reads a prompt in the same way.
"""

import sys
from collections.abc import Callable
from itertools import pairwise, product, takewhile
from pathlib import Path
from timeit import repeat
from typing import IO

import torch
from torch import Tensor

from decode import check_request, generate, new_cache
from exact import MAX_ROWS
from extras.trace import parser, piece, start, wanted
from model import PREFILL_ROWS, Llama
from support.console import command_errors

SHORTEST, LONGEST = 16, 128  # tokens of a prompt that choose_exit needs and reads
BAND = 24  # columns of a picture; more are wrapped


@torch.inference_mode()
def exits(model: Llama, tokens: list[int], prefilled: int = 0) -> tuple[Tensor, Tensor]:
    """The likeliest next token after each token, and its probability, after 1..L layers: (L, T).

    The first `prefilled` tokens run as in prefill, the rest in passes that exact.pack makes exact.
    With len(prompt) - 1, the last row is what generate says, near-ties included.
    """
    layers, count = model.config.n_layers, len(tokens)
    cache = new_cache(model, count, 0)
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

    An exit that changes its mind later does not count (section 3).
    """
    return len(said) + 1 - (said == said[-1]).flip(0).cumprod(0).sum(0)


# --------------------------------------
# --exit auto


@torch.inference_mode()
def choose_exit(model: Llama, prompt_ids: list[int], settings: dict) -> dict:
    """exit_layer and draft_len of most tokens per second, for --exit auto.

    Each exit's guesses after the prompt's first token and last LONGEST are held against the last
    layer's, and the rounds that they would make are timed. A prompt of fewer than SHORTEST tokens
    and a model of one layer keep what `settings` say. Raises ValueError for one that cannot run.
    """
    layers, read = model.config.n_layers, prompt_ids[:1] + prompt_ids[1:][-LONGEST:]
    if len(read) < SHORTEST or layers < 2:
        return dict(exit_layer=settings["exit_layer"], draft_len=settings["draft_len"])
    check_request(model.config, prompt_ids)
    said, probability = exits(model, read)
    right, sure = (said == said[-1]).tolist(), (probability > settings["min_confidence"]).tolist()
    seconds, speed = pass_seconds(model), {}
    for e, d in product(range(1, layers), range(1, MAX_ROWS)):
        place, spent = 0, 0.0
        while place < len(read):
            drafted = sum(takewhile(bool, sure[e - 1][place : place + d]))
            spent += (drafted + 1) * seconds(e, 1) + seconds(layers - e, drafted + 1)
            place += sum(takewhile(bool, right[e - 1][place : place + drafted])) + 1
        speed[e, d] = place / spent
    e, d = max(speed, key=speed.__getitem__)
    return dict(exit_layer=e, draft_len=d)


def pass_seconds(model: Llama) -> Callable[[int, int], float]:
    """Seconds of a pass, as a function of its layers and rows, from three that are timed here."""
    many, half = MAX_ROWS // 2, model.config.n_layers // 2
    cache = new_cache(model, many, 0)

    def timed(layers: int, rows: int) -> float:
        x = torch.zeros(rows, dtype=torch.long, device=model.device)
        logits = lambda: model.unembed(model.run_layers(model.embed(x), 0, layers, cache))
        return min(repeat(lambda: int(logits().argmax()), number=1, repeat=4))

    head, one, more = timed(0, 1), timed(half, 1), timed(half, many)
    layer, row = max(one - head, 0) / half, max(more - one, 0) / half / (many - 1)
    return lambda layers, rows: head + layers * (layer + (rows - 1) * row)


# --------------------------------------
# The lens


def draw(file: IO[bytes], words: list[list[str]], shades: Tensor, needed: list[int]) -> None:
    """A PNG: a column per token, a row per exit, and a black line at the layers needed; in bands.

    `words` are the text's tokens, and what each exit says after them. shades (L, T) are how sure
    it is, negative where the last layer disagrees.
    """
    from matplotlib.colors import LinearSegmentedColormap
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    layers, count = shades.shape
    bands, wide = -(-count // BAND), min(count, BAND)
    size = 0.6 + 0.66 * wide, 0.6 + (0.3 + 0.165 * layers) * bands
    figure = Figure(size, layout="constrained")
    colours = LinearSegmentedColormap.from_list("", ["#e66100", "white", "#2c7bd0"])
    no_exit = torch.full((1, count), float("nan"))  # the row of tokens
    cells = torch.cat([no_exit, shades]).numpy()
    font: dict = dict(ha="center", va="center", size=7.5, family="monospace", parse_math=False)
    edges, line = [t - 0.5 for t in range(count + 1)], [e - 0.5 for e in needed]
    for band, axis in enumerate(figure.subplots(bands, squeeze=False)[:, 0]):
        shown = range(count)[band * BAND :][:BAND]
        axis.imshow(cells, cmap=colours, vmin=-1.2, vmax=1.2, aspect="auto")
        for row, t in product(range(layers + 1), shown):
            word = words[row][t]
            axis.text(t, row, word if len(word) < 9 else word[:7] + "…", **font)
        axis.stairs(line, edges, baseline=None, color="black")
        axis.set(xticks=[], xlim=(shown[0] - 0.5, shown[0] + wide - 0.5), ylabel="exit")
    axis.set(xlabel="token of the text (+: new)")
    told: dict = {"as the last layer": colours(0.85), "not so (stronger: surer)": colours(0.15)}
    told["below the line: no change"] = "black"
    handles = [Patch(color=colour, label=text) for text, colour in told.items()]
    figure.legend(handles=handles, loc="outside upper center", ncols=3, frameon=False)
    figure.savefig(file, dpi=200, format="png")


def main() -> None:
    p = parser("lens", "Show what every exit would say next.", 12, "--prompt")
    p.add_argument("--png", type=Path, metavar="FILE", help="draw it, too")
    args = p.parse_args()
    with command_errors(p.prog), wanted(args.png) as file:
        model, tokenizer, ids, settings = start(args)
        rounds = generate(model, ids, **settings | dict(exit_layer=0))
        tokens = ids + [t for r in rounds for t in r.emitted]
        said, sure = exits(model, tokens, len(ids) - 1)
        needed = layers_needed(said).tolist()
        words = [[piece(tokenizer, t) for t in row] for row in [tokens, *said.tolist()]]
        words[0][len(ids) :] = ["+" + word for word in words[0][len(ids) :]]  # not of the prompt
        print("needs  token         what the exits say next; 3 x: from exit 3 on")
        for e, (token, *column) in zip(needed, zip(*words)):
            new = [f"{i + 1} {x}" for i, x in enumerate(column) if i == 0 or x != column[i - 1]]
            print(f"{e:5}  {token:12}  {'  '.join(new)}")
        print(f"needs {sum(needed) / len(needed):.2f} of {len(said)} on average", file=sys.stderr)
        if file:
            draw(file, words, torch.where(said == said[-1], sure, -sure), needed)


if __name__ == "__main__":
    main()
