"""The pieces of a shard as arrays, since there may be millions of them.

A piece is a whole document, unless the corpus is shared and the document is long. The order of a
table is the order of reading. Holds no text: tokens stay in the mapped files of the cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from xpeer.identity import blake2b
from xpeer.training.document import HexIds, firsts, in_hex
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
    source: Array  # (n,) int64: number of the text file
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
        passages, begins = chosen, np.arange(len(chosen) + 1, dtype=np.int64)
        if len(self.size) != len(self):  # some pieces have several passages
            counts = np.diff(self.passages)[chosen]
            passages = expanded(self.passages[:-1][chosen], counts)
            begins[1:] = np.cumsum(counts)
        return PieceTable(
            id=taken(self.id, chosen),
            whole=taken(self.whole, chosen),
            tokens=taken(self.tokens, chosen),
            characters=taken(self.characters, chosen),
            uniform=taken(self.uniform, chosen),
            flags=taken(self.flags, chosen),
            source=taken(self.source, chosen),
            passages=self.room.filled(begins),
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
    begins = np.flatnonzero(table.flags & BEGINS)
    if len(begins) == len(table):
        return firsts(table.whole)
    number = np.cumsum(table.flags & BEGINS != 0) - 1  # of the document of each piece
    first = np.zeros(len(begins), bool)
    first[firsts(table.whole[begins])] = True
    return np.flatnonzero(first[number]).astype(np.int64)


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
        table: the pieces.
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
    begins = np.flatnonzero(table.flags & BEGINS)
    documents = np.cumsum(table.flags & BEGINS != 0) - 1  # of each piece
    keys = table.whole[begins].astype(np.uint64)
    uniform = table.uniform[begins]
    known, stays = (
        np.zeros(len(keys), bool) if ids is None else _among(keys, ids) for ids in (before, trained)
    )
    group, kept = documents, known
    if by == "file":
        _, first, group = np.unique(table.source, return_index=True, return_inverse=True)
        first = documents[first]
        kept, stays = known[first], stays[first]
        if by_content:
            keys, uniform = _by_content(table, begins, group, len(first))
        else:
            keys, uniform = keys[first], uniform[first]
    held_out = (uniform < share) & ~stays | kept
    order = np.lexsort((keys[:, 1], keys[:, 0], uniform))
    free = order[~kept[order]]
    if len(order) < 2:
        held_out = kept
    elif not held_out.any() and not known.any():
        held_out[order[0]] = True
    elif held_out.all() and len(free):
        held_out[free[-1]] = False
    chosen = held_out[group] | known[documents]
    return np.flatnonzero(~chosen).astype(np.int64), np.flatnonzero(chosen).astype(np.int64)


def _among(keys: Array, some: Array) -> Array:
    """Whether each id, (n, 2) uint64, is one of some, (k, 2) uint64; (n,) bool."""
    both = np.concatenate([some, keys])
    order = np.lexsort((both[:, 1], both[:, 0]))
    differs = np.ones(len(order), np.int64)
    differs[1:] = (both[order[1:]] != both[order[:-1]]).any(1)
    number = np.empty(len(order), np.int64)
    number[order] = np.cumsum(differs)
    return np.isin(number[len(some) :], number[: len(some)])


def _by_content(table: PieceTable, begins: Indices, group: Array, n: int) -> tuple[Array, Array]:
    """Keys and numbers in (0, 1) of n files that follow from all of their documents."""
    inside: list[list[bytes]] = [[] for _ in range(n)]
    for number, document in zip(group[begins].tolist(), in_hex(table.whole[begins]), strict=True):
        inside[number].append(document.encode())
    digests = [blake2b(*documents, size=16) for documents in inside]
    keys = np.frombuffer(b"".join(digests), ">u8").reshape(-1, 2).astype(np.uint64)
    return keys, np.array([uniform_of(digest.hex()) for digest in digests])
