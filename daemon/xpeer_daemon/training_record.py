"""What trainers said last, in this run of the daemon or the one before, and what follows."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from xpeer.errors import LedgerError, LocalError, XpeerError
from xpeer.health import Health
from xpeer.phase import TrainerPhase
from xpeer.status import PrivacySpent, Progress
from xpeer_daemon.steps import Steps
from xpeer_daemon.store import Known

if TYPE_CHECKING:
    from xpeer.trainer.answers import Starting
    from xpeer.trainer.client import TrainerProcess


class TrainingRecord:
    """The daemon's memory of its trainers. It outlives each of them.

    Args:
        health: gets conditions of ledger, checkpoints and text.
        clock: wall clock, seconds.
        known: what a trainer said last in an earlier run of the daemon; None = nothing.

    Attributes:
        known: what a trainer said last; None until one has.
        last_trainer: the trainer of this run, even if it has ended; None until there is one.
        died_at_step: step that a trainer had reached when it died; None if no trainer died, and
            once its successor has reached that step again.
        budget_spent: True iff the trainer said that no private step is left, and has taken none
            since.
        evaluation_problem: why the losses of the run's end could not be measured; "" if they could,
            and until the end.
        saved_s: when a checkpoint was last written in this run; None until one was.
        steps: how fast steps are taken.
        starting: how far the start of a trainer is; None unless one starts.
    """

    def __init__(
        self, health: Health, clock: Callable[[], float], known: Known | None = None
    ) -> None:
        self.known = known
        self.last_trainer: TrainerProcess | None = None
        self.died_at_step: int | None = None
        self.budget_spent = False
        self.evaluation_problem = ""
        self.saved_s: float | None = None
        self.steps = Steps()
        self.starting: Starting | None = None
        self.health = health
        self._clock = clock

    def remember(
        self,
        phase: TrainerPhase,
        progress: Progress,
        privacy: PrivacySpent | None,
        trainer: TrainerProcess | None,
    ) -> None:
        """Remember the trainer's counters, and what it spent if it said so.

        Args:
            phase: what its loop does.
            progress: its counters.
            privacy: what it spent; None = as it said before.
            trainer: the process that said so; None = it is not known yet.
        """
        before = self.known
        if phase in ("training", "budget-spent"):
            self.budget_spent = phase == "budget-spent"
        if before is not None and progress.tokens > before.progress.tokens:
            self.health.worked("ledger-failing")  # every step is charged first, so charging works
        if before is not None and progress.step < before.progress.step:
            self.died_at_step = max(before.progress.step, self.died_at_step or 0)
        elif self.died_at_step is not None and progress.step >= self.died_at_step:
            self.died_at_step = None
        privacy = privacy or (before.privacy if before else None)
        self.known = Known(progress, privacy, self._clock())
        self.last_trainer = trainer or self.last_trainer

    def crashed(self, cause: XpeerError) -> None:
        """Note why the trainer can't go on, now or at its start."""
        if isinstance(cause, LedgerError):
            self.health.failed("ledger-failing", cause.problem)

    def looked_at_text(self, problem: str) -> None:
        """Note whether the trainer could read the text; "" = it could."""
        if problem:
            self.health.failed("text-missing", problem)
        else:
            self.health.worked("text-missing")

    def saved(self) -> None:
        """Note that a checkpoint is on the disk."""
        self.saved_s = self._clock()
        self.health.worked("checkpoint-failing")

    async def evaluate(self, trainer: TrainerProcess) -> None:
        """Measure the losses of the run's end.

        Raises:
            LocalError: it failed.
        """
        try:
            await trainer.evaluate()
        except LocalError as e:
            self.evaluation_problem = str(e)
            raise
        self.evaluation_problem = ""
