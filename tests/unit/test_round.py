"""A meeting: one snapshot for all partners, one merge of whoever accepted."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from tests.factories import privacy_stamp
from xpeer.errors import PeerError, Reason, TrainerError
from xpeer.forms import Form
from xpeer.identity import PeerId
from xpeer.round import Meeting, MeetingPlan
from xpeer.update import Checked, CompressedUpdate, PeerUpdate
from xpeer.wire.messages import Terms

STAMP = privacy_stamp()
B, C, D = PeerId("B"), PeerId("C"), PeerId("D")


class FakeTrainer:
    def __init__(self) -> None:
        self.log: list[object] = []
        self.error: Exception | None = None

    async def snapshot(
        self, meeting_id: int, fragment: int, *, averaging: bool
    ) -> CompressedUpdate:
        self.log.append(("snapshot", meeting_id, fragment, averaging))
        await asyncio.sleep(0)
        return CompressedUpdate(b"ours", Form("int8", 2), 1, STAMP)

    async def verify(self, meeting_id: int, exchange_id: int, update: PeerUpdate) -> Checked:
        if update.payload == b"bad":
            raise PeerError(Reason.NOT_FINITE)
        return Checked(0.5)

    async def merge(self, meeting_id: int, weights: dict[int, float]) -> None:
        if self.error:
            raise self.error
        self.log.append(("merge", meeting_id, weights))

    def drop(self, meeting_id: int) -> None:
        self.log.append(("drop", meeting_id))


class FakeAgreement:
    slot, fragment = 5, 2

    def __init__(self, peer_id: PeerId, exchange_id: int, payload: bytes = b"good") -> None:
        self.peer_id, self.exchange_id = peer_id, exchange_id
        self.ours = self.theirs = Terms(1.0, 4.0, 1, 0)
        self.payload = payload
        self.gate = asyncio.Event()
        self.gate.set()

    async def swap(self, update: CompressedUpdate) -> Any:
        assert update.payload == b"ours"
        await self.gate.wait()
        return SimpleNamespace(payload=self.payload)

    def release(self, received: PeerUpdate) -> None:
        self.payload = b""

    async def accept_both(self) -> None:
        return


def meeting(
    trainer: FakeTrainer, *expected: PeerId, gather_s: float = 30.0, least: int = 2
) -> Meeting:
    return Meeting(
        trainer,
        MeetingPlan(
            meeting_id=9, slot=5, fragment=2, averaging=False, expected=expected,
            gather_s=gather_s,
        ),
        least,
    )  # fmt: skip


async def exchange(of: Meeting, agreement: Any) -> object:
    return await of.exchange(agreement, weighting="equal", deadline_s=5)


async def test_a_group_shares_one_snapshot_and_merges_once():
    trainer = FakeTrainer()
    group = meeting(trainer, B, C, D)
    running = asyncio.create_task(group.run())
    agreements = [FakeAgreement(peer, number) for number, peer in enumerate((B, C, D))]
    await asyncio.gather(*(exchange(group, a) for a in agreements))
    await running
    weights = {0: 0.25, 1: 0.25, 2: 0.25}
    assert trainer.log == [("snapshot", 9, 2, False), ("merge", 9, weights)]
    assert group.accepted == {B: 0, C: 1, D: 2}


async def test_who_fails_or_never_comes_holds_up_nobody():
    trainer = FakeTrainer()
    group = meeting(trainer, B, C, D)
    running = asyncio.create_task(group.run())
    with pytest.raises(PeerError, match=Reason.NOT_FINITE):
        await exchange(group, FakeAgreement(B, 1, b"bad"))
    await exchange(group, FakeAgreement(C, 2))
    assert not running.done()
    group.give_up(D)
    await running
    assert trainer.log[-1] == ("merge", 9, {2: 0.25})


async def test_a_group_that_is_too_small_for_its_combiner_merges_nothing():
    trainer = FakeTrainer()
    group = meeting(trainer, B, C, D, least=4)
    running = asyncio.create_task(group.run())
    for number, peer in enumerate((B, C)):
        await exchange(group, FakeAgreement(peer, number))
    group.give_up(D)
    with pytest.raises(PeerError, match=Reason.GROUP_TOO_SMALL):
        await running
    assert trainer.log[1:] == [("drop", 9)]
    assert not group.accepted  # nobody is told of a one-sided merge


async def test_the_gathering_ends_but_what_has_begun_is_waited_for():
    trainer = FakeTrainer()
    group = meeting(trainer, B, C, gather_s=0.01)
    slow = FakeAgreement(B, 1)
    slow.gate.clear()
    running = asyncio.create_task(group.run())
    begun = asyncio.create_task(exchange(group, slow))
    while group.expects(C):
        await asyncio.sleep(0.001)
    assert not running.done()
    slow.gate.set()
    await begun
    await running
    assert trainer.log[-1] == ("merge", 9, {1: 0.25})
    assert not group.expects(B)


async def test_nobody_accepted_is_no_merge():
    trainer = FakeTrainer()
    group = meeting(trainer, B)
    group.give_up(B)
    await group.run()
    assert trainer.log == [("drop", 9)]
    assert group.closed


async def test_a_merge_that_fails_is_dropped_and_told():
    trainer = FakeTrainer()
    trainer.error = TrainerError("it died")
    group = meeting(trainer, B)
    running = asyncio.create_task(group.run())
    await exchange(group, FakeAgreement(B, 1))
    with pytest.raises(TrainerError):
        await running
    assert group.accepted == {B: 1}  # who may have merged alone
    assert trainer.log[-1] == ("drop", 9)


async def test_a_partner_that_stalls_is_a_timeout():
    trainer = FakeTrainer()
    group = meeting(trainer, B)
    stalled = FakeAgreement(B, 1)
    stalled.gate.clear()
    running = asyncio.create_task(group.run())
    with pytest.raises(PeerError, match=Reason.TIMEOUT):
        await group.exchange(stalled, weighting="equal", deadline_s=0.01)  # type: ignore[arg-type] # a fake
    await running
    assert trainer.log[-1] == ("drop", 9)
