"""The account of private steps: what was charged stays charged, whatever happens to the rest.

A charge is on the disk before `charge` returns, so steps that follow it are paid for even if the
power fails. Nothing is ever refunded: steps that were charged and not taken, because the process
died or a checkpoint was restored, count as taken. One row per charge, chained by hashes; a file
that does not add up is an error, never a new account.

What this module does not give: protection from its owner, who can put back an older copy of the
whole file (partners remember the highest `counter` they were shown), and what the steps cost
(`accountant`).
"""

from __future__ import annotations

import os
import secrets
import sqlite3
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

from xpeer.errors import LocalError
from xpeer.identity import blake2b
from xpeer.privacy.accountant import Segment

_VERSION: Final = 1
_MECHANISM: Final = "poisson-subsampled-gaussian"
_DOMAIN: Final = b"xpeer/ledger/v1\0"
_MAX_STEPS: Final = 1 << 31
"""Of one charge; no run is that long."""
_BUSY_S: Final = 5.0
_NOT_THE_CONTENT: Final = frozenset(
    {
        sqlite3.SQLITE_BUSY,
        sqlite3.SQLITE_LOCKED,
        sqlite3.SQLITE_FULL,
        sqlite3.SQLITE_READONLY,
        sqlite3.SQLITE_CANTOPEN,
        sqlite3.SQLITE_IOERR,
        sqlite3.SQLITE_PERM,
    }
)
"""Error codes of the disk or of rights."""
_SCHEMA: Final = """
BEGIN IMMEDIATE;
CREATE TABLE head (
    only INTEGER PRIMARY KEY CHECK (only = 1), version INTEGER NOT NULL, ledger_id TEXT NOT NULL,
    counter INTEGER NOT NULL, hash BLOB NOT NULL
) STRICT;
CREATE TABLE charges (
    counter INTEGER PRIMARY KEY, mechanism TEXT NOT NULL, noise_multiplier REAL NOT NULL,
    sampling_probability REAL NOT NULL, steps INTEGER NOT NULL, total_steps INTEGER NOT NULL,
    hash BLOB NOT NULL
) STRICT;
CREATE TABLE settings (key TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT;
"""
_RESTORE: Final = (
    "restore this file from a copy made after the last training step; "
    "without one, take the budget of this shard as spent"
)
_MEND: Final = "check the disk's space and the file's owner, then start the node again"


