"""Checks of paths that a person wrote: an unset variable must never be read as a folder.

An empty path would mean the current folder, and "$DIR/" without DIR the whole machine. The node
would then train on text that nobody meant. Such paths are refused before anything is read. So are
paths that can't lead anywhere, such as a link to itself.
"""

from __future__ import annotations

import errno
import glob
import os
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import Final, Literal

from xpeer.errors import ConfigError, ShardError

_UNSET: Final = "is a variable unset? Name a path, or leave it out"
_OURS: Final = frozenset({"identity.key", "admin.key", "swarm.key", "register.key"})
"""A folder that holds one of these is a node's home, or a privacy register."""
_OUR_FOLDERS: Final = frozenset({"checkpoints", "initial", "cache"})
_NAME_MAX, _PATH_MAX = 255, 4095
"""Linux's limits of a name and of a path, in bytes."""
IMPOSSIBLE: Final = frozenset({errno.ELOOP, errno.ENOTDIR, errno.ENAMETOOLONG})
"""Errors of paths that will never lead anywhere, whoever asks and whatever disk is there."""

Kind = Literal["file", "folder", "new"]
"""What an option expects: a file or a folder to read, or a folder to make or to fill."""


def checked(name: str, text: str) -> str:
    """Check a path, and return it unchanged. The disk is not looked at.

    Args:
        name: option, setting or variable, for the error.
        text: the path.

    Raises:
        ConfigError: it is blank, no path, not UTF-8, too long, or its `~` stands for nothing.
    """
    encoded = checked_list(name, text).encode()
    if len(encoded) > _PATH_MAX or max(map(len, encoded.split(b"/"))) > _NAME_MAX:
        raise unreachable(name, Path(text), OSError(errno.ENAMETOOLONG, ""))
    return text


def checked_list(name: str, text: str) -> str:
    """Check a path, or several with commas between them, as `checked` does but for their length."""
    if not text.strip():
        raise ConfigError(f"{name} is empty", _UNSET)
    if "\0" in text:
        raise ConfigError(f"{name}: {text!r} is no path: it holds a NUL byte", "correct it")
    try:
        text.encode()
    except UnicodeEncodeError as e:
        raise ConfigError(f"{name}: {text} is not UTF-8", "rename that file or folder") from e
    if text.startswith("~"):
        _expand(name, text)
    return text


def checked_text(name: str, text: str) -> str:
    """Check a file, folder or glob of text to train on, and return it unchanged.

    Raises:
        ConfigError: as `checked`, or it is the root of the file system, or a glob from there.
    """
    # normpath keeps two leading slashes.
    plain = os.path.normpath("/" + _expand(name, checked(name, text)).as_posix().lstrip("/"))
    if Path(text.strip()).expanduser().is_absolute() and (plain == "/" or plain[1] in "*?["):
        raise ConfigError(
            f"{name}: {text} is everything on this machine",
            'is a variable unset, as in "$DIR/"? Name the folder that holds the text',
        )
    return text


def refuse_impossible(name: str, text: str) -> None:
    """Refuse a file, folder or glob that will never lead anywhere. It need not be there now.

    Raises:
        ConfigError: links lead in a circle, a name is too long, or a file is in a folder's place.
    """
    parts = _expand(name, text).parts
    magic = next((n for n, part in enumerate(parts) if glob.has_magic(part)), None)
    try:
        Path(*parts[:magic]).stat()
    except OSError as e:
        if e.errno in IMPOSSIBLE:
            raise unreachable(name, Path(*parts[:magic]), e) from e


def checked_home(name: str, text: str) -> Path:
    """Check a node's folder, which need not exist.

    Raises:
        ConfigError: as `checked` and `status_of`; or it is the root of the file system, no folder,
            or closed to this user.
    """
    path = _expand(name, checked(name, text))
    status = status_of(name, path)
    if path.resolve() == Path("/"):
        raise ConfigError(
            f"{name}: {text} is the root of the file system",
            'is a variable unset, as in "$DIR/"? Name a folder of its own',
        )
    if status is not None and not stat.S_ISDIR(status.st_mode):
        raise ConfigError(f"{name}: {path} is not a folder", "name another with --home")
    if status is not None and not os.access(path, os.X_OK):
        raise unreachable(name, path, OSError(errno.EACCES, ""))
    return path


