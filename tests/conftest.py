import os
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import HealthCheck, Phase, settings

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "porting")]

# The same examples on every run; EXAMPLES=2000 make test looks further.
settings.register_profile(
    "fixed",
    derandomize=True,
    deadline=None,
    database=None,
    max_examples=int(os.environ.get("EXAMPLES", 100)),
    suppress_health_check=list(HealthCheck),
)
# A failure is enough: it is not made smaller, which takes long.
settings.register_profile("red", settings.get_profile("fixed"), phases=[Phase.generate])
settings.load_profile("fixed")


def pytest_configure(config):
    # A shell's background jobs, and what they start, would not hear Ctrl-C.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    alone = "threads: exactness on all cores; runs alone, without other test processes beside it"
    config.addinivalue_line("markers", alone)
    config.addinivalue_line("filterwarnings", "ignore:torch.distributed is disabled")


def pytest_collection_modifyitems(items):
    """The longest first: of two processes, none should wait for the other's last."""
    long = "test_resume.py", "test_shipped.py", "test_compiled.py"
    items.sort(key=lambda item: item.path.name not in long)


@pytest.fixture(scope="session")
def shipped() -> Path:
    return ROOT / "checkpoints" / "pystdlib"


@pytest.fixture(scope="session")
def small(shipped, tmp_path_factory) -> Path:
    """A small checkpoint whose first two of four layers foresee most of what the whole says."""
    from helpers import tiny_config, tiny_model

    from model import save_checkpoint

    path = tmp_path_factory.mktemp("small")
    save_checkpoint(tiny_model(tiny_config(vocab_size=2048, bos=1, tied=True), damp_from=2), path)
    (path / "tokenizer.model").write_bytes((shipped / "tokenizer.model").read_bytes())
    return path


@pytest.fixture
def command(monkeypatch, capsys):
    """command(main, "--exit", "2") -> code, out, err of a command with these arguments."""

    def call(main, *args) -> SimpleNamespace:
        monkeypatch.setattr(sys, "argv", ["command", *args])
        code = 0
        try:
            main()
        except SystemExit as stop:
            code = stop.code
        return SimpleNamespace(code=code, **capsys.readouterr()._asdict())

    return call


@pytest.fixture
def figures(monkeypatch) -> list:
    """The figures of matplotlib that are saved."""
    from matplotlib.figure import Figure

    drawn, save = [], Figure.savefig
    keep = lambda figure, *to, **how: drawn.append(figure) or save(figure, *to, **how)
    monkeypatch.setattr(Figure, "savefig", keep)
    return drawn
