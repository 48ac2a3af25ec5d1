"""Who answers first decides nothing: others need time for a copy, have no place, or are lost."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import pytest

from tests.unit.daemon.donations import (
    BUSY,
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
from tests.unit.daemon.test_donors_that_hold_up import gives_one_piece, trickles
from tests.unit.daemon.test_hostile_offers import pieces_of
from xpeer.errors import PeerError, Reason
from xpeer.gossip import backoff
from xpeer.identity import PeerId
from xpeer.network import giving, turns
from xpeer_daemon import donors, fetching, offers

MORE_S = 0.02


@pytest.fixture
def rig(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Rig:
    monkeypatch.setattr(offers, "MORE_OFFERS_S", MORE_S)
    monkeypatch.setattr(turns, "PAUSE_S", 0.001)
    return Rig(tmp_path, monkeypatch, founds=False)


def answers_after(
    monkeypatch: pytest.MonkeyPatch, rig: Rig, after_s: dict[PeerId, float | None]
) -> None:
    """These members need so long for a copy; None = for ever."""

    async def slow(party: Any, dialler: Any, donor: PeerId, *more: Any) -> Offer:
        seconds = after_s.get(donor, 0.0)
        if seconds is None:
            await asyncio.Event().wait()
        await asyncio.sleep(seconds or 0.0)
        return await rig._ask(party, dialler, donor, *more)

    monkeypatch.setattr(giving, "ask", slow)


async def taken_by(rig: Rig, resumed_step: int | None = None) -> list[PeerId]:
    trainer = Trainer(resumed_step)
    async with asyncio.timeout(60):
        await rig.hold(trainer)
    return trainer.taken


async def test_a_joiner_waits_for_the_copy_of_who_answers_late(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers_after(monkeypatch, rig, {GOOD: 3 * MORE_S})
    rig.live = [WORSE, GOOD]
    assert await taken_by(rig) == [GOOD]


async def test_a_silent_member_is_waited_for_once(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(offers, "PREPARE_TIMEOUT_S", 0.3)
    answers_after(monkeypatch, rig, {LIAR: None})
    rig.live = [LIAR, GOOD]
    clock, waited_s = asyncio.get_running_loop().time, list[float]()
    for _ in range(2):
        began = clock()
        (offer,) = await rig.donors._offers.ask_all()
        waited_s.append(clock() - began)
        assert offer.donor == GOOD
    assert waited_s[0] > 0.3 > waited_s[1]


async def test_further_donors_are_taken_as_they_come(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A transfer is under way, and their parameters have to fit to it."""
    answers_after(monkeypatch, rig, {LIAR: None})
    rig.live = [LIAR, GOOD]
    async with asyncio.timeout(60):
        assert [offer.donor for offer in await rig.donors._more([])] == [GOOD]


