"""What a node remembers of its life: exchanges, events, and where its peers were.

Holds nothing that can't be lost: the privacy ledger is another file. So a damaged file is moved
aside with a warning and the node starts, and a failing disk costs history, not training.
"""

from __future__ import annotations

import logging
import sqlite3
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec
from msgspec import Struct

from xpeer.errors import ConfigError
from xpeer.files import require_own
from xpeer.health import Health
from xpeer.leaves import Derived, Local, Parts, Public, Timing, seen_by
from xpeer.status import PrivacySpent, Progress

log = logging.getLogger("xpeer.store")

SCHEMA = 1
MAX_ROUNDS = 100_000
MAX_EVENTS = 10_000
MAX_PEERS = 4_096
PRUNE_EVERY = 500

_TABLES = """
CREATE TABLE rounds (
    id INTEGER PRIMARY KEY,
    unix_s REAL NOT NULL,
    slot INTEGER NOT NULL,
    partner TEXT NOT NULL,
    fragment INTEGER,
    reason TEXT NOT NULL,
    detail TEXT NOT NULL,
    distance REAL,
    seconds REAL
);
CREATE TABLE events (
    id INTEGER PRIMARY KEY,
    unix_s REAL NOT NULL,
    kind TEXT NOT NULL,
    detail TEXT NOT NULL
);
CREATE TABLE peers (
    peer_id TEXT PRIMARY KEY,
    addresses BLOB NOT NULL,
    seen_unix_s REAL NOT NULL,
    ledger_counter INTEGER NOT NULL DEFAULT 0
);
"""


_LATER_TABLES = "CREATE TABLE IF NOT EXISTS known (name TEXT PRIMARY KEY, value BLOB NOT NULL);"
"""Made in files of earlier versions too, which do not look at them."""


@seen_by("home")
class RoundRow(Struct, frozen=True, kw_only=True):
    """One exchange, or one that was skipped."""

    slot: Public[int]
    partner: Public[str] = ""
    fragment: Public[int | None] = None
    reason: Timing[str] = ""
    """Empty: merged; else a reason code."""
    detail: Local[str] = ""
    distance: Derived[float | None] = None
    seconds: Timing[float | None] = None
    unix_s: Timing[float] = 0.0


@seen_by("home")
class EventRow(Struct, frozen=True, kw_only=True):
    """Something an operator may ask about later."""

    kind: Timing[str]
    detail: Timing[str]
    unix_s: Timing[float]


@seen_by("home")
class KnownPeer(Struct, frozen=True, kw_only=True):
    """Where a peer was, for the next start."""

    peer_id: Public[str]
    addresses: Public[list[str]]
    seen_unix_s: Public[float]
    ledger_counter: Public[int]
    """The highest it has shown: one that goes back was restored from an old copy."""


@seen_by("home", "for a status before a trainer runs")
class Known(Struct, frozen=True):
    """What the trainer said last."""

    progress: Parts[Progress]
    privacy: Parts[PrivacySpent | None]
    unix_s: Timing[float]


