"""One hostile donor among honest ones: how long it can keep a joiner from beginning."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import pytest

from tests.unit.daemon.donations import (
    BUSY,
    GOOD,
    LIAR,
    OFFERS,
    TRUE_LOSS,
    TWIN,
    Offer,
    Rig,
    Trainer,
)
from tests.unit.daemon.test_hostile_offers import pieces_of
from xpeer.errors import PeerError, Reason
from xpeer.gossip import backoff
from xpeer.identity import PeerId
from xpeer.network import giving, turns
from xpeer_daemon import donors, fetching
from xpeer_daemon.conduct import ALONE_TRIES

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
    rig.donors._conduct.alone = slow if alone else None
    rig.live = [slow, GOOD]
    assert await taken_by(rig) == [GOOD]


@pytest.mark.parametrize("others", [[], [BUSY]])
async def test_who_alone_gives_parameters_may_be_slow(
    rig: Rig, monkeypatch: pytest.MonkeyPatch, others: list[PeerId]
) -> None:
    """Others may say that they hold them, and give none."""
    late_s = late(monkeypatch, 5000.0)
    rig.live = [GOOD, *others]

    class Looks(Trainer):
        async def import_state(self, *args: Any) -> float:
            assert GOOD not in rig.donors._offers._failed
            return await super().import_state(*args)

    trainer = Looks()
    await rig.hold(trainer)
    assert trainer.taken == [GOOD]
    assert ([peer for peer, _ in rig.asked].count(GOOD), late_s[0]) == (1, 20_000.0)


async def test_who_gives_too_little_makes_way_for_one_that_had_no_time_before(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While enough donors give, nobody else is asked; so it is asked when too little came."""
    monkeypatch.setattr(donors, "CATCH_UP_S", 0.05)
    monkeypatch.setattr(donors, "PARALLEL", 1)
    trickles(monkeypatch, LIAR)
    real, asked = rig._ask, 0

    async def busy_at_first(party: Any, dialler: Any, donor: PeerId, *more: Any) -> Offer:
        nonlocal asked
        asked += donor == GOOD
        if donor == GOOD and asked == 1:
            raise PeerError(Reason.CLOSED, "it gives to others")
        return await real(party, dialler, donor, *more)

    monkeypatch.setattr(giving, "ask", busy_at_first)
    rig.live = [LIAR, GOOD]
    assert await taken_by(rig) == [GOOD]


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


