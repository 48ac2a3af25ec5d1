"""When the next exchange is due: there are F of them in H local steps, or in `round.window_s`.

The steps are those of the running trainer. The count starts anew with a new trainer, and with one
that has taken over another member's parameters: earlier steps say nothing about its own.
"""

from __future__ import annotations

from dataclasses import dataclass

from xpeer.gossip.view import GossipTrainer
from xpeer.manifest.round import Round


@dataclass(frozen=True, slots=True)
class Start:
    """The trainer's counters when an exchange began."""

    epoch: int
    step: int
    window: int
    at_s: float


def interval_s(rules: Round, step_s: float) -> float:
    """Seconds from one exchange to the next that is due, for a node that trains.

    Args:
        rules: section `round` of the manifest.
        step_s: how long a step takes.
    """
    window_s = rules.window_steps * step_s
    if rules.window_s is not None and not rules.policy.waits:
        window_s = min(window_s, rules.window_s)
    return window_s / rules.fragments


class Pace:
    """The pace of one node's exchanges.

    Args:
        rules: section `round` of the manifest.
    """

    def __init__(self, rules: Round) -> None:
        self._rules = rules
        self._last: Start | None = None
        self._seen: tuple[int, int] | None = None  # (epoch, window): of rules that wait

    def began(self, trainer: GossipTrainer, now_s: float) -> Start:
        """Note that an exchange begins: the pace of the next one counts from here."""
        self._last = Start(trainer.epoch, trainer.step, trainer.window, now_s)
        self._seen = (trainer.epoch, trainer.window)
        return self._last

    def failed(self, start: Start) -> None:
        """Let an exchange that failed not count, unless another one has begun since."""
        if self._last == start:
            self._last = None

    def again(self) -> None:
        """Let the last exchange not count: its group was not complete."""
        self._last = None

    def due(self, trainer: GossipTrainer, now_s: float) -> bool:
        """Whether a node that trains may begin another exchange."""
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
            # count windows from the trainer's own start
            seen = self._seen = (trainer.epoch, trainer.window)
        return trainer.window > seen[1]
