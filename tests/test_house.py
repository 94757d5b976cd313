"""The rooms of the house: who may import whom, no state that changes, lines that fit."""

import ast
from graphlib import TopologicalSorter

import pytest
from conftest import ROOT

MODEL = {"cache", "checkpoint"}
EXACT = MODEL | {"model"}
COMMAND = EXACT | {"exact", "tokenizer"}
MAY_IMPORT = {  # module of the core: what it may import of the others, outside functions
    "cache": set(),
    "checkpoint": set(),
    "tokenizer": set(),
    "data": {"checkpoint", "tokenizer"},
    "model": MODEL,
    "exact": EXACT,
    "command": COMMAND,
    "decode": COMMAND | {"command"},
    "runs": {"checkpoint", "data", "tokenizer"},
    "train": COMMAND | {"command", "data", "runs"},
}
OUTSIDE = {"extras", "bench", "tests", "porting", "docs"}
CORE = [ROOT / f"{name}.py" for name in MAY_IMPORT]
WITHOUT_STATE = CORE + sorted((ROOT / "extras").glob("*.py"))

BUILDERS = "list dict set bytearray defaultdict deque Counter OrderedDict".split()
CHANGERS = "append extend insert add update setdefault pop popitem remove discard clear".split()
LITERALS = ast.List | ast.Dict | ast.Set | ast.ListComp | ast.DictComp | ast.SetComp


def parse(file):
    return ast.parse(file.read_text(), str(file))


def outside_functions(tree):
    """All nodes that run when the module is imported."""
    for child in ast.iter_child_nodes(tree):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            continue
        yield child
        yield from outside_functions(child)


def imported(nodes):
    """First parts of the names of the modules that are imported."""
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield (node.module or "").partition(".")[0]


def state(tree):
    """Descriptions of what at module level is, or makes, state that changes."""
    for node in tree.body:
        value = getattr(node, "value", None)
        made = isinstance(value, ast.Call) and ast.unparse(value.func).split(".")[-1] in BUILDERS
        if isinstance(node, ast.Assign | ast.AnnAssign) and (made or isinstance(value, LITERALS)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names = [n.id for t in targets for n in ast.walk(t) if isinstance(n, ast.Name)]
            yield from (f"{name} is mutable" for name in names if not name.isupper())
    for function in ast.walk(tree):
        if not isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        for node in ast.walk(function):
            changed = []
            if isinstance(node, ast.Global):
                yield f"global {', '.join(node.names)}"
            elif isinstance(node, ast.Assign | ast.Delete):
                changed = [t for t in node.targets if not isinstance(t, ast.Name)]
            elif isinstance(node, ast.AugAssign | ast.AnnAssign):
                changed = [node.target]
            elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                changed = [node.func.value] if node.func.attr in CHANGERS else []
            for target in changed:
                root = target
                while isinstance(root, ast.Subscript):
                    root = root.value
                name = getattr(root, "attr", getattr(root, "id", ""))
                if name.isupper():
                    yield f"{ast.unparse(target)} changes"


IMPORTS = """
import os, extras.lens as lens
if TYPE_CHECKING:
    from decode import Round
try:
    from bench.common import main
except ImportError:
    import train
def main():
    from extras import drafters
class A:
    import model
"""


def test_imports_are_found_where_a_module_runs_them():
    found = set(imported(outside_functions(ast.parse(IMPORTS))))
    assert found == {"os", "extras", "bench", "train", "model"}


@pytest.mark.parametrize("name", MAY_IMPORT)
def test_a_module_of_the_core_imports_only_those_below_it(name):
    tree = parse(ROOT / f"{name}.py")
    found = set(imported(outside_functions(tree)))
    assert found & MAY_IMPORT.keys() <= MAY_IMPORT[name]
    assert not found & OUTSIDE


def test_what_the_core_may_import_has_no_cycle():
    order = list(TopologicalSorter(MAY_IMPORT).static_order())
    assert set(order) == MAY_IMPORT.keys()


@pytest.mark.parametrize("file", WITHOUT_STATE, ids=lambda file: str(file.relative_to(ROOT)))
def test_no_module_holds_state_that_changes(file):
    assert not list(state(parse(file)))


@pytest.mark.parametrize(
    "code, found",
    [
        ("TABLE = [1]", 0),
        ("TABLE = {}\nTABLE |= {1: 2}", 0),
        ("def f():\n    table = []\n    table.append(1)", 0),
        ("stack = []", 1),
        ("stack: list = list()", 1),
        ("import collections\nmemo = collections.defaultdict(int)", 1),
        ("memo = {k: 1 for k in 'ab'}", 1),
        ("def f():\n    global count", 1),
        ("TABLE = []\ndef f():\n    TABLE.append(1)", 1),
        ("TABLE = {}\ndef f():\n    TABLE[1] = 2", 1),
        ("TABLE = {}\ndef f():\n    TABLE[1][2] += 3", 1),
        ("import model\ndef f():\n    model.TABLE[1] = 2", 1),
        ("TABLE = {}\ndef f():\n    del TABLE[1]", 1),
        ("class A:\n    def f(self):\n        TABLE.update(a=1)", 1),
    ],
)
def test_state_is_found_where_it_is(code, found):
    assert len(list(state(ast.parse(code)))) == found


def test_no_line_is_longer_than_100_columns():
    files = [f for d in OUTSIDE for f in (ROOT / d).rglob("*.py")] + list(ROOT.glob("*.py"))
    assert len(files) > 20
    long = [
        f"{file.relative_to(ROOT)}:{number}"
        for file in files
        for number, line in enumerate(file.read_text().splitlines(), 1)
        if len(line) > 100
    ]
    assert not long
