"""What documents were charged, as numbers of steps by kind; and which of many accounts matter."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Final

from msgspec import Struct

from xpeer.accounts.accountant import Segment
from xpeer.leaves import Local, seen_by

History = dict[tuple[float, float], int]
"""Steps by (noise multiplier, sampling probability)."""
ByUnit = dict[str, History]
"""Steps by what epsilon holds for: charges for different units don't add up."""
_MOST: Final = 8
"""Histories that are accounted for one by one; each takes a second or so."""


@seen_by("home")
class DocumentClass(Struct, frozen=True, kw_only=True):
    """Documents of one history."""

    documents: Local[int]
    here: Local[bool]
    """Whether they are in the shard now, or were."""
    segments: Local[list[Segment]]
    own: Local[list[Segment]]
    """Of these, what the home itself charged."""
    ledgers: Local[int]
    """Homes that trained on them, this one included."""
    swarms: Local[list[str]]


@seen_by("home")
class DeclaredDocuments(Struct, frozen=True, kw_only=True):
    """What a start found."""

    documents: Local[int]
    new: Local[int]
    """Never seen on this machine."""
    elsewhere: Local[int]
    """That other homes trained on, too."""
    recovered: Local[ByUnit]
    """That the ledger holds and the register did not."""
    unknown_steps: Local[int]
    """Recovered now or earlier: they count for every document that this home ever has."""
    behind: Local[ByUnit]
    """That the register holds and the ledger does not."""
    counter: Local[int]
    """The largest number of charges that the register saw of the ledger."""

    @property
    def recovered_steps(self) -> int:
        """Of all kinds."""
        return steps_of(self.recovered)

    @property
    def steps_behind(self) -> int:
        """Of all kinds."""
        return steps_of(self.behind)


def combined(charges: Mapping[int, History], spans: Iterable[int]) -> History:
    """All steps of some spans."""
    total: History = {}
    for span in spans:
        for kind, steps in charges.get(span, {}).items():
            total[kind] = total.get(kind, 0) + steps
    return total


def missing(charged: Mapping[str, History], here: Mapping[str, History]) -> ByUnit:
    """What was charged, beyond what is here."""
    found: ByUnit = {}
    for unit, history in charged.items():
        known = here.get(unit, {})
        for kind, steps in history.items():
            if steps > known.get(kind, 0):
                found.setdefault(unit, {})[kind] = steps - known.get(kind, 0)
    return found


def steps_of(charged: Mapping[str, History]) -> int:
    """Of all units and kinds."""
    return sum(sum(history.values()) for history in charged.values())


def segments_of(history: History) -> list[Segment]:
    """As the accountant takes them."""
    return [Segment(sigma, q, steps) for (sigma, q), steps in history.items()]


def undominated(found: Sequence[History]) -> list[History]:
    """Those that may cost most: none has as many steps or more of every kind than another kept.

    Where many are left, the smaller are replaced by one that is at least as large as each of them,
    so that the answer errs upwards.
    """
    distinct = {frozenset(history.items()): history for history in found}
    kept: list[History] = []
    for history in sorted(distinct.values(), key=_steps, reverse=True):
        if not any(_within(history, other) for other in kept):
            kept.append(history)
    if len(kept) <= _MOST:
        return kept
    return undominated([*kept[: _MOST - 1], at_least(kept[_MOST - 1 :])])


def at_least(found: Iterable[History]) -> History:
    """The smallest history that covers each of these."""
    total: History = {}
    for history in found:
        for kind, steps in history.items():
            total[kind] = max(total.get(kind, 0), steps)
    return total


def _steps(history: History) -> int:
    return sum(history.values())


def _within(history: History, other: History) -> bool:
    return all(steps <= other.get(kind, 0) for kind, steps in history.items())
