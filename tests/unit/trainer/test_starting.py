"""A start is given up only if it stands still, however long it takes."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from xpeer.errors import LocalTimeoutError, ShardError
from xpeer.status import TextProgress
from xpeer.trainer.answers import UNREADY, FromTrainer, Starting, Working
from xpeer.trainer.child import Child
from xpeer.trainer.reporting import report_work
from xpeer.trainer.starting import Startup, report_start
from xpeer.trainer.threads import Threads
from xpeer.training.pulse import Pulse


class Starter:
    """A child whose messages and clock are a script: one entry a second."""

    def __init__(
        self,
        monkeypatch: pytest.MonkeyPatch,
        script: list[FromTrainer | None],
        when_over: Callable[[], None] = lambda: None,
    ) -> None:
        loop = asyncio.get_running_loop()
        self.seconds, self.script, self.killed = 0.0, script, False
        self.when_over = when_over
        self.child = child = Child.__new__(Child)
        child.ready = loop.create_future()
        child._starts, child._working = 0, Working(0)
        child._tasks = set()
        child._on_event = lambda event: None
        clock: Any = SimpleNamespace(
            time=lambda: self.seconds, call_soon=lambda *_: None, create_task=loop.create_task
        )
        child._loop = clock
        monkeypatch.setattr(asyncio, "wait", self.wait)
        monkeypatch.setattr(child, "kill", self.kill)

    async def wait(self, _futures: object, timeout: float) -> None:
        self.seconds += timeout
        message = self.script.pop(0) if self.script else None
        if message is not None:
            self.child._handle(message)
        if not self.script:
            self.when_over()
        await asyncio.sleep(0)  # tasks run

    async def kill(self) -> int:
        self.killed = True
        return 0


async def test_a_start_that_gets_on_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    script: list[FromTrainer | None] = []
    for hour in range(5):
        script += [*[None] * 500, Starting("reads the text", hour)]
    made = Starter(monkeypatch, [*script, UNREADY])
    assert await made.child.wait_ready(600.0) == UNREADY
    assert made.seconds > 2500
    assert not made.killed


async def test_a_start_that_stands_still_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    made = Starter(monkeypatch, [Starting("loads the model", 1), *[None] * 700])
    with pytest.raises(LocalTimeoutError, match="made no progress for 600 s"):
        await made.child.wait_ready(600.0)
    assert made.seconds == 601
    assert made.killed


async def test_the_error_of_a_start_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    made = Starter(monkeypatch, [])
    made.child.ready.set_exception(ShardError("no text", "name some"))
    with pytest.raises(ShardError):
        await made.child.wait_ready(600.0)
    assert made.killed


async def test_an_answer_is_waited_for_while_the_trainer_works(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A step, or measuring what a donor gave, may take an hour."""
    answer: asyncio.Future[int] = asyncio.get_running_loop().create_future()
    script: list[FromTrainer | None] = []
    for batch in range(1, 21):
        script += [*[None] * 200, Working(batch)]
    made = Starter(monkeypatch, script, when_over=lambda: answer.set_result(7))

    async def work() -> int:
        return await answer

    assert await made.child.whole(work()) == 7
    assert made.seconds > 4000


async def test_an_answer_of_a_trainer_that_stands_still_is_given_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """But not the work: until it has answered, nobody else gets its slot."""
    answer: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    made, has_ended = Starter(monkeypatch, [Working(1)]), asyncio.Event()

    async def work() -> None:
        await answer
        has_ended.set()

    with pytest.raises(LocalTimeoutError, match="no progress for 300 s"):
        await made.child.whole(work())
    assert made.seconds == 301
    answer.set_result(None)
    await has_ended.wait()


async def test_training_is_no_progress_of_a_disk_that_stands_still(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Else a write that hangs would hold a donor's places, and a renewal, as long as it trains."""
    answer: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    script: list[FromTrainer | None] = []
    for batch in range(1, 1000):
        script += [*[None] * 4, Working(batch, min(batch, 3))]
    made = Starter(monkeypatch, script)

    async def work() -> None:
        await answer

    with pytest.raises(LocalTimeoutError, match="no progress for 900 s"):
        await made.child.whole(work(), by_disk=True)
    assert made.seconds == 15 + 900
    answer.set_result(None)


def test_work_is_reported_when_some_was_done() -> None:
    pulse, sent = Pulse(), list[FromTrainer]()

    def end() -> None:
        raise InterruptedError

    script = [pulse.beat, lambda: None, pulse.beat, end]
    with pytest.raises(InterruptedError):
        report_work(pulse, sent.append, lambda: None, lambda _seconds: script.pop(0)())
    assert sent == [Working(1, 1), Working(2, 2)]


def test_what_the_disk_has_done_is_told_from_the_rest() -> None:
    pulse, threads, sent = Pulse(), Threads(), list[FromTrainer]()
    begun, going_on = threading.Event(), threading.Event()

    def write() -> None:
        begun.set()
        going_on.wait(60)

    def end() -> None:
        raise InterruptedError

    def begins() -> None:
        threads.submit("disk", write)
        begun.wait(60)
        pulse.beat()

    def ends() -> None:
        going_on.set()
        threads.wait_for("disk", lambda: pulse.wrote(1, 2))
        while threads.at_work("disk") is not None:  # its callbacks come a moment later
            time.sleep(0.001)
        pulse.beat()

    beat = pulse.beat
    script: list[Callable[[], object]] = [beat, begins, beat, beat, ends, beat, end]

    def sleep(_seconds: float) -> None:
        script.pop(0)()

    with pytest.raises(InterruptedError):
        report_work(pulse, sent.append, lambda: threads.at_work("disk"), sleep)
    threads.close()
    assert [message.disk for message in sent if isinstance(message, Working)] == [1, 2, 2, 2, 3, 4]
    assert pulse.done_by("disk") == 1


def test_a_start_is_reported_when_it_has_got_on() -> None:
    startup = Startup()
    sent: list[FromTrainer] = []
    read = TextProgress(bytes_read=10, bytes_total=100)

    def end() -> None:
        startup.over = True

    def ignore() -> None:
        pass

    script: list[Callable[[], None]] = [
        ignore,
        lambda: startup.enter("reads the text"),
        lambda: startup.tokenised(read),
        ignore,
        startup.pulse.beat,
        lambda: startup.enter("loads the model"),
        end,
    ]
    report_start(startup, sent.append, lambda _seconds: script.pop(0)())
    assert [(each.stage, each.text) for each in sent if isinstance(each, Starting)] == [
        ("opens its home", None),
        ("reads the text", None),
        ("reads the text", read),
        ("reads the text", read),  # a beat
        ("loads the model", None),
    ]
