"""Donors that would keep a joiner from ever beginning, and offers that nobody takes."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import random
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from tests.unit.daemon import donations as rig_module
from tests.unit.daemon.donations import (
    GOOD,
    LIAR,
    OFFERS,
    TRUE_LOSS,
    TWIN,
    WORSE,
    Offer,
    Rig,
    Trainer,
)
from xpeer.errors import LocalError, PeerError, Reason
from xpeer.identity import PeerId
from xpeer.network import giving, turns
from xpeer.wire.messages import PIECE_BYTES
from xpeer_daemon import donors, fetching, offers
from xpeer_daemon.gathered import Gathered

Coming = AsyncGenerator[tuple[int, memoryview]]


def pieces_of(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    monkeypatch.setattr(rig_module, "VALUES", (count - 1) * PIECE_BYTES // 4 + 16)


async def test_pieces_of_a_donor_that_is_gone_do_not_spoil_every_mixture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It gave most of them, all bad, and left: nobody can give the rest of what it began."""
    monkeypatch.setattr(random, "choice", lambda found: TWIN if TWIN in found else found[0])
    pieces_of(monkeypatch, 3)
    monkeypatch.setitem(OFFERS, TWIN, OFFERS[GOOD])
    monkeypatch.setitem(TRUE_LOSS, TWIN, 9.0)
    monkeypatch.setattr(donors, "ranked", lambda all_: sorted(all_, key=lambda o: o.donor == GOOD))
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
    rig = Rig(tmp_path, monkeypatch, founds=False)
    rig.live = [TWIN, GOOD]

    class TwinLeaves(Trainer):
        async def import_state(self, *args: Any) -> float:
            rig.live = [GOOD]
            return await super().import_state(*args)

    trainer = TwinLeaves()
    async with asyncio.timeout(60):
        await rig.hold(trainer)
    assert trainer.taken == [GOOD]


