"""What the daemon asks of its trainer: every command is data, and says how it is carried out.

A command declares its thread (`on`) and has `apply`, which gives the answer. Nothing else crosses
to a thread of the trainer: no closure, so that a rank could send what it was asked to other ranks,
and all would come to the same parameters.

`apply` may return more work for another thread, which then gives the answer. Such work holds what
was copied on this machine (`Compress`, `FinishState`, `WriteCopy`) and never leaves the process.

Knows nothing of how commands travel (`channel`) or of who puts them on their threads (`server`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Final, Literal, Protocol

from msgspec import Struct

from xpeer.errors import LocalError
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

Thread = Literal["receiver", "training", "helper", "disk"]
"""receiver: at once, on the thread that reads commands, so it must be short. training: between two
steps, the only place where the parameters may be read or changed. helper: compresses and verifies,
one thing after another (`stages` says why). disk: writes checkpoints and hashes whole models."""

NOBODY: Final = 0
"""The number of a command whose answer nobody waits for."""


class Work(Protocol):
    """Something that one thread of the trainer does."""

    on: ClassVar[Thread]

    def apply(self, trainer: Worker) -> Outcome:
        """Do it, on that thread.

        Raises:
            XpeerError: it is the answer.
        """


Outcome = Result | Work | None
"""The answer; or more work, which will give it; or none, where nobody waits."""


@stays("what the daemon tells its own trainer")
class Begin(Struct, frozen=True, tag=True):
    """First message to the child: what it needs to start."""

    setup: TrainerSetup
    slot_bytes: int
    state_bytes: int
    num_slots: int


# ---- one exchange -------------------------------------------------------------------------------


@stays("what the daemon tells its own trainer")
class Snapshot(Struct, frozen=True, tag=True):
    """Take a fragment at the next boundary, compress it into the slot."""

    on: ClassVar[Thread] = "training"

    meeting_id: int
    fragment: int
    averaging: bool
    """Average the parameters, whatever the manifest's rule."""
    slot: int

    def apply(self, trainer: Worker) -> Compress:
        """Copy the fragment.

        Raises:
            PeerError: as `TrainingLoop.snapshot`.
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
        """Compress it.

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
    """Of a masked group's sum: k."""
    partner: str = ""
    """Whose payload it is: a PeerID."""

    def apply(self, trainer: Worker) -> Verified:
        """Verify it.

        Raises:
            PeerError: as `Exchanges.verify`.
        """
        payload = trainer.arena.slot(self.slot, self.form.num_bytes)
        update = PeerUpdate(payload, self.form, self.partner, self.parties)
        checked = trainer.exchanges.verify(self.meeting_id, self.exchange_id, update)
        return Verified(checked.distance, checked.clipped)


@stays("what the daemon tells its own trainer")
class Merge(Struct, frozen=True, tag=True):
    """Merge verified payloads at the next boundary; answered once that is queued."""

    on: ClassVar[Thread] = "helper"

    meeting_id: int
    weights: dict[int, float]
    """w_j of every exchange that was accepted."""

    def apply(self, trainer: Worker) -> Done:
        """Compute the correction, and queue it.

        Raises:
            PeerError: as `Exchanges.resolve`.
        """
        trainer.exchanges.resolve(self.meeting_id, self.weights)
        trainer.queue(AddCorrection(self.meeting_id))
        return Done()


@stays("what the daemon tells its own trainer")
class AddCorrection(Struct, frozen=True, tag=True):
    """What a `Merge` leaves for the next boundary. No daemon sends it."""

    on: ClassVar[Thread] = "training"

    meeting_id: int

    def apply(self, trainer: Worker) -> None:
        """Add it to the parameters, unless the meeting was dropped."""
        trainer.loop.merge(self.meeting_id)
        if trainer.loop.state != "training":  # else the next step reports it
            trainer.reports.progress()


@stays("what the daemon tells its own trainer")
class Drop(Struct, frozen=True, tag=True):
    """Forget a meeting; not answered."""

    on: ClassVar[Thread] = "receiver"

    meeting_id: int

    def apply(self, trainer: Worker) -> None:
        """Do so now, to free memory, and once more behind a snapshot that is still due."""
        trainer.exchanges.drop(self.meeting_id)
        trainer.queue(DropLate(self.meeting_id))


