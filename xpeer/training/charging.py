"""Decides how many private steps are charged at once, and when a checkpoint has to come first.

A step is charged before it is taken. If the process is killed, all charges since the last
checkpoint are lost: their steps are not in the parameters, and have to be charged again. So

- steps are charged in small parts: a window at most, and one at a time if steps are slow;
- a checkpoint is begun before a kill could lose more charges than a window has, or than 1% of the
  planned charges, whichever is more. Charges made while the checkpoint is being written come on
  top, since the loop does not wait for the disk.

What this module does not give: the charges themselves and their count (`accounts.budget`), and the
writing of checkpoints (`trainer.saving`).
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from typing import Final, Literal

from xpeer.manifest import Manifest
from xpeer.privacy.mechanism import Mechanism
from xpeer.training.schedule import Counters, planned_steps, share_done

SHARE_CHARGING: Final = 0.01
"""Fraction of a step's time. A charge that takes less is made for one step, just before it."""
SHARE_AHEAD: Final = 0.02
"""Slower charges are made for several steps at once, to take this fraction of the time."""
SHARE_LOST: Final = 0.01
"""Fraction of the planned charges that a kill may lose; or one window, if that is more."""
SHARE_PART: Final = 0.001
"""Least fraction of the planned charges to make at a time, so that ledgers stay small."""
_FAR: Final = 1 << 31
"""More steps than any run has."""

Begun = Literal["begun", "running", "failing"]
"""begun: a checkpoint was begun now.
running: one is being written.
failing: the last one could not be written, and it is too early to try again."""
Permission = Literal["step", "spent", "held"]
"""step: a charged step may be taken.
spent: no further step fits the budget.
held: checkpoints can't be written, and too many charges are in none."""


