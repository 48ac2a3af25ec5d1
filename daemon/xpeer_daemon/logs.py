"""The daemon's log: lines of text or JSON on stderr and in HOME/daemon.log, bounded in size.

No token gets into a log: every finished line is searched for them, and they are replaced. Control
characters in messages are escaped, so that nobody can forge a line.
"""

from __future__ import annotations

import logging
import logging.handlers
import os
import sys
import time
from io import TextIOWrapper
from pathlib import Path
from typing import Literal

from xpeer.config import OLD_LOGS, Home
from xpeer.errors import ConfigError
from xpeer.escape import hidden, json_text, visible
from xpeer.files import open_own
from xpeer.health import Health

MAX_FILE_BYTES = 10_000_000


class _Formatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return hidden(self._line(record))

    def _line(self, record: logging.LogRecord) -> str:
        line = (
            f"{_moment(record)} {record.levelname.lower()} {record.name}: "
            f"{visible(record.getMessage())}"
        )
        trace = self._trace(record)
        return f"{line}\n{trace}" if trace else line

    def _trace(self, record: logging.LogRecord) -> str:
        if not record.exc_info:
            return ""
        # Indent it: a line of a traceback must not look like an entry of its own
        lines = self.formatException(record.exc_info).split("\n")
        return "\n".join(f"  {visible(line)}" for line in lines)


class _JsonFormatter(_Formatter):
    def _line(self, record: logging.LogRecord) -> str:
        entry = {
            "time": _moment(record),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if trace := self._trace(record):
            entry["trace"] = trace
        return json_text(entry)


class _File(logging.handlers.RotatingFileHandler):
    """The home's log file. A line that can't be written is counted, and never ends the daemon.

    It is opened without following a link, so that nobody can direct our lines to another file.

    Attributes:
        health: gets the condition `log-failing`; None until `watch` sets it.
    """

    health: Health | None = None
    _failed = False

    def _open(self) -> TextIOWrapper:
        fd = open_own(Path(self.baseFilename), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        return os.fdopen(fd, "a", encoding=self.encoding)

    def emit(self, record: logging.LogRecord) -> None:
        self._failed = False
        super().emit(record)
        if self.health is not None and not self._failed:
            self.health.worked("log-failing")

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 - logging's name
        """Note the failure. Logging would print a trace to stderr, which has the line anyway."""
        self._failed = True
        if self.health is not None:
            self.health.failed("log-failing", sys.exc_info()[1])


def watch(health: Health) -> None:
    """Note in the node's health from now on whether the log file can be written."""
    for handler in logging.getLogger().handlers:
        if isinstance(handler, _File):
            handler.health = health


def setup(home: Home, level: str, log_format: Literal["text", "json"]) -> None:
    """Send every logger's messages to stderr and to the home's log file.

    Libraries log from `warning` on; xpeer's own loggers from `level` on.

    Raises:
        ConfigError: the log file can't be written.
    """
    formatter = _JsonFormatter() if log_format == "json" else _Formatter()
    try:
        file = _File(home.log, maxBytes=MAX_FILE_BYTES, backupCount=OLD_LOGS, encoding="utf-8")
    except OSError as e:
        raise ConfigError(
            f"log {home.log} can't be written: {e.strerror}", "check the home's owner and mode"
        ) from e
    root = logging.getLogger()
    close()
    for handler in (logging.StreamHandler(sys.stderr), file):
        handler.setFormatter(formatter)
        root.addHandler(handler)
    root.setLevel(logging.WARNING)
    logging.getLogger("xpeer").setLevel(level.upper())
    logging.captureWarnings(True)


def add_fault(path: Path, error: BaseException) -> None:
    """Append the error that ended a command, with its trace, as an entry like the daemon's.

    Raises:
        ConfigError, OSError: the file can't be written.
    """
    raised = (type(error), error, error.__traceback__)
    record = logging.LogRecord(
        "xpeer.cli", logging.ERROR, "", 0, "a fault of xpeer ended a command", (), raised
    )
    fd = open_own(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    with os.fdopen(fd, "a", encoding="utf-8") as file:
        file.write(f"{_Formatter().format(record)}\n")


def close() -> None:
    """Undo `setup`: flush, close and remove its handlers."""
    root = logging.getLogger()
    for handler in list(root.handlers):
        if isinstance(handler.formatter, _Formatter):
            root.removeHandler(handler)
            handler.close()


def _moment(record: logging.LogRecord) -> str:
    seconds = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
    return f"{seconds}.{int(record.msecs):03d}Z"
