"""When a donor makes a copy for joiners, and when it hands out the last one."""

from __future__ import annotations

import asyncio
import contextlib

import pytest

from xpeer.errors import PeerError, Reason
from xpeer.network import shelf as shelves
from xpeer.network.pieces import root_of
from xpeer.update import ModelState, StateCopy


def lend(
    shelf: shelves.Shelf, source: shelves.Source, root: bytes | None = None
) -> contextlib.AbstractAsyncContextManager[shelves.Snapshot]:
    """Lend to a joiner that takes nothing, and that nobody can end."""
    return shelf.lend(source, root, end=lambda: None, taken=lambda: 0)


class CopyingTrainer:
    """A donor's trainer whose copies take a minute, of which it has a core for a while."""

    def __init__(self, clock: list[float], core_s: float = 0.0) -> None:
        self.step = self.copies = 0
        self._clock, self._core_s = clock, core_s

    async def export_state(self) -> StateCopy:
        self.copies += 1
        self._clock[0] += 60.0
        return StateCopy(ModelState(b"1234", self.step, 2.0), self._core_s)


async def test_one_snapshot_serves_all_who_ask_while_it_is_fresh() -> None:
    now_s = [0.0]
    shelf = shelves.Shelf(5, lambda: now_s[0])
    first, second = CopyingTrainer(now_s), CopyingTrainer(now_s)
    given = await asyncio.gather(*(shelf.get(first) for _ in range(9)))
    assert (first.copies, len(set(map(id, given)))) == (1, 1)
    now_s[0] += shelves.FRESH_S - 0.1
    await shelf.get(first)
    assert first.copies == 1
    now_s[0] += 0.2  # what it waited for a core does not count
    await shelf.get(first)
    assert first.copies == 2
    await shelf.get(second)
    assert second.copies == 1  # another trainer: nothing of the one before


async def test_what_a_copy_cost_decides_how_long_it_is_handed_out() -> None:
    now_s = [0.0]
    shelf, trainer = shelves.Shelf(5, lambda: now_s[0]), CopyingTrainer(now_s, core_s=3.0)
    await shelf.get(trainer)
    trainer.step = 1000  # however far it is
    now_s[0] += shelves.FRESH_COST * 3.0 - 0.1
    await shelf.get(trainer)
    assert trainer.copies == 1
    now_s[0] += 0.2
    assert (await shelf.get(trainer)).state.step == 1000


async def test_a_cheap_copy_is_made_anew_once_the_donor_is_a_window_ahead() -> None:
    now_s = [0.0]
    shelf, trainer = shelves.Shelf(5, lambda: now_s[0]), CopyingTrainer(now_s)
    await shelf.get(trainer)
    trainer.step = 5
    assert (await shelf.get(trainer)).state.step == 0
    trainer.step = 6
    assert (await shelf.get(trainer)).state.step == 6


async def test_there_are_two_snapshots_at_most_however_slowly_they_are_read() -> None:
    now_s, taken = 0.0, 0

    class Source:
        step = 0

        async def export_state(self) -> StateCopy:
            nonlocal taken
            taken += 1
            return StateCopy(ModelState(b"1234", taken, 2.0), 0.0)

    shelf, source = shelves.Shelf(1, lambda: now_s), Source()
    async with contextlib.AsyncExitStack() as slow:
        for _ in range(8):  # each comes when the one before has gone stale
            await slow.enter_async_context(lend(shelf, source))
            now_s += shelves.FRESH_S + 1.0
        assert taken == 2
        with pytest.raises(PeerError, match=Reason.BUSY):  # of another trainer, a third
            await shelf.get(Source())
    assert (await shelf.get(source)).state.step == 3


class Joiner:
    """Holds what it is lent until the shelf ends its link."""

    def __init__(self, shelf: shelves.Shelf, source: CopyingTrainer, taken: int = 0) -> None:
        self.step: int | None = None
        self.lent: shelves.Snapshot
        self.taken = taken
        """Bytes that it took of late."""
        self._ended = asyncio.Event()
        self.task = asyncio.create_task(self._hold(shelf, source))

    async def _hold(self, shelf: shelves.Shelf, source: CopyingTrainer) -> None:
        async with shelf.lend(source, end=self._ended.set, taken=lambda: self.taken) as lent:
            self.lent, self.step = lent, lent.state.step
            await self._ended.wait()

    async def holds(self, step: int) -> None:
        async with asyncio.timeout(20):
            while self.step != step:
                await asyncio.sleep(0)


async def test_two_slow_joiners_do_not_freeze_what_a_donor_hands_out() -> None:
    now_s = [0.0]
    shelf, trainer = shelves.Shelf(5, lambda: now_s[0]), CopyingTrainer(now_s)
    slow = list[Joiner]()
    for step in (0, 100):
        trainer.step = step
        slow.append(Joiner(shelf, trainer))
        await slow[-1].holds(step)
    trainer.step = 1000
    now_s[0] += shelves.STALE_S - 1.0
    early = Joiner(shelf, trainer)
    await early.holds(100)  # the newer one; nobody's link is ended for a while
    now_s[0] += 2.0
    late = Joiner(shelf, trainer)
    await late.holds(1000)
    assert [each.task.done() for each in (*slow, early, late)] == [True, False, False, False]
    another = CopyingTrainer(now_s)  # of a trainer that was started again
    now_s[0] += shelves.STALE_S + 1.0
    last = Joiner(shelf, another)
    await last.holds(0)
    assert (slow[1].task.done(), late.task.done()) == (True, False)
    for each in (late, last):
        each.task.cancel()
    await asyncio.gather(late.task, last.task, return_exceptions=True)


