"""What daemons and trainers wrote down, and what follows from it."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeVar

TIMELINE: Final = "timeline.jsonl"
PIECES: Final = "pieces.jsonl"
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Row:
    """Before a step: the time, and what the trainer has used since its start, in seconds."""

    at: float
    """Of the machine's clock, which all hosts share."""
    step: int
    tokens: int
    cpu_s: float
    """On a processor, by all threads."""
    blocked_s: float
    """That the training thread waited for a lock or the ledger, as the trainer counts it."""
    copies: int
    """Made for joiners."""
    copy_s: float
    """That the training thread spent on them."""
    copy_cpu_s: float
    """On a processor, by all threads, for them."""
    copy_waits: int
    """How often the training thread waited for anything while it made them."""
    distance: float | None = None
    """To the partner of the last exchange, on its fragment; None before the first one."""


@dataclass(frozen=True, slots=True)
class Came:
    """A piece that came to a joiner, or an offer that it asked for."""

    at: float
    piece: int | None
    """None: it asked for an offer."""
    num_bytes: int
    donor: str


@dataclass(frozen=True, slots=True)
class Transfer:
    """What came to a joiner."""

    began: float
    """When it asked for the first offer."""
    ended: float
    """When the last piece came."""
    num_bytes: int
    """Of all pieces, each counted once."""
    pieces: int
    pieces_twice: int
    """How many came though they were there."""
    by_donor: dict[str, int]
    """Pieces that came from each."""

    @property
    def seconds(self) -> float:
        """From the first offer that was asked for to the last piece."""
        return self.ended - self.began

    @property
    def mbit_per_s(self) -> float:
        """Bits of pieces in that time, 10^6 a second."""
        return self.num_bytes * 8e-6 / self.seconds


def read(path: Path, kind: type[_T]) -> list[_T]:
    """All complete rows."""
    if not path.exists():
        return []
    lines = path.read_text().splitlines(keepends=True)
    return [kind(**json.loads(line)) for line in lines if line.endswith("\n")]


def transfer(rows: Sequence[Came]) -> Transfer:
    """The transfer that these rows tell of; it is complete."""
    sizes: dict[int, int] = {}
    by_donor: dict[str, int] = {}
    twice = 0
    for row in rows:
        if row.piece is None:
            continue
        twice += row.piece in sizes
        sizes[row.piece] = row.num_bytes
        by_donor[row.donor] = by_donor.get(row.donor, 0) + 1
    return Transfer(
        began=rows[0].at,
        ended=max(row.at for row in rows if row.piece is not None),
        num_bytes=sum(sizes.values()),
        pieces=len(sizes),
        pieces_twice=twice,
        by_donor=by_donor,
    )


def around(rows: Sequence[Row], began: float, ended: float) -> list[Row]:
    """The rows of whole steps that cover a time: as much as is there."""
    first = max((n for n, row in enumerate(rows) if row.at <= began), default=0)
    last = min((n for n, row in enumerate(rows) if row.at >= ended), default=len(rows) - 1)
    return list(rows[first : last + 1])


def usual_distance(rows: Sequence[Row]) -> float:
    """The median of distances that a donor's exchanges found; one at least."""
    return statistics.median(row.distance for row in rows if row.distance is not None)


def in_step(rows: Sequence[Row], near: float) -> Row | None:
    """The first row of a joiner whose last exchange found it so near to its partner."""
    return next((r for r in rows if r.distance is not None and r.distance <= near), None)


def distances(rows: Sequence[Row], window_steps: int) -> list[tuple[float, float]]:
    """What each of a joiner's exchanges found: windows since the import, and the distance."""
    found: list[tuple[float, float]] = []
    for row in rows:
        if row.distance is not None and (not found or row.distance != found[-1][1]):
            found.append((round((row.step - rows[0].step) / window_steps, 2), row.distance))
    return found


def spent(rows: Sequence[Row]) -> dict[str, float]:
    """What a donor used between the first row and the last; two at least."""
    first, last = rows[0], rows[-1]
    cpu_s = last.cpu_s - first.cpu_s
    return {
        "steps": last.step - first.step,
        "seconds": last.at - first.at,
        "cpu_s": cpu_s,
        "tokens_per_cpu_s": (last.tokens - first.tokens) / cpu_s,
        "blocked_s": last.blocked_s - first.blocked_s,
        "copies": last.copies - first.copies,
        "copy_s": last.copy_s - first.copy_s,
        "copy_cpu_s": last.copy_cpu_s - first.copy_cpu_s,
        "copy_cpu_share": (last.copy_cpu_s - first.copy_cpu_s) / cpu_s,
        "copy_waits": last.copy_waits - first.copy_waits,
    }


def summary_of(run: dict[str, Any]) -> dict[str, Any]:
    """The keys that the docs name, of one run: medians over donors, and the worst one's waits."""
    donors = [each for each in run["donors"].values() if "during" in each]
    kept = [
        each["during"]["tokens_per_cpu_s"] / each["before"]["tokens_per_cpu_s"] for each in donors
    ]
    during = [each["during"] for each in donors]
    return {
        **{name: run[name] for name in ("transfer_s", "bytes", "mbit_per_s", "pieces",
                                        "pieces_twice", "wire_ratio", "windows_to_step",
                                        "steps_behind")},
        "speed_kept": round(statistics.median(kept), 4),
        "copy_cpu_share": round(statistics.median(d["copy_cpu_share"] for d in during), 4),
        "copy_cpu_s": round(statistics.median(d["copy_cpu_s"] for d in during), 3),
        "copies": max(int(d["copies"]) for d in during),
        "copy_s": round(max(d["copy_s"] for d in during), 3),
        "copy_waits": max(int(d["copy_waits"]) for d in during),
        "blocked_s": round(max(d["blocked_s"] for d in during), 4),
    }  # fmt: skip
