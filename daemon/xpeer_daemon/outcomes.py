"""Notes how exchanges end: for history, health and the end of the run."""

from __future__ import annotations

from xpeer.errors import Reason
from xpeer.gossip import matching
from xpeer.gossip.partners import ORDINARY, Events
from xpeer.health import Health
from xpeer.identity import PeerId
from xpeer.network.agreement import Agreement
from xpeer.round import Exchanged
from xpeer_daemon.closing import Closing
from xpeer_daemon.store import RoundRow, Store
from xpeer_daemon.swarm_view import SwarmView


class Outcomes(Events):
    """Writes down how each exchange ended.

    Args:
        swarm_id: seed of the matching.
        view: knows who has ended, and the members' names.
        health: gets failures.
        store: the history.
        closing: counts merges once everybody has ended.
    """

    def __init__(
        self,
        swarm_id: str,
        view: SwarmView,
        health: Health,
        store: Store,
        closing: Closing,
    ) -> None:
        self._swarm_id = swarm_id
        self._view = view
        self._health = health
        self._store = store
        self._closing = closing

    def name_of(self, peer_id: PeerId) -> str:
        """See `Events.name_of`."""
        return self._view.name_of(peer_id)

    def exchanged(self, agreement: Agreement, result: Exchanged, took_s: float) -> None:
        """See `Events.exchanged`."""
        self._health.worked("exchange-failed")
        if self._view.has_ended() and not self._view.still_training():
            self._closing.merged(agreement.fragment, agreement.slot)
        self._store.add_round(
            RoundRow(
                slot=agreement.slot,
                partner=agreement.peer_id,
                fragment=agreement.fragment,
                distance=result.distance,
                seconds=took_s,
            )
        )

    def skipped(self, peer_id: str, slot: int, reason: str, detail: str) -> None:
        """See `Events.skipped`."""
        if self._view.has_ended():
            fragment = matching.fragment_of(self._swarm_id, slot, self._closing.fragments)
            if not peer_id:  # the whole meeting
                self._closing.failed(fragment, slot)
            if reason == Reason.REVEALED_BEFORE:
                self._closing.give_up(fragment)
        if reason in ORDINARY:
            return
        who = self.name_of(PeerId(peer_id)) if peer_id else "nobody"
        self._health.failed("exchange-failed", f"{who}: {reason} {detail}")
        self._store.add_round(RoundRow(slot=slot, partner=peer_id, reason=reason, detail=detail))

    def went_back(self, peer_id: PeerId, highest_counter: int, detail: str) -> None:
        """See `Events.went_back`."""
        self._store.add_event("ledger-went-back", f"{peer_id} {detail}")
        self._store.remember_peer(peer_id, [], highest_counter)

    def caught_up(self, peer_id: PeerId) -> None:
        """See `Events.caught_up`."""
        self._store.add_event("ledger-caught-up", peer_id)
