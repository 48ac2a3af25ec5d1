"""When a window ends, whether a step may be taken, and when no more are.

What this module does not give: how many steps are charged at once (`charging`), and the charges
themselves (`privacy.budget`).
"""

from __future__ import annotations

import time

from xpeer.manifest import Manifest
from xpeer.phase import TrainerPhase
from xpeer.privacy.mechanism import Mechanism
from xpeer.training.charging import Permission, Permits
from xpeer.training.schedule import Counters, share_done
from xpeer.training.timings import Timings


class Pacing:
    """Windows, charged steps and the end of one loop.

    Args:
        manifest: of the swarm.
        mechanism: charges.
        counters: how far training has come; windows are counted here.
        timings: what a step takes.

    Attributes:
        permits: charged steps.
        idle: True iff there is no text: no step is taken, and the run or the budget ends as for
            others.
        budget_spent: True iff no further step fits the budget.
    """

    def __init__(
        self, manifest: Manifest, mechanism: Mechanism, counters: Counters, timings: Timings
    ) -> None:
        self.permits = Permits(manifest, mechanism, lambda: counters)
        self.idle = self.budget_spent = False
        self._manifest = manifest
        self._counters = counters
        self._timings = timings
        self._window_step = 0
        """Steps of this window that were taken."""
        self._window_began = time.monotonic()
        """When this window began, monotonic s. Time in which no step may be taken is no part."""

    @property
    def ended(self) -> bool:
        """Whether the manifest's end condition is reached."""
        done = share_done(self._counters, self._manifest)
        return done is not None and done >= 1.0

    @property
    def state(self) -> TrainerPhase:
        """Whether the next step may be taken, as far as run, budget and text go; else why not."""
        if self.ended:
            return "closing"
        if self.budget_spent:
            return "budget-spent"
        return "mixing" if self.idle else "training"

    @property
    def window_left(self) -> int:
        """Steps until the window's end, at least one."""
        return max(1, self._manifest.round.window_steps - self._window_step)

    def begin_idle(self, *, budget_spent: bool) -> None:
        """Before the loop runs: there is no text."""
        self.idle, self.budget_spent = True, budget_spent

    def obtain_step(self) -> Permission:
        """Have at least one charged step, or learn that the budget is spent.

        Charged steps that a window of the clock did not need serve the next one.
        """
        with self._timings.waiting_for_the_ledger():
            permission = self.permits.obtain(self._timings.step_s, self.window_left)
        if permission == "spent":
            self.budget_spent = True
        return permission

    def restart_clock(self) -> None:
        """The loop begins or goes on to take steps: the time before is no part of the window."""
        self._window_began = time.monotonic()

    def begin_at(self, step: int) -> None:
        """The parameters are a donor's of that step."""
        self._window_step = step % self._manifest.round.window_steps

    def count_step(self, now: float) -> bool:
        """A step was taken; whether the window is over: by steps, or by the clock.

        Args:
            now: monotonic s.
        """
        self._window_step += 1
        section = self._manifest.round
        late = section.window_s is not None and now - self._window_began >= section.window_s
        over = late or self._window_step >= section.window_steps
        if over:
            self._counters.window += 1
            self._window_step = 0
            self._window_began = now
        return over
