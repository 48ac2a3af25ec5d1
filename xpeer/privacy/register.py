"""What every document was charged on this machine, whichever home, run or swarm it was part of.

One file for all homes that use one folder, beside a key that never leaves it. A document is known
by a keyed hash of its text. A *span* is a home with one set of documents: every start with other
documents begins another, and a charge belongs to the span it was made in. A document's account is
all charges of all spans that it was part of: its total loss, whatever else each shard held. As
documents of equal spans have equal accounts, they are kept as classes, and there are few.

    documents (keyed hash) -> class -> spans -> steps charged, by noise and sampling probability

A charge is written here before the home's own ledger: a crash between the two leaves one too many,
never one too few. What a ledger holds and the register does not (it was restored, or the home came
from another machine) is added at the next start, to every document that the home is known to have
had, and to those it has now.

What this module does not give: recognition of text that was changed, cut differently into files, or
nearly the same; accounts of other machines, or of homes with another register; protection from the
machine's owner, who can put back an older copy of both files.
"""

from __future__ import annotations

import hashlib
import sqlite3
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from xpeer.errors import ConfigError, LocalError
from xpeer.privacy import register_file as file
from xpeer.privacy.accountant import Segment
from xpeer.privacy.histories import (
    DocumentClass,
    History,
    Joined,
    combined,
    missing,
    segments_of,
    undominated,
)

_SPAN: Final = "SELECT id FROM spans WHERE ledger_id = ? AND documents = ? AND unit = ?"
_CHARGE: Final = (
    "INSERT INTO charges VALUES (?1, ?2, ?3, ?4)"
    " ON CONFLICT (span, noise_multiplier, sampling_probability) DO UPDATE SET steps = steps + ?4"
)

Fits = Callable[[list[list[Segment]], Segment], bool]
"""Whether a charge still fits, after these histories."""


class BudgetExceededError(LocalError):
    """Others charged the same documents meanwhile, and this charge fits no longer."""


