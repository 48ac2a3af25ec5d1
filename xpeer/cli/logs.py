"""`xpeer logs`: reads the daemon's log file, whether the daemon runs or not."""

from __future__ import annotations

import os
import re
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import TextIO

import click
import msgspec
from msgspec import Struct

from xpeer.cli.common import Whole, home_option, json_option
from xpeer.config import Home
from xpeer.errors import ConfigError, NotRunningError
from xpeer.escape import json_text, visible
from xpeer.leaves import Local, seen_by

POLL_S = 0.2
LEVELS = ("debug", "info", "warning", "error", "critical")
_TEXT = re.compile(r"(\S+Z) (debug|info|warning|error|critical) (\S+): (.*)", re.ASCII)


@seen_by("home")
class Entry(Struct, omit_defaults=True):
    """One entry of the log, in either format."""

    time: Local[str]
    level: Local[str]
    logger: Local[str]
    message: Local[str]
    trace: Local[str] = ""

    def text(self) -> str:
        """The entry as the daemon writes text. Control characters are made visible."""
        line = visible(f"{self.time} {self.level} {self.logger}: {self.message}")
        trace = "\n".join(map(visible, self.trace.split("\n")))
        return f"{line}\n{trace}" if trace else line


@click.command()
@home_option
@json_option
@click.option("-f", "--follow", is_flag=True, help="Follow the log as it grows, until Ctrl-C.")
@click.option(
    "-n", "--tail", type=Whole(0, 10**9), default=100, show_default=True,
    help="Number of entries to begin with.",
)  # fmt: skip
@click.option(
    "--level", type=click.Choice(LEVELS[:-1]), default="debug", help="Least level to show."
)
def logs(home: Home, as_json: bool, follow: bool, tail: int, level: str) -> None:
    """Show the last entries of the daemon's log."""
    wanted = frozenset(LEVELS[LEVELS.index(level) :])
    with closing(_Tail(home.log)) as current:
        entries: deque[Entry] = deque(maxlen=tail)
        for lines in (_rotated(home.log), current.new_lines()):
            entries.extend(entry for entry in parse(lines) if entry.level in wanted)
        for entry in entries:
            _print(entry, as_json=as_json)
        while follow:
            for entry in parse(current.new_lines()):
                if entry.level in wanted:
                    _print(entry, as_json=as_json)
            time.sleep(POLL_S)


class _Tail:
    """Follows a file that grows, and that a new file replaces at times."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = _open(path)
        self._rest = ""

    def new_lines(self) -> list[str]:
        """Complete lines that came since the last call."""
        text = self._rest + self._file.read()
        if self._replaced():
            text += self._file.read()  # lines that came between the two calls
            self._file.close()
            self._file = _open(self._path)
            text += self._file.read()
        *lines, self._rest = text.split("\n")
        return lines

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _replaced(self) -> bool:
        try:
            return self._path.stat().st_ino != os.fstat(self._file.fileno()).st_ino
        except FileNotFoundError:
            return False  # between the two renames of a rotation


def _rotated(path: Path) -> list[str]:
    older = path.with_name(f"{path.name}.1")
    if not older.exists():
        return []
    with _open(older) as file:
        return file.read().split("\n")


def parse(lines: Sequence[str]) -> Iterator[Entry]:
    """Entries of a log. A line in neither format belongs to the entry before it."""
    current: Entry | None = None
    for line in lines:
        entry = _entry(line)
        if entry is None:
            if current is not None and line:
                current.trace = f"{current.trace}\n{line}" if current.trace else line
            continue
        if current is not None:
            yield current
        current = entry
    if current is not None:
        yield current


def _entry(line: str) -> Entry | None:
    if line.startswith("{"):
        try:
            return msgspec.json.decode(line, type=Entry)
        except (msgspec.MsgspecError, ValueError, RecursionError):
            return None
    match = _TEXT.fullmatch(line)
    return Entry(*match.groups()) if match else None


def _print(entry: Entry, *, as_json: bool) -> None:
    click.echo(json_text(entry) if as_json else entry.text())


def _open(path: Path) -> TextIO:
    try:
        return path.open(encoding="utf-8", errors="replace")
    except FileNotFoundError as e:
        raise NotRunningError(
            f"there is no log {path}", "has `xpeer start` run on this home? See --home"
        ) from e
    except OSError as e:
        raise ConfigError(
            f"log {path} can't be read: {e.strerror}",
            "as another user: journalctl -u xpeer, or sudo",
        ) from e
