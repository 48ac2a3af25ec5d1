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

import sqlite3
import struct
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Final, Self

import msgspec

from xpeer.errors import LocalError
from xpeer.identity import blake2b
from xpeer.privacy.accountant import Segment
from xpeer.privacy.charges import MECHANISM, About, Charge, forecast, link
from xpeer.privacy.histories import Joined
from xpeer.privacy.ledger_file import (
    DOMAIN,
    MEND,
    RESTORE,
    TAKE_OVER,
    VERSION,
    connected,
    create,
    refuse_a_loss,
    told,
)
from xpeer.privacy.register import Fits, Register

_MAX_STEPS: Final = 1 << 31
"""Of one charge; no run is that long."""


class Ledger:
    """One shard's account. Make with `Ledger.open`; safe to use from several threads.

    Only one process at a time may charge; a second one is noticed and refused.
    """

    def __init__(self, path: Path, connection: sqlite3.Connection) -> None:
        self.path = path
        self._connection = connection
        self._lock = threading.Lock()
        self._usable = True
        self._id, self._counter, self._hash, self._old = "", 0, b"", False
        self._charges: list[Charge] = []
        self._steps: dict[tuple[float, float], int] = {}
        self._steps_charged = 0
        self.about: About | None = None
        """What the next charges are for."""
        self._register: Register | None = None

    @classmethod
    def look(cls, path: Path) -> Ledger:
        """Open an account to read it, while its node runs or not; nothing is changed.

        Raises:
            LocalError: missing, unreadable, corrupt or inconsistent.
        """
        path = path.absolute()
        if not path.exists():
            raise LocalError(
                f"there is no privacy ledger {path}", "it is made when the node first trains"
            )
        ledger = cls(path, connected(path, "ro"))
        ledger._usable = False
        try:
            ledger._read()
        except LocalError:
            ledger.close()
            raise
        return ledger

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
            refuse_a_loss(path, must_exist)
            create(path)
        with told(path, "can't be opened", MEND):
            path.chmod(0o600)
        ledger = cls(path, connected(path, "rw"))
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

    def share(
        self, register: Register, documents: Iterable[str], unit: str, swarm_id: str
    ) -> Joined:
        """Count charges in the machine's register, too, for the documents of the shard.

        Args:
            register: closed with the ledger.
            documents: ids of those that are trained on.
            unit: that epsilon holds for.
            swarm_id: for reports.

        Raises:
            ConfigError: the documents were charged for another unit.
            LocalError: the register can't be written.
        """
        self._register = register
        return register.join(self.id, self.segments(), documents, unit, swarm_id)

    @property
    def shared(self) -> bool:
        """Whether other homes are charging some of these documents, too."""
        return self._register is not None and self._register.shared

    def histories(self) -> list[list[Segment]]:
        """What was charged to documents of the shard, by this home and others: one for each kind of
        document that may have lost most.
        """
        return [self.segments()] if self._register is None else self._register.histories()

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

    @property
    def head(self) -> str:
        """The last link of the chain of charges, hex."""
        return self._hash.hex()

    def charges(self) -> list[Charge]:
        """All of them, oldest first."""
        with self._lock:
            return list(self._charges)

    def ends_unix_s(self, steps_left: int, clock: Callable[[], float] = time.time) -> float | None:
        """When so many further steps will have been charged, at the pace of the last hour; None if
        no pace is known.
        """
        with self._lock:
            return forecast(self._charges, steps_left, clock())

    def segments(self) -> list[Segment]:
        """What was charged, one segment for each kind of step, in order of appearance."""
        with self._lock:
            return [Segment(sigma, q, steps) for (sigma, q), steps in self._steps.items()]

    def charge(self, segment: Segment, fits: Fits | None = None) -> int:
        """Charge steps before they are taken; durable when this returns.

        Args:
            segment: the steps.
            fits: asked if other homes charged documents of this shard meanwhile.

        Returns:
            The new `counter`.

        Raises:
            BudgetExceededError: it does not fit; nothing was charged.
            LocalError: not a kind of step this account knows, or it could not be written. After
                a failed write the account refuses further charges until it is opened again.
        """
        if type(segment) is not Segment or not 1 <= segment.steps < _MAX_STEPS:
            raise LocalError(f"privacy ledger {self.path}: can't charge {segment!r}")
        with self._lock:
            self._refuse_if_unusable()
            if self._register is not None:  # first: a crash in between counts too much
                self._register.charge(segment, fits)
            counter, total = self._counter + 1, self._steps_charged + segment.steps
            about = self.about and msgspec.structs.replace(self.about, unix_s=time.time())
            noted = msgspec.json.encode(about).decode() if about else ""
            due = link(self._hash, counter, segment, total, noted)
            with self._transaction():
                self._refuse_another_writer()
                self._connection.execute(
                    "INSERT INTO charges VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
                    (
                        counter,
                        MECHANISM,
                        segment.noise_multiplier,
                        segment.sampling_probability,
                        segment.steps,
                        total,
                        due,
                        noted,
                    ),
                )
                self._connection.execute("UPDATE head SET counter = ?, hash = ?", (counter, due))
            self._take_in(Charge(counter, segment, about), total, due)
            return counter

    def settings(self, key: str) -> str | None:
        """What was stored by `set_once`; None if nothing was."""
        with self._lock, told(self.path, "can't be read", MEND):
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
            if self._register is not None:
                self._register.close()

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
        with told(self.path, "is corrupt", RESTORE):
            state = self._connection.execute("PRAGMA quick_check(1)").fetchone()[0]
            self._connection.execute("BEGIN")  # both as of one moment: a node may be writing
            heads = self._connection.execute("SELECT version, ledger_id, counter, hash FROM head")
            head = heads.fetchall()
            rows = self._connection.execute("SELECT * FROM charges ORDER BY counter").fetchall()
            self._connection.execute("COMMIT")
        if state != "ok" or len(head) != 1:
            raise LocalError(f"privacy ledger {self.path} is corrupt: {state}", RESTORE)
        version, self._id, counter, last = head[0]
        self._old = version < VERSION
        if not 1 <= version <= VERSION:
            raise LocalError(
                f"privacy ledger {self.path} has version {version}, this xpeer knows {VERSION}",
                "use the version of xpeer that wrote it",
            )
        self._hash = blake2b(DOMAIN, self._id.encode())
        for row in rows:
            self._check_row(*row, *([""] if self._old else []))
        if (counter, last) != (self._counter, self._hash):
            raise LocalError(
                f"privacy ledger {self.path} is inconsistent: {counter} charges were made and "
                f"{self._counter} are recorded, or the last was altered",
                RESTORE,
            )

    def _prepare_to_write(self) -> None:
        """Only once the content is known to be good: a damaged file is left as it is."""
        # FULL: every commit is fsynced. A checkpoint after each keeps the main file complete,
        # so that a copy without its -wal loses nothing.
        with told(self.path, "can't be written", MEND):
            self._connection.executescript(
                "PRAGMA journal_mode = WAL; PRAGMA synchronous = FULL; PRAGMA fullfsync = ON;"
                "PRAGMA wal_autocheckpoint = 1;"
            )
        if self._old:
            with self._transaction():
                for statement in TAKE_OVER:
                    self._connection.execute(statement)

    def _check_row(
        self,
        counter: int,
        mechanism: str,
        noise_multiplier: float,
        sampling_probability: float,
        steps: int,
        total: int,
        hashed: bytes,
        noted: str,
    ) -> None:
        if mechanism != MECHANISM:
            raise LocalError(
                f"privacy ledger {self.path}: charge {counter} is of an unknown mechanism",
                "use the version of xpeer that wrote it",
            )
        try:
            segment = Segment(noise_multiplier, sampling_probability, steps)
            expected = (self._counter + 1, self._steps_charged + steps)
            due = link(self._hash, counter, segment, total, noted)
            if (counter, total) != expected or hashed != due:
                raise LocalError("it does not continue those before it")
            about = msgspec.json.decode(noted, type=About) if noted else None
        except (LocalError, struct.error, msgspec.MsgspecError) as e:
            raise LocalError(
                f"privacy ledger {self.path} is inconsistent at charge {counter}: {e}", RESTORE
            ) from e
        self._take_in(Charge(counter, segment, about), total, hashed)

    def _refuse_if_unusable(self) -> None:
        if not self._usable:
            raise LocalError(f"privacy ledger {self.path} is closed or failed before", MEND)

    def _take_in(self, charge: Charge, total: int, hashed: bytes) -> None:
        segment = charge.segment
        kind = (segment.noise_multiplier, segment.sampling_probability)
        self._charges.append(charge)
        self._steps[kind] = self._steps.get(kind, 0) + segment.steps
        self._counter, self._steps_charged, self._hash = charge.counter, total, hashed

    def _refuse_another_writer(self) -> None:
        counter, last = self._connection.execute("SELECT counter, hash FROM head").fetchone()
        if (counter, last) != (self._counter, self._hash):
            raise LocalError(
                f"privacy ledger {self.path}: another process charged it",
                "run one node on this home at a time",
            )

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        self._refuse_if_unusable()
        done = False
        try:
            with told(self.path, "can't be written", MEND):
                self._connection.execute("BEGIN IMMEDIATE")
                yield
                self._connection.execute("COMMIT")
            done = True
        finally:
            if not done:  # what reached the disk is unknown: read it anew before going on
                self._usable = False
                if self._connection.in_transaction:
                    self._connection.rollback()
