"""Donors that have to give all alone, since a mixture was bad, and what others lose by them."""

from __future__ import annotations

import asyncio
import dataclasses
import random
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from tests.unit.daemon.donations import (
    GOOD,
    LIAR,
    OFFERS,
    OLD,
    TRUE_LOSS,
    TWIN,
    WORSE,
    Offer,
    Rig,
    Trainer,
)
from tests.unit.daemon.test_hostile_offers import pieces_of
from xpeer.errors import PeerError, Reason
from xpeer.identity import PeerId
from xpeer.network import giving, turns
from xpeer_daemon import donors, fetching

Coming = AsyncGenerator[tuple[int, memoryview]]


@pytest.fixture
def rig(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Rig:
    """TWIN claims what GOOD claims, and gives other parameters. Nobody rests."""
    pieces_of(monkeypatch, 4)
    monkeypatch.setitem(OFFERS, TWIN, OFFERS[GOOD])
    monkeypatch.setitem(TRUE_LOSS, TWIN, 9.0)
    monkeypatch.setattr(turns, "PAUSE_S", 0.0)
    monkeypatch.setattr(fetching, "AGAIN_WITHIN_S", 0.0)
    return Rig(tmp_path, monkeypatch, founds=False)


async def taken_by(
    rig: Rig, trainer: Trainer | None = None, within_s: float | None = 60.0
) -> list[PeerId]:
    trainer = trainer or Trainer()
    async with asyncio.timeout(within_s):
        await rig.hold(trainer)
    return trainer.taken


async def test_who_gives_a_piece_of_one_snapshot_after_another_is_let_go(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their steps lie far apart, so each takes the place of the last one."""
    real_ask, real, asked = rig._ask, Offer.pieces, 0

    async def ask(party: Any, dialler: Any, donor: PeerId, *more: Any) -> Offer:
        nonlocal asked
        offer = await real_ask(party, dialler, donor, *more)
        if donor == TWIN:
            asked += 1
            offer.step = (100, 250)[asked % 2]
            signed = msgspec.structs.replace(
                offer.tree.offer, step=offer.step, signature=bytes([asked] * 64)
            )
            offer.tree = dataclasses.replace(offer.tree, offer=signed)
        return offer

    async def one(offer: Offer, first: int, count: int) -> Coming:
        async for each in real(offer, first, count):
            yield each
            if offer.donor == TWIN:
                raise PeerError(Reason.CLOSED, "it goes")

    monkeypatch.setattr(giving, "ask", ask)
    monkeypatch.setattr(Offer, "pieces", one)
    rig.donors._conduct.alone, rig.live = TWIN, [TWIN, GOOD]
    assert await taken_by(rig) == [GOOD]


async def test_who_is_doubtful_shuts_out_nobody_who_is_not(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even if that one was blamed: else the operator would be asked to accept the liar."""
    monkeypatch.setitem(OFFERS, LIAR, (101, 20.0))
    rig.donors._conduct.blamed, rig.live = {GOOD}, [LIAR, GOOD]
    assert await taken_by(rig) == [GOOD]


async def test_who_was_blamed_confirms_nobody(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    for liar in (LIAR, TWIN):
        monkeypatch.setitem(OFFERS, liar, (101, 20.0))
    rig.donors._conduct.blamed, rig.live = {TWIN}, [LIAR, TWIN]
    trainer: Any = Trainer()
    assert not await rig.donors._take_over_best(trainer, None)
    assert (trainer.taken, rig.conditions) == ([], {"donor-doubtful"})


async def test_who_spoils_a_mixture_and_never_gives_alone_spoils_no_other_one(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It says that it is busy whenever it has to give all, and chance always draws it."""
    monkeypatch.setattr(random, "choice", lambda found: TWIN if TWIN in found else found[0])
    monkeypatch.setattr(fetching, "MORE_S", 0.001)  # so GOOD does not give for long alone
    real_ask, real = rig._ask, Offer.pieces

    async def slow(offer: Offer, first: int, count: int) -> Coming:
        async for each in real(offer, first, count):
            await asyncio.sleep(0.02 if trainer.measured and offer.donor == GOOD else 0.0)
            yield each

    async def ask(party: Any, dialler: Any, donor: PeerId, *more: Any) -> Offer:
        if donor == TWIN == rig.donors._conduct.alone:
            raise PeerError(Reason.CLOSED, "it gives to others")
        return await real_ask(party, dialler, donor, *more)

    class Measures(Trainer):
        measured = 0

        async def import_state(self, *args: Any) -> float:
            self.measured += 1
            assert rig.donors._offers._failed.get(TWIN) is None  # busy is no fault
            return await super().import_state(*args)

    monkeypatch.setattr(giving, "ask", ask)
    monkeypatch.setattr(Offer, "pieces", slow)
    trainer, rig.live = Measures(), [TWIN, GOOD]
    assert await taken_by(rig, trainer) == [GOOD]
    assert trainer.measured == 2


async def test_one_wrong_piece_takes_no_time_from_honest_donors(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TWIN gives most of it, and lies then. GOOD gives 6% in the time in which 5% have to come."""
    pieces_of(monkeypatch, 33)
    monkeypatch.setattr(fetching, "SILENT_S", 1e6)
    monkeypatch.setitem(OFFERS, OLD, (20, 2.0))  # it could give, but nothing that fits
    loop, late_s, lied = asyncio.get_running_loop(), 0.0, asyncio.Event()
    real, time = Offer.pieces, loop.time

    def here() -> int:
        gathered = rig.donors._takeover._gathered
        return 0 if gathered is None else gathered.num_bytes

    async def slow(offer: Offer, first: int, count: int) -> Coming:
        nonlocal late_s
        if offer.donor == GOOD:
            await lied.wait()
        for piece in range(first, first + count):
            if offer.donor == TWIN and here() > 0.55 * whole:
                rig.live.remove(TWIN)
                lied.set()
                raise PeerError(Reason.DIGEST_MISMATCH, "not the one that it signed")
            for _ in range(10 if offer.donor == GOOD else 0):
                late_s += 43.0
                await asyncio.sleep(0)
                await asyncio.sleep(0)
            async for each in real(offer, piece, 1):
                yield each

    class Looks(Trainer):
        async def import_state(self, *args: Any) -> float:
            assert GOOD not in rig.donors._offers._failed
            return await super().import_state(*args)

    monkeypatch.setattr(Offer, "pieces", slow)
    monkeypatch.setattr(loop, "time", lambda: time() + late_s)
    whole = rig.donors._takeover._shape.num_bytes
    rig.live, trainer = [TWIN, GOOD, OLD], Looks()
    assert await taken_by(rig, trainer, None) == [GOOD]


async def test_a_donor_whose_line_broke_once_comes_before_a_worse_one(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It gave something, so it was not tried in vain."""
    monkeypatch.setitem(OFFERS, WORSE, (100, 6.0))
    monkeypatch.setitem(TRUE_LOSS, WORSE, 6.0)
    real, broke, gave = Offer.pieces, False, set[PeerId]()

    async def breaks(offer: Offer, first: int, count: int) -> Coming:
        nonlocal broke
        gave.add(offer.donor)
        async for each in real(offer, first, count):
            yield each
            if offer.donor == GOOD and not broke:
                broke = True
                raise PeerError(Reason.CLOSED, "its line broke")

    monkeypatch.setattr(Offer, "pieces", breaks)
    monkeypatch.setattr(donors, "STALE_S", 0.0)  # as a transfer takes long
    rig.live = [WORSE, GOOD]
    assert await taken_by(rig) == [GOOD]
    assert (broke, gave) == (True, {GOOD})


def test_a_mixture_is_measured_by_its_lowest_claim(rig: Rig) -> None:
    """So nobody who claims much more, or much less, is in it."""
    good, worse, liar = Offer(GOOD), Offer(WORSE), Offer(LIAR)
    every: Any = [[good, worse, liar], [worse, good, liar], [liar, good, worse]]
    for offers in every:
        assert rig.donors._chosen(offers) == offers[:1]
