"""How fast the trainer takes steps, as the daemon sees it, and when it took the last one."""

from __future__ import annotations

from collections import deque

REMEMBERED_S = 3600.0
EVERY_S = 1.0
"""At most one step is remembered in this time."""


class Steps:
    """The steps of the last hour. A pause, or a new trainer, ends what is remembered.

    Attributes:
        last_step_s: when a step was last seen; None until there is one.
    """

    def __init__(self) -> None:
        self.last_step_s: float | None = None
        self._seen: deque[tuple[float, int]] = deque()

    def observe(self, step: int, now_s: float) -> None:
        """Note how many steps are done now."""
        seen = self._seen
        if seen and step < seen[-1][1]:
            self.interrupt()  # another trainer, from an older checkpoint
        elif seen and step == seen[-1][1]:
            return
        self.last_step_s = now_s
        if len(seen) > 1 and now_s - seen[-2][0] < EVERY_S:
            seen.pop()
        seen.append((now_s, step))
        while now_s - seen[0][0] > REMEMBERED_S:
            seen.popleft()

    def interrupt(self) -> None:
        """Forget the steps so far: none is taken for a while, on purpose."""
        self._seen.clear()

    @property
    def step_s(self) -> float | None:
        """Mean seconds that a step takes, rests included; None = unknown."""
        if len(self._seen) < 2:
            return None
        (began_s, first), (ended_s, last) = self._seen[0], self._seen[-1]
        return (ended_s - began_s) / (last - first) if last > first else None
