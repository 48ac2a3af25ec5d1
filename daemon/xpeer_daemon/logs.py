"""Where the daemon's log goes: stderr for systemd, and a bounded file that `xpeer logs` reads."""

from __future__ import annotations

import json
import logging
import logging.handlers
import time
from pathlib import Path

MAX_BYTES, BACKUPS = 8 << 20, 3


class JsonLines(logging.Formatter):
    """One JSON object a line."""

    def format(self, record: logging.LogRecord) -> str:
        """Time, level, logger, message, and a traceback if there is one."""
        line = {
            "time": record.created,
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line)


class TextLines(logging.Formatter):
    """For people: UTC time to the millisecond, level, logger, message."""

    converter = staticmethod(time.gmtime)
    default_time_format = "%Y-%m-%dT%H:%M:%S"
    default_msec_format = "%s.%03dZ"

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)-7s %(name)s: %(message)s")


def set_up(level: str, log_format: str, path: Path) -> None:
    """Route all of Python's logging; call once, in the daemon's process."""
    formatter = JsonLines() if log_format == "json" else TextLines()
    file = logging.handlers.RotatingFileHandler(
        path, maxBytes=MAX_BYTES, backupCount=BACKUPS, encoding="utf-8"
    )
    root = logging.getLogger()
    root.handlers = [logging.StreamHandler(), file]
    for handler in root.handlers:
        handler.setFormatter(formatter)
    root.setLevel(level.upper())
    for noisy in ("aiohttp", "asyncio", "hivemind"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
