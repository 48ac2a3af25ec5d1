"""Members gone bad, strangers who dial, and deaths in the middle: each costs one pairing."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
from pathlib import Path

import msgspec
import pytest
from hivemind.dht.routing import DHTID
from hivemind.dht.validation import DHTRecord
from hivemind.p2p import PeerID
from hivemind.utils import get_dht_time

from tests.factories import privacy_stamp
from tests.meetings import meet
from tests.swarm.conftest import Founder
from tests.swarm.test_network import ECHO, KEY, echo, record, until
from xpeer.errors import NotAuthorisedError, PeerError, Reason
from xpeer.forms import Form
from xpeer.identity import Identity, PeerId
from xpeer.network import admission, introductions
from xpeer.network.agreement import PROTOCOL, Agreement, Party, Proposer, answering
from xpeer.network.link import Link
from xpeer.network.membership.keyring import KeyRing
from xpeer.network.p2p import STREAMS_PER_PEER
from xpeer.network.swarm import Swarm
from xpeer.roster.roster import Roster
from xpeer.update import Checked, CompressedUpdate, PeerUpdate
from xpeer.wire.messages import Propose, Terms

FORM = Form("int8", 400_000)
SIZE = FORM.num_bytes
STAMP = privacy_stamp()
DEADLINE_S = 8.0


def open_files() -> int:
    """Of this process."""
    return len(list(Path("/proc/self/fd").iterdir()))


class Trainer:
    """Hands out bytes; stops in the middle of an exchange for as long as `go_on` is not set."""

    def __init__(self) -> None:
        self.in_the_middle, self.go_on = asyncio.Event(), asyncio.Event()
        self.merged = 0

    async def snapshot(
        self, meeting_id: int, fragment: int, *, averaging: bool
    ) -> CompressedUpdate:
        return CompressedUpdate(bytes(SIZE), FORM, 1, STAMP)

    async def verify(self, meeting_id: int, exchange_id: int, update: PeerUpdate) -> Checked:
        self.in_the_middle.set()
        await self.go_on.wait()
        return Checked(0.0)

    async def merge(self, meeting_id: int, weights: dict[int, float]) -> None:
        self.merged += 1

    def drop(self, meeting_id: int) -> None:
        return


class Peer:
    """A real peer's exchanging half, without a daemon."""

    def __init__(self, swarm: Swarm, founder: Founder) -> None:
        self.swarm, self.trainer = swarm, Trainer()
        self.party = Party(
            swarm._identity, founder.swarm_id, KeyRing(KEY), b"m" * 32, 1, swarm.membership
        )  # fmt: skip
        self.proposer = Proposer(self.party, swarm)

    async def answer(self) -> None:
        await self.swarm.serve_links(PROTOCOL, answering(self.party, self), "member")

    async def propose(self, to: PeerId) -> None:
        agreement = await self.proposer.propose(
            to, self, slot=1, fragment=0, averaging=False, form=FORM,
            timeout_s=DEADLINE_S,
        )  # fmt: skip
        healthy = False
        try:
            await meet(self.trainer, agreement, DEADLINE_S)
            healthy = True
        finally:
            await self.proposer.done(to, healthy=healthy)

    # ProposalHandler

    def terms(self, peer_id: PeerId, slot: int) -> Terms:
        return Terms(weight=1.0, group_weight=2.0, epoch=1, ledger_counter=0)

    def refusal_of(self, peer_id: PeerId, proposal: Propose) -> str | None:
        return None

    def before_agreement(self, peer_id: PeerId, theirs: Terms) -> None:
        return

    async def take_part(self, agreement: Agreement) -> None:
        await meet(self.trainer, agreement, DEADLINE_S)


@pytest.fixture
async def trio(launch, founder) -> list[Peer]:
    """Three members in the order of their PeerIDs, that know one another."""
    first = await launch()
    swarms = [first, *[await launch(seeds=first.addresses) for _ in range(2)]]
    for swarm in swarms[1:]:
        await asyncio.wait_for(swarm.bootstrapping.reached.wait(), 20)
    for swarm in swarms:
        swarm.learn(a for other in swarms for a in other.addresses)
    peers = [Peer(s, founder) for s in sorted(swarms, key=lambda s: s.peer_id)]
    for peer in peers:
        await peer.answer()
    return peers


