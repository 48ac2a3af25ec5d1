"""The daemon's log: both formats, bounded, without secrets, without forged lines."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from xpeer.cli.logs import Entry, parse
from xpeer.config import OLD_LOGS, Home
from xpeer.errors import ConfigError
from xpeer_daemon import logs

log = logging.getLogger("xpeer.test")


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Home]:
    root = logging.getLogger()
    level = root.level
    yield Home(tmp_path)
    logs.close()
    root.setLevel(level)
    logging.getLogger("xpeer").setLevel(logging.NOTSET)
    logging.captureWarnings(False)


def fail() -> None:
    try:
        raise ValueError("inner")
    except ValueError:
        log.exception("it failed")


@pytest.mark.parametrize("log_format", ["text", "json"])
def test_what_is_written_is_what_xpeer_logs_reads(home: Home, log_format: str) -> None:
    logs.setup(home, "info", "json" if log_format == "json" else "text")
    log.debug("not this")
    log.info("round %d", 7)
    fail()
    logging.getLogger("aiohttp").info("nor this")
    entries = list(parse(home.log.read_text().split("\n")))
    assert [(e.level, e.logger, e.message) for e in entries] == [
        ("info", "xpeer.test", "round 7"),
        ("error", "xpeer.test", "it failed"),
    ]
    assert "ValueError: inner" in entries[1].trace


def test_same_on_stderr(home: Home, capsys: pytest.CaptureFixture[str]) -> None:
    logs.setup(home, "info", "json")
    log.warning("hello")
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == home.log.read_text()
    assert msgspec.json.decode(captured.err, type=Entry).message == "hello"


@pytest.mark.parametrize("log_format", ["text", "json"])
def test_tokens_are_hidden_wherever_they_are(home: Home, log_format: str) -> None:
    logs.setup(home, "info", "json" if log_format == "json" else "text")
    token = "xpeer1.c2VjcmV0-_8"
    log.info("joining with %s", token)
    try:
        raise ValueError(f"bad {token}")
    except ValueError:
        log.exception("no")
    text = home.log.read_text()
    assert "c2VjcmV0" not in text
    assert text.count("xpeer1.[hidden]") == 2


def test_nobody_forges_a_line(home: Home) -> None:
    logs.setup(home, "info", "text")
    log.info("peer says %s", "x\n2026-01-01T00:00:00.000Z error xpeer: forged\x1b[2J")
    text = home.log.read_text()
    assert text.count("\n") == 1
    assert "\x1b" not in text


def test_files_are_bounded(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logs, "MAX_FILE_BYTES", 2000)
    logs.setup(home, "info", "text")
    for number in range(200):
        log.info("line %d %s", number, "x" * 50)
    files = sorted(home.path.glob("daemon.log*"))
    assert len(files) == 1 + OLD_LOGS
    assert all(file.stat().st_size <= 2000 for file in files)


def test_setting_up_twice_does_not_double(home: Home) -> None:
    logs.setup(home, "info", "text")
    logs.setup(home, "info", "text")
    log.info("once")
    assert home.log.read_text().count("once") == 1


def test_unwritable(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="can't be written"):
        logs.setup(Home(tmp_path / "no"), "info", "text")
