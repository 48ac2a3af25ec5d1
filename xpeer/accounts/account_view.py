"""A ledger and the machine's register, read together: where they differ, whichever says more.

They differ while one of them was restored from an older copy and the node has not started since.
"""

from __future__ import annotations

import time
from typing import Final

from xpeer.accounts.accountant import Segment
from xpeer.accounts.histories import (
    ByUnit,
    DocumentClass,
    History,
    at_least,
    combined,
    missing,
    segments_of,
    steps_of,
    undominated,
)
from xpeer.accounts.ledger import Ledger
from xpeer.accounts.register import Register

PATIENCE_S: Final = (0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
"""A running node charges the register first, and its ledger a little later."""


class AccountView:
    """What is known of one home's charges.

    Args:
        ledger: of the home.
        register: of its machine; None = there is none.
    """

    def __init__(self, ledger: Ledger, register: Register | None) -> None:
        self._ledger, self._register = ledger, register
        self._registered = register.own(ledger.id) if register else {}
        told = ledger.by_unit()
        self._by_shard = "shard" in told or "shard" in self._registered
        self._charged = at_least([_of_all_units(told), _of_all_units(self._registered)])
        self._unregistered = _of_all_units(missing(told, self._registered)) if register else {}

    @property
    def charged(self) -> list[Segment]:
        """All steps of this home."""
        return segments_of(self._charged)

    @property
    def steps_registered(self) -> int | None:
        """Of this home's, in the register; None = there is none."""
        return steps_of(self._registered) if self._register else None

    def of_shard(self) -> list[list[Segment]]:
        """What all homes charged to documents that the shard has: one for each kind that may have
        lost most; of this home alone as long as nobody knows them.
        """
        found = self._register.histories_of(self._ledger.id) if self._register else []
        return [self.with_unregistered(history) for history in found] or [self.charged]

    def ever(self) -> list[list[Segment]]:
        """The same of all documents that this home ever had."""
        if self._by_shard:
            return [*self.of_shard(), self.charged]
        return self._worst([each.segments for each in self.classes()])

    def own(self) -> list[list[Segment]]:
        """What this home charged to any document: what its own releases tell."""
        if self._by_shard:
            return [self.charged]
        return self._worst([each.own for each in self.classes()])

    def _worst(self, told_of: list[list[Segment]]) -> list[list[Segment]]:
        found = undominated([_history(segments) for segments in told_of])
        told = [self.with_unregistered(segments_of(history)) for history in found]
        return told or [self.charged]

    def classes(self) -> list[DocumentClass]:
        """All documents that this home ever had, by history; none without a register."""
        return self._register.classes(self._ledger.id) if self._register else []

    def with_unregistered(self, history: list[Segment]) -> list[Segment]:
        """What the register lost counts for every document."""
        return segments_of(combined({0: _history(history), 1: self._unregistered}, (0, 1)))

    def problems(self) -> list[str]:
        """Where the two differ; waits a moment for a charge that is on its way."""
        found = []
        if lost := sum(self._unregistered.values()):
            found.append(
                f"the machine's register lacks {lost} of this ledger's "
                f"{self._ledger.steps_charged} steps: it is older, or was lost; the node adds them "
                "when it starts"
            )
        if behind := steps_of(self._behind()):
            found.append(
                f"this ledger lacks {behind} steps that the machine's register holds of it: an "
                "older copy was restored; the node charges them again when it starts"
            )
        return found

    def _behind(self) -> ByUnit:
        lacking = missing(self._registered, self._ledger.by_unit())
        for pause_s in PATIENCE_S:
            if not lacking:
                break
            time.sleep(pause_s)
            with Ledger.look(self._ledger.path) as now:
                lacking = missing(self._registered, now.by_unit())
        return lacking


def _of_all_units(told: ByUnit) -> History:
    return combined(dict(enumerate(told.values())), range(len(told)))


def _history(segments: list[Segment]) -> History:
    return {(s.noise_multiplier, s.sampling_probability): s.steps for s in segments}
