"""A model's folder with its matrices in another type, made tensor by tensor on a disk.

Loaded from the original, each of them would be converted in memory and stay there: 16 GB for a base
of 8 billion parameters. From this folder they are pages of a file, which give way.
"""

from __future__ import annotations

import math
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import safe_open

from xpeer.amounts import size
from xpeer.errors import LocalError
from xpeer.files import NOT_OURS
from xpeer.source import entries
from xpeer.training.tensor_file import STAGING, Pending, save_file

_LARGE_FILES: Final = Path("/var/tmp")  # noqa: S108 - `mkdtemp` makes names in it
_FLOATS: Final = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
}  # fmt: skip
"""By their names in a file."""


def temporary() -> Path:
    """The folder for temporary files on a disk, for commands without a home: TMPDIR's, else
    /var/tmp, since /tmp may be memory.
    """
    usual = Path(tempfile.gettempdir())
    if usual == Path("/tmp") and os.access(_LARGE_FILES, os.W_OK):  # noqa: S108 - not used
        return _LARGE_FILES
    return usual


def bytes_of(folder: Path, dtype: torch.dtype) -> int:
    """Bytes that `in_dtype` writes; 0 = it converts nothing.

    Args:
        folder: of a model, checked.
        dtype: float32 or bfloat16.
    """
    found = entries(folder)
    if not any(_is_other(entry, dtype) for tensors in found.values() for entry in tensors.values()):
        return 0
    return sum(_size(entry, dtype) for tensors in found.values() for entry in tensors.values())


@contextmanager
def in_dtype(folder: Path, dtype: torch.dtype, near: Path | None) -> Iterator[Path]:
    """A folder to load the model from, within the block; what is loaded of it stays afterwards.

    Vectors stay as they are: they are small, and some of them are tables that are never rounded.

    Args:
        folder: of a model, checked.
        dtype: float32 or bfloat16.
        near: folder on the disk to write to, made if need be; None = convert in memory.

    Raises:
        LocalError: the disk is full, or can't be written.
    """
    wanted = bytes_of(folder, dtype) if near is not None else 0
    if near is None or not wanted:
        yield folder
        return
    try:
        near.mkdir(mode=0o700, parents=True, exist_ok=True)
        made = Path(tempfile.mkdtemp(prefix=STAGING, dir=near))
    except OSError as e:
        raise _unwritable(near, wanted, e) from e
    try:
        try:
            _convert(folder, made, dtype)
        except OSError as e:
            raise _unwritable(near, wanted, e) from e
        yield made
    finally:
        shutil.rmtree(made, ignore_errors=True)


def _convert(folder: Path, to: Path, dtype: torch.dtype) -> None:
    for file, tensors in entries(folder).items():
        with safe_open(file, framework="pt") as opened:
            made = {
                name: Pending(
                    dtype if _is_other(entry, dtype) else opened.get_tensor(name).dtype,
                    tuple(entry["shape"]),
                    partial(opened.get_tensor, name),
                )
                for name, entry in tensors.items()
            }
            words = {"format": "pt"}  # transformers asks for it
            save_file(made, to / file.name, words=words, on_progress=lambda _: None)
    for other in folder.glob("*.json"):
        (to / other.name).symlink_to(other.resolve())


def _is_other(entry: Mapping[str, Any], dtype: torch.dtype) -> bool:
    """Whether a tensor is a matrix of floats of another type."""
    return len(entry["shape"]) > 1 and _FLOATS.get(str(entry["dtype"]), dtype) != dtype


def _size(entry: Mapping[str, Any], dtype: torch.dtype) -> int:
    begin, end = entry["data_offsets"]
    count = math.prod(entry["shape"])
    return dtype.itemsize * count if _is_other(entry, dtype) else int(end) - int(begin)


def _unwritable(folder: Path, wanted: int, error: OSError) -> LocalError:
    how = "let this user write there" if error.errno in NOT_OURS else "free space there"
    return LocalError(
        f"the base model is not of the swarm's type, so it is converted whenever it is loaded, and "
        f"{size(wanted)} of it can't be written in {folder}: {error.strerror or error}",
        f"{how} (for `xpeer eval` and `generate`: or name another folder in TMPDIR); or save the "
        "base model in the swarm's model.base_dtype, and name that copy (--model at init, else "
        "data.base_model or --base-model)",
    )