@stays("what the daemon tells its own trainer")
class DropLate(Struct, frozen=True, tag=True):
    """What a `Drop` leaves for the next boundary. No daemon sends it."""

    on: ClassVar[Thread] = "training"

    meeting_id: int

    def apply(self, trainer: Worker) -> None:
        """Forget a meeting whose snapshot was still due when it was dropped."""
        trainer.exchanges.drop(self.meeting_id)


# ---- all parameters -----------------------------------------------------------------------------


@stays("what the daemon tells its own trainer")
class ExportState(Struct, frozen=True, tag=True):
    """Write all parameters to the arena's region."""

    on: ClassVar[Thread] = "training"

    def apply(self, trainer: Worker) -> FinishState:
        """Copy them.

        Raises:
            PeerError: there are none yet (NOT_READY).
        """
        return FinishState(trainer.loop.counters.step, trainer.copy_state())


@dataclass(frozen=True, slots=True)
class FinishState:
    """Complete and hash the copy in the arena's region."""

    on: ClassVar[Thread] = "disk"

    step: int
    finish: Callable[[], float]
    """Completes it; the public loss."""

    def apply(self, trainer: Worker) -> StateExported:
        """Do so."""
        loss = self.finish()
        return StateExported(trainer.state_digest(), self.step, loss)


@stays("what the daemon tells its own trainer")
class ImportState(Struct, frozen=True, tag=True):
    """Replace all parameters by the arena's region."""

    on: ClassVar[Thread] = "training"

    step: int
    at_most: float = float("inf")
    """Public loss that they may have."""

    def apply(self, trainer: Worker) -> StateImported:
        """Replace them.

        Raises:
            PeerError: as `TrainingLoop.replace`, or of another model (WRONG_MODEL).
        """
        before, after = trainer.replace_state(self.step, self.at_most)
        trainer.reports.everything()
        return StateImported(before, after)


# ---- the rest -----------------------------------------------------------------------------------


@stays("what the daemon tells its own trainer")
class Run(Struct, frozen=True, tag=True):
    """Change the mode."""

    on: ClassVar[Thread] = "training"

    mode: Order

    def apply(self, trainer: Worker) -> Done:
        """Train, mix or pause from now on."""
        trainer.loop.set_mode(self.mode)
        return Done()


@stays("what the daemon tells its own trainer")
class WriteCheckpoint(Struct, frozen=True, tag=True):
    """Save now."""

    on: ClassVar[Thread] = "training"

    def apply(self, trainer: Worker) -> WriteCopy:
        """Copy what a checkpoint holds.

        Raises:
            PeerError: there are no parameters yet (NOT_READY).
        """
        trainer.loop.require_parameters()  # the next start would resume from values of chance
        return WriteCopy(trainer.loop.counters.step, trainer.saving.copy())


@dataclass(frozen=True, slots=True)
class WriteCopy:
    """Write a checkpoint that was copied."""

    on: ClassVar[Thread] = "disk"

    step: int
    write: Callable[[], str]
    """Writes it; its path."""

    def apply(self, trainer: Worker) -> Written:
        """Write it.

        Raises:
            LocalError: the disk is full, say. It is reported as an event, too, for `health`.
        """
        try:
            return Written(self.write())
        except LocalError as e:
            trainer.reports.send(SaveFailed(str(e), self.step))
            raise


@stays("what the daemon tells its own trainer")
class Evaluate(Struct, frozen=True, tag=True):
    """Measure the losses on public and held-out text now."""

    on: ClassVar[Thread] = "training"

    def apply(self, trainer: Worker) -> Losses:
        """Measure them."""
        public, validation = trainer.loop.measure()
        trainer.reports.everything()
        return Losses(public, validation)


@stays("what the daemon tells its own trainer")
class Stop(Struct, frozen=True, tag=True):
    """Save and exit."""

    on: ClassVar[Thread] = "receiver"

    def apply(self, trainer: Worker) -> None:
        """Let the loop end, and report how far that is."""
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
