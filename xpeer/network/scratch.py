"""Folders for the sidecars' sockets: private, and removed at the next start if we were killed.

A folder is locked while its node lives, and the kernel unlocks it however the node dies. A folder
without a lock may be a living older version's, or an orphaned sidecar's: then a socket answers.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import re
import shutil
import socket
import stat
import tempfile
import time
from pathlib import Path
from typing import Final

from xpeer.errors import ConfigError

log = logging.getLogger("xpeer.network")

_PREFIX: Final = "xpeer-"
_NAME: Final = re.compile(rf"{_PREFIX}[a-z0-9_]{{8}}")
"""As `tempfile.mkdtemp` makes them."""
_SOCKET: Final = re.compile(r"p2p(d|client)-[A-Za-z0-9_-]+\.sock")
_SOCKET_BYTES: Final = 107
"""Of a Unix socket's path on Linux (unix(7), sun_path)."""
_OUR_BYTES: Final = 42
"""Of these, the folder's own name and a socket's in it."""
_EMPTY_AFTER_S: Final = 1.0
"""An empty folder may be one that an older version, which locks nothing, has just made."""


class Scratch:
    """One folder, 0700, locked until it is closed. Made by `make`."""

    def __init__(self, path: Path, fd: int) -> None:
        self.path = path
        self._fd = fd

    @classmethod
    def make(cls) -> Scratch:
        """A new one in TMPDIR.

        Raises:
            ConfigError: no socket's path in TMPDIR would be short enough.
        """
        folder = tempfile.gettempdir()
        if (taken := len(os.fsencode(folder))) > _SOCKET_BYTES - _OUR_BYTES:
            raise ConfigError(
                f"TMPDIR {folder} has {taken} bytes, too many for the path of a socket in it",
                f"set TMPDIR to a folder of at most {_SOCKET_BYTES - _OUR_BYTES}",
            )
        while True:
            path = Path(tempfile.mkdtemp(prefix=_PREFIX))
            fd = _locked(path)
            if fd is not None:
                return cls(path, fd)
            # another node that starts now took it for one that was left over

    def close(self) -> None:
        """Remove it with all that is in it; once is enough, twice does no harm."""
        shutil.rmtree(self.path, ignore_errors=True)
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)


def sweep() -> int:
    """Remove what killed nodes of this user left in TMPDIR; how many folders.

    Links are not followed, and a folder with anything in it but sidecars' sockets is left alone.
    """
    removed = 0
    for path in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
        if _NAME.fullmatch(path.name) is None or (fd := _locked(path)) is None:
            continue
        try:
            if _left_over(fd):
                for name in os.listdir(fd):  # noqa: PTH208 - by descriptor
                    os.unlink(name, dir_fd=fd)
                path.rmdir()
                removed += 1
        except OSError as e:
            log.debug("%s stays: %s", path, e)
        finally:
            os.close(fd)
    if removed:
        log.info("removed %d folders that killed nodes had left in %s", removed, path.parent)
    return removed


def _locked(path: Path) -> int | None:
    """The folder's descriptor with its lock; None if it is not ours, in use, or gone."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return None
    with contextlib.suppress(OSError):
        seen = os.fstat(fd)
        if seen.st_uid == os.geteuid() and stat.S_IMODE(seen.st_mode) == 0o700:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if path.lstat().st_ino == seen.st_ino:
                return fd
    os.close(fd)
    return None


def _left_over(fd: int) -> bool:
    names = os.listdir(fd)
    if not names:
        return time.time() - os.fstat(fd).st_mtime > _EMPTY_AFTER_S
    return all(_SOCKET.fullmatch(name) and _dead_socket(fd, name) for name in names)


def _dead_socket(fd: int, name: str) -> bool:
    if not stat.S_ISSOCK(os.stat(name, dir_fd=fd, follow_symlinks=False).st_mode):
        return False
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(1.0)
        # through the descriptor: the path may be longer than an address can be
        return probe.connect_ex(f"/proc/self/fd/{fd}/{name}") == errno.ECONNREFUSED
