"""How far the trainer's start is, for the daemon: a start is given up only if it stands still."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final

import psutil

from xpeer.status import TextProgress
from xpeer.trainer.answers import FromTrainer, Starting
from xpeer.training.pulse import Pulse

REPORT_EVERY_S: Final = 1.0
_UNIT: Final = 1 << 20
"""Bytes read that count as work: a model may be read for long."""


class Startup:
    """A start, as its parts note how far they are.

    Attributes:
        stage: what is being done, for people.
        text: progress of the tokens; None while none are made.
        pulse: counts work; the trainer's.
        over: True iff the trainer is ready, or has failed.
    """

    def __init__(self) -> None:
        self.stage = "opens its home"
        self.text: TextProgress | None = None
        self.pulse = Pulse()
        self.over = False

    def enter(self, stage: str) -> None:
        """Note that another stage begins."""
        self.stage, self.text = stage, None

    def tokenised(self, progress: TextProgress) -> None:
        """Note how far the tokens are."""
        self.text = progress

    def state(self) -> Starting:
        """Describe the start; equal to an earlier description iff nothing was done since."""
        return Starting(self.stage, self.pulse.work + _bytes_read() // _UNIT, self.text)


def report_start(
    startup: Startup,
    send: Callable[[FromTrainer], None],
    sleep: Callable[[float], None] = time.sleep,
) -> None:
    """Report a start whenever it has got on, until it is over; runs on its own thread."""
    last: Starting | None = None
    while not startup.over:
        state = startup.state()
        if state != last:
            last = state
            send(state)
        sleep(REPORT_EVERY_S)


def _bytes_read() -> int:
    try:
        return int(psutil.Process().io_counters().read_chars)
    except (AttributeError, psutil.Error, OSError):  # not on every system
        return 0
