"""Whom a slot gives us to meet: what the matching names, and which of them we avoid.

Begins no meeting and remembers nothing. It asks the matching, the node and what came of exchanges.
"""

from __future__ import annotations

from xpeer.gossip import matching
from xpeer.gossip.partners import Partners
from xpeer.gossip.view import NodeView
from xpeer.identity import PeerId
from xpeer.manifest.round import Round

PAIR = 2


class Company:
    """The members that a slot gives us.

    Args:
        me: our PeerID.
        swarm_id: seed of the matching.
        rules: section `round` of the manifest.
        host: the node.
        partners: remembers how exchanges went.
    """

    def __init__(
        self, me: PeerId, swarm_id: str, rules: Round, host: NodeView, partners: Partners
    ) -> None:
        self._me = me
        self._swarm_id = swarm_id
        self._rules = rules
        self._host = host
        self._partners = partners

    def has_nothing_due(self, peer_id: PeerId, slot: int) -> bool:
        """Whether no exchange is due between us. A group that can't merge with two members may need
        members that have ended, for the sake of those that have not.
        """
        if not self._host.has_nothing_due(peer_id):
            return False
        return self._rules.least_group == PAIR or all(
            map(self._host.has_nothing_due, self.group(slot))
        )

    def avoided(self, *, proposing: bool = True) -> frozenset[PeerId]:
        """Partners that we avoid now. The matching names them all the same."""
        return self._partners.avoided(self._host.partners(), proposing=proposing)

    def shunned(self, peer_id: PeerId) -> bool:
        """Whether we refuse a peer's proposals now. One without a card is judged by its own record,
        so that nobody gains by hiding its card.
        """
        if peer_id in self._host.partners():
            return peer_id in self.avoided(proposing=False)
        return self._partners.shuns(peer_id)

    def group_without_avoided(self, slot: int) -> list[PeerId]:
        """The others of our group in this slot, without those that we avoid."""
        avoided = self.avoided()
        return [peer for peer in self.group(slot) if peer not in avoided]

    def candidates(self, slot: int, *also: PeerId) -> list[PeerId]:
        """The partner that the slot's matching of pairs names, then the fallbacks, best first."""
        members = {*self._host.partners(), self._me, *also}
        return matching.partner(self._swarm_id, slot, members, self._me, self._host.zones())

    def group(self, slot: int) -> list[PeerId]:
        """The others of our group in this slot, by the matching."""
        members = [*self._host.partners(), self._me]
        return matching.group(
            self._swarm_id, slot, members, self._me, self._rules.group, self._host.zones()
        )

    def matched(self, peer_id: PeerId, slot: int) -> bool:
        """Whether the slot's matching, as we compute it, pairs or groups us with this member."""
        if self._rules.group != PAIR:
            return peer_id in self.group(slot)
        return self.candidates(slot, peer_id)[:1] == [peer_id]

    def left_free(self, slot: int) -> bool:
        """Whether the slot's matching names a partner that we avoid: then we accept anybody."""
        avoided = self.avoided()
        return self._rules.group == PAIR and self.candidates(slot)[:1] in [[p] for p in avoided]
