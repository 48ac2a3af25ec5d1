"""Records of a shard, cut out of the mapped tokens when they are asked for."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

import numpy as np
import torch

from xpeer.errors import ShardError
from xpeer.training.piece_table import Array, PieceTable
from xpeer.training.records import FILL, MIN_TOKENS
from xpeer.training.token_file import READ

_BLOCK: Final = 1024
"""Records that are looked at together."""
_PIECES: Final = 1 << 16


class MappedRecords:
    """The records of some pieces, as `records.cut` makes them. Indexed like a tensor.

    Args:
        table: the pieces.
        sequence_tokens: T.
        examples: whether each piece is an example, which makes one record, cut off at T tokens. A
            token that is read and not predicted is -2 - id; `losses.inputs_of` understands it.

    Attributes:
        shape: (number of records, T).
    """

    def __init__(self, table: PieceTable, sequence_tokens: int, *, examples: bool = False) -> None:
        room, n = table.room, len(table)
        self._table = table
        self._examples = examples
        self._counts, self._ends = room.empty(n, np.int64), room.empty(n, np.int64)
        for block in _blocks(n):
            size, tail = np.divmod(table.tokens[block], sequence_tokens)
            counts = size + (tail >= MIN_TOKENS)
            self._counts[block] = np.minimum(counts, 1) if examples else counts
        np.cumsum(self._counts, out=self._ends)  # of each piece's records
        self._first, self._passages = (
            room.empty(len(sizes) + 1, np.int64) for sizes in (table.tokens, table.size)
        )
        for begins, sizes in ((self._first, table.tokens), (self._passages, table.size)):
            begins[0] = 0
            np.cumsum(sizes, out=begins[1:])
        self.shape = torch.Size((int(self._ends[-1]) if len(self._ends) else 0, sequence_tokens))

    def __len__(self) -> int:
        """Return the number of records."""
        return self.shape[0]

    def __getitem__(self, index: torch.Tensor | slice) -> torch.Tensor:
        """Return some records, (k, T) int64, CPU; `FILL` where there is no token."""
        if isinstance(index, slice):
            chosen = np.arange(*index.indices(len(self)), dtype=np.int64)
        else:
            chosen = index.cpu().numpy().astype(np.int64, copy=False)
            if chosen.ndim != 1 or (len(chosen) and not self._holds(chosen)):
                raise IndexError(f"records {tuple(chosen.shape)} of {len(self)}")
        return self._cut(chosen)

    def owners(self) -> torch.Tensor:
        """Return the number of each record's piece, (records,) int64, ascending."""
        owners = self._table.room.empty(len(self), np.int64)
        for block in _blocks(len(self._table)):
            made = np.repeat(np.arange(block.start, block.stop), self._counts[block])
            end = int(self._ends[block.stop - 1])
            owners[end - len(made) : end] = made
        return torch.from_numpy(owners)

    def num_tokens(self) -> int:
        """Return the number of tokens in all records, without filling."""
        total = 0
        for block in _blocks(len(self._table)):
            tokens, counts = self._table.tokens[block], self._counts[block]
            # a piece's last record may be short, and what is too short makes none
            total += int(np.minimum(tokens, counts * self.shape[1]).sum())
        return total

    def cut_examples(self) -> tuple[int, int]:
        """Count examples that are cut off; and those of them that are so before their answer."""
        if not self._examples:
            return 0, 0
        answered = (self._counts > 0) & (self._table.flags & READ == 0)
        cut = np.flatnonzero((self._table.tokens > self.shape[1]) & answered)
        unanswered = 0
        for at in range(0, len(cut), _BLOCK):
            # every piece that makes one has one record
            records = self._cut(self._ends[cut[at : at + _BLOCK]] - 1)
            unanswered += int((records < 0).all(1).sum())
        return len(cut), unanswered

    def unpredicted(self) -> int:
        """Count examples of which nothing would be predicted however long a record is."""
        return int((self._table.flags[self._counts > 0] & READ != 0).sum())

    def too_short(self) -> int:
        """Count pieces that make no record."""
        return int((self._counts == 0).sum())

    def require_some(self) -> None:
        """Refuse a shard without a record.

        Raises:
            ShardError: there is none.
        """
        if not len(self):
            raise ShardError(
                f"no text: none of {len(self._table)} documents has {MIN_TOKENS} tokens",
                "name files that hold more text",
            )

    def _holds(self, chosen: Array) -> bool:
        return bool(chosen.min() >= 0 and chosen.max() < len(self))

    def _cut(self, chosen: Array) -> torch.Tensor:
        length = self.shape[1]
        out = np.full((len(chosen), length), FILL, np.int64)
        piece = np.searchsorted(self._ends, chosen, "right")
        within = chosen - (self._ends - self._counts)[piece]
        begins = self._first[piece] + within * length
        sizes = np.minimum(self._first[piece + 1] - begins, length)
        passage = np.searchsorted(self._passages, begins, "right") - 1
        ranges = zip(begins.tolist(), sizes.tolist(), passage.tolist(), strict=True)
        for row, (begin, size, number) in enumerate(ranges):
            self._copy(out[row, :size], begin, number)
            if self._examples:
                ids, read = out[row, :size] >> 1, out[row, :size] & 1
                out[row, :size] = np.where(read, -2 - ids, ids)
        return torch.from_numpy(out)

    def _copy(self, out: Array, begin: int, passage: int) -> None:
        """Copy the tokens from the place `begin` of all passages in a row."""
        table: Any = self._table
        done = 0
        while done < len(out):
            offset = begin + done - int(self._passages[passage])
            count = min(len(out) - done, int(table.size[passage]) - offset)
            place = int(table.begin[passage]) + offset
            out[done : done + count] = table.files[table.file[passage]][place : place + count]
            done, passage = done + count, passage + 1


def _blocks(n: int) -> Iterator[slice]:
    """Go through n pieces, few at a time: there may be millions."""
    for begin in range(0, n, _PIECES):
        yield slice(begin, min(begin + _PIECES, n))
