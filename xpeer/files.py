"""Files and folders that only this user may read or write, whatever other users put there.

A node stores its keys, its text as tokens, and logs with losses on that text.
"""

from __future__ import annotations

import contextlib
import errno
import glob
import os
import pwd
import shutil
import stat
import tempfile
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from xpeer.config import Home
from xpeer.errors import ConfigError

OTHERS: Final = 0o077
NOT_OURS: Final = frozenset((errno.EACCES, errno.EPERM, errno.EROFS))
"""Errors of folders that this user can't write to. They may have room."""
_OTHERS_WRITE: Final = 0o022


@contextmanager
def private_umask() -> Iterator[None]:
    """Make all new files private to this user while the block runs, also those of libraries."""
    previous = os.umask(OTHERS)
    try:
        yield
    finally:
        os.umask(previous)


def room_for(home: Home) -> Path:
    """Where files of a home are written before they are moved into it: in the home, if there is
    one. A service's user can't write to /var/lib, and a home may be a disk of its own.
    """
    path = home.path.absolute()
    return next(folder for folder in (path, *path.parents) if folder.is_dir())


def stage(home: Home) -> Path:
    """Make a folder in that room, mode 0700.

    Raises:
        OSError: it can't be made.
    """
    return Path(tempfile.mkdtemp(prefix=_staged(home), dir=room_for(home)))


def clear_staged(home: Home) -> None:
    """Remove such folders that a crash has left. Call it only while nobody writes to the home."""
    for left in room_for(home).glob(f"{glob.escape(_staged(home))}*"):
        with contextlib.suppress(OSError):
            if left.lstat().st_uid == os.geteuid():
                shutil.rmtree(left, ignore_errors=True)


def _staged(home: Home) -> str:
    return f".{home.path.name}.writing-"


def open_own(path: Path, flags: int) -> int:
    """Open a file of a node's home. A new one gets mode 0600. Links are never followed.

    Returns:
        A descriptor that child processes don't inherit.

    Raises:
        ConfigError: it is a link, a folder, a pipe, or a file of another user.
        OSError: it can't be opened for another reason.
    """
    try:
        # O_NONBLOCK: opening a pipe that somebody put there would wait for ever.
        fd = os.open(path, flags | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK, 0o600)
    except OSError as e:
        if e.errno == errno.ELOOP:
            raise _link(path) from e
        raise
    try:
        status = os.fstat(fd)
        _refuse_foreign(path, status)
        if status.st_mode & OTHERS:
            os.fchmod(fd, stat.S_IMODE(status.st_mode) & ~OTHERS)
    except BaseException:
        os.close(fd)
        raise
    return fd


