"""Only the trainer opens the shard: the daemon's own checks look at names alone."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from tests.cases.support import LOOPBACK, write_shard
from xpeer.cli import main
from xpeer.config import Home
from xpeer.config_sources import load
from xpeer.errors import ConfigError

OPENED: list[str] = []
_WATCHED: list[str] = []


def _hook(event: str, arguments: tuple[object, ...]) -> None:
    if event == "open" and _WATCHED and str(arguments[0]).startswith(_WATCHED[0]):
        OPENED.append(str(arguments[0]))


@pytest.fixture
def home(tmp_path: Path) -> Home:
    shard = write_shard(tmp_path / "shard", files=3)
    arguments = [
        "init", "--swarm", "s", "--home", tmp_path / "h", "--listen", LOOPBACK, "--shard", shard,
        "--preset", "tiny", "--set", "end.steps=20", "--set", "round.fragments=1",
    ]  # fmt: skip
    done = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert done.exit_code == 0, done.output
    return Home(tmp_path / "h")


def test_the_daemon_opens_no_text(home: Home, tmp_path: Path) -> None:
    from xpeer_daemon import start

    sys.addaudithook(_hook)  # stays, so it looks only while asked
    _WATCHED.append(str(tmp_path / "shard"))
    try:
        start.check(home, load(home.config, {}), join_token=None)
    finally:
        _WATCHED.clear()
    assert OPENED == []


def test_it_still_finds_that_there_are_files(home: Home, tmp_path: Path) -> None:
    from xpeer_daemon import start

    for path in (tmp_path / "shard").iterdir():
        path.rename(path.with_suffix(".docx"))
    with pytest.raises(ConfigError, match=r"holds no file .*left out: \.docx 3"):
        start.check(home, load(home.config, {}), join_token=None)
