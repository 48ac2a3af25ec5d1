"""Parameters in pieces: what a donor gives, what a joiner refuses, and what a donor refuses."""

from __future__ import annotations

import asyncio
import random
import socket
from collections.abc import AsyncIterator, Callable
from typing import Any

import msgspec
import pytest

from tests.unit.network.test_agreement import SWARM, party
from xpeer.errors import PeerError, Reason
from xpeer.identity import Domain, Identity, PeerId
from xpeer.manifest import StateForm
from xpeer.network import giving, pieces
from xpeer.network.giving import Giver
from xpeer.network.link import FRAME_TIMEOUT_S, Link
from xpeer.network.pieces import Shape, Signer, leaves_of, root_of
from xpeer.network.rates import Rates
from xpeer.network.shelf import Shelf
from xpeer.network.stream import Stream
from xpeer.network.turns import Turns
from xpeer.network.uplink import PIECE_EVERY_S, Uplink
from xpeer.update import ModelState, StateCopy
from xpeer.wire.messages import PIECE_BYTES, PiecesRequest, TreeOffer, tree_statement

PAYLOAD = random.Random(2).randbytes(3 * PIECE_BYTES + 400)
SHAPE = Shape(StateForm("float32", len(PAYLOAD) // 4))
SIGNER = Signer(SWARM, b"m" * 32)


class Source:
    """A trainer; each snapshot has another step."""

    def __init__(self, payload: bytes | bytearray = PAYLOAD) -> None:
        self.exports = self.step = 0
        self._payload = payload

    async def export_state(self) -> StateCopy:
        self.exports += 1
        return StateCopy(ModelState(memoryview(self._payload), self.exports, 1.0), 0.0)


class Pair:
    """A donor, and joiners that link to it."""

    def __init__(
        self,
        source: Source | None = None,
        uplink: Uplink | None = None,
        shelf: Shelf | None = None,
        places: int = 2,
    ) -> None:
        self.donor = Identity.generate()
        self.source = source or Source()
        self.shelf, self.turns = shelf or Shelf(1), Turns(places, Rates())
        self._handle = giving.serving(
            party(self.donor),
            lambda: self.source,
            SHAPE,
            self.turns,
            self.shelf,
            uplink or Uplink(0),
        )
        self.tasks: list[asyncio.Task[None]] = []
        self.errors: list[PeerError] = []
        """With which the donor ended links."""

    async def open_link(self, peer_id: PeerId, protocol: str, timeout_s: float) -> Link:
        ours, theirs = socket.socketpair()
        self.tasks.append(asyncio.create_task(self._serve(Link(self._who, Stream(theirs), 5.0))))
        return Link(self.donor.peer_id, Stream(ours), 5.0)

    async def _serve(self, link: Link) -> None:
        try:
            await self._handle(link)
        except PeerError as e:
            self.errors.append(e)

    async def ask(self, who: Identity, root: bytes | None = None) -> Giver:
        self._who = who.peer_id
        return await giving.ask(party(who), self, self.donor.peer_id, SHAPE, Rates(), root)

    async def end(self) -> None:
        async with asyncio.timeout(20):
            await asyncio.gather(*self.tasks)


@pytest.fixture
async def pair() -> AsyncIterator[Pair]:
    made = Pair()
    yield made
    await made.end()


async def received(giver: Giver, first: int, count: int) -> bytes:
    return b"".join([bytes(data) async for _, data in giver.pieces(first, count)])


async def test_a_joiner_gets_the_pieces_that_it_asks_for(pair: Pair) -> None:
    giver = await pair.ask(Identity.generate())
    assert await received(giver, 2, 2) == PAYLOAD[2 * PIECE_BYTES :]
    assert await received(giver, 0, 1) == PAYLOAD[:PIECE_BYTES]
    await giver.close()


async def test_who_comes_back_gets_the_rest_of_the_same_snapshot(pair: Pair) -> None:
    joiner = Identity.generate()
    giver = await pair.ask(joiner)
    await received(giver, 0, 1)
    giver.refuse()  # the link breaks
    again = await pair.ask(joiner, giver.tree.root)  # at once: it costs no copy
    assert again.tree == giver.tree
    await received(again, 1, 1)
    await again.close()
    await pair.end()
    fresh = await pair.ask(joiner)  # so does the one that is there for everybody
    fresh.refuse()
    await pair.end()
    pair.source.step = 10
    with pytest.raises(PeerError):  # another one costs the trainer a copy
        await pair.ask(joiner)
    assert pair.source.exports == 1


async def test_one_snapshot_serves_all_joiners(pair: Pair) -> None:
    givers = [await pair.ask(Identity.generate()) for _ in range(2)]
    with pytest.raises(PeerError):  # only so many at a time
        await pair.ask(Identity.generate())
    assert (pair.source.exports, len({giver.tree.root for giver in givers})) == (1, 1)
    for giver in givers:
        await giver.close()


async def test_nobody_is_sent_a_snapshot_more_than_twice(pair: Pair) -> None:
    joiner = Identity.generate()
    giver = await pair.ask(joiner)
    for _ in range(2):
        await received(giver, 0, 4)
    giver.refuse()
    again = await pair.ask(joiner, giver.tree.root)  # another link does not help
    with pytest.raises(PeerError):
        await received(again, 0, 1)
    again.refuse()


def test_nor_of_two_snapshots_in_turn() -> None:
    turns, joiner = Turns(2, Rates()), Identity.generate().peer_id
    for root in (b"one", b"two", b"one"):
        turns.sent(joiner, root, 100, 100)
    with pytest.raises(PeerError):
        turns.sent(joiner, b"one", 1, 100)


@pytest.mark.parametrize(("first", "count"), [(3, 2), (4, 1), (1 << 40, 64)])
async def test_pieces_that_do_not_exist_end_the_link(pair: Pair, first: int, count: int) -> None:
    giver = await pair.ask(Identity.generate())
    await giver._link.send(PiecesRequest(first, count))
    with pytest.raises(PeerError):
        await giver._link.receive()
    giver.refuse()


async def test_an_idle_joiner_loses_its_place(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(giving, "IDLE_S", 0.05)
    giver = await pair.ask(Identity.generate())
    await pair.end()
    assert pair.turns._giving == {}
    giver.refuse()


async def test_who_asks_now_and_then_loses_its_place_too(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    giver = await pair.ask(Identity.generate())
    await received(giver, 0, 1)
    monkeypatch.setattr(giving, "IDLE_S", 0.2)
    with pytest.raises(PeerError):
        for _ in range(6):  # never idle for so long, but in all
            await asyncio.sleep(0.15)
            await received(giver, 0, 1)
    giver.refuse()


async def test_a_wrong_piece_is_refused() -> None:
    payload = bytearray(PAYLOAD)
    pair = Pair(source=Source(payload))
    giver = await pair.ask(Identity.generate())
    payload[PIECE_BYTES + 5] ^= 1
    seen = []
    with pytest.raises(PeerError, match=Reason.DIGEST_MISMATCH):
        async for piece, _ in giver.pieces(0, 4):
            seen.append(piece)
    assert seen == [0]
    giver.refuse()
    await pair.end()


def signed(donor: Identity, offer: TreeOffer, swarm: str = SWARM) -> TreeOffer:
    statement = tree_statement(swarm, b"m" * 32, donor.peer_id, offer)
    return msgspec.structs.replace(offer, signature=donor.sign(Domain.TREE, statement))


LEAVES = leaves_of(memoryview(PAYLOAD))
OFFER = TreeOffer("float32", len(PAYLOAD), 7, 2.0, root_of(LEAVES), bytes(64))


@pytest.mark.parametrize(
    ("change", "swarm", "reason"),
    [
        ({}, SWARM, None),
        ({}, "cd" * 32, Reason.TAMPERED),  # replayed from another swarm
        ({"num_bytes": len(PAYLOAD) + 1}, SWARM, Reason.WRONG_MODEL),
        ({"num_bytes": 1 << 47}, SWARM, Reason.WRONG_MODEL),
        ({"codec": "int8"}, SWARM, Reason.WRONG_CODEC),
        ({"loss_public": 1e9}, SWARM, Reason.REFUSED),
        ({"loss_public": float("nan")}, SWARM, Reason.NOT_FINITE),
        ({"loss_public": -0.1}, SWARM, Reason.REFUSED),  # nothing that is measured would do
        ({"root": bytes(32)}, SWARM, Reason.DIGEST_MISMATCH),
    ],
)
def test_a_tree_has_to_be_of_our_swarm_and_model(
    change: dict[str, Any], swarm: str, reason: str | None
) -> None:
    donor = Identity.generate()
    offer = signed(donor, msgspec.structs.replace(OFFER, **change), swarm)
    if reason is None:
        tree = pieces.verified(SIGNER, donor.peer_id, offer, LEAVES, SHAPE)
        assert pieces.from_bytes(tree.to_bytes(), SIGNER, SHAPE) == tree
        return
    with pytest.raises(PeerError, match=reason):
        pieces.verified(SIGNER, donor.peer_id, offer, LEAVES, SHAPE)


def test_a_tree_of_another_donor_is_refused() -> None:
    donor, thief = Identity.generate(), Identity.generate()
    with pytest.raises(PeerError, match=Reason.TAMPERED):
        pieces.verified(SIGNER, thief.peer_id, signed(donor, OFFER), LEAVES, SHAPE)


@pytest.mark.parametrize("cut", [lambda leaves: leaves[:-32], lambda leaves: leaves + bytes(32)])
def test_a_tree_with_other_leaves_is_refused(cut: Callable[[bytes], bytes]) -> None:
    donor = Identity.generate()
    with pytest.raises(PeerError, match=Reason.DIGEST_MISMATCH):
        pieces.verified(SIGNER, donor.peer_id, signed(donor, OFFER), cut(LEAVES), SHAPE)


@pytest.mark.parametrize(("mbit_per_s", "joiners"), [(0, 8), (1, 1), (2, 2), (5, 5), (100, 8)])
def test_a_slow_donor_serves_few_at_a_time(mbit_per_s: float, joiners: int) -> None:
    """Else each would wait longer for a piece than it waits for any frame."""
    assert Uplink(mbit_per_s).joiners(8) == joiners
    assert FRAME_TIMEOUT_S > PIECE_EVERY_S


async def test_joiners_together_get_no_more_than_the_bound() -> None:
    now_s, slept = 0.0, list[float]()

    async def sleep(seconds: float) -> None:
        nonlocal now_s
        slept.append(seconds)
        now_s += max(0.0, seconds)

    uplink = Uplink(8.0, lambda: now_s, sleep)  # 10^6 bytes a second
    for _ in range(5):
        await uplink.take(500_000)
    assert slept == pytest.approx([0.0, 0.5, 0.5, 0.5, 0.5])
    now_s += 60.0  # an idle line saves nothing up
    await uplink.take(500_000)
    await uplink.take(500_000)
    assert slept[-2:] == pytest.approx([0.0, 0.5])
