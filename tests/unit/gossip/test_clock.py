"""Slots, pace, objections, and what is remembered of partners; everything around is a fake."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import msgspec
import pytest

from tests.unit.daemon.fakes import FakeNode, member
from xpeer.errors import PeerError, Reason, TrainerError
from xpeer.forms import Form
from xpeer.gossip import matching
from xpeer.gossip import meetings as meetings_module
from xpeer.gossip.clock import Gossip
from xpeer.gossip.masked import MaskedMeeting
from xpeer.gossip.partners import DEADLINE_MULTIPLE, MIN_DEADLINE_S, Events, Partners
from xpeer.gossip.record import LedgerState
from xpeer.health import Health
from xpeer.identity import PeerId
from xpeer.manifest.round import Round
from xpeer.network.agreement import UnresolvedError
from xpeer.network.link import RefusedError
from xpeer.round import Exchanged, Meeting
from xpeer.wire.messages import Propose, Terms
from xpeer_daemon.outcomes import Outcomes
from xpeer_daemon.store import Store

SWARM = "ab" * 32
ME, OTHER = PeerId("12D3KooWA"), PeerId("12D3KooWB")
FORM = Form("int8", 100)
ROUND = Round(window_steps=10, slot_s=1.0, fragments=5, codec="int8", deadline_s=5)


class FakeTrainer:
    epoch, step, ledger_counter = 7, 0, 3
    resumed_step: int | None = None

    window = 0

    def fragment_values(self, fragment: int, *, averaging: bool) -> int:
        return 100

    def drop(self, meeting_id: int) -> None:
        return


class FakeHost:
    def __init__(self) -> None:
        self.trainer: FakeTrainer | None = FakeTrainer()
        self.live: list[PeerId] = [OTHER]
        self.no: str | None = None
        self.is_training, self.is_settled = True, False

    def idle_reason(self) -> str | None:
        return self.no

    def training(self) -> bool:
        return self.is_training

    def partners(self) -> list[PeerId]:
        return self.live

    def zones(self) -> dict[PeerId, str]:
        return {}

    def may_exchange(self, peer_id: PeerId) -> bool:
        return True

    def has_nothing_due(self, peer_id: PeerId) -> bool:
        return self.is_settled

    def declared_rate(self, peer_id: PeerId) -> float:
        return 1.0

    def quality(self) -> tuple[float | None, float]:
        return None, 0.0


class FakeProposer:
    """Logs proposals; answers with an agreement or what `fails` says of a partner."""

    def __init__(self) -> None:
        self.log: list[PeerId] = []
        self.done_with: list[tuple[PeerId, bool]] = []
        self.fails: dict[PeerId, Exception] = {}

    def busy_with(self, peer_id: PeerId) -> bool:
        return False

    async def propose(self, peer_id: PeerId, desk: Any, **terms: Any) -> Any:
        self.log.append(peer_id)
        if peer_id in self.fails:
            raise self.fails[peer_id]
        return SimpleNamespace(
            peer_id=peer_id,
            slot=terms["slot"],
            fragment=terms["fragment"],
            exchange_id=len(self.log),
            averaging=terms["averaging"],
            form=terms["form"],
        )

    async def done(self, peer_id: PeerId, *, healthy: bool) -> None:
        self.done_with.append((peer_id, healthy))


class Seen(Events):
    """Keeps what happens to partners in a rig's lists."""

    def __init__(self, rig: Rig) -> None:
        self._rig = rig

    def exchanged(self, agreement: Any, result: Any, took_s: float) -> None:
        self._rig.merged.append(agreement.peer_id)

    def skipped(self, peer_id: str, slot: int, reason: str, detail: str) -> None:
        self._rig.skipped.append((peer_id, reason))