class Store:
    """state.sqlite. One writer: the daemon, on one thread. Make with `open`.

    Args:
        database: an open connection with the tables in it.
        clock: wall clock, seconds.
        health: is told when writes fail, and when they succeed again.
    """

    def __init__(
        self,
        database: sqlite3.Connection,
        clock: Callable[[], float],
        health: Health | None = None,
    ) -> None:
        self._database = database
        self._clock = clock
        self._health = health or Health(clock)
        self._writes = 0
        self.failed_writes = 0

    @classmethod
    def open(
        cls, path: Path, clock: Callable[[], float] = time.time, health: Health | None = None
    ) -> Store:
        """Open or create it; a damaged file, or one of another version, is moved aside.

        Raises:
            ConfigError: the folder can't be written to, or the disk is full.
        """
        try:
            database = _connect(path)
            if database is None:
                _move_aside(path, int(clock()))
                database = _connect(path)
        except (sqlite3.Error, OSError) as e:
            raise ConfigError(
                f"state file {path} can't be opened: {e}", "check the disk and the home's owner"
            ) from e
        if database is None:
            raise ConfigError(f"state file {path} can't be created", "check the disk")
        return cls(database, clock, health)

    @classmethod
    def open_readonly(cls, path: Path) -> Store:
        """Open an existing file for reading, beside a daemon that may be writing.

        Raises:
            ConfigError: it is damaged, of another version, or can't be read.
        """
        try:
            database = sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)
            (version,) = database.execute("PRAGMA user_version").fetchone()
        except sqlite3.Error as e:
            raise ConfigError(
                f"history {path} can't be read: {e}", "as another user: sudo; is it damaged?"
            ) from e
        if version != SCHEMA:
            database.close()
            raise ConfigError(
                f"history {path} is of version {version}, this xpeer reads {SCHEMA}",
                "use the xpeer that the daemon runs",
            )
        return cls(database, time.time)

    def add_round(self, row: RoundRow) -> None:
        """Remember how an exchange ended. Its time is now."""
        self._write(
            "INSERT INTO rounds"
            " (unix_s, slot, partner, fragment, reason, detail, distance, seconds)"
            " VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
            (
                self._clock(), row.slot, row.partner, row.fragment, row.reason, row.detail,
                row.distance, row.seconds,
            ),
        )  # fmt: skip

    def add_event(self, kind: str, detail: str = "") -> None:
        """Remember an event. Its time is now."""
        self._write(
            "INSERT INTO events (unix_s, kind, detail) VALUES (?, ?, ?)",
            (self._clock(), kind, detail),
        )

    def remember_peer(
        self, peer_id: str, addresses: Sequence[str], ledger_counter: int = 0
    ) -> None:
        """Where a verified peer is now; its highest ledger counter never goes back.

        Args:
            peer_id: who.
            addresses: multiaddresses; none keeps those that are known.
            ledger_counter: as it showed us.
        """
        self._write(
            "INSERT INTO peers (peer_id, addresses, seen_unix_s, ledger_counter)"
            " VALUES (?1, ?2, ?3, ?4) ON CONFLICT (peer_id) DO UPDATE SET"
            " addresses = CASE ?2 WHEN CAST('[]' AS BLOB) THEN addresses ELSE ?2 END,"
            " seen_unix_s = ?3, ledger_counter = max(ledger_counter, ?4)",
            (peer_id, msgspec.json.encode(list(addresses)), self._clock(), ledger_counter),
        )

    def partner_ended(self, peer_id: str) -> None:
        """It left, or its run is over: it is not missed after our next start."""
        self._write("UPDATE peers SET seen_unix_s = 0 WHERE peer_id = ?", (peer_id,))

    def rounds(self, limit: int = 100) -> list[RoundRow]:
        """The last ones, newest first."""
        return self._read(
            RoundRow,
            "SELECT unix_s, slot, partner, fragment, reason, detail, distance, seconds"
            " FROM rounds ORDER BY id DESC LIMIT ?",
            limit,
        )

    def events(self, limit: int = 100) -> list[EventRow]:
        """The last ones, newest first."""
        return self._read(
            EventRow, "SELECT unix_s, kind, detail FROM events ORDER BY id DESC LIMIT ?", limit
        )

    def went_back(self) -> dict[str, str]:
        """What was last seen of ledgers that went back, by PeerID."""
        rows = self._database.execute(
            "SELECT detail FROM events WHERE kind = 'ledger-went-back' ORDER BY id"
        )
        return {peer_id: detail for (text,) in rows for peer_id, _, detail in [text.partition(" ")]}

    def caught_up(self) -> set[str]:
        """PeerIDs of those that have caught up since."""
        rows = self._database.execute(
            "SELECT kind, detail FROM events WHERE kind IN ('ledger-went-back', 'ledger-caught-up')"
            " ORDER BY id"
        )
        last = {detail.partition(" ")[0]: kind for kind, detail in rows}
        return {peer_id for peer_id, kind in last.items() if kind == "ledger-caught-up"}

    def known_peers(self, limit: int = MAX_PEERS) -> list[KnownPeer]:
        """Those seen last first."""
        rows = self._database.execute(
            "SELECT peer_id, addresses, seen_unix_s, ledger_counter FROM peers"
            " ORDER BY seen_unix_s DESC, peer_id LIMIT ?",
            (limit,),
        )
        return [
            KnownPeer(
                peer_id=peer_id,
                addresses=msgspec.json.decode(addresses, type=list[str]),
                seen_unix_s=seen,
                ledger_counter=counter,
            )
            for peer_id, addresses, seen, counter in rows
        ]

    def keep_known(self, known: Known) -> None:
        """What the trainer said last, for a status before the next one speaks."""
        self._write(
            "INSERT INTO known (name, value) VALUES ('trainer', ?1)"
            " ON CONFLICT (name) DO UPDATE SET value = ?1",
            (msgspec.json.encode(known),),
        )

    def last_known(self) -> Known | None:
        """As `keep_known` was given it; None = nothing, or of another version."""
        row = self._database.execute("SELECT value FROM known WHERE name = 'trainer'").fetchone()
        if row is None:
            return None
        try:
            return msgspec.json.decode(row[0], type=Known)
        except (msgspec.MsgspecError, UnicodeDecodeError):
            return None

    def close(self) -> None:
        """Fold the write-ahead log into the file and close it."""
        self._database.close()

    def _read(self, kind: type[Any], query: str, limit: int) -> list[Any]:
        try:
            rows = self._database.execute(query, (limit,))
            names = [column[0] for column in rows.description]
            return [kind(**dict(zip(names, row, strict=True))) for row in rows]
        except sqlite3.Error as e:
            raise ConfigError(
                f"history can't be read from state.sqlite: {e}",
                "a daemon that starts moves a damaged one aside",
            ) from e

    def _write(self, statement: str, values: tuple[object, ...]) -> None:
        try:
            with self._database:
                self._database.execute(statement, values)
                self._writes += 1
                if self._writes % PRUNE_EVERY == 0:
                    self._prune()
        except sqlite3.Error as e:  # a full or failing disk: history is lost, the node goes on
            self.failed_writes += 1
            self._health.failed("state-file-failing", e)
            if self._health.count("state-file-failing") == 1:
                log.warning("history can't be written to state.sqlite: %s", e)
        else:
            self._health.worked("state-file-failing")

    def _prune(self) -> None:
        for table, keep in (("rounds", MAX_ROUNDS), ("events", MAX_EVENTS)):
            self._database.execute(
                f"DELETE FROM {table} WHERE id <= (SELECT max(id) FROM {table}) - ?",  # noqa: S608 - constants
                (keep,),
            )
        self._database.execute(
            "DELETE FROM peers WHERE peer_id NOT IN"
            " (SELECT peer_id FROM peers ORDER BY seen_unix_s DESC LIMIT ?)",
            (MAX_PEERS,),
        )


