"""The history of a node: exchanges, events, and the addresses of its peers.

A node can go on without all of it; the privacy ledger is another file. So a damaged history is
moved aside with a warning and the node starts. A failing disk costs history, but no training.
"""

from __future__ import annotations

import logging
import sqlite3
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

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
"""Tables that are added to files of earlier versions. These versions ignore them."""


@seen_by("home")
class RoundRow(Struct, frozen=True, kw_only=True):
    """One exchange, or a slot without one."""

    slot: Public[int]
    partner: Public[str] = ""
    fragment: Public[int | None] = None
    reason: Timing[str] = ""
    """Why nothing was merged, a reason code; "" = it was merged."""
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
    """A peer that was met, and its addresses, for the next start."""

    peer_id: Public[str]
    addresses: Public[list[str]]
    seen_unix_s: Public[float]
    ledger_counter: Public[int]
    """Largest number of charges that its privacy ledger has shown. A ledger that shows fewer later
    was restored from an old copy."""


@seen_by("home", "for a status before a trainer runs")
class Known(Struct, frozen=True):
    """The last counters that a trainer sent, and when."""

    progress: Parts[Progress]
    privacy: Parts[PrivacySpent | None]
    unix_s: Timing[float]


class Met(NamedTuple):
    """What is to be remembered of a peer that is there now."""

    peer_id: str
    addresses: Sequence[str]
    ledger_counter: int = 0
    partner: bool = True
    """False: an observer, which nobody misses after our next start."""


class Store:
    """The file state.sqlite. Only the daemon writes it, on one thread. `open` makes a store.

    Args:
        database: an open connection to a database with the tables.
        clock: wall clock, seconds.
        health: gets the condition `state-file-failing`.
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
        """Remember how an exchange ended, just now."""
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
        """Remember an event that happened just now."""
        self._write(
            "INSERT INTO events (unix_s, kind, detail) VALUES (?, ?, ?)",
            (self._clock(), kind, detail),
        )

    def remember_peer(
        self, peer_id: str, addresses: Sequence[str], ledger_counter: int = 0
    ) -> None:
        """Remember that a verified peer is there now.

        Args:
            peer_id: the peer.
            addresses: its multiaddresses; if empty, the addresses remembered so far are kept.
            ledger_counter: the number of charges that it showed us; the largest one is kept.
        """
        self.remember_peers([Met(peer_id, addresses, ledger_counter)])

    def remember_peers(self, peers: Iterable[Met]) -> None:
        """Remember, in one write, that these verified peers are there now; see `remember_peer`."""
        now_s = self._clock()
        self._write(
            "INSERT INTO peers (peer_id, addresses, seen_unix_s, ledger_counter)"
            " VALUES (?1, ?2, ?3, ?4) ON CONFLICT (peer_id) DO UPDATE SET"
            " addresses = CASE ?2 WHEN CAST('[]' AS BLOB) THEN addresses ELSE ?2 END,"
            " seen_unix_s = ?3, ledger_counter = max(ledger_counter, ?4)",
            *(
                (
                    met.peer_id,
                    msgspec.json.encode(list(met.addresses)),
                    now_s if met.partner else 0.0,
                    met.ledger_counter,
                )
                for met in peers
            ),
        )

    def partner_ended(self, peer_id: str) -> None:
        """Note that a partner left or its run is over: it is not missed after our next start."""
        self._write("UPDATE peers SET seen_unix_s = 0 WHERE peer_id = ?", (peer_id,))

    def rounds(self, limit: int = 100) -> list[RoundRow]:
        """The last exchanges, newest first."""
        return self._read(
            RoundRow,
            "SELECT unix_s, slot, partner, fragment, reason, detail, distance, seconds"
            " FROM rounds ORDER BY id DESC LIMIT ?",
            limit,
        )

    def events(self, limit: int = 100) -> list[EventRow]:
        """The last events, newest first."""
        return self._read(
            EventRow, "SELECT unix_s, kind, detail FROM events ORDER BY id DESC LIMIT ?", limit
        )

    def went_back(self) -> dict[str, str]:
        """For each peer whose ledger went back: the numbers of charges when it last did."""
        rows = self._database.execute(
            "SELECT detail FROM events WHERE kind = 'ledger-went-back' ORDER BY id"
        )
        return {peer_id: detail for (text,) in rows for peer_id, _, detail in [text.partition(" ")]}

    def caught_up(self) -> set[str]:
        """PeerIDs of peers whose ledger went back and has caught up since."""
        rows = self._database.execute(
            "SELECT kind, detail FROM events WHERE kind IN ('ledger-went-back', 'ledger-caught-up')"
            " ORDER BY id"
        )
        last = {detail.partition(" ")[0]: kind for kind, detail in rows}
        return {peer_id for peer_id, kind in last.items() if kind == "ledger-caught-up"}

    def known_peers(self, limit: int = MAX_PEERS) -> list[KnownPeer]:
        """Peers that were met, the last seen first."""
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
        """Remember the trainer's last counters, for a status before the next trainer runs."""
        self._write(
            "INSERT INTO known (name, value) VALUES ('trainer', ?1)"
            " ON CONFLICT (name) DO UPDATE SET value = ?1",
            (msgspec.json.encode(known),),
        )

    def last_known(self) -> Known | None:
        """The counters that `keep_known` got last; None if there are none that can be read."""
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

    def _write(self, statement: str, *rows: tuple[object, ...]) -> None:
        """Execute a statement with each row's values, in one transaction."""
        try:
            with self._database:
                self._database.executemany(statement, rows)
                self._writes += 1
                if self._writes % PRUNE_EVERY == 0:
                    self._prune()
        except sqlite3.Error as e:  # a full or failing disk: history is lost, the node goes on
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
    """A connection to a database with our tables; None if it is damaged or of another version."""
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
    # Extended codes have the primary one in their low byte. A plain SQLITE_ERROR here means that
    # the file has other tables than ours.
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
