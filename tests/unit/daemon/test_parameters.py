"""Where parameters come from: when the initial model is taken, and when a checkpoint is too old."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
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
from xpeer.accounts.ledger import Ledger
from xpeer.config import Home
from xpeer.errors import LocalError
from xpeer.identity import PeerId
from xpeer.network import turns
from xpeer_daemon import donors


async def test_a_founder_that_begins_has_the_initial_model_at_once(tmp_path, monkeypatch) -> None:
    rig = Rig(tmp_path, monkeypatch, founds=True)
    assert str(rig.origin.source) == "initial"
    await rig.hold(Trainer())
    assert rig.states == []
    assert str(rig.origin.source) == "awaited"  # from now on others may hold what it gave them


@pytest.mark.parametrize("what", ["a member is known", "the ledger was charged"])
async def test_a_founder_that_lost_its_state_takes_it_from_a_member(
    tmp_path, monkeypatch, what
) -> None:
    rig = Rig(tmp_path, monkeypatch, founds=True)
    if what == "a member is known":
        rig.store.remember_peer(GOOD, [])
    else:
        monkeypatch.setattr(Ledger, "counter", 5)
        Ledger.open(Home(tmp_path).ledger_db).close()
    rig = Rig(tmp_path, monkeypatch, founds=True)  # it starts again
    assert rig.origin.source == "awaited"
    rig.live = [GOOD]
    trainer = Trainer()
    await rig.hold(trainer)
    assert (trainer.taken, trainer.step) == ([GOOD], 100)


async def test_a_founder_whom_nobody_can_help_begins_anew_after_its_patience(
    tmp_path, monkeypatch
) -> None:
    rig = Rig(tmp_path, monkeypatch, founds=True)
    rig.store.remember_peer(GOOD, [])
    rig = Rig(tmp_path, monkeypatch, founds=True)
    rig.live, rig.phase = [GOOD], "fetching"  # it has nothing either
    trainer = Trainer()
    assert await rig.hold(trainer) is rig.next_trainer
    assert (trainer.stopped, trainer.taken) == (True, [])
    assert "--from-initial" in rig.life.note
    assert [event.kind for event in rig.store.events()] == ["began-anew"]


async def test_a_founder_whose_donor_is_gone_for_a_moment_keeps_what_came(
    tmp_path, monkeypatch
) -> None:
    """Its patience is for a swarm without holders, not for how long a transfer takes."""
    rig = Rig(tmp_path, monkeypatch, founds=True)
    rig.store.remember_peer(GOOD, [])
    rig = Rig(tmp_path, monkeypatch, founds=True)
    monkeypatch.setattr(donors, "PATIENCE_S", 300.0)
    rig.live, loop = [GOOD], asyncio.get_running_loop()
    real, time = rig.donors._take_over_best, loop.time
    forgot, looks, late_s = list[str](), 0, 0.0
    monkeypatch.setattr(loop, "time", lambda: time() + late_s)

    async def breaks(*given: Any, **named: Any) -> bool | None:
        nonlocal looks, late_s
        looks += 1
        if looks == 1:  # after an hour its line goes down, and some comes back a minute later
            late_s, rig.live = 3600.0, []
            return False
        rig.live = [GOOD]
        return await real(*given, **named)

    monkeypatch.setattr(rig.donors, "_take_over_best", breaks)
    monkeypatch.setattr(rig.donors._takeover, "forget", lambda: forgot.append("all"))
    trainer = Trainer()
    await rig.hold(trainer)
    assert trainer.taken == [GOOD]
    assert looks == 2
    assert forgot == ["all"], "once it was taken over"


@pytest.mark.parametrize("renewed", [False, True])
async def test_a_founder_that_began_anew_catches_up_when_others_come(
    tmp_path, monkeypatch, renewed
) -> None:
    """It exchanges nothing before; whoever comes alone may be as far as it says."""
    rig = Rig(tmp_path, monkeypatch, founds=True)
    rig.store.remember_peer(GOOD, [])
    rig = Rig(tmp_path, monkeypatch, founds=True)
    rig.saved_at = None
    if renewed:
        assert not await rig.parameters.hold_again(Trainer())  # type: ignore[arg-type] # a fake
        assert await rig.parameters.hold_again(rig.next_trainer)  # type: ignore[arg-type]
    else:
        await rig.hold(Trainer())
    assert rig.life.catching_up
    await catches_up_later(rig, rig.next_trainer)
    assert rig.next_trainer.taken == [GOOD]


async def test_a_founder_that_begins_the_swarm_asks_nobody(tmp_path, monkeypatch) -> None:
    rig = Rig(tmp_path, monkeypatch, founds=True)
    await rig.hold(Trainer())
    assert not rig.life.catching_up


async def test_a_trainer_that_is_started_again_ends_what_the_last_one_began_to_fetch(
    tmp_path, monkeypatch
) -> None:
    """Else two would fetch at once; and a trainer without parameters does not catch up."""
    rig = Rig(tmp_path, monkeypatch, founds=False)
    await rig.hold(first := Trainer(resumed_step=10))
    fetching, stopped = asyncio.Event(), asyncio.Event()
    real = Offer.pieces

    async def stalls(
        offer: Offer, first: int, count: int
    ) -> AsyncGenerator[tuple[int, memoryview]]:
        if not stopped.is_set():
            fetching.set()
            try:
                await asyncio.Event().wait()
            finally:
                stopped.set()
        async for each in real(offer, first, count):
            yield each

    monkeypatch.setattr(Offer, "pieces", stalls)
    rig.supervisor.trainer, rig.live = first, [GOOD]
    looking = asyncio.create_task(rig.parameters.catch_up_later())
    async with asyncio.timeout(60):
        await fetching.wait()
        rig.supervisor.trainer = second = Trainer()
        assert await rig.parameters.hold_again(second)  # type: ignore[arg-type] # a fake
    assert (first.taken, second.taken, stopped.is_set()) == ([], [GOOD], True)
    assert not looking.done()
    assert not rig.life.catching_up
    looking.cancel()


async def test_a_trainer_that_died_before_its_first_checkpoint_brings_no_initial_model(
    tmp_path, monkeypatch
) -> None:
    rig = Rig(tmp_path, monkeypatch, founds=True)
    await rig.hold(Trainer())
    rig.live = [GOOD]
    again = Trainer()
    assert await rig.parameters.hold_again(again)  # type: ignore[arg-type] # a fake
    assert again.taken == [GOOD]
    rig.live = []
    assert not await rig.parameters.hold_again(Trainer())  # type: ignore[arg-type] # a fake
    assert (rig.renewed, rig.origin.source) == (1, "initial")
    assert await rig.parameters.hold_again(Trainer())  # type: ignore[arg-type] # a fake
    assert rig.origin.source == "awaited"


@pytest.mark.parametrize(
    ("own_step", "taken"), [(0, [GOOD]), (46, [GOOD]), (79, [GOOD]), (80, []), (100, []), (200, [])]
)
async def test_a_checkpoint_far_behind_is_replaced_before_anything_is_exchanged(
    tmp_path, monkeypatch, own_step, taken
) -> None:
    rig = Rig(tmp_path, monkeypatch, founds=True)
    rig.live = [GOOD, WORSE]
    trainer = Trainer(resumed_step=own_step)
    await rig.hold(trainer)
    assert (trainer.taken, rig.life.catching_up) == (taken, False)


async def test_who_is_better_than_the_swarm_fetches_nothing(tmp_path, monkeypatch) -> None:
    rig = Rig(tmp_path, monkeypatch, founds=False)
    fetched = list[PeerId]()
    monkeypatch.setattr(Offer, "pieces", lambda offer, *_: fetched.append(offer.donor))
    rig.live = [GOOD, WORSE]
    await rig.hold(Trainer(resumed_step=20, own=1.5))
    assert (fetched, rig.life.catching_up) == ([], False)
    assert rig.donors._offers.willing() == rig.live


async def test_nobody_is_blamed_for_honest_parameters_that_are_worse_than_ours(
    tmp_path, monkeypatch
) -> None:
    """What a donor offers is an estimate: we find out when we measure."""
    rig = Rig(tmp_path, monkeypatch, founds=False)
    monkeypatch.setitem(TRUE_LOSS, GOOD, 2.2)
    rig.live = [GOOD]
    trainer = Trainer(resumed_step=20, own=2.0)
    await rig.hold(trainer)
    assert (trainer.taken, len(rig.asked), rig.donors._offers.willing()) == ([], 1, [GOOD])
    assert not (tmp_path / "joining").exists()


async def test_what_happened_in_one_catch_up_does_not_count_in_the_next(
    tmp_path, monkeypatch
) -> None:
    async def stalls(_: Offer, first: int, count: int) -> AsyncGenerator[tuple[int, memoryview]]:
        await asyncio.Event().wait()
        yield first, memoryview(b"")

    monkeypatch.setattr(Offer, "pieces", stalls)
    monkeypatch.setattr(donors, "CATCH_UP_S", 0.2)
    rig = Rig(tmp_path, monkeypatch, founds=False)
    conduct: Any = rig.donors._conduct
    rig.live, conduct.alone, conduct.blamed = [GOOD], GOOD, {WORSE}
    await rig.hold(Trainer(resumed_step=20))
    assert [conduct.alone, *conduct.blamed] == [None]
    assert not rig.life.catching_up
    assert (rig.life.note, rig.life.wasted, rig.life.compares) == ("", "", False)
    assert not (tmp_path / "joining").exists()


async def test_who_resumes_alone_exchanges_nothing_until_it_has_looked(
    tmp_path, monkeypatch
) -> None:
    rig = Rig(tmp_path, monkeypatch, founds=False)
    trainer = Trainer(resumed_step=10)
    await rig.hold(trainer)
    assert rig.life.catching_up
    await catches_up_later(rig, trainer)
    assert trainer.taken == [GOOD]


@pytest.mark.parametrize(("trained_to", "taken"), [(79, [GOOD]), (80, []), (400, [])])
async def test_who_trains_while_it_catches_up_is_never_set_back(
    tmp_path, monkeypatch, trained_to, taken
) -> None:
    """Nobody was there at its start, so it takes steps while the parameters come."""
    monkeypatch.setattr(turns, "PAUSE_S", 0.001)
    rig = Rig(tmp_path, monkeypatch, founds=False)
    trainer = Trainer(resumed_step=10)
    await rig.hold(trainer)
    real = Offer.pieces

    async def while_it_trains(
        offer: Offer, first: int, count: int
    ) -> AsyncGenerator[tuple[int, memoryview]]:
        trainer.step = trained_to
        async for each in real(offer, first, count):
            yield each

    monkeypatch.setattr(Offer, "pieces", while_it_trains)
    await catches_up_later(rig, trainer)
    assert (trainer.taken, rig.saved, rig.conditions) == (taken, len(taken), set())
    assert trainer.step == (100 if taken else trained_to)
    kinds = [event.kind for event in rig.store.events()]
    assert kinds == (["caught-up", "took-over"] if taken else ["no-longer-ahead"])
    assert rig.donors._offers.willing() == [GOOD]


async def catches_up_later(rig: Rig, trainer: Trainer) -> None:
    """Until the node knows whether it lies far behind."""
    rig.supervisor.trainer = trainer
    looking = asyncio.create_task(rig.parameters.catch_up_later())
    rig.live = [GOOD]
    async with asyncio.timeout(10):
        while rig.life.catching_up:
            await asyncio.sleep(0.001)
    looking.cancel()


@pytest.mark.parametrize(("away_s", "taken"), [(0.01, False), (0.2, True)])
@pytest.mark.parametrize("silent", [[], [BUSY], [BUSY, WORSE]])
async def test_a_lone_donor_is_ahead_by_no_more_than_time_allows(
    tmp_path, monkeypatch, silent, away_s, taken
) -> None:
    """Others hold parameters, too, but none of them has told its step: it is busy, or gone."""
    monkeypatch.setattr(donors, "CATCH_UP_S", 60.0 if taken else 0.05)
    rig = Rig(tmp_path, monkeypatch, founds=False)
    rig.live, rig.saved_at, rig.gone = [GOOD, *silent], 1e6 - away_s, {WORSE}
    trainer = Trainer(resumed_step=70)
    await rig.hold(trainer)
    assert (trainer.taken == [GOOD], trainer.step) == (taken, 100 if taken else 70)


@pytest.mark.parametrize("swarm", [[OLD, GOOD], [OLD, GOOD, TWIN]], ids=["of three", "of four"])
async def test_one_low_step_keeps_nobody_from_catching_up(tmp_path, monkeypatch, swarm) -> None:
    """It resumed from an old checkpoint itself, or lies. The step counts no more for that."""
    monkeypatch.setitem(OFFERS, OLD, (1, 2.01))
    monkeypatch.setitem(OFFERS, TWIN, (100, 3.0))
    rig = Rig(tmp_path, monkeypatch, founds=False)
    rig.live, trainer = swarm, Trainer(resumed_step=20)
    await rig.hold(trainer)
    assert trainer.taken == [GOOD]
    assert trainer.step == (25 if len(swarm) == 2 else 100)


@pytest.mark.parametrize(("loss", "named"), [(2.0, [GOOD]), (9.0, [])])
async def test_who_goes_on_without_an_unconfirmed_donor_says_so(
    tmp_path, monkeypatch, loss, named
) -> None:
    """Unless it offers worse parameters than ours."""
    for peer in (OLD, TWIN):
        monkeypatch.setitem(OFFERS, peer, (1, 2.01))
    monkeypatch.setitem(OFFERS, GOOD, (100, loss))
    rig = Rig(tmp_path, monkeypatch, founds=False)
    rig.live, trainer = [OLD, GOOD, TWIN], Trainer(resumed_step=20, own=2.0)
    await rig.hold(trainer)
    assert (trainer.taken, rig.life.catching_up) == ([], False)
    events = [event.detail for event in rig.store.events()]
    assert events == [f"step 20; perhaps ahead: {peer}" for peer in named]
    assert rig.conditions == ({"not-caught-up"} if named else set())


async def test_a_lone_donor_ends_no_run_of_a_node_that_does_not_know_when_it_saved(
    tmp_path, monkeypatch
) -> None:
    monkeypatch.setattr(donors, "CATCH_UP_S", 0.05)
    rig = Rig(tmp_path, monkeypatch, founds=False)
    monkeypatch.setitem(OFFERS, GOOD, (299, 2.0))
    rig.live, rig.saved_at = [GOOD, BUSY], None
    trainer = Trainer(resumed_step=70)
    await rig.hold(trainer)
    assert (trainer.taken, trainer.step) == ([], 70)


async def test_a_founder_takes_no_observer_for_a_holder(tmp_path, monkeypatch) -> None:
    rig = Rig(tmp_path, monkeypatch, founds=True)
    rig.store.remember_peer(GOOD, [])
    rig = Rig(tmp_path, monkeypatch, founds=True)
    rig.live, rig.roles = [GOOD], {GOOD: "observer"}
    trainer = Trainer()
    assert await rig.hold(trainer) is rig.next_trainer
    assert trainer.taken == []


async def test_a_founder_whose_donors_all_fail_is_told_of_the_initial_model(
    tmp_path, monkeypatch, caplog
) -> None:
    rig = Rig(tmp_path, monkeypatch, founds=True)
    rig.store.remember_peer(LIAR, [])
    rig = Rig(tmp_path, monkeypatch, founds=True)
    rig.live = [LIAR]
    holding = asyncio.create_task(rig.hold(Trainer()))
    async with asyncio.timeout(10):
        while "none has given" not in rig.life.note:
            await asyncio.sleep(0.001)
    assert "--from-initial" in rig.life.note
    assert sum("--from-initial" in message for message in caplog.messages) == 1
    assert [event.kind for event in rig.store.events()] == ["donor-refused"]
    holding.cancel()


@pytest.mark.parametrize("own_step", [None, 10])
async def test_parameters_that_can_not_be_saved_at_once_are_kept(
    tmp_path, monkeypatch, own_step
) -> None:
    rig = Rig(tmp_path, monkeypatch, founds=False)
    rig.live = [GOOD]

    async def full() -> str:
        raise LocalError("no space is left")

    rig.node.checkpoint = full
    trainer = Trainer(resumed_step=own_step)
    assert await rig.hold(trainer) is trainer
    assert trainer.taken == [GOOD]
