"""docs/walkthrough.md prints what it says it prints."""

import io
import re
from contextlib import redirect_stdout

import pytest
import torch
from conftest import ROOT

TEXT = (ROOT / "docs" / "walkthrough.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```\n+```text\n(.*?)^```$", TEXT, re.S | re.M)


@pytest.fixture
def gradients():
    """Gives gradients back, which the document turns off."""
    with torch.enable_grad():
        yield


def test_every_block_prints_what_stands_below_it(monkeypatch, gradients):
    monkeypatch.chdir(ROOT)
    namespace: dict = {}
    for number, (code, printed) in enumerate(BLOCKS, 1):
        out = io.StringIO()
        with redirect_stdout(out):
            exec(compile(code, f"docs/walkthrough.md, block {number}", "exec"), namespace)
        assert out.getvalue() == printed, f"block {number}"


def test_every_block_has_its_output():
    assert len(BLOCKS) == TEXT.count("```python\n") > 8
