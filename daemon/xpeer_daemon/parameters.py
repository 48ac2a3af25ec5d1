"""How this node comes to hold the swarm's parameters: at its start, and after its trainer's.

The initial model is for a founder that begins: it never was in this swarm with anybody, or nobody
who holds parameters came within its patience, or its operator says so (`--from-initial`).
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
    """Where a trainer without a checkpoint has its parameters from.

    Attributes:
        begins: True iff this node begins the swarm with the initial model; False as soon as others
            may hold what it gave them.
    """

    begins: bool

    @property
    def source(self) -> Literal["initial", "awaited"]:
        """As the trainer's setup says it."""
        return "initial" if self.begins else "awaited"


class Parameters:
    """Of one node.

    Args:
        node: told what is going on.
        store: knows whether there ever were others.
        donors: where parameters come from.
        supervisor: of the trainer.
        origin: whether a founder begins.
        founds: this home made the swarm, and has its initial model.
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

    async def hold(self, trainer: TrainerProcess) -> TrainerProcess:
        """At the node's start; the trainer that holds them then."""
        if trainer.resumed_step is not None:
            await self._look(trainer, trainer.resumed_step)
        elif not self._origin.begins and not await self._take_over(trainer):
            self._begin_anew()
            await trainer.stop(STOP_TIMEOUT_S)
            trainer = await self._supervisor.first_start()
        self._origin.begins = False  # from now on others may hold what we gave them
        return trainer

    async def hold_again(self, trainer: TrainerProcess) -> bool:
        """After the trainer was started again; whether it has to be told to go on."""
        if trainer.resumed_step is not None:
            await self._look(trainer, trainer.resumed_step)
            return False
        if self._origin.begins:
            self._origin.begins = False
            return True
        if await self._take_over(trainer):
            return True
        self._begin_anew()
        await self._supervisor.renew(STOP_TIMEOUT_S)  # and we are called again
        return False

    async def _take_over(self, trainer: TrainerProcess) -> bool:
        return await self._donors.take_over(
            trainer, donors.PATIENCE_S if self._founds else math.inf
        )

    def _begin_anew(self) -> None:
        log.warning("nobody holds the swarm's parameters: it begins with the initial model")
        self._store.add_event("began-anew", "nobody holds the swarm's parameters")
        self._origin.begins = True

    async def _look(self, trainer: TrainerProcess, own_step: int) -> None:
        """Whether others are far ahead, before anything is exchanged; if nobody is there yet, as
        soon as somebody is.
        """
        node, clock = self._node, asyncio.get_running_loop().time
        node.life.catching_up = True
        known = any(peer.peer_id != node.peer_id for peer in self._store.known_peers())
        until = clock() + (donors.GRACE_S if known else 0.0)
        asked = await self._donors.catch_up(trainer, own_step)
        while not asked and clock() < until:
            await asyncio.sleep(POLL_S)
            asked = await self._donors.catch_up(trainer, own_step)
        node.life.catching_up = not asked

    async def look_later(self) -> None:
        """For ever: who resumed alone looks as soon as somebody is there."""
        while True:
            trainer = self._supervisor.trainer
            if (
                self._node.life.catching_up
                and trainer is not None
                and trainer.resumed_step is not None
            ):
                try:
                    if await self._donors.catch_up(trainer, trainer.step):
                        self._node.life.catching_up = False
                except LocalError as e:
                    log.warning("the trainer could not catch up: %s", e)
            await asyncio.sleep(POLL_S)


def begins(home: Home, store: Store) -> bool:
    """Whether this home was never in its swarm with anybody: nobody is known, nothing charged."""
    if store.known_peers(1):
        return False
    if not home.ledger_db.exists():
        return True
    ledger = Ledger.open(home.ledger_db)
    try:
        return ledger.counter == 0
    finally:
        ledger.close()
