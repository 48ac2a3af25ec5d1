"""What a member says of itself, signed once, and that it is alive, at 16 bytes a time.

A card is signed by its owner when it changes. Between changes a hash chain shows that it is alive
(Lamport 1981, "Password authentication with insecure communication"): the card holds the end of a
chain that only its owner can walk backwards, and link n, shown no earlier than n * LINK_S after the
chain's start, says that the owner was alive then. Whoever relays a card or a link can neither forge
nor renew it. No IO, no clock.

Not given: that a live owner can be reached, or that what it says of itself is true.
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
"""Of a chain: two hours; then its owner signs a new card. Walking all of it takes 1 ms."""
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
    """What a member says of itself. Under privacy nothing in it depends on its text."""

    peer_id: Public[Annotated[str, Meta(max_length=80)]]
    addresses: Public[Annotated[list[Annotated[str, Meta(max_length=300)]], Meta(max_length=8)]]
    role: Public[Role]
    phase: Timing[Annotated[str, Meta(max_length=20, pattern="^[a-z-]+\\Z")]]
    speed: Public[Annotated[float, Meta(ge=0, le=1e9)]]
    """Tokens/s: declared, or measured where the swarm trains without privacy; 0: unknown."""
    slot: Timing[Annotated[int, Meta(ge=0)]]
    """When the card was signed."""
    zone: Public[Annotated[str, Meta(max_length=32, pattern="^[A-Za-z0-9._-]*\\Z")]] = ""
    """Declared: members of a zone have fast links among themselves; "" = near nobody."""


@seen_by("members")
class MemberCard(Struct, frozen=True, forbid_unknown_fields=True, array_like=True):
    """What its owner signs."""

    record: Parts[MemberRecord]
    version_ms: Public[Annotated[int, Meta(ge=0, lt=1 << 48)]]
    """The time of signing: of two cards of an owner the later one counts."""
    since_s: Public[Annotated[float, Meta(ge=0, lt=1 << 40)]]
    """When the chain begins, by the shared clock."""
    lifetime_s: Public[Annotated[float, Meta(gt=0, le=MAX_LIFETIME_S)]]
    """How long a link says that its owner is alive."""
    anchor: Public[LinkValue]
    """Link 0."""


@seen_by("members")
class SignedCard(Struct, frozen=True, forbid_unknown_fields=True, array_like=True):
    """A card as it travels."""

    body: Parts[Annotated[bytes, Meta(max_length=MAX_CARD_BYTES)]]
    signature: Public[Annotated[bytes, Meta(min_length=64, max_length=64)]]

    @property
    def mark(self) -> int:
        """16 bits that tell two cards of an owner apart, but for 1 in 65,536."""
        return int.from_bytes(self.signature[:2], "little")

    def open(self, owner: str, swarm_id: str) -> MemberCard | None:
        """The card, if its owner signed it for this swarm."""
        if not verify(owner, Domain.CARD, swarm_id.encode() + self.body, self.signature):
            return None
        try:
            card = msgspec.msgpack.decode(self.body, type=MemberCard)
        except (msgspec.MsgspecError, UnicodeDecodeError):
            return None
        return card if card.record.peer_id == owner else None


@seen_by("members")
class Beat(Struct, frozen=True, forbid_unknown_fields=True, array_like=True):
    """A link of an owner's chain."""

    link: Public[Annotated[int, Meta(ge=0, le=LINKS)]]
    value: Public[LinkValue]

    def alive_until(self, card: MemberCard) -> float:
        """Until when it says that the card's owner is alive, by the shared clock."""
        return card.since_s + LINK_S * self.link + card.lifetime_s

    def follows(self, known: Beat) -> bool:
        """Whether it is a later link of the same chain, or the same one."""
        if self.link < known.link:
            return False
        value = self.value
        for _ in range(self.link - known.link):
            value = next_link(value)
        return value == known.value


def next_link(value: bytes) -> bytes:
    """One step towards the anchor; nobody can step back."""
    return hashlib.blake2b(value, digest_size=LINK_BYTES, person=b"xpeer/beat/v1").digest()


@dataclass(frozen=True, slots=True)
class LivenessChain:
    """An owner's own chain; `repr` never shows it.

    Args:
        since_s: when it begins, by the shared clock.
        links: link 0 first, the secret last.
    """

    since_s: float
    links: tuple[bytes, ...]

    def __repr__(self) -> str:
        """Show nothing secret."""
        return f"LivenessChain(since_s={self.since_s})"

    @classmethod
    def begin(cls, now_s: float) -> LivenessChain:
        """A new one, from the operating system's randomness; 1 ms."""
        links = [secrets.token_bytes(LINK_BYTES)]
        for _ in range(LINKS):
            links.append(next_link(links[-1]))
        return cls(now_s, tuple(reversed(links)))

    def beat(self, now_s: float, every_s: float = LINK_S) -> Beat:
        """The link to show now, if one is shown every so many seconds."""
        step = max(1, round(every_s / LINK_S))
        link = int(max(0.0, now_s - self.since_s) / LINK_S) // step * step
        link = min(link, LINKS)
        return Beat(link, self.links[link])

    def ends(self, now_s: float) -> bool:
        """Whether a new one is due."""
        return now_s - self.since_s > LINK_S * LINKS - MAX_LIFETIME_S


@dataclass(slots=True)
class Known:
    """What we know of a member."""

    owner: PeerId
    signed: SignedCard
    card: MemberCard
    beat: Beat
    until: float
    """By the shared clock."""

    def advance(self, beat: Beat, now_s: float) -> bool:
        """Take a later link; whether it was one. None from the future is looked at."""
        if beat.link <= self.beat.link or self.card.since_s + LINK_S * beat.link > (
            now_s + MAX_SKEW_S
        ):
            return False
        if not beat.follows(self.beat):
            return False
        self.beat, self.until = beat, beat.alive_until(self.card)
        return True