@pytest.mark.parametrize("whose", ["ours", "the partner's"])
async def test_a_sidecar_dies_in_the_middle_and_the_next_exchange_works(trio, whose):
    low, mid, high = trio
    mid.trainer.go_on.set()
    running = asyncio.create_task(low.propose(high.swarm.peer_id))
    await asyncio.wait_for(low.trainer.in_the_middle.wait(), 15)
    victim = low if whose == "ours" else high
    restarts = victim.swarm.sidecar_restarts
    os.kill(victim.swarm._p2p._child.pid, signal.SIGKILL)
    low.trainer.go_on.set()
    high.trainer.go_on.set()
    with pytest.raises(PeerError):
        await asyncio.wait_for(running, DEADLINE_S + 2)
    assert (low.trainer.merged, high.trainer.merged) == (0, 0)
    assert not low.proposer._links
    assert not low.proposer.busy_with(high.swarm.peer_id)
    await until(lambda: victim.swarm.sidecar_restarts > restarts)
    await asyncio.wait_for(low.propose(mid.swarm.peer_id), 15)
    await asyncio.wait_for(low.propose(high.swarm.peer_id), 15)
    assert low.trainer.merged == 2
    await until(lambda: (mid.trainer.merged, high.trainer.merged) == (1, 1))  # a word later
    await low.proposer.close()


async def test_a_partner_that_stalls_costs_its_deadline_and_leaves_no_socket(trio):
    low, mid, high = trio
    before = open_files()
    low.trainer.go_on.set()
    mid.trainer.go_on.set()
    stalled = asyncio.create_task(low.propose(high.swarm.peer_id))  # high never accepts
    await asyncio.wait_for(high.trainer.in_the_middle.wait(), 15)
    await asyncio.wait_for(low.propose(mid.swarm.peer_id), 15)  # others go on meanwhile
    with pytest.raises(PeerError):
        await asyncio.wait_for(stalled, DEADLINE_S + 2)
    await low.proposer.close()
    await until(lambda: open_files() <= before)


async def test_an_observer_that_holds_the_key_gives_no_updates(launch, founder):
    low, high = sorted((Identity.generate(), Identity.generate()), key=lambda i: i.peer_id)
    member = await launch(identity=low)  # it is the one that proposes
    observer = await launch(seeds=member.addresses, role="observer", identity=high)
    await asyncio.wait_for(observer.bootstrapping.reached.wait(), 20)
    member.learn(observer.addresses)
    await Peer(observer, founder).answer()  # its own gate would let everybody in
    with pytest.raises(PeerError, match=Reason.NOT_A_MEMBER):
        await Peer(member, founder).propose(observer.peer_id)
    with pytest.raises(PeerError):
        await Peer(observer, founder).propose(member.peer_id)


async def test_links_held_open_for_ever_keep_nobody_else_out(trio):
    low, mid, high = trio
    entered: list[PeerId] = []

    async def hold(link: Link) -> None:
        entered.append(link.peer_id)
        await asyncio.Event().wait()

    name = "xpeer/test-hold/1"
    await high.swarm.serve_links(name, hold, "member")
    links = [await low.swarm.open_link(high.swarm.peer_id, name) for _ in range(12)]
    links.append(await mid.swarm.open_link(high.swarm.peer_id, name))
    await until(lambda: mid.swarm.peer_id in entered)
    await until(lambda: entered.count(low.swarm.peer_id) == STREAMS_PER_PEER)
    assert len(entered) == STREAMS_PER_PEER + 1
    for link in links:
        link.abort()


async def test_an_error_of_ours_is_logged_and_told_to_nobody(pair, caplog):
    first, second = pair

    async def broken_call(peer_id: str, request: bytes) -> bytes:
        raise RuntimeError("secret detail")

    async def broken_link(link: Link) -> None:
        raise RuntimeError("a link's secret detail")

    await first.serve_call("xpeer/test-broken/1", broken_call, "member", 10)
    await first.serve_links("xpeer/test-broken-link/1", broken_link, "member")
    await first.serve_call(ECHO, echo, "member", 10)
    with caplog.at_level(logging.ERROR, "xpeer.network"):
        with pytest.raises(PeerError, match=Reason.REFUSED) as caught:
            await second.call(first.peer_id, "xpeer/test-broken/1", b"")
        link = await second.open_link(first.peer_id, "xpeer/test-broken-link/1")
        with pytest.raises(PeerError, match=Reason.TRUNCATED):
            await link._read(10)
    assert "secret" not in str(caught.value)
    for seen in ("RuntimeError: secret detail", "RuntimeError: a link's secret detail"):
        assert caplog.text.count(seen) == 1
    link.abort()
    assert await second.call(first.peer_id, ECHO, b"alive") == b"alive"