async def test_who_breaks_off_what_it_has_to_give_alone_is_let_go(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not at once, since lines break; but else it would be chosen again and again."""
    monkeypatch.setattr(turns, "PAUSE_S", 0.0)
    monkeypatch.setattr(fetching, "AGAIN_WITHIN_S", 0.0)
    real, broke = Offer.pieces, 0

    async def breaks(offer: Offer, first: int, count: int) -> Coming:
        nonlocal broke
        if offer.donor == TWIN:
            broke += 1
            raise PeerError(Reason.CLOSED, "its line broke")
        async for each in real(offer, first, count):
            yield each

    monkeypatch.setattr(Offer, "pieces", breaks)
    rig.donors._conduct.alone, rig.live = TWIN, [TWIN, GOOD]

    class Looks(Trainer):
        async def import_state(self, *args: Any) -> float:
            assert (rig.donors._conduct.alone, rig.donors._conduct.blamed) == (None, set())
            assert await rig.donors._more([GOOD]) == []  # its pause is over: it mixes with nobody
            return await super().import_state(*args)

    trainer = Looks()
    async with asyncio.timeout(60):
        await rig.hold(trainer)
    assert (trainer.taken, broke) == ([GOOD], ALONE_TRIES)


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
    assert rig.donors._conduct.blamed == set()


@pytest.mark.parametrize("by_lease", [False, True])
async def test_two_that_claim_the_best_and_give_little_take_turns_once(
    rig: Rig, monkeypatch: pytest.MonkeyPatch, by_lease: bool
) -> None:
    """Nobody is alike to a public loss of 0, so each would give alone, and again in turn."""
    monkeypatch.setattr(turns, "PAUSE_S", 0.0)  # of each the pause is over when the other one ends
    monkeypatch.setattr(backoff, "COST", 0.0)
    monkeypatch.setattr(donors, "STALE_S", 0.0)  # so everybody is asked anew after each
    monkeypatch.setitem(OFFERS, LIAR, (200, 0.0))
    monkeypatch.setitem(OFFERS, TWIN, (300, 0.0))
    began = gives_one_piece(monkeypatch, {LIAR, TWIN})
    if by_lease:
        monkeypatch.setattr(donors, "CATCH_UP_S", 1.0)
    else:
        monkeypatch.setattr(fetching, "SILENT_S", 0.5)
        monkeypatch.setattr(fetching, "MORE_S", 0.005)
        monkeypatch.setattr(fetching, "AGAIN_WITHIN_S", 0.02)
    rig.live = [LIAR, TWIN, GOOD]
    trainer = Wasted(rig)
    async with asyncio.timeout(60):
        await rig.hold(trainer)
    assert trainer.taken == [GOOD]
    assert sorted(began) == sorted([LIAR, TWIN, GOOD])
    for liar in (LIAR, TWIN):
        assert f"{liar} (1 in vain)" in trainer.wasted
    assert rig.life.wasted == ""


class Wasted(Trainer):
    """Keeps what the node's health says when it gets parameters."""

    def __init__(self, rig: Rig) -> None:
        super().__init__()
        self._rig = rig

    async def import_state(self, *args: Any) -> float:
        self.wasted = self._rig.life.wasted
        return await super().import_state(*args)


def gives_one_piece(monkeypatch: pytest.MonkeyPatch, who: set[PeerId]) -> list[PeerId]:
    """They give one piece of each link; returns who was asked for pieces, in that order."""
    real, began = Offer.pieces, list[PeerId]()

    async def one(offer: Offer, first: int, count: int) -> Coming:
        if not began or began[-1] != offer.donor:
            began.append(offer.donor)
        async for each in real(offer, first, count):
            yield each
            if offer.donor in who:
                await asyncio.Event().wait()

    monkeypatch.setattr(Offer, "pieces", one)
    return began


async def test_who_gave_too_little_rests_for_several_times_what_it_cost(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    late(monkeypatch, 5000.0)
    monkeypatch.setattr(donors, "PARALLEL", 1)
    rig.live = [LIAR, GOOD]
    trainer: Any = Trainer()
    assert await rig.donors._take_over_best(trainer, None) is None
    rest_s = rig.donors._offers._failed[LIAR].until_s - asyncio.get_running_loop().time()
    assert rest_s > 3 * donors.CATCH_UP_S


async def test_who_gave_hardly_anything_is_not_spared(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A piece for each pause of 10 s would keep a joiner for ever."""
    tree, broke = Offer(GOOD).tree, PeerError(Reason.TIMEOUT, "it gave no piece in 30 s")
    takeover, size = rig.donors._takeover, rig.donors._takeover._shape.num_bytes
    failures = list[int]()
    for gave in (size // 50, size // 50, size // 50, size // 50):
        takeover._gave[GOOD] += gave
        takeover._lost(tree.donor, broke)
        failures.append(rig.donors._offers._failed[GOOD].failures)
    assert failures == [1, 2, 2, 3]  # three fiftieths are more than a twentieth: it is spared once


async def test_who_has_to_give_all_alone_may_be_busy(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or rest, or need a while for a copy. The liar who spoilt a mixture answers at once."""
    asked, real = list[PeerId](), rig._ask

    async def busy_at_first(party: Any, dialler: Any, donor: PeerId, *more: Any) -> Offer:
        asked.append(donor)
        if asked == [GOOD]:
            raise PeerError(Reason.CLOSED, "it gives to others")
        return await real(party, dialler, donor, *more)

    monkeypatch.setattr(giving, "ask", busy_at_first)
    monkeypatch.setattr(turns, "PAUSE_S", 0.0)
    rig.donors._conduct.alone, rig.live = GOOD, [GOOD, LIAR]
    rig.donors._offers.spare(GOOD, "its line broke")
    assert await taken_by(rig) == [GOOD]
    assert (asked, rig.donors._offers._failed) == ([GOOD, GOOD], {})


@pytest.mark.parametrize(("reason", "rests"), [(Reason.CLOSED, set()), (Reason.TIMEOUT, {TWIN})])
async def test_who_never_has_time_is_let_go_and_who_never_answers_rests(
    rig: Rig, monkeypatch: pytest.MonkeyPatch, reason: str, rests: set[PeerId]
) -> None:
    """Neither gave anything bad, so neither is blamed."""
    real = rig._ask

    async def never(party: Any, dialler: Any, donor: PeerId, *more: Any) -> Offer:
        if donor == TWIN:
            raise PeerError(reason, "not now")
        return await real(party, dialler, donor, *more)

    monkeypatch.setattr(giving, "ask", never)
    monkeypatch.setattr(turns, "PAUSE_S", 0.0)
    rig.donors._conduct.alone, rig.live = TWIN, [TWIN, GOOD]

    class Looks(Trainer):
        async def import_state(self, *args: Any) -> float:
            assert (rig.donors._conduct.alone, rig.donors._conduct.blamed) == (None, set())
            assert rig.donors._offers._failed.keys() == rests
            return await super().import_state(*args)

    trainer = Looks()
    async with asyncio.timeout(60):
        await rig.hold(trainer)
    assert trainer.taken == [GOOD]


async def test_who_was_blamed_gives_before_a_liar_keeps_a_joiner_for_ever(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(donors, "CATCH_UP_S", 0.05)
    trickles(monkeypatch, LIAR)
    rig.donors._conduct.blamed, rig.live = {GOOD}, [LIAR, GOOD]
    assert await taken_by(rig) == [GOOD]


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
