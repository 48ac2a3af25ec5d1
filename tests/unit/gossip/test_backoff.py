"""Partners that fail are left alone for longer and longer, and nobody else's meetings change."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from tests.unit.gossip.rigs import ME, OTHER, SWARM, THIRD, Rig
from xpeer.errors import PeerError, Reason
from xpeer.forms import Form
from xpeer.gossip import backoff, matching
from xpeer.gossip.backoff import Backoff
from xpeer.gossip.partners import FIRST_MULTIPLE, MIN_DEADLINE_S
from xpeer.identity import PeerId
from xpeer.network.agreement import UnresolvedError
from xpeer.network.link import RefusedError
from xpeer.round import Exchanged

LAST = PeerId("12D3KooWD")
AGREED: Any = SimpleNamespace(
    peer_id=OTHER, slot=1, fragment=0, exchange_id=1, form=Form("int8", 4)
)
DONE = Exchanged(0.1)


def pauses(count: int, lost_s: float = 0.0) -> list[float]:
    found, each = Backoff(), []
    for _ in range(count):
        now_s = found.until_s
        found.failed(now_s, 3.0, lost_s, Reason.TIMEOUT, agreed=True)
        each.append(found.until_s - now_s)
    return each


def test_a_pause_doubles_with_every_failure_and_is_bounded() -> None:
    assert pauses(4) == [3.0, 6.0, 12.0, 24.0]
    assert pauses(3, lost_s=10.0) == [40.0, 80.0, 160.0]
    assert max(pauses(30, lost_s=30.0)) == backoff.LONGEST_PAUSE_S


def test_exchanges_that_are_done_forgive() -> None:
    found = Backoff()
    for _ in range(4):
        found.failed(0.0, 3.0, 0.0, Reason.TIMEOUT, agreed=True)
    for left in (2, 1, 0):
        found.done(1.0, 3.0, clipped=False)
        assert (found.failures, found.active(1.0)) == (left, False)


def test_a_slow_members_refusals_cost_it_nothing_and_endless_ones_do() -> None:
    found = Backoff()
    for _ in range(3):
        for _ in range(backoff.REFUSALS - 1):
            found.refused(0.0, 3.0, Reason.NOT_DUE)
        found.done(0.0, 3.0, clipped=False)
    assert not found.active(0.0)
    for _ in range(backoff.REFUSALS):
        found.refused(0.0, 3.0, Reason.NOT_DUE)
    assert (found.active(0.0), found.shuns) == (True, False)  # it may still propose to us


def test_who_is_clipped_again_and_again_is_left_alone() -> None:
    found = Backoff()
    for _ in range(backoff.CLIPPED - 1):
        found.done(0.0, 3.0, clipped=True)
    found.done(0.0, 3.0, clipped=False)  # an honest one, now and then
    for _ in range(backoff.CLIPPED - 1):
        found.done(0.0, 3.0, clipped=True)
    assert not found.active(0.0)
    found.done(0.0, 3.0, clipped=True)
    assert (found.active(0.0), found.reason, found.shuns) == (True, "clipped", True)


@pytest.mark.parametrize(
    ("error", "agreement", "pauses_it", "shuns"),
    [
        (PeerError(Reason.TIMEOUT), AGREED, True, True),  # stalled after AGREE
        (UnresolvedError(1), AGREED, True, True),  # silent at ACCEPT
        (PeerError(Reason.NOT_FINITE), AGREED, True, True),
        (RefusedError(Reason.REFUSED), AGREED, True, True),
        (PeerError(Reason.UNREACHABLE), None, True, False),  # it may reach us
        (RefusedError(Reason.NOT_DUE), None, False, False),
        (RefusedError(Reason.LEDGER_WENT_BACK), None, False, False),
        (PeerError(Reason.SIDECAR_DOWN), None, False, False),  # ours
        (PeerError(Reason.BUSY), AGREED, False, False),  # ours
    ],
)
def test_what_is_held_against_a_partner(
    monkeypatch: pytest.MonkeyPatch, error: PeerError, agreement: Any, pauses_it: bool, shuns: bool
) -> None:
    rig = Rig(monkeypatch)
    rig.host.live = [OTHER, THIRD]
    rig.partners.failed(OTHER, 1, error, agreement, lost_s=1.0)
    assert (OTHER in rig.partners.avoided(rig.host.live)) == pauses_it
    assert (OTHER in rig.partners.avoided(rig.host.live, proposing=False)) == shuns
    refused = rig.gossip.refusal_of(OTHER, rig.proposal()) == Reason.AVOIDED
    assert refused == shuns


def test_a_restart_of_our_own_trainer_is_held_against_nobody(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rig = Rig(monkeypatch)
    rig.host.live = [OTHER, THIRD]
    rig.partners.count_no_exchange(OTHER, 1, Reason.TRAINER_RESTARTED)
    assert not rig.partners.avoided(rig.host.live)


def test_if_most_partners_fail_the_fault_is_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    rig = Rig(monkeypatch)
    live = [OTHER, THIRD, LAST]
    rig.partners.failed(OTHER, 1, PeerError(Reason.TIMEOUT), AGREED)
    assert rig.partners.avoided(live) == {OTHER}
    rig.partners.failed(THIRD, 1, PeerError(Reason.TIMEOUT), AGREED)
    assert rig.partners.avoided(live) == set()


def slot_of(one: PeerId, other: PeerId, roster: list[PeerId], after: int) -> int:
    """The next slot in which the matching has these two meet."""
    slot = after
    while matching.partner(SWARM, slot, roster, one)[:1] != [other]:
        slot += 1
    return slot


async def test_who_is_matched_with_one_that_it_avoids_asks_a_fallback_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rig = Rig(monkeypatch)
    rig.host.live = [OTHER, THIRD, LAST]
    rig.now = slot_of(ME, OTHER, [ME, *rig.host.live], 1000) + 0.5
    rig.partners.failed(OTHER, 1, PeerError(Reason.TIMEOUT), AGREED, lost_s=100.0)
    await rig.slot()
    assert len(rig.merged) == 1
    assert rig.merged[0] in (THIRD, LAST)
    assert rig.partners.skips == {Reason.AVOIDED: 1}


def test_who_is_left_free_takes_any_proposal(monkeypatch: pytest.MonkeyPatch) -> None:
    rig = Rig(monkeypatch, me=LAST)
    rig.host.live = [ME, OTHER, THIRD]
    slot = slot_of(LAST, OTHER, [LAST, *rig.host.live], 1000)
    rig.now = slot + 0.5
    assert rig.gossip.refusal_of(ME, rig.proposal()) == Reason.NOT_DUE
    rig.partners.failed(OTHER, 1, PeerError(Reason.TIMEOUT), AGREED, lost_s=100.0)
    assert rig.gossip.refusal_of(ME, rig.proposal()) is None


async def test_two_that_avoid_the_same_one_still_meet_and_the_matching_is_as_before(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The roster that goes into the matching is the whole one, at both."""
    bad, roster = LAST, [ME, OTHER, THIRD, LAST]
    given: list[set[PeerId]] = []
    true_partner = matching.partner

    def noted(swarm: str, slot: int, members: Any, *rest: Any) -> list[PeerId]:
        given.append(set(members))
        return true_partner(swarm, slot, members, *rest)

    rigs = {me: Rig(monkeypatch, me=me) for me in (ME, OTHER)}
    monkeypatch.setattr(matching, "partner", noted)
    met = 0
    for me, rig in rigs.items():
        rig.host.live = [peer for peer in roster if peer != me]
        rig.partners.failed(bad, 1, PeerError(Reason.TIMEOUT), AGREED, lost_s=1000.0)
        assert rig.partners.avoided(rig.host.live) == {bad}
    for slot in range(1000, 1030):
        for rig in rigs.values():
            rig.now = slot + 0.5
        if true_partner(SWARM, slot, roster, ME)[:1] == [OTHER]:
            met += 1
            proposal = rigs[ME].proposal()
            assert rigs[OTHER].gossip.refusal_of(ME, proposal) is None
            before = len(rigs[ME].merged)
            rigs[ME].host.trainer.step += 10  # type: ignore[union-attr] # it is there
            await rigs[ME].slot()
            assert rigs[ME].merged[before:] == [OTHER]
    assert met > 3
    assert all(members == set(roster) for members in given)


