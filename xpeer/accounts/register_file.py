"""The files of the machine's register: the key, the tables, and how documents change classes.

Knows nothing of the meaning of a charge: that is `register`'s business.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import secrets
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import msgspec
import numpy as np

from xpeer.accounts.guarded_file import Run
from xpeer.errors import ConfigError, LedgerError, LocalError
from xpeer.files import require_own, secure_folder

log = logging.getLogger("xpeer.register")

NAME: Final = "register.sqlite"
KEY: Final = "register.key"
VERSION: Final = 2
"""Version of the schema. Version 1 did not hold the number of charges of each ledger. Such files
are upgraded."""
_KEY_BYTES: Final = 32
HASH_BYTES: Final = 16
"""Of a document's keyed hash."""
_BUSY_S: Final = 120.0
"""How long SQLite waits for a lock. Another home may hold it while it asks the accountant whether
its charge fits."""
_NEW_FILE: Final = ".new"
_FILES: Final = frozenset(
    f"{name}{end}"
    for name in (NAME, KEY)
    for end in ("", "-wal", "-shm", "-journal", _NEW_FILE, f"{_NEW_FILE}-journal")
)
_NEW: Final = -1
"""Stands for the class of documents that have none yet."""
_LEDGERS: Final = (
    "CREATE TABLE ledgers (ledger_id TEXT PRIMARY KEY, counter INTEGER NOT NULL)"
    " STRICT, WITHOUT ROWID"
)
_SCHEMA: Final = (
    _LEDGERS,
    "CREATE TABLE head (only INTEGER PRIMARY KEY CHECK (only = 1), version INTEGER NOT NULL,"
    " key_check BLOB NOT NULL, writes INTEGER NOT NULL) STRICT",
    "CREATE TABLE spans (id INTEGER PRIMARY KEY, ledger_id TEXT NOT NULL, documents BLOB NOT NULL,"
    " unit TEXT NOT NULL, swarm_id TEXT NOT NULL, begun_unix_s REAL NOT NULL,"
    " joined INTEGER NOT NULL) STRICT",
    "CREATE TABLE charges (span INTEGER NOT NULL, noise_multiplier REAL NOT NULL,"
    " sampling_probability REAL NOT NULL, steps INTEGER NOT NULL,"
    " PRIMARY KEY (span, noise_multiplier, sampling_probability)) STRICT, WITHOUT ROWID",
    "CREATE TABLE classes (id INTEGER PRIMARY KEY, spans TEXT NOT NULL UNIQUE,"
    " documents INTEGER NOT NULL) STRICT",
    "CREATE TABLE documents (hash BLOB PRIMARY KEY, class INTEGER NOT NULL) STRICT, WITHOUT ROWID",
)
MEND: Final = "check the disk's space and the folder's owner, or set privacy.register"
RESTORE: Final = (
    "restore the folder as a whole, without register.sqlite-wal and -shm, from a copy made after "
    "the last training step; without one, remove it: "
    "homes add what their ledgers hold when they start, what homes that are gone charged is lost"
)


def opened(folder: Path) -> tuple[sqlite3.Connection, bytes]:
    """Open the register in a folder, and its key. Make both if neither exists.

    Raises:
        ConfigError: the folder can't be made or read.
        LocalError: one of the two files is damaged or missing, or the key is another register's.
    """
    path = folder / NAME
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        for note in secure_folder(folder, "privacy register", "privacy.register", _FILES):
            log.warning("%s", note)
        require_own(path)
        with _alone(folder):
            if not path.exists():
                _begin(folder)
        key = key_of(folder)
    except OSError as e:
        raise ConfigError(
            f"privacy.register: {folder} can't be used: {e}",
            "set privacy.register to a folder of this user's that outlives its homes",
        ) from e
    with local_errors(path):
        connection = _connected(path, "rw")
        try:
            # FULL: every commit is fsynced
            connection.executescript(
                "PRAGMA journal_mode = WAL; PRAGMA synchronous = FULL; PRAGMA fullfsync = ON;"
                "PRAGMA wal_autocheckpoint = 1; PRAGMA temp_store = MEMORY;"
            )
            _refuse_damage(path, connection, key)
            connection.execute("BEGIN IMMEDIATE")
            if connection.execute("SELECT version FROM head").fetchone()[0] < VERSION:
                connection.execute(_LEDGERS)
                connection.execute("UPDATE head SET version = ?", (VERSION,))
            connection.execute("COMMIT")
        except BaseException:
            connection.close()
            raise
    return connection, key


