from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys

import msgspec
import pytest

from xpeer.errors import (
    BudgetSpentError,
    ConfigError,
    LocalError,
    PeerError,
    Reason,
    ShardError,
    TrainerError,
)
from xpeer.training.arena import Arena, Layout, Slots
from xpeer.training.ipc import (
    MAX_FRAME_BYTES,
    ChildChannel,
    Crashed,
    DaemonChannel,
    Done,
    Drop,
    Failure,
    LookedAtText,
    Ready,
    Reply,
    Request,
    Run,
    error_of,
    failure_of,
)

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
        "import sys; from xpeer.training.arena import Arena, Layout;"
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


async def test_messages_cross_both_ways_and_an_end_is_none() -> None:
    ours, theirs = socket.socketpair()
    daemon, child = await DaemonChannel.open(ours), ChildChannel(theirs)
    daemon.send(Request(1, Run("mix")))
    daemon.send(Request(2, Drop(9)))
    assert await asyncio.to_thread(child.receive) == Request(1, Run("mix"))
    assert await asyncio.to_thread(child.receive) == Request(2, Drop(9))
    child.send(Reply(1, Done()))
    assert await daemon.receive() == Reply(1, Done())
    await daemon.close()
    assert await asyncio.to_thread(child.receive) is None
    child.send(Reply(2, Done()))  # to nobody
    child.flush(5)
    theirs.close()


@pytest.mark.parametrize("text", ["/text/caf\udce9.txt can't be read", "\ud800", "k" * (5 << 20)])
async def test_text_of_a_file_crosses_whatever_is_in_it(text: str) -> None:
    ours, theirs = socket.socketpair()
    daemon, child = await DaemonChannel.open(ours), ChildChannel(theirs)
    ready = Ready(1, 1, "cpu", "ghost", 0, 0, 0, False, text_problem=text, notes=[text])
    child.send(ready)
    child.send(LookedAtText(text))
    child.send(Crashed(failure_of(ShardError(text, text))))
    child.send(Crashed(failure_of(KeyError(text))))
    safe = {"\ud800": r"\ud800"}.get(text, text.replace("\udce9", r"\udce9"))
    if len(text) > 2000:
        safe = f"{'k' * 996} [...] {'k' * 996}"
    assert await daemon.receive() == msgspec.structs.replace(ready, text_problem=safe, notes=[safe])
    assert await daemon.receive() == LookedAtText(safe)
    for _ in range(2):
        crashed = await daemon.receive()
        assert isinstance(crashed, Crashed)
        assert len(crashed.failure.problem) <= 2000
        assert len(crashed.failure.trace) <= 20_000
    await daemon.close()
    child.flush(5)
    theirs.close()


async def test_a_length_beyond_the_bound_is_refused_before_it_is_allocated() -> None:
    ours, theirs = socket.socketpair()
    daemon = await DaemonChannel.open(ours)
    theirs.sendall((MAX_FRAME_BYTES + 1).to_bytes(4, "little"))
    with pytest.raises(TrainerError, match="announced"):
        await daemon.receive()
    await daemon.close()
    theirs.close()


@pytest.mark.parametrize(
    "error",
    [
        ConfigError("shard is missing", "set data.shard"),
        ShardError("no text", "mend it"),
        BudgetSpentError("spent", "wait"),
        TrainerError("dead", ""),
        PeerError(Reason.NOT_FINITE, "a scale"),
    ],
)
def test_errors_cross_with_class_problem_remedy_and_exit_code(error: LocalError) -> None:
    back = error_of(failure_of(error))
    assert type(back) is type(error)
    assert str(back) == str(error)


def test_an_unexpected_error_carries_its_traceback() -> None:
    try:
        raise ZeroDivisionError("x")
    except ZeroDivisionError as e:
        failure = failure_of(e)
    assert "test_arena" in failure.trace
    assert isinstance(error_of(failure), TrainerError)
    assert isinstance(error_of(Failure("Unheard", "p")), TrainerError)
