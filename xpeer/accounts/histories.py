"""Charges of documents as numbers of steps by kind, and which of many such histories matter."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Final

from msgspec import Struct

from xpeer.accounts.accountant import Segment
from xpeer.leaves import Local, seen_by

History = dict[tuple[float, float], int]
"""Number of steps by (noise multiplier, sampling probability)."""
ByUnit = dict[str, History]
"""One history for each unit that epsilon holds for. Charges for different units don't add up."""
_MOST: Final = 8
"""Histories that `undominated` returns at most. The accountant takes about a second for each."""


@seen_by("home")
class DocumentClass(Struct, frozen=True, kw_only=True):
    """Documents that were charged alike, as one home sees them."""

    documents: Local[int]
    """Number of documents."""
    here: Local[bool]
    """True iff they are in the shard now. False: in an earlier shard only."""
    segments: Local[list[Segment]]
    """Charges of all homes."""
    of_home: Local[list[Segment]]
    """Charges of this home alone, which `segments` includes."""
    ledgers: Local[int]
    """Number of homes that trained on them, this one included."""
    swarms: Local[list[str]]
    """Ids of the swarms that they were charged in."""


@seen_by("home")
class DeclaredDocuments(Struct, frozen=True, kw_only=True):
    """Answer of the register when a home declares its documents."""

    documents: Local[int]
    """Number of documents declared."""
    new: Local[int]
    """Documents that no home of this machine ever declared before."""
    elsewhere: Local[int]
    """Documents that other homes of this machine also trained on."""
    recovered: Local[ByUnit]
    """Charges that were in the ledger but missing from the register. They are in both now."""
    unknown_steps: Local[int]
    """Steps recovered now or at an earlier start. They count for every document that this home ever
    has, since nobody knows which documents they were for."""
    behind: Local[ByUnit]
    """Charges that are in the register but missing from the ledger."""
    counter: Local[int]
    """The largest number of charges that the register ever saw in the ledger."""

    @property
    def recovered_steps(self) -> int:
        """Number of all steps in `recovered`."""
        return steps_of(self.recovered)

    @property
    def steps_behind(self) -> int:
        """Number of all steps in `behind`."""
        return steps_of(self.behind)


def combined(charges: Mapping[int, History], spans: Iterable[int]) -> History:
    """Add up the charges of some spans."""
    total: History = {}
    for span in spans:
        for kind, steps in charges.get(span, {}).items():
            total[kind] = total.get(kind, 0) + steps
    return total


def missing(charged: Mapping[str, History], here: Mapping[str, History]) -> ByUnit:
    """Steps in `charged` beyond those in `here`, by unit and kind."""
    lacking: ByUnit = {}
    for unit, history in charged.items():
        known = here.get(unit, {})
        for kind, steps in history.items():
            if steps > known.get(kind, 0):
                lacking.setdefault(unit, {})[kind] = steps - known.get(kind, 0)
    return lacking


def steps_of(charged: Mapping[str, History]) -> int:
    """Number of steps of all units and kinds."""
    return sum(sum(history.values()) for history in charged.values())


def segments_of(history: History) -> list[Segment]:
    """Convert a history into segments, as the accountant needs them."""
    return [Segment(sigma, q, steps) for (sigma, q), steps in history.items()]


def undominated(histories: Sequence[History]) -> list[History]:
    """Select the histories that may cost most.

    A history is dropped if another one has at least as many steps of every kind. If more than
    `_MOST` are left, the smaller ones are replaced by one history that covers each of them. So the
    answer errs upwards.
    """
    distinct = {frozenset(history.items()): history for history in histories}
    kept: list[History] = []
    for history in sorted(distinct.values(), key=_steps, reverse=True):
        if not any(_within(history, other) for other in kept):
            kept.append(history)
    if len(kept) <= _MOST:
        return kept
    return undominated([*kept[: _MOST - 1], at_least(kept[_MOST - 1 :])])


def at_least(histories: Iterable[History]) -> History:
    """The smallest history that covers each of these: the maximum for every kind of step."""
    total: History = {}
    for history in histories:
        for kind, steps in history.items():
            total[kind] = max(total.get(kind, 0), steps)
    return total


def _steps(history: History) -> int:
    return sum(history.values())


def _within(history: History, other: History) -> bool:
    return all(steps <= other.get(kind, 0) for kind, steps in history.items())