async def lent_to(
    shelf: shelves.Shelf, trainer: CopyingTrainer, taken: list[tuple[int, int]]
) -> list[Joiner]:
    """One joiner each for steps of the trainer and bytes that it took of late."""
    joiners = list[Joiner]()
    for trainer.step, num_bytes in taken:
        joiners.append(Joiner(shelf, trainer, num_bytes))
        await joiners[-1].holds(trainer.step)
    return joiners


async def test_of_two_snapshots_the_one_goes_that_nobody_takes_as_fast_as_the_other() -> None:
    """Many slow joiners do not add up: else they could end the transfer of a faster one."""
    now_s = [0.0]
    shelf, trainer = shelves.Shelf(5, lambda: now_s[0]), CopyingTrainer(now_s)
    taken = [(0, 1), (0, 100), (100, 60), (100, 60)]
    joiners = await lent_to(shelf, trainer, taken)
    trainer.step = 1000
    now_s[0] += shelves.STALE_S
    joiners.append(last := Joiner(shelf, trainer))
    await last.holds(1000)
    assert [each.task.done() for each in joiners] == [False, False, True, True, False]
    for each in joiners:
        each.task.cancel()
    await asyncio.gather(*(each.task for each in joiners), return_exceptions=True)


async def test_a_request_does_not_cost_a_joiner_the_snapshot_that_it_comes_back_for() -> None:
    """Until the last one is 15 minutes old. Then it goes before anybody's link is ended."""
    now_s = [0.0]
    shelf, trainer = shelves.Shelf(5, lambda: now_s[0]), CopyingTrainer(now_s)
    async with lend(shelf, trainer) as lent:
        root = root_of(await lent.leaves())
        (other,) = await lent_to(shelf, trainer, [(100, 60)])
        shelf.keep(lent)  # its link breaks
        shelf.keep(other.lent, awaited=False)  # another joiner has all of this
    trainer.step = 1000
    now_s[0] += shelves.STALE_S - 1.0
    assert (await shelf.get(trainer)).state.step == 100
    assert shelf.holds(trainer, root)
    now_s[0] += 1.0
    assert (await shelf.get(trainer)).state.step == 1000
    assert not shelf.holds(trainer, root)
    assert not other.task.done()
    other.task.cancel()
    await asyncio.gather(other.task, return_exceptions=True)


async def test_a_second_break_begins_the_time_anew() -> None:
    """The end of the first one's time does not cost the joiner what it comes back for."""
    shelf, trainer = shelves.Shelf(5), CopyingTrainer([0.0])
    async with lend(shelf, trainer) as lent:
        root = root_of(await lent.leaves())
        shelf.keep(lent, 0.0)
        shelf.keep(lent)
    shelf._kept = None  # it is no longer fresh
    for _ in range(3):
        await asyncio.sleep(0)
    assert shelf.holds(trainer, root)
    shelf.keep(lent, 0.0)
    for _ in range(3):
        await asyncio.sleep(0)
    assert not shelf.holds(trainer, root)


async def test_a_broken_transfer_of_an_earlier_trainer_keeps_nothing_from_being_made() -> None:
    now_s = [0.0]
    shelf, trainer = shelves.Shelf(5, lambda: now_s[0]), CopyingTrainer(now_s)
    async with lend(shelf, trainer) as lent:
        shelf.keep(lent)
    trainer = CopyingTrainer(now_s)
    async with lend(shelf, trainer):
        trainer.step = 1000
        assert (await shelf.get(trainer)).state.step == 1000


class Stuck(CopyingTrainer):
    """Writes a checkpoint that does not end, and makes no copy before."""

    def __init__(self) -> None:
        super().__init__([0.0])
        self.freed = asyncio.Event()

    async def export_state(self) -> StateCopy:
        self.copies += 1
        await self.freed.wait()
        return StateCopy(ModelState(b"1234", self.step, 2.0), 0.0)


async def test_who_waits_for_a_copy_in_vain_has_its_place_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(shelves, "PREPARE_TIMEOUT_S", 0.01)
    shelf, trainer = shelves.Shelf(5), Stuck()
    for _ in range(3):
        with pytest.raises(PeerError, match=Reason.NOT_READY):
            async with lend(shelf, trainer):
                pass
    trainer.freed.set()
    monkeypatch.setattr(shelves, "PREPARE_TIMEOUT_S", 20.0)
    async with lend(shelf, trainer) as lent:
        assert lent.state.step == 0
    assert trainer.copies == 1  # all waited for the same one