class Register:
    """Make with `Register.open`; safe to use from several threads and processes."""

    def __init__(self, path: Path, connection: sqlite3.Connection, key: bytes) -> None:
        self.path = path
        self._connection = connection
        self._key = key
        self._lock = threading.Lock()
        self._usable = True
        self._ledger_id, self._unit, self._span = "", "record", 0
        self._writes = 0
        self._others: list[History] = []
        self._shared = False

    @classmethod
    def open(cls, folder: Path) -> Register:
        """Open the register in a folder, or begin one.

        Raises:
            ConfigError: the folder can't be used.
            LocalError: the register is damaged, or its key is missing or another's.
        """
        key = file.key_of(folder)
        path = folder / file.NAME
        connection = file.opened(path, key)
        return cls(path, connection, key)

    @classmethod
    def look(cls, folder: Path) -> Register | None:
        """Open it to read, while nodes run or not; None if there is none.

        Raises:
            LocalError: it is damaged.
        """
        path = folder / file.NAME
        if not path.exists():
            return None
        register = cls(path, file.looked(path), file.key_of(folder))
        register._usable = False
        return register

    def join(
        self,
        ledger_id: str,
        charged: Sequence[Segment],
        documents: Iterable[str],
        unit: str = "record",
        swarm_id: str = "",
    ) -> Joined:
        """Say which documents this home's next charges are for; durable when this returns.

        Cheap if they are those of an earlier start: then no document is looked up.

        Args:
            ledger_id: of the home.
            charged: what its ledger holds.
            documents: their ids, in any order, repeats allowed.
            unit: that epsilon holds for: "record", "document" or "shard".
            swarm_id: for reports.

        Raises:
            ConfigError: these documents were charged for another unit.
            LocalError: it can't be written.
        """
        hashes = sorted({self._hash(document) for document in documents})
        digest = hashlib.blake2b(b"".join(hashes), digest_size=16).digest()
        self._ledger_id, self._unit = ledger_id, unit
        with self._lock, self._transaction() as run:
            lacking = missing(charged, self._own())
            known = run(_SPAN, (ledger_id, digest, unit)).fetchone()
            new = 0
            if known is None or lacking:
                file.stage(run, hashes)
                if known is None:
                    self._span = self._begin(swarm_id, digest)
                    new = file.add_span(run, self._span)
                else:
                    self._span = int(known[0])
                if lacking:
                    self._recover(lacking, swarm_id)
                file.unstage(run)
            else:
                self._span = int(known[0])
            run("UPDATE spans SET joined = (SELECT writes FROM head) WHERE id = ?", (self._span,))
            self._refuse_other_units()
            self._written()
        with self._lock:
            self._others = self._of_others()
            self._shared = False
            elsewhere = sum(c.documents for c in self._classes() if c.here and c.ledgers > 1)
        return Joined(
            documents=len(hashes),
            new=new,
            elsewhere=elsewhere,
            recovered_steps=sum(lacking.values()),
        )

    def histories(self) -> list[list[Segment]]:
        """What was charged to documents of the shard as it was joined: one for each class whose
        documents may have lost most.
        """
        with self._lock, file.told(self.path):
            return self._histories()

    def looked_up(self, ledger_id: str) -> list[list[Segment]]:
        """`histories` of a home's shard as it last started; none if it never did."""
        with self._lock, file.told(self.path):
            self._find(ledger_id)
            return self._histories() if self._span else []

    def classes(self, ledger_id: str) -> list[DocumentClass]:
        """All documents that a home ever had, those of its shard now first."""
        with self._lock, file.told(self.path):
            self._find(ledger_id)
            return sorted(self._classes(), key=lambda found: not found.here)

    def of_documents(self, documents: Iterable[str]) -> dict[str, list[Segment]]:
        """What all homes charged to documents, by id; none to those that were never seen."""
        with self._lock, file.told(self.path):
            charges = self._charges()
            known = {
                number: segments_of(combined(charges, spans))
                for number, spans in self._class_rows()
            }
            found = {}
            for document in documents:
                row = self._connection.execute(
                    "SELECT class FROM documents WHERE hash = ?", (self._hash(document),)
                ).fetchone()
                found[document] = known[row[0]] if row else []
            return found

    def steps_of(self, ledger_id: str) -> int:
        """Steps that a home charged, as far as the register knows."""
        with self._lock, file.told(self.path):
            self._ledger_id = ledger_id
            return sum(self._own().values())

    def charge(self, segment: Segment, fits: Fits | None = None) -> None:
        """Charge steps to all documents of the shard; durable when this returns.

        Args:
            segment: the steps.
            fits: asked if other homes charged some of these documents since `join`.

        Raises:
            BudgetExceededError: it does not fit; nothing was charged.
            ConfigError: others charged these documents for another unit meanwhile.
            LocalError: it can't be written, or nothing was joined.
        """
        if not self._span:
            raise LocalError(f"privacy register {self.path}: charged before it was joined")
        with self._lock, self._transaction() as run:
            if self._read_writes() != self._writes and not self._shared:
                self._shared = self._of_others() != self._others
            if self._shared:
                self._refuse_other_units()
            if self._shared and fits is not None and not fits(self._histories(), segment):
                raise BudgetExceededError("the privacy budget of documents in this shard is spent")
            kind = segment.noise_multiplier, segment.sampling_probability
            run(_CHARGE, (self._span, *kind, segment.steps))
            self._written()

    @property
    def shared(self) -> bool:
        """Whether others charged some of these documents between `join` and our last charge."""
        return self._shared

    def close(self) -> None:
        """Close the file."""
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

    # ---- in a transaction, or under the lock ---------------------------------------------------

    def _find(self, ledger_id: str) -> None:
        newest = self._connection.execute(
            "SELECT id, unit FROM spans WHERE ledger_id = ? ORDER BY joined DESC LIMIT 1",
            (ledger_id,),
        ).fetchone()
        self._ledger_id = ledger_id
        self._span, self._unit = (int(newest[0]), str(newest[1])) if newest else (0, "record")

    def _hash(self, document: str) -> bytes:
        return hashlib.blake2b(document.encode(), key=self._key, digest_size=16).digest()

    def _own(self) -> History:
        rows = self._connection.execute(
            "SELECT noise_multiplier, sampling_probability, sum(steps) FROM charges"
            " JOIN spans ON spans.id = span WHERE ledger_id = ? GROUP BY 1, 2",
            (self._ledger_id,),
        )
        return {(sigma, q): steps for sigma, q, steps in rows}

    def _begin(self, swarm_id: str, digest: bytes) -> int:
        made = self._connection.execute(
            "INSERT INTO spans (ledger_id, documents, unit, swarm_id, begun_unix_s, joined)"
            " VALUES (?, ?, ?, ?, ?, -1)",
            (self._ledger_id, digest, self._unit, swarm_id, time.time()),
        ).lastrowid
        if made is None:
            raise LocalError(f"privacy register {self.path}: no span was made")
        return made

    def _recover(self, lacking: History, swarm_id: str) -> None:
        """Nobody knows to which documents these steps were charged: to all that the home ever had,
        as far as is known, and to those it has now.
        """
        before = self._spans_of_this_ledger()
        span = self._begin(swarm_id, b"recovered")
        for (sigma, q), steps in lacking.items():
            self._connection.execute(_CHARGE, (span, sigma, q, steps))
        for number, spans in self._class_rows():
            if before & set(spans):
                self._connection.execute(
                    "UPDATE classes SET spans = ? WHERE id = ?",
                    (file.packed([*spans, span]), number),
                )
        file.add_span(self._connection.execute, span)

    def _refuse_other_units(self) -> None:
        spans = self._together()
        rows = self._connection.execute(
            "SELECT DISTINCT spans.id, unit, swarm_id FROM spans"
            " JOIN charges ON spans.id = charges.span WHERE unit != ?",
            (self._unit,),
        )
        for span, unit, swarm_id in rows:
            if span in spans:
                raise ConfigError(
                    f"documents of this shard were charged for privacy of each {unit} in swarm "
                    f"{swarm_id[:16]}, this swarm counts for each {self._unit}: these don't add up",
                    f"train on other documents, or in a swarm with privacy of each {unit}",
                )

    def _histories(self) -> list[list[Segment]]:
        charges = self._charges()
        if self._unit == "shard":
            found = [combined(charges, self._together())]
        else:
            found = [combined(charges, spans) for _, spans in self._class_rows(self._span)]
        return [segments_of(history) for history in undominated(found)]

    def _of_others(self) -> list[History]:
        """What other homes charged to documents of this shard."""
        charges = self._charges()
        own = self._spans_of_this_ledger()
        found = [combined(charges, set(s) - own) for _, s in self._class_rows(self._span)]
        return undominated([history for history in found if history])

    def _classes(self) -> list[DocumentClass]:
        charges, own = self._charges(), self._spans_of_this_ledger()
        owners = {
            int(number): (str(ledger_id), str(swarm_id))
            for number, ledger_id, swarm_id in self._connection.execute(
                "SELECT id, ledger_id, swarm_id FROM spans"
            )
        }
        counts = dict(self._connection.execute("SELECT id, documents FROM classes").fetchall())
        found = []
        for number, spans in self._class_rows():
            if not own & set(spans):
                continue
            charged = [owners[span] for span in spans if charges.get(span)]
            found.append(
                DocumentClass(
                    documents=counts[number],
                    here=self._span in spans,
                    segments=segments_of(combined(charges, spans)),
                    ledgers=len({ledger_id for ledger_id, _ in charged} | {self._ledger_id}),
                    swarms=sorted({swarm_id for _, swarm_id in charged}),
                )
            )
        return found

    def _charges(self) -> dict[int, History]:
        found: dict[int, History] = {}
        for span, sigma, q, steps in self._connection.execute("SELECT * FROM charges"):
            found.setdefault(span, {})[sigma, q] = steps
        return found

    def _class_rows(self, span: int | None = None) -> list[tuple[int, list[int]]]:
        """Classes that have documents, or of these those of a span."""
        rows = self._connection.execute("SELECT id, spans FROM classes WHERE documents > 0")
        found = [(int(number), file.unpacked(spans)) for number, spans in rows]
        return [(number, spans) for number, spans in found if span is None or span in spans]

    def _spans_of_this_ledger(self) -> set[int]:
        rows = self._connection.execute(
            "SELECT id FROM spans WHERE ledger_id = ?", (self._ledger_id,)
        )
        return {int(number) for (number,) in rows}

    def _together(self) -> Collection[int]:
        """Spans that share a document with this shard, and all of this home."""
        shared = {span for _, spans in self._class_rows(self._span) for span in spans}
        return shared | self._spans_of_this_ledger() if self._unit == "shard" else shared

    def _read_writes(self) -> int:
        return int(self._connection.execute("SELECT writes FROM head").fetchone()[0])

    def _written(self) -> None:
        self._connection.execute("UPDATE head SET writes = writes + 1")
        self._writes = self._read_writes()

    @contextmanager
    def _transaction(self) -> Iterator[file.Run]:
        if not self._usable:
            raise LocalError(f"privacy register {self.path} is closed or failed before", file.MEND)
        written = False
        try:
            with file.told(self.path):
                self._connection.execute("BEGIN IMMEDIATE")
                yield self._connection.execute
                self._connection.execute("COMMIT")
            written = True
        except (BudgetExceededError, ConfigError):
            self._connection.rollback()
            written = True  # nothing was
            raise
        finally:
            if not written:  # what reached the disk is unknown
                self._usable = False
                if self._connection.in_transaction:
                    self._connection.rollback()
