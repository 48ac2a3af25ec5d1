"""Members' cards and beats. A card says what a member is; a beat of 16 bytes proves it is alive.

The owner signs a card when it changes. Between changes a hash chain shows that the owner is alive
(Lamport 1981, "Password authentication with insecure communication"). The card holds link 0 of a
chain, and only the owner knows the later links. It publishes link n no earlier than n * LINK_S
after the chain's start, so that link n proves that it was alive then. Whoever relays a card or a
link can neither forge nor renew it. No IO, no clock.

What this does not give: a live owner need not be reachable, and what it says of itself need not be
true.
"""

from __future__ import annotations

import hashlib
import secrets
from dataclasses import dataclass
from typing import Annotated

import msgspec
from msgspec import Meta, Struct

from xpeer.identity import Domain, PeerId, verify
from xpeer.leaves import Parts, Public, Timing, seen_by
from xpeer.network.membership.certificates import Role

LINK_S = 5.0
LINKS = 1440
"""Links of a chain: two hours. Then its owner signs a new card. Hashing all of them takes 1 ms."""
LINK_BYTES = 16
MAX_CARD_BYTES = 2048
MAX_LIFETIME_S = 300.0
MAX_SKEW_S = 30.0
"""A card from a clock this far ahead of ours still counts."""

LinkValue = Annotated[bytes, Meta(min_length=LINK_BYTES, max_length=LINK_BYTES)]


@seen_by(
    "members",
    "the speed is the declared one: none is measured under privacy; the phase says "
    "when steps or budget ended",
)
class MemberRecord(Struct, frozen=True, forbid_unknown_fields=True, array_like=True):
    """What a member says of itself. Under privacy, nothing in it depends on the member's text."""

    peer_id: Public[Annotated[str, Meta(max_length=80)]]
    addresses: Public[Annotated[list[Annotated[str, Meta(max_length=300)]], Meta(max_length=8)]]
    role: Public[Role]
    phase: Timing[Annotated[str, Meta(max_length=20, pattern="^[a-z-]+\\Z")]]
    speed: Public[Annotated[float, Meta(ge=0, le=1e9)]]
    """Tokens/s: declared, or measured where the swarm trains without privacy; 0 = unknown."""
    slot: Timing[Annotated[int, Meta(ge=0)]]
    """The slot in which the card was signed."""
    zone: Public[Annotated[str, Meta(max_length=32, pattern="^[A-Za-z0-9._-]*\\Z")]] = ""
    """Declared label. Members of one zone have fast links among themselves; "" = near nobody."""


@seen_by("members")
class MemberCard(Struct, frozen=True, forbid_unknown_fields=True, array_like=True):
    """A card as its owner signs it."""

    record: Parts[MemberRecord]
    version_ms: Public[Annotated[int, Meta(ge=0, lt=1 << 48)]]
    """The time of signing, in ms. Of two cards of an owner the later one counts."""
    since_s: Public[Annotated[float, Meta(ge=0, lt=1 << 40)]]
    """When the chain begins, by the shared clock."""
    lifetime_s: Public[Annotated[float, Meta(gt=0, le=MAX_LIFETIME_S)]]
    """How long the owner counts as alive after each link."""
    anchor: Public[LinkValue]
    """Link 0."""


@seen_by("members")
class SignedCard(Struct, frozen=True, forbid_unknown_fields=True, array_like=True):
    """A card as it travels."""

    body: Parts[Annotated[bytes, Meta(max_length=MAX_CARD_BYTES)]]
    signature: Public[Annotated[bytes, Meta(min_length=64, max_length=64)]]

    @property
    def mark(self) -> int:
        """16 bits that differ between an owner's cards, except by chance (1 in 65,536)."""
        return int.from_bytes(self.signature[:2], "little")

    def open(self, owner: str, swarm_id: str) -> MemberCard | None:
        """The card; None unless this owner signed it for this swarm."""
        if not verify(owner, Domain.CARD, swarm_id.encode() + self.body, self.signature):
            return None
        try:
            card = msgspec.msgpack.decode(self.body, type=MemberCard)
        except (msgspec.MsgspecError, UnicodeDecodeError):
            return None
        return card if card.record.peer_id == owner else None


@seen_by("members")
class Beat(Struct, frozen=True, forbid_unknown_fields=True, array_like=True):
    """A link of an owner's chain: proof that the owner is alive."""

    link: Public[Annotated[int, Meta(ge=0, le=LINKS)]]
    value: Public[LinkValue]

    def alive_until(self, card: MemberCard) -> float:
        """Until when the card's owner counts as alive, by the shared clock."""
        return card.since_s + LINK_S * self.link + card.lifetime_s

    def follows(self, known: Beat) -> bool:
        """Whether this is the same link as `known`, or a later one of its chain."""
        if self.link < known.link:
            return False
        value = self.value
        for _ in range(self.link - known.link):
            value = next_link(value)
        return value == known.value


def next_link(value: bytes) -> bytes:
    """The link before this one, towards the anchor. Nobody can compute the one after it."""
    return hashlib.blake2b(value, digest_size=LINK_BYTES, person=b"xpeer/beat/v1").digest()


@dataclass(frozen=True, slots=True)
class LivenessChain:
    """A chain with its secret, as its owner has it. `repr` never shows the links.

    Args:
        since_s: when it begins, by the shared clock.
        links: link 0 first, the secret last.
    """

    since_s: float
    links: tuple[bytes, ...]

    def __repr__(self) -> str:
        """Without the links, which are secret."""
        return f"LivenessChain(since_s={self.since_s})"

    @classmethod
    def begin(cls, now_s: float) -> LivenessChain:
        """Make a new chain from the operating system's randomness. That takes 1 ms."""
        links = [secrets.token_bytes(LINK_BYTES)]
        for _ in range(LINKS):
            links.append(next_link(links[-1]))
        return cls(now_s, tuple(reversed(links)))

    def beat(self, now_s: float, every_s: float = LINK_S) -> Beat:
        """The link to publish now, if one is published every `every_s` seconds."""
        step = max(1, round(every_s / LINK_S))
        link = int(max(0.0, now_s - self.since_s) / LINK_S) // step * step
        link = min(link, LINKS)
        return Beat(link, self.links[link])

    def ends(self, now_s: float) -> bool:
        """Whether the chain is nearly used up, so that a new one is due."""
        return now_s - self.since_s > LINK_S * LINKS - MAX_LIFETIME_S


@dataclass(slots=True)
class Known:
    """A listed member: its card and its latest beat."""

    owner: PeerId
    signed: SignedCard
    card: MemberCard
    beat: Beat
    until: float
    """When the member stops counting as alive, unless a later beat comes; shared clock, seconds."""

    def advance(self, beat: Beat, now_s: float) -> bool:
        """Note a later link. False: it is not later, lies in the future, or does not verify."""
        if beat.link <= self.beat.link or self.card.since_s + LINK_S * beat.link > (
            now_s + MAX_SKEW_S
        ):
            return False
        if not beat.follows(self.beat):
            return False
        self.beat, self.until = beat, beat.alive_until(self.card)
        return True
