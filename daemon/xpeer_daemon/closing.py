"""When a run is over: the closing consolidation, as a rule without IO.

A peer whose own training ended goes on mixing. Once every live member has ended, all of them mix
2*ceil(log2 N) more windows without training, so that everybody holds nearly the same model.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable

from xpeer.phase import traits_of

_ENOUGH = 1 << 30


def closing_windows(num_peers: int, configured: int | None) -> int:
    """Windows of mixing at the end (algorithms: 2*ceil(log2 N))."""
    if configured is not None:
        return configured
    return 2 * math.ceil(math.log2(num_peers)) if num_peers > 1 else 0


class Closing:
    """Counts the exchanges of one peer's closing consolidation.

    Args:
        fragments: F.
        configured: `round.closing_windows` of the manifest.
        least: members, ourselves included, that a merge needs: `Round.least_group`.
    """

    def __init__(self, fragments: int, configured: int | None, least: int = 2) -> None:
        self.fragments = fragments
        self._configured = configured
        self._least = least
        self._merged: Counter[int] = Counter()

    def begin(self) -> None:
        """The trainer was started again: nothing of this counts."""
        self._merged.clear()

    def merged(self, fragment: int) -> None:
        """One more merge of this fragment while everybody had ended."""
        self._merged[fragment] += 1

    def give_up(self, fragment: int) -> None:
        """Masks: no group that we could still be in may see this fragment again."""
        self._merged[fragment] = _ENOUGH

    def finished(self, other_phases: Iterable[str]) -> bool:
        """Whether consolidation is complete, given the phases of the other live members.

        With nobody else alive, or too few, there is nobody to mix with: complete. With somebody
        still training: not yet.
        """
        phases = list(other_phases)
        if not all(traits_of(phase).ended for phase in phases):
            return False
        if 1 + len(phases) < self._least:
            return True
        needed = closing_windows(1 + len(phases), self._configured)
        return all(self._merged[fragment] >= needed for fragment in range(self.fragments))
