"""The table of a shard's pieces, made of the tables of the files that hold their tokens.

Block by block, so that it takes little memory beside the table itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np

from xpeer.training.piece_table import PieceTable
from xpeer.training.room import Array, Room
from xpeer.training.token_file import CONTINUES, PASSAGE, TokenFile

_BLOCK: Final = 1 << 16
"""Rows at once."""


class Listing:
    """Lists the pieces of files.

    Args:
        files: of tokens.
        room: for the table.
    """

    def __init__(self, files: Sequence[TokenFile], room: Room) -> None:
        self._files = files
        self._room = room
        self._ends = np.cumsum([len(file.passages) for file in files], dtype=np.int64)
        self._offsets = [self._offsets_of(file) for file in files]

    def table(self, rows: Array, source: Array) -> PieceTable:
        """List some passages of the files as pieces.

        Args:
            rows: (m,) int64: numbers of the passages, counted through all files, in their order.
            source: (m,) int64: number of the text file of each.
        """
        room = self._room
        passages = room.empty(len(rows), PASSAGE)
        file, begin = room.empty(len(rows), np.int32), room.empty(len(rows), np.int64)
        for low in range(0, len(rows), _BLOCK):
            block = slice(low, low + _BLOCK)
            self._fill(rows[block], passages[block], file[block], begin[block])
        starts = np.flatnonzero(passages["flags"] & CONTINUES == 0)
        ids, wholes = (room.empty((len(starts), 2), PASSAGE[name].base) for name in ("id", "whole"))
        uniform, flags = room.empty(len(starts), np.float64), room.empty(len(starts), np.uint8)
        for low in range(0, len(starts), _BLOCK):
            block = slice(low, low + _BLOCK)
            heads = passages[starts[block]]
            ids[block], wholes[block] = heads["id"], heads["whole"]
            uniform[block], flags[block] = heads["uniform"], heads["flags"]
        size = room.filled(passages["tokens"], np.int64)
        return PieceTable(
            id=ids,
            whole=wholes,
            tokens=room.filled(_sums(size, starts)),
            characters=room.filled(_sums(passages["characters"], starts), np.int64),
            uniform=uniform,
            flags=flags,
            source=room.taken(source, starts),
            passages=room.filled(np.append(starts, len(rows)), np.int64),
            file=file,
            begin=begin,
            size=size,
            files=[file.tokens for file in self._files],
            room=room,
        )

    def _fill(self, rows: Array, passages: Array, file: Array, begin: Array) -> None:
        """Look up a block of passages: themselves, their files, and where their tokens begin."""
        file[:] = np.searchsorted(self._ends, rows, "right")
        for number in np.unique(file).tolist():
            here = np.flatnonzero(file == number)
            inside = rows[here] - (self._ends[number] - len(self._files[number].passages))
            passages[here] = self._files[number].passages[inside]
            begin[here] = self._offsets[number][inside]

    def _offsets_of(self, file: TokenFile) -> Array:
        """Where the tokens of each passage begin in its file, (passages,) int64."""
        counts = file.passages["tokens"].astype(np.int64)
        return self._room.filled(np.cumsum(counts) - counts)


def _sums(values: Array, starts: Array) -> Array:
    return np.add.reduceat(values, starts) if len(starts) else np.empty(0, np.int64)
