"""How long a partner that fails us is left alone: longer with every failure, bounded, forgiven.

Leaving alone is this node's own business. It never changes whom the slot's matching names: a member
that is avoided stays in the roster, and whoever was to meet it takes a fallback. If every member
left out those that it avoids, two of them would no longer agree on who meets whom.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

COST: Final = 4.0
"""A pause is at least this many times as long as the failure took: a partner that stalls costs no
more than a fifth of the time spent on it, and less with every further failure."""
LONGEST_PAUSE_S: Final = 3600.0
MOST: Final = 10
"""Failures that count; more make no longer pause and take no longer to forgive."""
REFUSALS: Final = 8
"""Refusals in a row, with nothing exchanged between, that count as a failure. A partner that is
four times slower refuses three of four proposals, so that eight in a row are one in ten."""
CLIPPED: Final = 2
"""From so many merges in a row whose difference was clipped, each one counts as a failure."""


@dataclass(slots=True)
class Backoff:
    """Of one partner."""

    failures: int = 0
    """Halved by every exchange that is done."""
    timeouts: int = 0
    """In a row; each doubles the next deadline."""
    until_s: float = 0.0
    reason: str = ""
    """Of the pause that ends then."""
    shuns: bool = False
    """It failed in exchanges that it had agreed to: its own proposals are refused, too."""
    _refused: int = 0
    _clipped: int = 0

    def active(self, now_s: float) -> bool:
        """Whether it is left alone now."""
        return now_s < self.until_s

    def timed_out(self) -> None:
        """An exchange took too long: the next deadline is later."""
        self.timeouts += 1

    def failed(
        self, now_s: float, turn_s: float, lost_s: float, reason: str, *, agreed: bool
    ) -> None:
        """An exchange failed.

        Args:
            now_s: the time.
            turn_s: between two meetings that the matching gives us with it, on average.
            lost_s: how long the failure took.
            reason: a reason code.
            agreed: it had agreed to the exchange; else it was not reached, or did not answer.
        """
        self.failures = min(MOST, self.failures + 1)
        pause_s = max(turn_s, COST * lost_s) * 2.0 ** (self.failures - 1)
        self.until_s = max(self.until_s, now_s + min(LONGEST_PAUSE_S, pause_s))
        self.reason, self.shuns = reason, agreed

    def refused(self, now_s: float, turn_s: float, reason: str) -> None:
        """It refused a proposal, as a healthy member may; one that always does is not asked for a
        while. It may still propose.
        """
        self._refused += 1
        if self._refused >= REFUSALS:
            self._refused = 0
            self.failed(now_s, turn_s, 0.0, reason, agreed=False)

    def done(self, now_s: float, turn_s: float, *, clipped: bool) -> None:
        """An exchange was merged."""
        self._refused = self.timeouts = 0
        if clipped:
            self._clipped += 1
            if self._clipped >= CLIPPED:
                self.failed(now_s, turn_s, 0.0, "clipped", agreed=True)
            return
        self._clipped = 0
        self.failures //= 2
        self.until_s = 0.0
