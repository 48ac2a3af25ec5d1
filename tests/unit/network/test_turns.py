"""Who has a place at a donor when more joiners want one than there are."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest

from xpeer.identity import Identity, PeerId
from xpeer.network import turns
from xpeer.network.rates import Rates
from xpeer.network.turns import PAUSE_S, TURN_S, Turns

PLACES = 8
ONE_MBIT = 125_000
"""Bytes/s."""
LEAST = 32_768
"""Bytes/s at which nobody loses its place."""
EVERY_S = PAUSE_S
"""Time between two requests of one joiner; it takes pieces as often."""


class Place:
    """A link that serves its joiner until the donor ends it."""

    def __init__(self, peer_id: PeerId) -> None:
        self.peer_id = peer_id
        self._ended = asyncio.Event()

    def abort(self) -> None:
        self._ended.set()

    async def serve(self, at: Turns) -> None:
        link: Any = self
        with at.giving(link):
            await self._ended.wait()


class Donor:
    """A donor, and joiners that always want more, each as fast as its line is."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now_s = 0.0
        monkeypatch.setattr(turns, "time", SimpleNamespace(monotonic=lambda: self.now_s))
        self.turns = Turns(PLACES, Rates())
        self.places: dict[PeerId, asyncio.Task[None]] = {}
        self.taken: Counter[PeerId] = Counter()
        self.stays: dict[PeerId, list[tuple[float, float]]] = {}
        self._since: dict[PeerId, float] = {}

    async def asks(self, peer_id: PeerId, *, held: bool = True) -> bool:
        may = await self.turns.may_begin(peer_id, held=held)
        if may:
            self.places[peer_id] = asyncio.create_task(Place(peer_id).serve(self.turns))
            self._since[peer_id] = self.now_s
            await asyncio.sleep(0)
        for peer in [peer for peer, task in self.places.items() if task.done()]:
            del self.places[peer]
            self.stays.setdefault(peer, []).append((self._since[peer], self.now_s))
        return may

    def leaves(self, peer_id: PeerId) -> None:
        link, _ = self.turns._giving[peer_id]
        link.abort()

    def passes(self, seconds: float, rates: dict[PeerId, int]) -> None:
        self.now_s += seconds
        for peer_id in self.places:
            num_bytes = int(rates[peer_id] * seconds)
            self.taken[peer_id] += num_bytes
            self.turns.sent_piece(peer_id, num_bytes)

    async def goes_on(self, seconds: float, rates: dict[PeerId, int]) -> None:
        """All who have no place ask for one, again and again."""
        order = random.Random(3)
        until = self.now_s + seconds
        while self.now_s < until:
            outside = [peer for peer in rates if peer not in self.places]
            order.shuffle(outside)
            for peer_id in outside:
                await self.asks(peer_id)
            self.passes(EVERY_S, rates)

    async def end(self) -> None:
        for task in self.places.values():
            task.cancel()
        await asyncio.gather(*self.places.values(), return_exceptions=True)


def peers(count: int) -> list[PeerId]:
    return [Identity.generate().peer_id for _ in range(count)]


async def test_slow_joiners_in_all_places_keep_nobody_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """They read just fast enough to be served for ever. An honest one on a line of 1 Mbit/s gets a
    place in one turn, and keeps it, whoever else wants one.
    """
    donor, slow, honest = Donor(monkeypatch), peers(PLACES + 4), peers(1)[0]
    rates = dict.fromkeys(slow, LEAST)
    await donor.goes_on(EVERY_S, rates)
    rates[honest] = ONE_MBIT
    await donor.goes_on(2 * TURN_S, rates)
    assert honest in donor.places
    before = donor.taken[honest]
    await donor.goes_on(4 * TURN_S, rates)
    assert honest not in donor.stays
    assert donor.taken[honest] - before == 4 * TURN_S * ONE_MBIT
    await donor.end()


async def test_a_slow_joiner_among_faster_ones_has_its_turns(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Twelve that want more without end: the slow one makes way, and comes back again and again."""
    donor, fast, slow = Donor(monkeypatch), peers(11), peers(1)[0]
    rates = {slow: ONE_MBIT} | dict.fromkeys(fast, 10 * ONE_MBIT)
    await donor.goes_on(10 * TURN_S, rates)
    assert all(end - begin >= TURN_S for stays in donor.stays.values() for begin, end in stays)
    shares = {peer: donor.taken[peer] / rates[peer] / (10 * TURN_S) for peer in rates}
    assert min(shares.values()) >= 0.4
    await donor.end()


async def test_nobody_makes_way_while_there_is_room(monkeypatch: pytest.MonkeyPatch) -> None:
    donor, joiners = Donor(monkeypatch), peers(PLACES)
    rates = {peer: LEAST * (n + 1) for n, peer in enumerate(joiners)}
    await donor.goes_on(4 * TURN_S, rates)
    assert set(donor.places) == set(joiners) and not donor.stays
    await donor.end()


async def full(donor: Donor, rates: dict[PeerId, int]) -> None:
    """Have joiners take all places, and begin to take pieces."""
    for peer_id in rates:
        assert peer_id in donor.places or await donor.asks(peer_id)
    assert len(donor.places) == PLACES
    donor.passes(EVERY_S, rates)


async def test_who_made_way_rests_even_if_its_snapshot_is_here(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Else it would be back at once, and push out the next one."""
    donor, (newcomer, *others) = Donor(monkeypatch), peers(PLACES + 1)
    rates = {peer: LEAST * (n + 1) for n, peer in enumerate(others)}
    await full(donor, rates)
    donor.passes(TURN_S - EVERY_S - 1.0, rates)
    assert not await donor.asks(newcomer)
    donor.passes(1.0, rates)
    assert await donor.asks(newcomer)
    assert list(donor.stays) == [others[0]]  # who took least
    assert not await donor.asks(others[0])
    donor.now_s += PAUSE_S
    assert await donor.asks(others[0])
    assert list(donor.stays) == others[:2]  # not the newcomer, which has just begun
    donor.now_s += PAUSE_S
    assert await donor.asks(others[1])
    assert list(donor.stays) == others[:3]  # nor who has a turn anew
    await donor.end()


async def test_who_links_anew_goes_on_with_its_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else one identity more than there are places could keep them all."""
    donor, (newcomer, *others) = Donor(monkeypatch), peers(PLACES + 1)
    rates = dict.fromkeys(others, LEAST)
    await full(donor, rates)
    donor.passes(TURN_S / 2, rates)
    for peer_id in others:
        donor.leaves(peer_id)
        await asyncio.sleep(0)
        donor.now_s += PAUSE_S
        assert await donor.asks(peer_id, held=False)
    donor.passes(TURN_S / 2, rates)
    assert await donor.asks(newcomer)
    await donor.end()


async def test_who_took_more_than_most_makes_no_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else identities that come and go, each for less than a turn, would push out all others."""
    donor, (honest, newcomer, *others) = Donor(monkeypatch), peers(PLACES + 1)
    assert await donor.asks(honest)
    donor.passes(TURN_S, {honest: ONE_MBIT})
    await full(donor, dict.fromkeys(others, LEAST) | {honest: ONE_MBIT})
    assert not await donor.asks(newcomer)
    assert honest in donor.places
    await donor.end()


async def test_who_has_a_place_gets_no_second_one_at_anothers_cost(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    donor, others = Donor(monkeypatch), peers(PLACES)
    rates = {peer: LEAST * (n + 1) for n, peer in enumerate(others)}
    await full(donor, rates)
    donor.passes(TURN_S, rates)
    assert not await donor.asks(others[-1], held=False)
    assert not donor.stays
    await donor.end()
