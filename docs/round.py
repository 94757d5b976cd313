"""Draws docs/round.svg: one round of decoding, what is computed when.

python docs/round.py
"""

from html import escape
from pathlib import Path

LAYERS, EXIT, DRAFT, ACCEPTED = 8, 3, 4, 2  # L, E, d, a
LIVE = 4  # positions that are live before the round
W, H, LEFT, TOP = 54, 30, 78, 112  # of a cell; the corner of the grid
GAP = 24  # between layers E-1 and E, for the exit queries
FADED = 'opacity="0.45"'
INK, FAINT, GREY, GREEN = "#1f2328", "#6e7781", "#d8dee4", "#8ddb9c"
ORANGE, BLUE, RED, DARK_GREEN = "#f5b95f", "#8cc4ff", "#cf222e", "#1a7f37"
INDEX = "₀₁₂₃₄"
RIGHT = LEFT + (LIVE + DRAFT + 1) * W
BOTTOM = TOP + LAYERS * H + GAP
WIDTH, HEIGHT = 900, BOTTOM + 96
LEGEND = [
    (GREY, "before", "keys and values of x₀..xₙ₋₂", "in every layer"),
    (
        GREEN,
        "draft",
        f"layers [0, E), a token at a time: 1..{DRAFT + 1}",
        "tᵢ₊₁ = pick(unembed(qᵢ), n+i)",
    ),
    (
        ORANGE,
        "exit queries",
        "what enters layer E: the verifier starts",
        "here and runs no layer below again",
    ),
    (
        BLUE,
        "verify",
        f"layers [E, L), all rows in one pass: {DRAFT + 2}",
        "vᵢ = pick(logitsᵢ, n+i)",
    ),
    (None, "accept", "a = number of leading i with tᵢ₊₁ = vᵢ", "emit v₀..vₐ"),
    (RED, "rewind", "cache length := n + a", "what lies beyond is dead: written over"),
]


def text(
    x: float,
    y: float,
    words: str,
    colour: str = INK,
    anchor: str = "middle",
    size: int = 13,
    style: str = "",
) -> str:
    """Words at a place."""
    place = f'x="{x}" y="{y}" fill="{colour}" text-anchor="{anchor}" font-size="{size}"'
    return f"<text {place} {style}>{escape(words)}</text>"


def rect(x: float, y: float, colour: str, style: str = "", w: int = W - 2, h: int = H - 2) -> str:
    """A rectangle with round corners."""
    return f'<rect x="{x}" y="{y}" width="{w}" height="{h}" rx="3" fill="{colour}" {style}/>'


def line(path: str, colour: str, width: float = 1) -> str:
    """A line along a path."""
    return f'<path d="{path}" fill="none" stroke="{colour}" stroke-width="{width}"/>'


def top_of(layer: int) -> int:
    """y of a layer's cells; layer 0 is at the bottom."""
    return BOTTOM - (layer + 1) * H - (GAP if layer >= EXIT else 0)


def cells() -> list[str]:
    """A cell for each layer and position, with the number of the pass that computes it."""
    svg = []
    for layer in range(LAYERS):
        y = top_of(layer)
        svg.append(text(LEFT - 10, y + 20, f"layer {layer}", FAINT, "end", 12))
        for place in range(LIVE + DRAFT + 1):
            row, x = place - LIVE, LEFT + place * W
            dead = row > ACCEPTED
            colour = GREY if row < 0 else GREEN if layer < EXIT else BLUE
            svg.append(rect(x + 1, y + 1, colour, FADED if dead else ""))
            if row >= 0:
                number = row + 1 if layer < EXIT else DRAFT + 2
                svg.append(text(x + W / 2, y + 20, str(number), size=12, style='opacity="0.55"'))
            if dead:
                svg.append(line(f"M{x + 4} {y + H - 4}L{x + W - 4} {y + 4}", RED, 1.3))
    return svg


def rows() -> list[str]:
    """What each row of the round is: token below, exit query between, verdict above."""
    svg, y = [], top_of(EXIT) + H + GAP / 2
    for row in range(DRAFT + 1):
        x = LEFT + (LIVE + row) * W
        middle, dead = x + W / 2, row > ACCEPTED
        pill = f'<rect x="{x + 8}" y="{y - 9}" width="{W - 16}" height="18" rx="9"'
        svg.append(f'{pill} fill="{ORANGE}" {FADED if dead else ""}/>')
        svg.append(text(middle, y + 4, f"q{INDEX[row]}", size=12))
        svg.append(text(middle, BOTTOM + 20, f"t{INDEX[row]}", RED if dead else INK))
        svg.append(text(middle, TOP - 12, f"v{INDEX[row]}", FAINT if dead else INK))
        if row <= ACCEPTED and row < DRAFT:
            sign, colour = ("=", DARK_GREEN) if row < ACCEPTED else ("≠", RED)
            svg.append(text(middle, TOP - 34, f"{sign} t{INDEX[row + 1]}", colour, size=12))
    for place in range(LIVE):
        name = f"x{INDEX[place]}" if place < LIVE - 1 else "xₙ₋₂"
        svg.append(text(LEFT + place * W + W / 2, BOTTOM + 20, name))
    svg.append(text(LEFT + LIVE * W + W / 2, BOTTOM + 38, "= xₙ₋₁", FAINT, size=12))
    return svg


def brackets() -> list[str]:
    """What is live before and after, and what is emitted."""
    svg = []
    after = LIVE + 1 + ACCEPTED
    for name, count, y in (
        ("live before: n - 1", LIVE, BOTTOM + 56),
        (f"live after: n + a, a = {ACCEPTED}", after, BOTTOM + 78),
    ):
        svg.append(line(f"M{LEFT + 2} {y - 5}V{y}H{LEFT + count * W - 2}V{y - 5}", FAINT))
        svg.append(text(LEFT + 8, y - 5, name, FAINT, "start", 12))
    first, last = LEFT + LIVE * W, LEFT + after * W
    svg.append(line(f"M{first + 4} {TOP - 49}V{TOP - 54}H{last - 4}V{TOP - 49}", FAINT))
    svg.append(text((first + last) / 2, TOP - 60, "emitted: v₀..vₐ", size=12))
    return svg


def legend() -> list[str]:
    """The phases of a round, in order, beside the grid."""
    svg, x = [], RIGHT + 34
    for number, (colour, name, *words) in enumerate(LEGEND):
        y = 62 + 66 * number
        if colour:
            dead = colour == RED
            svg.append(rect(x, y - 12, GREEN if dead else colour, FADED if dead else "", 22, 18))
            svg += [line(f"M{x + 3} {y + 5}L{x + 21} {y - 9}", RED, 1.3)] if dead else []
        svg.append(text(x + 32, y + 2, name, INK, "start", 14, 'font-weight="bold"'))
        for place, words_of_line in enumerate(words):
            svg.append(text(x + 32, y + 21 + 18 * place, words_of_line, INK, "start"))
    return svg


def main() -> None:
    title = f"One round: L = {LAYERS}, E = {EXIT}, d = {DRAFT}. Numbers: the order of the passes"
    svg = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
        'font-family="Helvetica,Arial,sans-serif">',
        # A background of its own: the same picture on a light page and on a dark one.
        f'<rect width="{WIDTH}" height="{HEIGHT}" rx="8" fill="#ffffff"/>',
        text(LEFT, 26, title, INK, "start", 15, 'font-weight="bold"'),
    ]
    svg += [*cells(), *rows(), *brackets(), *legend(), "</svg>"]
    (Path(__file__).parent / "round.svg").write_text("\n".join(svg) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
