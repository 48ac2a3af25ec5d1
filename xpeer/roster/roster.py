"""Who is alive: every member's card and beats, from other members or else from the DHT.

Every few seconds a member asks another, drawn at random, for what it does not know yet
(`spreading`). A card that changes is pushed at once, and its receivers push it on, so that rosters
agree within seconds. Every member's card also lies in the DHT, for nodes that know nobody. There it
is sealed, padded, and signed by its owner, under a key that is derived from the swarm key. A node
without the swarm key sees who stores and when, and nothing else. The cards are spread over many
keys, since a key's dictionary is always returned whole. A member that others answer reads one key
now and then.

How often all this happens, and so its cost, follows from the number of members (`pace`).
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
"""Each receiver of news forwards it to this many members."""
STRAY = 0.125
"""Fraction of questions that go to a peer that is not listed, so that a split swarm rejoins."""
DEAF_S = 60.0
"""An unlisted peer that did not answer is not asked again for this long."""
ASK_TIMEOUT_S = 5.0

SHARD_EVERY_S = 400.0
STORE_EVERY_S, STORE_AGAIN_S = 400.0, 30.0
"""Seconds between two stores of our card: after a success, and after a failure. A store asks some
ten nodes, and may cost more than all questions."""
LONELY_S = 10.0
"""If nobody answered for this long, the DHT is read instead ..."""
LONELY_READ_S, LONELY_SHARDS = 3.0, 16
"""... every LONELY_READ_S, this many keys at a time."""
MAX_WALK = 50_000
"""Links that we hash for one message, its cards and its beats, at most: 30 ms. Members that are
left out come with the next message."""
_T = TypeVar("_T")


class _Walk:
    """Counts the links that are hashed for one message, so that no message costs more."""

    def __init__(self) -> None:
        self._left = MAX_WALK

    def allows(self, links: int) -> bool:
        """Count so many links; whether they may be hashed."""
        self._left -= max(0, links)
        return self._left >= 0


class Roster:
    """The members that are alive, as far as this node knows.

    Args:
        swarm: the network.
        keyring: has the swarm key, which seals messages and stored cards.
        max_members: most members of the swarm; it sets the number of DHT keys.
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
        """First failure of a listed member since somebody answered; empty if there was none."""
        self.unstored = False
        """True iff no node of the DHT accepted our card when we last tried to store it."""

    async def serve(self) -> None:
        """Answer other members' questions."""

        async def handle(peer_id: PeerId, request: bytes) -> bytes:
            if not self._limit.allows(peer_id, known=True):
                return b""
            question = self._unseal(request, spreading.question_decoder)
            return b"" if question is None else self._seal(self._answer(peer_id, question))

        await self._swarm.serve_call(PROTOCOL, handle, "observer", spreading.MAX_NEWS_BYTES)

    async def announce(self, record: MemberRecord) -> bool:
        """Renew our card, push it at once if it changed, and store it in the DHT when that is due.

        Returns:
            False: a store was due, and no node accepted the card.
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
        """Ask a member for news and push on what reached us; read the DHT if that is due."""
        now = self._clock()
        self._expire(now)
        news, self._news = self._news, set()
        calls = [self._push(news)] if news else []
        if now - self._asked_s >= question_every_s(len(self._known)) * self._random.uniform(
            0.8, 1.0
        ):
            self._asked_s = now
            calls.append(self._ask_somebody())
        await asyncio.gather(*calls)
        lonely = self._clock() - self._heard_s > LONELY_S
        if now - self._read_s >= (LONELY_READ_S if lonely else SHARD_EVERY_S):
            self._read_s = now
            keys = self._shards.keys
            count = min(len(keys), LONELY_SHARDS) if lonely else 1
            await self._read(self._random.sample(keys, count))

    def members(self) -> dict[PeerId, MemberRecord]:
        """Members that proved lately that they are alive. We are among them after `announce`."""
        now = self._clock()
        return {peer: known.card.record for peer, known in self._known.items() if known.until > now}

    def zones(self) -> dict[PeerId, str]:
        """Zones that the members declare, for `matching`."""
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
        """Send the cards of these owners to FANOUT members."""
        listed = [peer for peer in self._known if peer != self._me and peer not in owners]
        receivers = self._random.sample(listed, min(FANOUT, len(listed)))
        chosen = list(owners)[: spreading.MAX_CARDS]
        await asyncio.gather(*(self._ask(peer, chosen) for peer in receivers))

    async def _ask(
        self, peer: PeerId, owners: Iterable[PeerId] = (), *, with_digest: bool = False
    ) -> Answer | None:
        """Send one question and learn from the answer; None if there was none.

        Args:
            peer: whom to ask.
            owners: their cards go with the question.
            with_digest: True = ask for what we lack; False = only push.
        """
        salt, advanced = spreading.new_salt(), {self._me}
        if with_digest:  # send all beats that came since the last question, and ask for the rest
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
        digest = spreading.read_digest(question.digest)
        lacking, late = spreading.later_than(digest, self._known.values(), question.salt)
        self._random.shuffle(lacking)  # a peer that asks again gets other cards
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
        """Note all valid cards and beats; returns the owners whose cards were new to us."""
        now, fresh, walk = self._clock(), set(), _Walk()
        for news in cards:
            try:
                self._swarm.membership.admit(news.owner, news.credential)
            except NotAuthorisedError as e:
                log.debug("a card without a valid credential: %s", e)
                continue
            if self._note_card(news.owner, news.signed, news.beat, now, walk):
                fresh.add(PeerId(news.owner))
        for member, beat in spreading.unpack_beats(beats, self._known.values(), salt):
            if member.owner == self._me or not walk.allows(beat.link - member.beat.link):
                continue
            if member.advance(beat, now):
                self._advanced.add(member.owner)
        return fresh

    def _note_card(
        self, owner: str, signed: SignedCard, beat: Beat, now: float, walk: _Walk
    ) -> bool:
        """Note a card, if it is valid. True iff it is new to us."""
        peer_id = PeerId(owner)
        known = self._known.get(peer_id)
        if peer_id == self._me or self._swarm.membership.certificate_of(owner) is None:
            return False
        if known is not None and known.signed == signed:
            if walk.allows(beat.link - known.beat.link):
                known.advance(beat, now)
            return False
        card = signed.open(owner, self._swarm_id)
        if card is None or not _is_of_now(card, beat, now):
            return False
        if known is not None and known.card.version_ms >= card.version_ms:
            return False
        if not walk.allows(beat.link) or not beat.follows(Beat(0, card.anchor)):
            return False
        if known is None and len(self._known) >= self._max_members:
            log.warning("more than limits.max_members = %d members", self._max_members)
            return False
        card = self._believed(card)
        self._swarm.learn(card.record.addresses)
        self._known[peer_id] = Known(peer_id, signed, card, beat, beat.alive_until(card))
        return True

    def _believed(self, card: MemberCard) -> MemberCard:
        """The card with the role from the certificate, and without addresses of other peers.

        An owner could lie about both.
        """
        record = card.record
        certificate = self._swarm.membership.certificate_of(record.peer_id)
        own = [a for a in record.addresses if is_dialled(a) and peer_of(a) == record.peer_id]
        role = certificate.role if certificate else record.role
        record = msgspec.structs.replace(record, role=role, addresses=own)
        return msgspec.structs.replace(card, record=record)

    def _expire(self, now: float) -> None:
        """Forget members that fell silent or whose certificates expired."""
        of = self._swarm.membership.certificate_of
        for peer, known in list(self._known.items()):
            if peer != self._me and (known.until <= now or of(peer) is None):
                del self._known[peer]

    # The DHT

    async def _read(self, keys: list[str]) -> None:
        for owner, stored in await self._shards.read(keys):
            now = self._clock()
            noted = self._note_card(owner, stored.signed, stored.beat, now, _Walk())
            if noted or owner in self._known:
                continue
            card = stored.signed.open(owner, self._swarm_id)
            if card is not None:  # the owner was alive a while ago: it is worth asking
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
    """Whether card and beat show that the owner is alive now, and are not from the future."""
    latest = max(card.version_ms / 1000, card.since_s + LINK_S * beat.link)
    return beat.alive_until(card) > now and latest <= now + MAX_SKEW_S
