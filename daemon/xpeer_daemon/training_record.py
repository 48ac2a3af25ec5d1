"""What the trainer said last, of this run of the daemon or the one before, and what follows."""

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
    from xpeer.trainer.client import TrainerProcess


class TrainingRecord:
    """Outlives every trainer.

    Args:
        health: learns what the trainer's words say of ledger, checkpoints and text.
        clock: wall clock, seconds.
        known: what a trainer said last, in the run of the daemon before this one.

    Attributes:
        known: what a trainer said last; None until one ever has.
        last_trainer: the process that runs, or ran last in this run; None until there was one.
        died_at_step: the step that a trainer had reached when it died; None once its successor is
            as far.
        budget_spent: True iff the trainer said that no private step is left, and has taken none
            since.
        evaluation_problem: why the last losses of the run can't be measured; "" if they can, or it
            is not the time yet.
        saved_s: when a checkpoint was last written in this run; None until one was.
        steps: how fast steps are taken.
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
        self.health = health
        self._clock = clock

    def remember(
        self,
        phase: TrainerPhase,
        progress: Progress,
        privacy: PrivacySpent | None,
        trainer: TrainerProcess | None,
    ) -> None:
        """The trainer said how far it is, and perhaps what that cost."""
        before = self.known
        if phase in ("training", "budget-spent"):
            self.budget_spent = phase == "budget-spent"
        if before is not None and progress.tokens > before.progress.tokens:
            self.health.worked("ledger-failing")  # no step without a charge
        if before is not None and progress.step < before.progress.step:
            self.died_at_step = max(before.progress.step, self.died_at_step or 0)
        elif self.died_at_step is not None and progress.step >= self.died_at_step:
            self.died_at_step = None
        privacy = privacy or (before.privacy if before else None)
        self.known = Known(progress, privacy, self._clock())
        self.last_trainer = trainer or self.last_trainer

    def crashed(self, cause: XpeerError) -> None:
        """The trainer said why it can't go on, now or at its start."""
        if isinstance(cause, LedgerError):
            self.health.failed("ledger-failing", cause.problem)

    def looked_at_text(self, problem: str) -> None:
        """The trainer tried to read the text once more; "" = it could."""
        if problem:
            self.health.failed("text-missing", problem)
        else:
            self.health.worked("text-missing")

    def saved(self) -> None:
        """A checkpoint is on the disk."""
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
