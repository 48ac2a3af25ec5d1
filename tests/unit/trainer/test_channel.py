from __future__ import annotations

import asyncio
import socket

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
from xpeer.status import PrivacySpent, Progress
from xpeer.trainer.answers import (
    Crashed,
    Done,
    Ending,
    Failure,
    FromTrainer,
    LookedAtText,
    Progressed,
    Ready,
    Reply,
    Saved,
    SaveFailed,
    error_of,
    failure_of,
)
from xpeer.trainer.channel import MAX_FRAME_BYTES, ChildChannel, DaemonChannel
from xpeer.trainer.commands import Drop, Request, Run


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


def at_step(step: int, privacy: PrivacySpent | None = None) -> Progressed:
    return Progressed("training", Progress(step=step), step, privacy)


async def test_while_the_daemon_reads_nothing_reports_do_not_pile_up() -> None:
    """A daemon can be stopped (SIGSTOP) for days. What has to arrive does, in its order."""
    ours, theirs = socket.socketpair()
    theirs.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
    child = ChildChannel(theirs)
    big = LookedAtText("x" * 2000)
    for _ in range(200):  # until the socket takes no more
        child.send(big)
    spent = PrivacySpent(steps_charged=7)
    child.send(at_step(0, spent))
    for step in range(1, 1000):
        child.send(at_step(step))
    child.send(Saved("path", 999))
    for step in range(1000, 2000):
        child.send(at_step(step))
    child.send(SaveFailed("full", 1999))
    child.send(SaveFailed("full", 1999))
    for work in range(1000):
        child.send(Ending(work))
    assert len(child._outbox) <= 200 + 6
    received: list[FromTrainer | None] = []
    daemon = await DaemonChannel.open(ours)
    while (message := await daemon.receive()) != Ending(999):
        received.append(message)
    assert received == [
        *[big] * 200, at_step(999, spent), Saved("path", 999), at_step(1999),
        SaveFailed("full", 1999), SaveFailed("full", 1999),
    ]  # fmt: skip
    await daemon.close()
    child.flush(5)
    assert not child._sender.is_alive()
    theirs.close()


async def test_nothing_is_sent_behind_the_last_message() -> None:
    ours, theirs = socket.socketpair()
    daemon, child = await DaemonChannel.open(ours), ChildChannel(theirs)
    child.send(Reply(1, Done()))
    child.flush(20)
    child.send(Reply(2, Done()))
    theirs.close()
    assert await daemon.receive() == Reply(1, Done())
    assert await daemon.receive() is None
    await daemon.close()


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
    assert "test_channel" in failure.trace
    assert isinstance(error_of(failure), TrainerError)
    assert isinstance(error_of(Failure("Unheard", "p")), TrainerError)
