"""Members that ask too much: proposals, counters, steps; with fakes."""

from __future__ import annotations

import math
from typing import Any, cast

import msgspec
import pytest

from xpeer.errors import PeerError, Reason
from xpeer.gossip import matching
from xpeer.gossip.clock import PATIENT_SLOTS, Gossip
from xpeer.gossip.partners import Partners
from xpeer.identity import Identity, PeerId
from xpeer.manifest.round import Round
from xpeer.wire.messages import Propose, Terms, TreeOffer, decode, encode

SWARM = "ab" * 32


class FakeTrainer:
    epoch, ledger_counter, step = 1, 0, 0

    window = 0

    def fragment_values(self, fragment: int, *, averaging: bool) -> int:
        return 100


class FakeHost:
    def __init__(self, partners: list[PeerId]) -> None:
        self.trainer = FakeTrainer()
        self.others = partners

    def idle_reason(self) -> None:
        return None

    def training(self) -> bool:
        return True

    def partners(self) -> list[PeerId]:
        return self.others

    def zones(self) -> dict[PeerId, str]:
        return {}

    def may_exchange(self, peer_id: PeerId) -> bool:
        return True

    def has_nothing_due(self, peer_id: PeerId) -> bool:
        return False

    def declared_rate(self, peer_id: PeerId) -> float:
        return 1.0

    def quality(self) -> tuple[float | None, float]:
        return None, 0.0


RULES = Round(fragments=4, codec="int8", slot_s=1.0, window_steps=8)


def gossip_of(me: PeerId, partners: list[PeerId], now: list[float]) -> Gossip:
    manifest: Any = type("Manifest", (), {"round": RULES})()
    return Gossip(
        me=me,
        swarm_id=SWARM,
        manifest=manifest,
        host=cast(Any, FakeHost(partners)),
        proposer=cast(Any, type("None", (), {"busy_with": lambda self, peer: True})()),
        clock=lambda: now[0],
        nudge=cast(Any, None),
        partners=Partners(lambda: now[0]),
    )


def proposal(slot: int, exchange_id: int = 1) -> Propose:
    fragment = matching.fragment_of(SWARM, slot, RULES.fragments)
    return Propose(exchange_id, slot, fragment, "int8", 100, False, Terms(1.0, 2.0, 1, 0))


@pytest.fixture
def members() -> list[PeerId]:
    return sorted(Identity.generate().peer_id for _ in range(6))


def test_a_member_that_proposes_all_the_time_gets_its_own_slots_only(members):
    me, bad, now = members[-1], members[0], [1000.0]
    gossip = gossip_of(me, members[:-1], now)
    accepted = []
    for slot in range(1000, 1040):
        now[0] = float(slot)
        for ahead in range(-8, 9):  # whichever slot suits it
            if gossip.refusal_of(bad, proposal(slot + ahead, slot * 100 + ahead)) is None:
                gossip._partners[bad].ids.last_slot = slot + ahead
                accepted.append(slot + ahead)
    assert 0 < len(accepted) <= 20  # 1 in 5, not all 40 slots and not 17 in each
    assert all(bad == matching.partner(SWARM, s, members, me)[0] for s in accepted)
    assert len(set(accepted)) == len(accepted)


def test_a_fallback_is_welcome_once_our_own_partner_did_not_come(members):
    me, now = members[-1], [1000.0]
    gossip = gossip_of(me, members[:-1], now)
    slot = next(s for s in range(1000, 1100) if matching.partner(SWARM, s, members, me))
    now[0] = float(slot)
    matched = matching.partner(SWARM, slot, members, me)[0]
    other = next(m for m in members[:-1] if m != matched)
    assert gossip.refusal_of(other, proposal(slot)) == Reason.NOT_DUE
    assert gossip.refusal_of(matched, proposal(slot)) is None
    for earlier in range(PATIENT_SLOTS):
        gossip._begin_slot(slot - PATIENT_SLOTS + earlier)
    assert gossip.refusal_of(other, proposal(slot)) is None


def test_a_counter_that_jumps_hurts_the_liar_alone(members):
    gossip = gossip_of(members[-1], members[:-1], [1000.0])
    top = (1 << 63) - 1
    gossip.before_agreement(members[0], Terms(1.0, 2.0, 1, top))
    with pytest.raises(PeerError, match=Reason.LEDGER_WENT_BACK):
        gossip.before_agreement(members[0], Terms(1.0, 2.0, 1, 5))
    gossip.before_agreement(members[1], Terms(1.0, 2.0, 1, 5))
    assert gossip._partners[members[1]].ledger.highest == 5


@pytest.mark.parametrize("weight", [math.nan, math.inf, -1.0, 0.0, 1e7])
def test_weights_out_of_bounds_are_malformed(weight):
    raw = msgspec.msgpack.decode(encode(proposal(1)))
    raw["terms"]["weight"] = weight
    with pytest.raises(PeerError, match=Reason.MALFORMED):
        decode(msgspec.msgpack.encode(raw))


@pytest.mark.parametrize("step", [1 << 62, 1 << 40, -1])
def test_a_donor_can_not_claim_any_step(step):
    offer = TreeOffer("float32", 4, 0, 1.0, bytes(32), bytes(64))
    raw = {**msgspec.msgpack.decode(encode(offer)), "step": step}
    with pytest.raises(PeerError, match=Reason.MALFORMED):
        decode(msgspec.msgpack.encode(raw))
