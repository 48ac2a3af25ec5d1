"""Reports that the trainer sends without being asked: ready, progress, ending, and its text."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Final

from xpeer.errors import LocalError
from xpeer.escape import without_words
from xpeer.status import PrivacySpent
from xpeer.trainer.answers import (
    Ending,
    FromTrainer,
    LookedAtText,
    Progressed,
    Ready,
    Working,
)
from xpeer.trainer.assembled import Assembled
from xpeer.trainer.threads import Threads
from xpeer.training.pulse import Pulse

Send = Callable[[FromTrainer], None]
_PROGRESS_EVERY_S: Final = 0.1
_ENDING_EVERY_S: Final = 0.5
_WORKING_EVERY_S: Final = 5.0
_LOOK_FIRST_S: Final = 2.0
_LOOK_LAST_S: Final = 300.0
"""First and longest pause between two attempts to read a text that can't be read."""


class Reports:
    """Sends events to the daemon.

    Args:
        assembled: the trainer and what belongs to it.
        send: queues a message; never blocks, on any thread.
        threads: one of them asks the ledger, which is slow.

    Attributes:
        send: as given, for other events.
    """

    def __init__(self, assembled: Assembled, send: Send, threads: Threads) -> None:
        self.send = send
        self._assembled = assembled
        self._loop = assembled.trainer
        self._threads = threads
        self._reported_at = 0.0
        """When progress was last reported, monotonic s."""
        self._reported_window = -1
        """The window at which everything was last reported; -1 until it was."""
        self._spending_asked = False
        """True iff a question to the ledger is queued; its answer will be up to date."""

    def ready(self) -> None:
        """Report that the trainer can be asked from now on."""
        self.everything()  # first, so that the daemon has its counters when it is ready
        assembled, loop, beginning = self._assembled, self._loop, self._assembled.beginning
        text = beginning.text
        self.send(
            Ready(
                num_params=loop.parameters.num_params,
                num_fragments=loop.exchanges.fragments.num_fragments,
                device=beginning.device,
                precision=beginning.precision,
                engine=assembled.mechanism.engine,
                num_records=text.num_records,
                step=loop.counters.step,
                ledger_counter=assembled.ledger_counter(),
                resumed=beginning.resumed,
                corpus=text.corpus,
                shard=text.shard,
                notes=beginning.notes,
                warnings=beginning.warnings,
                text_problem=text.problem,
                uncompiled=beginning.uncompiled,
            )
        )
        working = loop.pulse, self.send, lambda: self._threads.at_work("disk")
        threading.Thread(target=report_work, args=working, name="working", daemon=True).start()
        if text.look_again is not None:
            arguments = text.look_again, self.send
            threading.Thread(target=look_for_text, args=arguments, name="text", daemon=True).start()

    def after_step(self, rest_s: float) -> None:
        """Report a step, if it is time to; a rest of `rest_s` seconds follows it."""
        if self._loop.counters.window != self._reported_window:
            self.everything()
        elif max(time.monotonic() - self._reported_at, rest_s) >= _PROGRESS_EVERY_S:
            self.progress()

    def everything(self) -> None:
        """Report progress now, and the ledger's answer as soon as it is there."""
        self._reported_window = self._loop.counters.window
        self.progress()
        if not self._spending_asked:
            self._spending_asked = True
            self._threads.submit("accounts", self._report_spending)

    def progress(self, privacy: PrivacySpent | None = None) -> None:
        """Report progress, with the ledger's answer if given."""
        self._reported_at = time.monotonic()
        loop, counter = self._loop, self._assembled.ledger_counter()
        self.send(Progressed(loop.state, loop.progress(), counter, privacy))

    def begin_ending(self) -> None:
        """Report the progress of the ending from now on, until the process exits."""
        arguments = self._loop.pulse, self.send
        threading.Thread(target=report_ending, args=arguments, name="ending", daemon=True).start()

    def _report_spending(self) -> None:
        self._spending_asked = False
        self.progress(self._assembled.spent())


def report_work(
    pulse: Pulse,
    send: Send,
    at_disk: Callable[[], object | None],
    sleep: Callable[[float], None] = time.sleep,
) -> None:
    """Report work whenever some was done, for ever; runs on its own thread.

    Args:
        pulse: counts it.
        send: sends the report.
        at_disk: returns what the disk's thread does now, None if nothing. Answers that come by it
            may never come, though training goes on.
        sleep: waits.
    """
    last, disk = pulse.work, 0
    seen = at_disk(), pulse.done_by("disk")
    while True:
        sleep(_WORKING_EVERY_S)
        if pulse.work == last:
            continue
        last, before = pulse.work, seen
        seen = at_disk(), pulse.done_by("disk")
        disk += seen[0] is None or seen != before
        send(Working(last, disk))


def report_ending(pulse: Pulse, send: Send) -> None:
    """Report the progress of the ending twice a second, for ever; runs on its own thread."""
    while True:
        send(Ending(pulse.work, pulse.written, pulse.total))
        time.sleep(_ENDING_EVERY_S)


def look_for_text(look: Callable[[], object], send: Send) -> None:
    """Try again and again to read a text that could not be read; runs on its own thread.

    Once it can be read, the daemon starts another trainer. Reports go on meanwhile, so that the
    daemon tries again if that one fails.
    """
    pause_s = _LOOK_FIRST_S
    while True:
        time.sleep(pause_s)
        pause_s = min(2 * pause_s, _LOOK_LAST_S)
        problem = ""
        try:
            look()
        except LocalError as e:
            problem = str(e)
        except Exception as e:  # noqa: BLE001 - e.g. no memory; the daemon reports it
            problem = f"it could not be looked at: {without_words(e)}"
        send(LookedAtText(problem))
