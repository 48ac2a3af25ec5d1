"""Slots and pace: whom we propose to, whom we wait for, and what is counted."""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec
import pytest

from tests.unit.gossip.rigs import ME, OTHER, ROUND, THIRD, Rig
from xpeer.errors import PeerError, Reason, TrainerError
from xpeer.gossip import matching
from xpeer.identity import PeerId
from xpeer.network.agreement import UnresolvedError


async def test_the_lower_peer_proposes_and_a_merge_is_counted(rig: Rig):
    await rig.slot()
    assert rig.proposer.log == [OTHER] == rig.merged
    assert rig.proposer.done_with == [(OTHER, True)]
    assert (rig.partners.exchanges, rig.partners.values_sent) == (1, 100)


async def test_the_higher_peer_waits(monkeypatch: pytest.MonkeyPatch):
    rig = Rig(monkeypatch, me=PeerId("12D3KooWZ"))
    await rig.slot()
    assert rig.proposer.log == []


async def test_the_pace_is_f_exchanges_in_h_steps(rig: Rig):
    trainer = rig.host.trainer
    assert trainer is not None
    for step in range(10):  # two slots a step: as fast as slots come
        trainer.step = step
        await rig.slot()
        await rig.slot()
    assert len(rig.merged) == 5


async def test_without_steps_every_slot_exchanges(rig: Rig):
    rig.host.is_training = False
    for _ in range(4):
        await rig.slot()
    assert len(rig.merged) == 4


async def test_a_refusal_is_counted_and_the_next_partner_asked(rig: Rig):
    third = PeerId("12D3KooWC")
    rig.host.live = [OTHER, third]
    for peer in rig.host.live:
        rig.proposer.fails[peer] = PeerError(Reason.PAUSED)
    while not rig.proposer.log:
        await rig.slot()  # until we are not the one left over
    assert sorted(rig.proposer.log) == [OTHER, third]
    assert [reason for peer, reason in rig.skipped if peer] == [Reason.PAUSED] * 2
    assert rig.merged == []


async def test_alone_is_a_reason_and_nothing_is_proposed(rig: Rig):
    rig.host.live = []
    await rig.slot()
    assert rig.skipped == [("", Reason.NO_PARTNER)]


async def test_nothing_happens_while_the_host_objects_or_all_is_settled(rig: Rig):
    rig.host.no = Reason.PAUSED
    await rig.slot()
    rig.host.no, rig.host.is_settled = None, True
    await rig.slot()
    assert rig.proposer.log == []


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (PeerError(Reason.TRUNCATED), Reason.TRUNCATED),
        (TrainerError("it died"), Reason.TRAINER_RESTARTED),
        (UnresolvedError(1), Reason.CLOSED),
    ],
)
async def test_a_failed_exchange_drops_the_link_and_has_a_reason(rig: Rig, error, reason):
    def fail() -> None:
        raise error

    rig.outcome = fail
    await rig.slot()
    assert rig.skipped == [(OTHER, reason)]
    assert rig.proposer.done_with == [(OTHER, False)]
    assert rig.merged == []
    told = rig.gossip.terms(OTHER, 1).unresolved
    assert told == ([1] if isinstance(error, UnresolvedError) else [])
    assert rig.gossip.terms(OTHER, 1).unresolved == []  # told once


async def test_without_slots_anybody_is_met_by_proposal_or_by_nudge(
    monkeypatch: pytest.MonkeyPatch,
):
    rig = Rig(monkeypatch, me=OTHER, rules=msgspec.structs.replace(ROUND, rule="asynchronous"))
    rig.host.live = [ME, THIRD]
    trainer = rig.host.trainer
    assert trainer is not None
    while not (rig.nudged and rig.merged):
        trainer.step += 2
        await rig.slot()
    assert set(rig.nudged) == {ME}
    assert set(rig.proposer.log) == {THIRD}


async def test_a_nudge_is_answered_by_a_proposal_once_a_slot(monkeypatch: pytest.MonkeyPatch):
    rig = Rig(monkeypatch, rules=msgspec.structs.replace(ROUND, rule="asynchronous"))
    for _ in range(3):
        rig.gossip.nudged(OTHER)
        while rig.gossip._tasks:
            await asyncio.gather(*rig.gossip._tasks)
        rig.partners[OTHER].ids.last_slot = matching.slot_number(rig.now, ROUND.slot_s)
    rig.gossip.nudged(THIRD)  # no member
    assert rig.proposer.log == [OTHER]


@pytest.mark.parametrize("rule", ["gossip", "asynchronous"])
async def test_who_waits_for_proposals_in_vain_counts_them(
    monkeypatch: pytest.MonkeyPatch, rule: Any
):
    """A node whose port is closed: members with lower PeerIDs can't reach it."""
    rig = Rig(monkeypatch, me=OTHER, rules=msgspec.structs.replace(ROUND, rule=rule))
    rig.host.live = [ME]
    for _ in range(6):
        await rig.slot()
    assert rig.partners.skips == {Reason.NOT_PROPOSED: 5}  # the sixth slot is not over
    assert rig.partners[ME].skipped == 5
    rig.gossip.before_agreement(ME, rig.proposal().terms)  # now one came
    await rig.slot()
    assert rig.partners.skips == {Reason.NOT_PROPOSED: 5}
    assert rig.partners.failures == {}


async def test_who_is_left_over_in_a_slot_counts_it(monkeypatch: pytest.MonkeyPatch):
    rig = Rig(monkeypatch)
    rig.host.live = [OTHER, THIRD]
    for _ in range(30):
        rig.host.trainer.step += 2  # type: ignore[union-attr]
        await rig.slot()
    left_over = rig.partners.skips[Reason.NO_PARTNER]
    assert 0 < left_over < 30
    assert len(rig.merged) + left_over == 30


async def test_a_nudge_of_a_member_that_we_avoid_is_ignored(monkeypatch: pytest.MonkeyPatch):
    """One that stalls and nudges would else get all our exchanges."""
    rig = Rig(monkeypatch, rules=msgspec.structs.replace(ROUND, rule="asynchronous"))
    rig.host.live = [OTHER, THIRD, PeerId("12D3KooWD")]
    rig.partners.failed(OTHER, 1000, PeerError(Reason.TIMEOUT), lost_s=10.0)
    rig.gossip.nudged(OTHER)
    assert not rig.gossip._tasks
    rig.gossip.nudged(THIRD)
    await asyncio.gather(*rig.gossip._tasks)
    assert rig.proposer.log == [THIRD]


async def test_nobody_is_nudged_or_nudges_where_there_are_slots(rig: Rig):
    rig.gossip.nudged(OTHER)
    assert not rig.gossip._tasks


async def test_gradients_are_due_once_a_window(monkeypatch: pytest.MonkeyPatch):
    rules = msgspec.structs.replace(ROUND, rule="gradient", group=0, fragments=1)
    rig = Rig(monkeypatch, rules=rules)
    trainer = rig.host.trainer
    assert trainer is not None
    await rig.slot()
    assert rig.merged == []
    trainer.window = 1
    await rig.slot()
    await rig.slot()
    assert rig.merged == [OTHER]
