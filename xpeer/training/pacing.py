"""Decides when a window ends, whether a step may be taken, and when training is over.

What this module does not give: how many steps are charged at once (`charging`), and the charges
themselves (`accounts.budget`).
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
    """The windows, the charged steps and the end of one loop.

    Args:
        manifest: of the swarm.
        mechanism: charges the ledger.
        counters: how far training has come; this class counts the windows.
        timings: knows how long a step takes.

    Attributes:
        permits: the charged steps.
        idle: True iff there is no text. No step is taken then, but the run and the budget end as
            usual.
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
        """Number of steps in this window so far."""
        self._window_began = time.monotonic()
        """When this window began, monotonic s; set anew after a time without steps."""

    @property
    def ended(self) -> bool:
        """Whether the manifest's end condition is reached."""
        done = share_done(self._counters, self._manifest)
        return done is not None and done >= 1.0

    @property
    def state(self) -> TrainerPhase:
        """`training` if run, budget and text allow a step; else the phase that says why not."""
        if self.ended:
            return "closing"
        if self.budget_spent:
            return "budget-spent"
        return "mixing" if self.idle else "training"

    @property
    def window_left(self) -> int:
        """Number of steps until the window's end, at least one."""
        return max(1, self._manifest.round.window_steps - self._window_step)

    def begin_idle(self, *, budget_spent: bool) -> None:
        """Note that there is no text; called before the loop runs."""
        self.idle, self.budget_spent = True, budget_spent

    def obtain_step(self) -> Permission:
        """Get a charged step, or the reason why there is none.

        If the clock ends a window early, its charged steps are left for the next window.
        """
        with self._timings.waiting_for_the_ledger():
            permission = self.permits.obtain(self._timings.step_s, self.window_left)
        if permission == "spent":
            self.budget_spent = True
        return permission

    def restart_clock(self) -> None:
        """Begin the window's time now: the loop takes steps from now on."""
        self._window_began = time.monotonic()

    def begin_at(self, step: int) -> None:
        """Go on from a donor's step; gradients that were still to be used are dropped."""
        self.permits.dropped()
        self._window_step = step % self._manifest.round.window_steps

    def count_step(self, now: float) -> bool:
        """Count a step. Returns whether the window is over, by steps or by the clock.

        Args:
            now: when the step ended, monotonic s.
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
