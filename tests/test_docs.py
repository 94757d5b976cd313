"""The pages are true to the code: links, names, commands, sizes; and the code has its docstrings.

Docstrings are read with ast, nothing is imported for them.
"""

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from conftest import ROOT
from test_readme import BLOCK, README, commands, parses

PAGES = [f"docs/{file.name}" for file in sorted((ROOT / "docs").glob("*.md"))]
PAGES += ["README.md", "porting/README.md", "tests/README.md"]
ROOMS = ("", "extras", "bench", "porting", "docs")
FILES = [file for room in ROOMS for file in sorted((ROOT / room).glob("*.py"))]
COMMIT = "7dbbe6b"  # its bench.py measured what no command measures any more
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


# --------------------------------------------------------------------------------------------------
# Pages


@pytest.mark.parametrize("page", PAGES)
def test_every_link_leads_to_a_file_and_every_function_named_in_one_is_there(page):
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
    for name in re.findall(r"(?<![\w/.*])((?:[a-z]+/)*\w+\.py)\b", spans):
        places = [ROOT / name, (ROOT / page).parent / name, ROOT / "tests" / name]
        gone = f"`{name}` of {COMMIT}" in " ".join(read(page).split())
        assert any(place.exists() for place in places) or gone or name == "bench.py", name


@pytest.mark.parametrize("page", [page for page in PAGES if page.startswith("docs/")])
def test_every_command_beside_a_figure_exists_and_takes_its_options(page, monkeypatch):
    text = read(page)
    for command in commands(text):
        if command.startswith("python bench.py"):
            assert COMMIT in text
            continue
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


def test_the_readme_is_read_in_ten_minutes():
    assert len(README.split()) <= 2300


def test_the_readme_has_one_table_of_figures_and_states_no_speed_elsewhere():
    before, _, rest = README.partition("\n## Figures\n")
    figures, _, after = rest.partition("\n## ")
    assert len(re.findall(r"^\|---", figures, re.M)) == 1 and "python -m bench" in figures
    assert "Machine:" in figures and "Date:" in figures
    assert re.findall(r"\d+(?:\.\d+)? ?(?:times|x|tokens/s)\b", before + after) == []


@pytest.mark.parametrize("page", [page for page in PAGES if page not in ("tests/README.md")])
def test_pages_state_what_is_and_keep_no_diary(page):
    diary = r"the day before|yesterday|last time|at that hour|right after th|so far\b|as of today"
    assert re.findall(diary, read(page), re.I) == []


# --------------------------------------------------------------------------------------------------
# Docstrings

Function = ast.FunctionDef | ast.AsyncFunctionDef
SIZE = r"(?:\.{3}|[\w+*/ -]+|len\(\w+\)[ +1]*)"
SHAPE = re.compile(rf"(?<!\w)\((?:{SIZE},(?: {SIZE},)*(?: {SIZE})?|\.\.\.|)\)")  # (B, T), (V,), ()
REFUSALS = {"ValueError", "TypeError", "CheckpointError", "Malformed"}
PROTOCOL = {"draft", "verified", "run_layers", "unembed"}  # the module's docstring speaks for them


@dataclass
class Public:
    """A public class, function or method, and the docstrings that speak for it."""

    name: str
    node: ast.ClassDef | Function
    doc: str
    around: str  # of its class and what that derives from


def public() -> Iterator[Public]:
    """Everything public in FILES.

    A forward is spoken for by its class, main by its module, and an override by what it overrides.
    """
    trees = {file: ast.parse(file.read_text(encoding="utf-8")) for file in FILES}
    classes = {n.name: n for t in trees.values() for n in t.body if isinstance(n, ast.ClassDef)}

    def line_of(owner: ast.ClassDef) -> list[ast.ClassDef]:
        bases = [classes[name] for name in map(ast.unparse, owner.bases) if name in classes]
        return [owner, *(c for base in bases for c in line_of(base))]

    for file, tree in trees.items():
        module = ast.get_docstring(tree) or ""
        for node in tree.body:
            if not isinstance(node, ast.ClassDef | Function) or node.name.startswith("_"):
                continue
            place = f"{file.relative_to(ROOT)}:{node.lineno} {node.name}"
            doc = ast.get_docstring(node) or (module if node.name == "main" else "")
            yield Public(place, node, doc, "")
            if not isinstance(node, ast.ClassDef):
                continue
            around = "\n".join(ast.get_docstring(c) or "" for c in line_of(node))
            methods = [(c, m) for c in line_of(node) for m in c.body if isinstance(m, Function)]
            for owner, method in methods:
                if owner is not node or method.name.startswith("_"):
                    continue
                docs = [ast.get_docstring(m) or "" for _, m in methods if m.name == method.name]
                docs += [around] * (method.name == "forward") + [module] * (method.name in PROTOCOL)
                yield Public(f"{place}.{method.name}", method, "\n".join(docs).strip(), around)


PUBLIC = list(public())


def test_every_module_and_everything_public_has_a_docstring():
    modules = {file: ast.parse(file.read_text(encoding="utf-8")) for file in FILES}
    assert [f.name for f, t in modules.items() if t.body and not ast.get_docstring(t)] == []
    assert [p.name for p in PUBLIC if not p.doc] == []


def test_where_a_tensor_comes_in_its_shape_is_told():
    assert all(
        map(SHAPE.search, ("q (T, H, hd)", "(..., dim)", "(V,)", "loss ()", "(len(x) + 1, V)"))
    )
    assert not SHAPE.search("(section 4) run(x, y)")

    def takes_tensor(p: Public) -> bool:
        if isinstance(p.node, ast.ClassDef) or p.node.name in PROTOCOL:
            return False
        a = p.node.args
        given = [*a.args, *a.kwonlyargs, *filter(None, (a.vararg, a.kwarg))]
        notes = [ast.unparse(one.annotation) for one in given if one.annotation]
        tensor = r"(?<!, )\bTensor\b"  # not dict[str, Tensor], whose tensors are of any shape
        return any(re.search(tensor, note) for note in notes)

    silent = [p.name for p in PUBLIC if takes_tensor(p) and not SHAPE.search(p.doc + p.around)]
    assert silent == []


def test_what_is_refused_is_told():
    def refuses(p: Public) -> bool:
        parts = [p.node]
        if isinstance(p.node, ast.ClassDef):  # what making one raises is its class's to tell
            made = ("__init__", "__post_init__")
            parts = [n for n in p.node.body if isinstance(n, Function) and n.name in made]
        raised = [x.exc for part in parts for x in ast.walk(part) if isinstance(x, ast.Raise)]
        names = {ast.unparse(x.func) for x in raised if isinstance(x, ast.Call)}
        reader = not p.name.startswith(("bench", "porting"))  # those are commands, not a library
        return reader and p.node.name != "main" and bool(names & REFUSALS)

    says = re.compile("ValueError|TypeError|CheckpointError|Malformed|one line|refuse", re.I)
    assert [p.name for p in PUBLIC if refuses(p) and not says.search(p.doc)] == []
