"""For every test: what it charges to documents is not counted on this machine."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

_DAEMONS = "nodes", "swarm", "launch"
"""Fixtures whose tests start daemons or sidecars."""


@pytest.fixture(autouse=True)
def register_of_the_test(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "xpeer-privacy"
    monkeypatch.setenv("XPEER_PRIVACY_REGISTER", str(folder))
    return folder


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Of several workers half run whole swarms, which wait more than they work, one at a time each;
    the others run what is left, file by file, so that a module's fixtures are made once.
    """
    groups = max(1, int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1")) // 2)
    number = 0
    for item in items:
        folder, file = item.path.parent.name, str(item.path)
        if folder == "swarm" or set(_DAEMONS) & set(getattr(item, "fixturenames", ())):
            file, number = f"daemons {number % groups}", number + 1
        item.add_marker(pytest.mark.xdist_group(file))
