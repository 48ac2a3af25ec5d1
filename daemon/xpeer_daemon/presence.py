"""Keeps our card in the roster fresh, and reads the others', as long as the daemon lives."""

from __future__ import annotations

import asyncio
import contextlib
import time

from xpeer.gossip.partners import Partners
from xpeer.roster.roster import ANNOUNCE_EVERY_S, MemberRecord, Roster
from xpeer_daemon.node import Node
from xpeer_daemon.store import Store
from xpeer_daemon.swarm_view import SwarmView

ROSTER_EVERY_S = 3.0
MAX_ADDRESSES = 8


class Presence:
    """Announces this node, and reads who else is there.

    Args:
        node: has our phase, addresses and zone.
        view: knows our speed, and who is there.
        roster: the members' cards.
        partners: knows the highest ledger counter that each member has shown.
        store: remembers members and counters for the next start.
        slot_s: length of a slot.
    """

    def __init__(
        self,
        node: Node,
        view: SwarmView,
        roster: Roster,
        partners: Partners,
        store: Store,
        slot_s: float,
    ) -> None:
        self._node, self._view, self._roster = node, view, roster
        self._partners, self._store, self._slot_s = partners, store, slot_s

    async def keep_announcing(self) -> None:
        """Announce this node every `ANNOUNCE_EVERY_S` and at every change of phase, until
        cancelled.
        """
        while True:
            self._node.life.changed.clear()
            traits = self._node.phase.traits
            await self.announce(traits.card or self._node.phase)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(ANNOUNCE_EVERY_S):
                    await self._node.life.changed.wait()

    async def announce(self, phase: str) -> None:
        """Announce this node once, as being in this phase."""
        record = MemberRecord(
            peer_id=self._node.peer_id,
            addresses=self._node.swarm.addresses[:MAX_ADDRESSES],
            role=self._node.certificate.role,
            phase=phase,
            speed=self._view.speed,
            slot=int(time.time() // self._slot_s),
            zone=self._node.config.network.zone,
        )
        await self._roster.announce(record)
        # While we are alone, nobody can store our card
        self._node.health.hold("card-failing", self._roster.unstored and bool(self._view.others()))

    async def keep_refreshing(self) -> None:
        """Read the roster, and remember who is there, until cancelled."""
        while True:
            await self._roster.refresh()
            if self._roster.silence:
                self._node.health.failed("roster-failing", self._roster.silence)
            else:
                self._node.health.worked("roster-failing")
            for peer_id, record in self._view.others().items():
                counter = self._partners[peer_id].ledger.highest
                self._store.remember_peer(peer_id, record.addresses, counter)
            await asyncio.sleep(ROSTER_EVERY_S)
