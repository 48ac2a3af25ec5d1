"""How long we avoid a partner that failed: longer with every failure, an hour at most.

Every node decides by itself whom it avoids. That never changes whom the slot's matching names: an
avoided member stays in the roster, and whoever was to meet it meets a fallback. If every member
left out those that it avoids, two of them would no longer agree on who meets whom.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

COST: Final = 4.0
"""A pause is at least this many times as long as the failure took: a partner that stalls costs us
a fifth of our time at most, and less with every further failure."""
LONGEST_PAUSE_S: Final = 3600.0
MOST: Final = 10
"""Failures beyond this number are not counted: they neither lengthen the pause nor the way back."""
REFUSALS: Final = 8
"""Refusals in a row, without an exchange between them, that count as one failure. A partner that is
four times slower refuses three of four proposals, so eight in a row have a chance of one in ten."""
CLIPPED: Final = 2
"""After this many merges in a row whose difference was clipped, each one counts as a failure."""


@dataclass(slots=True)
class Backoff:
    """How long we avoid one partner."""

    failures: int = 0
    """Failures so far, `MOST` at most. Every exchange that is done halves them."""
    timeouts: int = 0
    """Timeouts in a row; each doubles the next deadline."""
    until_s: float = 0.0
    """When the current or last pause ends; 0 = there is none."""
    reason: str = ""
    """Reason code of that pause; "" until there is one."""
    shuns: bool = False
    """True iff the partner failed in an exchange that it had agreed to. Then we refuse its
    proposals as well during the pause."""
    _refused: int = 0
    _clipped: int = 0

    def active(self, now_s: float) -> bool:
        """Whether we avoid the partner now."""
        return now_s < self.until_s

    def timed_out(self) -> None:
        """An exchange took too long: the next deadline is later."""
        self.timeouts += 1

    def failed(
        self, now_s: float, turn_s: float, lost_s: float, reason: str, *, agreed: bool
    ) -> None:
        """Count a failed exchange, and begin a pause.

        Args:
            now_s: the time.
            turn_s: mean seconds between two slots in which the matching pairs us with the partner.
            lost_s: how long the failure took.
            reason: a reason code.
            agreed: the partner had agreed to the exchange; else it was not reached, or did not
                answer.
        """
        self.failures = min(MOST, self.failures + 1)
        pause_s = max(turn_s, COST * lost_s) * 2.0 ** (self.failures - 1)
        self.until_s = max(self.until_s, now_s + min(LONGEST_PAUSE_S, pause_s))
        self.reason, self.shuns = reason, agreed

    def refused(self, now_s: float, turn_s: float, reason: str) -> None:
        """Count a refused proposal. A healthy member may refuse; one that always does is not asked
        for a while. It may still propose.
        """
        self._refused += 1
        if self._refused >= REFUSALS:
            self._refused = 0
            self.failed(now_s, turn_s, 0.0, reason, agreed=False)

    def done(self, now_s: float, turn_s: float, *, clipped: bool) -> None:
        """Count a merged exchange: it ends the pause, unless the difference was clipped."""
        self._refused = self.timeouts = 0
        if clipped:
            self._clipped += 1
            if self._clipped >= CLIPPED:
                self.failed(now_s, turn_s, 0.0, "clipped", agreed=True)
            return
        self._clipped = 0
        self.failures //= 2
        self.until_s = 0.0
