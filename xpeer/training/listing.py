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
        continues = passages["flags"] & CONTINUES != 0
        count = len(rows) - int(np.count_nonzero(continues))
        starts = room.empty(count + 1, np.int64)
        starts[:-1], starts[-1] = np.flatnonzero(~continues), len(rows)
        ids, wholes = (room.empty((count, 2), PASSAGE[name].base) for name in ("id", "whole"))
        uniform, flags = room.empty(count, np.float64), room.empty(count, np.uint8)
        tokens, characters = (room.empty(count, np.int64) for _ in range(2))
        for low in range(0, count, _BLOCK):
            block, begins = slice(low, low + _BLOCK), starts[low : low + _BLOCK + 1]
            heads = passages[begins[: len(uniform[block])]]
            ids[block], wholes[block] = heads["id"], heads["whole"]
            uniform[block], flags[block] = heads["uniform"], heads["flags"]
            inside = passages[begins[0] : begins[-1]]
            firsts = begins[: len(heads)] - begins[0]
            tokens[block] = np.add.reduceat(inside["tokens"], firsts)
            characters[block] = np.add.reduceat(inside["characters"], firsts)
        size = room.filled(passages["tokens"], np.int64)
        return PieceTable(
            id=ids,
            whole=wholes,
            tokens=tokens,
            characters=characters,
            uniform=uniform,
            flags=flags,
            source=room.taken(source, starts[:-1]),
            passages=starts,
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
