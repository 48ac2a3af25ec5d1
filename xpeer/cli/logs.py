"""`xpeer logs`: reads the file that the daemon writes, running or not."""

from __future__ import annotations

import time
from collections import deque
from pathlib import Path

import click

from xpeer.cli.common import home_option
from xpeer.config import Home
from xpeer.errors import NotRunningError

POLL_S = 0.25


@click.command()
@home_option
@click.option("-f", "--follow", is_flag=True, help="Go on as the log grows.")
@click.option("-n", "--tail", default=100, show_default=True, help="Lines to begin with.")
def logs(home: Home, follow: bool, tail: int) -> None:
    """Show the last lines of the daemon's log."""
    try:
        file = home.log.open(encoding="utf-8", errors="replace")
    except FileNotFoundError as e:
        raise NotRunningError(
            f"there is no log {home.log}", "has `xpeer start` run on this home?"
        ) from e
    with file:
        for line in deque(file, maxlen=tail):
            click.echo(line, nl=False)
    if follow:
        _follow(home.log)


def _follow(path: Path) -> None:
    """Print what is appended; start over when the file is rotated."""
    while True:
        with path.open(encoding="utf-8", errors="replace") as file:
            file.seek(0, 2)
            inode = path.stat().st_ino
            while path.exists() and path.stat().st_ino == inode:
                for line in file:
                    click.echo(line, nl=False)
                time.sleep(POLL_S)
