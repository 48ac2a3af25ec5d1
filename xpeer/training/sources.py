"""The text files of a shard as arrays, since there may be millions of them.

A list of paths takes a kilobyte a file; these take the bytes of the names, and some forty more, of
which most lie in files.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, overload

import numpy as np
import numpy.typing as npt

from xpeer.training.document import firsts
from xpeer.training.room import Array, Column, Room

Indices = npt.NDArray[np.int64]
Key = tuple[int, int]
"""Device and inode of a file."""

NAMED: Final = 1
LINK: Final = 2
INSIDE: Final = 4


@dataclass(frozen=True, slots=True)
class Source:
    """A file to read."""

    path: Path
    named: bool
    """Whether the operator named this very file, not a folder or a glob."""


class Names:
    """Paths of files, and what is known of each.

    Args:
        folders: in which they lie.
        folder: (n,) uint32: number of each file's folder.
        text: (b,) uint8: all names, one after the other.
        ends: (n + 1,) int64: where the text of each begins, and that of the last ends.
        bits: (n,) uint8.
    """

    def __init__(
        self, folders: Sequence[str], folder: Array, text: Array, ends: Array, bits: Array
    ) -> None:
        self._folders, self._folder = folders, folder
        self._text, self._ends, self._bits = text, ends, bits

    def path(self, number: int) -> str:
        """The path of a file."""
        name = self._text[self._ends[number] : self._ends[number + 1]].tobytes()
        folder = self._folders[self._folder[number]]
        text = name.decode("utf-8", "surrogateescape")
        return text if folder == "." else f"{folder.rstrip('/')}/{text}"

    def is_named(self, number: int) -> bool:
        """Whether the operator named this very file."""
        return bool(self._bits[number] & NAMED)

    def has(self, bit: int) -> Array:
        """Whether each has this bit, (n,) bool."""
        return np.asarray(self._bits & bit != 0)

    def of_each_folder(self, chosen: Indices) -> Indices:
        """Some of the chosen files: all links, and one other file of each folder."""
        folder = self._folder[chosen].astype(np.int64)
        linked = self.has(LINK)[chosen]
        folder[linked] = len(self._folders) + np.flatnonzero(linked)
        return chosen[np.unique(folder, return_index=True)[1]]


class Sources(Sequence[Source]):
    """Files to read, in their order.

    Args:
        names: of files.
        chosen: (n,) int64: which of them, and in which order.
    """

    def __init__(self, names: Names, chosen: Indices) -> None:
        self._names, self._chosen = names, chosen

    def __len__(self) -> int:
        """Return n."""
        return len(self._chosen)

    @overload
    def __getitem__(self, index: int) -> Source: ...
    @overload
    def __getitem__(self, index: slice) -> list[Source]: ...
    def __getitem__(self, index: int | slice) -> Source | list[Source]:
        """Make one, or some."""
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        number = int(self._chosen[index])
        return Source(Path(self._names.path(number)), self._names.is_named(number))

    def paths(self) -> Iterator[str]:
        """All paths, as text: making `Path` of it takes longer than to ask for the file's size."""
        for number in self._chosen:
            yield self._names.path(number)

    def of_each_folder(self) -> Iterator[Path]:
        """Paths of all files that are links, and of one other file of each folder."""
        for number in self._names.of_each_folder(self._chosen):
            yield Path(self._names.path(number))


class Reached:
    """Files that a search came upon, by device and inode; the same file maybe several times.

    Args:
        room: for what is noted of each.
    """

    def __init__(self, room: Room) -> None:
        self._room = room
        self._words: dict[str, int] = {}
        """Folders and reasons, numbered."""
        self._taken = _Taken(room)
        self._left, self._outside = _Others(room), _Others(room)

    def take(
        self, key: Key, folder: str, name: str, *, named: bool, link: bool, outside: str = ""
    ) -> None:
        """A file is to be read. Its last name counts if the operator named it, else its first.

        Args:
            key: of the file.
            folder: it lies in.
            name: it has there.
            named: whether the operator named this very file.
            link: whether it is one.
            outside: the folder out of which a link led to it; empty = none did.
        """
        if outside:
            self._outside.add(key, self._number(outside))
        bits = NAMED * named | LINK * link | INSIDE * (not outside)
        self._taken.add(key, self._number(folder), name, bits)

    def leave_out(self, key: Key, why: str) -> None:
        """A file is left out, unless it is taken by another name; its first reason counts."""
        self._left.add(key, self._number(why))

    def sources(self) -> Sources:
        """The files to read, each once, in the order in which they were come upon."""
        keys, names = self._taken.keys(), self._taken.names(list(self._words))
        chosen = firsts(keys)
        if len(chosen) < len(keys):
            _rename(keys, chosen, names.has(NAMED))
        return Sources(names, self._room.filled(chosen))

    def left_out(self) -> Counter[str]:
        """Number of files that are left out, by reason."""
        return self._counted(self._taken.keys(), self._left)

    def outside(self) -> Counter[str]:
        """Number of files that are only reached through links out of a folder, by that folder."""
        return self._counted(self._taken.keys(INSIDE), self._outside)

    def _number(self, word: str) -> int:
        return self._words.setdefault(word, len(self._words))

    def _counted(self, known: Array, others: _Others) -> Counter[str]:
        """Count others by word, each once, at its first, without those that are known."""
        if not len(others.word):
            return Counter()
        once = firsts(np.concatenate([known, _pairs(others.key)]))
        word = others.word.values()[once[once >= len(known)] - len(known)]
        words, counts = list(self._words), np.bincount(word).tolist()
        return Counter({words[n]: count for n, count in enumerate(counts) if count})


class _Taken:
    """Files to read, with all of their names."""

    def __init__(self, room: Room) -> None:
        self._key, self._folder = room.column(np.uint64), room.column(np.uint32)
        self._text, self._ends, self._bits = (
            room.column(kind) for kind in (np.uint8, np.int64, np.uint8)
        )
        self._ends.append(0)

    def add(self, key: Key, folder: int, name: str, bits: int) -> None:
        self._key.extend(key)
        self._folder.append(folder)
        self._text.add(name.encode("utf-8", "surrogateescape"))
        self._ends.append(len(self._text))
        self._bits.append(bits)

    def keys(self, bit: int = 0) -> Array:
        """(n, 2) uint64; only of those that have this bit, if one is given."""
        keys = _pairs(self._key)
        return keys[self._bits.values() & bit != 0] if bit else keys

    def names(self, folders: Sequence[str]) -> Names:
        columns = self._folder, self._text, self._ends, self._bits
        return Names(folders, *(column.values() for column in columns))


class _Others:
    """Files of which a word is noted."""

    def __init__(self, room: Room) -> None:
        self.key, self.word = room.column(np.uint64), room.column(np.int64)

    def add(self, key: Key, word: int) -> None:
        self.key.extend(key)
        self.word.append(word)


def _rename(keys: Array, chosen: Indices, named: Array) -> None:
    """Of files that were come upon several times, have the last name that is the operator's."""
    numbers = np.flatnonzero(named)
    _, number = np.unique(keys, axis=0, return_inverse=True)
    number = number.reshape(-1)
    last = np.full(int(number.max()) + 1, -1, np.int64)
    np.maximum.at(last, number[numbers], numbers)
    better = last[number[chosen]]
    chosen[better >= 0] = better[better >= 0]


def _pairs(numbers: Column) -> Array:
    return numbers.values().reshape(-1, 2)