def test_a_first_deadline_follows_from_the_others_times(monkeypatch: pytest.MonkeyPatch) -> None:
    book = Rig(monkeypatch).partners
    assert book.deadline_s(OTHER, 60.0) == 60.0  # nobody has exchanged yet
    for peer, took_s in ((THIRD, 2.0), (LAST, 2.0), (ME, 50.0)):
        book.done(SimpleNamespace(**{**vars(AGREED), "peer_id": peer}), DONE, took_s)  # type: ignore[arg-type] # fake
    assert book.deadline_s(OTHER, 60.0) == FIRST_MULTIPLE * 2.0
    assert book.deadline_s(OTHER, 10.0) == 10.0
    book.failed(OTHER, 1, PeerError(Reason.TIMEOUT), AGREED)
    assert book.deadline_s(OTHER, 60.0) == 2 * FIRST_MULTIPLE * 2.0  # slow and honest, perhaps
    book.done(AGREED, DONE, 0.01)
    assert book.deadline_s(OTHER, 60.0) == MIN_DEADLINE_S


async def test_a_failed_exchange_is_made_up_for(monkeypatch: pytest.MonkeyPatch) -> None:
    rig = Rig(monkeypatch)
    good = rig.outcome

    def fail() -> None:
        raise PeerError(Reason.TIMEOUT)

    rig.outcome = fail
    await rig.slot()
    assert rig.gossip._due()
    rig.outcome, rig.now = good, rig.now + 60.0
    await rig.slot()
    assert rig.merged == [OTHER]
    assert not rig.gossip._due()
