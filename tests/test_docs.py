"""Docstrings: everything public has one, shapes of tensors are in it, and so is what is refused. Read with ast, nothing is imported."""

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
from conftest import ROOT

FILES = sorted([*ROOT.glob("*.py"), *(ROOT / "porting").glob("*.py")])
Function = ast.FunctionDef | ast.AsyncFunctionDef
# names of dimensions, one of which a shape has, unless it is () or (...)
DIMENSIONS = {"B", "T", "R", "L", "V", "H", "Hkv", "hd", "dim", "vocab", "rows", "heads", "head_dim", "max_len", "n_kv_heads", "length", "batch", "exits", "in", "out"}
SIZE = re.compile(r"(\.\.\.|\w+|len\(\w+\))( [-+*/] \w+)*")
REFUSALS = {"ValueError", "CheckpointError", "Malformed"}
SAYS_SO = re.compile(r"ValueError|CheckpointError|Malformed|one line|refuse", re.IGNORECASE)


@dataclass
class Public:
    """A public class, function or method, with the docstring that speaks for it."""

    name: str
    node: ast.ClassDef | Function
    doc: str
    around: str  # its class's docstring


def walk() -> Iterator[Public]:
    """Every public class, function and method of FILES.

    Three kinds of function need no docstring of their own, as another one speaks for them: an override has that of the method
    it overrides (inspect.getdoc finds it too), the forward of a torch module that of its class, and main that of its module.
    """
    trees = {file: ast.parse(file.read_text(encoding="utf-8")) for file in FILES}
    classes = {node.name: node for tree in trees.values() for node in tree.body if isinstance(node, ast.ClassDef)}

    def inherited(owner: ast.ClassDef, method: str) -> str:
        for base in (classes.get(ast.unparse(b)) for b in owner.bases):
            for node in base.body if base else []:
                if isinstance(node, Function) and node.name == method and ast.get_docstring(node):
                    return ast.get_docstring(node)
            if base and (found := inherited(base, method)):
                return found
        return ""

    for file, tree in trees.items():
        for node in tree.body:
            if isinstance(node, ast.ClassDef | Function) and not node.name.startswith("_"):
                stands_in = ast.get_docstring(tree) if node.name == "main" else ""
                yield Public(f"{file.name}:{node.lineno} {node.name}", node, ast.get_docstring(node) or stands_in or "", "")
            if not isinstance(node, ast.ClassDef) or node.name.startswith("_"):
                continue
            around = ast.get_docstring(node) or ""
            is_module = "nn.Module" in map(ast.unparse, node.bases)
            for method in node.body:
                if isinstance(method, Function) and not method.name.startswith("_"):
                    stands_in = around if is_module and method.name == "forward" else inherited(node, method.name)
                    yield Public(f"{file.name}:{method.lineno} {node.name}.{method.name}", method, ast.get_docstring(method) or stands_in, around)


PUBLIC = list(walk())


def shapes(doc: str) -> list[str]:
    """The shapes that a docstring gives: "q (T, heads, hd), loss ()" -> ["T, heads, hd", ""]."""
    found = []
    for text in re.findall(r"(?<!\w)\(((?:[^()]|\(\w*\))*)\)", doc):
        items = [item.strip() for item in text.split(",") if item.strip()]
        named = "," in text and DIMENSIONS & set(re.findall(r"\w+", text)) and all(SIZE.fullmatch(item) for item in items)
        if named or items in ([], ["..."]):
            found.append(text)
    return found


def annotations(node: Function) -> str:
    """All annotations of a function's parameters and result, as text."""
    a = node.args
    given = [*a.posonlyargs, *a.args, *a.kwonlyargs, *filter(None, (a.vararg, a.kwarg))]
    return " ".join(ast.unparse(x) for x in (*(one.annotation for one in given), node.returns) if x)


def raised(node: ast.AST) -> set[str]:
    """Names of the exceptions that the statements of a function make and raise."""
    found = {x.exc.func.id for x in ast.walk(node) if isinstance(x, ast.Raise) and isinstance(x.exc, ast.Call) and isinstance(x.exc.func, ast.Name)}
    return found


def test_the_rules_see_what_they_are_for():
    assert shapes("q (T, H, hd), loss (), any (...)") == ["T, H, hd", "", "..."] and shapes("(..., dim) -> (vocab,)") == ["..., dim", "vocab,"]
    assert shapes("(len(drafted) + 1, vocab)") and not shapes("run(B, T) (LayerSkip, arXiv 2404.16710, section 4) (dim) (as in figure 2, left)")
    assert raised(ast.parse("def f():\n    if x:\n        raise ValueError('no') from None\n    raise")) == {"ValueError"}
    assert len(PUBLIC) > 250 and {p.name.split()[1] for p in PUBLIC} >= {"Llama.run_layers", "KVQCache", "generate", "Decoder.draft"}


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_every_module_has_a_docstring(file):
    assert ast.get_docstring(ast.parse(file.read_text(encoding="utf-8")))


def test_everything_public_has_a_docstring():
    assert [p.name for p in PUBLIC if not p.doc] == []


def test_where_a_tensor_comes_or_goes_its_shape_is_told():
    takes = [p for p in PUBLIC if isinstance(p.node, Function) and re.search(r"\bTensor\b", annotations(p.node))]
    assert [p.name for p in takes if not shapes(p.doc + p.around)] == []


def test_what_is_refused_is_told():
    def refuses(p: Public) -> bool:
        if isinstance(p.node, ast.ClassDef):  # what making one raises is its class's to tell
            return any(raised(n) & REFUSALS for n in p.node.body if isinstance(n, Function) and n.name in ("__init__", "__post_init__"))
        return p.node.name != "main" and bool(raised(p.node) & REFUSALS)  # main prints its own refusals

    assert [p.name for p in PUBLIC if refuses(p) and not SAYS_SO.search(p.doc)] == []
