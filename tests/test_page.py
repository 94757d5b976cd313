"""The page of extras.trace: what it holds and, in a real browser, what it shows. And lens.png.

Where there is no Chromium, the tests that need one are skipped.
"""

import json
import re
from io import BytesIO

import pytest
import torch
from browser import CHROMIUM, Browser
from conftest import ROOT

from decode import Round, generate
from exact import pack
from extras import lens, trace
from support.console import load

PROMPT = 'if x < 3: print("</script>")\n'
TEXT = '<img src=x onerror="alert(1)">&amp;\n\n<!--<script> é 😀 שלום\nend'
DATA = re.compile(r'(?<=id="data">).*?(?=</script>)', re.S)


@pytest.fixture(scope="module")
def run(small):
    """Rounds that say TEXT, some right, some partly, some not, some without a draft."""
    model, tokenizer = load(small)
    ids, rest, rounds = tokenizer.encode(PROMPT), tokenizer.encode(TEXT, bos=False), []
    while rest:
        right, wrong = [(3, 0), (2, 3), (0, 2), (0, 0)][len(rounds) % 4]
        emitted, rest = rest[: right + 1], rest[right + 1 :]
        rounds.append(Round([*emitted[:right], *range(400, 400 + wrong)], emitted, None))
    return pack(model), tokenizer, ids, rounds


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    if not CHROMIUM:
        pytest.skip("no Chromium")
    found = Browser(str(tmp_path_factory.mktemp("browser")))
    yield found
    found.close()


@pytest.fixture
def url(run, tmp_path):
    """Where the page of the run is."""
    model, tokenizer, ids, rounds = run
    (tmp_path / "page.html").write_bytes(trace.page(rounds, model, tokenizer, ids, 2))
    return f"file://{tmp_path}/page.html"


@pytest.fixture
def shown(browser, url):
    """The page of the run in the browser; afterwards no script of it may have failed."""
    browser.open(url)
    yield browser
    assert browser.said == []


def numbers(browser) -> list[int]:
    """The number of the round that is shown, and what is told of it."""
    return [*map(int, re.findall(r"\d+", browser.run("$('numbers').textContent")))]


def wanted(number: int, ids: list[int], rounds: list[Round]) -> list[int]:
    r, live = rounds[number], len(ids) - 1 + sum(len(r.emitted) for r in rounds[:number])
    drafted, emitted = len(r.drafted), len(r.emitted)
    told = [drafted, r.accepted, emitted, live, live + emitted, drafted + 1 - emitted]
    return [number + 1, len(rounds), *told]


# --------------------------------------
# What it holds


def test_a_page_is_one_file_of_the_run(run):
    model, tokenizer, ids, rounds = run
    text = trace.page(rounds, model, tokenizer, ids, 2).decode()
    template = (ROOT / "extras" / "trace.html").read_text(encoding="utf-8")
    assert DATA.sub("DATA", text) == template
    assert not re.search("https?:|url\\(|src=|href=|import", template)
    assert "<" not in DATA.search(text)[0]
    data = json.loads(DATA.search(text)[0])
    assert data["tokens"] == ids + [t for r in rounds for t in r.emitted]
    assert "".join(data["texts"]) == tokenizer.decode(data["tokens"]) == PROMPT + TEXT
    assert [r["drafted"] for r in data["rounds"]] == [r.drafted for r in rounds]
    said, sure = lens.exits(model, data["tokens"], len(ids) - 1)
    assert data["said"] == said.T[len(ids) - 1 : -1].tolist()
    told = torch.tensor(data["sure"]) / 100 - sure.T[len(ids) - 1 : -1]
    assert told.abs().max() <= 0.01


def test_the_page_in_docs_is_todays_and_small():
    """Made by extras.trace --html docs/trace.html --max-new-tokens 256, sampled as make demo."""
    file = ROOT / "docs" / "trace.html"
    template = (ROOT / "extras" / "trace.html").read_text(encoding="utf-8")
    assert DATA.sub("DATA", file.read_text(encoding="utf-8")) == template
    data = json.loads(DATA.search(file.read_text(encoding="utf-8"))[0])
    assert len(data["said"]) == 256 and file.stat().st_size <= 200_000
    assert (ROOT / "docs" / "trace.png").stat().st_size <= 150_000


