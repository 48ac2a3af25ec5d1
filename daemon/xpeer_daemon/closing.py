"""When closing is complete: a rule without IO.

A member whose own training has ended goes on mixing. Once every live member has ended, all of them
exchange each fragment 2*ceil(log2 N) more times without training, so that everybody holds nearly
the same model.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable

from xpeer.phase import traits_of

_ENOUGH = 1 << 30
_NO_SLOT = -1


def closing_windows(num_peers: int, configured: int | None) -> int:
    """Number of merges of each fragment at the end: as configured, else 2*ceil(log2 N)."""
    if configured is not None:
        return configured
    return 2 * math.ceil(math.log2(num_peers)) if num_peers > 1 else 0


class Closing:
    """Counts one node's merges while it closes.

    Args:
        fragments: F.
        configured: `round.closing_windows` of the manifest; None = by the number of members.
        least: number of members, ourselves included, that a merge needs: `Round.least_group`.
    """

    def __init__(self, fragments: int, configured: int | None, least: int = 2) -> None:
        self.fragments = fragments
        self._configured = configured
        self._least = least
        self._merged: dict[int, Counter[int]] = defaultdict(Counter)
        """Merges by fragment, then by slot."""

    def begin(self) -> None:
        """Begin to count anew: the trainer was started again, and its merges may be lost."""
        self._merged.clear()

    def merged(self, fragment: int, slot: int) -> None:
        """Count an exchange of this fragment. Called only once every live member has ended."""
        self._merged[fragment][slot] += 1

    def failed(self, fragment: int, slot: int) -> None:
        """Count the slot's exchanges no longer: its meeting merged nothing."""
        self._merged[fragment].pop(slot, None)

    def give_up(self, fragment: int) -> None:
        """Count a fragment as complete: with masks, no group may see its values again."""
        self._merged[fragment][_NO_SLOT] = _ENOUGH

    def finished(self, other_phases: Iterable[str]) -> bool:
        """Whether closing is complete, given the phases of the other live members.

        It is not while one of them still trains. It is if there are too few members for a merge.
        """
        phases = list(other_phases)
        if not all(traits_of(phase).ended for phase in phases):
            return False
        if 1 + len(phases) < self._least:
            return True
        needed = closing_windows(1 + len(phases), self._configured)
        return all(self._merged[each].total() >= needed for each in range(self.fragments))