def key_of(folder: Path) -> bytes:
    """The machine's key.

    Raises:
        LocalError: it is missing or damaged.
    """
    path = folder / KEY
    with local_errors(folder / NAME):
        key = path.read_bytes() if path.exists() else None
    if key is None:
        raise LocalError(f"privacy register: {path} is missing", RESTORE)
    if len(key) != _KEY_BYTES:
        raise LocalError(f"privacy register: {path} is damaged", RESTORE)
    return key


def is_there(folder: Path) -> bool:
    """Whether there is a register.

    Raises:
        LocalError: the register was lost: only its key is left.
    """
    path = folder / NAME
    with local_errors(path):
        if path.exists():
            return True
        begun = folder.joinpath(NAME + _NEW_FILE).exists()
        lost = not begun and folder.joinpath(KEY).exists()
    if lost:
        raise LocalError(f"privacy register: {path} is missing", RESTORE)
    return False


def id_of(key: bytes) -> str:
    """The id of the register with this key, hex."""
    return _check(key).hex()


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Keep out other processes that begin a register in this folder."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
        os.fsync(handle)
    finally:
        os.close(handle)


def _begin(folder: Path) -> None:
    """Make both files beside their places, then move the key, then the register.

    A crash leaves neither file in place, or the key in place and the register still to be moved. If
    a key is there alone, without a file to be moved, the register was lost.
    """
    path, key_path = folder / NAME, folder / KEY
    new, new_key = folder / (NAME + _NEW_FILE), folder / (KEY + _NEW_FILE)
    if not is_there(folder) and not key_path.exists():
        for leftover in (new, new.with_name(new.name + "-journal"), new_key):
            leftover.unlink(missing_ok=True)
        key = secrets.token_bytes(_KEY_BYTES)
        for made, content in ((new_key, key), (new, b"")):
            handle = os.open(made, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            try:
                os.write(handle, content)
                os.fsync(handle)
            finally:
                os.close(handle)
        with local_errors(path):
            connection = sqlite3.connect(new, isolation_level=None)
            try:
                connection.execute("BEGIN IMMEDIATE")
                for statement in _SCHEMA:
                    connection.execute(statement)
                connection.execute("INSERT INTO head VALUES (1, ?, ?, 0)", (VERSION, _check(key)))
                connection.execute("COMMIT")
            finally:
                connection.close()
        new_key.rename(key_path)
    new.rename(path)


def _check(key: bytes) -> bytes:
    return hashlib.blake2b(b"xpeer/register/v1", key=key, digest_size=16).digest()


def looked(folder: Path) -> tuple[sqlite3.Connection, bytes]:
    """Open the register read-only, and its key.

    Raises:
        LocalError: one of the two files is damaged or missing, or the key is another register's.
    """
    path, key = folder / NAME, key_of(folder)
    with local_errors(path):
        connection = _connected(path, "ro")
        try:
            _refuse_damage(path, connection, key)
        except BaseException:
            connection.close()
            raise
    return connection, key


def _connected(path: Path, mode: str) -> sqlite3.Connection:
    return sqlite3.connect(
        f"{path.absolute().as_uri()}?mode={mode}",
        uri=True,
        isolation_level=None,
        timeout=_BUSY_S,
        check_same_thread=False,
    )


def _refuse_damage(path: Path, connection: sqlite3.Connection, key: bytes) -> None:
    """Check the small tables. Documents are too many to be read at every start."""
    connection.execute("BEGIN")  # homes may write between the queries
    head = connection.execute("SELECT version, key_check FROM head").fetchall()
    spans = {number for (number,) in connection.execute("SELECT id FROM spans")}
    charged = connection.execute("SELECT span, steps FROM charges").fetchall()
    packed_spans = connection.execute("SELECT spans FROM classes").fetchall()
    connection.execute("COMMIT")
    if len(head) != 1:
        raise LocalError(f"privacy register {path} is damaged", RESTORE)
    if not 1 <= head[0][0] <= VERSION:
        raise LocalError(
            f"privacy register {path} has version {head[0][0]}, this xpeer knows {VERSION}",
            "use the version of xpeer that wrote it",
        )
    if head[0][1] != _check(key):
        raise LocalError(f"privacy register {path} was made with another {KEY}", RESTORE)
    classes = [unpacked(each) for (each,) in packed_spans]
    if any(span not in spans or steps < 1 for span, steps in charged) or any(
        not spans.issuperset(each) for each in classes
    ):
        raise LocalError(f"privacy register {path} is inconsistent", RESTORE)


def packed(spans: Sequence[int]) -> str:
    """Encode the spans of a class for its row."""
    return msgspec.json.encode(sorted(spans)).decode()


def unpacked(spans: str) -> list[int]:
    """Decode the spans of a class from its row.

    Raises:
        LocalError: they are damaged.
    """
    try:
        return msgspec.json.decode(spans, type=list[int])
    except (msgspec.MsgspecError, ValueError, RecursionError) as e:
        raise LocalError("privacy register: a class of documents is damaged", RESTORE) from e


def sorted_hashes(hashes: Iterable[bytes]) -> bytes:
    """Sort hashes of documents and drop repeats; they come one after the other.

    There may be millions. As objects they would take ten times as much memory.
    """
    unsorted = bytearray()
    for each in hashes:
        unsorted += each
    pairs = np.frombuffer(unsorted, ">u8").reshape(-1, 2).astype(np.uint64)
    pairs = pairs[np.lexsort((pairs[:, 1], pairs[:, 0]))]
    other = np.ones(len(pairs), bool)
    other[1:] = (pairs[1:] != pairs[:-1]).any(1)
    return pairs[other].astype(">u8").tobytes()


def stage(run: Run, hashes: bytes) -> None:
    """Put the documents of a shard, `sorted_hashes`, into a temporary table of this connection."""
    run("CREATE TEMP TABLE mine (hash BLOB PRIMARY KEY) WITHOUT ROWID")
    for start in range(0, len(hashes), 256 * HASH_BYTES):
        some = hashes[start : start + 256 * HASH_BYTES]
        part = [some[at : at + HASH_BYTES] for at in range(0, len(some), HASH_BYTES)]
        run(f"INSERT INTO mine VALUES {','.join(['(?)'] * len(part))}", part)  # noqa: S608


def unstage(run: Run) -> None:
    """Drop the staged documents."""
    run("DROP TABLE mine")


def add_span(run: Run, span: int) -> int:
    """Add a span to every staged document, so that each moves to another class.

    Returns:
        Number of documents that were in no class yet.
    """
    classes = run(
        "SELECT coalesce(class, ?), count(*) FROM mine LEFT JOIN documents USING (hash) GROUP BY 1",
        (_NEW,),
    ).fetchall()
    run("CREATE TEMP TABLE moves (old INTEGER PRIMARY KEY, new INTEGER NOT NULL)")
    for old, count in classes:
        spans = [] if old == _NEW else _spans_of(run, old)
        if span not in spans:
            new = _class_of(run, packed([*spans, span]))
            run("INSERT INTO moves VALUES (?, ?)", (old, new))
            run("UPDATE classes SET documents = documents + ? WHERE id = ?", (count, new))
            run("UPDATE classes SET documents = documents - ? WHERE id = ?", (count, old))
    run(
        "UPDATE documents SET class = (SELECT new FROM moves WHERE old = class)"
        " WHERE hash IN (SELECT hash FROM mine) AND class IN (SELECT old FROM moves)"
    )
    run(
        "INSERT INTO documents SELECT hash, new FROM mine JOIN moves ON old = ?"
        " WHERE hash NOT IN (SELECT hash FROM documents)",
        (_NEW,),
    )
    run("DROP TABLE moves")
    run("DELETE FROM classes WHERE documents = 0")
    return sum(count for old, count in classes if old == _NEW)


def _spans_of(run: Run, number: int) -> list[int]:
    row = run("SELECT spans FROM classes WHERE id = ?", (number,)).fetchone()
    if row is None:
        raise LocalError(f"privacy register: class {number} of documents is missing", RESTORE)
    return unpacked(row[0])


def _class_of(run: Run, spans: str) -> int:
    run("INSERT OR IGNORE INTO classes (spans, documents) VALUES (?, 0)", (spans,))
    return int(run("SELECT id FROM classes WHERE spans = ?", (spans,)).fetchone()[0])


@contextmanager
def local_errors(path: Path) -> Iterator[None]:
    """Translate errors of the file system and of SQLite into words for the operator.

    Raises:
        LedgerError: the disk, a lock or rights; the content may be good.
        LocalError: the content is damaged.
    """
    try:
        yield
    except sqlite3.DatabaseError as e:
        damaged = type(e) is sqlite3.DatabaseError or "no such" in str(e)
        kind, remedy = (LocalError, RESTORE) if damaged else (LedgerError, MEND)
        raise kind(f"privacy register {path} can't be used: {e}", remedy) from e
    except UnicodeError as e:
        raise LocalError(f"privacy register {path} is damaged: {e}", RESTORE) from e
    except OSError as e:
        raise LedgerError(f"privacy register {path} can't be used: {e}", MEND) from e
