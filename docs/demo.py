"""Draws docs/demo.svg, the README's picture of `python decode.py --compare` in a terminal.

    python docs/demo.py [--ckpt DIR]
"""

import sys
from html import escape
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from decode import DEFAULT_CKPT, DEFAULT_PROMPT, comparison, drafting_defaults, generate, generation_defaults, run  # noqa: E402
from model import load_checkpoint  # noqa: E402
from tokenizer import Stream, Tokenizer  # noqa: E402

GREEN, BLUE, DIM, TEXT, BACKGROUND = "#7ee787", "#79c0ff", "#8b949e", "#e6edf3", "#0d1117"
COLUMNS, LINES, WIDTH, HEIGHT = 88, 26, 8.4, 18


def main() -> None:
    ckpt = Path(sys.argv[2]) if sys.argv[1:2] == ["--ckpt"] else DEFAULT_CKPT
    model, tokenizer = load_checkpoint(ckpt).pack(), Tokenizer(ckpt)
    settings = drafting_defaults(generation_defaults(ckpt), model.config)
    ids = tokenizer.encode(DEFAULT_PROMPT)
    for warm in (settings, {}):
        run(generate(model, ids, max_new_tokens=16, **warm))
    drafted, full = (run(generate(model, ids, max_new_tokens=256, **how), keep_logits=True) for how in (settings, {}))

    stream, parts = Stream(tokenizer, ids), [("$ python decode.py --compare\n", TEXT)]
    parts += [("drafted and accepted", GREEN), (", ", TEXT), ("the verifier's own", BLUE), ("\n\n", TEXT), (DEFAULT_PROMPT, DIM)]
    for r in drafted.rounds:
        parts += [(stream.feed([token]), GREEN if place < r.accepted else BLUE) for place, token in enumerate(r.emitted)]
    lines = [[]]
    for text, colour in parts:  # wrap at COLUMNS as a terminal does
        for character in text:
            if character == "\n" or sum(len(t) for t, _ in lines[-1]) == COLUMNS:
                lines.append([])
            if character != "\n":
                lines[-1].append((character, colour))
    summary = [drafted.summary(), "full model: " + full.summary(), comparison(drafted, full)]
    lines = lines[: LINES - 5] + [[("...", DIM)], []] + [[(line, TEXT)] for line in summary]

    width, height = COLUMNS * WIDTH + 32, len(lines) * HEIGHT + 36
    svg = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height}" font-family="ui-monospace,Menlo,Consolas,monospace" font-size="14">']
    svg.append(f'<rect width="100%" height="100%" rx="8" fill="{BACKGROUND}"/>')
    for number, line in enumerate(lines):
        column, place = 0, 0
        while place < len(line):  # one element a run of one colour, each at its own column: fonts differ
            end = place
            while end < len(line) and line[end][1] == line[place][1]:
                end += 1
            text = "".join(t for t, _ in line[place:end])
            if text.strip():
                lead = len(text) - len(text.lstrip())
                x, length = 16 + (column + lead) * WIDTH, len(text.strip()) * WIDTH
                fit = f' textLength="{length:.1f}" lengthAdjust="spacingAndGlyphs"' if len(text.strip()) <= COLUMNS else ""
                svg.append(f'<text xml:space="preserve" x="{x:.1f}" y="{30 + number * HEIGHT}" fill="{line[place][1]}"{fit}>{escape(text.strip())}</text>')
            column, place = column + len(text), end
    (ROOT / "docs" / "demo.svg").write_text("\n".join(svg + ["</svg>"]) + "\n")
    print("\n".join(summary))


if __name__ == "__main__":
    main()
