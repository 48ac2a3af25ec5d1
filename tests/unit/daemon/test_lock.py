"""One daemon per home."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from xpeer.config import Home
from xpeer.errors import ConfigError, LocalError
from xpeer_daemon.lock import HomeLock

HOLDER = """
import sys, time
from pathlib import Path
from xpeer.config import Home
from xpeer_daemon.lock import HomeLock
with HomeLock.acquire(Home(Path(sys.argv[1]))):
    print("locked", flush=True)
    sys.stdin.read()
"""


def test_second_daemon_names_the_first_and_changes_nothing(tmp_path: Path) -> None:
    home = Home(tmp_path)
    with HomeLock.acquire(home):
        before = home.lock.read_bytes()
        with pytest.raises(LocalError, match=f"pid {os.getpid()}.*--home"):
            HomeLock.acquire(home)
        assert home.lock.read_bytes() == before
    with HomeLock.acquire(home):
        pass


def test_a_killed_daemon_leaves_no_lock(tmp_path: Path) -> None:
    home = Home(tmp_path)
    command = [sys.executable, "-c", HOLDER, str(tmp_path)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "locked\n"
        with pytest.raises(LocalError, match=f"pid {holder.pid}"):
            HomeLock.acquire(home)
        holder.send_signal(signal.SIGKILL)
        holder.wait(20)
    with HomeLock.acquire(home):
        assert home.lock.read_text() == f"{os.getpid()}\n"


def test_closing_twice_is_harmless(tmp_path: Path) -> None:
    lock = HomeLock.acquire(Home(tmp_path))
    lock.close()
    lock.close()


def test_missing_home(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--home"):
        HomeLock.acquire(Home(tmp_path / "no"))
