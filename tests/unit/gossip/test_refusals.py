"""Proposals of others: which we refuse, and why."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from tests.unit.daemon.fakes import FakeNode, member
from tests.unit.gossip.rigs import FORM, ME, OTHER, ROUND, SWARM, Rig
from xpeer.errors import PeerError, Reason
from xpeer.gossip import matching
from xpeer.identity import PeerId
from xpeer.round import Exchanged


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


def test_who_takes_no_steps_averages_and_nothing_else(rig: Rig):
    rig.host.is_training = False
    refused = rig.gossip.refusal_of(OTHER, rig.proposal(averaging=False))
    assert refused == Reason.NOT_DUE
    assert rig.gossip.refusal_of(OTHER, rig.proposal(averaging=True)) is None


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
