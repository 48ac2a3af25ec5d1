"""Keeps the trainer process alive: restarts it from its last checkpoint, with back-off.

A trainer that dies (CUDA out of memory, a bad batch) never takes the network down. One that says
why it can't go on (a wrong setting, a spent budget) is not restarted: its error is the node's.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable

from xpeer.errors import (
    BudgetSpentError,
    ConfigError,
    LedgerError,
    LocalError,
    LocalTimeoutError,
    PeerError,
    ShardError,
    TrainerError,
)
from xpeer.trainer.client import TrainerProcess
from xpeer.trainer.setup import TrainerSetup

log = logging.getLogger("xpeer.supervisor")

FIRST_DELAY_S, LONGEST_DELAY_S = 1.0, 120.0
QUIET_S = 300.0
"""A trainer that lived this long is forgiven its earlier deaths."""
MAX_QUICK_DEATHS = 8
_FINAL = ConfigError, BudgetSpentError
_PASSING = TrainerError, LocalTimeoutError, ShardError, LedgerError
"""What may be otherwise at the next try."""


class Supervisor:
    """Owns the current trainer.

    Args:
        setup: asked anew at every start, since the mode and the members change.
        start: makes a trainer from a setup; `TrainerProcess.start` with its callback in production.
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
        """The one that ended before."""
        self.restarts = 0
        self._renewing = self._watching = False
        self._due_s: float | None = None
        """With this patience the trainer is renewed as soon as it is watched."""
        self.down_reason = ""
        """Why there is no trainer now; empty while there is one."""

    async def first_start(self) -> TrainerProcess:
        """Start it; an error here is the operator's to see, so nothing is retried.

        Raises:
            LocalError: what the trainer said.
        """
        self.trainer = await self._start(self._setup())
        return self.trainer

    async def renew(self, patience_s: float) -> None:
        """Save, stop and start the trainer with a new setup; `run` does the starting.

        Where nobody watches the trainer (the node still starts, or the trainer is told what to do),
        that waits until `run` watches it.

        A trainer that can't save goes on: what it did would be lost. One that still awaits its
        parameters has nothing to save.
        """
        trainer = self.trainer
        if trainer is None or self._renewing:
            return
        if not self._watching:
            self._due_s = patience_s
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
        """Watch and restart, until cancelled or the trainer says why it can't go on.

        Raises:
            ConfigError, BudgetSpentError: the trainer's own word.
            TrainerError: it died too often in too short a time, and not for want of a ledger.
        """
        loop, delay_s, quick_deaths = asyncio.get_running_loop(), FIRST_DELAY_S, 0
        while True:
            trainer = self.trainer
            if trainer is None:
                raise RuntimeError("first_start() comes first")
            started = loop.time()
            code = await self._watch(trainer)
            self.trainer, self.last = None, trainer
            self.down_reason = f"trainer exited with {code}"
            if trainer.crash is not None:
                self.down_reason += f": {trainer.crash.problem}"
            if isinstance(trainer.crash, _FINAL) and not isinstance(trainer.crash, ShardError):
                raise trainer.crash
            if self._renewing:
                self._renewing = False
                with contextlib.suppress(*_PASSING):  # then it is started as after a death
                    self.trainer = await self._start(self._setup())
                    self.down_reason = ""
                    await self._tell(on_restart, self.trainer)
                    continue
            if loop.time() - started > QUIET_S:
                delay_s, quick_deaths = FIRST_DELAY_S, 0
            cause = trainer.crash
            while self.trainer is None:
                # a full disk is mended by people, in their time
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
                    self.trainer = await self._start(self._setup())
                except _PASSING as e:
                    self.down_reason, cause = str(e), e
            self.restarts += 1
            self.down_reason = ""
            await self._tell(on_restart, self.trainer)

    async def _tell(
        self, on_restart: Callable[[TrainerProcess], Awaitable[None]], trainer: TrainerProcess
    ) -> None:
        """One that can't be told what to do is ended: what follows is as after any death."""
        try:
            await on_restart(trainer)
        except _PASSING as e:
            log.warning("the trainer could not go on: %s", e)
            await trainer.kill()

    async def _watch(self, trainer: TrainerProcess) -> int:
        """Until it has exited: its status."""
        self._watching = True
        if self._due_s is not None:
            due_s, self._due_s = self._due_s, None
            await self.renew(due_s)
        code = await asyncio.shield(trainer.exited)
        self._watching = False
        return code
