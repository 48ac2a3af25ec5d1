"""Has each command carried out on the thread that it declares, and replies.

The commands themselves (`commands`) say what is done. They are applied to the `worker`.
"""

from __future__ import annotations

import logging
from functools import partial

from xpeer.errors import XpeerError
from xpeer.escape import without_words
from xpeer.trainer.answers import Reply, Result, Saved, failure_of
from xpeer.trainer.arena import Arena
from xpeer.trainer.assembled import Assembled
from xpeer.trainer.commands import NOBODY, Outcome, Request, Work
from xpeer.trainer.reporting import Reports, Send
from xpeer.trainer.saving import Saving
from xpeer.trainer.threads import Threads
from xpeer.trainer.worker import Worker

logger = logging.getLogger("xpeer.training")


class Server:
    """Passes commands from the channel to the threads.

    Args:
        send: queues a message to the daemon.
        worker: commands are applied to it.
        threads: all but the training thread.

    Attributes:
        worker: as given.
    """

    def __init__(self, send: Send, worker: Worker, threads: Threads) -> None:
        self.worker = worker
        self._send = send
        self._threads = threads

    def handle(self, request: Request) -> None:
        """Have a command carried out. Called on the receiving thread; returns soon."""
        if request.command.on == "training":
            self.worker.loop.submit(request)
        else:
            self._begin(request.number, request.command)

    def at_boundary(self, request: Request) -> None:
        """Carry out a command that the loop was given, on the loop's thread."""
        self._carry_out(request.number, request.command)

    def _begin(self, number: int, work: Work) -> None:
        match work.on:
            case "helper" | "disk" | "measuring" as thread:
                self._threads.submit(thread, self._carry_out, number, work)
            case _:
                self._carry_out(number, work)

    def _carry_out(self, number: int, work: Work) -> None:
        """Apply a command and send the answer.

        Errors raised on purpose are answers; if nobody waits for one, they are logged. Any other is
        a bug; on the training thread it ends the process.
        """
        outcome: Outcome
        try:
            outcome = work.apply(self.worker)
        except XpeerError as e:
            if number == NOBODY:
                logger.error("%s failed: %s", type(work).__name__, without_words(e))
            outcome = failure_of(e)
        except BaseException as e:
            self._send(Reply(number, failure_of(e)))
            raise
        if isinstance(outcome, Result):
            self._send(Reply(number, outcome))
        elif outcome is not None:
            self._begin(number, outcome)


def serve(send: Send, arena: Arena, assembled: Assembled, checkpoint_every_s: float) -> Server:
    """Connect a trainer with its daemon. Call `Worker.announce` once it may be asked.

    Args:
        send: queues a message to the daemon.
        arena: shared with the daemon.
        assembled: the parts of the trainer.
        checkpoint_every_s: time between periodic checkpoints.
    """
    threads = Threads()
    reports = Reports(assembled, send, threads)
    loop = assembled.trainer
    if (apart := loop.exchanges.misalignment) is not None:
        apart.submit = partial(threads.submit, "measuring")
    saving = Saving(
        loop,
        assembled.checkpoints.copy,
        lambda write: threads.submit("disk", write),
        lambda path, step: send(Saved(path, step)),
        send,
        every_s=checkpoint_every_s,
        resumed=assembled.beginning.resumed,
    )
    worker = Worker(assembled, arena, saving, reports, threads)
    server = Server(send, worker, threads)
    loop.carry_out = server.at_boundary
    loop.before_measuring = saving.before_measuring
    loop.on_step = worker.after_step
    loop.on_state = reports.everything
    return server
