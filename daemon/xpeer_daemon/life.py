"""The phase of this node, and its changes by the table of `xpeer/phase.py`."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from xpeer.errors import LocalError
from xpeer.phase import Phase, TrainerPhase
from xpeer.status import Fetching

log = logging.getLogger("xpeer.node")

_BY_TRAINER: dict[TrainerPhase, Phase] = {
    "training": Phase.TRAINING,
    "closing": Phase.CLOSING,
    "budget-spent": Phase.BUDGET_SPENT,
}
"""The node's phase by what the trainer's loop does."""


class Life:
    """The phase of one node. It is kept here alone, and `enter` alone changes it.

    Args:
        clock: wall clock, seconds.
        pause_wanted: the node starts paused.

    Attributes:
        phase: the phase now.
        since_s: when it was entered, by the clock.
        changed: set at every change of the phase; the task that announces the phase clears it.
        pause_wanted: True iff the operator paused the node and has not resumed it. A node that
            still joins pauses when it would begin to train.
        interrupted: the phase that a pause interrupted; None unless the phase is PAUSED.
        note: what the node waits for while it joins; "" once it trains.
        fetching: returns how far the transfer of parameters is; None unless one is under way.
        compares: True iff this node has parameters, and asks members whether theirs are better, or
            fetches such.
        wasted: who cost how many attempts to get parameters, for people; "" = nobody did.
        catching_up: True iff we don't know yet whether our parameters lie far behind the others'.
            Until we do, nothing is exchanged.
        stop_wanted: set once the node is to end.
        leaving: True iff the node announces at its end that it is gone for good.
    """

    def __init__(self, clock: Callable[[], float], *, pause_wanted: bool = False) -> None:
        self.phase = Phase.STARTING
        self.since_s = clock()
        self.changed = asyncio.Event()
        self.pause_wanted = pause_wanted
        self.interrupted: Phase | None = None
        self.note = ""
        self.fetching: Callable[[], Fetching] | None = None
        self.catching_up = self.compares = False
        self.wasted = ""
        self.stop_wanted = asyncio.Event()
        self.leaving = False
        self._clock = clock

    def enter(self, phase: Phase) -> None:
        """Change the phase, and wake the task that announces it.

        Raises:
            LocalError: the phase can't follow the one that the node is in; nothing changed.
        """
        if phase is self.phase:
            return
        if phase not in self.phase.traits.then:
            raise LocalError(
                f"this node is {self.phase}, and can't be {phase} next", "see `xpeer logs`"
            )
        log.info("state: %s -> %s", self.phase, phase)
        paused = phase is Phase.PAUSED
        # A node that is paused before it began trains when it is resumed
        before = self.phase if self.phase.traits.exchanges else Phase.TRAINING
        self.interrupted = before if paused else None
        self.phase = phase
        self.since_s = self._clock()
        self.changed.set()

    def follow(self, trainer: TrainerPhase) -> None:
        """Enter the phase that belongs to what the trainer's loop does, if this phase follows it.

        A pause is ended by the operator, and beginning and end by the daemon: no trainer ends them.
        """
        if self.phase.traits.follows_trainer and trainer in _BY_TRAINER:
            self.enter(_BY_TRAINER[trainer])

    def request_stop(self, *, leave: bool) -> None:
        """Have the node end soon. Once it was asked to leave, a later `leave=False` is ignored."""
        self.leaving = self.leaving or leave
        self.stop_wanted.set()
