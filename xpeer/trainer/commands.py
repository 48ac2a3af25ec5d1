"""The commands that the daemon sends to its trainer, as data, and how each is carried out.

A command declares its thread (`on`) and has a method `apply`, which returns the answer. Threads of
the trainer get nothing else from outside, and no closures. So one rank could forward its commands
to other ranks, and all would compute the same parameters.

`apply` may return more work for another thread, which then returns the answer. Such work
(`Compress`, `FinishState`, `MeasureState`, `WriteCopy`) holds copies made on this machine, and
never leaves the process.

Knows nothing of how commands travel (`channel`) or how they get to their threads (`server`).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Final, Literal, Protocol

from msgspec import Struct

from xpeer.forms import Form
from xpeer.leaves import stays
from xpeer.phase import Order
from xpeer.trainer.answers import (
    Done,
    Losses,
    Result,
    SaveFailed,
    Snapshotted,
    StateExported,
    StateImported,
    Verified,
    Written,
)
from xpeer.trainer.setup import TrainerSetup
from xpeer.update import PeerUpdate, PrivateUpdate

if TYPE_CHECKING:
    from xpeer.trainer.worker import Worker

Thread = Literal["receiver", "training", "helper", "disk", "measuring"]
"""receiver: reads commands; its work is done at once, and must be short.
training: works between two steps. Only then may the parameters be read or changed.
helper: compresses and verifies, one piece of work after another (`in_flight` says why).
disk: writes checkpoints, and completes copies of whole models.
measuring: measures beside training, on one core."""

NOBODY: Final = 0
"""The number of a command that nobody wants an answer to."""


class Work(Protocol):
    """A piece of work for one thread of the trainer."""

    on: ClassVar[Thread]

    def apply(self, trainer: Worker) -> Outcome:
        """Do the work, on that thread.

        Raises:
            XpeerError: sent as the answer.
        """


Outcome = Result | Work | None
"""The answer; or more work, which will return it; or None, if nobody waits."""


@stays("what the daemon tells its own trainer")
class Begin(Struct, frozen=True, tag=True):
    """The first message to the child: everything that it needs to start."""

    setup: TrainerSetup
    slot_bytes: int
    state_bytes: int
    num_slots: int


# ---- one exchange -------------------------------------------------------------------------------


@stays("what the daemon tells its own trainer")
class Snapshot(Struct, frozen=True, tag=True):
    """Copy a fragment at the next boundary, and compress it into the slot."""

    on: ClassVar[Thread] = "training"

    meeting_id: int
    fragment: int
    averaging: bool
    """Average the parameters, whatever the manifest's rule."""
    slot: int

    def apply(self, trainer: Worker) -> Compress:
        """Copy the fragment.

        Raises:
            PeerError: see `TrainingLoop.snapshot`.
        """
        private = trainer.loop.snapshot(self.meeting_id, self.fragment, averaging=self.averaging)
        return Compress(self.meeting_id, self.slot, private)


@dataclass(frozen=True, slots=True)
class Compress:
    """Compress the copy of a fragment into its slot."""

    on: ClassVar[Thread] = "helper"

    meeting_id: int
    slot: int
    private: PrivateUpdate

    def apply(self, trainer: Worker) -> Snapshotted:
        """Compress the copy into the slot.

        Raises:
            PeerError: the meeting was dropped meanwhile.
        """
        update = trainer.exchanges.compress(self.meeting_id, self.private)
        trainer.arena.slot(self.slot, update.form.num_bytes)[:] = update.payload
        return Snapshotted(
            form=update.form,
            step=update.step,
            privacy_mode=update.stamp.mode,
            steps_charged=update.stamp.steps_charged,
        )


@stays("what the daemon tells its own trainer")
class Verify(Struct, frozen=True, tag=True):
    """Decode and check a partner's payload in the slot."""

    on: ClassVar[Thread] = "helper"

    meeting_id: int
    exchange_id: int
    slot: int
    form: Form
    parties: int = 1
    """Number of payloads in the sum: k for a masked group."""
    partner: str = ""
    """PeerID of the sender; empty for a sum."""

    def apply(self, trainer: Worker) -> Verified:
        """Verify the payload.

        Raises:
            PeerError: see `Exchanges.verify`.
        """
        payload = trainer.arena.slot(self.slot, self.form.num_bytes)
        update = PeerUpdate(payload, self.form, self.partner, self.parties)
        checked = trainer.exchanges.verify(self.meeting_id, self.exchange_id, update)
        return Verified(checked.distance, checked.clipped)


@stays("what the daemon tells its own trainer")
class Merge(Struct, frozen=True, tag=True):
    """Merge verified payloads at the next boundary; answered once the merge is queued."""

    on: ClassVar[Thread] = "helper"

    meeting_id: int
    weights: dict[int, float]
    """w_j of every exchange that both sides accepted."""

    def apply(self, trainer: Worker) -> Done:
        """Compute the correction, and queue its addition.

        Raises:
            PeerError: see `Exchanges.resolve`.
        """
        trainer.exchanges.resolve(self.meeting_id, self.weights)
        trainer.queue(AddCorrection(self.meeting_id))
        return Done()


@stays("what the daemon tells its own trainer")
class AddCorrection(Struct, frozen=True, tag=True):
    """The part of a `Merge` that is done at the next boundary. No daemon sends it."""

    on: ClassVar[Thread] = "training"

    meeting_id: int

    def apply(self, trainer: Worker) -> None:
        """Add the correction to the parameters, unless the meeting was dropped."""
        trainer.loop.merge(self.meeting_id)
        if trainer.loop.state != "training":  # else the next step reports it
            trainer.reports.progress()


