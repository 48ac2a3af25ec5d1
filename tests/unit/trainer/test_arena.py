from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import threading
from typing import Any

import numpy as np
import pytest

from xpeer.errors import LocalError, TrainerError
from xpeer.trainer import arena as arena_module
from xpeer.trainer.arena import Arena, Layout, Slots, copy_in_parts

LAYOUT = Layout(slot_bytes=5000, state_bytes=10_000, num_slots=3)


@pytest.fixture
def arena():
    made = Arena.create(LAYOUT)
    yield made
    made.close()


def test_slots_and_state_do_not_overlap(arena: Arena) -> None:
    for slot in range(3):
        arena.slot(slot, 5000)[:] = bytes([slot + 1]) * 5000
    arena.state()[:] = b"\xff" * 10_000
    assert [bytes(arena.slot(s, 5000)) for s in range(3)] == [
        bytes([s + 1]) * 5000 for s in range(3)
    ]
    assert bytes(arena.state()) == b"\xff" * 10_000


def test_another_process_sees_what_was_written(arena: Arena) -> None:
    arena.slot(1, 5)[:] = b"hello"
    code = (
        "import sys; from xpeer.trainer.arena import Arena, Layout;"
        "a = Arena.attach(Layout(5000, 10000, 3), int(sys.argv[1]));"
        "a.state()[:5] = bytes(reversed(a.slot(1, 5)))"
    )
    subprocess.run(
        [sys.executable, "-c", code, str(arena.fd)], pass_fds=(arena.fd,), check=True, timeout=30
    )
    assert bytes(arena.state()[:5]) == b"olleh"


def test_released_state_reads_as_zeros_and_takes_no_memory(arena: Arena) -> None:
    arena.state()[:] = b"\xff" * 10_000
    used = os.fstat(arena.fd).st_blocks
    arena.release_state()
    assert os.fstat(arena.fd).st_blocks < used
    assert bytes(arena.state()) == bytes(10_000)  # reading takes the pages again


def test_out_of_bounds_is_refused(arena: Arena) -> None:
    for slot, size in [(3, 1), (-1, 1), (0, 5001), (0, -1)]:
        with pytest.raises(LocalError):
            arena.slot(slot, size)
    with pytest.raises(LocalError, match="smaller"):
        Arena.attach(Layout(5000, 10_000_000), arena.fd)


def test_closing_with_a_view_alive_is_harmless() -> None:
    made = Arena.create(LAYOUT)
    view = made.slot(0, 4)
    view[:] = b"kept"
    made.close()
    made.close()
    made.release_state()
    assert bytes(view) == b"kept"
    with pytest.raises(TrainerError, match="gone"):
        made.slot(0, 4)


async def test_whoever_finds_no_slot_waits() -> None:
    slots, seen = Slots(2), list[int]()
    both, release = asyncio.Event(), asyncio.Event()

    async def use() -> None:
        async with slots.one() as slot:
            seen.append(slot)
            if len(seen) == 2:
                both.set()
            await release.wait()

    async with asyncio.TaskGroup() as group:
        for _ in range(3):
            group.create_task(use())
        await both.wait()
        assert sorted(seen) == [0, 1]
        release.set()
    assert len(seen) == 3


async def test_a_copy_is_made_beside_the_event_loop_and_is_over_when_it_is_cancelled(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A source may be a mapped file, whose pages come from the disk."""
    copy, threads = np.copyto, set[int]()
    begun, may_go_on = threading.Event(), threading.Event()

    def copyto(*both: Any) -> None:
        threads.add(threading.get_ident())
        begun.set()
        may_go_on.wait(30)
        copy(*both)

    monkeypatch.setattr(np, "copyto", copyto)
    monkeypatch.setattr(arena_module, "_COPY_BYTES", 1000)
    source, target = bytes(range(250)) * 10, bytearray(2500)
    copying = asyncio.create_task(copy_in_parts(memoryview(source), memoryview(target)))
    await asyncio.to_thread(begun.wait, 30)
    for _ in range(2):  # a stop may come after a timeout
        copying.cancel()
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert not copying.done()
    may_go_on.set()
    with pytest.raises(asyncio.CancelledError):
        await copying
    assert bytes(target) == source[:1000] + bytes(1500)
    await copy_in_parts(memoryview(source), memoryview(target))
    assert bytes(target) == source
    assert threading.get_ident() not in threads
