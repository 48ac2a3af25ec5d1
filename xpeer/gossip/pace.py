"""When the next exchange is due: F of them in H local steps, or in `round.window_s`.

Counted in steps of the running trainer. One that was started anew, or that took over another
member's parameters, begins to count anew: steps of the one before say nothing about its own.
"""

from __future__ import annotations

from dataclasses import dataclass

from xpeer.gossip.view import GossipTrainer
from xpeer.manifest import Round


@dataclass(frozen=True, slots=True)
class Start:
    """Where the trainer was when an exchange began."""

    epoch: int
    step: int
    window: int
    at_s: float


class Pace:
    """Of one node's exchanges.

    Args:
        rules: of the manifest.
    """

    def __init__(self, rules: Round) -> None:
        self._rules = rules
        self._last: Start | None = None
        self._seen: tuple[int, int] | None = None  # (epoch, window): of rules that wait

    def began(self, trainer: GossipTrainer, now_s: float) -> Start:
        """An exchange begins; the next one is due when the window's pace says so."""
        self._last = Start(trainer.epoch, trainer.step, trainer.window, now_s)
        self._seen = (trainer.epoch, trainer.window)
        return self._last

    def failed(self, start: Start) -> None:
        """Nothing came of it, so it does not count, unless another one has begun since."""
        if self._last == start:
            self._last = None

    def again(self) -> None:
        """The last one did not come together."""
        self._last = None

    def due(self, trainer: GossipTrainer, now_s: float) -> bool:
        """Whether a node that trains may begin another one."""
        if self._rules.policy.waits:
            return self._window_is_new(trainer)
        last = self._last
        if last is None or last.epoch != trainer.epoch or last.step > trainer.step:
            return True
        fragments = self._rules.fragments
        if (trainer.step - last.step) * fragments >= self._rules.window_steps:
            return True
        window_s = self._rules.window_s
        return window_s is not None and (now_s - last.at_s) * fragments >= window_s

    def _window_is_new(self, trainer: GossipTrainer) -> bool:
        seen = self._seen
        if seen is None or seen[0] != trainer.epoch or seen[1] > trainer.window:
            # what came before the trainer's start is nobody's business
            seen = self._seen = (trainer.epoch, trainer.window)
        return trainer.window > seen[1]
