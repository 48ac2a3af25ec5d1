"""Private folders for the sidecars' sockets. What a killed node left is removed at the next start.

A node locks its folder while it lives, and the kernel unlocks it however the node dies. A folder
without a lock may still be in use by a node of an older version or by an orphaned sidecar. Then
one of its sockets answers.
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
"""Names that `tempfile.mkdtemp` makes."""
_SOCKET: Final = re.compile(r"p2p(d|client)-[A-Za-z0-9_-]+\.sock")
_SOCKET_BYTES: Final = 107
"""Longest path of a Unix socket on Linux (unix(7), sun_path)."""
_OUR_BYTES: Final = 42
"""Part of the path that we need for the folder's name and the socket's name in it."""
_EMPTY_AFTER_S: Final = 1.0
"""A younger empty folder stays: a node of an older version, which locks nothing, may have just made
it."""


class Scratch:
    """One folder, mode 0700, locked until `close`. Made by `make`."""

    def __init__(self, path: Path, fd: int) -> None:
        self.path = path
        self._fd = fd

    @classmethod
    def make(cls) -> Scratch:
        """Make a new folder in TMPDIR.

        Raises:
            ConfigError: TMPDIR is too long for a socket's path.
        """
        folder = tempfile.gettempdir()
        if (length := len(os.fsencode(folder))) > _SOCKET_BYTES - _OUR_BYTES:
            raise ConfigError(
                f"TMPDIR {folder} has {length} bytes, too many for the path of a socket in it",
                f"set TMPDIR to a folder of at most {_SOCKET_BYTES - _OUR_BYTES}",
            )
        while True:
            path = Path(tempfile.mkdtemp(prefix=_PREFIX))
            fd = _locked(path)
            if fd is not None:
                return cls(path, fd)
            # Another node that starts now locked it, to sweep it. Make another folder.

    def close(self) -> None:
        """Remove the folder with its content. A second call does nothing."""
        shutil.rmtree(self.path, ignore_errors=True)
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)


def sweep() -> int:
    """Remove the folders that killed nodes of this user left in TMPDIR, and count them.

    Links are not followed. A folder that holds anything but sidecars' sockets is left alone.
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
    """Lock the folder and return its descriptor; None if it is not ours, in use, or gone."""
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
        # Go through the descriptor: the path itself may be too long for a socket's address.
        return probe.connect_ex(f"/proc/self/fd/{fd}/{name}") == errno.ECONNREFUSED
