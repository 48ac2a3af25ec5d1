from __future__ import annotations

import tempfile
from pathlib import Path

import pytest

from xpeer.errors import ConfigError
from xpeer.network.scratch import Scratch


def test_a_folder_too_long_for_sockets_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    long = tmp_path / ("x" * 80)
    long.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(long))
    with pytest.raises(ConfigError, match=r"TMPDIR .* too many for the path of a socket"):
        Scratch.make()
    assert not list(long.iterdir())