class Rig:
    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, me: PeerId = ME, rules: Round = ROUND
    ) -> None:
        self.host, self.proposer, self.now = FakeHost(), FakeProposer(), 1000.5
        self.merged: list[PeerId] = []
        self.skipped: list[tuple[str, str]] = []
        self.outcome: Callable[[], Any] = lambda: Exchanged(0.01)

        async def exchange(meeting: Meeting, agreement: Any, **_: Any) -> Any:
            meeting._mark_arrived(agreement.peer_id)
            return self.outcome()

        monkeypatch.setattr(Meeting, "exchange", exchange)
        self.partners = Partners(lambda: self.now, Seen(self))
        self.nudged: list[PeerId] = []

        async def nudge(peer_id: PeerId) -> None:
            self.nudged.append(peer_id)

        self.gossip = Gossip(
            me=me,
            swarm_id=SWARM,
            manifest=SimpleNamespace(round=rules),  # type: ignore[arg-type] # its round is all
            host=self.host,  # type: ignore[arg-type] # half of the trainer is never called
            proposer=self.proposer,  # type: ignore[arg-type] # a fake
            clock=lambda: self.now,
            nudge=nudge,
            partners=self.partners,
        )

    async def slot(self) -> None:
        """One slot, and what it started."""
        self.gossip._begin_slot(matching.slot_number(self.now, ROUND.slot_s))
        while self.gossip._tasks:
            await asyncio.gather(*self.gossip._tasks)
        pairs = self.gossip._round.group == 2
        self.now += ROUND.slot_s * (1 if pairs else self.gossip._meetings.stride)

    def proposal(self, **changed: Any) -> Propose:
        slot = matching.slot_number(self.now, ROUND.slot_s)
        facts = {
            "exchange_id": 1, "slot": slot, "codec": "int8", "num_values": 100,
            "fragment": matching.fragment_of(SWARM, slot, 5),
            "averaging": not self.host.is_training,
            "terms": Terms(1.0, 2.0, 1, 0),
        }  # fmt: skip
        return Propose(**{**facts, **changed})


@pytest.fixture
def rig(monkeypatch: pytest.MonkeyPatch) -> Rig:
    return Rig(monkeypatch)


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


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({}, None),
        ({"slot": 1}, Reason.WRONG_SLOT),
        ({"slot": 10**9}, Reason.WRONG_SLOT),
        ({"fragment": 6}, Reason.WRONG_SLOT),
        ({"codec": "float32"}, Reason.WRONG_CODEC),
        ({"num_values": 101}, Reason.WRONG_MODEL),
    ],
)
def test_objections_to_a_proposal(rig: Rig, changed, reason):
    assert rig.gossip.refusal_of(OTHER, rig.proposal(**changed)) == reason


def test_objections_of_the_host(rig: Rig):
    rig.host.no = Reason.PAUSED
    assert rig.gossip.refusal_of(OTHER, rig.proposal()) == Reason.PAUSED
    rig.host.no, rig.host.is_settled = None, True
    assert rig.gossip.refusal_of(OTHER, rig.proposal()) == Reason.NOT_DUE
    rig.host.trainer = None
    assert rig.gossip.refusal_of(OTHER, rig.proposal()) == Reason.NOT_READY


async def test_a_proposal_seen_before_or_of_a_fragment_in_flight_is_refused(rig: Rig):
    first = rig.proposal()
    agreement: Any = SimpleNamespace(
        peer_id=OTHER, slot=first.slot, fragment=first.fragment, exchange_id=1, averaging=True,
        form=FORM,
    )  # fmt: skip
    inside: list[str | None] = []

    def look() -> Any:
        inside.append(rig.gossip.refusal_of(PeerId("12D3KooWC"), rig.proposal()))
        return Exchanged(0.01)

    rig.outcome = look
    rig.host.is_training = False
    await rig.gossip.take_part(agreement)
    assert inside == [Reason.BUSY]
    assert rig.gossip.refusal_of(OTHER, rig.proposal(exchange_id=1)) == Reason.REPLAYED


async def test_a_merge_that_the_partner_did_not_make_is_counted_once(rig: Rig):
    await rig.slot()
    theirs = Terms(1.0, 2.0, 1, 0, [1, 99])
    rig.gossip.before_agreement(OTHER, theirs)
    rig.gossip.before_agreement(OTHER, theirs)
    assert rig.partners.one_sided == 1


