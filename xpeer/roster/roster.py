"""Who is alive: every member's card and beats, from other members; from the DHT if nobody is met.

A member asks another, drawn at random, every few seconds what it does not know yet (`spreading`). A
card that changes is pushed at once, and on by whoever it reaches, so that rosters agree within
seconds. In the DHT lies every member's card, for those who know nobody: sealed under a keyed hash
of the swarm key, padded, signed by its owner; a node without the key sees who stores and when, and
nothing else. A key's dictionary is returned whole, so the cards are spread over many keys, and a
member that is met reads one of them now and then.

How often, and so what it costs, follows from the number of members (`pace`).
"""

from __future__ import annotations

import asyncio
import logging
import math
import random
from collections.abc import Callable, Collection, Iterable
from typing import TypeVar

import msgspec
from hivemind.utils import get_dht_time
from msgspec import Struct
from nacl.exceptions import CryptoError

from xpeer.errors import NotAuthorisedError, PeerError
from xpeer.identity import PeerId
from xpeer.network.addresses import is_dialled, peer_of
from xpeer.network.introductions import RateLimit
from xpeer.network.membership.keyring import KeyRing
from xpeer.network.swarm import Swarm
from xpeer.roster import spreading
from xpeer.roster.cards import LINK_S, MAX_SKEW_S, Beat, Known, MemberCard, MemberRecord, SignedCard
from xpeer.roster.dht_cards import Shards, Stored
from xpeer.roster.own_card import OwnCard
from xpeer.roster.pace import TTL_S, question_every_s
from xpeer.roster.spreading import Answer, News, Question

__all__ = ["ANNOUNCE_EVERY_S", "TTL_S", "MemberRecord", "Roster"]

log = logging.getLogger("xpeer.network")

PROTOCOL = "xpeer/roster/1"
_SEALED = b"xpeer/roster/v2"
"""Purpose of the key that messages are sealed with."""
ANNOUNCE_EVERY_S = 10.0
FANOUT = 3
"""Members that news is pushed to, by each whom it reaches."""
STRAY = 0.125
"""Share of questions that go to somebody who is not listed: two halves of a swarm find together."""
DEAF_S = 60.0
"""Whoever is not listed and did not answer is left alone for this long."""
ASK_TIMEOUT_S = 5.0

SHARD_EVERY_S = 400.0
STORE_EVERY_S, STORE_AGAIN_S = 400.0, 30.0
"""A store asks some ten nodes, and may cost more than all questions; again after a failure."""
LONELY_S = 10.0
"""Without an answer for this long the DHT is read instead ..."""
LONELY_READ_S, LONELY_SHARDS = 3.0, 16
"""... so often, and so many keys at a time."""
MAX_WALK = 50_000
"""Links of chains that one message may have us compute: 30 ms."""
_T = TypeVar("_T")


