"""Where checkpoints lie, and of which step each is: by their names alone, without torch."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

from xpeer.errors import LocalError

_NAME: Final = re.compile(r"ckpt-(\d{9,})\.safetensors")


def name_of(step: int) -> str:
    """The name of a step's checkpoint."""
    return f"ckpt-{step:09d}.safetensors"


def paths(folder: Path) -> list[Path]:
    """List the checkpoints in a folder, newest first.

    Raises:
        LocalError: the folder can't be read.
    """
    try:
        files = [path for path in folder.iterdir() if _NAME.fullmatch(path.name)]
    except FileNotFoundError:
        return []
    except OSError as e:
        raise LocalError(
            f"checkpoints {folder} can't be read: {e.strerror}", "check its owner and mode"
        ) from e
    return sorted(files, key=step_of, reverse=True)


def newest_step(folder: Path) -> int | None:
    """The step of the newest checkpoint, by its name; None = there is none."""
    files = paths(folder)
    return step_of(files[0]) if files else None


def saved_at(folder: Path, step: int) -> float | None:
    """When the newest checkpoint was written that is of this step or an earlier one, Unix time.

    Its content is not looked at. None = there is none, or it can't be looked at.
    """
    try:
        for path in paths(folder):
            if step_of(path) <= step:
                return path.stat().st_mtime
    except (LocalError, OSError):
        return None
    return None


def step_of(path: Path) -> int:
    """The step in a checkpoint's name."""
    match = _NAME.fullmatch(path.name)
    if match is None:
        raise ValueError(f"{path.name} is no checkpoint's name")
    return int(match[1])
