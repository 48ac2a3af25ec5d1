"""The pieces of the swarm's parameters that a joiner has so far, in its home.

    HOME/joining/parameters     all pieces, each at its place; the others are holes
    HOME/joining/tree-N         the signed hashes of a donor from whom some of them are

What lies there proves itself: a piece belongs to the tree that has its hash, so there is no index
that could be wrong after a crash. Names of files come from nobody else. The file is never larger
than the manifest's model.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import shutil
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Final

from xpeer.errors import LocalError, PeerError, Reason
from xpeer.files import put
from xpeer.network import pieces
from xpeer.network.pieces import Shape, Signer, Tree
from xpeer.wire.messages import PIECE_BYTES

MAX_TREES, KEPT_TREES = 16, 8
"""Snapshots of which pieces are kept: at most, and when donors are chosen anew."""
SPARE_BYTES: Final = 64 << 20
"""That must be free besides."""
_PARAMETERS: Final = "parameters"


class Gathered:
    """The pieces of one home. Made by `open`; the event loop alone uses it, but for `write`.

    Attributes:
        shape: of the parameters.
        trees: donors' trees, by number; some may have no piece here.
        num_bytes: of the pieces that are here.
    """

    def __init__(self, folder: Path, shape: Shape) -> None:
        self.shape = shape
        self.trees: dict[int, Tree] = {}
        self._folder = folder
        self._source: list[int | None] = [None] * shape.num_pieces
        """Of each piece, the number of its tree; None = it is not here."""
        self._aside: list[int | None] = [None] * shape.num_pieces
        """Of each piece that is set aside and not overwritten, the number of its tree."""
        self.num_bytes = 0
        self._fd = -1

    @classmethod
    def open(cls, folder: Path, shape: Shape, signer: Signer) -> Gathered:
        """Open what an earlier start left, or begin. Takes as long as reading what is there.

        Raises:
            LocalError: there is no room for the model, or the folder can't be written.
        """
        self = cls(folder, shape)
        with _errors(folder):
            folder.mkdir(mode=0o700, exist_ok=True)
            flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
            self._fd = os.open(folder / _PARAMETERS, flags, 0o600)
            try:
                self._load(signer)
            except BaseException:
                self.close()
                raise
        return self

    def _load(self, signer: Signer) -> None:
        os.ftruncate(self._fd, self.shape.num_bytes)
        self._require_room()
        self._load_trees(signer)
        if self.trees:
            self._recognise()

    def _require_room(self) -> None:
        here = os.fstat(self._fd).st_blocks * 512
        free = shutil.disk_usage(self._folder).free
        needed = max(0, self.shape.num_bytes - here) + SPARE_BYTES
        if free < needed:
            raise LocalError(
                f"the parameters of the swarm need {needed / 1e6:.0f} MB in {self._folder}, "
                f"{free / 1e6:.0f} MB are free",
                "free space there, and start again",
            )

    def _load_trees(self, signer: Signer) -> None:
        for number in range(MAX_TREES):
            path = self._path_of(number)
            if not path.exists():
                continue
            try:
                self.trees[number] = pieces.from_bytes(path.read_bytes(), signer, self.shape)
            except PeerError:  # of another swarm, or of a write that was cut short
                path.unlink()

    def _recognise(self) -> None:
        buffer = memoryview(bytearray(PIECE_BYTES))
        for piece in range(self.shape.num_pieces):
            data, place = buffer[: self.shape.size(piece)], self.shape.place(piece)
            if os.preadv(self._fd, [data], place.start) != len(data):
                continue
            found = pieces.hash_of(data)
            tree = next((t for t in self.trees.values() if t.leaf(piece) == found), None)
            if tree is not None:
                self.wrote(piece, tree)

    # ---- what is here ---------------------------------------------------------------------------

    def missing(self) -> list[int]:
        """Numbers of the pieces that are not here, in order; last those that are set aside."""
        missing = [piece for piece, source in enumerate(self._source) if source is None]
        return sorted(missing, key=lambda piece: self._aside[piece] is not None)

    def has(self, piece: int) -> bool:
        """Whether a piece is here."""
        return self._source[piece] is not None

    def sources(self) -> list[Tree]:
        """The trees of which pieces are here, the one with the most of them first."""
        counts = {n: self._source.count(n) for n in self.trees}
        return [self.trees[n] for n in sorted(counts, key=lambda n: (-counts[n], n)) if counts[n]]

    def bytes_of(self, tree: Tree) -> int:
        """Bytes of a tree's pieces that are here."""
        number = next((n for n, known in self.trees.items() if known.name == tree.name), None)
        pieces_ = (p for p, source in enumerate(self._source) if source == number)
        return sum(map(self.shape.size, pieces_)) if number is not None else 0

    # ---- changes --------------------------------------------------------------------------------

    def adopt(self, tree: Tree, in_use: Collection[Tree] = ()) -> None:
        """Keep a donor's tree, before any piece of it.

        If there are too many, the one with the fewest pieces is forgotten; those that are set aside
        count, too.

        Args:
            tree: to keep.
            in_use: trees that are not forgotten.

        Raises:
            PeerError: all are in use (BUSY).
        """
        if any(known.name == tree.name for known in self.trees.values()):
            return
        if len(self.trees) >= MAX_TREES:
            kept = {known.name for known in in_use}
            spare = [n for n, known in self.trees.items() if known.name not in kept]
            if not spare:
                raise PeerError(Reason.BUSY, f"{len(kept)} donors give at once")
            self.discard(self.trees[min(spare, key=self._count)])
        number = next(n for n in range(MAX_TREES) if n not in self.trees)
        with _errors(self._folder):
            put(self._path_of(number), [tree.to_bytes()])
        self.trees[number] = tree

    def write(self, piece: int, data: memoryview) -> None:
        """Write a verified piece to its place; on any thread. `wrote` then says whose it is.

        Raises:
            LocalError: the disk is full, or fails.
        """
        start, self._aside[piece] = self.shape.place(piece).start, None
        with _errors(self._folder):
            done = 0
            while done < len(data):
                done += os.pwrite(self._fd, data[done:], start + done)

    def wrote(self, piece: int, tree: Tree) -> None:
        """Note that a piece of this tree is here."""
        if self._source[piece] is None:
            self.num_bytes += self.shape.size(piece)
        self._source[piece] = self._number_of(tree)

    def discard(self, tree: Tree) -> None:
        """Forget a tree and the pieces that belong to it alone."""
        number = self._number_of(tree)
        for piece, source in enumerate(self._source):
            if source == number:
                self._source[piece] = None
                self.num_bytes -= self.shape.size(piece)
        self._aside = [None if aside == number else aside for aside in self._aside]
        del self.trees[number]
        self._path_of(number).unlink(missing_ok=True)

    def set_aside(self, tree: Tree) -> None:
        """Have the pieces of a tree be missing; those that none is written over can come back."""
        number = self._number_of(tree)
        for piece, source in enumerate(self._source):
            if source == number:
                self._source[piece], self._aside[piece] = None, number
                self.num_bytes -= self.shape.size(piece)

    def bring_back(self) -> None:
        """Have what is set aside be here again. Nothing is being written."""
        for piece, aside in enumerate(self._aside):
            if aside is not None:
                self._source[piece], self._aside[piece] = aside, None
                self.num_bytes += self.shape.size(piece)

    def tidy(self) -> None:
        """Forget trees without pieces, and all but those with the most of them."""
        kept = sorted(self.trees, key=self._count, reverse=True)[:KEPT_TREES]
        for number, tree in list(self.trees.items()):
            if number not in kept or not self._count(number):
                self.discard(tree)

    def payload(self) -> memoryview:
        """All pieces, mapped: (num_bytes,) uint8, only to be read."""
        return memoryview(mmap.mmap(self._fd, self.shape.num_bytes, prot=mmap.PROT_READ))

    def close(self) -> None:
        """Close the file. Its content stays for the next start."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _count(self, number: int) -> int:
        """How many pieces of a tree are here or set aside."""
        return self._source.count(number) + self._aside.count(number)

    def _path_of(self, number: int) -> Path:
        return self._folder / f"tree-{number}"

    def _number_of(self, tree: Tree) -> int:
        return next(n for n, known in self.trees.items() if known.name == tree.name)


def remove(folder: Path) -> None:
    """Remove what was gathered: the parameters are taken over, or are not wanted any more."""
    shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _errors(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as e:
        raise LocalError(
            f"{folder} can't be written: {e.strerror}",
            "free space there, or correct owner and mode of the home",
        ) from e
