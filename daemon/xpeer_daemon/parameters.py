"""How this node gets the swarm's parameters: at its own start, and at a later start of its trainer.

A founder begins with the initial model in three cases: it never met anybody in this swarm; no
member that holds parameters came in time; or its operator says so (`--from-initial`). In the second
case it catches up with whoever comes later.
"""

from __future__ import annotations

import asyncio
import logging
import math
from dataclasses import dataclass
from typing import Literal

from xpeer.accounts.ledger import Ledger
from xpeer.config import Home
from xpeer.errors import LocalError
from xpeer.trainer.client import TrainerProcess
from xpeer_daemon import donors
from xpeer_daemon.donors import Donors
from xpeer_daemon.node import Node
from xpeer_daemon.store import Store
from xpeer_daemon.supervisor import Supervisor

log = logging.getLogger("xpeer.daemon")

POLL_S = 0.5
STOP_TIMEOUT_S = 60.0


@dataclass
class Origin:
    """Where the parameters of a trainer without a checkpoint come from.

    Attributes:
        begins: True iff this node begins the swarm with the initial model. False as soon as others
            may hold parameters that it gave them.
    """

    begins: bool

    @property
    def source(self) -> Literal["initial", "awaited"]:
        """The source under its name in the trainer's setup."""
        return "initial" if self.begins else "awaited"


class Parameters:
    """Gets the swarm's parameters for one node.

    Args:
        node: its phase and note say what is going on.
        store: knows whether this node ever met others.
        donors: fetch parameters from other members.
        supervisor: of the trainer.
        origin: says whether this node begins with the initial model.
        founds: this home founded the swarm, and has its initial model.
    """

    def __init__(
        self,
        node: Node,
        store: Store,
        donors: Donors,
        supervisor: Supervisor,
        origin: Origin,
        *,
        founds: bool,
    ) -> None:
        self._node, self._store, self._donors = node, store, donors
        self._supervisor = supervisor
        self._origin = origin
        self._founds = founds
        self._holder: TrainerProcess | None = None
        """The trainer that has parameters; None while one gets them."""
        self._later: asyncio.Task[bool] | None = None
        """The attempt of `catch_up_later` that is under way."""

    async def hold(self, trainer: TrainerProcess) -> TrainerProcess:
        """Get the parameters at the node's start.

        Returns:
            The trainer that holds them: the given one, or another one that was started in its
            place.
        """
        if trainer.resumed_step is not None:
            await self._catch_up(trainer)
        elif self._origin.begins:
            self._donors.forget()  # what an earlier start began to fetch
        elif not await self._take_over(trainer):
            self._begin_anew()
            await trainer.stop(STOP_TIMEOUT_S)
            trainer = await self._supervisor.first_start()
        self._origin.begins = False  # from now on others may hold what we gave them
        self._holder = trainer
        return trainer

    async def hold_again(self, trainer: TrainerProcess) -> bool:
        """Get the parameters after the trainer was started again.

        Returns:
            Whether the node has to begin anew with it. False if it resumed from a checkpoint, or is
            started once more.
        """
        self._holder = None
        if self._later is not None:  # it fetches for the last trainer
            self._later.cancel()
            await asyncio.wait([self._later])
        begins = await self._held_again(trainer)
        if begins or trainer.resumed_step is not None:
            self._holder = trainer
        return begins

    async def _held_again(self, trainer: TrainerProcess) -> bool:
        if trainer.resumed_step is not None:
            await self._catch_up(trainer)
            return False
        if self._origin.begins:
            self._origin.begins = False
            return True
        if await self._take_over(trainer):
            return True
        self._begin_anew()
        await self._supervisor.renew(STOP_TIMEOUT_S)  # this method is called again afterwards
        return False

    async def _take_over(self, trainer: TrainerProcess) -> bool:
        patience_s = donors.PATIENCE_S if self._founds else math.inf
        taken = await self._donors.take_over(trainer, patience_s)
        self._node.life.catching_up = not taken
        return taken

    def _begin_anew(self) -> None:
        log.warning("nobody holds the swarm's parameters: it begins with the initial model")
        self._store.add_event("began-anew", "nobody holds the swarm's parameters")
        self._origin.begins = True

    async def _catch_up(self, trainer: TrainerProcess) -> None:
        """Take over better parameters if others are far ahead, before anything is exchanged. If
        nobody is there yet, leave it to `catch_up_later`.
        """
        node, clock = self._node, asyncio.get_running_loop().time
        node.life.catching_up = True
        known = any(peer.peer_id != node.peer_id for peer in self._store.known_peers())
        until = clock() + (donors.GRACE_S if known else 0.0)
        asked = await self._donors.catch_up(trainer)
        while not asked and clock() < until:
            await asyncio.sleep(POLL_S)
            asked = await self._donors.catch_up(trainer)
        node.life.catching_up = not asked

    async def catch_up_later(self) -> None:
        """Catch up as soon as a donor is there, if nobody was at the start; until cancelled."""
        while True:
            trainer = self._supervisor.trainer
            if self._node.life.catching_up and trainer is not None and trainer is self._holder:
                await self._catch_up_once(trainer)
            await asyncio.sleep(POLL_S)

    async def _catch_up_once(self, trainer: TrainerProcess) -> None:
        later = self._later = asyncio.create_task(self._donors.catch_up(trainer))
        try:
            await asyncio.wait([later])
        finally:
            self._later = None
            later.cancel()
        if later.cancelled():
            return  # the trainer was started again
        try:
            if later.result():
                self._node.life.catching_up = False
        except LocalError as e:
            log.warning("the trainer could not catch up: %s", e)


def begins(home: Home, store: Store) -> bool:
    """Whether this home never met anybody in its swarm: no peer is known, and nothing charged."""
    if store.known_peers(1):
        return False
    if not home.ledger_db.exists():
        return True
    ledger = Ledger.open(home.ledger_db)
    try:
        return ledger.counter == 0
    finally:
        ledger.close()
