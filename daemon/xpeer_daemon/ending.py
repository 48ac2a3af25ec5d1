"""How a node ends: the trainer saves its steps, and lost steps are reported.

No fixed time limits the end. A save that makes progress may go on, and systemd is asked for more
time. A trainer that makes none is killed, and then the daemon reports what was not saved.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Final

from xpeer import sdnotify
from xpeer.config import Home, NodeConfig
from xpeer.control import End
from xpeer.errors import ExitCode, LocalError, NotSavedError, PeerError
from xpeer.health import duration
from xpeer.training import checkpoint_files
from xpeer.training.checkpoint_files import paths, step_of

if TYPE_CHECKING:
    from xpeer.trainer.client import Ending, TrainerProcess
    from xpeer_daemon.supervisor import Supervisor

log = logging.getLogger("xpeer.daemon")

BYTES_PER_PARAMETER: Final = 12
"""Bytes of a checkpoint for each parameter: its value and two moments, float32."""
SLOWEST_BYTES_PER_S: Final = 50e6
"""Memory is copied at least this fast. The copying shows no progress; writing to the disk does."""
STEPS: Final = 4.0
"""A trainer may be silent for this many of its steps."""
SPARE_S: Final = 30.0
"""Time that we ask of systemd beyond our own patience, so that we give up before it does."""
SLOWEST_READ_BYTES_PER_S: Final = 10e6
"""A checkpoint is read at least this fast."""
LOG_EVERY_S: Final = 30.0
WAIT_S: Final = 2.0
"""How long a request for the end's progress stays open."""
TELL_S: Final = 5.0
"""How long the node waits for a client that follows its end to ask once more."""


