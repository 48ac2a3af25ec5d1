"""Reading files that somebody else may have made: a downloaded model, a copied config.

A link in a model's folder could point to any file of this user. Its content would then be signed
into the manifest, or be part of an export. And reading a pipe would wait for ever.
"""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

from xpeer.errors import ConfigError


def read(file: Path) -> bytes:
    """The content of a file that a person named; links are followed.

    Raises:
        OSError: it can't be read, or is a pipe, a device or a folder.
    """
    fd = os.open(file, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # a pipe is not waited for
    with open(fd, "rb") as opened:  # noqa: PTH123 - a descriptor
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise OSError(errno.EINVAL, "it is a pipe, a device or a folder, not a file", str(file))
        return opened.read()


def read_inside(file: Path, folder: Path) -> bytes:
    """The content of a file that belongs to a model's folder.

    Raises:
        OSError: as `read`.
        ConfigError: it is a link to elsewhere.
    """
    return read(inside(file, folder))


def inside(file: Path, folder: Path) -> Path:
    """Resolve a file of a model's folder. It has to be in that folder or in a hub cache's blobs.

    Raises:
        ConfigError: it is a link to elsewhere; names both files.
    """
    try:
        real, base = file.resolve(), folder.resolve()
    except (OSError, RuntimeError) as e:  # links in a circle
        raise ConfigError(f"{file} can't be followed: {e}", "put the file itself there") from e
    if real.is_relative_to(base):
        return real
    snapshot = next((p for p in (base, *base.parents) if p.parent.name == "snapshots"), None)
    if snapshot is not None and real.parent == snapshot.parent.parent / "blobs":
        return real
    raise ConfigError(
        f"{file} is a link to {real}, outside of its folder, and would be read as part of it",
        "put the file itself there if that is meant, or remove the link",
    )


def require_inside(folder: Path) -> None:
    """Refuse a model's folder that holds links to files elsewhere, pipes or devices.

    Call it before a library reads the folder by itself.

    Raises:
        ConfigError: names the first of them.
        OSError: the folder can't be read.
    """
    for file in sorted(folder.iterdir()):
        if not file.exists() or file.is_dir():
            continue
        if not inside(file, folder).is_file():
            raise ConfigError(
                f"{file} is a pipe or a device, not a file", "put the file itself there"
            )
