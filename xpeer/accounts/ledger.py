"""The ledger of a home: its private steps. What was charged stays charged, whatever happens.

A charge is on the disk before `charge` returns, so the steps that follow are paid for even if the
power fails. Nothing is ever refunded: steps that were charged but not taken, because the process
died or a checkpoint was restored, count as taken. Each charge is a row, and hashes chain the rows.
A file that does not add up is an error. It is never replaced by an empty ledger.

What this module does not give: protection from its owner, who can put back an older copy of the
whole file (partners remember the highest `counter` that they received); and what the steps cost
(`accountant`).
"""

from __future__ import annotations

import os
import sqlite3
import threading
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Final, Self

import msgspec

from xpeer.accounts.accountant import Segment
from xpeer.accounts.chain import (
    Charge,
    ChargeChain,
    ChargeContext,
    Row,
    forecast,
    in_parts,
)
from xpeer.accounts.guarded_file import GuardedFile
from xpeer.accounts.histories import ByUnit, DeclaredDocuments, missing, segments_of, steps_of
from xpeer.accounts.ledger_file import (
    MEND,
    RESTORE,
    connected,
    create,
    local_errors,
    prepare_to_write,
    read,
    refuse_a_loss,
)
from xpeer.accounts.register import Fits, Register
from xpeer.errors import LocalError
from xpeer.files import require_own

_NOTED: Final = "register"
"""Setting: id and path of the register that the home's charges are in."""
_MAX_STEPS: Final = 1 << 31
"""A charge must have fewer steps than this. No run is that long."""


def place_of(folder: Path) -> str:
    """The path of a register's folder as ledgers note it: without links, in characters."""
    return os.fsencode(os.path.realpath(folder)).decode("utf-8", "backslashreplace")


