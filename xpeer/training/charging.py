"""How many private steps are charged at once, and when that wants a checkpoint first.

A step is charged before it is taken. Whatever was charged and is not behind the parameters of a
checkpoint is lost when the process is killed, and is charged again. So

- steps are charged in small parts: one at a time where a step takes long, a window at most;
- a checkpoint is begun before so many charges lie behind the last one that losing them would cost
  more than a window, or 1% of the planned charges, whichever is more. Charges that are made while
  one is being written come on top: the loop does not wait for the disk.

What this module does not give: the charges themselves and their count (`privacy.budget`), and the
writing of checkpoints (`training.saving`).
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
"""Of a step's time: where a charge takes less, every step is charged just before it is taken."""
SHARE_AHEAD: Final = 0.02
"""Of their time, for charges that are written beside the steps before them."""
SHARE_LOST: Final = 0.01
"""Of the planned charges: as much may be lost by a kill, or one window if that is more."""
SHARE_PART: Final = 0.001
"""Of the planned charges, at least, in one part: ledgers stay small."""
_FAR: Final = 1 << 31

Begun = Literal["begun", "running", "failing"]
"""Whether a checkpoint is begun now; is one being written already; or could the last not be, and
it is too early to try again."""
Permission = Literal["step", "spent", "held"]


class Permits:
    """The charged steps of a loop. `saved` may be called on any thread; the rest belongs to one.

    Args:
        manifest: of the swarm.
        mechanism: charges.
        counters: of the loop, now.

    Attributes:
        save: begins a checkpoint, on the loop's thread; nobody saves until it is set.
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
        self._closing = False
        self._behind = 0
        self._lock = threading.Lock()
        self._durable = 0
        self._writing: list[int] = []

    @property
    def most(self) -> int:
        """Charges that a kill may lose, but for those that are made while a checkpoint is written;
        known once it was first asked for, at the loop's first step.
        """
        if self._most is None:
            self._most = max(self._window, int(SHARE_LOST * self._planned()))
        return self._most

    @property
    def unsaved(self) -> int:
        """Charges, made or on their way, that no checkpoint has behind it that was begun."""
        with self._lock:
            base = self._writing[-1] if self._writing else self._durable
        return self._mechanism.charged().made - base

    def obtain(self, step_s: float, window_left: int) -> Permission:
        """Have a charged step to take.

        Args:
            step_s: what a step takes, seconds; 0 = unknown.
            window_left: steps until the window's end.

        Returns:
            spent: no further one fits the budget. held: checkpoints can't be written, and as many
            charges as may be lost wait for one.
        """
        charged = self._mechanism.charged()
        if charged.left == 0:
            # what is under way is collected; should that be none, one more is tried
            wanted = 1 if charged.under_way else self._part(step_s, window_left)
            if wanted == 0:
                return "held"
            if self._mechanism.begin_window(wanted) == 0:
                return "spent"
        if self._is_time(step_s) and (wanted := self._part(step_s, window_left)):
            self._mechanism.prepare_window(wanted)
        return "step"

    def rest(self, window_left: int) -> int:
        """Before the loop ends: how many steps use up what was charged.

        Args:
            window_left: steps until the window's end; a whole window if it has not begun.
        """
        if not self._private:
            return 0
        self.save, self._closing = _nobody_saves, True
        if self._whole:
            return window_left if self._mechanism.charged().made > self._behind else 0
        return self._mechanism.begin_window(0)

    def moved(self) -> None:
        """The parameters are behind the steps that were taken."""
        behind = self._mechanism.charged().used
        self._counters().charges_used += behind - self._behind
        self._behind = behind

    def captured(self) -> None:
        """A checkpoint of the parameters as they are now is being written."""
        with self._lock:
            self._writing.append(self._behind)

    def saved(self, *, written: bool) -> None:
        """The oldest of those is on the disk, or can't be written."""
        with self._lock:
            behind = self._writing.pop(0)
            self._durable = behind if written else self._durable

    def _is_time(self, step_s: float) -> bool:
        """To charge ahead: where charging takes long, and late in the part."""
        charged = self._mechanism.charged()
        if not self._private or self._whole or self._closing or charged.under_way or step_s <= 0:
            return False
        takes_s = charged.seconds
        late = min(max(1, self._part_of(step_s) // 4), math.ceil(takes_s / step_s))
        return takes_s > SHARE_CHARGING * step_s and charged.left <= late < self.most

    def _part(self, step_s: float, window_left: int) -> int:
        """Steps to charge now; 0: none."""
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
        if room < least:  # it failed, now or a moment ago
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
        """Charges that this node will have made."""
        charged, counters = self._mechanism.charged(), self._counters()
        planned = planned_steps(self._manifest)
        if planned is None:
            return charged.possible
        own = planned - counters.step + counters.charges_used
        return max(0, min(own, charged.possible))

    def _until_the_end(self) -> int:
        """Steps that are still to be taken; as far as can be said."""
        counters = self._counters()
        planned = planned_steps(self._manifest)
        if planned is not None:
            return planned - counters.step
        done = share_done(counters, self._manifest)
        if not done:  # there is no end, or nothing is done yet
            return _FAR
        taken = max(1, counters.step)
        return max(1, math.floor(taken * max(0.0, 1.0 - done) / done))


def _nobody_saves() -> Begun:
    return "running"
