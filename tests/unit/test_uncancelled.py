from __future__ import annotations

import asyncio

import pytest

from xpeer.uncancelled import to_its_end


async def test_work_is_waited_for_however_often_we_are_cancelled() -> None:
    may_end = asyncio.Event()

    async def work() -> None:
        await may_end.wait()

    working = asyncio.create_task(work())
    waiting = asyncio.create_task(to_its_end(working))
    for _ in range(2):
        await asyncio.sleep(0)
        waiting.cancel()
        await asyncio.sleep(0)
        assert not waiting.done()
    may_end.set()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert working.done()
