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
            await slow.enter_async_context(shelf.lend(source))
            now_s += shelves.FRESH_S + 1.0
        assert taken == 2
        with pytest.raises(PeerError, match=Reason.BUSY):  # of another trainer, a third
            await shelf.get(Source())
    assert (await shelf.get(source)).state.step == 3
