"""One text, named by its content. Knows nothing of files, since dividing a corpus needs none."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final, overload

import numpy as np
import numpy.typing as npt

from xpeer.identity import blake2b

_BLOCK: Final = 1 << 16


@dataclass(frozen=True, slots=True)
class Document:
    """One text. Records are never cut across two."""

    id: str
    """BLAKE2b-128 of the text, hex; for a piece, of its document's id and the piece's number."""
    text: str
    source: str
    """The file it came from."""
    begins: bool = True
    """False for a piece that does not begin its document."""
    ends: bool = True
    """False for a piece that does not end its document."""
    whole: str = ""
    """For a piece, the id of the document that it was cut from; empty = it is a whole document."""

    def __repr__(self) -> str:
        """Describe the document without its text."""
        return f"Document({self.id}, {len(self.text)} characters, {self.source!r})"


def document_of(text: str, source: str) -> Document:
    """Name a text by its content."""
    return Document(blake2b(text.encode(), size=16).hex(), text, source)


def digest_of_names(ids: npt.NDArray[Any]) -> str:
    """BLAKE2b-256 (hex) of the ids of a corpus's documents; files and order do not matter.

    Args:
        ids: (n, 2) big-endian uint64.
    """
    digest = hashlib.blake2b(digest_size=32)

    def add(part: bytes) -> None:
        digest.update(len(part).to_bytes(8, "little") + part)  # as `identity.blake2b` does

    add(b"corpus")
    order = np.lexsort((ids[:, 1], ids[:, 0]))
    for at in range(0, len(ids), _BLOCK):
        for name in in_hex(ids[order[at : at + _BLOCK]]):
            add(name.encode())
    return digest.hexdigest()


def in_hex(ids: npt.NDArray[Any]) -> list[str]:
    """Write ids, (n, 2) big-endian uint64, in hex."""
    text = np.ascontiguousarray(ids, ">u8").tobytes().hex()
    return [text[at : at + 32] for at in range(0, len(text), 32)]


class HexIds(Sequence[str]):
    """Ids in hex, written when they are asked for: as strings, millions would take gigabytes.

    Args:
        ids: (n, 2) big-endian uint64.
    """

    def __init__(self, ids: npt.NDArray[Any]) -> None:
        self._ids = ids

    def __len__(self) -> int:
        """Return n."""
        return len(self._ids)

    def __eq__(self, other: object) -> bool:
        """Compare with other ids."""
        if not isinstance(other, HexIds):
            return NotImplemented
        return np.array_equal(self._ids, other._ids)

    def distinct(self) -> int:
        """Return the number of different ones."""
        return len(firsts(self._ids))

    __hash__ = None  # type: ignore[assignment]

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        """Write one, or some."""
        if isinstance(index, slice):
            return in_hex(self._ids[index])
        return in_hex(self._ids[index : index + 1 or None])[0]

    def __iter__(self) -> Iterator[str]:
        """Write all, some at a time."""
        for at in range(0, len(self), _BLOCK):
            yield from self[at : at + _BLOCK]


def firsts(ids: npt.NDArray[Any]) -> npt.NDArray[np.int64]:
    """Indices of the ids, (n, 2) uint64, that did not come before, ascending."""
    ordered = ids[:, 0].astype(np.uint64)
    ordered.sort()
    # few ids share their first half, unless they are equal
    shared = np.unique(ordered[1:][ordered[1:] == ordered[:-1]])
    del ordered
    repeated = np.zeros(len(ids), bool)
    unsure = np.flatnonzero(_among(ids[:, 0], shared))
    if len(unsure):
        some = ids[unsure].astype(np.uint64)
        # equal ids lie side by side, the first one first: lexsort is stable
        order = np.lexsort((some[:, 1], some[:, 0]))
        equal = (some[order[1:]] == some[order[:-1]]).all(1)
        repeated[unsure[order[1:][equal]]] = True
    return np.flatnonzero(~repeated).astype(np.int64)


def among(ids: npt.NDArray[Any], some: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
    """Whether each id, (n, 2) uint64, is one of some, (k, 2) uint64; (n,) bool."""
    found = _among(ids[:, 0], np.unique(some[:, 0].astype(np.uint64)))
    alike = np.flatnonzero(found)
    both = np.concatenate([some, ids[alike]]).astype(np.uint64)
    _, number = np.unique(both, axis=0, return_inverse=True)
    number = number.reshape(-1)
    found[alike] = np.isin(number[len(some) :], number[: len(some)])
    return found


def _among(values: npt.NDArray[Any], some: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
    """Whether each value is one of some, which ascend. Few at a time: there may be millions."""
    found = np.zeros(len(values), bool)
    for at in range(0, len(values) if len(some) else 0, _BLOCK):
        block = values[at : at + _BLOCK].astype(some.dtype)
        place = np.minimum(np.searchsorted(some, block), len(some) - 1)
        found[at : at + _BLOCK] = some[place] == block
    return found
