"""Where this node is in its life, and what may come next: the table of `xpeer/phase.py` at work."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from xpeer.errors import LocalError
from xpeer.phase import Phase, TrainerPhase

log = logging.getLogger("xpeer.node")

_BY_TRAINER: dict[TrainerPhase, Phase] = {
    "training": Phase.TRAINING,
    "closing": Phase.CLOSING,
    "budget-spent": Phase.BUDGET_SPENT,
}
"""Where the loop of the trainer takes the node."""


class Life:
    """The phase of one node. Nothing else holds it, and `enter` alone changes it.

    Args:
        clock: wall clock, seconds.
        pause_wanted: the node starts paused.

    Attributes:
        phase: now.
        since_s: when it was entered, by the clock.
        changed: set at every change; whoever announces the phase clears it.
        pause_wanted: True iff the operator paused the node and has not resumed it. A node that
            still joins pauses once it would begin.
        interrupted: the phase that a pause interrupted; None unless the phase is PAUSED.
        note: what the node waits for while it joins; "" once it trains.
        catching_up: True iff it is not known yet whether our parameters lie far behind the others';
            nothing is exchanged until it is.
        stop_wanted: set once the node is to end.
        leaving: True iff the others are told at the end that this node is gone for good.
    """

    def __init__(self, clock: Callable[[], float], *, pause_wanted: bool = False) -> None:
        self.phase = Phase.STARTING
        self.since_s = clock()
        self.changed = asyncio.Event()
        self.pause_wanted = pause_wanted
        self.interrupted: Phase | None = None
        self.note = ""
        self.catching_up = False
        self.stop_wanted = asyncio.Event()
        self.leaving = False
        self._clock = clock

    def enter(self, phase: Phase) -> None:
        """Be in a phase from now on; whoever announces it wakes.

        Raises:
            LocalError: it can't follow the phase that the node is in: nothing changed.
        """
        if phase is self.phase:
            return
        if phase not in self.phase.traits.then:
            raise LocalError(
                f"this node is {self.phase}, and can't be {phase} next", "see `xpeer logs`"
            )
        log.info("state: %s -> %s", self.phase, phase)
        paused = phase is Phase.PAUSED
        # one that would only have begun goes on with training
        before = self.phase if self.phase.traits.exchanges else Phase.TRAINING
        self.interrupted = before if paused else None
        self.phase = phase
        self.since_s = self._clock()
        self.changed.set()

    def follow(self, trainer: TrainerPhase) -> None:
        """Go where the trainer's loop went, if that is what moves this phase.

        A pause is the operator's, and a beginning and an end are ours: no trainer ends them.
        """
        if self.phase.traits.follows_trainer and trainer in _BY_TRAINER:
            self.enter(_BY_TRAINER[trainer])

    def request_stop(self, *, leave: bool) -> None:
        """Have the node end soon; once asked to leave it leaves."""
        self.leaving = self.leaving or leave
        self.stop_wanted.set()