def sync(path: Path) -> None:
    """Wait until a file or folder is on the disk (fsync)."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def put(path: Path, parts: Iterable[bytes], *, durable: bool = False) -> None:
    """Write a file, mode 0600, in place of any that is there; after a crash one of both is whole.

    Args:
        path: its folder is made, mode 0700, if need be.
        parts: what it holds.
        durable: whether to wait until it is on the disk.

    Raises:
        OSError: it can't be written.
    """
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.writing")
    try:
        beside.unlink(missing_ok=True)
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        with open(os.open(beside, flags, 0o600), "wb") as file:  # noqa: PTH123 - a mode
            file.writelines(parts)
            if durable:
                file.flush()
                os.fsync(file.fileno())
        beside.replace(path)
        if durable:
            sync(path.parent)
    except BaseException:
        with contextlib.suppress(OSError):
            beside.unlink(missing_ok=True)
        raise


def require_own(path: Path) -> None:
    """Check a file that a library is about to open by its name. It may be missing.

    It is not opened here: closing it would release the locks that SQLite may have on it.

    Raises:
        ConfigError: it is a link, no regular file, or a file of another user.
    """
    try:
        status = path.lstat()
    except FileNotFoundError:
        return
    except OSError as e:
        raise ConfigError(f"{path} can't be used: {e.strerror}", "check its owner and mode") from e
    if stat.S_ISLNK(status.st_mode):
        raise _link(path)
    _refuse_foreign(path, status)


def secure(home: Home, *, look_only: bool = False) -> list[str]:
    """Close a home and its files to other users, before anything is read or written there.

    Args:
        home: it need not exist.
        look_only: True = only check, change nothing.

    Returns:
        Sentences that say what was closed.

    Raises:
        ConfigError: other users may write to the home or replace it, or it belongs to one of them.
    """
    is_home = home.identity_key.exists() or home.credential.exists()
    ours = None if is_home else {path.name for path in home.parts()}
    closed = secure_folder(home.path, "home", "--home", ours, look_only=look_only)
    return closed if look_only else [*closed, *_close_files(home)]


def secure_folder(
    path: Path, what: str, option: str, ours: Collection[str] | None, *, look_only: bool = False
) -> list[str]:
    """Close one folder to other users, as `secure` does.

    Args:
        path: it need not exist.
        what: what the folder is, for messages.
        option: the option that names it, for messages.
        ours: the folder is closed only if it holds no other names; None = whatever it holds.
        look_only: True = only check, change nothing.

    Returns:
        Sentences that say what was closed.

    Raises:
        ConfigError: as `secure`; or the folder holds other names and is open to others.
    """
    other = f"choose another folder with {option}"
    try:
        _refuse_replaceable(path, what, other)
        if not path.exists():
            return []
        status = path.stat()
        mode = stat.S_IMODE(status.st_mode)
        _refuse_others(path, status, what, other)
        if not mode & OTHERS or look_only:
            return []
        foreign = [] if ours is None else [e.name for e in path.iterdir() if e.name not in ours]
        if foreign:
            raise ConfigError(
                f"{what} {path} has mode {mode:04o} and holds other things ({min(foreign)})",
                f"{other}; or, to close this one to others: chmod 0700 {path}",
            )
        path.chmod(0o700)
    except OSError as e:
        raise ConfigError(f"{what} {path} can't be used: {e.strerror or e}", other) from e
    return [f"{what} {path} had mode {mode:04o}: others could enter it; it is 0700 now"]


def _refuse_replaceable(path: Path, what: str, other: str) -> None:
    real = path.resolve()
    for folder in {*path.parents, *real.parents}:
        try:
            mode = folder.stat().st_mode
        except OSError:
            continue  # not there yet, or closed to us
        if mode & stat.S_IWOTH and not mode & stat.S_ISVTX:
            raise ConfigError(
                f"{what} {path}: anybody can put another folder in its place, since {folder} has "
                f"mode {stat.S_IMODE(mode):04o}",
                f"run: chmod o-w {folder}; or {other}",
            )
    if path.is_symlink() and path.lstat().st_uid not in (0, os.geteuid()):
        raise ConfigError(
            f"{what} {path} is a link that user {_user(path.lstat().st_uid)} has made",
            f"name the folder itself ({real}), or {other}",
        )


def _refuse_others(path: Path, status: os.stat_result, what: str, other: str) -> None:
    if status.st_uid != os.geteuid():
        owner = _user(status.st_uid)
        raise ConfigError(
            f"{what} {path} belongs to user {owner}, not to {_user(os.geteuid())}",
            f"run this as that user (sudo -u {owner} xpeer ...), or {other}",
        )
    if status.st_mode & _OTHERS_WRITE:
        raise ConfigError(
            f"{what} {path} has mode {stat.S_IMODE(status.st_mode):04o}: others can write to it",
            f"look what is in it, then run: chmod 0700 {path}; or {other}",
        )


def _close_files(home: Home) -> list[str]:
    # A key that others could read stays an error: they may have copied it.
    keys = (home.identity_key, home.admin_key, home.swarm_key)
    closed = []
    for path in (path for path in home.parts() if path not in keys):
        with contextlib.suppress(OSError):  # not there, or not a file that we can open
            status = path.lstat()
            if stat.S_ISREG(status.st_mode) and status.st_mode & OTHERS:
                path.chmod(stat.S_IMODE(status.st_mode) & ~OTHERS)
                closed.append(path.name)
    if not closed:
        return []
    return [f"files of {home.path} that others could read are closed to them: {', '.join(closed)}"]


def _link(path: Path) -> ConfigError:
    return ConfigError(
        f"{path} is a link: what is written to it would land elsewhere",
        "remove it, or put the file itself there",
    )


def _refuse_foreign(path: Path, status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise ConfigError(f"{path} is no file", "move it away")
    if status.st_uid != os.geteuid():
        raise ConfigError(
            f"{path} belongs to user {_user(status.st_uid)}, not to {_user(os.geteuid())}",
            "run this as that user, or move the file away",
        )


def _user(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)
