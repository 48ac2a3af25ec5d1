"""The register of a machine: what each document was charged, by all homes, runs and swarms.

All homes that use one folder share one register. A key lies beside it and never leaves the folder.
A document is known by a keyed hash of its text.

A *span* is one home with one set of documents. A start with other documents begins another span. A
charge belongs to the span in which it was made. A document's account is all charges of all spans
that it was part of: its total loss, whatever else each shard held. Documents with equal spans have
equal accounts. They form a class, and there are few classes.

    documents (keyed hash) -> class -> spans -> steps charged, by noise and sampling probability

A charge is written here before the home's own ledger. A crash between the two leaves one charge too
many, never one too few. A ledger may hold charges that the register lacks, if the register was
restored or lost, or if the operator chose another one (`bound`). They are added at the next start.
Nobody knows which documents they were for, so they count for all documents that the home is known
to have had, and for all that it ever has later.

What this module does not give: recognition of text that was changed, cut differently into files, or
nearly the same; accounts of other machines, or of homes with another register; protection from the
machine's owner, who can put back an older copy of both files.
"""

from __future__ import annotations

import hashlib
import sqlite3
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from xpeer.accounts import register_file as file
from xpeer.accounts.accountant import Segment
from xpeer.accounts.guarded_file import GuardedFile
from xpeer.accounts.histories import (
    ByUnit,
    DeclaredDocuments,
    DocumentClass,
    History,
    combined,
    missing,
    segments_of,
    steps_of,
    undominated,
)
from xpeer.accounts.register_tables import RECOVERED, Tables
from xpeer.errors import ConfigError, LocalError

_SPAN: Final = "SELECT id FROM spans WHERE ledger_id = ? AND documents = ? AND unit = ?"
_CHARGE: Final = (
    "INSERT INTO charges VALUES (?1, ?2, ?3, ?4)"
    " ON CONFLICT (span, noise_multiplier, sampling_probability) DO UPDATE SET steps = steps + ?4"
)

_COUNTER: Final = (
    "INSERT INTO ledgers VALUES (?1, ?2)"
    " ON CONFLICT (ledger_id) DO UPDATE SET counter = max(counter, ?2)"
)

Fits = Callable[[list[list[Segment]], Segment], bool]
"""(histories, further charge) -> whether the budget allows the charge after each of them."""


class BudgetExceededError(LocalError):
    """Other homes charged the same documents meanwhile, so that this charge no longer fits."""


