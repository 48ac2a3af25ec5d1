"""When a donor makes a copy for joiners, and when it hands out the last one."""

from __future__ import annotations

import asyncio
import contextlib

import pytest

from xpeer.errors import PeerError, Reason
from xpeer.network import shelf as shelves
from xpeer.update import ModelState, StateCopy


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
            await slow.enter_async_context(shelf.lend(source, end=lambda: None))
            now_s += shelves.FRESH_S + 1.0
        assert taken == 2
        with pytest.raises(PeerError, match=Reason.BUSY):  # of another trainer, a third
            await shelf.get(Source())
    assert (await shelf.get(source)).state.step == 3


class Joiner:
    """Holds what it is lent until the shelf ends its link."""

    def __init__(self, shelf: shelves.Shelf, source: CopyingTrainer) -> None:
        self.step: int | None = None
        self._ended = asyncio.Event()
        self.task = asyncio.create_task(self._hold(shelf, source))

    async def _hold(self, shelf: shelves.Shelf, source: CopyingTrainer) -> None:
        async with shelf.lend(source, end=self._ended.set) as lent:
            self.step = lent.state.step
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
            async with shelf.lend(trainer, end=lambda: None):
                pass
    trainer.freed.set()
    monkeypatch.setattr(shelves, "PREPARE_TIMEOUT_S", 20.0)
    async with shelf.lend(trainer, end=lambda: None) as lent:
        assert lent.state.step == 0
    assert trainer.copies == 1  # all waited for the same one
