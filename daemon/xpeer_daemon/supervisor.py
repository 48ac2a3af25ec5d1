"""Keeps the trainer process alive: restarts it from its last checkpoint, with back-off.

A trainer that dies (CUDA out of memory, a bad batch) never takes the network down. A trainer that
reports why it can't go on (a wrong setting, a spent budget, a device that computes differently each
time) is not restarted: its error ends the node. Training that diverged goes on from the last
checkpoint, where another sample may spare it; if it diverges from there again, that is final, too.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable

from msgspec import structs

from xpeer.errors import (
    BudgetSpentError,
    ConfigError,
    DivergedError,
    LedgerError,
    LocalError,
    LocalTimeoutError,
    PeerError,
    ShardError,
    TrainerError,
)
from xpeer.trainer.client import TrainerProcess
from xpeer.trainer.ended import TrainerKilledError
from xpeer.trainer.setup import TrainerSetup

log = logging.getLogger("xpeer.supervisor")

FIRST_DELAY_S, LONGEST_DELAY_S = 1.0, 120.0
QUIET_S = 300.0
"""After a trainer has lived this long, earlier deaths don't count."""
MAX_QUICK_DEATHS = 8
_FINAL = ConfigError, BudgetSpentError
_PASSING = TrainerError, LocalTimeoutError, ShardError, LedgerError
"""Errors that may be gone at the next attempt."""


class Supervisor:
    """Owns the current trainer.

    Args:
        setup: makes a setup; called at every start, since the order and the members change.
        start: makes a trainer from a setup; `TrainerProcess.start` with its callback in production.

    Attributes:
        trainer: the trainer that runs now; None while there is none.
        last: the last trainer that ended; None until one has.
        restarts: number of times that a trainer was started after a death.
        down_reason: why there is no trainer now; "" while there is one, and before the first.
    """

    def __init__(
        self,
        setup: Callable[[], TrainerSetup],
        start: Callable[[TrainerSetup], Awaitable[TrainerProcess]],
    ) -> None:
        self._setup = setup
        self._start = start
        self.trainer: TrainerProcess | None = None
        self.last: TrainerProcess | None = None
        self.restarts = 0
        self._renewing = self._watching = False
        # Patience of a `renew` that waits until the trainer is watched; None = none waits
        self._renewal_patience_s: float | None = None
        self.down_reason = ""
        self._was_killed = False
        self._diverged_from: list[int | None] = []
        """Step of the checkpoint from which training last diverged; empty until it has."""

    async def first_start(self) -> TrainerProcess:
        """Start a trainer. Nothing is retried, so that the operator sees the error.

        Raises:
            LocalError: the trainer's error.
        """
        self.trainer = await self._start(self._setup())
        return self.trainer

    async def renew(self, patience_s: float) -> None:
        """Save and stop the trainer; `run` then starts another one, with a new setup.

        While `run` does not watch the trainer (the node still starts, or the trainer gets its
        orders), the renewal waits until it does.

        A trainer that can't save goes on, so that its steps are not lost. A trainer that still
        awaits its parameters has nothing to save.

        Args:
            patience_s: how long the trainer may show no progress while it ends.
        """
        trainer = self.trainer
        if trainer is None or self._renewing:
            return
        if not self._watching:
            self._renewal_patience_s = patience_s
            return
        try:
            with contextlib.suppress(PeerError):  # NOT_READY: it awaits its parameters
                await trainer.checkpoint()
        except LocalError as e:
            log.warning("the trainer goes on with its old setup: %s", e)
            return
        if self.trainer is not trainer:
            return  # it ended meanwhile
        self._renewing = True
        await trainer.stop(patience_s)

    async def run(self, on_restart: Callable[[TrainerProcess], Awaitable[None]]) -> None:
        """Watch and restart the trainer, until cancelled or until it reports why it can't go on.

        Args:
            on_restart: gives a trainer that was started again its parameters and orders.

        Raises:
            ConfigError, BudgetSpentError: reported by the trainer.
            DivergedError: training diverged twice from the same checkpoint.
            TrainerError: the trainer died too often in too short a time. Deaths by a failing ledger
                don't count.
        """
        loop, delay_s, quick_deaths = asyncio.get_running_loop(), FIRST_DELAY_S, 0
        while True:
            trainer = self.trainer
            if trainer is None:
                raise RuntimeError("first_start() comes first")
            started = loop.time()
            await self._watch(trainer)
            self.trainer, self.last = None, trainer
            self.down_reason = f"the trainer {trainer.ended}"
            self._was_killed |= trainer.ended is not None and trainer.ended.was_killed
            if trainer.crash is not None:
                self.down_reason += f": {trainer.crash}"
            self._raise_if_final(trainer)
            if self._renewing:
                self._renewing = False
                with contextlib.suppress(*_PASSING):  # after an error, start it as after a death
                    self.trainer = await self._start_again()
                    self.down_reason = ""
                    await self.instruct(on_restart, self.trainer)
                    continue
            if loop.time() - started > QUIET_S:
                delay_s, quick_deaths = FIRST_DELAY_S, 0
            cause = trainer.crash
            while self.trainer is None:
                # A ledger fails with a full disk, which people mend in their time
                quick_deaths += not isinstance(cause, LedgerError)
                if quick_deaths > MAX_QUICK_DEATHS:
                    raise TrainerError(
                        f"the trainer died {quick_deaths} times in a row ({self.down_reason})",
                        "see `xpeer logs`",
                    )
                log.warning("%s; starting it again in %.0f s", self.down_reason, delay_s)
                await asyncio.sleep(delay_s)
                delay_s = min(2 * delay_s, LONGEST_DELAY_S)
                try:
                    self.trainer = await self._start_again()
                except _PASSING as e:
                    self.down_reason, cause = str(e), e
            self.restarts += 1
            self.down_reason = ""
            await self.instruct(on_restart, self.trainer)

    def _raise_if_final(self, trainer: TrainerProcess) -> None:
        """Raise what no restart cures.

        Raises:
            ConfigError, BudgetSpentError: what ended this trainer.
        """
        crash = trainer.crash
        if isinstance(crash, DivergedError):
            before, self._diverged_from = self._diverged_from, [trainer.resumed_step]
            if self._diverged_from == before:
                raise crash
        elif isinstance(crash, _FINAL) and not isinstance(crash, ShardError):
            raise crash

    async def instruct(
        self, orders: Callable[[TrainerProcess], Awaitable[None]], trainer: TrainerProcess
    ) -> bool:
        """Call `orders`. If it fails, kill the trainer, so that `run` restarts it as after any
        death.

        Returns:
            Whether the trainer got its orders.
        """
        try:
            await orders(trainer)
        except _PASSING as e:
            log.warning("the trainer could not go on: %s", e)
            await trainer.kill()
            return False
        return True

    async def _start_again(self) -> TrainerProcess:
        """Start a trainer that knows whether one was killed before."""
        setup = self._setup()
        if self._was_killed:
            setup = structs.replace(setup, was_killed=True)
        try:
            return await self._start(setup)
        except TrainerKilledError:
            self._was_killed = True
            raise

    async def _watch(self, trainer: TrainerProcess) -> None:
        """Wait until the trainer has exited."""
        self._watching = True
        if self._renewal_patience_s is not None:
            patience_s, self._renewal_patience_s = self._renewal_patience_s, None
            await self.renew(patience_s)
        await asyncio.shield(trainer.exited)
        self._watching = False