async def test_while_nobody_offers_anything_what_one_alone_gave_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Our own line may be down."""
    rig = Rig(tmp_path, monkeypatch, founds=False)
    rig.donors._conduct.alone = TWIN
    assert not await rig.donors._take_over_best(Trainer(), None)  # type: ignore[arg-type] # a fake
    assert rig.donors._conduct.alone == TWIN


async def test_a_donor_that_mixes_its_own_snapshots_is_blamed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pieces_of(monkeypatch, 2)
    monkeypatch.setitem(OFFERS, TWIN, OFFERS[GOOD])
    monkeypatch.setitem(TRUE_LOSS, TWIN, 9.0)
    monkeypatch.setattr(fetching, "PAUSE_S", 0.0)
    real, asked = Offer.pieces, 0

    async def ask(*_: Any) -> Offer:
        nonlocal asked
        asked += 1
        offer = Offer(TWIN)
        signed = msgspec.structs.replace(offer.tree.offer, signature=bytes([asked] * 64))
        offer.tree = dataclasses.replace(offer.tree, offer=signed)
        return offer

    async def breaks(offer: Offer, first: int, count: int) -> Coming:
        if first and offer.tree.name[0] == 1:
            raise PeerError(Reason.CLOSED, "it goes")
        async for each in real(offer, first, count):
            yield each

    rig = Rig(tmp_path, monkeypatch, founds=False)
    monkeypatch.setattr(giving, "ask", ask)
    monkeypatch.setattr(Offer, "pieces", breaks)
    rig.live = [TWIN]
    async with asyncio.timeout(60):
        assert not await rig.donors._take_over_best(Trainer(), None)  # type: ignore[arg-type]
    assert (asked, rig.donors._offers.willing(), rig.donors._takeover.trees()) == (2, [], [])


async def test_a_silent_member_keeps_nobody_from_asking_again_who_had_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig = Rig(tmp_path, monkeypatch, founds=False)
    monkeypatch.setattr(offers, "ASK_AGAIN_S", 0.0)
    monkeypatch.setattr(offers, "MORE_OFFERS_S", 0.001)
    monkeypatch.setattr(offers, "PREPARE_TIMEOUT_S", 0.1)
    asked = 0

    async def ask(_party: Any, _dialler: Any, donor: PeerId, *_: Any) -> Offer:
        nonlocal asked
        if donor == LIAR:
            await asyncio.Event().wait()
        asked += 1
        if asked == 1:
            raise PeerError(Reason.CLOSED, "its places are taken")
        return Offer(donor)

    monkeypatch.setattr(giving, "ask", ask)
    rig.live = [LIAR, GOOD]
    trainer = Trainer()
    async with asyncio.timeout(60):
        await rig.hold(trainer)
    assert (trainer.taken, asked) == ([GOOD], 2)


async def test_a_line_that_breaks_is_no_reason_to_wait_longer_each_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pieces_of(monkeypatch, 8)
    monkeypatch.setattr(turns, "PAUSE_S", 0.0)
    monkeypatch.setattr(fetching, "AGAIN_WITHIN_S", 0.0)
    real = Offer.pieces

    async def breaks(offer: Offer, first: int, count: int) -> Coming:
        async for each in real(offer, first, 1):
            yield each
        raise PeerError(Reason.TRUNCATED, "the line broke")

    monkeypatch.setattr(Offer, "pieces", breaks)
    rig = Rig(tmp_path, monkeypatch, founds=False)
    rig.live = [GOOD]
    failures = list[int]()

    class Looks(Trainer):
        async def import_state(self, *args: Any) -> float:
            failures.append(rig.donors._offers._failed[GOOD].failures)
            return await super().import_state(*args)

    trainer = Looks()
    async with asyncio.timeout(60):
        await rig.hold(trainer)
    assert (trainer.taken, failures) == ([GOOD], [0])


@pytest.mark.parametrize("how", ["gives nothing", "gives a piece", "gives alone"])
async def test_a_false_claim_throws_nothing_away_that_others_gave(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    """GOOD was lost after 8 of 10 pieces, and a liar claims the best parameters meanwhile."""
    pieces_of(monkeypatch, 10)
    monkeypatch.setattr(turns, "PAUSE_S", 0.0)
    monkeypatch.setattr(fetching, "AGAIN_WITHIN_S", 0.0)
    rig = Rig(tmp_path, monkeypatch, founds=False)
    real, given = Offer.pieces, list[int]()

    async def breaks(offer: Offer, first: int, count: int) -> Coming:
        if offer.donor == LIAR:
            async for each in real(offer, first, 1 if how == "gives a piece" else 0):
                yield each
            rig.live = [GOOD]
            raise PeerError(Reason.TIMEOUT, "it gives nothing more")
        async for each in real(offer, first, count):
            given.append(each[0])
            yield each
            if len(given) == 8:
                rig.live = [LIAR]
                raise PeerError(Reason.TRUNCATED, "its line broke")

    monkeypatch.setattr(Offer, "pieces", breaks)
    rig.live, trainer = [GOOD], Trainer()
    rig.donors._conduct.shy = {LIAR} if how == "gives alone" else set()
    async with asyncio.timeout(60):
        await rig.hold(trainer)
    assert (trainer.taken, len(given)) == ([GOOD], 10)


async def test_offers_are_declined_if_there_is_no_room_for_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig = Rig(tmp_path, monkeypatch, founds=False)
    made = list[Offer]()

    async def ask(_party: Any, _dialler: Any, donor: PeerId, *_: Any) -> Offer:
        made.append(Offer(donor))
        return made[-1]

    def full(*_: Any) -> Gathered:
        raise LocalError("the disk is full")

    monkeypatch.setattr(giving, "ask", ask)
    monkeypatch.setattr(Gathered, "open", full)
    rig.live = [GOOD, WORSE]
    with pytest.raises(LocalError):
        await rig.hold(Trainer())
    assert [offer.refused for offer in made] == [True, True]


async def test_offers_are_declined_at_a_stop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig = Rig(tmp_path, monkeypatch, founds=False)
    made, began = dict[PeerId, Offer](), asyncio.Event()

    async def ask(_party: Any, _dialler: Any, donor: PeerId, *_: Any) -> Offer:
        made[donor] = Offer(donor)
        return made[donor]

    async def stalls(_: Offer, first: int, count: int) -> Coming:
        began.set()
        await asyncio.Event().wait()
        yield first, memoryview(b"")

    monkeypatch.setattr(giving, "ask", ask)
    monkeypatch.setattr(Offer, "pieces", stalls)
    rig.live = [GOOD, WORSE]
    holding = asyncio.create_task(rig.hold(Trainer()))
    async with asyncio.timeout(60):
        await began.wait()
    assert not made[WORSE].refused  # it is the next one to try
    holding.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await holding
    assert made[WORSE].refused


async def test_a_founder_that_begins_removes_what_it_had_begun_to_fetch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig = Rig(tmp_path, monkeypatch, founds=True)
    (tmp_path / "joining").mkdir()
    (tmp_path / "joining" / "parameters").write_bytes(b"half a model")
    await rig.hold(Trainer())
    assert not (tmp_path / "joining").exists()