class Ends:
    """The end of one node.

    Args:
        home: contains the checkpoints.
        config: settings.

    Attributes:
        lost: says which steps were not saved; None as long as nothing is lost.
    """

    def __init__(self, home: Home, config: NodeConfig) -> None:
        self._home = home
        self._config = config
        self.lost: NotSavedError | None = None
        self._over, self._told = asyncio.Event(), asyncio.Event()
        self._is_followed = False
        """True iff a client asked for the end, or was told that it is not over yet."""
        self._written = self._total = 0
        self._logged_s = 0.0

    def patience_s(self, trainer: TrainerProcess) -> float:
        """How long a trainer that is to end may show no progress before it is killed."""
        size = BYTES_PER_PARAMETER * trainer.num_params
        progress = trainer.progress
        step_s = progress.seconds_training / progress.step if progress.step else 0.0
        least = max(self._config.daemon.stop_timeout_s, STEPS * step_s)
        return least + size / SLOWEST_BYTES_PER_S

    async def save_all(self, supervisor: Supervisor | None) -> None:
        """Save the steps that are not on the disk yet, or note that they are lost."""
        if supervisor is None:
            return
        if supervisor.trainer is not None:
            await self.save(supervisor.trainer)
        elif supervisor.last is not None:
            await self.note_loss(supervisor.last, LocalError(supervisor.down_reason))

    async def save(self, trainer: TrainerProcess) -> bool:
        """Have the trainer save and exit; returns whether nothing is lost."""
        patience_s = self.patience_s(trainer)
        sdnotify.extend(patience_s + SPARE_S)

        def on_progress(ending: Ending) -> None:
            self._written, self._total = ending.written, ending.total
            sdnotify.extend(patience_s + SPARE_S)
            if ending.total and time.monotonic() - self._logged_s > LOG_EVERY_S:
                self._logged_s = time.monotonic()
                log.info("saving: %.0f of %.0f MB", ending.written / 1e6, ending.total / 1e6)

        status = await trainer.stop(patience_s, on_progress)
        if status == 0:
            return True
        cause = trainer.crash
        if cause is None and trainer.gave_up:
            cause = LocalError(
                f"the trainer made no progress for {patience_s:.0f} s and was killed",
                "is the machine out of memory, or the disk stuck? A larger daemon.stop_timeout_s "
                "waits longer",
            )
        await self.note_loss(trainer, cause or LocalError(f"the trainer {trainer.ended}"))
        return self.lost is None

    async def note_loss(self, trainer: TrainerProcess, cause: LocalError) -> None:
        """Note and log which steps of this trainer are lost, if any are."""
        saved = await self.last_saved()
        if trainer.step <= (saved[0] if saved else 0):
            log.warning("the trainer's last save failed, but no step is lost: %s", cause)
            return
        last = "there is no checkpoint"
        if saved is not None:
            age = duration(max(0.0, time.time() - saved[1]))
            last = f"last checkpoint step {saved[0]} ({age} old)"
        self.lost = NotSavedError(
            f"not saved: {last}, the node was at step {trainer.step}: {cause.problem}",
            cause.remedy or "see `xpeer logs`; what the lost steps cost of privacy stays charged",
        )
        log.error("%s", self.lost)

    def saved_at(self, step: int) -> float | None:
        """When the checkpoint was written that a trainer at this step resumed from, by the wall
        clock; None = unknown. The trainer has verified it, so it is not read once more.
        """
        return checkpoint_files.saved_at(self._home.checkpoints, step)

    async def last_saved(self) -> tuple[int, float] | None:
        """Step and time of the newest checkpoint that is whole; None = there is none."""
        return await asyncio.to_thread(self._last_saved)  # all of it is read

    def _last_saved(self) -> tuple[int, float] | None:
        # torch, which takes a second: only for a trainer that ended badly
        from xpeer.training.checkpoint import load  # noqa: PLC0415
        from xpeer.training.tensor_file import CorruptFileError  # noqa: PLC0415

        try:
            for newest in paths(self._home.checkpoints):
                with contextlib.suppress(CorruptFileError):
                    sdnotify.extend(newest.stat().st_size / SLOWEST_READ_BYTES_PER_S + SPARE_S)
                    load(newest)
                    return step_of(newest), newest.stat().st_mtime
        except (LocalError, OSError) as e:
            log.warning("checkpoints can't be looked at: %s", e)
        return None

    # For clients that wait for the end

    def follow(self) -> None:
        """Note that a client will ask how the end went: however soon it is over, tell it."""
        self._is_followed = True

    async def progress(self) -> End:
        """How far the end is, after a moment or as soon as it is over. The last answer says whether
        steps were lost.
        """
        try:
            async with asyncio.timeout(WAIT_S):
                await self._over.wait()
        except TimeoutError:
            self._is_followed = True
            return End(over=False, written=self._written, total=self._total)
        self._told.set()
        if self.lost is None:
            return End(over=True)
        return End(
            over=True,
            problem=self.lost.problem,
            remedy=self.lost.remedy,
            exit_code=int(ExitCode.NOT_SAVED),
        )

    async def over(self) -> None:
        """Note that the end is over: all is saved or lost. Returns when a client that follows the
        end has heard it, or does not ask any more.
        """
        self._over.set()
        if self._is_followed:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(TELL_S):
                    await self._told.wait()


async def within(seconds: float, action: Callable[[], Awaitable[None]]) -> None:
    """Do something with others, and give up on it after this time or if it fails."""
    with contextlib.suppress(TimeoutError, PeerError):
        async with asyncio.timeout(seconds):
            await action()


def raise_first(task: asyncio.Task[None]) -> None:
    """Re-raise the error that ended the daemon's task, if one did.

    A `LocalError` within a group is raised alone. Any other error is our bug, and raised as it is.
    """
    error = task.exception()
    if error is None:
        return
    local_error = _first_local(error)
    if local_error is not None:
        raise local_error
    raise error


def _first_local(error: BaseException) -> LocalError | None:
    if isinstance(error, BaseExceptionGroup):
        return next((e for e in map(_first_local, error.exceptions) if e is not None), None)
    return error if isinstance(error, LocalError) else None
