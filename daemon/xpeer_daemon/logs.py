"""The daemon's log: lines of text or JSON on stderr and in HOME/daemon.log, bounded in size.

Tokens never reach a log, however they got into a message: every finished line is searched for
them. Control characters in messages are escaped, so that nobody can forge a line.
"""

from __future__ import annotations

import logging
import logging.handlers
import re
import sys
import time
from typing import Literal

import msgspec

from xpeer.config import Home
from xpeer.errors import ConfigError

MAX_FILE_BYTES = 10_000_000
OLD_FILES = 3

_TOKEN = re.compile(r"xpeer1\.[A-Za-z0-9_=-]+")
_ESCAPES = {code: f"\\x{code:02x}" for code in (*range(32), 127)}


class _Formatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return _TOKEN.sub("xpeer1.[hidden]", self._line(record))

    def _line(self, record: logging.LogRecord) -> str:
        line = (
            f"{_moment(record)} {record.levelname.lower()} {record.name}: "
            f"{record.getMessage().translate(_ESCAPES)}"
        )
        trace = self._trace(record)
        return f"{line}\n{trace}" if trace else line

    def _trace(self, record: logging.LogRecord) -> str:
        if not record.exc_info:
            return ""
        # Indented: a line of a traceback never looks like an entry of its own.
        return "\n".join(f"  {x}" for x in self.formatException(record.exc_info).splitlines())


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
        return msgspec.json.encode(entry).decode()


def setup(home: Home, level: str, log_format: Literal["text", "json"]) -> None:
    """Send every logger's messages to stderr and to the home's log file.

    Libraries are heard from `warning` on; xpeer's own loggers from `level` on.

    Raises:
        ConfigError: the log file can't be written.
    """
    formatter = _JsonFormatter() if log_format == "json" else _Formatter()
    try:
        file = logging.handlers.RotatingFileHandler(
            home.log, maxBytes=MAX_FILE_BYTES, backupCount=OLD_FILES, encoding="utf-8"
        )
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


def close() -> None:
    """Undo `setup`: flush and drop what it added."""
    root = logging.getLogger()
    for handler in list(root.handlers):
        if isinstance(handler.formatter, _Formatter):
            root.removeHandler(handler)
            handler.close()


def _moment(record: logging.LogRecord) -> str:
    seconds = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
    return f"{seconds}.{int(record.msecs):03d}Z"
