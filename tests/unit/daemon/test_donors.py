"""Whose parameters are taken over: the best that is true, whoever lies, stalls or is lost."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncGenerator
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from tests.unit.daemon import donations
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
from xpeer.errors import PeerError, Reason
from xpeer.identity import PeerId
from xpeer.network import giving, pieces, turns
from xpeer.network.pieces import Tree
from xpeer.wire.messages import PIECE_BYTES, TreeOffer
from xpeer_daemon import donors, offers
from xpeer_daemon.claims import doubtful, ranked


def test_the_best_offer_is_the_lowest_loss_and_of_equal_ones_the_most_steps() -> None:
    offers: Any = [Offer(peer) for peer in (WORSE, OLD, GOOD)]
    assert [offer.donor for offer in ranked(offers)] == [GOOD, OLD, WORSE]


async def test_a_joiner_takes_the_best_and_never_one_that_lies(tmp_path, monkeypatch) -> None:
    rig = Rig(tmp_path, monkeypatch, founds=False)
    rig.live = [WORSE, LIAR, OLD, GOOD]
    trainer = Trainer()
    assert await rig.hold(trainer) is trainer
    assert (trainer.taken, rig.saved) == ([GOOD], 1)
    assert rig.origin.source == "awaited"
    kinds = [event.kind for event in rig.store.events()]
    assert sorted(kinds) == ["donor-refused", "took-over"]


async def test_a_refusal_is_said_once_for_each_donor_and_reason(
    tmp_path, monkeypatch, caplog: pytest.LogCaptureFixture
) -> None:
    rig = Rig(tmp_path, monkeypatch, founds=False)
    rig.live = [BUSY]
    asked = 0

    async def ask(party: Any, dialler: Any, donor: PeerId, *_: Any) -> Offer:
        nonlocal asked
        asked += 1
        if asked < 5:
            raise PeerError(Reason.CLOSED, f"it gives to {asked} others")
        if asked < 7:
            raise PeerError(Reason.NOT_READY, "it has none")
        return Offer(GOOD)

    monkeypatch.setattr(giving, "ask", ask)
    await rig.hold(Trainer())
    refused = [event for event in rig.store.events() if event.kind == "donor-refused"]
    assert (len(refused), caplog.text.count("refused")) == (2, 2)


async def test_parameters_worse_than_the_start_need_a_second_donor(tmp_path, monkeypatch) -> None:
    rig = Rig(tmp_path, monkeypatch, founds=False)
    rig.manifest.start_loss, rig.live = 1.0, [GOOD, WORSE]
    trainer = Trainer()
    holding = asyncio.create_task(rig.hold(trainer))
    async with asyncio.timeout(60):
        while not rig.conditions:
            await asyncio.sleep(0.001)
        assert (trainer.taken, rig.conditions) == ([], {"donor-doubtful"})
        rig.live = [GOOD, OLD]  # whose public losses agree
        await holding
    assert (trainer.taken, rig.conditions) == ([GOOD], set())


async def test_while_offers_are_compared_our_own_loss_is_measured_once(
    tmp_path, monkeypatch
) -> None:
    """Donors close the links of who only waits."""
    rig, measured = Rig(tmp_path, monkeypatch, founds=False), 0

    class Slow(Trainer):
        async def evaluate(self) -> Any:
            nonlocal measured
            measured += 1
            return await super().evaluate()

    rig.live = [GOOD]
    trainer: Any = Slow(own=0.1)
    for _ in range(3):
        assert not await rig.donors._take_over_best(trainer, 20, saved_at=0.0)
    assert measured == 1
    rig.donors.forget()
    await rig.donors._take_over_best(trainer, 20, saved_at=0.0)
    assert measured == 2


async def test_doubt_ends_with_the_donor_that_is_doubted(tmp_path, monkeypatch) -> None:
    rig = Rig(tmp_path, monkeypatch, founds=False)
    rig.manifest.start_loss, rig.live = 1.0, [GOOD]
    await rig.donors._take_over_best(Trainer(), None)  # type: ignore[arg-type] # a fake
    assert rig.conditions == {"donor-doubtful"}
    rig.live = []
    assert not await rig.donors.take_over(Trainer(), 0.0)  # type: ignore[arg-type] # a fake
    assert rig.conditions == set()


@pytest.mark.parametrize(
    ("live", "taken"), [([LIAR, GOOD, TWIN], True), ([LIAR, GOOD, WORSE], False)]
)
async def test_one_member_alone_can_not_keep_two_that_agree_from_giving(
    tmp_path, monkeypatch, live, taken
) -> None:
    """Where all are worse than the start, it claims a little less than they do."""
    claims = {LIAR: 7.0, GOOD: 8.0, TWIN: 8.1, WORSE: 9.0}
    for peer, loss in claims.items():
        monkeypatch.setitem(OFFERS, peer, (100, loss))
        monkeypatch.setitem(TRUE_LOSS, peer, loss)
    rig = Rig(tmp_path, monkeypatch, founds=False)
    rig.live, trainer = live, Trainer()
    await rig.donors._take_over_best(trainer, None)  # type: ignore[arg-type] # a fake
    assert trainer.taken in ([[GOOD], [TWIN]] if taken else [[]])
    assert rig.conditions == (set() if taken else {"donor-doubtful"})


@pytest.mark.parametrize(("alone", "taken"), [(GOOD, [GOOD]), (LIAR, [GOOD]), (TWIN, [TWIN])])
async def test_who_has_to_give_all_alone_is_confirmed_by_others_too(
    tmp_path, monkeypatch, alone, taken
) -> None:
    """It is asked by itself, so its offer is the only one at first."""
    for peer, loss in {LIAR: 9.9, GOOD: 8.0, TWIN: 8.1}.items():
        monkeypatch.setitem(OFFERS, peer, (100, loss))
        monkeypatch.setitem(TRUE_LOSS, peer, loss)
    monkeypatch.setattr(offers, "MORE_OFFERS_S", 0.2)
    monkeypatch.setattr(donors, "PARALLEL", 1)
    monkeypatch.setattr(donors, "ranked", lambda all_: sorted(all_, key=lambda o: o.loss_public))
    rig = Rig(tmp_path, monkeypatch, founds=False)
    rig.live, rig.donors._conduct.alone, trainer = [LIAR, GOOD, TWIN], alone, Trainer()
    async with asyncio.timeout(60):
        await rig.hold(trainer)
    assert trainer.taken == taken


async def test_who_has_to_give_all_alone_does_not_decide_that_nobody_is_ahead(
    tmp_path, monkeypatch
) -> None:
    monkeypatch.setattr(offers, "MORE_OFFERS_S", 0.2)
    rig = Rig(tmp_path, monkeypatch, founds=False)
    rig.live, rig.donors._conduct.alone = [OLD, GOOD, WORSE], OLD
    trainer = Trainer(resumed_step=18)
    await rig.hold(trainer)
    assert trainer.taken == [GOOD]


def test_a_better_claim_confirms_none_that_is_worse_than_the_start() -> None:
    """Else the true loss of an honest donor would be the second word for any other."""
    offers: Any = [SimpleNamespace(donor=GOOD, loss_public=2.0)]
    offers.append(SimpleNamespace(donor=LIAR, loss_public=8.0))
    assert [doubtful(offer, offers, 5.0) for offer in offers] == [False, True]


async def test_who_waits_for_the_operator_asks_seldom(tmp_path, monkeypatch) -> None:
    rig = Rig(tmp_path, monkeypatch, founds=False)
    monkeypatch.setattr(donors, "DOUBT_S", 1e6)
    rig.manifest.start_loss, rig.live = 1.0, [GOOD]
    holding = asyncio.create_task(rig.hold(Trainer()))
    async with asyncio.timeout(60):
        while not rig.conditions:
            await asyncio.sleep(0.001)
    for _ in range(100):  # far more than RETRY_S
        await asyncio.sleep(0.001)
    assert len(rig.asked) == 1
    holding.cancel()


async def test_a_silent_member_keeps_nobody_from_asking_who_comes_later(
    tmp_path, monkeypatch
) -> None:
    rig = Rig(tmp_path, monkeypatch, founds=False)
    monkeypatch.setattr(offers, "MORE_OFFERS_S", 0.001)
    monkeypatch.setattr(offers, "PREPARE_TIMEOUT_S", 0.1)
    ask, silent = rig._ask, asyncio.Event()

    async def stall(party: Any, dialler: Any, donor: PeerId, *rest: Any) -> Offer:
        if donor == LIAR:
            silent.set()
            await asyncio.Event().wait()
        return await ask(party, dialler, donor, *rest)

    monkeypatch.setattr(giving, "ask", stall)
    rig.live = [LIAR]
    trainer = Trainer()
    holding = asyncio.create_task(rig.hold(trainer))
    async with asyncio.timeout(60):
        await silent.wait()
        rig.live = [LIAR, GOOD]
        await holding
    assert trainer.taken == [GOOD]


async def test_after_a_restart_a_donor_is_asked_for_the_rest_of_what_it_gave(
    tmp_path, monkeypatch
) -> None:
    monkeypatch.setattr(donations, "VALUES", PIECE_BYTES // 4 + 16)  # two pieces
    real = Offer.pieces

    async def stalls(offer: Offer, first: int, count: int) -> AsyncGenerator[tuple[int, Any]]:
        async for each in real(offer, 0, 1):
            yield each
        await asyncio.Event().wait()

    def unverified(data: bytes, *_: object) -> Tree:  # nobody signs here
        return Tree(*msgspec.msgpack.decode(data, type=tuple[PeerId, TreeOffer, bytes]))

    monkeypatch.setattr(pieces, "from_bytes", unverified)
    monkeypatch.setattr(Offer, "pieces", stalls)
    rig = Rig(tmp_path, monkeypatch, founds=False)
    rig.live = [GOOD]
    holding = asyncio.create_task(rig.hold(Trainer()))
    async with asyncio.timeout(60):
        while not rig.donors._takeover.trees():
            await asyncio.sleep(0.001)
    holding.cancel()
    await asyncio.gather(holding, return_exceptions=True)
    monkeypatch.setattr(Offer, "pieces", real)

    again = Rig(tmp_path, monkeypatch, founds=False)
    again.live = [GOOD]
    trainer = Trainer()
    await again.hold(trainer)
    assert again.asked == [(GOOD, Offer(GOOD).tree.root)]
    assert trainer.taken == [GOOD]


@pytest.mark.parametrize(("here", "first"), [(0.5, OLD), (0.4, GOOD)])
async def test_an_older_snapshot_is_worth_its_rest_if_half_of_it_is_here(
    tmp_path, monkeypatch, here, first
) -> None:
    rig = Rig(tmp_path, monkeypatch, founds=False)
    tree = Offer(OLD).tree
    held: Any = SimpleNamespace(
        trees=lambda: [tree], bytes_of=lambda _: here * 4 * donations.VALUES
    )
    rig.donors._takeover = held
    best_first: Any = [Offer(GOOD), Offer(OLD), Offer(WORSE)]
    assert rig.donors._chosen(best_first)[0].donor == first


@pytest.mark.parametrize(("accept", "taken"), [(GOOD, True), ("hall-a", False), (LIAR, False)])
async def test_the_operator_may_accept_them_of_one_donor(
    tmp_path, monkeypatch, accept, taken
) -> None:
    """By its PeerID: while it is away, others may take its name. Theirs are doubted as before."""
    rig = Rig(tmp_path, monkeypatch, founds=False)
    rig.donors._view.name_of = {GOOD: "hall-a"}.get  # type: ignore[assignment] # a fake
    rig.manifest.start_loss, rig.live, rig.donors._judge.accept = 1.0, [GOOD], accept
    trainer: Any = Trainer()
    assert bool(await rig.donors._take_over_best(trainer, None)) is taken
    assert trainer.taken == ([GOOD] if taken else [])
    assert rig.conditions == (set() if taken else {"donor-doubtful"})


async def test_a_liar_is_avoided_for_several_times_what_it_cost(tmp_path, monkeypatch) -> None:
    """Else a low loss, once claimed, would cost a joiner one transfer after another."""
    rig = Rig(tmp_path, monkeypatch, founds=False)
    loop, late_s = asyncio.get_running_loop(), 0.0
    real, time = Offer.pieces, loop.time

    async def slow(offer: Offer, first: int, count: int) -> AsyncGenerator[tuple[int, Any]]:
        nonlocal late_s
        late_s += 500.0
        async for each in real(offer, first, count):
            yield each

    monkeypatch.setattr(Offer, "pieces", slow)
    monkeypatch.setattr(loop, "time", lambda: time() + late_s)
    rig.live = [LIAR, GOOD]
    await rig.hold(Trainer())
    backoff = rig.donors._offers._failed[LIAR]
    assert backoff.until_s - loop.time() > 1000.0


@pytest.mark.parametrize("order", [1, -1])
async def test_what_several_gave_and_measures_badly_comes_from_one_of_them(
    tmp_path, monkeypatch, order
) -> None:
    """Nobody is blamed for a mixture. Who gave all of it, is."""
    monkeypatch.setattr(donations, "VALUES", PIECE_BYTES // 4 + 16)  # two pieces
    monkeypatch.setitem(OFFERS, TWIN, OFFERS[GOOD])
    monkeypatch.setitem(TRUE_LOSS, TWIN, 9.0)
    monkeypatch.setattr(
        donors, "ranked", lambda offers: sorted(offers, key=lambda o: order * (o.donor == TWIN))
    )
    alone = GOOD if order == 1 else TWIN
    monkeypatch.setattr(random, "choice", lambda donors: alone if alone in donors else donors[0])
    rig = Rig(tmp_path, monkeypatch, founds=False)
    rig.live = [GOOD, TWIN]
    trainer = Trainer()
    async with asyncio.timeout(60):
        await rig.hold(trainer)
    assert trainer.taken == [GOOD]
    refused = [event for event in rig.store.events() if event.kind == "donor-refused"]
    assert [event.detail.startswith(TWIN) for event in refused] == [True] * len(refused)
    assert len(refused) == (0 if order == 1 else 1)
    assert not (tmp_path / "joining").exists()


async def test_who_has_to_give_all_is_joined_by_nobody(tmp_path, monkeypatch) -> None:
    rig = Rig(tmp_path, monkeypatch, founds=False)
    rig.live = [GOOD, TWIN]
    monkeypatch.setitem(OFFERS, TWIN, OFFERS[GOOD])
    assert [offer.donor for offer in await rig.donors._more([TWIN])] == [GOOD]
    rig.donors._conduct.alone, rig.asked = TWIN, []
    assert (await rig.donors._more([TWIN]), rig.asked) == ([], [])


@pytest.mark.parametrize(
    ("phase", "end", "others", "heard", "taken_at"),
    [
        ("training", 300, [GOOD, WORSE], {}, 105),  # a window beyond what another says
        ("finished", 300, [GOOD, WORSE], {}, 105),
        ("training", 300, [], {}, 299),  # nobody else can say: not the last, at least
        ("training", None, [], {}, 1 << 39),
        ("training", None, [OLD], {OLD: 40}, 45),
        ("training", 300, [BUSY], {BUSY: 0}, 299),  # said before it took them over
        ("training", 300, [BUSY], {BUSY: 90}, 95),
        ("finished", 300, [GOOD], {GOOD: 300}, 300),
    ],
)
async def test_a_step_counts_no_further_than_somebody_else_vouches_for(
    tmp_path, monkeypatch, phase, end, others, heard, taken_at
) -> None:
    rig = Rig(tmp_path, monkeypatch, founds=False)
    rig.manifest.end.steps = end
    monkeypatch.setitem(OFFERS, LIAR, (end or 1 << 39, 1.7))
    monkeypatch.setitem(TRUE_LOSS, LIAR, 1.7)
    rig.live, rig.phase, rig.heard = [LIAR, *others], phase, heard
    trainer = Trainer()
    await rig.hold(trainer)
    assert (trainer.taken, trainer.step) == ([LIAR], taken_at)


async def test_a_donor_that_stalls_holds_up_nobody_who_has_a_checkpoint(
    tmp_path, monkeypatch
) -> None:
    async def stalls(offer: Offer, first: int, _: int) -> AsyncGenerator[tuple[int, memoryview]]:
        if offer.donor == LIAR:
            await asyncio.Event().wait()
        yield first, offer.payload

    monkeypatch.setattr(Offer, "pieces", stalls)
    monkeypatch.setattr(donors, "CATCH_UP_S", 2.0)
    rig = Rig(tmp_path, monkeypatch, founds=False)
    rig.live = [LIAR, GOOD, WORSE]
    monkeypatch.setattr(turns, "PAUSE_S", 0.0)
    trainer = Trainer(resumed_step=20)
    await rig.hold(trainer)
    assert (trainer.taken, rig.life.catching_up) == ([GOOD], False)
    assert rig.donors._offers.willing() == [GOOD, WORSE]  # nobody asks it again for a while
    trainer = Trainer()
    await rig.hold(trainer)
    assert trainer.taken == [GOOD]