class Register:
    """The register, as one home uses it. Make it with `Register.open`.

    Safe to use from several threads and processes.

    Attributes:
        path: the register's file.
    """

    def __init__(self, path: Path, connection: sqlite3.Connection, key: bytes) -> None:
        self.path = path
        self._connection = connection
        self._file = GuardedFile(
            f"privacy register {path}",
            path,
            connection,
            partial(file.local_errors, path),
            mend=file.MEND,
            restore=file.RESTORE,
        )
        self._tables = Tables(connection)
        self._key = key
        self._lock = threading.Lock()
        self._ledger_id, self._unit, self._span = "", "record", 0
        """The home, its unit and its span, as of `declare` or `histories_of`; span 0 until then."""
        self._writes = 0
        """The register's count of writes at our last one."""
        self._steps = 0
        """Steps that this home charged, as far as it knows."""
        self._seen: object = None
        """Other homes' charges of our documents at `declare`. None until then."""
        self._shared = False

    @classmethod
    def open(cls, folder: Path) -> Register:
        """Open the register in a folder, or begin one.

        Raises:
            ConfigError: the folder can't be used.
            LocalError: the register or its key is damaged or missing, or they don't fit.
        """
        return cls(folder / file.NAME, *file.opened(folder))

    @classmethod
    def look(cls, folder: Path) -> Register | None:
        """Open the register read-only; None if there is none. Nodes may be running.

        Raises:
            LocalError: the register or its key is damaged or missing, or they don't fit.
        """
        if not file.is_there(folder):
            return None
        register = cls(folder / file.NAME, *file.looked(folder))
        register._file.usable = False
        return register

    def declare(
        self,
        ledger_id: str,
        charged: Mapping[str, History],
        documents: Iterable[str],
        unit: str = "record",
        swarm_id: str = "",
        counter: int = 0,
    ) -> DeclaredDocuments:
        """Declare which documents this home's next charges are for. On the disk when this returns.

        Cheap for documents that an earlier start declared: they are counted, not looked up.

        Args:
            ledger_id: id of the home's ledger.
            charged: charges in that ledger.
            documents: ids of the documents, in any order, repeats allowed.
            unit: what epsilon holds for: "record of ...", "document" or "shard".
            swarm_id: the swarm, for reports.
            counter: number of charges in the ledger.

        Raises:
            ConfigError: these documents were charged for another unit.
            LocalError: the register can't be written.
        """
        hashes = file.sorted_hashes(map(self._hash, documents))
        self._ledger_id, self._unit, self._span = ledger_id, unit, 0
        try:
            return self._declare(charged, hashes, swarm_id, counter)
        except BaseException:
            self._span = 0  # rolled back: nothing is charged to these documents
            raise

    def histories(self) -> list[list[Segment]]:
        """Charges of all homes to the declared documents.

        Returns:
            One history for each class whose documents may have lost most.
        """
        with self._lock, self._reading():
            return self._histories()

    def documents_elsewhere(self) -> int:
        """Number of declared documents that other homes have charged, too, by now."""
        with self._lock, self._reading():
            return self._elsewhere()

    def histories_of(self, ledger_id: str) -> list[list[Segment]]:
        """`histories` of the documents that a home declared last; empty if it never did."""
        with self._lock, self._reading():
            self._ledger_id = ledger_id
            self._span, self._unit = self._tables.newest(ledger_id)
            return self._histories() if self._span else []

    def classes(self, ledger_id: str) -> list[DocumentClass]:
        """All documents that a home ever had. Those that are in its shard now come first."""
        with self._lock, self._reading():
            classes = self._tables.classes(ledger_id, self._tables.newest(ledger_id)[0])
            return sorted(classes, key=lambda each: not each.here)

    def of_documents(self, documents: Iterable[str]) -> dict[str, list[Segment]]:
        """Charges of all homes by document id. Documents that no home declared have none."""
        with self._lock, self._reading():
            charges = self._tables.charges()
            known: dict[int | None, list[Segment]] = {
                number: segments_of(combined(charges, spans))
                for number, spans in self._tables.class_rows()
            }
            return {
                document: known.get(self._tables.class_of(self._hash(document)), [])
                for document in documents
            }

    def of_home(self, ledger_id: str) -> ByUnit:
        """Charges of one home, as far as the register knows."""
        with self._lock, self._reading():
            return self._tables.of_home(ledger_id)

    def counter(self, ledger_id: str) -> int:
        """The largest number of charges that the register ever saw in a home's ledger."""
        with self._lock, self._reading():
            return self._tables.counter(ledger_id)

    def charge(self, segment: Segment, fits: Fits | None = None, counter: int = 0) -> None:
        """Charge steps to all declared documents. The charge is on the disk when this returns.

        Args:
            segment: the steps.
            fits: says whether the budget still allows the charge. Called only if other homes
                charged some of these documents since `declare`.
            counter: number of this charge in the home's ledger.

        Raises:
            BudgetExceededError: the charge does not fit; nothing was charged.
            ConfigError: other homes charged these documents for another unit meanwhile, or a copy
                of this home is charging, too.
            LocalError: the register can't be written, or no documents were declared.
        """
        if not self._span:
            raise LocalError(f"privacy register {self.path}: charged without declared documents")
        with self._lock, self._file.transaction(BudgetExceededError, ConfigError) as run:
            if self._tables.writes() != self._writes:
                self._refuse_a_copy()
                seen = self._tables.seen_by(self._ledger_id, self._span)
                self._shared = self._shared or seen != self._seen
            if self._shared:
                self._refuse_other_units()
            if self._shared and fits is not None and not fits(self._histories(), segment):
                raise BudgetExceededError("the privacy budget of documents in this shard is spent")
            kind = segment.noise_multiplier, segment.sampling_probability
            run(_CHARGE, (self._span, *kind, segment.steps))
            run(_COUNTER, (self._ledger_id, counter))
            self._written()
        self._steps += segment.steps

    @property
    def id(self) -> str:
        """32 hex digits. They stay the same wherever the register is moved."""
        return file.id_of(self._key)

    @property
    def shared(self) -> bool:
        """True iff other homes charged some of these documents between `declare` and our last
        charge.
        """
        return self._shared

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            self._file.close()

    def __enter__(self) -> Self:
        """Return this register. `with` closes it at the end."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """See `close`."""
        self.close()

    def _declare(
        self, charged: Mapping[str, History], hashes: bytes, swarm_id: str, counter: int
    ) -> DeclaredDocuments:
        digest = hashlib.blake2b(hashes, digest_size=16).digest()
        count = len(hashes) // file.HASH_BYTES
        ledger_id, unit = self._ledger_id, self._unit
        with self._lock, self._file.transaction(BudgetExceededError, ConfigError) as run:
            lacking = missing(charged, self._tables.of_home(ledger_id))
            known = run(_SPAN, (ledger_id, digest, unit)).fetchone()
            new = 0
            if known is None or lacking:
                file.stage(run, hashes)
                if known is None:
                    self._span = self._begin(swarm_id, digest, unit)
                    new = file.add_span(run, self._span)
                else:
                    self._span = int(known[0])
                self._recover(lacking, swarm_id)
                file.unstage(run)
            else:
                self._span = int(known[0])
            if self._tables.documents_of(self._span) != count:
                raise LocalError(
                    f"privacy register {self.path} is inconsistent: it was restored in part",
                    file.RESTORE,
                )
            run("UPDATE spans SET joined = (SELECT writes FROM head) WHERE id = ?", (self._span,))
            run(_COUNTER, (ledger_id, counter))
            self._refuse_other_units()
            self._written()
        with self._lock, self._reading():
            tables, of_home = self._tables, self._tables.of_home(ledger_id)
            self._seen, self._shared = tables.seen_by(ledger_id, self._span), False
            self._steps = steps_of(of_home)
            unknown = combined(tables.charges(), tables.spans_of(ledger_id, RECOVERED))
            return DeclaredDocuments(
                documents=count,
                new=new,
                elsewhere=self._elsewhere(),
                recovered=lacking,
                unknown_steps=sum(unknown.values()),
                behind=missing(of_home, charged),
                counter=tables.counter(ledger_id),
            )

    # ---- in a transaction, or under the lock ---------------------------------------------------

    def _hash(self, document: str) -> bytes:
        return hashlib.blake2b(
            document.encode(), key=self._key, digest_size=file.HASH_BYTES
        ).digest()

    def _begin(self, swarm_id: str, digest: bytes, unit: str) -> int:
        made = self._connection.execute(
            "INSERT INTO spans (ledger_id, documents, unit, swarm_id, begun_unix_s, joined)"
            " VALUES (?, ?, ?, ?, ?, -1)",
            (self._ledger_id, digest, unit, swarm_id, time.time()),
        ).lastrowid
        if made is None:
            raise LocalError(f"privacy register {self.path}: no span was made")
        return made

    def _recover(self, lacking: Mapping[str, History], swarm_id: str) -> None:
        """Charge steps that the ledger holds and the register lacks.

        Nobody knows which documents they were for. So they are charged to all documents that the
        home is known to have had, and to the staged ones. The staged ones are charged, too, for
        what was recovered at earlier starts.
        """
        for unit, history in lacking.items():
            before = self._tables.spans_of(self._ledger_id)
            span = self._begin(swarm_id, RECOVERED, unit)
            for (sigma, q), steps in history.items():
                self._connection.execute(_CHARGE, (span, sigma, q, steps))
            for number, spans in self._tables.class_rows():
                if before & set(spans):
                    self._connection.execute(
                        "UPDATE classes SET spans = ? WHERE id = ?",
                        (file.packed([*spans, span]), number),
                    )
        for span in self._tables.spans_of(self._ledger_id, RECOVERED):
            file.add_span(self._connection.execute, span)

    def _refuse_a_copy(self) -> None:
        if self._tables.steps(self._ledger_id) != self._steps:
            raise ConfigError(
                f"privacy register {self.path}: another process charges for ledger "
                f"{self._ledger_id}: a copy of this home is running",
                "stop the copy, and remove it; a second node needs a home and an identity of its "
                "own (`xpeer id`)",
            )

    def _refuse_other_units(self) -> None:
        spans = self._related_spans()
        for span, unit, swarm_id in self._tables.of_other_units(self._unit):
            if span in spans:
                raise ConfigError(
                    f"documents of this shard were charged for privacy of each {unit} in swarm "
                    f"{swarm_id[:16]}, this swarm counts for each {self._unit}: these don't add up",
                    f"train on other documents, or in a swarm with privacy of each {unit}",
                )

    def _elsewhere(self) -> int:
        classes = self._tables.classes(self._ledger_id, self._span)
        return sum(each.documents for each in classes if each.here and each.ledgers > 1)

    def _histories(self) -> list[list[Segment]]:
        charges = self._tables.charges()
        if self._unit == "shard":
            histories = [combined(charges, self._related_spans())]
        else:
            rows = self._tables.class_rows(self._span)
            histories = [combined(charges, spans) for _, spans in rows]
        if not histories:
            raise LocalError(
                f"privacy register {self.path} knows no document of this shard", file.RESTORE
            )
        return [segments_of(history) for history in undominated(histories)]

    def _related_spans(self) -> Collection[int]:
        """Spans that have a document in common with this shard. If the unit is the shard, also all
        spans of this home.
        """
        shared = {span for _, spans in self._tables.class_rows(self._span) for span in spans}
        own = self._tables.spans_of(self._ledger_id)
        return shared | own if self._unit == "shard" else shared

    def _written(self) -> None:
        self._connection.execute("UPDATE head SET writes = writes + 1")
        self._writes = self._tables.writes()

    @contextmanager
    def _reading(self) -> Iterator[None]:
        """Let all queries of a block see the register as of one moment."""
        with file.local_errors(self.path):
            self._connection.execute("BEGIN")
            try:
                yield
            finally:
                self._connection.rollback()
