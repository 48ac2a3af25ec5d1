"""What a ledger and the machine's register say of one home. Where they differ, the larger counts.

They differ after one of them was restored from an older copy, until the node starts again.
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
"""Pauses before the ledger is read again. A running node charges the register first and its ledger
a little later, so the ledger may seem to lack a charge."""


class AccountView:
    """All that is known of one home's charges.

    Args:
        ledger: the home's ledger.
        register: the machine's register; None = there is none.
    """

    def __init__(self, ledger: Ledger, register: Register | None) -> None:
        self._ledger, self._register = ledger, register
        self._registered = register.of_home(ledger.id) if register else {}
        in_ledger = ledger.by_unit()
        self._by_shard = "shard" in in_ledger or "shard" in self._registered
        self._charged = at_least([_of_all_units(in_ledger), _of_all_units(self._registered)])
        self._unregistered = _of_all_units(missing(in_ledger, self._registered)) if register else {}

    @property
    def charged(self) -> list[Segment]:
        """All steps that this home charged."""
        return segments_of(self._charged)

    @property
    def steps_registered(self) -> int | None:
        """Number of this home's steps that the register holds; None = there is no register."""
        return steps_of(self._registered) if self._register else None

    def of_shard(self) -> list[list[Segment]]:
        """Charges of all homes to the documents that are in the shard now.

        Returns:
            One history for each class of documents that may have lost most. This home's charges
            alone if the register does not know which documents the shard has.
        """
        histories = self._register.histories_of(self._ledger.id) if self._register else []
        return [self.with_unregistered(history) for history in histories] or [self.charged]

    def ever(self) -> list[list[Segment]]:
        """Charges of all homes to all documents that this home ever had; else as `of_shard`."""
        if self._by_shard:
            return [*self.of_shard(), self.charged]
        return self._worst([each.segments for each in self.classes()])

    def of_home(self) -> list[list[Segment]]:
        """Charges of this home alone, whatever document they were for. They bound what the releases
        of this home reveal.
        """
        if self._by_shard:
            return [self.charged]
        return self._worst([each.of_home for each in self.classes()])

    def _worst(self, accounts: list[list[Segment]]) -> list[list[Segment]]:
        histories = undominated([_history(segments) for segments in accounts])
        worst = [self.with_unregistered(segments_of(history)) for history in histories]
        return worst or [self.charged]

    def classes(self) -> list[DocumentClass]:
        """All documents that this home ever had, grouped by their charges. Empty without a
        register.
        """
        return self._register.classes(self._ledger.id) if self._register else []

    def with_unregistered(self, history: list[Segment]) -> list[Segment]:
        """Add the steps that the register lacks. Nobody knows which documents they were for, so
        they count for every document.
        """
        return segments_of(combined({0: _history(history), 1: self._unregistered}, (0, 1)))

    def problems(self) -> list[str]:
        """Differences between ledger and register, in words for the operator.

        Waits up to two seconds for a charge that a running node is writing.
        """
        differences = []
        if lost := sum(self._unregistered.values()):
            differences.append(
                f"the machine's register lacks {lost} of this ledger's "
                f"{self._ledger.steps_charged} steps: it is older, or was lost; the node adds them "
                "when it starts"
            )
        if behind := steps_of(self._behind()):
            differences.append(
                f"this ledger lacks {behind} steps that the machine's register holds of it: an "
                "older copy was restored; the node charges them again when it starts"
            )
        return differences

    def _behind(self) -> ByUnit:
        """Steps of this home that the register holds and the ledger lacks."""
        lacking = missing(self._registered, self._ledger.by_unit())
        for pause_s in PATIENCE_S:
            if not lacking:
                break
            time.sleep(pause_s)
            with Ledger.look(self._ledger.path) as now:
                lacking = missing(self._registered, now.by_unit())
        return lacking


def _of_all_units(charged: ByUnit) -> History:
    return combined(dict(enumerate(charged.values())), range(len(charged)))


def _history(segments: list[Segment]) -> History:
    return {(s.noise_multiplier, s.sampling_probability): s.steps for s in segments}
