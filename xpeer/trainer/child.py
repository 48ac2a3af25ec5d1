"""Starts, asks and ends the trainer process, on the daemon's side.

Knows nothing of what the requests mean; `client.TrainerProcess` does.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import sys
from collections.abc import Callable, Coroutine
from typing import Any, Final, TypeVar

from xpeer.errors import LocalError, LocalTimeoutError, TrainerError
from xpeer.trainer.answers import (
    Crashed,
    Ending,
    Failure,
    FromTrainer,
    LookedAtText,
    Progressed,
    Ready,
    Reply,
    Result,
    Saved,
    SaveFailed,
    Starting,
    Working,
    error_of,
)
from xpeer.trainer.arena import Arena
from xpeer.trainer.channel import DaemonChannel, log_lines
from xpeer.trainer.commands import Begin, Command, Request, Stop
from xpeer.trainer.ended import Ended, kills_so_far
from xpeer.trainer.setup import TrainerSetup

PATIENCE_S: Final = 300.0
"""Time without progress after which an answer is not waited for any more. A step of a large model
is long, and so is measuring it; exchanges have a deadline of their own."""
DISK_PATIENCE_S: Final = 900.0
"""The same for an answer that comes by the disk's thread: a large file shows no progress while the
system writes the last of it."""
PROGRAM: Final = "xpeer.trainer.main"
_EXIT_TIMEOUT_S: Final = 1.0
"""Time that the process may live on after its socket has closed."""
_OUTPUT_TIMEOUT_S: Final = 5.0
"""Time to read the rest of the output of a process that has ended."""
_LOOK_S: Final = 1.0
"""Time between two looks at the progress."""
HUGE_PAGES: Final = {"THP_MEM_ALLOC_ENABLE": "1"}
"""Environment that has torch ask Linux for huge pages. A fragment touches every small page of the
model: copying an eleventh of 135 M parameters out took 44 ms on a core without huge pages, and
23 ms with them."""

Event = Progressed | Saved | SaveFailed | LookedAtText | Starting | Crashed
logger = logging.getLogger("xpeer.trainer")
_T = TypeVar("_T")
_R = TypeVar("_R", bound=Result)


class Child:
    """A spawned trainer, its channel and its arena.

    Attributes:
        exited: done once the process is gone: the exit status (negative: the signal).
        ended: how it ended; None while it runs.
        ready: done once the trainer is ready, or gone: its first message, or the error.
        crash: the error that ended the process; None unless it sent one, or a frame that
            can't be decoded.
        gave_up: True iff it was asked to stop, made no progress, and was killed.
        arena: memory shared with the process.
    """

    def __init__(
        self,
        process: asyncio.subprocess.Process,
        channel: DaemonChannel,
        arena: Arena,
        on_event: Callable[[Event], None],
    ) -> None:
        loop = asyncio.get_running_loop()
        self.exited: asyncio.Future[int] = loop.create_future()
        self.ready: asyncio.Future[Ready] = loop.create_future()
        self.crash: LocalError | None = None
        self.arena = arena
        self._process = process
        self._channel = channel
        self._on_event = on_event
        self._loop = loop
        self.ended: Ended | None = None
        self.gave_up = self._killed = False
        self._kills = kills_so_far()
        self._ending: Ending | None = None
        """The last report of an ending trainer; None until there is one."""
        self._starts = 0
        """Reports of a start so far: each says that it has got on."""
        self._working = Working(0)
        """The last report of work since then."""
        self._number = 0
        """The number of the last request."""
        self._pending: dict[int, asyncio.Future[Result]] = {}
        """Requests without an answer so far, by number."""
        self._tasks: set[asyncio.Task[Any]] = set()
        self._start_task(self._serve())

    @classmethod
    async def spawn(
        cls, program: str, setup: TrainerSetup, arena: Arena, on_event: Callable[[Event], None]
    ) -> Child:
        """Start a Python module as a process that inherits one end of a socketpair and the arena.

        Raises:
            TrainerError: the system can't start another process.
        """
        ours, theirs = socket.socketpair()
        try:
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-P", "-m", program),
                *(str(theirs.fileno()), str(arena.fd), str(os.getpid())),
                pass_fds=(theirs.fileno(), arena.fd),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.STDOUT,
                env={**HUGE_PAGES, **os.environ},
                start_new_session=True,  # its own process group, which a terminal's ^C spares
            )
        except OSError as e:
            ours.close()
            arena.close()
            raise TrainerError(f"the trainer can't be started: {e}", "check memory limits") from e
        finally:
            theirs.close()
        channel = await DaemonChannel.open(ours)
        layout = arena.layout
        channel.send(Begin(setup, layout.slot_bytes, layout.state_bytes, layout.num_slots))
        return cls(process, channel, arena, on_event)

    @property
    def pid(self) -> int:
        """Process id, and id of its process group."""
        return self._process.pid

    def send(self, command: Command) -> int:
        """Send a command without waiting for an answer; returns its number."""
        self._number += 1
        self._channel.send(Request(self._number, command))
        return self._number

    async def ask(self, command: Command, expected: type[_R]) -> _R:
        """Send a command and wait for its answer. Callers bound the wait with `whole`.

        Raises:
            PeerError, LocalError: raised in the child.
            TrainerError: the child is gone.
        """
        if self.ended is not None:
            raise self._died(self.ended)
        number = self.send(command)
        future = self._pending[number] = self._loop.create_future()
        try:
            result = await future
        finally:
            del self._pending[number]
        if isinstance(result, Failure):
            raise error_of(result)
        if not isinstance(result, expected):
            raise TrainerError(f"the trainer answered {type(result).__name__} to {command}")
        return result

    async def whole(self, work: Coroutine[Any, Any, _T], *, by_disk: bool = False) -> _T:
        """Bound the caller's wait, but let the work go on until the child has answered.

        So no slot is handed to another request while the child may still write to it.

        Args:
            work: asks the child.
            by_disk: the answer needs the child's disk thread, so that training is no progress while
                that stands still.

        Raises:
            LocalTimeoutError: the child made no progress for `PATIENCE_S`, or `DISK_PATIENCE_S`.
        """
        task = self._start_task(work)
        patience_s = DISK_PATIENCE_S if by_disk else PATIENCE_S

        def progress() -> int:
            return self._working.disk if by_disk else self._working.work

        if await self._gets_on(task, patience_s, progress):
            return await task
        raise LocalTimeoutError(
            f"the trainer made no progress for {patience_s:g} s, and gave no answer", "see the log"
        )

    async def wait_ready(self, patience_s: float) -> Ready:
        """Wait until the trainer can be asked; on failure it is killed.

        Args:
            patience_s: seconds without progress after which it is killed.

        Raises:
            LocalError: says why it is not ready.
        """
        try:
            if await self._gets_on(self.ready, patience_s, lambda: self._starts):
                return self.ready.result()
        except BaseException:
            await self.kill()
            raise
        await self.kill()
        raise LocalTimeoutError(
            f"the trainer's start made no progress for {patience_s:g} s",
            "see the log; is the disk slow?",
        )

    async def stop(
        self, patience_s: float, on_progress: Callable[[Ending], None] | None = None
    ) -> int:
        """Have the trainer save and exit; kill it if it makes no progress.

        Args:
            patience_s: seconds without progress after which it is killed.
            on_progress: called when the trainer reports how far its ending is.

        Returns:
            The exit status.
        """

        def tell() -> None:
            if on_progress is not None and self._ending is not None:
                on_progress(self._ending)

        self.send(Stop())
        self.gave_up = not await self._gets_on(self.exited, patience_s, lambda: self._ending, tell)
        return await self.kill()

    async def _gets_on(
        self,
        future: asyncio.Future[Any],
        patience_s: float,
        progress: Callable[[], object],
        on_progress: Callable[[], None] = lambda: None,
    ) -> bool:
        """Wait for a future while the child makes progress.

        Time in which we did not run either (the machine was suspended) does not count.

        Args:
            future: stays as it is, also if the caller is cancelled.
            patience_s: seconds without progress after which it is given up.
            progress: what the child reported last.
            on_progress: called when that is something else.

        Returns:
            Whether it is done.
        """
        last, still_s = progress(), 0.0
        while not future.done() and still_s < patience_s:
            began = self._loop.time()
            await asyncio.wait({future}, timeout=min(_LOOK_S, patience_s))
            if progress() == last:
                still_s += min(self._loop.time() - began, 2 * _LOOK_S)
                continue
            last, still_s = progress(), 0.0
            on_progress()
        return future.done()

    async def kill(self) -> int:
        """Kill the process group, and free everything. Returns the exit status."""
        if not self.exited.done():
            self._kill_group()
        return await asyncio.shield(self.exited)

    def _kill_group(self) -> None:
        self._killed = True
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)

    def _start_task(self, work: Coroutine[Any, Any, _T]) -> asyncio.Task[_T]:
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._forget)
        return task

    def _forget(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            task.exception()  # mark it as seen: its waiter, if any, has raised it

    async def _serve(self) -> None:
        """Receive until the child is gone, then fail all requests that still wait."""
        output = self._start_task(log_lines(self._process.stdout, logger))
        try:
            while (message := await self._channel.receive()) is not None:
                self._handle(message)
        except TrainerError as e:  # a broken frame: nothing after it can be decoded
            self.crash = e
            self._kill_group()
        except asyncio.CancelledError:  # the loop is being closed: no child outlives it
            self._kill_group()
            raise
        finally:
            await self._bury(output)

    async def _bury(self, output: asyncio.Task[None]) -> None:
        """Fail all requests and close everything, even if the loop is being closed."""
        status = await self._end_of_process()
        self.ended = Ended(status, self._killed, kills_so_far() - self._kills)
        died = self._died(self.ended)
        waiting: list[asyncio.Future[Any]] = [*self._pending.values(), self.ready]
        for future in waiting:
            if not future.done():
                future.set_exception(died)
        self.ready.exception()  # nobody may be waiting for it
        await asyncio.wait({output}, timeout=_OUTPUT_TIMEOUT_S)  # a grandchild may hold the pipe
        output.cancel()
        await self._channel.close()
        self.arena.close()
        self.exited.set_result(status)

    async def _end_of_process(self) -> int:
        try:
            async with asyncio.timeout(_EXIT_TIMEOUT_S):
                return await self._process.wait()
        except TimeoutError:
            self._kill_group()
            return await self._process.wait()

    def _handle(self, message: FromTrainer) -> None:
        if isinstance(message, Reply):
            if isinstance(message.result, Failure) and message.result.trace:
                logger.error("%s", message.result.trace)
            future = self._pending.get(message.number)
            if future is not None and not future.done():
                future.set_result(message.result)
        elif isinstance(message, Ready):
            for note in message.notes:
                logger.info("%s", note)
            for warning in message.warnings:
                logger.warning("%s", warning)
            self.ready.set_result(message)
        elif isinstance(message, Ending):
            self._ending = message
        elif isinstance(message, Working):
            self._working = message
        else:
            self._note(message)
            # call it later: an error in it must not end this task
            self._loop.call_soon(self._on_event, message)

    def _note(self, event: Event) -> None:
        if isinstance(event, Starting):
            self._starts += 1
        elif isinstance(event, Crashed):
            self._note_crash(event)

    def _note_crash(self, message: Crashed) -> None:
        error = error_of(message.failure)
        self.crash = error if isinstance(error, LocalError) else TrainerError(str(error))
        if message.failure.trace:
            logger.error("%s", message.failure.trace)

    def _died(self, ended: Ended) -> LocalError:
        """The error that says why the trainer is gone; after readiness always a TrainerError."""
        if self.crash is None:
            return ended.error()
        if not self.ready.done():
            return self.crash
        return TrainerError(self.crash.problem, self.crash.remedy)
