"""Room for arrays with a row for each file or document: mapped files, which keep no memory.

A shard may have many millions of them. The kernel writes the pages of such a file to the disk when
others need the memory.
"""

from __future__ import annotations

import array
import logging
import math
import os
import tempfile
import weakref
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import IO, Any, Final

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
_SMALL: Final = 1 << 20
"""Bytes of an array that stays in memory."""
_WAITING: Final = 1 << 18
"""Bytes of a column that are written at once."""

logger = logging.getLogger("xpeer.shard")


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
        except OSError as e:
            self._full(e)
            return np.empty(rows, kind)

    def column(self, dtype: npt.DTypeLike) -> Column:
        """Make a column, to which values can be added."""
        return Column(np.dtype(dtype), self._folder, self._full)

    def _full(self, error: OSError) -> None:
        logger.warning(
            "lists of files and documents are kept in memory, since %s has no room for them: %s",
            self._folder,
            error.strerror or error,
        )

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


IN_MEMORY: Final = Room()


class Column:
    """Values that are added one after the other, in a file if there are many.

    Args:
        dtype: of the values.
        folder: for the file; None = it stays in memory.
        full: called if the file can't be written. All values are in memory then.
    """

    def __init__(
        self, dtype: np.dtype[Any], folder: Path | None, full: Callable[[OSError], None]
    ) -> None:
        self._dtype, self._folder, self._full = dtype, folder, full
        self._waiting = array.array("B" if dtype.itemsize == 1 else dtype.char)
        self._file: IO[bytes] | None = None
        self._written = 0

    def __len__(self) -> int:
        """Return the number of values."""
        return self._written + len(self._waiting)

    def append(self, value: int) -> None:
        """Add a value."""
        self._waiting.append(value)
        self._write_many()

    def extend(self, values: Iterable[int]) -> None:
        """Add some values."""
        self._waiting.extend(values)
        self._write_many()

    def add(self, values: Array | bytes) -> None:
        """Add values of the column's type."""
        self._waiting.frombytes(values if isinstance(values, bytes) else values.tobytes())
        self._write_many()

    def values(self) -> Array:
        """Return all values, (n,), and none that is added later."""
        if self._file is None:
            return np.array(self._waiting, self._dtype)
        self._write()
        return self.values() if self._waiting else self._mapped(self._file)

    def _write_many(self) -> None:
        if len(self._waiting) * self._dtype.itemsize >= _WAITING:
            self._write()

    def _write(self) -> None:
        if self._folder is None or not self._waiting:
            return
        try:
            if self._file is None:
                self._file = tempfile.TemporaryFile(buffering=0, dir=self._folder)  # noqa: SIM115
                weakref.finalize(self, self._file.close)
            left = memoryview(self._waiting.tobytes())
            while left:
                left = left[self._file.write(left) or 0 :]
        except OSError as e:
            self._stay_in_memory(e)
            return
        self._written += len(self._waiting)
        del self._waiting[:]

    def _stay_in_memory(self, error: OSError) -> None:
        if self._file is not None:
            before = array.array(self._waiting.typecode)
            before.frombytes(self._mapped(self._file).tobytes())
            self._waiting = before + self._waiting
            self._file.close()
        self._folder, self._file, self._written = None, None, 0
        self._full(error)

    def _mapped(self, file: IO[bytes]) -> Array:
        if not self._written:
            return np.empty(0, self._dtype)
        return np.asarray(np.memmap(file, self._dtype, "r", shape=self._written))
