"""The pages are true to the code: links, names, files, commands; and the code has docstrings."""

import ast
import re
from pathlib import Path

import pytest
from conftest import ROOT
from test_readme import BLOCK, README, commands, parses

DOCS = [f"docs/{file.name}" for file in sorted((ROOT / "docs").glob("*.md"))]
PAGES = [*DOCS, "README.md", "porting/README.md", "tests/README.md"]
PLACEHOLDERS = {"N": "1", "R": "1"}  # of numbers, in commands


def read(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def links(page: str) -> list[tuple[str, str]]:
    """Label and target of every link of a page into the repository."""
    found = re.findall(r"\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^)\s]+)\)", BLOCK.sub("", read(page)))
    return [(label, target) for label, target in found if not re.match("https?:", target)]


def defined(name: str, file: Path) -> bool:
    """Whether a function, class or constant of that name is defined in a Python file."""
    code = file.read_text(encoding="utf-8")
    return bool(re.search(rf"^\s*(def|class) {name}\b|^{name}\b[^\n]* = ", code, re.M))


def anchors(text: str) -> set[str]:
    """The anchors that GitHub gives to the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", BLOCK.sub("", text), re.M)
    return {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}


# --------------------------------------
# Pages


@pytest.mark.parametrize("page", PAGES)
def test_every_link_leads_to_a_file_and_every_name_is_there(page):
    for label, target in links(page):
        path, _, anchor = target.partition("#")
        file = (ROOT / page).parent / path if path else ROOT / page
        assert file.exists(), target
        if anchor:
            assert anchor in anchors(file.read_text(encoding="utf-8")), target
        for name in re.findall(r"`(\w+)`", label) if file.suffix == ".py" else ():
            assert defined(name, file), f"{name} is not in {path}"
    for path, name in re.findall(r"([\w/]+\.py)::(\w+)", read(page)):
        assert defined(name, ROOT / path), f"{path}::{name}"


@pytest.mark.parametrize("page", PAGES)
def test_every_file_named_in_code_exists(page):
    spans = " ".join(re.findall(r"`([^`]+)`", BLOCK.sub("", read(page))))
    for name in re.findall(r"(?<![\w/.*])((?:[a-z]+/)*[a-z]\w*\.py)\b", spans):
        places = [ROOT / name, (ROOT / page).parent / name, ROOT / "tests" / name]
        assert any(place.exists() for place in places), name


@pytest.mark.parametrize("page", DOCS)
def test_every_command_exists_and_takes_its_options(page, monkeypatch):
    for command in commands(read(page)):
        words = [PLACEHOLDERS.get(word, word) for word in command.split(" ")]
        assert parses(" ".join(words), monkeypatch), command


def test_every_page_of_docs_is_reached_from_the_readme():
    reached, to_read = set(), ["README.md"]
    while to_read:
        page = to_read.pop()
        for _, target in links(page):
            path = ((ROOT / page).parent / target.partition("#")[0]).resolve()
            name = str(path.relative_to(ROOT.resolve()))
            if name.startswith("docs/") and name not in reached:
                reached.add(name)
                to_read += [name] if name.endswith(".md") else []
    kept = {f"docs/{file.name}" for file in (ROOT / "docs").glob("*.*") if file.suffix != ".py"}
    assert kept - reached == set()


def test_the_readme_states_speeds_in_one_place():
    before, _, rest = README.partition("\n## Figures\n")
    figures, _, after = rest.partition("\n## ")
    assert len(re.findall(r"^\|---", figures, re.M)) == 1 and "python -m bench" in figures
    assert "Machine:" in figures and "Date:" in figures
    assert re.findall(r"\d+(?:\.\d+)? ?(?:times|x|tokens/s)\b", before + after) == []


def test_modules_classes_and_functions_have_docstrings():
    silent = []
    for room in ("", "support", "extras", "bench", "porting"):
        for file in sorted((ROOT / room).glob("[!t]*.py" if room == "porting" else "*.py")):
            tree = ast.parse(file.read_text(encoding="utf-8"))
            named = [n for n in tree.body if isinstance(n, ast.ClassDef | ast.FunctionDef)]
            public = [n for n in named if n.name[0] != "_" and n.name != "main"]
            parts = [(file.stem, tree)] * bool(tree.body) + [(n.name, n) for n in public]
            silent += [f"{file}: {name}" for name, node in parts if not ast.get_docstring(node)]
    assert silent == []
