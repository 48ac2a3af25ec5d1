"""What the trainer says without being asked: that it is ready, how far it is, how it ends."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Final

from xpeer.errors import LocalError
from xpeer.escape import without_words
from xpeer.status import PrivacySpent
from xpeer.trainer.answers import Ending, FromTrainer, LookedAtText, Progressed, Ready
from xpeer.trainer.assembled import Assembled
from xpeer.trainer.threads import Threads
from xpeer.training.pulse import Pulse

Send = Callable[[FromTrainer], None]
_PROGRESS_EVERY_S: Final = 0.1
_ENDING_EVERY_S: Final = 0.5
_LOOK_FIRST_S: Final = 2.0
_LOOK_LAST_S: Final = 300.0
"""Between two looks at a text that can't be read."""


class Reports:
    """Events for the daemon.

    Args:
        assembled: the trainer and what belongs to it.
        send: queues a message; never blocks, on any thread.
        threads: the ledger's sum takes a moment to compute, on a thread of its own.

    Attributes:
        send: the same, for events of others.
    """

    def __init__(self, assembled: Assembled, send: Send, threads: Threads) -> None:
        self.send = send
        self._made = assembled
        self._loop = assembled.trainer
        self._threads = threads
        self._reported_at = 0.0
        """When progress was last reported, monotonic s."""
        self._reported_window = -1
        """The window at which everything was last reported; -1 until it was."""
        self._spending_asked = False
        """True iff the ledger is still to be asked: it will tell what it holds by then."""

    def ready(self) -> None:
        """The trainer can be asked from now on."""
        self.everything()  # first, so that the daemon has its counters when it is ready
        made, loop, beginning = self._made, self._loop, self._made.beginning
        text = beginning.text
        self.send(
            Ready(
                num_params=loop.parameters.num_params,
                num_fragments=loop.exchanges.fragments.num_fragments,
                device=beginning.device,
                engine=made.mechanism.engine,
                num_records=text.num_records,
                step=loop.counters.step,
                ledger_counter=made.ledger_counter(),
                resumed=beginning.resumed,
                corpus=text.corpus,
                shard=text.shard,
                notes=beginning.notes,
                warnings=beginning.warnings,
                text_problem=text.problem,
            )
        )
        if text.look_again is not None:
            arguments = text.look_again, self.send
            threading.Thread(target=look_for_text, args=arguments, name="text", daemon=True).start()

    def after_step(self, rest_s: float) -> None:
        """A step was taken, and a rest of so many seconds follows."""
        if self._loop.counters.window != self._reported_window:
            self.everything()
        elif max(time.monotonic() - self._reported_at, rest_s) >= _PROGRESS_EVERY_S:
            self.progress()

    def everything(self) -> None:
        """Progress now, and what the ledger says as soon as it has said it."""
        self._reported_window = self._loop.counters.window
        self.progress()
        if not self._spending_asked:
            self._spending_asked = True
            self._threads.submit("accounts", self._report_spending)

    def progress(self, privacy: PrivacySpent | None = None) -> None:
        """Where the training is."""
        self._reported_at = time.monotonic()
        loop, counter = self._loop, self._made.ledger_counter()
        self.send(Progressed(loop.state, loop.progress(), counter, privacy))

    def begin_ending(self) -> None:
        """From now on, how far the end is, until the process exits."""
        arguments = self._loop.pulse, self.send
        threading.Thread(target=report_ending, args=arguments, name="ending", daemon=True).start()

    def _report_spending(self) -> None:
        self._spending_asked = False
        self.progress(self._made.spent())


def report_ending(pulse: Pulse, send: Send) -> None:
    """Say twice a second how far the end is; for a thread of its own."""
    while True:
        send(Ending(pulse.work, pulse.written, pulse.total))
        time.sleep(_ENDING_EVERY_S)


def look_for_text(look: Callable[[], object], send: Send) -> None:
    """Look at a text that could not be read, as long as there is this trainer; for a thread of its
    own. Where it can be read, the daemon starts another trainer, and asks again if that fails.
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
        except Exception as e:  # noqa: BLE001 - e.g. no memory; the daemon tells it
            problem = f"it could not be looked at: {without_words(e)}"
        send(LookedAtText(problem))
