"""An exchange between two parties over real streams, and how long their links are kept."""

from __future__ import annotations

import asyncio
import socket
from contextlib import asynccontextmanager

import pytest

from tests.factories import privacy_stamp
from tests.meetings import meet
from xpeer.errors import PeerError, Reason
from xpeer.forms import Form
from xpeer.identity import Identity, PeerId
from xpeer.network.agreement import KEPT_S, Party, Proposer, answering
from xpeer.network.link import Link, RefusedError
from xpeer.network.membership.certificates import Membership, Scope
from xpeer.network.membership.keyring import KeyRing
from xpeer.network.stream import Stream
from xpeer.update import Checked, CompressedUpdate, PeerUpdate
from xpeer.wire.messages import Propose, Terms

FORM = Form("int8", 300_000)  # more than one frame
SIZE = FORM.num_bytes
SWARM = "ab" * 32
STAMP = privacy_stamp()


class FakeTrainer:
    """Keeps a log of calls; hands out bytes."""

    def __init__(self, payload: bytes) -> None:
        self.payload = payload
        self.log: list[str] = []
        self.received = b""

    async def snapshot(
        self, meeting_id: int, fragment: int, *, averaging: bool
    ) -> CompressedUpdate:
        self.log.append("snapshot")
        return CompressedUpdate(self.payload, FORM, 1, STAMP)

    async def verify(self, meeting_id: int, exchange_id: int, update: PeerUpdate) -> Checked:
        self.log.append("verify")
        self.received = bytes(update.payload)
        if self.received.startswith(b"NaN"):
            raise PeerError(Reason.NOT_FINITE)
        return Checked(0.01)

    async def merge(self, meeting_id: int, weights: dict[int, float]) -> None:
        (weight,) = weights.values()
        self.log.append(f"merge {weight}")

    def drop(self, meeting_id: int) -> None:
        self.log.append("drop")


class FakeDesk:
    def __init__(
        self, trainer: FakeTrainer, refusal: str | None = None, went_back: bool = False
    ) -> None:
        self.trainer, self.refusal, self.went_back = trainer, refusal, went_back
        self.outcome: asyncio.Future[object] = asyncio.get_running_loop().create_future()
        self.told: list[int] = []

    def terms(self, peer_id: PeerId, slot: int) -> Terms:
        return Terms(weight=1.0, group_weight=2.0, epoch=1, ledger_counter=0)

    def refusal_of(self, peer_id: PeerId, proposal: Propose) -> str | None:
        return self.refusal

    def before_agreement(self, peer_id: PeerId, theirs: Terms) -> None:
        self.told += theirs.unresolved
        if self.went_back:
            raise PeerError(Reason.LEDGER_WENT_BACK, "5 charges now, 6 before")

    async def take_part(self, agreement) -> None:
        try:
            result = await meet(self.trainer, agreement, 3)
        except PeerError as e:
            self.outcome.set_result(e)
            raise
        self.outcome.set_result(result)


class Everybody(Membership):
    """Certificates are another test's subject."""

    def allows(self, peer_id: str, scope: Scope) -> bool:
        return True


def party(identity: Identity) -> Party:
    return Party(identity, SWARM, KeyRing(b"k" * 32), b"m" * 32, 1, Everybody(SWARM, None))


def streams(low: Identity, high: Identity) -> tuple[Link, Link]:
    a, b = socket.socketpair()
    return Link(high.peer_id, Stream(a), 1.0), Link(low.peer_id, Stream(b), 1.0)


class Dialler:
    def __init__(self, link: Link) -> None:
        self.link = link

    async def open_link(self, peer_id: PeerId, protocol: str, timeout_s: float) -> Link:
        return self.link


@asynccontextmanager
async def answerer(identities, trainer, refusal=None, went_back=False):
    """Our real answering side; yields the low side's proposer and the desk."""
    low, high = identities
    near, far = streams(low, high)
    desk = FakeDesk(trainer, refusal, went_back)
    task = asyncio.ensure_future(answering(party(high), desk)(far))
    proposer = Proposer(party(low), Dialler(near))
    yield proposer, desk, near
    near.abort()
    await asyncio.gather(task, return_exceptions=True)


async def propose(proposer, identities, desk):
    return await proposer.propose(
        identities[1].peer_id, desk, slot=7, fragment=2, averaging=False, form=FORM,
        timeout_s=2,
    )  # fmt: skip


async def test_both_sides_receive_verify_and_merge(identities):
    ours, theirs = FakeTrainer(b"a" * SIZE), FakeTrainer(b"b" * SIZE)
    async with answerer(identities, theirs) as (proposer, desk, _):
        for _ in range(2):  # the link stays open for the next exchange
            desk.outcome = asyncio.get_running_loop().create_future()
            agreement = await propose(proposer, identities, FakeDesk(ours))
            await meet(ours, agreement, 3)
            await proposer.done(identities[1].peer_id, healthy=True)
            await desk.outcome
    assert ours.log == ["snapshot", "verify", "merge 0.5"] * 2
    assert theirs.log == ours.log
    assert (ours.received, theirs.received) == (theirs.payload, ours.payload)


async def test_a_refusal_carries_its_reason_and_keeps_the_link(identities):
    async with answerer(identities, FakeTrainer(b""), Reason.NOT_DUE) as (proposer, _, near):
        for _ in range(2):
            with pytest.raises(PeerError, match=Reason.NOT_DUE):
                await propose(proposer, identities, FakeDesk(FakeTrainer(b"")))
        assert not near.closed


