"""The trainer's threads beside the training thread. None waits for another."""

from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Final, Literal, TypeVar, get_args

Pool = Literal["helper", "disk", "accounts"]
"""helper: compresses and verifies. disk: writes checkpoints. accounts: asks the ledger."""
_POOLS: Final[tuple[Pool, ...]] = get_args(Pool)
_T = TypeVar("_T")
logger = logging.getLogger("xpeer.training")


class Threads:
    """One thread of each kind, which does one thing after another.

    Invariant: there is one helper (`stages` says why), and one writer of checkpoints.
    """

    def __init__(self) -> None:
        self._pools = {name: ThreadPoolExecutor(1, name) for name in _POOLS}

    def submit(self, name: Pool, work: Callable[..., object], *arguments: object) -> None:
        """Have something done. An error in it is a bug, and is logged."""
        self._pools[name].submit(work, *arguments).add_done_callback(_log_bug)

    def wait_for(self, name: Pool, work: Callable[[], _T]) -> _T:
        """Have something done behind all that was submitted, and wait for it; it may raise."""
        return self._pools[name].submit(work).result()

    def close(self) -> None:
        """Wait for the disk; what nobody needs any more is not begun."""
        self._pools["disk"].shutdown()
        self._pools["accounts"].shutdown(cancel_futures=True)


def _log_bug(done: Future[object]) -> None:
    """Errors made on purpose have been answered before; the rest must not vanish."""
    if (error := done.exception()) is not None:
        logger.error("a helper of the trainer failed", exc_info=error)
