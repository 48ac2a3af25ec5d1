"""The pieces of a shard as arrays, since there may be millions of them.

A piece is a whole document, unless the corpus is shared and the document is long. The order of a
table is the order of reading. Holds no text: tokens stay in the mapped files of the cache.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from xpeer.identity import blake2b
from xpeer.training.document import HexIds, among, firsts, in_hex
from xpeer.training.records import uniform_of
from xpeer.training.room import Room
from xpeer.training.token_file import BEGINS

Array = npt.NDArray[Any]
Indices = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class PieceTable:
    """n pieces, made of m >= n passages: stretches of tokens in files."""

    id: Array  # (n, 2) big-endian uint64
    whole: Array  # (n, 2) big-endian uint64: id of the whole document
    tokens: Array  # (n,) int64
    characters: Array  # (n,) int64
    uniform: Array  # (n,) float64
    flags: Array  # (n,) uint8
    source: Array  # (n,) int64: number of the text file, ascending as they are read
    passages: Array  # (n + 1,) int64: where the passages of each piece begin
    file: Array  # (m,) int32: number of a passage's file of tokens
    begin: Array  # (m,) int64: where its tokens begin in there
    size: Array  # (m,) int64: number of its tokens
    files: Sequence[Array]
    """Tokens of each file, (tokens,) uint16 or uint32, mapped."""
    room: Room
    """For the arrays of tables that are made of this one."""

    def __len__(self) -> int:
        """Return n."""
        return len(self.tokens)

    def select(self, chosen: Indices) -> PieceTable:
        """Return the chosen pieces, (k,) int64, in that order."""
        taken = self.room.taken
        passages, begins = chosen, self.room.filled(np.arange(len(chosen) + 1), np.int64)
        if len(self.size) != len(self):  # some pieces have several passages
            counts = np.diff(self.passages)[chosen]
            passages = expanded(self.passages[:-1][chosen], counts)
            np.cumsum(counts, out=begins[1:])
        return PieceTable(
            id=taken(self.id, chosen),
            whole=taken(self.whole, chosen),
            tokens=taken(self.tokens, chosen),
            characters=taken(self.characters, chosen),
            uniform=taken(self.uniform, chosen),
            flags=taken(self.flags, chosen),
            source=taken(self.source, chosen),
            passages=begins,
            file=taken(self.file, passages),
            begin=taken(self.begin, passages),
            size=taken(self.size, passages),
            files=self.files,
            room=self.room,
        )

    def wholes(self) -> HexIds:
        """Ids of the documents, a piece each, in hex."""
        return HexIds(self.whole)


def expanded(begins: Array, counts: Array) -> Indices:
    """Return begin, begin + 1, ... for each range, (sum of counts,) int64."""
    before = np.cumsum(counts) - counts
    whole = np.repeat(np.asarray(begins, np.int64) - before, counts)
    whole += np.arange(len(whole), dtype=np.int64)
    return whole


def first_of_each(table: PieceTable) -> Indices:
    """Indices of the pieces of every document that did not come before, ascending."""
    documents = _Documents(table)
    first = np.zeros(len(documents.whole), bool)
    first[firsts(documents.whole)] = True
    return np.flatnonzero(documents.of_each(first)).astype(np.int64)


class _Documents:
    """The documents of a table.

    Attributes:
        whole: (d, 2) big-endian uint64: their ids.
        uniform: (d,) float64.
        source: (d,) int64.
    """

    def __init__(self, table: PieceTable) -> None:
        begins = table.flags & BEGINS != 0
        self.whole, self.uniform, self.source = table.whole, table.uniform, table.source
        self._number: Array | None = None
        if not begins.all():
            first, taken = np.flatnonzero(begins), table.room.taken
            self.whole, self.uniform = taken(table.whole, first), taken(table.uniform, first)
            self.source = taken(table.source, first)
            self._number = table.room.empty(len(table), np.int64)
            np.cumsum(begins, out=self._number)
            self._number -= 1

    def of_each(self, values: Array) -> Array:
        """From a value of each document, (d,), to one of each piece, (n,)."""
        return values if self._number is None else values[self._number]


def split_pieces(
    table: PieceTable,
    share: float,
    by: Literal["document", "file"],
    before: Array | None = None,
    trained: Array | None = None,
    *,
    by_content: bool = True,
) -> tuple[Indices, Indices]:
    """Hold out whole documents, or all documents of whole files.

    A document is held out if its number (`records.uniform_of`) is below the share. A file has the
    number of its first document, so that more rows do not change it. If there is nothing below the
    share, what has the smallest number is held out, unless it is all there is.

    Args:
        table: the pieces, file by file.
        share: of the documents or files to hold out.
        by: what is held out as a whole.
        before: ids of documents, (k, 2) uint64, that are held out in any case, and the files with
            them that begin with one.
        trained: ids of documents, (k, 2) uint64, that begin files that are not to be held out, but
            for what `before` says.
        by_content: whether the number of a file follows from all of its documents, as in a corpus
            that is shared, and in earlier versions.

    Returns:
        Indices for training and for validation, ascending.
    """
    documents = _Documents(table)
    keys, uniform = documents.whole, documents.uniform
    known, stays = (
        np.zeros(len(keys), bool) if ids is None else among(keys, ids) for ids in (before, trained)
    )
    kept, group = known, None
    if by == "file":
        begins = np.ones(len(keys), bool)
        begins[1:] = documents.source[1:] != documents.source[:-1]
        first, group = np.flatnonzero(begins), np.cumsum(begins) - 1
        kept, stays = known[first], stays[first]
        if by_content:
            keys, uniform = _by_content(keys, group, len(first))
        else:
            keys, uniform = keys[first], uniform[first]
    held_out = (uniform < share) & ~stays | kept
    if len(held_out) < 2:
        held_out = kept
    elif not held_out.any() and not known.any():
        held_out[_least(uniform, keys, np.arange(len(keys)))] = True
    elif held_out.all() and not kept.all():
        held_out[_least(-uniform, ~keys, np.flatnonzero(~kept))] = False
    chosen = documents.of_each((held_out if group is None else held_out[group]) | known)
    filled = table.room.filled
    return filled(np.flatnonzero(~chosen), np.int64), filled(np.flatnonzero(chosen), np.int64)


def _least(uniform: Array, keys: Array, among: Indices) -> int:
    """Which of these has the smallest number; if several have, the smallest key."""
    least = among[uniform[among] == uniform[among].min()]
    return int(least[np.lexsort((keys[least, 1], keys[least, 0]))[0]])


def _by_content(ids: Array, group: Array, n: int) -> tuple[Array, Array]:
    """Keys and numbers in (0, 1) of n files that follow from all of their documents."""
    ends = np.searchsorted(group, np.arange(n), "right").tolist()
    digests = [
        blake2b(*(name.encode() for name in in_hex(ids[begin:end])), size=16)
        for begin, end in itertools.pairwise([0, *ends])
    ]
    keys = np.frombuffer(b"".join(digests), ">u8").reshape(-1, 2).astype(np.uint64)
    return keys, np.array([uniform_of(digest.hex()) for digest in digests])
