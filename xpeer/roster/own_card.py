"""This node's own card: signed anew when its content changes, kept alive by beats otherwise."""

from __future__ import annotations

import math

import msgspec

from xpeer.errors import ConfigError
from xpeer.identity import Domain
from xpeer.network.swarm import Swarm
from xpeer.roster.cards import (
    MAX_CARD_BYTES,
    Beat,
    Known,
    LivenessChain,
    MemberCard,
    MemberRecord,
    SignedCard,
)
from xpeer.roster.pace import BEATS_PER_LIFETIME, TTL_S, bounded_lifetime_s


class OwnCard:
    """Signs our cards, and keeps the hash chain whose links prove that we are alive.

    Args:
        swarm: signs for us.
    """

    def __init__(self, swarm: Swarm) -> None:
        self._swarm = swarm
        self._chain: LivenessChain | None = None  # None until the first card
        self._lifetime_s = TTL_S

    def renew(self, known: Known | None, record: MemberRecord, members: int, now: float) -> Known:
        """The card to publish from now on: a new one, or the old one with the chain's next link.

        Args:
            known: our card so far; None = there is none.
            record: the content that the card should have.
            members: number of members. It bounds how often each may publish a link.
            now: seconds, by the shared clock.

        Returns:
            `known` itself with a later beat, if its content is still right; else a new card.

        Raises:
            ConfigError: no other member could read a card with this content.
        """
        lifetime_s = self._lifetime_of(members)
        if known is not None and self._chain is not None and not self._chain.ends(now):
            then = known.card
            same_slot = msgspec.structs.replace(record, slot=then.record.slot)
            if same_slot == then.record and lifetime_s == then.lifetime_s:
                known.beat = self._chain.beat(now, lifetime_s / BEATS_PER_LIFETIME)
                known.until = known.beat.alive_until(then)
                return known
        self._lifetime_s = lifetime_s
        self._chain = LivenessChain.begin(now)
        version_ms = max(int(now * 1000), known.card.version_ms + 1 if known else 0)
        card = MemberCard(record, version_ms, now, lifetime_s, self._chain.links[0])
        body = msgspec.msgpack.encode(card)
        swarm_id = self._swarm.membership.swarm_id
        signed = SignedCard(body, self._swarm.sign(Domain.CARD, swarm_id.encode() + body))
        _require_readable(signed)
        beat, me = Beat(0, card.anchor), self._swarm.peer_id
        return Known(me, signed, card, beat, beat.alive_until(card))

    def _lifetime_of(self, members: int) -> float:
        """The lifetime that bounds the traffic of links; it is shortened late, lest it swing."""
        needed = bounded_lifetime_s(members)
        shorter = bounded_lifetime_s(math.ceil(1.25 * members)) < self._lifetime_s
        return needed if needed > self._lifetime_s or shorter else self._lifetime_s


def _require_readable(signed: SignedCard) -> None:
    """Refuse a card that others would drop: this node would be alone, and would not know why.

    msgspec checks bounds when it decodes, never when an object is made.
    """
    try:
        msgspec.msgpack.decode(msgspec.msgpack.encode(signed), type=SignedCard)
        msgspec.msgpack.decode(signed.body, type=MemberCard)
    except msgspec.ValidationError as e:
        raise ConfigError(
            f"this node's card can't be read by other members ({len(signed.body)} bytes, "
            f"{MAX_CARD_BYTES} at most): {e}",
            "shorten network.announce, network.listen or network.zone",
        ) from e
