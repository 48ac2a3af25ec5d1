"""Keeps our card in the roster fresh, and reads the others', as long as the daemon lives."""

from __future__ import annotations

import asyncio
import contextlib
import time

from xpeer.gossip.partners import Partners
from xpeer.identity import PeerId
from xpeer.network.multiaddress import MAX_ADDRESSES
from xpeer.roster.roster import ANNOUNCE_EVERY_S, MemberRecord, Roster
from xpeer_daemon.node import Node
from xpeer_daemon.store import Met, Store
from xpeer_daemon.swarm_view import SwarmView

ROSTER_EVERY_S = 3.0
REMEMBER_EVERY_S = 60.0
"""Members are written to disk at once if something is new about them, else once in this time."""


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
        self._remembered: dict[PeerId, Met] = {}
        self._remembered_s = 0.0

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
            self._remember()
            await asyncio.sleep(ROSTER_EVERY_S)

    def _remember(self) -> None:
        """Write what is new about the members that are here; each write waits for the disk."""
        met = {
            peer_id: Met(
                peer_id,
                record.addresses,
                self._partners[peer_id].ledger.highest,
                partner=record.role != "observer",
            )
            for peer_id, record in self._view.others().items()
        }
        now_s = self._node.clock()
        if now_s - self._remembered_s >= REMEMBER_EVERY_S:
            self._remembered, self._remembered_s = {}, now_s
        new = [each for peer_id, each in met.items() if each != self._remembered.get(peer_id)]
        if new:
            self._store.remember_peers(new)
        self._remembered = met
