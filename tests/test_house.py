"""The rooms of the house: who may import whom, and what the front looks like."""

import ast
import re
from collections.abc import Iterator
from graphlib import TopologicalSorter

import pytest
from conftest import ROOT

FRONT = ["cache", "decode", "exact", "model", "train"]
MAY_IMPORT = {  # module: what it may import of the repository, in functions too
    "cache": "",
    "support.checkpoint": "",
    "model": "cache support.checkpoint",
    "support.trials": "",
    "exact": "cache model support.trials",
    "decode": "cache model exact",
    "support.tokenizer": "support.checkpoint",
    "support.data": "support.checkpoint support.tokenizer",
    "support.runs": "support.checkpoint support.data support.tokenizer",
    "train": "cache model exact support.data support.runs",
    "support.console": "decode exact model support.checkpoint support.tokenizer",
}
FILES = [*ROOT.glob("*.py"), *ROOT.glob("[a-z]*/*.py")]
MODULES = {".".join(f.relative_to(ROOT).with_suffix("").parts): f for f in FILES}


def is_door(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) == "__name__ == '__main__'"


def inside(node: ast.AST, functions: bool) -> Iterator[ast.AST]:
    """What a module runs when it is imported and, with `functions`, what it may run later."""
    for child in ast.iter_child_nodes(node):
        later = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        if not is_door(child) and (functions or not later):
            yield child
            yield from inside(child, functions)


def imports(module: str, functions: bool) -> set[str]:
    """The modules of the repository that one of them imports."""
    names = []
    for node in inside(ast.parse(MODULES[module].read_text(encoding="utf-8")), functions):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names += [node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)]
    room = module.rpartition(".")[0]  # scripts import their neighbours by their bare names
    return {name for bare in names for name in (bare, f"{room}.{bare}") if name in MODULES}


@pytest.mark.parametrize("module", MAY_IMPORT)
def test_a_module_imports_only_those_below_it(module):
    assert imports(module, functions=True) <= set(MAY_IMPORT[module].split())


def test_only_commands_import_extras():
    support = {name for name in MODULES if name.startswith("support.")} - {"support.__init__"}
    commands = {name for name in support if name.endswith("_command")}
    assert support | set(FRONT) == commands | MAY_IMPORT.keys() and len(commands) == 2
    for command in commands:
        rooms = {name.partition(".")[0] for name in imports(command, functions=True)}
        assert rooms <= {*FRONT, "support", "extras"}


def test_no_modules_import_each_other_in_a_circle():
    graph = {module: imports(module, functions=False) for module in MODULES}
    assert sum(map(len, graph.values())) > 100
    TopologicalSorter(graph).prepare()  # raises where there is one


def test_the_front_is_five_files_without_options():
    assert sorted(file.stem for file in ROOT.glob("*.py")) == FRONT
    for module in FRONT:
        text = MODULES[module].read_text(encoding="utf-8")
        assert "argparse" not in text
        if door := re.search(r"^if __name__ .*", text, re.M | re.S):
            assert door[0].count("\n") <= 4 and f"support.{module}_command import main" in door[0]
