"""Groups of more than two: when they begin, whom they wait for, and how few are too few."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from tests.unit.gossip.rigs import FORM, LAST, MASKED, ME, OTHER, ROUND, SWARM, THIRD, Rig
from xpeer.errors import PeerError, Reason
from xpeer.gossip import matching
from xpeer.gossip import meetings as meetings_module
from xpeer.gossip.masked import MaskedMeeting
from xpeer.manifest.round import Round
from xpeer.round import Exchanged


async def test_a_group_meets_at_once_and_waits_for_the_lower_ones(monkeypatch: pytest.MonkeyPatch):
    rules = msgspec.structs.replace(ROUND, group=0)
    rig = Rig(monkeypatch, me=OTHER, rules=rules)
    rig.host.live = [ME, THIRD, LAST]
    slot = matching.slot_number(rig.now, ROUND.slot_s)
    rig.gossip._begin_slot(slot)
    while len(rig.merged) < 2:
        await asyncio.sleep(0)
    assert rig.proposer.log == [THIRD, LAST]  # the higher ones
    fragment = matching.fragment_of(SWARM, slot, 5)
    assert rig.gossip._meetings._running[fragment].expects(ME)
    assert rig.gossip.refusal_of(ME, rig.proposal()) is None  # a lower one joins the same meeting
    agreement: Any = SimpleNamespace(
        peer_id=ME, slot=slot, fragment=fragment, exchange_id=77, averaging=False, form=FORM
    )
    await rig.gossip.take_part(agreement)
    await asyncio.gather(*rig.gossip._tasks)
    assert rig.merged == [THIRD, LAST, ME]
    assert not rig.gossip._meetings._running
    assert rig.gossip.terms(ME, slot).group_weight == 4.0


@pytest.mark.parametrize("masks", [False, True])
async def test_groups_begin_in_slots_that_are_as_far_apart_as_members_wait(
    monkeypatch: pytest.MonkeyPatch, masks: bool
):
    """Members that began in any slot would wait for one another in turn, and refuse meanwhile."""
    rules = MASKED if masks else msgspec.structs.replace(ROUND, group=0)
    rules = msgspec.structs.replace(rules, slot_s=0.2, fragments=5)
    began = []
    for me in (ME, OTHER, THIRD):
        rig = Rig(monkeypatch, me=me, rules=rules)
        rig.host.live = [peer for peer in (ME, OTHER, THIRD) if peer != me]
        for slot in range(5003, 5016):
            rig.gossip._begin_slot(slot)
        meetings = list(rig.gossip._meetings._running.values())
        began += [(me, meeting.slot) for meeting in meetings]
        assert all(m._gather_s == rig.gossip._meetings.stride * rules.slot_s for m in meetings)
        for task in rig.gossip._tasks:
            task.cancel()
        await asyncio.gather(*rig.gossip._tasks, return_exceptions=True)
    assert began == [(me, 5010) for me in (ME, OTHER, THIRD)]


async def test_a_masked_group_is_not_begun_while_another_one_goes_on(
    monkeypatch: pytest.MonkeyPatch,
):
    rig = Rig(monkeypatch, me=THIRD, rules=MASKED)
    rig.host.live = [ME, OTHER]
    rig.gossip._begin_slot(1000)
    assert len(rig.gossip._meetings) == 1
    later = next(s for s in range(1002, 1100, 2) if matching.fragment_of(SWARM, s, 5) !=
                 matching.fragment_of(SWARM, 1000, 5))  # fmt: skip
    rig.gossip._begin_slot(later)
    assert len(rig.gossip._meetings) == 1
    for task in rig.gossip._tasks:
        task.cancel()
    await asyncio.gather(*rig.gossip._tasks, return_exceptions=True)


async def test_a_member_of_the_group_that_refuses_is_given_up(monkeypatch: pytest.MonkeyPatch):
    rig = Rig(monkeypatch, rules=msgspec.structs.replace(ROUND, group=0))
    rig.host.live = [OTHER, THIRD]
    rig.proposer.fails[OTHER] = PeerError(Reason.PAUSED)
    await rig.slot()
    assert rig.merged == [THIRD]
    assert rig.skipped == [(OTHER, Reason.PAUSED)]


async def test_a_masked_group_that_does_not_come_together_is_a_reason_and_due_again(
    monkeypatch: pytest.MonkeyPatch,
):
    rig = Rig(monkeypatch, rules=MASKED)
    rig.host.live = [OTHER, THIRD]
    for peer in rig.host.live:
        rig.proposer.fails[peer] = PeerError(Reason.NOT_DUE)
    await rig.slot()
    assert rig.skipped[-1] == ("", Reason.GROUP_TOO_SMALL)
    await rig.slot()  # no step was taken since
    assert rig.proposer.log == [OTHER, THIRD] * 2


TRIMMED = msgspec.structs.replace(ROUND, combiner="trimmed-mean", group=5)


@pytest.mark.parametrize("rules", [MASKED, TRIMMED], ids=["masks", "trimmed mean"])
async def test_a_slot_that_leaves_too_few_asks_nobody(
    monkeypatch: pytest.MonkeyPatch, rules: Round
):
    rig = Rig(monkeypatch, rules=rules)
    rig.host.live = [OTHER]
    await rig.slot()
    assert rig.skipped == [("", Reason.GROUP_TOO_SMALL)]
    assert rig.proposer.log == []


async def test_three_of_five_are_enough_for_a_trimmed_mean(monkeypatch: pytest.MonkeyPatch):
    rig = Rig(monkeypatch, rules=TRIMMED)
    rig.host.live = [OTHER, THIRD]
    await rig.slot()
    assert sorted(rig.merged) == [OTHER, THIRD]


async def test_masked_groups_average_and_use_their_own_codec(monkeypatch: pytest.MonkeyPatch):
    rig = Rig(monkeypatch, me=THIRD, rules=MASKED)
    rig.host.live = [ME, OTHER]
    good = {"averaging": True, "codec": "masked16"}
    assert rig.gossip.refusal_of(ME, rig.proposal(**good)) is None
    assert rig.gossip.refusal_of(ME, rig.proposal(averaging=True)) == Reason.WRONG_CODEC
    rig.host.is_training = False
    assert rig.gossip.refusal_of(ME, rig.proposal(**good)) is None


async def test_who_ended_still_meets_in_a_masked_group_that_needs_it(
    monkeypatch: pytest.MonkeyPatch,
):
    rig = Rig(monkeypatch, me=THIRD, rules=MASKED)
    rig.host.live, rig.host.is_training = [ME, OTHER], False
    good = {"averaging": True, "codec": "masked16"}
    settled = {ME}
    monkeypatch.setattr(rig.host, "has_nothing_due", lambda peer: peer in settled)
    assert rig.gossip.refusal_of(ME, rig.proposal(**good)) is None
    settled.add(OTHER)
    assert rig.gossip.refusal_of(ME, rig.proposal(**good)) == Reason.NOT_DUE


Outcome = tuple[int | None, bool]


def masked_rig(monkeypatch: pytest.MonkeyPatch, *outcomes: Outcome) -> tuple[Rig, list[int | None]]:
    """Masked groups whose meetings end like this (revealed, merged), and what each was told of
    values that were shown before.
    """
    rig = Rig(monkeypatch, rules=msgspec.structs.replace(MASKED, fragments=1))
    rig.host.live = [OTHER, THIRD]
    rig.host.is_training = False
    befores: list[int | None] = []
    ends = iter(outcomes)

    async def run(meeting: MaskedMeeting) -> None:
        await meeting._wait_for_partners()
        befores.append(meeting._before)
        meeting.revealed, meeting.merged = next(ends)

    async def exchange(meeting: MaskedMeeting, agreement: Any, **_: Any) -> Any:
        meeting._mark_arrived(agreement.peer_id)
        return Exchanged(0.1)

    monkeypatch.setattr(MaskedMeeting, "run", run)
    monkeypatch.setattr(MaskedMeeting, "exchange", exchange)
    return rig, befores


async def test_what_was_revealed_in_vain_is_remembered_until_a_merge(
    monkeypatch: pytest.MonkeyPatch,
):
    rig, befores = masked_rig(monkeypatch, (3, False), (3, True), (None, False))
    for _ in range(3):
        await rig.slot()
    assert befores == [None, 3, None]


async def test_what_a_checkpoint_holds_is_shown_to_no_group(monkeypatch: pytest.MonkeyPatch):
    rig, befores = masked_rig(monkeypatch, (3, False), (None, False))
    await rig.slot()
    trainer = rig.host.trainer
    assert trainer is not None
    trainer.epoch, trainer.resumed_step = 8, 20
    await rig.slot()
    assert befores == [None, 20]


async def test_a_groups_member_that_does_not_propose_is_counted(monkeypatch: pytest.MonkeyPatch):
    rig = Rig(monkeypatch, me=THIRD, rules=msgspec.structs.replace(ROUND, group=3, slot_s=0.01))
    monkeypatch.setattr(meetings_module, "MIN_GATHER_S", 0.0)
    rig.gossip._meetings._gather_s = 0.0
    rig.host.live = [ME, OTHER]
    await rig.slot()
    assert rig.partners.skips == {Reason.NOT_PROPOSED: 2}
