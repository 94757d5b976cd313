"""docs/walkthrough.md prints what it says it prints."""

import io
import re
from contextlib import redirect_stdout

import pytest
import torch
from conftest import ROOT

BLOCKS = re.findall(r"^```python\n(.*?)^```\n+```text\n(.*?)^```$", (ROOT / "docs" / "walkthrough.md").read_text(), re.S | re.M)


@pytest.fixture
def gradients():
    """Gives gradients back, which the document turns off."""
    with torch.enable_grad():
        yield


def test_every_block_of_the_walkthrough_prints_what_stands_below_it(monkeypatch, gradients):
    monkeypatch.chdir(ROOT)
    assert len(BLOCKS) == (ROOT / "docs" / "walkthrough.md").read_text().count("```python\n") > 8
    namespace = {}
    for number, (code, printed) in enumerate(BLOCKS, 1):
        out = io.StringIO()
        with redirect_stdout(out):
            exec(compile(code, f"docs/walkthrough.md, block {number}", "exec"), namespace)
        assert out.getvalue() == printed, f"block {number}"
