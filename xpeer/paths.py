"""Checks of paths that a person wrote: an unset variable must never be read as a folder.

An empty path would mean the current folder, and "$DIR/" without DIR the whole machine. The node
would then train on text that nobody meant. Such paths are refused before anything is read.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Final

from xpeer.errors import ConfigError, ShardError

_UNSET: Final = "is a variable unset? Name a path, or leave it out"
_OURS: Final = frozenset({"identity.key", "admin.key", "swarm.key", "register.key"})
"""A folder that holds one of these is a node's home, or a privacy register."""
_OUR_FOLDERS: Final = frozenset({"checkpoints", "initial", "cache"})


def checked(name: str, text: str) -> str:
    """Check a path, and return it unchanged.

    Args:
        name: option, setting or variable, for the error.
        text: the path.

    Raises:
        ConfigError: it is blank, no path, not UTF-8, or its `~` stands for nothing.
    """
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


def checked_home(name: str, text: str) -> str:
    """Check a node's folder, and return it unchanged.

    Raises:
        ConfigError: as `checked`, or it is the root of the file system.
    """
    if _expand(name, checked(name, text)).resolve() == Path("/"):
        raise ConfigError(
            f"{name}: {text} is the root of the file system",
            'is a variable unset, as in "$DIR/"? Name a folder of its own',
        )
    return text


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