@stays("what the daemon tells its own trainer")
class Drop(Struct, frozen=True, tag=True):
    """Forget a meeting; not answered."""

    on: ClassVar[Thread] = "receiver"

    meeting_id: int

    def apply(self, trainer: Worker) -> None:
        """Forget the meeting now, to free memory, and again after a snapshot that is queued."""
        trainer.exchanges.drop(self.meeting_id)
        trainer.queue(DropLate(self.meeting_id))


@stays("what the daemon tells its own trainer")
class DropLate(Struct, frozen=True, tag=True):
    """The part of a `Drop` that is done at the next boundary. No daemon sends it."""

    on: ClassVar[Thread] = "training"

    meeting_id: int

    def apply(self, trainer: Worker) -> None:
        """Forget a meeting whose snapshot was still queued when it was dropped."""
        trainer.exchanges.drop(self.meeting_id)


# ---- all parameters -----------------------------------------------------------------------------


@stays("what the daemon tells its own trainer")
class ExportState(Struct, frozen=True, tag=True):
    """Write all parameters to the arena's region, in the form that joiners are sent."""

    on: ClassVar[Thread] = "training"

    def apply(self, trainer: Worker) -> FinishState:
        """Copy the parameters; all else is done by other threads.

        Raises:
            PeerError: there are none yet (NOT_READY).
        """
        began = time.thread_time()
        finish = trainer.copy_state()
        return FinishState(trainer.loop.counters.step, finish, time.thread_time() - began)


@dataclass(frozen=True, slots=True)
class FinishState:
    """Complete the copy in the arena's region."""

    on: ClassVar[Thread] = "disk"

    step: int
    finish: Callable[[], None]
    """Completes the copy."""
    core_s: float
    """Processor time that the copy has taken so far, in seconds."""

    def apply(self, trainer: Worker) -> MeasureState:
        """Complete the copy."""
        began = time.thread_time()
        self.finish()
        return MeasureState(self.step, self.core_s + time.thread_time() - began)


@dataclass(frozen=True, slots=True)
class MeasureState:
    """Measure the copy in the arena's region, and bring it into its form."""

    on: ClassVar[Thread] = "measuring"

    step: int
    core_s: float
    """Processor time that the copy has taken so far, in seconds."""

    def apply(self, trainer: Worker) -> StateExported:
        """Measure the copy; see `Measurements.public_of_copy`."""
        began = time.thread_time()
        loss = trainer.measure_state()
        trainer.narrow_state()
        return StateExported(self.step, loss, self.core_s + time.thread_time() - began)


@stays("what the daemon tells its own trainer")
class ImportState(Struct, frozen=True, tag=True):
    """Replace all parameters by the arena's region."""

    on: ClassVar[Thread] = "training"

    step: int
    at_most: float = float("inf")
    """Highest public loss to accept."""
    codec: str = "float32"
    """Form of the trained values in the region."""
    before_step: int | None = None
    """At this step, or beyond, they are refused; None = at none."""

    def apply(self, trainer: Worker) -> StateImported:
        """Replace the parameters.

        Raises:
            PeerError: see `TrainingLoop.replace`; or they are of another model (WRONG_MODEL).
        """
        before, after = trainer.replace_state(self)
        trainer.reports.everything()
        return StateImported(before, after)


# ---- the rest -----------------------------------------------------------------------------------


@stays("what the daemon tells its own trainer")
class Run(Struct, frozen=True, tag=True):
    """Change what the loop does."""

    on: ClassVar[Thread] = "training"

    mode: Order

    def apply(self, trainer: Worker) -> Done:
        """Train, mix or pause from now on."""
        trainer.loop.set_mode(self.mode)
        return Done()


@stays("what the daemon tells its own trainer")
class WriteCheckpoint(Struct, frozen=True, tag=True):
    """Write a checkpoint now."""

    on: ClassVar[Thread] = "training"

    def apply(self, trainer: Worker) -> WriteCopy:
        """Copy the content of a checkpoint.

        Raises:
            PeerError: there are no parameters yet (NOT_READY).
        """
        trainer.loop.require_parameters()  # else the next start would resume from random values
        return WriteCopy(trainer.loop.counters.step, trainer.saving.copy())


@dataclass(frozen=True, slots=True)
class WriteCopy:
    """Write a checkpoint that was copied."""

    on: ClassVar[Thread] = "disk"

    step: int
    write: Callable[[], str]
    """Writes the copy, and returns its path."""

    def apply(self, trainer: Worker) -> Written:
        """Write the copy.

        Raises:
            LocalError: it can't be written. This is also reported as an event, for `health`, and so
                is any other error.
        """
        try:
            return Written(self.write())
        except Exception as e:
            trainer.reports.send(SaveFailed.because(e, self.step))
            raise


@stays("what the daemon tells its own trainer")
class Evaluate(Struct, frozen=True, tag=True):
    """Measure the losses on public and held-out text now."""

    on: ClassVar[Thread] = "training"

    def apply(self, trainer: Worker) -> Losses:
        """Measure the losses."""
        public, validation = trainer.loop.measure()
        trainer.reports.everything()
        return Losses(public, validation)


@stays("what the daemon tells its own trainer")
class Stop(Struct, frozen=True, tag=True):
    """Save and exit."""

    on: ClassVar[Thread] = "receiver"

    def apply(self, trainer: Worker) -> None:
        """Have the loop end, and report its progress until then."""
        trainer.reports.begin_ending()
        trainer.loop.stop()


Command = (
    Snapshot | Verify | Merge | AddCorrection | Drop | DropLate | ExportState | ImportState | Run
    | WriteCheckpoint | Evaluate | Stop
)  # fmt: skip


@stays("what the daemon tells its own trainer")
class Request(Struct, frozen=True, tag=True):
    """A command with the number that its reply will carry."""

    number: int
    command: Command


ToTrainer = Begin | Request
