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
from xpeer.training.document import firsts, in_hex
from xpeer.training.records import uniform_of
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

    def __len__(self) -> int:
        """Return n."""
        return len(self.tokens)

    def select(self, chosen: Indices) -> PieceTable:
        """Return the chosen pieces, (k,) int64, in that order."""
        counts = np.diff(self.passages)[chosen]
        passages = expanded(self.passages[:-1][chosen], counts)
        return PieceTable(
            id=self.id[chosen],
            whole=self.whole[chosen],
            tokens=self.tokens[chosen],
            characters=self.characters[chosen],
            uniform=self.uniform[chosen],
            flags=self.flags[chosen],
            source=self.source[chosen],
            passages=np.append(0, np.cumsum(counts)).astype(np.int64),
            file=self.file[passages],
            begin=self.begin[passages],
            size=self.size[passages],
            files=self.files,
        )

    def wholes(self) -> list[str]:
        """Ids of the documents, a piece each, in hex."""
        return in_hex(self.whole)


def expanded(begins: Array, counts: Array) -> Indices:
    """Return begin, begin + 1, ... for each range, (sum of counts,) int64."""
    before = np.cumsum(counts) - counts
    whole = np.repeat(np.asarray(begins, np.int64) - before, counts)
    return whole + np.arange(len(whole), dtype=np.int64)


def first_of_each(table: PieceTable) -> Indices:
    """Indices of the pieces of every document that did not come before, ascending."""
    number = np.cumsum(table.flags & BEGINS != 0) - 1  # of the document of each piece
    begins = np.flatnonzero(table.flags & BEGINS)
    first = np.zeros(len(begins), bool)
    first[firsts(table.whole[begins].astype(np.uint64))] = True
    return np.flatnonzero(first[number]).astype(np.int64)


def split_pieces(
    table: PieceTable, share: float, by: Literal["document", "file"]
) -> tuple[Indices, Indices]:
    """Do as `records.split` with a table: indices for training and for validation, ascending."""
    begins = np.flatnonzero(table.flags & BEGINS)
    if by == "document":
        keys = table.whole[begins].astype(np.uint64)
        uniform = table.uniform[begins]
        group = np.cumsum(table.flags & BEGINS != 0) - 1
    else:
        keys, uniform, group = _by_file(table, begins)
    held_out = uniform < share
    if len(uniform) >= 2:
        order = np.lexsort((keys[:, 1], keys[:, 0], uniform))
        if not held_out.any():
            held_out[order[0]] = True
        elif held_out.all():
            held_out[order[-1]] = False
    else:
        held_out[:] = False
    chosen = held_out[group] if len(group) else np.zeros(0, bool)
    return np.flatnonzero(~chosen).astype(np.int64), np.flatnonzero(chosen).astype(np.int64)


def _by_file(table: PieceTable, begins: Indices) -> tuple[Array, Array, Array]:
    """Keys, numbers in (0, 1) and, for each piece, the index of its file among them."""
    numbers, group = np.unique(table.source, return_inverse=True)
    inside: list[list[bytes]] = [[] for _ in numbers]
    for number, document in zip(group[begins].tolist(), in_hex(table.whole[begins]), strict=True):
        inside[number].append(document.encode())
    digests = [blake2b(*documents, size=16) for documents in inside]
    keys = np.frombuffer(b"".join(digests), ">u8").reshape(-1, 2).astype(np.uint64)
    return keys, np.array([uniform_of(digest.hex()) for digest in digests]), group
