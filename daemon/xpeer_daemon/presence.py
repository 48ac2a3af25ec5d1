"""Our record in the roster, and everybody else's, kept fresh while the daemon lives."""

from __future__ import annotations

import asyncio
import contextlib
import time

from xpeer.network.membership import Role
from xpeer.network.roster import ANNOUNCE_EVERY_S, MemberRecord, Roster
from xpeer.network.swarm import Swarm
from xpeer_daemon.node import Node
from xpeer_daemon.partners import Partners
from xpeer_daemon.store import Store

ROSTER_EVERY_S = 3.0
MAX_ADDRESSES = 8


class Presence:
    """Announces this node, and reads who else is there.

    Args:
        node: what it says of itself.
        swarm: our addresses.
        roster: the members' records.
        book: the highest ledger counters that partners have shown.
        store: remembers both for the next start.
        role: of our certificate.
    """

    def __init__(
        self, node: Node, swarm: Swarm, roster: Roster, book: Partners, store: Store, role: Role
    ) -> None:
        self._node, self._swarm, self._roster = node, swarm, roster
        self._book, self._store, self._role = book, store, role

    async def keep_announcing(self) -> None:
        """Now and then, and at every change of state."""
        while True:
            self._node.changed.clear()
            await self.announce(self._node.state)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(ANNOUNCE_EVERY_S):
                    await self._node.changed.wait()

    async def announce(self, phase: str) -> None:
        """Once."""
        manifest = self._node.manifest
        slot_s = manifest.round.slot_s if manifest is not None else 1.0
        record = MemberRecord(
            peer_id=self._node.peer_id,
            addresses=self._swarm.addresses[:MAX_ADDRESSES],
            role=self._role,
            # a phase that members of every version know: it takes no steps, and exchanges
            phase="budget-spent" if phase == "mixing" else phase,
            speed=self._node.speed,
            slot=int(time.time() // slot_s),
            zone=self._node.config.network.zone,
        )
        await self._roster.announce(record)
        # alone there is nobody to store it
        self._node.health.hold("card-failing", self._roster.unstored and bool(self._node.others()))

    async def keep_refreshing(self) -> None:
        """Who is there, where, and what its ledger has shown."""
        while True:
            await self._roster.refresh()
            if self._roster.silence:
                self._node.health.failed("roster-failing", self._roster.silence)
            else:
                self._node.health.worked("roster-failing")
            for peer_id, record in self._node.others().items():
                counter = self._book[peer_id].highest_counter
                self._store.remember_peer(peer_id, record.addresses, counter)
            await asyncio.sleep(ROSTER_EVERY_S)