def _connect(path: Path) -> sqlite3.Connection | None:
    """An open database with our tables; None if the file is damaged or of another version."""
    require_own(path)
    database = sqlite3.connect(path)
    try:
        database.execute("PRAGMA journal_mode=WAL")
        database.execute("PRAGMA synchronous=FULL")
        (version,) = database.execute("PRAGMA user_version").fetchone()
        if version == 0:
            database.executescript(
                f"BEGIN;{_TABLES}{_LATER_TABLES}PRAGMA user_version={SCHEMA};COMMIT;"
            )
            return database
        (verdict,) = database.execute("PRAGMA quick_check(1)").fetchone()
        if version == SCHEMA and verdict == "ok":
            database.executescript(_LATER_TABLES)
            return database
    except sqlite3.DatabaseError as e:
        if not _damaged(e):
            database.close()
            raise
    database.close()
    return None


def _damaged(error: sqlite3.DatabaseError) -> bool:
    # Extended codes carry the primary one in their low byte. A plain SQLITE_ERROR here is a file
    # whose tables are not ours.
    code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_CORRUPT) & 0xFF
    return code in {sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_ERROR}


def _move_aside(path: Path, now_unix_s: int) -> None:
    aside = path.with_name(f"{path.name}.damaged-{now_unix_s}")
    for suffix in ("", "-wal", "-shm"):
        part = path.with_name(path.name + suffix)
        if part.exists():
            part.rename(aside.with_name(aside.name + suffix))
    log.warning(
        "state file %s is damaged or of another version: moved to %s, starting with an empty one "
        "(history and known addresses are lost, the privacy ledger is another file)",
        path,
        aside.name,
    )