def test_the_command_writes_its_rounds_page(command, small, tmp_path):
    file = tmp_path / "page.html"
    options = ["--ckpt", str(small), "--max-new-tokens", "20", "--exit", "2", "--html", str(file)]
    ran = command(trace.main, *options)
    data = json.loads(DATA.search(file.read_text(encoding="utf-8"))[0])
    model, _ = load(small)
    assert ran.code == 0 and len(data["rounds"]) == ran.out.count("\n") and data["exit"] == 2
    plain = list(generate(pack(model), data["tokens"][: data["known"]], max_new_tokens=20, eos=()))
    assert data["tokens"][data["known"] :] == [t for r in plain for t in r.emitted]
    assert command(trace.main, "--html", str(tmp_path / "none" / "page.html")).code == 2


# --------------------------------------
# What it shows


def test_the_text_is_shown_as_text_token_by_token(run, shown):
    rounds = run[-1]
    assert shown.run("document.querySelectorAll('img, script').length") == 2  # its own scripts
    spans = "[...document.querySelectorAll('.round span')]"
    kinds = shown.run(f"{spans}.map(x => x.className)")
    own = [len(r.emitted) - r.accepted for r in rounds]
    wanted = [["accepted"] * r.accepted + ["own"] * n for r, n in zip(rounds, own)]
    assert kinds == [kind for kinds in wanted for kind in kinds]
    text = "".join(shown.run(f"{spans}.map(x => x.textContent)")).replace("⏎\n", "\n")
    assert text.replace("\ufffd", "") == TEXT, "a half character is shown as U+FFFD"
    assert shown.run("$('text').firstChild.textContent") == PROMPT
    assert all(shown.run(f"{spans}.map(x => x.getClientRects().length)")), "each can be clicked"


def test_a_click_keeps_a_rounds_numbers(run, shown):
    _, _, ids, rounds = run
    for number in (1, len(rounds) - 1, 2, 3):
        token = f"document.querySelectorAll('.round')[{number}].querySelector('span:last-of-type')"
        shown.click(token)
        assert numbers(shown) == wanted(number, ids, rounds)
        assert shown.run("document.querySelectorAll('.now').length") == 1
    other = "document.querySelectorAll('.round')[0].querySelector('span')"
    shown.point(other)
    assert numbers(shown)[0] == 4
    shown.press("Escape")
    shown.point("$('numbers')")
    shown.point(other)
    assert numbers(shown)[0] == 1


def test_arrow_keys_step_through_the_rounds(run, shown):
    _, _, ids, rounds = run
    shown.press("ArrowLeft")
    for number in [*range(len(rounds)), len(rounds) - 1]:
        assert numbers(shown) == wanted(number, ids, rounds)
        shown.press("ArrowRight")
    shown.press("ArrowLeft")
    assert numbers(shown)[0] == len(rounds) - 1


def test_rejected_guesses_are_struck_through(run, shown):
    _, tokenizer, _, rounds = run
    guesses = "[...document.querySelectorAll('pre del')]"
    texts = [trace.piece(tokenizer, t) for r in rounds for t in r.drafted[r.accepted :]]
    assert shown.run(f"{guesses}.map(x => x.textContent)") == texts
    visible = f"{guesses}.filter(x => x.getClientRects().length).length"
    assert shown.run(visible) == 0
    shown.press("r")
    assert shown.run(visible) == len(texts) and shown.run("$('all').checked")
    line = shown.run("getComputedStyle(document.querySelector('pre del')).textDecorationLine")
    assert line == "line-through"
    shown.click("$('all')")
    assert shown.run(visible) == 0


