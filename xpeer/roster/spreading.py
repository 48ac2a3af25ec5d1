"""How cards and beats spread among members: the messages of two that talk. No IO, no clock.

Anti-entropy (Demers et al. 1987; in the form of van Renesse et al. 2008, "Efficient reconciliation
and flow control for anti-entropy protocols"): one member sends a digest, eight bytes for every
member that it knows. The other answers with cards that differ and links that are later. Names in a
digest are short hashes. Each question has its own salt, so two names that collide in one question
differ in the next.
"""

from __future__ import annotations

import secrets
import struct
from collections.abc import Iterable, Mapping
from typing import Annotated

import msgspec
from msgspec import Meta, Struct

from xpeer.identity import PeerId, blake2b
from xpeer.leaves import Parts, Public, seen_by
from xpeer.network.membership.certificates import MAX_CREDENTIAL_BYTES
from xpeer.roster.cards import LINK_BYTES, Beat, Known, SignedCard

MAX_MEMBERS = 4096
MAX_CARDS = 64
"""Cards in one message, at most. A member that lacks more asks again."""
SALT_BYTES = 8
_ENTRY = struct.Struct("<IHH")  # name, mark of the card, link
_BEAT = struct.Struct(f"<IH{LINK_BYTES}s")  # name, link, value
MAX_DIGEST_BYTES = MAX_MEMBERS * _ENTRY.size
MAX_BEATS_BYTES = MAX_MEMBERS * _BEAT.size
MAX_NEWS_BYTES = 256 << 10
"""Size of a sealed question or answer, at most."""


@seen_by("members")
class News(Struct, frozen=True, forbid_unknown_fields=True, array_like=True):
    """A member's card, as one member sends it to another."""

    owner: Public[Annotated[str, Meta(max_length=80)]]
    credential: Public[Annotated[bytes, Meta(max_length=MAX_CREDENTIAL_BYTES)]]
    signed: Parts[SignedCard]
    beat: Parts[Beat]


@seen_by("members")
class Question(Struct, frozen=True, forbid_unknown_fields=True, array_like=True):
    """A pull (with a digest: send what I lack) or a push (without one)."""

    salt: Public[Annotated[bytes, Meta(min_length=SALT_BYTES, max_length=SALT_BYTES)]]
    digest: Public[Annotated[bytes, Meta(max_length=MAX_DIGEST_BYTES)] | None]
    cards: Parts[Annotated[list[News], Meta(max_length=MAX_CARDS)]] = []
    beats: Public[Annotated[bytes, Meta(max_length=MAX_BEATS_BYTES)]] = b""
    """The asker's own beat, and those that reached it since its last question."""


@seen_by("members")
class Answer(Struct, frozen=True, forbid_unknown_fields=True, array_like=True):
    """The answer to a question; empty to a push."""

    cards: Parts[Annotated[list[News], Meta(max_length=MAX_CARDS)]] = []
    beats: Public[Annotated[bytes, Meta(max_length=MAX_BEATS_BYTES)]] = b""
    more: Public[bool] = False
    """True iff the asker lacks more cards than one answer holds: it should ask again."""
    unknown: Public[bool] = False
    """True iff the asker's own card is unknown here or differs: it should send it."""


def new_salt() -> bytes:
    """Draw a salt for one question."""
    return secrets.token_bytes(SALT_BYTES)


def digest_of(known: Iterable[Known], salt: bytes) -> bytes:
    """Name, mark and link of each member, in eight bytes each."""
    entries = (_ENTRY.pack(_name(m.owner, salt), m.signed.mark, m.beat.link) for m in known)
    return b"".join(entries)


def read_digest(digest: bytes) -> dict[int, tuple[int, int]]:
    """Mark and link by name. An incomplete last entry is ignored."""
    whole = len(digest) - len(digest) % _ENTRY.size
    return {name: (mark, link) for name, mark, link in _ENTRY.iter_unpack(digest[:whole])}


def later_than(
    digest: Mapping[int, tuple[int, int]], known: Iterable[Known], salt: bytes
) -> tuple[list[Known], list[Known]]:
    """Compare a digest with what we know.

    Returns:
        Members whose cards the digest's sender lacks or has in another version, then members of
        whom it only lacks a later link.
    """
    cards, beats = [], []
    for member in known:
        mark, link = digest.get(_name(member.owner, salt), (None, 0))
        if mark != member.signed.mark:
            cards.append(member)
        elif link < member.beat.link:
            beats.append(member)
    return cards, beats


def pack_beats(known: Iterable[Known], salt: bytes) -> bytes:
    """The members' links, in 22 bytes each."""
    return b"".join(_BEAT.pack(_name(m.owner, salt), m.beat.link, m.beat.value) for m in known)


def unpack_beats(data: bytes, known: Iterable[Known], salt: bytes) -> list[tuple[Known, Beat]]:
    """Links of members that we know. Unknown names and an incomplete last link are ignored."""
    named = {_name(member.owner, salt): member for member in known}
    whole = len(data) - len(data) % _BEAT.size
    return [
        (named[name], Beat(link, value))
        for name, link, value in _BEAT.iter_unpack(data[:whole])
        if name in named
    ]


def _name(owner: PeerId, salt: bytes) -> int:
    return int.from_bytes(blake2b(salt, owner.encode(), size=4), "little")


question_decoder = msgspec.msgpack.Decoder(Question)
answer_decoder = msgspec.msgpack.Decoder(Answer)
