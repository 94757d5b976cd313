"""Draws docs/round.svg: one round of decoding, what is computed when.

    python docs/round.py
"""

from html import escape
from pathlib import Path

LAYERS, EXIT, DRAFT, ACCEPTED, LIVE = 8, 3, 4, 2, 4  # L, E, d, a, and the positions that were live before
W, H, LEFT, TOP = 54, 30, 78, 112  # of a cell; the corner of the grid
GAP = 24  # between layers E-1 and E, for the exit queries
FADED = 'opacity="0.45"'
INK, FAINT, GREY, GREEN, ORANGE, BLUE, RED = "#1f2328", "#6e7781", "#d8dee4", "#8ddb9c", "#f5b95f", "#8cc4ff", "#cf222e"
INDEX = "₀₁₂₃₄"
RIGHT = LEFT + (LIVE + DRAFT + 1) * W
BOTTOM = TOP + LAYERS * H + GAP


def text(x: float, y: float, words: str, colour: str = INK, anchor: str = "middle", size: int = 13, style: str = "") -> str:
    return f'<text x="{x}" y="{y}" fill="{colour}" text-anchor="{anchor}" font-size="{size}" {style}>{escape(words)}</text>'


def rect(x: float, y: float, colour: str, more: str = "") -> str:
    return f'<rect x="{x + 1}" y="{y + 1}" width="{W - 2}" height="{H - 2}" rx="3" fill="{colour}" {more}/>'


def top_of(layer: int) -> int:
    """y of a layer's cells; layer 0 is at the bottom."""
    return BOTTOM - (layer + 1) * H - (GAP if layer >= EXIT else 0)


def main() -> None:
    n = LIVE + 1
    svg = []
    for layer in range(LAYERS):
        svg.append(text(LEFT - 10, top_of(layer) + 20, f"layer {layer}", FAINT, "end", 12))
        for place in range(LIVE + DRAFT + 1):
            row, x, y = place - LIVE, LEFT + place * W, top_of(layer)
            dead = row > ACCEPTED
            colour = GREY if row < 0 else GREEN if layer < EXIT else BLUE
            svg.append(rect(x, y, colour, FADED if dead else ""))
            if row >= 0:
                svg.append(text(x + W / 2, y + 20, str(row + 1 if layer < EXIT else DRAFT + 2), size=12, style='opacity="0.55"'))
            if dead:
                svg.append(f'<path d="M{x + 4} {y + H - 4}L{x + W - 4} {y + 4}" stroke="{RED}" stroke-width="1.3"/>')
    for row in range(DRAFT + 1):
        x, middle, last = LEFT + (LIVE + row) * W, LEFT + (LIVE + row) * W + W / 2, row == DRAFT
        y = top_of(EXIT) + H + GAP / 2
        svg.append(f'<rect x="{x + 8}" y="{y - 9}" width="{W - 16}" height="18" rx="9" fill="{ORANGE}" {FADED if row > ACCEPTED else ""}/>')
        svg.append(text(middle, y + 4, f"q{INDEX[row]}", size=12))
        svg.append(text(middle, BOTTOM + 20, f"t{INDEX[row]}", RED if row > ACCEPTED else INK))
        svg.append(text(middle, TOP - 12, f"v{INDEX[row]}", INK if row <= ACCEPTED else FAINT))
        if not last:
            verdict, colour = (f"= t{INDEX[row + 1]}", "#1a7f37") if row < ACCEPTED else (f"≠ t{INDEX[row + 1]}", RED) if row == ACCEPTED else ("", INK)
            svg.append(text(middle, TOP - 34, verdict, colour, size=12))
    for place in range(LIVE):
        svg.append(text(LEFT + place * W + W / 2, BOTTOM + 20, f"x{INDEX[place]}" if place < LIVE - 1 else "xₙ₋₂"))
    svg.append(text(LEFT + LIVE * W + W / 2, BOTTOM + 38, "= xₙ₋₁", FAINT, size=12))
    for name, end, y in (("live before: n - 1", LIVE, 56), (f"live after: n + a, a = {ACCEPTED}", n + ACCEPTED, 78)):
        end = LEFT + end * W - 2
        svg.append(f'<path d="M{LEFT + 2} {BOTTOM + y - 5}V{BOTTOM + y}H{end}V{BOTTOM + y - 5}" fill="none" stroke="{FAINT}"/>')
        svg.append(text(LEFT + 8, BOTTOM + y - 5, name, FAINT, "start", 12))
    emitted = LEFT + LIVE * W
    svg.append(f'<path d="M{emitted + 4} {TOP - 49}V{TOP - 54}H{emitted + (ACCEPTED + 1) * W - 4}V{TOP - 49}" fill="none" stroke="{FAINT}"/>')
    svg.append(text(emitted + (ACCEPTED + 1) * W / 2, TOP - 60, "emitted: v₀..vₐ", size=12))

    words = [
        (GREY, "before", ["keys and values of x₀..xₙ₋₂", "in every layer"]),
        (GREEN, "draft", [f"layers [0, E), a token at a time: 1..{DRAFT + 1}", "tᵢ₊₁ = pick(unembed(qᵢ), n+i)"]),
        (ORANGE, "exit queries", ["what enters layer E: the verifier starts", "here and runs no layer below again"]),
        (BLUE, "verify", [f"layers [E, L), all rows in one pass: {DRAFT + 2}", "vᵢ = pick(logitsᵢ, n+i)"]),
        (None, "accept", ["a = number of leading i with tᵢ₊₁ = vᵢ", "emit v₀..vₐ"]),
        (RED, "rewind", ["cache length := n + a", "what lies beyond is dead: written over"]),
    ]
    x, y = RIGHT + 34, 62
    for colour, name, lines in words:
        if colour == RED:
            svg.append(rect(x, y - 12, GREEN, FADED).replace(f'width="{W - 2}" height="{H - 2}"', 'width="22" height="18"'))
            svg.append(f'<path d="M{x + 3} {y + 5}L{x + 21} {y - 9}" stroke="{RED}" stroke-width="1.3"/>')
        elif colour:
            svg.append(f'<rect x="{x}" y="{y - 12}" width="22" height="18" rx="3" fill="{colour}"/>')
        svg.append(text(x + 32, y + 2, name, INK, "start", 14, 'font-weight="bold"'))
        svg += [text(x + 32, y + 21 + 18 * number, line, INK, "start", 13) for number, line in enumerate(lines)]
        y += 66
    width, height = 900, BOTTOM + 96
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="Helvetica,Arial,sans-serif">'
    # a ground of its own: the same picture on a light page and on a dark one
    ground = f'<rect width="{width}" height="{height}" rx="8" fill="#ffffff"/>'
    title = text(LEFT, 26, f"One round: L = {LAYERS}, E = {EXIT}, d = {DRAFT}. Numbers: the order of the passes", INK, "start", 15, 'font-weight="bold"')
    (Path(__file__).parent / "round.svg").write_text("\n".join([head, ground, title, *svg, "</svg>"]) + "\n")


if __name__ == "__main__":
    main()
