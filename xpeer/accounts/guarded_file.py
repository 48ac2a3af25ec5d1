"""An open SQLite file of the accounts. Once a write has failed, it refuses all others.

Knows nothing of ledgers and registers. They say how their errors and remedies are worded.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from xpeer.errors import LocalError

Run = Callable[..., sqlite3.Cursor]
"""(statement, values) -> its rows, in the transaction that is open."""


class GuardedFile:
    """A file, and whether it may still be written.

    Args:
        name: names the file in errors, with its path.
        path: the file.
        connection: to the file.
        translated: makes a context in which errors of writing become words for the operator.
        mend: remedy if the file can't be written.
        restore: remedy if the file is another one.

    Attributes:
        usable: True until the file is closed, or a write fails. Set to False at once if the file
            was opened read-only.
    """

    def __init__(
        self,
        name: str,
        path: Path,
        connection: sqlite3.Connection,
        translated: Callable[[], AbstractContextManager[None]],
        *,
        mend: str,
        restore: str,
    ) -> None:
        self.usable = True
        self._name = name
        self._path = path
        self._connection = connection
        self._translated = translated
        self._mend, self._restore = mend, restore
        self._file = _file_id(path)

    def refuse_if_unusable(self) -> None:
        """Refuse to go on with a file that can't be written any more.

        Raises:
            LocalError: it can't.
        """
        if not self.usable:
            raise LocalError(f"{self._name} is closed or failed before", self._mend)

    @contextmanager
    def transaction(self, *harmless: type[Exception]) -> Iterator[Run]:
        """Write all that the block writes, or nothing. On the disk when it ends.

        Args:
            harmless: errors by which the block calls the write off. Any other error leaves the file
                unusable.

        Raises:
            LocalError: the file is unusable, was replaced, or can't be written.
        """
        self.refuse_if_unusable()
        if _file_id(self._path) != self._file:
            self.usable = False
            raise LocalError(
                f"{self._name} was removed or replaced while it was open", self._restore
            )
        known = False
        try:
            with self._translated():
                self._connection.execute("BEGIN IMMEDIATE")
                yield self._connection.execute
                self._connection.execute("COMMIT")
            known = True
        except harmless:
            self._connection.rollback()
            known = True  # nothing was written, and we know it
            raise
        finally:
            if not known:  # nobody knows what reached the disk: the file must be opened again
                self.usable = False
                if self._connection.in_transaction:
                    self._connection.rollback()

    def close(self) -> None:
        """Close the file."""
        self.usable = False
        self._connection.close()


def _file_id(path: Path) -> tuple[int, int] | None:
    """Device and inode of a file; None if there is none."""
    try:
        status = path.stat()
    except FileNotFoundError:
        return None
    return status.st_dev, status.st_ino