async def test_a_members_bad_record_hides_and_hangs_nobody(trio):
    low, bad, high = trio
    rosters = {peer: Roster(peer.swarm, KeyRing(KEY), 16) for peer in trio}
    for peer in trio:
        assert await rosters[peer].announce(record(peer.swarm))
    # what it holds itself it may serve: signed, and nothing that hivemind could decode
    key = DHTID.generate(rosters[bad]._shards.key_of(bad.swarm.peer_id))
    unsigned = update_record(bad, key)
    storage = bad.swarm.dht.protocol.storage
    storage.store_subkey(key, bad.swarm.peer_id, unsigned, get_dht_time() + 60)
    storage.store_subkey(key, low.swarm.peer_id, b"nonsense", get_dht_time() + 60)
    for reader in (low, high):
        fresh = Roster(reader.swarm, KeyRing(KEY), 16)
        await asyncio.wait_for(fresh.refresh(), 10)
        other = high if reader is low else low
        assert other.swarm.peer_id in fresh.members()


def update_record(peer: Peer, key: DHTID) -> bytes:
    """A record of this member with a payload that is no msgpack."""
    subkey = msgspec.msgpack.encode(peer.swarm.peer_id)
    validator = peer.swarm.dht.protocol.record_validator
    unsigned = DHTRecord(key.to_bytes(), subkey, b"\xc1", get_dht_time() + 60)
    return bytes(validator.sign_value(unsigned))


async def test_a_member_speaks_in_the_roster_for_itself_alone(trio, founder):
    bad, reader, _ = trio
    swarm = bad.swarm
    others = f"/ip4/6.6.6.6/tcp/1/p2p/{reader.swarm.peer_id}"
    lie = msgspec.structs.replace(
        record(swarm), role="admin", addresses=[*swarm.addresses, others, "\x1b[2J"]
    )
    assert await Roster(swarm, KeyRing(KEY), 64).announce(lie)
    roster = Roster(reader.swarm, KeyRing(KEY), 64)
    await roster.refresh()
    seen = roster.members()[swarm.peer_id]
    assert seen.role == "member"  # what the admin signed
    assert seen.addresses == swarm.addresses
    small = Roster(reader.swarm, KeyRing(KEY), 64)
    small._max_members = 0
    await small.refresh()
    assert small.members() == {}


async def test_the_roster_outlives_a_dead_sidecar(pair):
    first, second = pair
    roster = Roster(second, KeyRing(KEY), 64)
    assert await roster.announce(record(second))
    os.kill(second._p2p._child.pid, signal.SIGKILL)
    while second.sidecar_restarts == 0:  # whatever happens to the DHT meanwhile, nothing escapes
        await asyncio.gather(roster.announce(record(second)), roster.refresh())
    first.learn(second.addresses)
    async with asyncio.timeout(20):
        while not await Roster(second, KeyRing(KEY), 64).announce(record(second)):
            await asyncio.sleep(0.05)


async def test_a_channel_to_the_sidecar_that_breaks_is_restarted(pair):
    first, second = pair
    await first.serve_call(ECHO, echo, "member", 10)
    second._p2p._client.control._pending_messages.put_nowait("not a message")
    await until(lambda: second.sidecar_restarts == 1)
    assert await second.call(first.peer_id, ECHO, b"again") == b"again"


async def test_a_refusal_by_anybody_ends_no_joining(launch, founder):
    liar = await launch(role="member")
    stranger = await launch(role=None)

    async def refuse(peer_id: str, request: bytes) -> bytes:
        return b""

    for node in (liar, stranger):
        await node.serve_call(admission.PROTOCOL, refuse, "observer", 2048)
    joiner = await launch(seeds=[*liar.addresses, *stranger.addresses])
    await asyncio.wait_for(joiner.bootstrapping.reached.wait(), 20)
    for node, reason in ((liar, Reason.REFUSED), (stranger, Reason.NOT_A_MEMBER)):
        with pytest.raises(PeerError, match=reason):
            await admission.request(joiner, joiner._identity, founder.swarm_id, node.peer_id)
    joiner.membership._clock = lambda: 2e9  # our own clock agrees: then it is so
    with pytest.raises((NotAuthorisedError, PeerError)):
        await admission.request(joiner, joiner._identity, founder.swarm_id, liar.peer_id)


async def test_a_stranger_exhausts_its_own_introductions_only(pair, launch):
    first, second = pair
    stranger = await launch(seeds=first.addresses, role=None)
    await until(lambda: stranger.bootstrap_note)

    async def knock() -> None:
        await stranger._p2p.call(
            PeerID.from_base58(first.peer_id), introductions.PROTOCOL, b"x" * 100
        )

    await asyncio.gather(*(knock() for _ in range(300)))
    second.rejected_by(first.peer_id)
    await second.introduce(first.peer_id)
    assert len(first._p2p._client.control._handler_tasks) < 10
