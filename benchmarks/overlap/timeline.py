"""What a trainer wrote down before every step, and what follows from it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Row:
    """Before a step: the time, and what was spent since the trainer's start, in seconds."""

    at: float
    """Of the shared clock."""
    step: int
    compute: float
    snapshot: float
    merge: float
    blocked: float
    """Waiting for a lock or for the ledger, as the trainer counts it."""
    boundary: float
    """In everything between two steps that was asked for by another thread."""
    core: float
    """Used by the training thread on a processor, but for computing."""
    merges: int
    steps_late: float
    """Mean steps from snapshot to merge."""


@dataclass(frozen=True, slots=True)
class Shares:
    """Of the wall-clock between two rows, unless said otherwise."""

    steps: int
    seconds: float
    steps_per_s: float
    merges: int
    steps_late: float
    """Mean steps from snapshot to merge."""
    compute: float
    snapshot: float
    merge: float
    blocked: float
    other: float
    """The rest: progress messages and the loop itself, and waiting that nobody counts: for Python's
    interpreter lock, or for a core."""
    off_core: float
    """Neither computing nor on a core: all waiting, whoever counts it. An upper bound of `blocked`
    that does not rest on the trainer's own counters."""


def read(path: Path) -> list[Row]:
    """All complete rows."""
    if not path.exists():
        return []
    lines = path.read_text().splitlines(keepends=True)
    return [Row(**json.loads(line)) for line in lines if line.endswith("\n")]


def shares(rows: Sequence[Row]) -> Shares:
    """Of the time from the first to the last.

    Args:
        rows: two at least, of one trainer.
    """
    first, last = rows[0], rows[-1]
    seconds, merges = last.at - first.at, last.merges - first.merges
    spent = {
        name: (getattr(last, name) - getattr(first, name)) / seconds
        for name in ("compute", "snapshot", "merge", "blocked")
    }
    late = last.steps_late * last.merges - first.steps_late * first.merges
    return Shares(
        steps=last.step - first.step,
        seconds=seconds,
        steps_per_s=(last.step - first.step) / seconds,
        merges=merges,
        steps_late=late / merges if merges else 0.0,
        **spent,
        # waiting for a lock is part of the snapshot's or the merge's time already
        other=1.0 - spent["compute"] - spent["snapshot"] - spent["merge"],
        off_core=1.0 - spent["compute"] - (last.core - first.core) / seconds,
    )


def milliseconds(rows: Sequence[Row]) -> dict[str, list[float]]:
    """Of every step: what it took beside computing, by kind."""
    kinds: dict[str, list[float]] = {"snapshot": [], "merge": [], "other": []}
    for before, after in pairwise(rows):
        copied = {kind: getattr(after, kind) - getattr(before, kind) for kind in list(kinds)[:2]}
        beside = after.at - before.at - (after.compute - before.compute)
        for kind, seconds in {**copied, "other": beside - sum(copied.values())}.items():
            kinds[kind].append(round(1e3 * seconds, 2))
    return kinds
