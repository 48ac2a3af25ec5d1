"""Names and steps of members: asked of them a few at a time, and never needed."""

from __future__ import annotations

from typing import Any, cast

import msgspec
import pytest

from tests.unit.daemon.fakes import ALPHA, BETA, Clock, FakeNode
from xpeer.config import Network, NodeConfig
from xpeer.errors import PeerError, Reason
from xpeer.identity import PeerId
from xpeer.network import about
from xpeer.network.about import About
from xpeer_daemon.acquaintances import AT_ONCE, Acquaintances

A, B = PeerId(ALPHA), PeerId(BETA)


class Members:
    """Answers as told; counts."""

    def __init__(self, **names: str | None) -> None:
        self.names = {PeerId(peer): name for peer, name in names.items()}
        self.asked: list[PeerId] = []

    async def ask(self, peer: PeerId) -> About:
        self.asked.append(peer)
        name = self.names[peer]
        if name is None:
            raise PeerError(Reason.UNREACHABLE, "of an earlier version")
        return About(name, 7)


async def test_names_of_equal_members_have_their_ids_beside_them() -> None:
    known, members = Acquaintances(Clock()), Members(**{ALPHA: "clinic", BETA: None})
    await known.ask_some(members.ask, members.names)
    assert (known.name_of(A), known.name_of(B)) == ("clinic", BETA[-8:])
    members.names[B] = "clinic"
    await known.ask_some(members.ask, members.names)
    assert {known.name_of(A), known.name_of(B)} == {f"clinic~{ALPHA[-8:]}", f"clinic~{BETA[-8:]}"}


async def test_few_are_asked_at_once_and_each_in_its_turn() -> None:
    clock = Clock()
    known, members = Acquaintances(clock), Members(**{f"p{n}": "x" for n in range(3 * AT_ONCE)})
    for _ in range(3):
        clock.now += 10
        await known.ask_some(members.ask, members.names)
    assert sorted(members.asked) == sorted(members.names)


async def test_what_partners_say_is_in_status() -> None:
    fake = FakeNode(ALPHA, BETA)
    members = Members(**{ALPHA: "clinic", BETA: None})
    await fake.view.acquaintances.ask_some(members.ask, fake.members)
    fake.clock.now += 4
    alpha, beta = fake.node.status().partners
    assert (alpha.name, alpha.step, alpha.step_age_s) == ("clinic", 7, 4.0)
    assert (beta.name, beta.step, beta.step_age_s) == ("", None, None)
    fake.members.clear()
    fake.passes(1)
    assert "clinic" in fake.text("partners-lost")


def test_a_node_says_its_name_and_step() -> None:
    fake = FakeNode(config=NodeConfig(network=Network(name="clinic")))
    fake.works(339)
    assert fake.node.about() == About("clinic", 340)
    assert fake.node.status().name == "clinic"


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (b"\xff", Reason.MALFORMED),
        (msgspec.msgpack.encode({"name": "\x1b[2J"}), Reason.MALFORMED),
        (msgspec.msgpack.encode({"name": "x" * 33}), Reason.MALFORMED),
        (msgspec.msgpack.encode({"step": -1}), Reason.MALFORMED),
        (bytes(2000), Reason.OVERSIZE),
    ],
)
async def test_nonsense_is_refused(answer: bytes, reason: str) -> None:
    class Swarm:
        async def call(self, *_: object) -> bytes:
            return answer

    with pytest.raises(PeerError) as refused:
        await about.ask(cast(Any, Swarm()), A)
    assert refused.value.reason == reason


async def test_a_later_version_may_say_more() -> None:
    class Swarm:
        async def call(self, *_: object) -> bytes:
            return msgspec.msgpack.encode({"name": "x", "mood": "good"})

    assert await about.ask(cast(Any, Swarm()), A) == About("x")