class Roster:
    """The live members, as last heard of.

    Args:
        swarm: the network.
        keyring: has the swarm key, which messages and stored cards are sealed with.
        max_members: sets the number of keys.
        clock: shared wall clock, seconds.
    """

    def __init__(
        self,
        swarm: Swarm,
        keyring: KeyRing,
        max_members: int,
        clock: Callable[[], float] = get_dht_time,
    ) -> None:
        self._swarm = swarm
        self._clock = clock
        self._me = swarm.peer_id
        self._swarm_id = swarm.membership.swarm_id
        self._keyring = keyring
        self._shards = Shards(swarm, keyring, max_members)
        self._max_members = max_members
        self._known: dict[PeerId, Known] = {}
        self._own = OwnCard(swarm)
        self._random = random.Random()
        self._limit = RateLimit()
        self._news: set[PeerId] = set()
        self._advanced: set[PeerId] = set()
        self._deaf: dict[PeerId, float] = {}
        self._heard_s = self._asked_s = self._read_s = self._stored_s = -math.inf
        self.silence = ""
        """Why no listed member has answered since the last that did; empty: the last one did."""
        self.unstored = False
        """True iff no node of the DHT took our card when it was stored last."""

    async def serve(self) -> None:
        """Answer other members' questions."""

        async def handle(peer_id: PeerId, request: bytes) -> bytes:
            if not self._limit.allows(peer_id, known=True):
                return b""
            question = self._unseal(request, spreading.question_decoder)
            return b"" if question is None else self._seal(self._answer(peer_id, question))

        await self._swarm.serve_call(PROTOCOL, handle, "observer", spreading.MAX_NEWS_BYTES)

    async def announce(self, record: MemberRecord) -> bool:
        """Say that we are alive, and what we are; at once if it changed.

        Returns:
            False: this was the time to store it in the DHT, and no node took it.
        """
        now = self._clock()
        before = self._known.get(self._me)
        known = self._own.renew(before, record, len(self._known), now)
        self._known[self._me] = known
        if known is not before:
            await self._push([self._me])
        if known is before and now - self._stored_s < STORE_EVERY_S:
            return True
        stored = await self._shards.store(Stored(known.signed, known.beat), now)
        if not stored:  # members still hear of us from one another; newcomers may not
            log.info("no node of the DHT took our card; again in %g s", STORE_AGAIN_S)
        self.unstored = not stored
        self._stored_s = now if stored else now - STORE_EVERY_S + STORE_AGAIN_S
        return stored

    async def refresh(self) -> None:
        """Ask a member for what is new, tell others what was pushed to us, read the DHT if due."""
        now = self._clock()
        self._expire(now)
        news, self._news = self._news, set()
        telling = [self._push(news)] if news else []
        if now - self._asked_s >= question_every_s(len(self._known)) * self._random.uniform(
            0.8, 1.0
        ):
            self._asked_s = now
            telling.append(self._ask_somebody())
        await asyncio.gather(*telling)
        lonely = self._clock() - self._heard_s > LONELY_S
        if now - self._read_s >= (LONELY_READ_S if lonely else SHARD_EVERY_S):
            self._read_s = now
            keys = self._shards.keys
            count = min(len(keys), LONELY_SHARDS) if lonely else 1
            await self._read(self._random.sample(keys, count))

    def members(self) -> dict[PeerId, MemberRecord]:
        """Those that showed lately that they are alive, ourselves included once we announced."""
        now = self._clock()
        return {peer: known.card.record for peer, known in self._known.items() if known.until > now}

    def zones(self) -> dict[PeerId, str]:
        """What the members declare, for `matching`."""
        return {peer: record.zone for peer, record in self.members().items()}

    # Asking and answering

    async def _ask_somebody(self) -> None:
        peer = self._somebody()
        if peer is None:
            return
        for _ in range(-(-self._max_members // spreading.MAX_CARDS)):
            answer = await self._ask(peer, with_digest=True)
            if answer is None:
                if peer not in self._known:
                    self._deaf[peer] = self._clock() + DEAF_S
                return
            if answer.unknown and self._me in self._known:
                await self._ask(peer, [self._me])
            if not answer.more:
                return

    def _somebody(self) -> PeerId | None:
        now = self._clock()
        listed = [peer for peer in self._known if peer != self._me]
        if listed and self._random.random() >= STRAY:
            return self._random.choice(listed)
        self._deaf = {peer: until for peer, until in self._deaf.items() if until > now}
        strays = [
            peer
            for peer in self._swarm.candidates()
            if peer not in self._known and peer not in self._deaf
        ]
        return self._random.choice(strays or listed) if strays or listed else None

    async def _push(self, owners: Collection[PeerId]) -> None:
        """Tell some members about cards that changed."""
        listed = [peer for peer in self._known if peer != self._me and peer not in owners]
        told = self._random.sample(listed, min(FANOUT, len(listed)))
        chosen = list(owners)[: spreading.MAX_CARDS]
        await asyncio.gather(*(self._ask(peer, chosen) for peer in told))

    async def _ask(
        self, peer: PeerId, owners: Iterable[PeerId] = (), *, with_digest: bool = False
    ) -> Answer | None:
        """One question; None if there was no answer."""
        salt, advanced = spreading.new_salt(), {self._me}
        if with_digest:  # tell what we heard since the last time, and ask for the rest
            advanced |= self._advanced
            self._advanced = set()
        question = Question(
            salt,
            spreading.digest_of(self._known.values(), salt) if with_digest else None,
            self._news_of(self._known[owner] for owner in owners if owner in self._known),
            spreading.pack_beats((m for o, m in self._known.items() if o in advanced), salt),
        )
        try:
            reply = await self._swarm.call(peer, PROTOCOL, self._seal(question), ASK_TIMEOUT_S)
        except PeerError as e:
            log.debug("the roster of %s: %s", peer[-8:], e)
            if peer in self._known:  # others may be bootstrap nodes, which have no roster
                self.silence = self.silence or f"{peer[-8:]}: {e}"
            return None
        answer = self._unseal(reply, spreading.answer_decoder)
        if answer is not None:
            self._heard_s, self.silence = self._clock(), ""
            self._learn(answer.cards, answer.beats, salt)
        return answer

    def _answer(self, peer_id: PeerId, question: Question) -> Answer:
        self._expire(self._clock())
        self._news |= self._learn(question.cards, question.beats, question.salt)
        if question.digest is None:
            return Answer()
        self._heard_s, self.silence = self._clock(), ""
        told = spreading.read_digest(question.digest)
        lacking, late = spreading.later_than(told, self._known.values(), question.salt)
        self._random.shuffle(lacking)  # whoever asks again gets others
        return Answer(
            self._news_of(lacking[: spreading.MAX_CARDS]),
            spreading.pack_beats(late, question.salt),
            more=len(lacking) > spreading.MAX_CARDS,
            unknown=peer_id not in self._known or any(m.owner == peer_id for m in lacking),
        )

    def _news_of(self, members: Iterable[Known]) -> list[News]:
        news = []
        for member in members:
            own = self._swarm.membership.own if member.owner == self._me else None
            credential = (
                own.to_bytes() if own else self._swarm.membership.credential_of(member.owner)
            )
            if credential is not None:
                news.append(News(member.owner, credential, member.signed, member.beat))
        return news

    # Learning

    def _learn(self, cards: Iterable[News], beats: bytes, salt: bytes) -> set[PeerId]:
        """Take what is valid; whose card was new."""
        now, fresh = self._clock(), set()
        for news in cards:
            try:
                self._swarm.membership.admit(news.owner, news.credential)
            except NotAuthorisedError as e:
                log.debug("a card without a valid credential: %s", e)
                continue
            if self._take(news.owner, news.signed, news.beat, now):
                fresh.add(PeerId(news.owner))
        walked = 0
        for member, beat in spreading.unpack_beats(beats, self._known.values(), salt):
            walked += max(0, beat.link - member.beat.link)
            if walked <= MAX_WALK and member.owner != self._me and member.advance(beat, now):
                self._advanced.add(member.owner)
        return fresh

    def _take(self, owner: str, signed: SignedCard, beat: Beat, now: float) -> bool:
        """Note a card; whether it is new to us."""
        peer_id = PeerId(owner)
        known = self._known.get(peer_id)
        if peer_id == self._me or self._swarm.membership.certificate_of(owner) is None:
            return False
        if known is not None and known.signed == signed:
            known.advance(beat, now)
            return False
        card = signed.open(owner, self._swarm_id)
        if card is None or not _is_of_now(card, beat, now):
            return False
        if known is not None and known.card.version_ms >= card.version_ms:
            return False
        if not beat.follows(Beat(0, card.anchor)):
            return False
        if known is None and len(self._known) >= self._max_members:
            log.warning("more than limits.max_members = %d members", self._max_members)
            return False
        card = self._believed(card)
        self._swarm.learn(card.record.addresses)
        self._known[peer_id] = Known(peer_id, signed, card, beat, beat.alive_until(card))
        return True

    def _believed(self, card: MemberCard) -> MemberCard:
        """What the owner can lie about is replaced by what the admin signed, or dropped."""
        record = card.record
        certificate = self._swarm.membership.certificate_of(record.peer_id)
        own = [a for a in record.addresses if is_dialled(a) and peer_of(a) == record.peer_id]
        role = certificate.role if certificate else record.role
        record = msgspec.structs.replace(record, role=role, addresses=own)
        return msgspec.structs.replace(card, record=record)

    def _expire(self, now: float) -> None:
        """Forget who fell silent, or is no member any more."""
        of = self._swarm.membership.certificate_of
        for peer, known in list(self._known.items()):
            if peer != self._me and (known.until <= now or of(peer) is None):
                del self._known[peer]

    # The DHT

    async def _read(self, keys: list[str]) -> None:
        for owner, stored in await self._shards.read(keys):
            now = self._clock()
            if self._take(owner, stored.signed, stored.beat, now) or owner in self._known:
                continue
            card = stored.signed.open(owner, self._swarm_id)
            if card is not None:  # it was alive a while ago: worth asking
                self._swarm.learn(self._believed(card).record.addresses)

    # Sealing

    def _seal(self, message: Struct) -> bytes:
        return bytes(self._keyring.box(_SEALED).encrypt(msgspec.msgpack.encode(message)))

    def _unseal(self, sealed: bytes, decoder: msgspec.msgpack.Decoder[_T]) -> _T | None:
        try:
            return decoder.decode(self._keyring.box(_SEALED).decrypt(sealed))
        except (CryptoError, ValueError, msgspec.MsgspecError) as e:
            log.debug("a roster message does not open: %s", type(e).__name__)
            return None


def _is_of_now(card: MemberCard, beat: Beat, now: float) -> bool:
    """Whether it says that its owner is alive, and is not from the future."""
    latest = max(card.version_ms / 1000, card.since_s + LINK_S * beat.link)
    return beat.alive_until(card) > now and latest <= now + MAX_SKEW_S
