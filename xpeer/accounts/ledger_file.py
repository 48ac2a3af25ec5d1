"""The file of a privacy ledger: making, opening, reading, upgrading, and translating its errors.

Knows that its rows have to add up. What they are charged for is `ledger`'s business.
"""

from __future__ import annotations

import os
import secrets
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from xpeer.accounts.chain import MECHANISM, ChargeChain, Row
from xpeer.accounts.guarded_file import GuardedFile
from xpeer.errors import LedgerError, LocalError

_VERSION: Final = 2
"""Version of the schema. Files of version 1 do not note what a charge was for. They are upgraded,
and their charges stay as they are."""
_BUSY_S: Final = 5.0
"""How long SQLite waits for a lock."""
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
"""SQLite's error codes of the disk, of locks or of rights: the content may be good."""
_UPGRADE: Final = (
    "ALTER TABLE charges ADD COLUMN about TEXT NOT NULL DEFAULT ''",
    f"UPDATE head SET version = {_VERSION:d}",  # noqa: S608 - a number of ours
)
_SCHEMA: Final = """
BEGIN IMMEDIATE;
CREATE TABLE head (
    only INTEGER PRIMARY KEY CHECK (only = 1), version INTEGER NOT NULL, ledger_id TEXT NOT NULL,
    counter INTEGER NOT NULL, hash BLOB NOT NULL
) STRICT;
CREATE TABLE charges (
    counter INTEGER PRIMARY KEY, mechanism TEXT NOT NULL, noise_multiplier REAL NOT NULL,
    sampling_probability REAL NOT NULL, steps INTEGER NOT NULL, total_steps INTEGER NOT NULL,
    hash BLOB NOT NULL, about TEXT NOT NULL DEFAULT ''
) STRICT;
CREATE TABLE settings (key TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT;
"""
RESTORE: Final = (
    "restore this file from a copy made after the last training step; "
    "without one, take the budget of this shard as spent"
)
MEND: Final = "check the disk's space and the file's owner, then start the node again"


def connected(path: Path, mode: str) -> sqlite3.Connection:
    """Connect to the file; mode is "ro" or "rw"."""
    with local_errors(path, "can't be opened", MEND):
        return sqlite3.connect(
            f"{path.as_uri()}?mode={mode}",
            uri=True,
            isolation_level=None,
            timeout=_BUSY_S,
            check_same_thread=False,
        )


def refuse_a_loss(path: Path, must_exist: str | None) -> None:
    """Refuse to begin a ledger where an earlier one was lost. Call it if there is no file.

    Args:
        path: the file that is missing.
        must_exist: the ledger's id in a checkpoint; None = no checkpoint remembers one.

    Raises:
        LocalError: there was a ledger.
    """
    if must_exist is not None:
        raise LocalError(
            f"privacy ledger {path} is missing, but a checkpoint was made with {must_exist}",
            RESTORE,
        )
    leftover = path.with_name(path.name + "-wal")
    if leftover.exists():
        raise LocalError(f"privacy ledger {path} is missing, but {leftover} is there", RESTORE)


def create(path: Path) -> None:
    """Make the whole file beside its place, then rename it. A crash leaves none, or a good one."""
    beside = path.with_name(path.name + ".new")
    with local_errors(path, "can't be made", MEND):
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
                ChargeChain(ledger_id).head,
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


def read(path: Path, connection: sqlite3.Connection) -> tuple[int, str, ChargeChain]:
    """Read all charges, and check that they add up.

    Returns:
        The version of the file's schema, the ledger's id, and its charges.

    Raises:
        LocalError: the file is corrupt or inconsistent, or a later xpeer wrote it.
    """
    with local_errors(path, "is corrupt", RESTORE):
        state = connection.execute("PRAGMA quick_check(1)").fetchone()[0]
        connection.execute("BEGIN")  # a node may write between the two queries
        head = connection.execute("SELECT version, ledger_id, counter, hash FROM head").fetchall()
        rows = connection.execute("SELECT * FROM charges ORDER BY counter").fetchall()
        connection.execute("COMMIT")
    if state != "ok" or len(head) != 1:
        raise LocalError(f"privacy ledger {path} is corrupt: {state}", RESTORE)
    version, ledger_id, counter, last = head[0]
    if not 1 <= version <= _VERSION:
        raise LocalError(
            f"privacy ledger {path} has version {version}, this xpeer knows {_VERSION}",
            "use the version of xpeer that wrote it",
        )
    chain = ChargeChain(ledger_id)
    for values in rows:
        _append(path, chain, Row(*values, *([""] if version < _VERSION else [])))
    if (counter, last) != (chain.counter, chain.head):
        raise LocalError(
            f"privacy ledger {path} is inconsistent: {counter} charges were made and "
            f"{chain.counter} are recorded, or the last was altered",
            RESTORE,
        )
    return version, ledger_id, chain


def _append(path: Path, chain: ChargeChain, row: Row) -> None:
    if row.mechanism != MECHANISM:
        raise LocalError(
            f"privacy ledger {path}: charge {row.counter} is of an unknown mechanism",
            "use the version of xpeer that wrote it",
        )
    try:
        chain.add(row)
    except LocalError as e:
        raise LocalError(
            f"privacy ledger {path} is inconsistent at charge {row.counter}: {e}", RESTORE
        ) from e


def prepare_to_write(
    path: Path, connection: sqlite3.Connection, file: GuardedFile, version: int
) -> None:
    """Set up the file for writing, and upgrade it if it is old.

    Call it after `read`, so that a damaged file is never touched.

    Args:
        path: the file.
        connection: to the file.
        file: guards it.
        version: of its schema, as `read` returned it.
    """
    # FULL: every commit is fsynced. SQLite checkpoints after every commit, so the main file is
    # complete and a copy without its -wal loses nothing.
    with local_errors(path, "can't be written", MEND):
        connection.executescript(
            "PRAGMA journal_mode = WAL; PRAGMA synchronous = FULL; PRAGMA fullfsync = ON;"
            "PRAGMA wal_autocheckpoint = 1;"
        )
    if version < _VERSION:
        with file.transaction() as run:
            for statement in _UPGRADE:
                run(statement)


@contextmanager
def local_errors(path: Path, what: str, remedy: str) -> Iterator[None]:
    """Translate errors of the file system and of SQLite into words for the operator.

    Args:
        path: the ledger's file.
        what: what failed, e.g. "can't be opened".
        remedy: what the operator can do, unless the disk or its rights are at fault.

    Raises:
        LedgerError: the disk, a lock or rights; the content may be good.
        LocalError: anything else.
    """
    try:
        yield
    except sqlite3.Error as e:
        if getattr(e, "sqlite_errorcode", 0) & 0xFF in _NOT_THE_CONTENT:
            raise LedgerError(f"privacy ledger {path} can't be used: {e}", MEND) from e
        raise LocalError(f"privacy ledger {path} {what}: {e}", remedy) from e
    except (OSError, UnicodeError) as e:
        raise LocalError(f"privacy ledger {path} {what}: {e}", remedy) from e
