"""What documents were charged, as numbers of steps by kind; and which of many accounts matter."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Final

from msgspec import Struct

from xpeer.privacy.accountant import Segment

History = dict[tuple[float, float], int]
"""Steps by (noise multiplier, sampling probability)."""
_MOST: Final = 8
"""Histories that are accounted for one by one; each takes a second or so."""


class DocumentClass(Struct, frozen=True, kw_only=True):
    """Documents of one history."""

    documents: int
    here: bool
    """Whether they are in the shard now, or were."""
    segments: list[Segment]
    ledgers: int
    """Homes that trained on them, this one included."""
    swarms: list[str]


class Joined(Struct, frozen=True, kw_only=True):
    """What a start found."""

    documents: int
    new: int
    """Never seen on this machine."""
    elsewhere: int
    """That other homes trained on, too."""
    recovered_steps: int
    """That the ledger holds and the register did not."""


def combined(charges: Mapping[int, History], spans: Iterable[int]) -> History:
    """All steps of some spans."""
    total: History = {}
    for span in spans:
        for kind, steps in charges.get(span, {}).items():
            total[kind] = total.get(kind, 0) + steps
    return total


def missing(charged: Iterable[Segment], here: History) -> History:
    """What was charged, beyond what is here."""
    found: History = {}
    for segment in charged:
        kind = segment.noise_multiplier, segment.sampling_probability
        if segment.steps > here.get(kind, 0):
            found[kind] = segment.steps - here.get(kind, 0)
    return found


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
    return undominated([*kept[: _MOST - 1], _at_least(kept[_MOST - 1 :])])


def _steps(history: History) -> int:
    return sum(history.values())


def _within(history: History, other: History) -> bool:
    return all(steps <= other.get(kind, 0) for kind, steps in history.items())


def _at_least(found: Sequence[History]) -> History:
    total: History = {}
    for history in found:
        for kind, steps in history.items():
            total[kind] = max(total.get(kind, 0), steps)
    return total