async def test_a_node_is_told_that_its_ledger_went_back(identities):
    """Whichever side proposes: it may have been restored without knowing."""
    ours = FakeTrainer(b"a" * SIZE)
    async with answerer(identities, FakeTrainer(b""), went_back=True) as (proposer, _, near):
        with pytest.raises(RefusedError, match=Reason.LEDGER_WENT_BACK):
            await propose(proposer, identities, FakeDesk(ours))
        assert not near.closed
    async with answerer(identities, FakeTrainer(b"b" * SIZE)) as (proposer, desk, _):
        with pytest.raises(PeerError, match=Reason.LEDGER_WENT_BACK):
            await propose(proposer, identities, FakeDesk(ours, went_back=True))
        refusal = await desk.outcome
        assert isinstance(refusal, RefusedError)
        assert refusal.reason == Reason.LEDGER_WENT_BACK
    assert ours.log == []


async def test_values_that_fail_verification_are_merged_by_neither(identities):
    ours, theirs = FakeTrainer(b"NaN" + b"a" * (SIZE - 3)), FakeTrainer(b"b" * SIZE)
    async with answerer(identities, theirs) as (proposer, desk, _):
        agreement = await propose(proposer, identities, FakeDesk(ours))
        with pytest.raises(PeerError, match=Reason.CLOSED):  # before our acceptance or after it
            await meet(ours, agreement, 3)
        assert (await desk.outcome).reason == Reason.NOT_FINITE
    assert ours.log == ["snapshot", "verify", "drop"] == theirs.log


async def test_the_higher_peer_may_not_propose(identities):
    low, high = identities
    near, far = streams(low, high)
    desk = FakeDesk(FakeTrainer(b""))
    task = asyncio.ensure_future(answering(party(low), desk)(near))
    handshake = party(high).handshake(low.peer_id, "exchange", initiator=True)
    await far.connect(handshake, initiator=True)
    with pytest.raises(PeerError, match="does not propose"):
        await task
    far.abort()


async def test_a_proposal_that_nobody_answers_ends_in_its_deadline(identities):
    low, high = identities
    near, far = streams(low, high)
    proposer = Proposer(party(low), Dialler(near))
    with pytest.raises(PeerError, match=Reason.TIMEOUT):
        await propose(proposer, identities, FakeDesk(FakeTrainer(b"")))
    far.abort()


class Redialler:
    """Opens a new link to the answering side each time."""

    def __init__(self, identities: tuple[Identity, Identity], desk: FakeDesk) -> None:
        self.identities, self.desk = identities, desk
        self.links: list[tuple[Link, Link]] = []
        self.tasks: list[asyncio.Task[None]] = []

    async def open_link(self, peer_id: PeerId, protocol: str, timeout_s: float) -> Link:
        near, far = streams(*self.identities)
        self.links.append((near, far))
        handle = answering(party(self.identities[1]), self.desk)
        self.tasks.append(asyncio.ensure_future(handle(far)))
        return near

    async def close(self) -> None:
        for near, far in self.links:
            near.abort()
            far.abort()
        await asyncio.gather(*self.tasks, return_exceptions=True)


class Unresolved(FakeDesk):
    """Names each of its unresolved exchanges once, as the real one does."""

    def __init__(self) -> None:
        super().__init__(FakeTrainer(b""))
        self.ids = [7, 5]

    def terms(self, peer_id: PeerId, slot: int) -> Terms:
        return Terms(1.0, 2.0, 1, 0, unresolved=[self.ids.pop()])


@pytest.mark.parametrize("politely", [False, True], ids=["aborted", "ended"])
async def test_a_kept_link_that_ended_meanwhile_is_dialled_again(identities, politely):
    """The partner was restarted, or closed a link that was idle: that is no failure of its own."""
    ours = Unresolved()
    theirs = FakeDesk(FakeTrainer(b""), Reason.NOT_DUE)
    dialler = Redialler(identities, theirs)
    proposer = Proposer(party(identities[0]), dialler)
    with pytest.raises(RefusedError):
        await propose(proposer, identities, ours)
    far = dialler.links[0][1]
    await (far.close() if politely else asyncio.to_thread(far.abort))
    with pytest.raises(RefusedError, match=Reason.NOT_DUE):  # the partner heard the proposal
        await propose(proposer, identities, ours)
    assert len(dialler.links) == 2
    assert theirs.told == [5, 7]  # what was unresolved is told though the first link had ended
    await dialler.close()


async def test_a_new_link_that_ends_without_an_answer_is_a_failure(identities):
    low, high = identities
    opened = []

    class Hangs:
        async def open_link(self, peer_id: PeerId, protocol: str, timeout_s: float) -> Link:
            near, far = streams(low, high)
            opened.append(near)
            handshake = party(high).handshake(low.peer_id, "exchange", initiator=False)

            async def hang_up() -> None:
                await far.connect(handshake, initiator=False)
                await far.receive(2)
                far.abort()

            self.task = asyncio.create_task(hang_up())
            return near

    proposer = Proposer(party(low), Hangs())
    with pytest.raises(PeerError, match=Reason.TRUNCATED):
        await propose(proposer, identities, FakeDesk(FakeTrainer(b"")))
    assert [link.closed for link in opened] == [True]


async def test_links_that_nobody_uses_are_dropped(identities):
    """Also those to partners that are gone for good: each costs a descriptor."""
    now = 0.0
    theirs = FakeDesk(FakeTrainer(b""), Reason.NOT_DUE)
    dialler = Redialler(identities, theirs)
    proposer = Proposer(party(identities[0]), dialler, lambda: now)
    for at_s in (0.0, KEPT_S, 2 * KEPT_S + 1):
        now = at_s
        with pytest.raises(RefusedError):
            await propose(proposer, identities, FakeDesk(FakeTrainer(b"")))
    assert [near.closed for near, _ in dialler.links] == [True, False]
    await dialler.close()