def folder_of(setting: str, text: str) -> Path:
    """The folder that a setting names, to be read. It may be missing.

    Raises:
        ConfigError: as `require`.
    """
    path = _expand(setting, checked(setting, text))
    require(setting, path, "folder")
    return path


def require(name: str, path: Path, kind: Kind) -> None:
    """Refuse a path that is not what an option or setting expects. It may be missing.

    Raises:
        ConfigError: as `status_of`; or it is a file in place of a folder or the other way round, or
            this user may not read it, or not write to it.
    """
    status = status_of(name, path)
    if status is None:
        if kind == "new":
            above = next(each for each in path.absolute().parents if each.exists())
            _require_access(name, above, os.W_OK | os.X_OK, "written to")
        return
    is_folder = stat.S_ISDIR(status.st_mode)
    if kind == "file" and is_folder:
        raise ConfigError(f"{name}: {path} is a folder, not a file", "name the file itself")
    if kind != "file" and not is_folder:
        raise ConfigError(f"{name}: {path} is a file, not a folder", "name the folder itself")
    if kind == "new":
        _require_access(name, path, os.W_OK | os.X_OK, "written to")
    else:
        _require_access(name, path, os.R_OK | os.X_OK if is_folder else os.R_OK, "read")


def status_of(name: str, path: Path) -> os.stat_result | None:
    """Follow a path to what it names; None = nothing is there.

    Raises:
        ConfigError: it can't be followed, or is a link to nothing.
    """
    try:
        return path.stat()
    except FileNotFoundError:
        pass
    except OSError as e:
        raise unreachable(name, path, e) from e
    for each in (path, *path.parents):
        if each.is_symlink() and not each.exists():
            raise ConfigError(
                f"{name}: {path} can't be followed: the link {each} leads to nothing",
                f"make {each.readlink()}, or remove the link",
            )
    return None


def unreachable(name: str, path: Path, error: OSError) -> ConfigError:
    """The error for a path that can't be followed."""
    text = str(path)
    if error.errno == errno.ELOOP:
        why = "it is a link, or leads through one, that leads back to itself"
        remedy = "remove that link, or name what it should lead to"
    elif error.errno == errno.ENOTDIR:
        file = next((each for each in path.parents if each.is_file()), path.parent)
        why, remedy = f"{file} is not a folder", "correct the path"
    elif error.errno == errno.ENAMETOOLONG:
        text = f"{text[:_NAME_MAX]}..."
        why = f"a name may have {_NAME_MAX} bytes, a path {_PATH_MAX}"
        remedy = "correct it, or choose a shorter one"
    elif error.errno == errno.EACCES:
        why = "this user may not enter it, or a folder above it"
        remedy = "open them to this user, or run this as a user who may"
    else:
        why, remedy = error.strerror or str(error), "check the disk that it is on, or name another"
    return ConfigError(f"{name}: {text} can't be used: {why}", remedy)


def _require_access(name: str, path: Path, mode: int, what: str) -> None:
    if not os.access(path, mode):
        raise ConfigError(
            f"{name}: {path} can't be {what} by this user",
            "correct its mode or owner, or name another",
        )


def refuse_homes(files: Iterable[Path], setting: str) -> None:
    """Refuse to train on files of a node's home or of a privacy register.

    Raises:
        ShardError: names the first such file.
    """
    by_folder: dict[Path, Path] = {}
    for file in files:
        by_folder.setdefault(file.parent, file)
    for folder, file in by_folder.items():
        inner = [p.parent for p in (folder, *folder.parents) if p.name in _OUR_FOLDERS]
        for place in (folder, *inner):
            if any((place / key).exists() for key in _OURS):
                raise ShardError(
                    f"{setting}: {file} belongs to the xpeer folder {place}, not to any text",
                    "name folders that hold nothing but the text",
                )


def _expand(name: str, text: str) -> Path:
    if text.startswith("~") and os.environ.get("HOME") == "":
        raise ConfigError(f"{name}: {text} can't be told: HOME is empty", "write the whole path")
    try:
        return Path(text).expanduser()
    except RuntimeError as e:
        raise ConfigError(
            f"{name}: {text} can't be told: there is no such user, or no home folder",
            "write the whole path",
        ) from e
