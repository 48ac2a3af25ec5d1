"""The text files of a shard as arrays, since there may be millions of them.

A list of paths takes a kilobyte a file; these take the bytes of the names, and some forty more.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, overload

import numpy as np
import numpy.typing as npt

from xpeer.training.document import firsts

Array = npt.NDArray[Any]
Indices = npt.NDArray[np.int64]
Key = tuple[int, int]
"""Device and inode of a file."""

_NAMED: Final = 1
_LINK: Final = 2


@dataclass(frozen=True, slots=True)
class Source:
    """A file to read."""

    path: Path
    named: bool
    """Whether the operator named this very file, not a folder or a glob."""


class Names:
    """Paths of files, and whether each was named and is a link."""

    def __init__(self) -> None:
        self._folders: list[str] = []
        self._numbers: dict[str, int] = {}
        """Of the folders."""
        self._folder = array("q")
        self._text, self._ends = bytearray(), array("q", [0])
        self._bits = bytearray()

    def add(self, folder: str, name: str, *, named: bool, link: bool) -> None:
        """Add a file."""
        if folder not in self._numbers:
            self._numbers[folder] = len(self._folders)
            self._folders.append(folder)
        self._folder.append(self._numbers[folder])
        self._text += name.encode("utf-8", "surrogateescape")
        self._ends.append(len(self._text))
        self._bits.append(_NAMED * named | _LINK * link)

    def path(self, number: int) -> str:
        """The path of a file."""
        name = self._text[self._ends[number] : self._ends[number + 1]]
        folder = self._folders[self._folder[number]]
        text = name.decode("utf-8", "surrogateescape")
        return text if folder == "." else f"{folder.rstrip('/')}/{text}"

    def is_named(self, number: int) -> bool:
        """Whether the operator named this very file."""
        return bool(self._bits[number] & _NAMED)

    def named(self) -> Array:
        """Whether each was named, (n,) bool."""
        return self._have(_NAMED)

    def of_each_folder(self, chosen: Indices) -> Indices:
        """Some of the chosen files: all links, and one other file of each folder."""
        folder = np.array(self._folder, np.int64)[chosen]
        linked = self._have(_LINK)[chosen]
        folder[linked] = len(self._folders) + np.flatnonzero(linked)
        return chosen[np.unique(folder, return_index=True)[1]]

    def _have(self, bit: int) -> Array:
        return np.asarray(np.frombuffer(bytes(self._bits), np.uint8) & bit != 0)


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
    """Files that a search came upon, by device and inode; the same file maybe several times."""

    def __init__(self) -> None:
        self._names = Names()
        self._taken, self._left, self._inside, self._outside = (array("Q") for _ in range(4))
        """Two numbers a file."""
        self._why, self._where = array("q"), array("q")
        self._words: dict[str, int] = {}

    def take(self, key: Key, folder: str, name: str, *, named: bool, link: bool) -> None:
        """A file is to be read. Its last name counts if the operator named it, else its first."""
        self._taken.extend(key)
        self._names.add(folder, name, named=named, link=link)

    def leave_out(self, key: Key, why: str) -> None:
        """A file is left out, unless it is taken by another name; its first reason counts."""
        self._left.extend(key)
        self._why.append(self._words.setdefault(why, len(self._words)))

    def lies_inside(self, key: Key) -> None:
        """A file is reached without a link that leads out of a folder."""
        self._inside.extend(key)

    def lies_outside(self, key: Key, of: str) -> None:
        """A file is reached through a link that leads out of this folder."""
        self._outside.extend(key)
        self._where.append(self._words.setdefault(of, len(self._words)))

    def sources(self) -> Sources:
        """The files to read, each once, in the order in which they were come upon."""
        keys = _pairs(self._taken)
        chosen = firsts(keys)
        if len(chosen) < len(keys):
            self._rename(keys, chosen)
        return Sources(self._names, chosen)

    def _rename(self, keys: Array, chosen: Indices) -> None:
        """Of files that were come upon several times, have the last name that is the operator's."""
        named = np.flatnonzero(self._names.named())
        _, number = np.unique(keys, axis=0, return_inverse=True)
        number = number.reshape(-1)
        last = np.full(int(number.max()) + 1, -1, np.int64)
        np.maximum.at(last, number[named], named)
        better = last[number[chosen]]
        chosen[better >= 0] = better[better >= 0]

    def left_out(self) -> Counter[str]:
        """Number of files that are left out, by reason."""
        return self._counted(self._taken, self._left, self._why)

    def outside(self) -> Counter[str]:
        """Number of files that are only reached through links out of a folder, by that folder."""
        return self._counted(self._inside, self._outside, self._where)

    def _counted(self, known: array[int], others: array[int], word: array[int]) -> Counter[str]:
        """Count others by word, each once, at its first, without those that are known."""
        if not others:
            return Counter()
        before = _pairs(known)
        once = firsts(np.concatenate([before, _pairs(others)]))
        counts = np.bincount(np.array(word, np.int64)[once[once >= len(before)] - len(before)])
        words = list(self._words)
        return Counter({words[n]: count for n, count in enumerate(counts.tolist()) if count})


def _pairs(numbers: array[int]) -> Array:
    return np.frombuffer(numbers, np.uint64).reshape(-1, 2) if numbers else np.empty((0, 2), "u8")
