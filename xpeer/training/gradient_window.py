"""The gradients of a window, where a whole window makes one step of the optimiser."""

from __future__ import annotations

import torch

from xpeer.mixing.rules import Rule


class GradientWindow:
    """What gradient aggregation adds to the loop. With any other rule nothing is ever due.

    Args:
        rule: of the manifest.

    Attributes:
        due: True iff the window's gradient is complete, and its step is not taken yet.
    """

    def __init__(self, rule: Rule) -> None:
        self.due = False
        self._gradients = rule.gradients

    @property
    def in_use(self) -> bool:
        """Whether steps are taken a window at a time."""
        return self._gradients is not None

    @property
    def averaged(self) -> bool:
        """Whether the group's gradient is there."""
        return self._gradients is not None and self._gradients.averaged is not None

    def begin(self) -> None:
        """The parameters were set anew: no gradient of others is due."""
        self.due = False

    def end_window(self) -> None:
        """All gradients of the window are there; also where the run ends within it."""
        self.due = self.in_use

    def end_budget(self) -> None:
        """No more gradients come: those that there are make the last step."""
        self.due = self._gradients is not None and self._gradients.begun

    def add(self, gradient: torch.Tensor) -> None:
        """Add a batch's gradient, (P,) float32, CPU; kept."""
        if self._gradients is not None:
            self._gradients.accumulate(gradient)

    def take(self) -> torch.Tensor | None:
        """The gradient to step with, (P,) float32, CPU; None without this rule."""
        self.due = False
        return None if self._gradients is None else self._gradients.take()
