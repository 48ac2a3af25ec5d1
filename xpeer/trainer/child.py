"""Life and death of the trainer process on the daemon's side, and requests to it.

What the requests mean is `client.TrainerProcess`'s business.
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
    error_of,
)
from xpeer.trainer.arena import Arena
from xpeer.trainer.channel import DaemonChannel, log_lines
from xpeer.trainer.commands import Begin, Command, Request, Stop
from xpeer.trainer.setup import TrainerSetup

BOUNDARY_TIMEOUT_S: Final = 300.0
"""A step of a large model is long; exchanges have their own, shorter deadline."""
PROGRAM: Final = "xpeer.trainer.main"
_EXIT_TIMEOUT_S: Final = 1.0
"""From the end of the socket to the end of the process."""
_OUTPUT_TIMEOUT_S: Final = 5.0
_LOOK_S: Final = 1.0
HUGE_PAGES: Final = {"THP_MEM_ALLOC_ENABLE": "1"}
"""Have torch ask Linux for huge pages: a fragment touches every small page of the model, so that
copying an eleventh of 135 M parameters out took 44 ms on a core without them, and 23 ms with."""

Event = Progressed | Saved | SaveFailed | LookedAtText | Crashed
logger = logging.getLogger("xpeer.trainer")
_T = TypeVar("_T")
_R = TypeVar("_R", bound=Result)


class Child:
    """A spawned trainer, its channel and its arena.

    Attributes:
        exited: the exit status, once the process is gone (negative: the signal).
        ready: what it said when it was ready.
        crash: its last word, if it could say one.
        gave_up: it was to stop, got no further, and was killed.
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
        self._gone = False
        self.gave_up = False
        self._ending: Ending | None = None
        self._number = 0
        self._pending: dict[int, asyncio.Future[Result]] = {}
        self._tasks: set[asyncio.Task[Any]] = set()
        self._keep(self._serve())

    @classmethod
    async def spawn(
        cls, program: str, setup: TrainerSetup, arena: Arena, on_event: Callable[[Event], None]
    ) -> Child:
        """Start the process, a Python module, which inherits one end of a socketpair and the arena.

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
        """Also the id of its process group."""
        return self._process.pid

    def send(self, command: Command) -> int:
        """Send a command, whose answer nobody waits for; its number."""
        self._number += 1
        self._channel.send(Request(self._number, command))
        return self._number

    async def ask(self, command: Command, expected: type[_R]) -> _R:
        """Send a command and wait for its answer. Callers bound the wait with `whole`.

        Raises:
            PeerError, LocalError: the child's own.
            TrainerError: it is gone.
        """
        if self._gone:
            raise self._died()
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

    async def whole(
        self, work: Coroutine[Any, Any, _T], timeout_s: float = BOUNDARY_TIMEOUT_S
    ) -> _T:
        """Bound the caller's wait, while the work itself goes on until the child has answered: a
        slot is not handed to anybody else while the child may still write to it.

        Raises:
            LocalTimeoutError: it did not answer in time.
        """
        task = self._keep(work)
        try:
            async with asyncio.timeout(timeout_s):
                return await asyncio.shield(task)
        except TimeoutError:
            raise LocalTimeoutError(
                f"the trainer did not answer within {timeout_s:g} s", "see the log"
            ) from None

    async def wait_ready(self, timeout_s: float) -> Ready:
        """Wait until it can be asked; on failure it is ended.

        Raises:
            LocalError: why it is not ready.
        """
        try:
            async with asyncio.timeout(timeout_s):
                return await asyncio.shield(self.ready)
        except TimeoutError:
            await self.kill()
            raise LocalTimeoutError(
                f"the trainer was not ready within {timeout_s:g} s",
                "see the log; is the disk slow?",
            ) from None
        except BaseException:
            await self.kill()
            raise

    async def stop(self, patience_s: float, told: Callable[[Ending], None] | None = None) -> int:
        """Save and exit; killed once it gets no further for so long.

        Time in which we did not run either (the machine was suspended) does not count.

        Args:
            patience_s: without any progress.
            told: how far it is.

        Returns:
            The exit status.
        """
        self.send(Stop())
        seen, still_s = self._ending, 0.0
        while not self.exited.done() and still_s < patience_s:
            began = self._loop.time()
            await asyncio.wait({self.exited}, timeout=min(_LOOK_S, patience_s))
            if self._ending == seen:
                still_s += min(self._loop.time() - began, 2 * _LOOK_S)
                continue
            seen, still_s = self._ending, 0.0
            if told is not None and seen is not None:
                told(seen)
        self.gave_up = not self.exited.done()
        return await self.kill()

    async def kill(self) -> int:
        """End the process group at once, and free everything. Returns the exit status."""
        if not self.exited.done():
            self._kill_group()
        return await asyncio.shield(self.exited)

    def _kill_group(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)

    def _keep(self, work: Coroutine[Any, Any, _T]) -> asyncio.Task[_T]:
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._forget)
        return task

    def _forget(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            task.exception()  # whoever waited has seen it; nobody may be left

    async def _serve(self) -> None:
        """Receive until the child is gone, then fail whatever still waits."""
        output = self._keep(log_lines(self._process.stdout, logger))
        try:
            while (message := await self._channel.receive()) is not None:
                self._take(message)
        except TrainerError as e:  # a broken frame: nothing after it can be understood
            self.crash = e
            self._kill_group()
        except asyncio.CancelledError:  # the loop is being closed: no child outlives it
            self._kill_group()
            raise
        finally:
            await self._bury(output)

    async def _bury(self, output: asyncio.Task[None]) -> None:
        """Nobody waits for ever, even if the loop is being closed."""
        status = await self._end_of_process()
        self._gone = True
        died = self._died(status)
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

    def _take(self, message: FromTrainer) -> None:
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
        else:
            if isinstance(message, Crashed):
                error = error_of(message.failure)
                self.crash = error if isinstance(error, LocalError) else TrainerError(str(error))
                if message.failure.trace:
                    logger.error("%s", message.failure.trace)
            # not called from here: an error in it must not end this task
            self._loop.call_soon(self._on_event, message)

    def _died(self, status: int | None = None) -> LocalError:
        """Why it is gone. For a request under way that is always a TrainerError."""
        if self.crash is None:
            ended = "" if status is None else f" with status {status}"
            return TrainerError(f"the trainer process ended{ended}", "see the log")
        if not self.ready.done():
            return self.crash
        return TrainerError(self.crash.problem, self.crash.remedy)
