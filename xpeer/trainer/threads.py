"""The trainer's threads, besides the training thread. None waits for another."""

from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any, Final, Literal, TypeVar, get_args

import torch

Pool = Literal["helper", "disk", "accounts", "measuring"]
"""helper: compresses and verifies. disk: writes checkpoints. accounts: asks the ledger. measuring:
computes what can wait, on one core."""
_POOLS: Final[tuple[Pool, ...]] = get_args(Pool)
_T = TypeVar("_T")
logger = logging.getLogger("xpeer.training")


class Threads:
    """One thread of each kind. Each does one piece of work after another.

    Invariant: there is one helper (`in_flight` says why), and one writer of checkpoints. What is
    measured beside training never takes more than one core.
    """

    def __init__(self) -> None:
        self._pools = {name: ThreadPoolExecutor(1, name) for name in _POOLS}
        self._unfinished: dict[Pool, dict[Future[Any], None]] = {name: {} for name in _POOLS}
        """What each thread does and has to do, in that order."""
        self.wait_for("measuring", partial(_compute_with, 1))
        torch.set_num_threads(torch.get_num_threads())  # of all other threads, as before

    def submit(self, name: Pool, work: Callable[..., object], *arguments: object) -> None:
        """Queue work for a thread. An error in it is a bug, and is logged."""
        future = self._pools[name].submit(work, *arguments)
        future.add_done_callback(_log_bug)
        self._note(name, future)

    def wait_for(self, name: Pool, work: Callable[[], _T]) -> _T:
        """Queue work behind all earlier work, and wait for its result; raises its error."""
        future = self._pools[name].submit(work)
        self._note(name, future)
        return future.result()

    def at_work(self, name: Pool) -> object | None:
        """The piece of work that a thread does now; None = it has nothing to do."""
        return next(iter(list(self._unfinished[name])), None)

    def _note(self, name: Pool, future: Future[Any]) -> None:
        unfinished = self._unfinished[name]
        unfinished[future] = None
        future.add_done_callback(lambda done: unfinished.pop(done, None))

    def close(self) -> None:
        """Wait for the disk's thread; queued questions to the ledger are dropped."""
        self._pools["disk"].shutdown()
        self._pools["accounts"].shutdown(cancel_futures=True)
        self._pools["measuring"].shutdown(wait=False, cancel_futures=True)


def _compute_with(num_threads: int) -> None:
    """Have torch use so many threads for what this thread computes."""
    torch.get_num_threads()  # else the first operation would take the number that all others have
    torch.set_num_threads(num_threads)


def _log_bug(done: Future[object]) -> None:
    """Log an error. Errors raised on purpose were answered before; the others are bugs."""
    if (error := done.exception()) is not None:
        logger.error("a helper of the trainer failed", exc_info=error)
