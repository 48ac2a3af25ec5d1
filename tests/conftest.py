"""For every test: what it charges to documents is not counted on this machine."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def register_of_the_test(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "xpeer-privacy"
    monkeypatch.setenv("XPEER_PRIVACY_REGISTER", str(folder))
    return folder