async def test_a_donor_without_a_free_place_is_asked_again_by_who_is_far_behind(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = busy_at_first(monkeypatch, rig)
    rig.live, rig.heard = [BUSY], {BUSY: 100}
    assert await taken_by(rig, 20) == [BUSY]
    assert (len(asked), rig.conditions) == (2, set())


@pytest.mark.parametrize(("heard", "again"), [(None, True), (30, False), (100, True)])
async def test_who_is_not_ahead_does_not_decide_for_who_is_busy(
    rig: Rig, monkeypatch: pytest.MonkeyPatch, heard: int | None, again: bool
) -> None:
    """Unless the busy one has told of a step that is not far ahead."""
    asked = busy_at_first(monkeypatch, rig)
    rig.live, rig.heard = [OLD, BUSY], {BUSY: heard}
    await taken_by(rig, 20)
    assert (len(asked) > 1) is again


async def test_who_is_not_ahead_does_not_decide_for_who_makes_a_copy(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers_after(monkeypatch, rig, {GOOD: 3 * MORE_S, WORSE: 3 * MORE_S})
    rig.live = [OLD, GOOD, WORSE]
    assert await taken_by(rig, 20) == [GOOD]


@pytest.mark.parametrize("reason", [Reason.CLOSED, Reason.SIDECAR_DOWN, Reason.NOT_A_MEMBER])
@pytest.mark.parametrize("heard", [100, None])
@pytest.mark.parametrize("resumed_step", [20, 90])
async def test_who_goes_on_without_an_answer_says_so(
    rig: Rig, monkeypatch: pytest.MonkeyPatch, resumed_step: int, heard: int | None, reason: str
) -> None:
    """None of these reasons says what parameters that member has."""

    async def fails(*_: Any) -> Offer:
        raise PeerError(reason, "not now")

    monkeypatch.setattr(giving, "ask", fails)
    monkeypatch.setattr(donors, "CATCH_UP_S", 0.05)
    rig.live, rig.heard = [BUSY], {BUSY: heard}
    assert await taken_by(rig, resumed_step) == []
    behind = resumed_step == 20 or heard is None
    assert rig.conditions == ({"not-caught-up"} if behind else set())
    events = [event.detail for event in rig.store.events() if event.kind == "not-caught-up"]
    assert events == ([f"step {resumed_step}; perhaps ahead: {BUSY}"] if behind else [])
    assert not rig.life.catching_up


async def test_a_member_that_can_not_be_dialled_holds_up_nobody(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who never told its step may be out of our reach for good."""

    async def unreachable(*_: Any) -> Offer:
        raise PeerError(Reason.UNREACHABLE, "no route")

    monkeypatch.setattr(giving, "ask", unreachable)
    rig.live = [GOOD]
    assert await taken_by(rig, 20) == []
    assert rig.conditions == set()


async def test_a_liar_does_not_use_up_the_time_of_who_is_far_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It gives just enough to go on until the time is over."""
    pieces_of(monkeypatch, 4)
    trickles(monkeypatch, LIAR)
    monkeypatch.setattr(turns, "PAUSE_S", 0.0)
    monkeypatch.setattr(donors, "CATCH_UP_S", 0.5)
    rig = Rig(tmp_path, monkeypatch, founds=False)
    rig.live = [LIAR, GOOD, WORSE]
    assert await taken_by(rig, 20) == [GOOD]
    assert rig.conditions == set()


async def test_who_has_to_give_all_alone_and_is_silent_does_not_use_up_the_time(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was drawn after a bad mixture, and answers a little too late, or never, each time."""
    monkeypatch.setattr(offers, "PREPARE_TIMEOUT_S", 0.3)
    monkeypatch.setattr(donors, "PREPARE_TIMEOUT_S", 0.3)
    monkeypatch.setattr(donors, "DIAL_TIMEOUT_S", 0.0)
    monkeypatch.setattr(donors, "CATCH_UP_S", 0.85)
    alone, real = list[PeerId](), rig._ask

    async def busy_late(party: Any, dialler: Any, donor: PeerId, *more: Any) -> Offer:
        if donor == LIAR:
            alone.append(donor)
            await asyncio.sleep(0.29)
            raise PeerError(Reason.CLOSED, "it gives to others")
        return await real(party, dialler, donor, *more)

    monkeypatch.setattr(giving, "ask", busy_late)
    rig.donors._conduct.alone, rig.live = LIAR, [LIAR, GOOD]
    assert await taken_by(rig, 20) == [GOOD]


@pytest.mark.parametrize("liars", [1, 2, 3])
async def test_no_liars_use_up_the_time_of_who_is_far_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, liars: int
) -> None:
    """None is alike to the others, and each gives just enough to go on until the time is over."""
    claims = dict(zip((LIAR, BUSY, TWIN), (0.0, 0.1, 0.4), strict=True))
    who = list(claims)[:liars]
    for liar in who:
        monkeypatch.setitem(OFFERS, liar, (101, claims[liar]))
    pieces_of(monkeypatch, 4)
    began = gives_one_piece(monkeypatch, set(who))
    monkeypatch.setattr(fetching, "SILENT_S", 1e6)
    monkeypatch.setattr(turns, "PAUSE_S", 0.0)
    monkeypatch.setattr(donors, "CATCH_UP_S", 0.5)
    rig = Rig(tmp_path, monkeypatch, founds=False)
    rig.busy = set()
    rig.live = [*who, GOOD]
    assert await taken_by(rig, 20) == [GOOD]
    assert sorted(began) == sorted([*who, GOOD])


@pytest.mark.parametrize("again", [False, True])
async def test_who_begins_when_the_time_is_nearly_over_is_not_blamed_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, again: bool
) -> None:
    """A liar was chosen before, and took most of it. Who offers at the last moment each time is not
    waited for a third time.
    """
    monkeypatch.setitem(OFFERS, LIAR, (101, 0.1))
    pieces_of(monkeypatch, 4)
    monkeypatch.setattr(fetching, "SILENT_S", 1e6)
    monkeypatch.setattr(turns, "PAUSE_S", 0.0)
    rig = Rig(tmp_path, monkeypatch, founds=False)
    rig.live = [LIAR, GOOD]
    loop, real, late_s, began = asyncio.get_running_loop(), Offer.pieces, [0.0], list[PeerId]()
    time = loop.time
    monkeypatch.setattr(loop, "time", lambda: time() + late_s[0])

    async def wait(seconds: float) -> None:
        for _ in range(10):  # whatever is due meanwhile happens
            late_s[0] += seconds / 10
            await asyncio.sleep(0)
            await asyncio.sleep(0)

    async def given(offer: Offer, first: int, count: int) -> AsyncGenerator[tuple[int, memoryview]]:
        if offer.donor == LIAR:
            await wait(880.0)
            raise PeerError(Reason.TAMPERED, "it lied")
        if again and began.count(GOOD) == 2:  # it offers late again
            await wait(2000.0)
        await wait(60.0)
        async for each in real(offer, first, count):
            yield each

    begins = rig.donors._conduct.begins

    def begin(first: PeerId) -> None:
        began.append(first)
        begins(first)

    monkeypatch.setattr(Offer, "pieces", given)
    monkeypatch.setattr(rig.donors._conduct, "begins", begin)
    trainer = Trainer(20)
    await rig.hold(trainer)
    assert began == [LIAR, GOOD, GOOD]
    assert trainer.taken == ([] if again else [GOOD])
    assert rig.conditions == ({"not-caught-up"} if again else set())


async def test_time_is_prolonged_for_nobody_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All lie: the node goes on with its own parameters once it has tried each of them."""
    for liar, loss in ((LIAR, 0.0), (TWIN, 0.1)):
        monkeypatch.setitem(OFFERS, liar, (101, loss))
    pieces_of(monkeypatch, 4)
    began = gives_one_piece(monkeypatch, {LIAR, TWIN})
    monkeypatch.setattr(fetching, "SILENT_S", 1e6)
    monkeypatch.setattr(turns, "PAUSE_S", 0.0)
    monkeypatch.setattr(backoff, "COST", 0.0)
    monkeypatch.setattr(donors, "CATCH_UP_S", 0.2)
    rig = Rig(tmp_path, monkeypatch, founds=False)
    rig.live = [LIAR, TWIN]
    assert await taken_by(rig, 20) == []
    assert sorted(began) == sorted([LIAR, TWIN])
    assert rig.conditions == {"not-caught-up"}


async def test_who_offered_counts_even_if_the_time_is_over_while_others_are_asked(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A liar gives until shortly before the end, and another member is silent."""
    monkeypatch.setattr(donors, "CATCH_UP_S", 0.5)
    monkeypatch.setattr(offers, "MORE_OFFERS_S", 0.001)
    monkeypatch.setattr(rig.donors._offers, "_silent", {BUSY})
    real, asked, gave_up = rig._ask, list[PeerId](), asyncio.Event()

    async def ask(party: Any, dialler: Any, donor: PeerId, *more: Any) -> Offer:
        asked.append(donor)
        if asked.count(donor) == 2 and not gave_up.is_set():
            await gave_up.wait()
        return await real(party, dialler, donor, *more)

    async def breaks(offer: Offer, first: int, count: int) -> AsyncGenerator[tuple[int, Any]]:
        if offer.donor == LIAR:
            asyncio.get_running_loop().call_later(1.0, gave_up.set)
            raise PeerError(Reason.MALFORMED, "it stops")
        async for each in pieces(offer, first, count):
            yield each

    pieces = Offer.pieces
    monkeypatch.setattr(donors, "STALE_S", 0.0)
    monkeypatch.setattr(giving, "ask", ask)
    monkeypatch.setattr(Offer, "pieces", breaks)
    rig.live = [LIAR, GOOD]
    assert await taken_by(rig, 20) == [GOOD]


def busy_at_first(monkeypatch: pytest.MonkeyPatch, rig: Rig) -> list[PeerId]:
    """BUSY gives what GOOD gives once it is asked again; returns how often it was asked."""
    monkeypatch.setitem(OFFERS, BUSY, OFFERS[GOOD])
    monkeypatch.setitem(TRUE_LOSS, BUSY, TRUE_LOSS[GOOD])
    asked = list[PeerId]()

    async def busy(party: Any, dialler: Any, donor: PeerId, *more: Any) -> Offer:
        if donor != BUSY:
            return await rig._ask(party, dialler, donor, *more)
        asked.append(donor)
        if len(asked) == 1:
            raise PeerError(Reason.CLOSED, "its places are taken")
        return Offer(donor)

    monkeypatch.setattr(giving, "ask", busy)
    return asked
