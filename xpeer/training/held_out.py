"""Remembers which documents a home holds out, so that no text moves from validation to training.

    HOME/held-out    a line of JSON: the settings; then the ids of the documents, 16 bytes each, and
                     those that begin the other files, where these were known by all they hold

What is held out follows from the documents' ids (`piece_table.split_pieces`), but for two cases: a
file that is held out as a whole, of which rows may be added or taken away; and a shard so small
that no document is below the share, of which one is held out all the same. A corpus that is shared
never changes, and is divided alike by all its members: nothing is remembered of it.
"""

from __future__ import annotations

from typing import Final, Literal

import msgspec
import numpy as np

from xpeer.accounts.trained import has_trained
from xpeer.config import Home
from xpeer.errors import ShardError
from xpeer.files import put
from xpeer.leaves import stays
from xpeer.training.document import firsts
from xpeer.training.piece_table import Array, Indices, PieceTable, split_pieces
from xpeer.training.token_file import BEGINS

_BLOCK: Final = 1 << 16
By = Literal["document", "file"]


@stays("what a home holds out")
class _Settings(msgspec.Struct, frozen=True):
    """What the documents were chosen by."""

    share: float
    split: By
    older: bool
    """Whether files are named as earlier versions did, since this home trained with one."""
    trained: int = 0
    """Number of ids, the last ones, that begin files to train on: such files are named so from now
    on, and these are not drawn anew."""


class HeldOut:
    """The documents that a home holds out.

    Args:
        home: of the node; need not exist.
        share: of the documents to hold out.
        by: what is held out as a whole.

    Raises:
        ShardError: what was remembered can't be read.
    """

    def __init__(self, home: Home, share: float, by: By) -> None:
        self._path = home.held_out
        noted = self._read()
        if noted is None:
            self._settings = _Settings(share, by, older=has_trained(home))
            self._ids: Array = np.empty((0, 2), np.uint64)
            self._trained = self._ids
            return
        before, ids = noted
        self._settings = msgspec.structs.replace(before, share=share, split=by)
        if before != self._settings:  # then the operator wants another choice
            ids, before = ids[:0], msgspec.structs.replace(before, trained=0)
        held_out = len(ids) - before.trained
        self._ids, self._trained = ids[:held_out], ids[held_out:]

    def split(self, table: PieceTable) -> tuple[Indices, Indices]:
        """Divide pieces: indices for training and for validation, ascending.

        Raises:
            ShardError: all of them were held out before.
        """
        settings, trained = self._settings, self._trained
        training, held_out = split_pieces(
            *(table, settings.share, settings.split, self._ids, trained),
            by_content=settings.older and not len(trained),
        )
        if len(table) and not len(training):
            raise ShardError(
                f"no text: all {len(held_out)} documents were held out before ({self._path})",
                "name text to train on beside them",
            )
        return training, held_out

    def remember(self, table: PieceTable, held_out: Indices) -> None:
        """Note the documents that are held out. Those that are gone may come back.

        Args:
            table: the pieces.
            held_out: indices of those that are held out.

        Raises:
            ShardError: they can't be written.
        """
        chosen = table.select(held_out)
        ids = np.concatenate([self._ids, chosen.whole[chosen.flags & BEGINS != 0]])
        ids = ids.astype(np.uint64)
        ids = ids[firsts(ids)]
        trained = self._trained
        if self._settings.older and self._settings.split == "file" and not len(trained):
            trained = _beginnings(table, held_out)
        before = len(self._ids), len(self._trained)
        if (len(ids), len(trained)) == before and self._path.exists():
            return
        settings = msgspec.structs.replace(self._settings, trained=len(trained))
        self._write(settings, np.concatenate([ids, trained]))
        self._settings, self._ids, self._trained = settings, ids, trained

    def _write(self, settings: _Settings, ids: Array) -> None:
        blocks = range(0, len(ids), _BLOCK)
        names = (ids[at : at + _BLOCK].astype(">u8").tobytes() for at in blocks)
        try:
            put(self._path, [msgspec.json.encode(settings) + b"\n", *names], durable=True)
        except OSError as e:
            raise ShardError(
                f"{self._path} can't be written: {e.strerror or e}",
                "check free space, owner and mode of that disk",
            ) from e

    def _read(self) -> tuple[_Settings, Array] | None:
        try:
            data = self._path.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as e:
            raise ShardError(
                f"{self._path} can't be read: {e.strerror or e}", "check its owner and mode"
            ) from e
        line, _, rest = data.partition(b"\n")
        try:
            settings = msgspec.json.decode(line, type=_Settings)
            ids = np.frombuffer(rest, ">u8").reshape(-1, 2).astype(np.uint64)
            if not 0 <= settings.trained <= len(ids):
                raise ValueError(f"{settings.trained} ids are missing")
            return settings, ids
        except (msgspec.MsgspecError, ValueError) as e:
            raise ShardError(
                f"{self._path} is damaged: {e}",
                "restore it; if you remove it, what is held out is chosen anew, and text may be "
                "trained on that the validation loss was measured on",
            ) from e


def _beginnings(table: PieceTable, held_out: Indices) -> Array:
    """Ids of the documents that begin the files to train on, (k, 2) uint64."""
    to_train = np.ones(len(table), bool)
    to_train[held_out] = False
    files, first = np.unique(table.source, return_index=True)
    begins = first[np.isin(files, table.source[to_train])]
    ids: Array = table.whole[begins].astype(np.uint64)
    return ids