def test_the_picture_is_of_the_round(run, shown):
    model, tokenizer, ids, rounds = run
    tokens = ids + [t for r in rounds for t in r.emitted]
    said, _ = lens.exits(model, tokens, len(ids) - 1)
    words, known = lambda some: [trace.piece(tokenizer, t)[:8] for t in some], len(ids)
    for r in rounds[:5]:
        found = shown.run("[...document.querySelectorAll('svg text')].map(x => x.textContent)")
        rows, live = len(r.drafted) + 1, len(r.emitted)
        assert [x for x in found if re.fullmatch(r"q\d", x)] == [f"q{i}" for i in range(rows)]
        told = [*tokens[known - 3 : known], *r.drafted, *r.emitted]
        told += said[:, known - 1 : known - 1 + live].flatten().tolist()
        places = [str(place) for place in range(known - 3, known + rows - 1)]
        passes = [str(i + 1) for i in range(rows)] + [str(rows + 1)] * rows
        names = ["says", "token", "position", "layer 0", "layer 3"]
        names += [f"exit {e}" for e in range(1, 5)] + [f"q{i}" for i in range(rows)] + ["", ""]
        assert sorted(found) == sorted([*words(told), *places, *passes, *names])
        dead = rows - live
        assert shown.run("document.querySelectorAll('path').length") == 2 * dead
        rects = shown.run("[...document.querySelectorAll('rect')].map(x => x.style.fill)")
        count = {kind: rects.count(f"var(--{kind})") for kind in ("live", "draft", "query")}
        assert count == {"live": 2 * 4, "draft": rows * 2, "query": rows}
        differ = said[:, known - 1 : known - 1 + live] != said[-1, known - 1 : known - 1 + live]
        assert rects.count("var(--differs)") == differ.sum()
        known += live
        shown.press("ArrowRight")


def test_a_plain_run_has_no_queries(run, browser, tmp_path):
    model, tokenizer, ids, _ = run
    rounds = [Round([], [t], None) for t in tokenizer.encode(TEXT, bos=False)]
    (tmp_path / "page.html").write_bytes(trace.page(rounds, model, tokenizer, ids[:1], 0))
    browser.open(f"file://{tmp_path}/page.html")
    assert browser.said == [] and numbers(browser) == wanted(0, ids[:1], rounds)
    fills = browser.run("[...document.querySelectorAll('rect')].map(x => x.style.fill)")
    assert "var(--query)" not in fills and "var(--draft)" not in fills and len(fills) == 8


@pytest.mark.parametrize("width", [390, 1280])
def test_a_page_fits_phone_and_desk(browser, url, width):
    shades = {}
    for scheme in ("light", "dark"):
        browser.open(url, width, 844, scheme)
        assert browser.run("document.documentElement.scrollWidth") <= width
        body = browser.run("(s => [s.color, s.backgroundColor])(getComputedStyle(document.body))")
        shades[scheme] = [sum(map(int, re.findall(r"\d+", colour)[:3])) for colour in body]
    (ink, paper), (light_ink, dark_paper) = shades["light"], shades["dark"]
    assert paper - ink > 450 and light_ink - dark_paper > 450 and browser.said == []


# --------------------------------------
# The lens's picture


@pytest.mark.filterwarnings("ignore:Glyph")
def test_a_figure_has_a_cell_for_each_exit_and_token(figures):
    """And a line at the layers needed. A token may be anything; a long one is cut."""
    count = lens.BAND + 3
    words = [[f"{row}:{t}" for t in range(count)] for row in range(3)]
    words[0][:3] = "$x_{$", "漢字", "\\"
    words[1][0], words[2][lens.BAND] = "12345678", "123456789"
    shades, needed = torch.linspace(-1, 1, 2 * count).view(2, -1), [1 + t % 2 for t in range(count)]
    lens.draw(BytesIO(), words, shades, needed)
    words[2][lens.BAND] = "1234567…"
    bands = figures[0].axes
    for axis, shown in zip(bands, (range(lens.BAND), range(lens.BAND, count)), strict=True):
        cells = {text.get_position(): text.get_text() for text in axis.texts}
        assert cells == {(t, row): words[row][t] for row in range(3) for t in shown}
        assert axis.get_xlim() == (shown[0] - 0.5, shown[0] + lens.BAND - 0.5)
        assert torch.equal(torch.tensor(axis.images[0].get_array().data)[1:], shades)
        line = axis.patches[0].get_data()
        assert line.values.tolist() == [e - 0.5 for e in needed] and line.edges[0] == -0.5
        assert axis.get_ylabel() == "exit"
    assert len(figures[0].legends[0].get_texts()) == 3 and bands[-1].get_xlabel()
