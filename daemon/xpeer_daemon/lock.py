"""One daemon per home, enforced by the kernel."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path
from types import TracebackType

from xpeer.errors import LocalError


class HomeLock:
    """Held while a daemon runs; a killed daemon's lock is free at once."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._fd = -1

    def __enter__(self) -> HomeLock:
        """Take it.

        Raises:
            LocalError: another daemon has it.
        """
        fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as e:
            pid = os.read(fd, 20).decode(errors="replace").strip()
            os.close(fd)
            raise LocalError(
                f"another daemon (pid {pid}) runs on home {self._path.parent}",
                "stop it with `xpeer stop`, or give this one another --home",
            ) from e
        os.ftruncate(fd, 0)
        os.write(fd, str(os.getpid()).encode())
        self._fd = fd
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Release it."""
        os.close(self._fd)