class Ledger:
    """One shard's account. Make with `Ledger.open`; safe to use from several threads.

    Only one process at a time may charge; a second one is noticed and refused.
    """

    def __init__(self, path: Path, connection: sqlite3.Connection) -> None:
        self.path = path
        self._connection = connection
        self._lock = threading.Lock()
        self._usable = True
        self._id, self._counter, self._hash = "", 0, b""
        self._steps: dict[tuple[float, float], int] = {}
        self._steps_charged = 0

    @classmethod
    def open(cls, path: Path, must_exist: str | None = None) -> Ledger:
        """Open the account, or begin one if there is none.

        Args:
            path: the file, usually `Home.ledger_db`; made with mode 0600.
            must_exist: the `id` that a checkpoint remembers; only that very account will do.

        Raises:
            LocalError: unreadable, corrupt, inconsistent, or not the account that must exist.
        """
        path = path.absolute()
        if not path.exists():
            _refuse_a_loss(path, must_exist)
            _create(path)
        with _told(path, "can't be opened", _MEND):
            path.chmod(0o600)
            connection = sqlite3.connect(
                f"{path.as_uri()}?mode=rw",
                uri=True,
                isolation_level=None,
                timeout=_BUSY_S,
                check_same_thread=False,
            )
        ledger = cls(path, connection)
        try:
            ledger._read()
            ledger._prepare_to_write()
            if must_exist is not None and ledger.id != must_exist:
                raise LocalError(
                    f"privacy ledger {path} is {ledger.id}, but the checkpoint was made with "
                    f"{must_exist}",
                    "restore the ledger that belongs to the checkpoint",
                )
        except LocalError:
            ledger.close()
            raise
        return ledger

    @property
    def id(self) -> str:
        """32 hex digits, random; the same for the life of the account."""
        return self._id

    @property
    def counter(self) -> int:
        """Number of charges; only ever grows."""
        return self._counter

    @property
    def steps_charged(self) -> int:
        """Steps of all charges together."""
        return self._steps_charged

    def segments(self) -> list[Segment]:
        """What was charged, one segment for each kind of step, in order of appearance."""
        with self._lock:
            return [Segment(sigma, q, steps) for (sigma, q), steps in self._steps.items()]

    def charge(self, segment: Segment) -> int:
        """Charge steps before they are taken; durable when this returns.

        Returns:
            The new `counter`.

        Raises:
            LocalError: not a kind of step this account knows, or it could not be written. After
                a failed write the account refuses further charges until it is opened again.
        """
        if type(segment) is not Segment or not 1 <= segment.steps < _MAX_STEPS:
            raise LocalError(f"privacy ledger {self.path}: can't charge {segment!r}")
        with self._lock:
            counter, total = self._counter + 1, self._steps_charged + segment.steps
            link = _link(self._hash, counter, segment, total)
            with self._transaction():
                self._refuse_another_writer()
                self._connection.execute(
                    "INSERT INTO charges VALUES (?, ?, ?, ?, ?, ?, ?)",
                    (
                        counter,
                        _MECHANISM,
                        segment.noise_multiplier,
                        segment.sampling_probability,
                        segment.steps,
                        total,
                        link,
                    ),
                )
                self._connection.execute("UPDATE head SET counter = ?, hash = ?", (counter, link))
            self._take_in(counter, segment, total, link)
            return counter

    def settings(self, key: str) -> str | None:
        """What was stored by `set_once`; None if nothing was."""
        with self._lock, _told(self.path, "can't be read", _MEND):
            row = self._connection.execute(
                "SELECT value FROM settings WHERE key = ?", (key,)
            ).fetchone()
        return None if row is None else str(row[0])

    def set_once(self, key: str, value: str) -> str:
        """Store a value for good, unless there is one already; durable when this returns.

        Returns:
            The value that is stored.
        """
        with self._lock, self._transaction():
            self._connection.execute("INSERT OR IGNORE INTO settings VALUES (?, ?)", (key, value))
            row = self._connection.execute(
                "SELECT value FROM settings WHERE key = ?", (key,)
            ).fetchone()
        return str(row[0])

    def close(self) -> None:
        """Close the file; the account can't be used after that."""
        with self._lock:
            self._usable = False
            self._connection.close()

    def __enter__(self) -> Self:
        """For `with`: closes at the end."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """See `close`."""
        self.close()

    def _read(self) -> None:
        with _told(self.path, "is corrupt", _RESTORE):
            state = self._connection.execute("PRAGMA quick_check(1)").fetchone()[0]
            heads = self._connection.execute("SELECT version, ledger_id, counter, hash FROM head")
            head = heads.fetchall()
            rows = self._connection.execute("SELECT * FROM charges ORDER BY counter").fetchall()
        if state != "ok" or len(head) != 1:
            raise LocalError(f"privacy ledger {self.path} is corrupt: {state}", _RESTORE)
        version, self._id, counter, last = head[0]
        if version != _VERSION:
            raise LocalError(
                f"privacy ledger {self.path} has version {version}, this xpeer knows {_VERSION}",
                "use the version of xpeer that wrote it",
            )
        self._hash = blake2b(_DOMAIN, self._id.encode())
        for row in rows:
            self._check_row(*row)
        if (counter, last) != (self._counter, self._hash):
            raise LocalError(
                f"privacy ledger {self.path} is inconsistent: {counter} charges were made and "
                f"{self._counter} are recorded, or the last was altered",
                _RESTORE,
            )

    def _prepare_to_write(self) -> None:
        """Only once the content is known to be good: a damaged file is left as it is."""
        # FULL: every commit is fsynced. A checkpoint after each keeps the main file complete,
        # so that a copy without its -wal loses nothing.
        with _told(self.path, "can't be written", _MEND):
            self._connection.executescript(
                "PRAGMA journal_mode = WAL; PRAGMA synchronous = FULL; PRAGMA fullfsync = ON;"
                "PRAGMA wal_autocheckpoint = 1;"
            )

    def _check_row(
        self,
        counter: int,
        mechanism: str,
        noise_multiplier: float,
        sampling_probability: float,
        steps: int,
        total: int,
        link: bytes,
    ) -> None:
        if mechanism != _MECHANISM:
            raise LocalError(
                f"privacy ledger {self.path}: charge {counter} is of an unknown mechanism",
                "use the version of xpeer that wrote it",
            )
        try:
            segment = Segment(noise_multiplier, sampling_probability, steps)
            expected = (self._counter + 1, self._steps_charged + steps)
            if (counter, total) != expected or link != _link(self._hash, counter, segment, total):
                raise LocalError("it does not continue those before it")
        except (LocalError, struct.error) as e:
            raise LocalError(
                f"privacy ledger {self.path} is inconsistent at charge {counter}: {e}", _RESTORE
            ) from e
        self._take_in(counter, segment, total, link)

    def _take_in(self, counter: int, segment: Segment, total: int, link: bytes) -> None:
        kind = (segment.noise_multiplier, segment.sampling_probability)
        self._steps[kind] = self._steps.get(kind, 0) + segment.steps
        self._counter, self._steps_charged, self._hash = counter, total, link

    def _refuse_another_writer(self) -> None:
        counter, last = self._connection.execute("SELECT counter, hash FROM head").fetchone()
        if (counter, last) != (self._counter, self._hash):
            raise LocalError(
                f"privacy ledger {self.path}: another process charged it",
                "run one node on this home at a time",
            )

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        if not self._usable:
            raise LocalError(f"privacy ledger {self.path} is closed or failed before", _MEND)
        done = False
        try:
            with _told(self.path, "can't be written", _MEND):
                self._connection.execute("BEGIN IMMEDIATE")
                yield
                self._connection.execute("COMMIT")
            done = True
        finally:
            if not done:  # what reached the disk is unknown: read it anew before going on
                self._usable = False
                if self._connection.in_transaction:
                    self._connection.rollback()


def _link(before: bytes, counter: int, segment: Segment, total: int) -> bytes:
    numbers = struct.pack(
        "<qddqq",
        counter,
        segment.noise_multiplier,
        segment.sampling_probability,
        segment.steps,
        total,
    )
    return blake2b(_DOMAIN, before, _MECHANISM.encode(), numbers)


def _refuse_a_loss(path: Path, must_exist: str | None) -> None:
    if must_exist is not None:
        raise LocalError(
            f"privacy ledger {path} is missing, but a checkpoint was made with {must_exist}",
            _RESTORE,
        )
    leftover = path.with_name(path.name + "-wal")
    if leftover.exists():
        raise LocalError(f"privacy ledger {path} is missing, but {leftover} is there", _RESTORE)


def _create(path: Path) -> None:
    """Make the file whole beside its place, so that a crash leaves either none or a good one."""
    beside = path.with_name(path.name + ".new")
    with _told(path, "can't be made", _MEND):
        beside.unlink(missing_ok=True)
        beside.with_name(beside.name + "-journal").unlink(missing_ok=True)
        os.close(os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
        connection = sqlite3.connect(beside, isolation_level=None)
        try:
            ledger_id = secrets.token_hex(16)
            start: tuple[Any, ...] = (
                1,
                _VERSION,
                ledger_id,
                0,
                blake2b(_DOMAIN, ledger_id.encode()),
            )
            connection.executescript(_SCHEMA)
            connection.execute("INSERT INTO head VALUES (?, ?, ?, ?, ?)", start)
            connection.execute("COMMIT")
        finally:
            connection.close()
        beside.rename(path)
        folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


@contextmanager
def _told(path: Path, what: str, remedy: str) -> Iterator[None]:
    """Errors of the file system and of SQLite, in words for the operator."""
    try:
        yield
    except sqlite3.Error as e:
        if getattr(e, "sqlite_errorcode", 0) & 0xFF in _NOT_THE_CONTENT:
            raise LocalError(f"privacy ledger {path} can't be used: {e}", _MEND) from e
        raise LocalError(f"privacy ledger {path} {what}: {e}", remedy) from e
    except (OSError, UnicodeError) as e:
        raise LocalError(f"privacy ledger {path} {what}: {e}", remedy) from e