class Ledger:
    """The ledger of one home. Make it with `Ledger.open`. Safe to use from several threads.

    Only one process at a time may charge. A second one is noticed and refused.

    Attributes:
        path: the ledger's file.
    """

    def __init__(self, path: Path, connection: sqlite3.Connection) -> None:
        self.path = path
        self._connection = connection
        self._file = GuardedFile(
            f"privacy ledger {path}",
            path,
            connection,
            partial(local_errors, path, "can't be written", MEND),
            mend=MEND,
            restore=RESTORE,
        )
        self._lock = threading.RLock()
        """Re-entrant: a budget looks at own charges while it decides about a new one."""
        self._id = ""
        self._chain = ChargeChain("")
        """The charges as of the last read or write; replaced by `_read`."""
        self._register: Register | None = None
        """None until `declare_documents` is called."""
        self._about: ChargeContext | None = None
        """What the next charges are for. None until documents are declared: nothing can be charged
        before."""
        self._noted = False
        """Whether the register is noted that charges go to now."""

    @classmethod
    def look(cls, path: Path) -> Ledger:
        """Open a ledger read-only. Its node may be running.

        Raises:
            LocalError: it is missing, unreadable, corrupt or inconsistent.
        """
        path = path.absolute()
        if not path.exists():
            raise LocalError(
                f"there is no privacy ledger {path}", "it is made when the node first trains"
            )
        ledger = cls(path, connected(path, "ro"))
        ledger._file.usable = False
        try:
            ledger._read()
        except LocalError:
            ledger.close()
            raise
        return ledger

    @classmethod
    def open(cls, path: Path, must_exist: str | None = None) -> Ledger:
        """Open the ledger, or begin one if there is none.

        Args:
            path: the file, usually `Home.ledger_db`; made with mode 0600.
            must_exist: the ledger's `id` in a checkpoint. Any other ledger, or none, is refused.

        Raises:
            LocalError: it is unreadable, corrupt, inconsistent, or not the one that must exist.
        """
        path = path.absolute()
        require_own(path)
        if not path.exists():
            refuse_a_loss(path, must_exist)
            create(path)
        with local_errors(path, "can't be opened", MEND):
            path.chmod(0o600)
        ledger = cls(path, connected(path, "rw"))
        try:
            version = ledger._read()
            prepare_to_write(path, ledger._connection, ledger._file, version)
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

    def declare_documents(
        self, register: Register, documents: Iterable[str], about: ChargeContext
    ) -> DeclaredDocuments:
        """Declare which documents the next charges are for. Nothing can be charged before.

        From now on the machine's register counts each charge for these documents, too. Charges that
        the register holds and this ledger lacks are charged to the ledger again. It lacks them if
        an older copy was restored, or if the node died between the two writes.

        Args:
            register: the machine's register; closed with the ledger.
            documents: ids of the documents that are trained on.
            about: what the next charges are for.

        Raises:
            ConfigError: the documents were charged for another unit.
            LocalError: the register or the ledger can't be written.
        """
        self._register, self._about, self._noted = register, None, False
        declared = register.declare(
            self.id,
            self._chain.by_unit,
            documents,
            about.exact_unit,
            about.swarm_id,
            self._chain.counter,
        )
        if declared.behind:
            self.note_register(register.id, register.path.parent)
            self._catch_up(about, declared.behind, declared.counter)
        self._about = about
        return declared

    def catch_up(self, register: Register, about: ChargeContext) -> int:
        """Charge again what this ledger lacks, while there is no text to train on.

        This is the half of `declare_documents` that needs no documents. `charge` stays refused.

        Args:
            register: the machine's register; the caller closes it.
            about: what the repeated charges were for.

        Returns:
            Number of steps that were charged again.

        Raises:
            LocalError: the register can't be read, or the ledger can't be written.
        """
        behind = missing(register.of_home(self.id), self.by_unit())
        if behind:
            self.note_register(register.id, register.path.parent)
            self._catch_up(about, behind, register.counter(self.id))
        return steps_of(behind)

    @property
    def shared(self) -> bool:
        """Whether other homes are charging some of these documents, too."""
        return self._register is not None and self._register.shared

    def histories(self) -> list[list[Segment]]:
        """Charges of this home and others to documents of the shard.

        Returns:
            One history for each class of documents that may have lost most.
        """
        return [self.segments()] if self._register is None else self._register.histories()

    def documents_elsewhere(self) -> int:
        """Number of documents of the shard that other homes of this machine charged, too."""
        return 0 if self._register is None else self._register.documents_elsewhere()

    @property
    def id(self) -> str:
        """32 random hex digits. They stay the same for the life of the ledger."""
        return self._id

    @property
    def counter(self) -> int:
        """Number of charges. It only ever grows."""
        return self._chain.counter

    @property
    def steps_charged(self) -> int:
        """Number of steps of all charges."""
        return self._chain.steps_charged

    @property
    def head(self) -> str:
        """Hash of the last charge, hex. It binds all charges before it."""
        return self._chain.head.hex()

    def charges(self) -> list[Charge]:
        """All charges, oldest first."""
        with self._lock:
            return list(self._chain.charges)

    def ends_unix_s(self, steps_left: int, clock: Callable[[], float] = time.time) -> float | None:
        """Unix time at which so many further steps will have been charged; see `forecast`."""
        with self._lock:
            return forecast(self._chain.charges, steps_left, clock())

    def segments(self) -> list[Segment]:
        """All charges added up: one segment for each kind of step, in order of appearance."""
        with self._lock:
            return [Segment(sigma, q, steps) for (sigma, q), steps in self._chain.steps.items()]

    def own_segments(self) -> list[Segment]:
        """Charges of own steps (`xpeer finetune`), which `segments` includes.

        Own steps that were charged again because the ledger had lost them are not among them.
        """
        with self._lock:
            return segments_of(self._chain.own)

    def by_unit(self) -> ByUnit:
        """Steps charged, by what epsilon holds for."""
        with self._lock:
            return {unit: dict(history) for unit, history in self._chain.by_unit.items()}

    def charge(self, segment: Segment, fits: Fits | None = None) -> int:
        """Charge steps before they are taken. The charge is on the disk when this returns.

        It is written to the machine's register first, then to this file.

        Args:
            segment: the steps.
            fits: says whether the budget still allows the charge. Called only if other homes
                charged documents of this shard meanwhile.

        Returns:
            The new `counter`.

        Raises:
            BudgetExceededError: the charge does not fit; nothing was charged.
            LocalError: the segment can't be charged, no documents were declared, or the write
                failed. After a failed write all charges are refused until the ledger is opened
                again.
        """
        if type(segment) is not Segment or not 1 <= segment.steps < _MAX_STEPS:
            raise LocalError(f"privacy ledger {self.path}: can't charge {segment!r}")
        with self._lock:
            self._file.refuse_if_unusable()
            register, about = self._register, self._about
            if register is None or about is None:
                raise LocalError(
                    f"privacy ledger {self.path}: charged before its documents were declared",
                    "`declare_documents` comes first",
                )
            if not self._noted:
                self.note_register(register.id, register.path.parent)
                self._noted = True
            # register first: after a crash in between, one charge too many counts
            register.charge(segment, fits, self._chain.counter + 1)
            about = msgspec.structs.replace(about, unix_s=time.time())
            with self._file.transaction():
                self._refuse_another_writer()
                row = self._chain.next_row(segment, about)
                self._store(row)
            self._chain.add(row)
            return row.counter

    def _catch_up(self, about: ChargeContext, behind: ByUnit, counter: int) -> None:
        """Charge again what the register holds and this ledger lacks.

        Partners remember the number of charges. So the steps are split into as many charges as the
        register has seen, where possible.
        """
        with self._lock, self._file.transaction():
            self._refuse_another_writer()
            spare = counter - self._chain.counter
            for unit, history in behind.items():
                kind, _, cut = unit.partition(" of ")
                again = msgspec.structs.replace(
                    about, unit=kind, cut=cut, unix_s=time.time(), found_again=True, own=False
                )
                parts = in_parts(segments_of(history), spare)
                spare -= len(parts)
                for segment in parts:
                    row = self._chain.next_row(segment, again)
                    self._store(row)
                    self._chain.add(row)

    def noted_register(self) -> tuple[str, str] | None:
        """Id and path of the register that the charges are in.

        The id is empty if the operator chose a folder without a register. None if this ledger has
        no charges, or was last charged by a version that noted none.
        """
        noted = self.settings(_NOTED)
        return None if noted is None else (noted.partition(" ")[0], noted.partition(" ")[2])

    def note_register(self, register_id: str, folder: Path) -> None:
        """Note which register the charges are in, from now on."""
        noted = f"{register_id} {place_of(folder)}"
        with self._lock:
            if self.settings(_NOTED) != noted:
                with self._file.transaction() as run:
                    run("INSERT OR REPLACE INTO settings VALUES (?, ?)", (_NOTED, noted))

    def settings(self, key: str) -> str | None:
        """The value that `set_once` stored; None if it stored none."""
        with self._lock, local_errors(self.path, "can't be read", MEND):
            row = self._connection.execute(
                "SELECT value FROM settings WHERE key = ?", (key,)
            ).fetchone()
        return None if row is None else str(row[0])

    def set_once(self, key: str, value: str) -> str:
        """Store a value for good, unless one is stored already. On the disk when this returns.

        Returns:
            The value that is stored now.
        """
        with self._lock, self._file.transaction():
            self._connection.execute("INSERT OR IGNORE INTO settings VALUES (?, ?)", (key, value))
            row = self._connection.execute(
                "SELECT value FROM settings WHERE key = ?", (key,)
            ).fetchone()
        return str(row[0])

    def close(self) -> None:
        """Close the file, and the register. The ledger can't be used after that."""
        with self._lock:
            self._file.close()
            if self._register is not None:
                self._register.close()

    def __enter__(self) -> Self:
        """Return this ledger. `with` closes it at the end."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """See `close`."""
        self.close()

    def _read(self) -> int:
        """Read all charges. Returns the version of the file's schema."""
        version, self._id, self._chain = read(self.path, self._connection)
        return version

    def _store(self, row: Row) -> None:
        self._connection.execute("INSERT INTO charges VALUES (?, ?, ?, ?, ?, ?, ?, ?)", row)
        self._connection.execute("UPDATE head SET counter = ?, hash = ?", (row.counter, row.hash))

    def _refuse_another_writer(self) -> None:
        counter, last = self._connection.execute("SELECT counter, hash FROM head").fetchone()
        if (counter, last) != (self._chain.counter, self._chain.head):
            raise LocalError(
                f"privacy ledger {self.path}: another process charged it",
                "run one node on this home at a time",
            )
