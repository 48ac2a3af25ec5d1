"""One hostile donor among honest ones: how long it can keep a joiner from beginning."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import pytest

from tests.unit.daemon.donations import GOOD, LIAR, OFFERS, TRUE_LOSS, TWIN, Offer, Rig, Trainer
from tests.unit.daemon.test_hostile_offers import pieces_of
from xpeer.errors import PeerError, Reason
from xpeer.identity import PeerId
from xpeer.network import turns
from xpeer_daemon import donors, fetching

Coming = AsyncGenerator[tuple[int, memoryview]]


@pytest.fixture
def rig(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Rig:
    """TWIN claims what GOOD claims, and gives other parameters. Who failed rests for a moment."""
    pieces_of(monkeypatch, 4)
    monkeypatch.setitem(OFFERS, TWIN, OFFERS[GOOD])
    monkeypatch.setitem(TRUE_LOSS, TWIN, 9.0)
    monkeypatch.setattr(turns, "PAUSE_S", 0.2)
    return Rig(tmp_path, monkeypatch, founds=False)


async def taken_by(rig: Rig, within_s: float | None = 60.0) -> list[PeerId]:
    trainer = Trainer()
    async with asyncio.timeout(within_s):
        await rig.hold(trainer)
    return trainer.taken


def trickles(monkeypatch: pytest.MonkeyPatch, slow: PeerId) -> None:
    """It gives one piece, and is never silent for so long that it loses its place by that."""
    monkeypatch.setattr(fetching, "SILENT_S", 1e6)
    real = Offer.pieces

    async def one(offer: Offer, first: int, count: int) -> Coming:
        async for each in real(offer, first, count):
            yield each
            if offer.donor == slow:
                await asyncio.Event().wait()

    monkeypatch.setattr(Offer, "pieces", one)


@pytest.mark.parametrize("alone", [False, True])
async def test_who_gives_too_little_makes_way_for_others(
    rig: Rig, monkeypatch: pytest.MonkeyPatch, alone: bool
) -> None:
    """With the best claim, or where it has to give all since a mixture was bad."""
    monkeypatch.setattr(donors, "CATCH_UP_S", 0.05)
    slow = TWIN if alone else LIAR
    trickles(monkeypatch, slow)
    rig.donors._alone = slow if alone else None
    rig.live = [slow, GOOD]
    assert await taken_by(rig) == [GOOD]


async def test_who_alone_holds_parameters_may_be_slow(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    late_s = late(monkeypatch, 5000.0)
    rig.live = [GOOD]
    assert await taken_by(rig, None) == [GOOD]
    assert (len(rig.asked), late_s[0]) == (1, 20_000.0)


async def test_slow_lines_get_through(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of them need longer for a piece than is allowed at first."""
    late(monkeypatch, 5000.0)
    monkeypatch.setitem(TRUE_LOSS, TWIN, 2.0)
    monkeypatch.setattr(donors, "PARALLEL", 1)
    rig.live = [GOOD, TWIN]
    (taken,) = await taken_by(rig, None)
    assert taken in rig.live


def late(monkeypatch: pytest.MonkeyPatch, piece_s: float) -> list[float]:
    """Each piece comes after so many seconds, and nobody is silent for so long."""
    monkeypatch.setattr(fetching, "SILENT_S", 1e6)
    loop, late_s = asyncio.get_running_loop(), [0.0]
    real, time = Offer.pieces, loop.time

    async def slow(offer: Offer, first: int, count: int) -> Coming:
        for piece in range(first, first + count):
            for _ in range(10):  # whatever is due meanwhile happens
                late_s[0] += piece_s / 10
                await asyncio.sleep(0)
                await asyncio.sleep(0)
            async for each in real(offer, piece, 1):
                yield each

    monkeypatch.setattr(Offer, "pieces", slow)
    monkeypatch.setattr(loop, "time", lambda: time() + late_s[0])
    return late_s


async def test_who_breaks_off_what_it_has_to_give_alone_is_blamed(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It gave pieces, so it is spared for a moment: then it would be chosen again and again."""
    rig.donors._alone, rig.live = TWIN, [TWIN, GOOD]
    rig.donors._offers.spare(TWIN, "its line broke")
    rig.donors._offers._failed[TWIN].until_s += 1e6
    failures = list[int]()

    class Looks(Trainer):
        async def import_state(self, *args: Any) -> float:
            failures.append(rig.donors._offers._failed[TWIN].failures)
            assert await rig.donors._more([GOOD]) == []
            rig.donors._offers._failed[TWIN].until_s = 0.0
            assert await rig.donors._more([GOOD]) == []  # its pause is over: it was blamed
            return await super().import_state(*args)

    trainer = Looks()
    async with asyncio.timeout(60):
        await rig.hold(trainer)
    assert (trainer.taken, failures) == ([GOOD], [1])


async def test_a_liar_is_chosen_again_only_if_nobody_else_offers_anything(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However long ago it was blamed: transfers take longer than any pause."""
    monkeypatch.setattr(turns, "PAUSE_S", 0.0)
    rig.live, fails = [LIAR], True
    trainer: Any = Trainer()
    for _ in range(2):
        assert not await rig.donors._take_over_best(trainer, None)
        rig.donors._offers._failed[LIAR].until_s = 0.0
    rig.live = [LIAR, GOOD]
    real = Offer.pieces

    async def first_fails(offer: Offer, first: int, count: int) -> Coming:
        nonlocal fails
        assert offer.donor == GOOD
        if fails:
            fails = False
            raise PeerError(Reason.DIGEST_MISMATCH, "a bit flipped on its way")
        async for each in real(offer, first, count):
            yield each

    monkeypatch.setattr(Offer, "pieces", first_fails)
    assert await taken_by(rig) == [GOOD]
    assert rig.donors._blamed == set()


async def test_chance_decides_who_gives_all_after_a_bad_mixture(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever is fastest gave most of it, and may be fast because it lies."""
    among = list[list[PeerId]]()

    def chosen(found: list[PeerId]) -> PeerId:
        among.append(found)
        return GOOD

    monkeypatch.setattr(random, "choice", chosen)
    real, twin_gave = Offer.pieces, asyncio.Event()

    async def most(offer: Offer, first: int, count: int) -> Coming:
        if offer.donor == TWIN and first == 2:
            await asyncio.Event().wait()
        if offer.donor == GOOD:
            await twin_gave.wait()
        async for each in real(offer, first, count):
            yield each
        twin_gave.set()

    monkeypatch.setattr(Offer, "pieces", most)
    monkeypatch.setattr(donors, "ranked", lambda all_: sorted(all_, key=lambda o: o.donor == GOOD))
    rig.live = [TWIN, GOOD]
    assert await taken_by(rig) == [GOOD]
    assert among == [sorted([GOOD, TWIN])]