def test_a_ledger_that_goes_back_is_refused_across_restarts(rig: Rig):
    rig.partners[OTHER].ledger.highest = 5
    rig.gossip.before_agreement(OTHER, Terms(1.0, 2.0, 1, 6))
    with pytest.raises(PeerError, match=Reason.LEDGER_WENT_BACK):
        rig.gossip.before_agreement(OTHER, Terms(1.0, 2.0, 1, 5))
    assert rig.partners[OTHER].ledger.highest == 6


def test_a_ledger_that_goes_back_is_told_once_and_remembered(
    rig: Rig, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    def met(partners: Partners, counter: int) -> None:
        partners.reconcile(OTHER, Terms(1.0, 2.0, 1, counter))

    def restarted() -> tuple[Store, Partners]:
        """As the service does it."""
        store = Store.open(tmp_path / "state.sqlite")

        nothing: Any = None
        outcomes = Outcomes(SWARM, nothing, Health(lambda: now_s), store, nothing)
        book = Partners(lambda: now_s, outcomes)
        known = [(peer.peer_id, peer.ledger_counter) for peer in store.known_peers()]
        book.restore(known, store.went_back(), store.caught_up())
        return store, book

    now_s = 1e6
    store, book = restarted()
    met(book, 20)
    assert book[OTHER].ledger.detail == ""
    for lower in (7, 8, 9):  # the restored peer goes on
        with pytest.raises(PeerError, match=Reason.LEDGER_WENT_BACK):
            met(book, lower)
    assert book[OTHER].ledger.detail == "9 charges now, 20 before"
    assert len(store.events()) == 1
    assert sum("went back" in message for message in caplog.messages) == 1
    store.close()
    store, book = restarted()
    assert (book[OTHER].ledger.highest, book[OTHER].ledger.detail) == (
        20,
        "7 charges now, 20 before",
    )
    with pytest.raises(PeerError, match=Reason.LEDGER_WENT_BACK):
        met(book, 19)
    assert len(store.events()) == 1
    assert book[OTHER].ledger.state is LedgerState.WENT_BACK
    met(book, 20)  # it has caught up, and what it did is still told
    assert book[OTHER].ledger.state is LedgerState.CAUGHT_UP
    met(book, 30)
    assert book[OTHER].ledger.detail
    for counter in range(30, 60):  # it makes a game of it
        met(book, counter)
        with pytest.raises(PeerError, match=Reason.LEDGER_WENT_BACK):
            met(book, counter - 1)
    assert book[OTHER].ledger.detail == "58 charges now, 59 before"
    assert [event.kind for event in store.events()] == ["ledger-caught-up", "ledger-went-back"]
    now_s += 3600
    with pytest.raises(PeerError, match=Reason.LEDGER_WENT_BACK):
        met(book, 58)
    assert len(store.events()) == 3
    met(book, 59)
    assert len(store.events()) == 4
    store.close()
    store, book = restarted()
    assert (book[OTHER].ledger.detail, book[OTHER].ledger.state) == (
        "58 charges now, 59 before",
        LedgerState.CAUGHT_UP,
    )
    store.close()


THIRD, LAST = PeerId("12D3KooWC"), PeerId("12D3KooWD")


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


MASKED = msgspec.structs.replace(ROUND, masks=True, group=3)


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


async def test_a_groups_member_that_does_not_propose_is_counted(monkeypatch: pytest.MonkeyPatch):
    rig = Rig(monkeypatch, me=THIRD, rules=msgspec.structs.replace(ROUND, group=3, slot_s=0.01))
    monkeypatch.setattr(meetings_module, "MIN_GATHER_S", 0.0)
    rig.gossip._meetings._gather_s = 0.0
    rig.host.live = [ME, OTHER]
    await rig.slot()
    assert rig.partners.skips == {Reason.NOT_PROPOSED: 2}


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


def test_who_takes_no_steps_averages_and_nothing_else(rig: Rig):
    rig.host.is_training = False
    refused = rig.gossip.refusal_of(OTHER, rig.proposal(averaging=False))
    assert refused == Reason.NOT_DUE
    assert rig.gossip.refusal_of(OTHER, rig.proposal(averaging=True)) is None


def test_a_partners_deadline_follows_from_what_it_took(rig: Rig):
    book = rig.partners
    assert book.deadline_s(OTHER, 60.0) == 60.0
    agreement: Any = SimpleNamespace(peer_id=OTHER, slot=1, fragment=0, exchange_id=1, form=FORM)
    book.done(agreement, Exchanged(0.1), 4.0)
    assert book.deadline_s(OTHER, 60.0) == DEADLINE_MULTIPLE * 4.0
    assert book.deadline_s(OTHER, 3.0) == 3.0
    for _ in range(40):
        book.done(agreement, Exchanged(0.1), 0.1)
    assert book.deadline_s(OTHER, 60.0) == MIN_DEADLINE_S


def test_who_refuses_our_ledger_is_told_until_it_meets_us_again(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
):
    fake, live = FakeNode(), [OTHER]
    node, parts = fake.node, cast(Any, fake.node.member)
    monkeypatch.setattr(fake.view, "partners", lambda: live)
    parts.partners = rig.partners
    rig.partners.failed(OTHER, 1, PeerError(Reason.LEDGER_WENT_BACK, "ours of it"))
    assert rig.partners.refusing_our_ledger() == []
    rig.partners.failed(OTHER, 1, RefusedError(Reason.LEDGER_WENT_BACK, ""))
    rig.partners.failed(OTHER, 2, RefusedError(Reason.BUSY, ""))
    (reason,) = [each for each in node.reasons() if each.code == "ledger-behind"]
    assert OTHER[-8:] in reason.text
    live.clear()  # it left
    assert not any(each.code == "ledger-behind" for each in node.reasons())
    live.append(OTHER)
    assert any(each.code == "ledger-behind" for each in node.reasons())
    agreement: Any = SimpleNamespace(peer_id=OTHER, slot=3, fragment=0, exchange_id=1, form=FORM)
    rig.partners.done(agreement, Exchanged(0.1), 1.0)
    assert not any(each.code == "ledger-behind" for each in node.reasons())


@pytest.mark.parametrize("listed", [True, False])
async def test_who_stalls_is_refused_whether_it_is_listed_or_not(monkeypatch, listed: bool):
    rig = Rig(monkeypatch, me=PeerId("12D3KooWZ"))
    rig.host.live = [OTHER, PeerId("12D3KooWC"), *([ME] if listed else [])]
    slot, taken = matching.slot_number(rig.now, ROUND.slot_s), 0

    def stall() -> None:
        rig.now += 5.0
        raise PeerError(Reason.TIMEOUT, "it stalls")

    rig.outcome = stall
    for ahead in range(10):
        rig.gossip._idle_slots = 9
        fragment = matching.fragment_of(SWARM, slot + ahead, 5)
        if rig.gossip.refusal_of(ME, rig.proposal(slot=slot + ahead, fragment=fragment)) is None:
            taken += 1
            with pytest.raises(PeerError):
                await rig.gossip.take_part(
                    SimpleNamespace(  # type: ignore[arg-type] # a fake
                        peer_id=ME, slot=slot + ahead, fragment=fragment, exchange_id=ahead,
                        averaging=False,
                    )
                )  # fmt: skip
    assert taken == 1
    refused = rig.gossip.refusal_of(ME, rig.proposal(slot=slot + 11, exchange_id=99))
    assert refused == Reason.AVOIDED


@pytest.mark.parametrize(
    ("phase", "role", "may"),
    [
        ("training", "member", True),
        ("finished", "member", True),
        ("left", "member", False),
        ("paused", "member", False),
        ("training", "observer", False),
    ],
)
def test_who_says_that_it_does_not_exchange_proposes_in_vain(
    rig: Rig, monkeypatch: pytest.MonkeyPatch, phase: str, role: str, may: bool
):
    fake = FakeNode()
    fake.members = {OTHER: member(OTHER, phase, role)}
    monkeypatch.setattr(rig.host, "may_exchange", fake.view.may_exchange)
    refused = rig.gossip.refusal_of(OTHER, rig.proposal())
    assert refused == (None if may else Reason.NOT_DUE)
    assert fake.view.may_exchange(PeerId("12D3KooWC"))  # its card may not have come yet
