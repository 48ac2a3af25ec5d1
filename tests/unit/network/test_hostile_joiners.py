"""Joiners that hold places and snapshots, and take nothing."""

from __future__ import annotations

import asyncio
import time
from types import SimpleNamespace

import pytest

from tests.unit.network.test_giving import LEAVES, PAYLOAD, Pair, pair, received
from xpeer.errors import PeerError
from xpeer.identity import Identity
from xpeer.network import giving, turns
from xpeer.network.link import Link
from xpeer.network.pieces import root_of
from xpeer.network.rates import Pace
from xpeer.network.shelf import STALE_S, Shelf
from xpeer.network.uplink import Uplink
from xpeer.wire.messages import PIECE_BYTES, PiecesRequest

__all__ = ["pair"]


async def test_who_only_holds_a_place_makes_way_for_a_newcomer(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a few identities of one operator could keep all others from joining."""
    monkeypatch.setattr(turns, "YIELDS_S", 0.0)
    first, second = [await pair.ask(Identity.generate()) for _ in range(2)]
    newcomer = await pair.ask(Identity.generate())
    assert await received(newcomer, 0, 1) == PAYLOAD[:PIECE_BYTES]
    with pytest.raises(PeerError):
        await received(first, 0, 1)
    assert await received(second, 0, 1) == PAYLOAD[:PIECE_BYTES]
    for giver in (first, second, newcomer):
        giver.refuse()


async def test_who_links_anew_now_and_then_has_held_its_place_all_the_time(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else one identity more than there are places could keep them all."""
    now_s = later(monkeypatch)
    joiners, newcomer = [Identity.generate() for _ in range(2)], Identity.generate()
    links = [await pair.ask(joiner) for joiner in joiners]
    for joiner in joiners:  # each asks for the fresh snapshot again, which costs no copy
        now_s[0] += 4.0
        links.append(await pair.ask(joiner))
    with pytest.raises(PeerError):  # nobody has held its place for 10 s
        await pair.ask(newcomer)
    now_s[0] += 4.0
    links.append(await pair.ask(newcomer))
    assert await received(links[-1], 0, 1) == PAYLOAD[:PIECE_BYTES]
    for giver in links:
        giver.refuse()


async def test_a_piece_makes_up_for_the_time_before_it(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    now_s = later(monkeypatch)
    givers = [await pair.ask(Identity.generate()) for _ in range(2)]
    now_s[0] += 9.0
    for giver in givers:
        await received(giver, 0, 1)
    now_s[0] += 9.0
    with pytest.raises(PeerError):
        await pair.ask(Identity.generate())
    for giver in givers:
        giver.refuse()


async def test_who_took_least_in_its_turn_makes_way_and_comes_back_for_the_rest(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else as many joiners as there are places keep them all, at the least speed there is."""
    monkeypatch.setattr(giving, "WORTH", 0.9)  # of a large model little comes in one turn
    now_s = later(monkeypatch)
    slow, newcomer = Identity.generate(), Identity.generate()
    first = await pair.ask(slow)
    pair.source.step, pair.source._payload = 10, PAYLOAD[::-1]
    second = await pair.ask(Identity.generate())
    for seconds in (450.0, 450.0):
        await received(first, 0, 1)
        await received(second, 0, 2)
        with pytest.raises(PeerError):
            await pair.ask(newcomer)
        now_s[0] += seconds
    await received(first, 1, 1)
    await received(second, 2, 2)
    pair.source.step = 20
    third = await pair.ask(newcomer)
    assert third.tree == second.tree
    with pytest.raises(PeerError):
        await received(first, 2, 1)
    await received(second, 0, 1)
    await second.close()
    with pytest.raises(PeerError):
        await pair.ask(slow, first.tree.root)
    assert (forgets := pair.shelf._giving_up) is not None
    assert forgets.when() - asyncio.get_running_loop().time() > turns.TURN_S  # others come first
    now_s[0] += turns.PAUSE_S
    again = await pair.ask(slow, first.tree.root)
    assert again.tree == first.tree
    assert await received(again, 2, 2) == PAYLOAD[2 * PIECE_BYTES :]
    for giver in (first, again, third):
        giver.refuse()


async def test_a_request_does_not_end_a_faster_joiners_transfer() -> None:
    """Of two snapshots the one goes of which less was taken, not the older one: else two identities
    could break off every transfer that takes longer than 15 minutes.
    """
    now_s = 0.0
    pair = Pair(shelf=Shelf(1, lambda: now_s), places=3)
    honest = await pair.ask(Identity.generate())
    await received(honest, 0, 3)
    pair.source.step, now_s = 10, 30.0
    slow = await pair.ask(Identity.generate())
    await received(slow, 0, 1)
    pair.source.step, now_s = 20, 30.0 + STALE_S
    newcomer = await pair.ask(Identity.generate())
    assert newcomer.step == 3
    assert await received(honest, 3, 1) == PAYLOAD[3 * PIECE_BYTES :]
    with pytest.raises(PeerError):
        await received(slow, 1, 1)
    for giver in (honest, slow, newcomer):
        giver.refuse()
    await pair.end()


async def test_from_the_second_link_on_the_time_without_a_piece_counts(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether the joiner says that it comes back or not."""
    joiner = Identity.generate()
    (await pair.ask(joiner)).refuse()
    await pair.end()
    monkeypatch.setattr(giving, "IDLE_S", 0.05)
    for _ in range(3):
        giver = await pair.ask(joiner)
        await pair.end()  # the donor drops it
        giver.refuse()
    assert "for too long" in str(pair.errors[-1])


def later(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds by which the clock of turns is ahead."""
    real, now_s = time.monotonic, [0.0]
    clock = SimpleNamespace(monotonic=lambda: real() + now_s[0])
    monkeypatch.setattr(turns, "time", clock)
    return now_s


async def test_who_is_being_sent_pieces_keeps_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turns, "YIELDS_S", 0.0)
    line_is_free, waiting = asyncio.Event(), asyncio.Semaphore(0)

    async def sleep(seconds: float) -> None:
        if seconds > 1.0:
            waiting.release()
            await line_is_free.wait()

    pair = Pair(uplink=Uplink(8.0, lambda: 0.0, sleep))  # a piece a second
    givers = [await pair.ask(Identity.generate()) for _ in range(2)]
    for giver in givers:
        await giver._link.send(PiecesRequest(0, 3))
    for _ in givers:
        await waiting.acquire()
    with pytest.raises(PeerError):
        await pair.ask(Identity.generate())
    for giver in givers:
        giver.refuse()
    line_is_free.set()
    await pair.end()


async def test_who_comes_back_for_a_snapshot_again_and_again_can_not_keep_it(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two such snapshots, and nobody would get a fresh one any more."""
    joiner = Identity.generate()
    giver = await pair.ask(joiner)
    await received(giver, 0, 1)
    giver.refuse()
    monkeypatch.setattr(giving, "IDLE_S", 0.05)
    for _ in range(4):
        giver = await pair.ask(joiner, giver.tree.root)
        await pair.end()  # the donor drops it
        giver.refuse()
    assert "for too long" in str(pair.errors[-1])


async def test_who_takes_its_pieces_too_slowly_earns_no_time_to_be_idle(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each within its deadline: 30 s and more are allowed for a piece, once."""
    real, now_s = time.monotonic, 0.0
    clock = SimpleNamespace(monotonic=lambda: real() + now_s)
    monkeypatch.setattr(giving, "time", clock)
    send = Link.send_bulk

    async def slow(link: Link, payload: memoryview, pace: Pace | None = None) -> bytes:
        nonlocal now_s
        now_s += 45.0 if len(payload) == PIECE_BYTES else 0.0
        return await send(link, payload, pace)

    monkeypatch.setattr(Link, "send_bulk", slow)
    giver = await pair.ask(Identity.generate())
    with pytest.raises(PeerError):
        for _ in range(2):
            await received(giver, 0, 3)
    giver.refuse()
    await pair.end()
    assert "too little, for too long" in str(pair.errors[-1])
    (spent,) = pair.turns._spent.values()
    assert spent.num_bytes < 6 * PIECE_BYTES


async def test_hashes_count_as_bytes_that_a_joiner_is_sent() -> None:
    slept = list[float]()

    async def sleep(seconds: float) -> None:
        slept.append(seconds)

    pair, joiner = Pair(uplink=Uplink(8.0, lambda: 0.0, sleep)), Identity.generate()
    for _ in range(3):
        (await pair.ask(joiner)).refuse()
        await pair.end()
    spent = pair.turns.spent(joiner.peer_id, root_of(LEAVES))
    assert spent.num_bytes == 3 * len(LEAVES)
    assert slept == pytest.approx([n * len(LEAVES) / 1e6 for n in range(3)])
