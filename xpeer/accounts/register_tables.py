"""What the machine's register says, read from its tables; the owner of the connection locks."""

from __future__ import annotations

import sqlite3
from typing import Final

from xpeer.accounts import register_file as file
from xpeer.accounts.histories import ByUnit, DocumentClass, History, combined, segments_of, steps_of

RECOVERED: Final = b"recovered"
"""In the place of a span's documents: nobody knows which they were."""


class Tables:
    """Queries."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._run = connection.execute

    def writes(self) -> int:
        """How often anybody wrote."""
        return int(self._run("SELECT writes FROM head").fetchone()[0])

    def charges(self) -> dict[int, History]:
        """Of all spans."""
        found: dict[int, History] = {}
        for span, sigma, q, steps in self._run("SELECT * FROM charges"):
            found.setdefault(span, {})[sigma, q] = steps
        return found

    def own(self, ledger_id: str) -> ByUnit:
        """What a ledger charged."""
        rows = self._run(
            "SELECT unit, noise_multiplier, sampling_probability, sum(steps) FROM charges"
            " JOIN spans ON spans.id = span WHERE ledger_id = ? GROUP BY 1, 2, 3",
            (ledger_id,),
        )
        found: ByUnit = {}
        for unit, sigma, q, steps in rows:
            found.setdefault(unit, {})[sigma, q] = steps
        return found

    def counter(self, ledger_id: str) -> int:
        """The largest number of charges that was seen of a ledger."""
        row = self._run("SELECT counter FROM ledgers WHERE ledger_id = ?", (ledger_id,)).fetchone()
        return 0 if row is None else int(row[0])

    def class_rows(self, span: int | None = None) -> list[tuple[int, list[int]]]:
        """Classes that have documents, or of these those of a span: number, spans."""
        rows = self._run("SELECT id, spans FROM classes WHERE documents > 0")
        found = [(int(number), file.unpacked(spans)) for number, spans in rows]
        return [(number, spans) for number, spans in found if span is None or span in spans]

    def documents_of(self, span: int) -> int:
        """How many documents a span has; looks at all that the register knows.

        0 if classes and documents disagree: pages of several times are mixed.
        """
        there = dict(self._run("SELECT class, count(*) FROM documents GROUP BY class").fetchall())
        told = dict(self._run("SELECT id, documents FROM classes").fetchall())
        classes = [number for number, _ in self.class_rows(span)]
        agree = all(told[number] == there.get(number) for number in classes)
        return sum(told[number] for number in classes) if agree else 0

    def class_of(self, hashed: bytes) -> int | None:
        """Of a document; None if it was never seen."""
        row = self._run("SELECT class FROM documents WHERE hash = ?", (hashed,)).fetchone()
        return None if row is None else int(row[0])

    def spans_of(self, ledger_id: str, documents: bytes | None = None) -> set[int]:
        """All of a ledger, or of these those with this digest of documents."""
        rows = self._run("SELECT id, documents FROM spans WHERE ledger_id = ?", (ledger_id,))
        return {int(number) for number, digest in rows if documents in (None, digest)}

    def newest(self, ledger_id: str) -> tuple[int, str]:
        """The span that a ledger joined last, and its unit; 0 if it never did."""
        row = self._run(
            "SELECT id, unit FROM spans WHERE ledger_id = ? ORDER BY joined DESC LIMIT 1",
            (ledger_id,),
        ).fetchone()
        return (int(row[0]), str(row[1])) if row else (0, "record")

    def of_other_units(self, unit: str) -> list[tuple[int, str, str]]:
        """Spans that were charged for another unit: number, unit, swarm."""
        rows = self._run(
            "SELECT DISTINCT spans.id, unit, swarm_id FROM spans"
            " JOIN charges ON spans.id = charges.span WHERE unit != ?",
            (unit,),
        ).fetchall()
        # version 1 did not note how text was cut into records
        return [row for row in rows if row[1] != "record" or not unit.startswith("record of ")]

    def seen_by(
        self, ledger_id: str, span: int
    ) -> set[tuple[frozenset[int], frozenset[tuple[tuple[float, float], int]]]]:
        """What others charged, beside which spans of ours, for every class of a span."""
        charges, own = self.charges(), self.spans_of(ledger_id)
        return {
            (frozenset(own & set(spans)), frozenset(combined(charges, set(spans) - own).items()))
            for _, spans in self.class_rows(span)
        }

    def classes(self, ledger_id: str, span: int) -> list[DocumentClass]:
        """All documents that a ledger ever had; here = those of a span."""
        charges, own = self.charges(), self.spans_of(ledger_id)
        owners = {
            int(number): (str(owner), str(swarm_id))
            for number, owner, swarm_id in self._run("SELECT id, ledger_id, swarm_id FROM spans")
        }
        counts = dict(self._run("SELECT id, documents FROM classes").fetchall())
        found = []
        for number, spans in self.class_rows():
            if not own & set(spans):
                continue
            charged = [owners[each] for each in spans if charges.get(each)]
            found.append(
                DocumentClass(
                    documents=counts[number],
                    here=span in spans,
                    segments=segments_of(combined(charges, spans)),
                    own=segments_of(combined(charges, own & set(spans))),
                    ledgers=len({owner for owner, _ in charged} | {ledger_id}),
                    swarms=sorted({swarm_id for _, swarm_id in charged}),
                )
            )
        return found

    def steps(self, ledger_id: str) -> int:
        """Of all of a ledger's charges."""
        return steps_of(self.own(ledger_id))
