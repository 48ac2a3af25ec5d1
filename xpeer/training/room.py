"""Room for arrays with a row for each document: mapped files, which take no memory for good.

A shard may have many millions of documents. The kernel writes the pages of such a file to the disk
when others need the memory.
"""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
_SMALL: Final = 1 << 20
"""Bytes of an array that stays in memory."""


class Room:
    """Makes arrays in files without a name, which are gone with the last array.

    Args:
        folder: for the files, on a disk. None = all arrays are in memory.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = folder

    def empty(self, shape: int | tuple[int, ...], dtype: npt.DTypeLike) -> Array:
        """Make an array to be filled; in memory if it is small, or if the disk has no room."""
        kind = np.dtype(dtype)
        rows = (shape,) if isinstance(shape, int) else shape
        num_bytes = math.prod(rows) * kind.itemsize
        if self._folder is None or num_bytes < _SMALL:
            return np.empty(rows, kind)
        try:
            with tempfile.TemporaryFile(dir=self._folder) as file:
                # pages without a place on a full disk would end the process when they are written
                os.posix_fallocate(file.fileno(), 0, num_bytes)
                return np.asarray(np.memmap(file, kind, "r+", shape=rows))
        except OSError:
            return np.empty(rows, kind)

    def taken(self, rows: Array, chosen: Array) -> Array:
        """Copy the chosen rows, (k,) int64, none negative."""
        out = self.empty((len(chosen), *rows.shape[1:]), rows.dtype)
        if len(chosen):
            np.take(rows, chosen, axis=0, out=out, mode="clip")  # "raise" would make a copy more
        return out

    def filled(self, values: Array, dtype: npt.DTypeLike | None = None) -> Array:
        """Copy values."""
        out = self.empty(values.shape, dtype or values.dtype)
        out[...] = values
        return out

    def joined(self, parts: Sequence[Array], dtype: npt.DTypeLike) -> Array:
        """Copy arrays, (n,) each, one after the other."""
        out, at = self.empty(sum(map(len, parts)), dtype), 0
        for part in parts:
            out[at : at + len(part)] = part
            at += len(part)
        return out
