"""Queries on the tables of the machine's register. The caller holds the connection's lock."""

from __future__ import annotations

import sqlite3
from typing import Final

from xpeer.accounts import register_file as file
from xpeer.accounts.histories import ByUnit, DocumentClass, History, combined, segments_of, steps_of

RECOVERED: Final = b"recovered"
"""Digest of a span whose documents are unknown."""


class Tables:
    """Queries on one connection."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._run = connection.execute

    def writes(self) -> int:
        """Number of writes by all homes."""
        return int(self._run("SELECT writes FROM head").fetchone()[0])

    def charges(self) -> dict[int, History]:
        """Steps charged, by span, then (sigma, q)."""
        by_span: dict[int, History] = {}
        for span, sigma, q, steps in self._run("SELECT * FROM charges"):
            by_span.setdefault(span, {})[sigma, q] = steps
        return by_span

    def of_home(self, ledger_id: str) -> ByUnit:
        """Steps that one ledger charged, by unit, then (sigma, q)."""
        rows = self._run(
            "SELECT unit, noise_multiplier, sampling_probability, sum(steps) FROM charges"
            " JOIN spans ON spans.id = span WHERE ledger_id = ? GROUP BY 1, 2, 3",
            (ledger_id,),
        )
        by_unit: ByUnit = {}
        for unit, sigma, q, steps in rows:
            by_unit.setdefault(unit, {})[sigma, q] = steps
        return by_unit

    def counter(self, ledger_id: str) -> int:
        """The largest number of charges that the register ever saw in a ledger."""
        row = self._run("SELECT counter FROM ledgers WHERE ledger_id = ?", (ledger_id,)).fetchone()
        return 0 if row is None else int(row[0])

    def class_rows(self, span: int | None = None) -> list[tuple[int, list[int]]]:
        """Classes that have documents, as (number, spans).

        Args:
            span: only classes with this span; None = all.
        """
        rows = self._run("SELECT id, spans FROM classes WHERE documents > 0")
        classes = [(int(number), file.unpacked(spans)) for number, spans in rows]
        return [(number, spans) for number, spans in classes if span is None or span in spans]

    def documents_of(self, span: int) -> int:
        """Number of documents of a span. Reads all documents of the register.

        0 if the tables of classes and of documents disagree: then the file mixes pages of different
        points in time.
        """
        counted = dict(self._run("SELECT class, count(*) FROM documents GROUP BY class").fetchall())
        noted = dict(self._run("SELECT id, documents FROM classes").fetchall())
        classes = [number for number, _ in self.class_rows(span)]
        agree = all(noted[number] == counted.get(number) for number in classes)
        return sum(noted[number] for number in classes) if agree else 0

    def class_of(self, hashed: bytes) -> int | None:
        """The class of a document; None if no home ever declared it."""
        row = self._run("SELECT class FROM documents WHERE hash = ?", (hashed,)).fetchone()
        return None if row is None else int(row[0])

    def spans_of(self, ledger_id: str, documents: bytes | None = None) -> set[int]:
        """Numbers of a ledger's spans.

        Args:
            ledger_id: the ledger.
            documents: only spans with this digest of documents; None = all.
        """
        rows = self._run("SELECT id, documents FROM spans WHERE ledger_id = ?", (ledger_id,))
        return {int(number) for number, digest in rows if documents in (None, digest)}

    def newest(self, ledger_id: str) -> tuple[int, str]:
        """The span of a ledger's last declaration, and its unit; (0, "record") without any."""
        row = self._run(
            "SELECT id, unit FROM spans WHERE ledger_id = ? ORDER BY joined DESC LIMIT 1",
            (ledger_id,),
        ).fetchone()
        return (int(row[0]), str(row[1])) if row else (0, "record")

    def of_other_units(self, unit: str) -> list[tuple[int, str, str]]:
        """Spans that were charged for another unit, as (number, unit, swarm)."""
        rows = self._run(
            "SELECT DISTINCT spans.id, unit, swarm_id FROM spans"
            " JOIN charges ON spans.id = charges.span WHERE unit != ?",
            (unit,),
        ).fetchall()
        # a bare "record" (schema 1) may be the same unit: not refused
        return [row for row in rows if row[1] != "record" or not unit.startswith("record of ")]

    def seen_by(
        self, ledger_id: str, span: int
    ) -> set[tuple[frozenset[int], frozenset[tuple[tuple[float, float], int]]]]:
        """The state of other homes' charges to the documents of a span, to compare it later.

        Returns:
            For every class of the span: our spans in the class, with the steps that others charged
            to it, by (sigma, q).
        """
        charges, own = self.charges(), self.spans_of(ledger_id)
        return {
            (frozenset(own & set(spans)), frozenset(combined(charges, set(spans) - own).items()))
            for _, spans in self.class_rows(span)
        }

    def classes(self, ledger_id: str, span: int) -> list[DocumentClass]:
        """All documents that a ledger ever had, by class.

        Args:
            ledger_id: the ledger.
            span: documents of this span are `here`.
        """
        charges, own = self.charges(), self.spans_of(ledger_id)
        owners = {
            int(number): (str(owner), str(swarm_id))
            for number, owner, swarm_id in self._run("SELECT id, ledger_id, swarm_id FROM spans")
        }
        counts = dict(self._run("SELECT id, documents FROM classes").fetchall())
        classes = []
        for number, spans in self.class_rows():
            if not own & set(spans):
                continue
            charged = [owners[each] for each in spans if charges.get(each)]
            classes.append(
                DocumentClass(
                    documents=counts[number],
                    here=span in spans,
                    segments=segments_of(combined(charges, spans)),
                    of_home=segments_of(combined(charges, own & set(spans))),
                    ledgers=len({owner for owner, _ in charged} | {ledger_id}),
                    swarms=sorted({swarm_id for _, swarm_id in charged}),
                )
            )
        return classes

    def steps(self, ledger_id: str) -> int:
        """Number of steps that a ledger charged."""
        return steps_of(self.of_home(ledger_id))
