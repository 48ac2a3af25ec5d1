"""Packages that come piecemeal: what their `__init__` imports is looked up when it is asked for."""

from __future__ import annotations

import importlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from xpeer import piecemeal

ROOT = Path(__file__).parents[2]


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The name of a package of one part that works and one that fails."""
    folder = tmp_path / "large_package"
    (folder / "inner").mkdir(parents=True)
    (folder / "__init__.py").write_text(
        "from . import inner\nfrom large_package.good import GOOD\nfrom .bad import BAD\nSET = 9\n"
    )
    (folder / "good.py").write_text("GOOD = 7\n")
    (folder / "bad.py").write_text("1 / 0\n")
    (folder / "inner" / "__init__.py").write_text("INNER = 8\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(piecemeal._finder, "names", set(piecemeal._finder.names))
    piecemeal.take(folder.name)
    yield folder.name
    for name in [each for each in sys.modules if each.startswith(folder.name)]:
        del sys.modules[name]


def test_only_what_is_asked_for_is_imported(package: str) -> None:
    whole = importlib.import_module(package)
    assert not [name for name in sys.modules if name.startswith(f"{package}.")]
    assert (whole.GOOD, whole.SET) == (7, 9)
    assert whole.inner.INNER == 8  # a package within it, which runs its own
    assert f"{package}.bad" not in sys.modules
    with pytest.raises(ZeroDivisionError):
        _ = whole.BAD
    with pytest.raises(AttributeError, match="large_package"):
        _ = whole.nothing


@pytest.mark.parametrize(
    "more",
    ["import os", "from .good import *", "from .good import GOOD as BEST", "SET = max(1, 2)"],
)
def test_a_package_that_does_more_than_to_import_is_run(
    package: str, tmp_path: Path, more: str
) -> None:
    (tmp_path / package / "__init__.py").write_text(f"from .good import GOOD\n{more}\n")
    whole = importlib.import_module(package)
    assert "GOOD" in vars(whole)


PROBE = """
import sys
import xpeer_bootstrap.node, xpeer_daemon.start
from hivemind.dht.node import DHTNode
print(*sorted({name.partition(".")[0] for name in sys.modules}))
"""


def test_daemons_and_bootstrap_nodes_load_no_torch() -> None:
    """They cost each over a second and 230 MB, and come with hivemind's own `__init__`."""
    done = subprocess.run(
        [sys.executable, "-c", PROBE], cwd=ROOT, capture_output=True, text=True, check=True
    )
    loaded = set(done.stdout.split())
    assert "hivemind" in loaded
    assert not loaded & {"torch", "transformers", "scipy", "safetensors"}
