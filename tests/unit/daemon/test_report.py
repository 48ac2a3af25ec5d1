"""What `status` says of the other members."""

from __future__ import annotations

from tests.unit.daemon.fakes import FakeNode, member
from xpeer.identity import PeerId


def test_a_member_that_falls_silent_is_missed_until_it_comes_back() -> None:
    fake = FakeNode("b", "c")
    fake.passes(5)
    assert {p.peer_id: p.state for p in fake.node.status().partners} == {"b": "alive", "c": "alive"}
    del fake.members[PeerId("c")]
    fake.passes(30)
    here, missed = fake.node.status().partners
    assert (here.peer_id, here.state, here.silent_s) == ("b", "alive", None)
    assert (missed.peer_id, missed.state, missed.silent_s) == ("c", "missed", 30.0)
    fake.members[PeerId("c")] = member("c")
    fake.passes(1)
    assert [p.state for p in fake.node.status().partners] == ["alive", "alive"]


def test_a_member_that_left_is_not_missed() -> None:
    fake = FakeNode("b", "c")
    fake.passes(5)
    fake.members[PeerId("c")] = member("c", "left")
    fake.passes(5)
    del fake.members[PeerId("c")]
    fake.passes(5)
    assert [p.peer_id for p in fake.node.status().partners] == ["b"]


def test_joiners_that_are_served_are_counted() -> None:
    fake = FakeNode("b")
    fake.turns.joiners = 2
    assert fake.node.status().joiners == 2


def test_strangers_at_either_door_are_counted() -> None:
    fake = FakeNode("b")
    fake.swarm.strangers_refused, fake.swarm.direct.strangers = 3, 4
    assert fake.node.status().strangers_refused == 7
