"""Who answers first decides nothing: others need time for a copy, have no place, or are lost."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from tests.unit.daemon.donations import GOOD, LIAR, WORSE, Offer, Rig, Trainer
from xpeer.identity import PeerId
from xpeer.network import giving, turns
from xpeer_daemon import offers

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