class Permits:
    """The charged steps of a loop. Any thread may call `saved`; the rest is for one thread.

    Args:
        manifest: of the swarm.
        mechanism: charges the ledger.
        counters: returns the loop's present counters.

    Attributes:
        save: begins a checkpoint, on the loop's thread. Until it is set, and after `rest`, it
            begins none and answers "running", so that steps are charged anyway.
    """

    def __init__(
        self, manifest: Manifest, mechanism: Mechanism, counters: Callable[[], Counters]
    ) -> None:
        self.save: Callable[[], Begun] = _nobody_saves
        self._manifest = manifest
        self._mechanism = mechanism
        self._counters = counters
        self._private = manifest.privacy.policy.charges
        self._window = manifest.round.window_steps
        self._whole = manifest.round.policy.waits
        self._most: int | None = None
        """See `most`; None until it is first asked for."""
        self._closing = False
        """True iff the loop is ending: nothing is charged ahead any more."""
        self._behind = 0
        """Charges whose steps are in the parameters, or will never be."""
        self._lock = threading.Lock()
        self._durable = 0
        """Charges whose steps are in the last checkpoint on the disk."""
        self._writing: list[int] = []
        """The same number for each checkpoint that is being written, the oldest first."""

    @property
    def most(self) -> int:
        """Charges that a kill may lose, not counting those made while a checkpoint is written.

        It is computed once, at the loop's first step.
        """
        if self._most is None:
            self._most = max(self._window, int(SHARE_LOST * self._planned()))
        return self._most

    @property
    def unsaved(self) -> int:
        """Charges, made or under way, whose steps are in no checkpoint, written or begun."""
        with self._lock:
            base = self._writing[-1] if self._writing else self._durable
        return self._mechanism.charged().made - base

    def obtain(self, step_s: float, window_left: int) -> Permission:
        """Get a charged step to take, charging more steps if need be.

        Args:
            step_s: seconds that a step takes; 0 = unknown.
            window_left: steps until the window's end.
        """
        charged = self._mechanism.charged()
        if charged.left == 0:
            # collect the charges under way; if they come to none, one more is tried
            wanted = 1 if charged.under_way else self._part(step_s, window_left)
            if wanted == 0:
                return "held"
            if self._mechanism.charge_until(wanted) == 0:
                return "spent"
        if self._is_time(step_s) and (wanted := self._part(step_s, window_left)):
            self._mechanism.charge_ahead(wanted)
        return "step"

    def rest(self, window_left: int) -> int:
        """Count the steps that use up the charges, before the loop ends; nothing more is charged.

        Args:
            window_left: steps until the window's end; a whole window if it has not begun.
        """
        if not self._private:
            return 0
        self.save, self._closing = _nobody_saves, True
        if self._whole:
            return window_left if self._mechanism.charged().made > self._behind else 0
        return self._mechanism.charge_until(0)

    def moved(self) -> None:
        """Note that all steps taken so far are in the parameters."""
        behind = self._mechanism.charged().used
        self._counters().charges_used += behind - self._behind
        self._behind = behind

    def dropped(self) -> None:
        """Note that steps taken since `moved` never get into the parameters: forfeited charges."""
        self._behind = self._mechanism.charged().used

    def captured(self) -> None:
        """Note that a checkpoint of the present parameters is being written."""
        with self._lock:
            self._writing.append(self._behind)

    def saved(self, *, written: bool) -> None:
        """Note that the oldest checkpoint being written is on the disk, or can't be written."""
        with self._lock:
            behind = self._writing.pop(0)
            self._durable = behind if written else self._durable

    def _is_time(self, step_s: float) -> bool:
        """Whether to charge ahead now: charging is slow, and few charged steps are left."""
        charged = self._mechanism.charged()
        if not self._private or self._whole or self._closing or charged.under_way or step_s <= 0:
            return False
        takes_s = charged.seconds
        late = min(max(1, self._part_of(step_s) // 4), math.ceil(takes_s / step_s))
        return takes_s > SHARE_CHARGING * step_s and charged.left <= late < self.most

    def _part(self, step_s: float, window_left: int) -> int:
        """Number of steps to charge now; 0 = none."""
        if not self._private:
            return self._window
        if self._whole:
            wanted = min(window_left, max(1, self._until_the_end()))
            least = min(self._window, wanted)
        else:
            left = self._mechanism.charged().left
            wanted = min(self._part_of(step_s), max(self._until_the_end() - left, 0))
            wanted, least = max(wanted, 0 if left else 1), 1
        if not wanted:
            return 0
        begun: Begun | None = None
        if self.most - self.unsaved < least:
            begun = self.save()
        if begun == "running":
            return wanted
        room = self.most - self.unsaved
        if room < least:  # a checkpoint failed, now or a moment ago
            return wanted if self.unsaved < 2 * self.most else 0
        return wanted if self._whole else min(wanted, room)

    def _part_of(self, step_s: float) -> int:
        takes_s = self._mechanism.charged().seconds
        if step_s <= 0 or takes_s <= SHARE_CHARGING * step_s:
            by_time = 1
        else:
            by_time = math.ceil(takes_s / (SHARE_AHEAD * step_s))
        return min(self._window, max(by_time, int(SHARE_PART * self._planned())))

    def _planned(self) -> int:
        """Charges that this node will have made at the end of the run."""
        charged, counters = self._mechanism.charged(), self._counters()
        planned = planned_steps(self._manifest)
        if planned is None:
            return charged.possible
        own = planned - counters.step + counters.charges_used
        return max(0, min(own, charged.possible))

    def _until_the_end(self) -> int:
        """Steps until the end of the run, as far as they can be estimated."""
        counters = self._counters()
        planned = planned_steps(self._manifest)
        if planned is not None:
            return planned - counters.step
        done = share_done(counters, self._manifest)
        if not done:  # there is no end, or nothing is done yet
            return _FAR
        so_far = max(1, counters.step)
        return max(1, math.floor(so_far * max(0.0, 1.0 - done) / done))


def _nobody_saves() -> Begun:
    """Begin no checkpoint; "running" has `_part` charge without one."""
    return "running"
