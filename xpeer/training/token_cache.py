"""The shard as tokens, kept on the disk: every text is tokenised once.

    cache/tokens/RECIPE/*.tokens      see `token_file`
    cache/tokens/RECIPE/verified      files whose tokens need not be read again to trust them

A text file is known by its path, size, times and inode. As long as these are the same, it is not
opened again. If a start is killed, the next one goes on with the files of tokens that are there.
The ids of the documents are stored with the very tokens that are trained on.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import struct
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import msgspec
import numpy as np

from xpeer.config import TOKENS
from xpeer.errors import ShardError
from xpeer.files import put
from xpeer.identity import blake2b
from xpeer.training.formats.rows import REASONS
from xpeer.training.listing import Listing
from xpeer.training.piece_table import Array, PieceTable, expanded
from xpeer.training.reading import FORMS, Begin, Recipe
from xpeer.training.room import Room
from xpeer.training.sources import Sources
from xpeer.training.tensor_file import CorruptFileError
from xpeer.training.token_file import (
    CONTINUES,
    OPEN,
    SOURCE,
    STAGING,
    SUFFIX,
    TokenFile,
    open_token_file,
)

KEPT_RECIPES: Final = 3
"""Recipes whose tokens are kept: those that were used last."""
_BLOCK: Final = 1 << 16
"""Rows that are looked at together."""
_VERIFIED: Final = "verified"
_OLD: Final = "records-*.safetensors"
"""What earlier versions kept tokens in."""

logger = logging.getLogger("xpeer.shard")
Stat = tuple[int, int, int, int]


def stat_of(path: str | Path) -> Stat:
    """Size, times and inode of a file: another content gets others."""
    status = os.stat(path)  # noqa: PTH116 - there may be many
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino


def key_of(path: str, stat: Stat) -> bytes:
    """Name a text file as it is now, 16 bytes."""
    # no resolving: a link that leads elsewhere has another inode
    where = os.fsencode(os.path.abspath(path))  # noqa: PTH100
    return blake2b(where, struct.pack("<4Q", *(value % (1 << 64) for value in stat)), size=16)


def type_of_tokens(vocabulary: int, *, examples: bool) -> np.dtype[Any]:
    """The smallest type that holds all ids; of examples also whether each token is predicted."""
    return np.dtype("<u2" if vocabulary * (2 if examples else 1) <= 1 << 16 else "<u4")


@contextmanager
def lent(cache: Path) -> Iterator[Path]:
    """A folder for a command's tokens that begins with those of a cache. It is gone afterwards.

    Nothing changes in the cache: its trainer may use it at the same time, and the command's user
    may be another one, whose files that trainer could not read.
    """
    with tempfile.TemporaryDirectory(prefix="xpeer-tokens-") as folder:
        with contextlib.suppress(OSError):  # what can't be read is made again
            for file in (cache / TOKENS).glob("*/*"):
                here = Path(folder) / TOKENS / file.parent.name
                here.mkdir(mode=0o700, parents=True, exist_ok=True)
                if file.suffix == SUFFIX:
                    (here / file.name).symlink_to(file.absolute())
                elif file.name == _VERIFIED:
                    shutil.copy(file, here)
        yield Path(folder)


@dataclass(frozen=True, slots=True)
class Known:
    """What the cache holds of some text files."""

    entries: Array  # (e,) int64: rows of `TokenCache`'s table of sources, file by file
    source: Array  # (e,) int64: number of the text file
    fresh: Array  # (k,) int64: numbers of the text files of which nothing is here
    begins: list[tuple[int, Begin]]
    """Text files that are here in part, by number, and where reading has to begin."""


class TokenCache:
    """Files of tokens of one recipe.

    Args:
        cache: folder of this node.
        recipe: how text becomes tokens.

    Attributes:
        folder: holds the files, mode 0700.
        dtype: of the tokens; see `type_of_tokens`.
        room: for lists of files and documents, once it is open.
    """

    def __init__(self, cache: Path, recipe: Recipe) -> None:
        self.folder = cache / TOKENS / recipe.digest
        self.dtype = type_of_tokens(recipe.tokenizer.vocab_size, examples=recipe.makes_examples)
        self.room = Room(self.folder)
        self._cache = cache
        self._files: list[TokenFile] = []
        self._sources = np.empty(0, SOURCE)
        self._file = self._begin = np.empty(0, np.int64)  # of each entry: file, first passage
        self._order = np.empty(0, np.int64)  # of the entries, by the first half of their keys
        self._first = np.empty(0, np.uint64)  # these halves, in this order

    def open(self) -> None:
        """Open what earlier starts wrote; files that are damaged are removed.

        Raises:
            ShardError: the folder can't be used.
        """
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            os.utime(self.folder)
            for left in self.folder.glob(f"{STAGING}*"):
                left.unlink(missing_ok=True)
            paths = sorted(self.folder.glob(f"*{SUFFIX}"))
        except OSError as e:
            raise unusable(self.folder, e) from e
        verified = self._verified()
        self._files = []
        for path in paths:
            try:
                known = verified.get(path.name) == stat_of(path)
                self._files.append(open_token_file(path, verify=not known))
            except (CorruptFileError, OSError) as e:
                logger.warning("tokens are made again: %s: %s", path.name, e)
                with contextlib.suppress(OSError):
                    path.unlink()
        self._index()
        self._keep_verified()

    def add(self, paths: Sequence[Path]) -> None:
        """Open files that were just written.

        Raises:
            ShardError: one can't be read.
        """
        try:
            self._files += [open_token_file(path, verify=False) for path in paths]
        except CorruptFileError as e:
            raise ShardError(f"tokens in {self.folder}: {e}", "check that disk") from e
        self._index()
        self._keep_verified()

    def known(self, keys: Array) -> Known:
        """Look up text files by their keys, (n, 2) uint64."""
        begins: list[tuple[int, Begin]] = []
        entries, source, fresh = (self.room.column(np.int64) for _ in range(3))
        for at in range(0, len(keys), _BLOCK):
            block = keys[at : at + _BLOCK]
            low = np.searchsorted(self._first, block[:, 0], "left")
            count = np.searchsorted(self._first, block[:, 0], "right") - low
            fresh.add(at + np.flatnonzero(count == 0))
            numbers = np.flatnonzero(count == 1)
            rows = self._order[low[numbers]]
            whole = self._sources["key"][rows, 1] == block[numbers, 1]
            for field, value in (("complete", 1), ("first", 0), ("characters", 0)):
                whole &= self._sources[field][rows] == value
            found, sources = [rows[whole]], [numbers[whole]]
            for number in np.union1d(numbers[~whole], np.flatnonzero(count > 1)).tolist():
                these = self._order[low[number] :][: count[number]]
                chain, begin = self._chain(block[number], these)
                found.append(np.array(chain, np.int64))
                sources.append(np.full(len(chain), number, np.int64))
                if begin is not None:
                    begins.append((at + number, begin))
            order = np.argsort(np.concatenate(sources), kind="stable")
            entries.add(np.concatenate(found)[order])
            source.add(at + np.concatenate(sources)[order])
        return Known(entries.values(), source.values(), fresh.values(), begins)

    def table(self, known: Known) -> PieceTable:
        """List the pieces of the text files in their order, those that came before included."""
        sizes = self._sources["passages"][known.entries].astype(np.int64)
        ends = np.cumsum(sizes)
        count = int(ends[-1]) if len(ends) else 0
        rows, source = (self.room.empty(count, np.int64) for _ in range(2))
        low = done = 0
        while low < len(sizes):  # some passages at a time: an entry may have very many
            high = max(low + 1, int(np.searchsorted(ends, done + _BLOCK, "right")))
            block, to = slice(low, high), int(ends[high - 1])
            rows[done:to] = expanded(self._begin[known.entries[block]], sizes[block])
            source[done:to] = np.repeat(known.source[block], sizes[block])
            low, done = high, to
        return Listing(self._files, self.room).table(rows, source)

    def counts(self, known: Known) -> tuple[Counter[str], Counter[str], int]:
        """Rows without text and files of other forms, by reason; and the number of files read."""
        rows = known.entries[self._sources["complete"][known.entries] == 1]
        sums = np.zeros(len(REASONS), np.int64)
        for at in range(0, len(rows), _BLOCK):
            sums += self._sources["skipped"][rows[at : at + _BLOCK]].sum(0).astype(np.int64)
        skipped = Counter({why: int(n) for why, n in zip(REASONS, sums.tolist(), strict=True) if n})
        numbers = np.bincount(self._sources["form"][rows], minlength=len(FORMS)).tolist()
        left_out = Counter({f: int(n) for f, n in zip(FORMS, numbers, strict=True) if f and n})
        return skipped, left_out, int(numbers[0])

    def forms(self, known: Known) -> Array:
        """Index into `FORMS` of each entry of `known`."""
        forms: Array = self._sources["form"][known.entries]
        return forms

    def prune(self, known: Known) -> None:
        """Remove tokens of text files that are gone, and of recipes that were used long ago."""
        used = set[int]()
        for at in range(0, len(known.entries), _BLOCK):
            used.update(np.unique(self._file[known.entries[at : at + _BLOCK]]).tolist())
        with contextlib.suppress(OSError):
            for number, file in enumerate(self._files):
                if number not in used:
                    file.path.unlink(missing_ok=True)
            recipes = sorted(self.folder.parent.iterdir(), key=_age)
            for old in recipes[KEPT_RECIPES:]:
                shutil.rmtree(old, ignore_errors=True)
            for old in self._cache.glob(_OLD):
                old.unlink(missing_ok=True)

    def _chain(self, key: Array, rows: Array) -> tuple[list[int], Begin | None]:
        """Entries of a text file, one after the other, and where reading has to go on."""
        chain: list[int] = []
        first = characters = 0
        while True:
            for row in rows.tolist():
                entry = self._sources[row]
                place = int(entry["first"]), int(entry["characters"])
                if (entry["key"] == key).all() and place == (first, characters):
                    if entry["complete"]:
                        return [*chain, row], None
                    after = self._after(row)
                    if after != place:
                        chain.append(row)
                        first, characters = after
                        break
            else:
                name = np.ascontiguousarray(key, ">u8").tobytes()
                return chain, Begin(name, first, characters)

    def _after(self, row: int) -> tuple[int, int]:
        """Where the next entry of a text file has to begin."""
        entry, begin = self._sources[row], self._begin[row]
        file = int(self._file[row])
        offset = sum(len(f.passages) for f in self._files[:file])
        count = int(entry["passages"])
        passages = self._files[file].passages[begin - offset : begin - offset + count]
        first, characters = int(entry["first"]), int(entry["characters"])
        if not count or not passages[-1]["flags"] & OPEN:
            return first + count, 0
        before = characters if passages[-1]["flags"] & CONTINUES else 0
        return first + count - 1, before + int(passages[-1]["characters"])

    def _index(self) -> None:
        """Number the entries of all files."""
        sources = [f.sources for f in self._files]
        room = self.room
        self._sources = room.joined(sources, SOURCE)
        sizes = [len(part) for part in sources]
        self._file = room.filled(np.repeat(np.arange(len(sizes), dtype=np.int32), sizes))
        counts = self._sources["passages"].astype(np.int64)
        self._begin = room.filled(np.cumsum(counts) - counts)
        first = self._sources["key"][:, 0].astype(np.uint64)
        self._order = room.filled(np.argsort(first, kind="stable"))
        self._first = room.taken(first, self._order)

    def _verified(self) -> dict[str, Stat]:
        try:
            data = (self.folder / _VERIFIED).read_bytes()
            return msgspec.json.decode(data, type=dict[str, Stat])
        except (OSError, msgspec.MsgspecError):
            return {}

    def _keep_verified(self) -> None:
        with contextlib.suppress(OSError):  # then they are verified again
            stats = {file.path.name: stat_of(file.path) for file in self._files}
            if stats != self._verified():
                put(self.folder / _VERIFIED, [msgspec.json.encode(stats)])


def unusable(folder: Path, error: OSError) -> ShardError:
    """Make the error for a folder that can't hold the tokens."""
    return ShardError(
        f"tokens of the text can't be kept in {folder}: {error.strerror or error}",
        "check free space, owner and mode of that disk",
    )


def keys_of(sources: Sources, room: Room) -> tuple[Array, Array]:
    """Keys of text files, (n, 2) uint64, and their sizes in bytes, (n,) int64.

    Args:
        sources: the text files.
        room: for the results.

    Raises:
        ShardError: a file is gone.
    """
    keys, sizes = room.column(np.uint64), room.column(np.int64)
    for path in sources.paths():
        try:
            stat = stat_of(path)
        except OSError as e:
            raise ShardError(
                f"{path} can't be read: {e.strerror or e}", "check the disk and the file"
            ) from e
        keys.extend(struct.unpack(">2Q", key_of(path, stat)))
        sizes.append(stat[0])
    return keys.values().reshape(-1, 2), sizes.values()


def _age(path: Path) -> float:
    return -path.stat().st_mtime
