"""One daemon for each home: an flock, which the kernel releases however the daemon dies."""

from __future__ import annotations

import fcntl
import os
from types import TracebackType
from typing import Self

from xpeer.config import Home
from xpeer.errors import ConfigError, LocalError
from xpeer.files import open_own


class HomeLock:
    """Holds HOME/lock until closed. Programs that the daemon starts don't inherit it."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    @classmethod
    def acquire(cls, home: Home) -> HomeLock:
        """Lock a home.

        Raises:
            LocalError: another daemon has the lock; the text names its pid.
            ConfigError: the home can't be written to.
        """
        try:
            # Don't truncate the file before we own it: it has the other daemon's pid
            fd = open_own(home.lock, os.O_RDWR | os.O_CREAT)
        except OSError as e:
            raise ConfigError(
                f"home {home.path} can't be used: {home.lock.name}: {e.strerror}",
                "check --home and the folder's owner",
            ) from e
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as e:
            pid = os.read(fd, 32).decode(errors="replace").strip() or "unknown"
            os.close(fd)
            raise LocalError(
                f"another daemon (pid {pid}) runs on {home.path}",
                "stop it with `xpeer stop`, or use another --home",
            ) from e
        os.ftruncate(fd, 0)
        os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
        return cls(fd)

    def close(self) -> None:
        """Release the lock. The file stays: removing it would race with the next daemon."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
