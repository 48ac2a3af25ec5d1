"""Gathers the gradients of a window, for the rule that takes one optimiser step a window."""

from __future__ import annotations

import torch

from xpeer.mixing.rules import Rule


class GradientWindow:
    """The part of the loop that only gradient aggregation needs; with other rules it does nothing.

    Args:
        rule: of the manifest.

    Attributes:
        due: True iff the window's gradient is complete, and its step is still to be taken.
    """

    def __init__(self, rule: Rule) -> None:
        self.due = False
        self._gradients = rule.gradients

    @property
    def in_use(self) -> bool:
        """Whether the optimiser takes one step a window."""
        return self._gradients is not None

    @property
    def averaged(self) -> bool:
        """Whether the group's gradient has come."""
        return self._gradients is not None and self._gradients.averaged is not None

    def begin(self) -> None:
        """Start again: the parameters were replaced, and no step is due."""
        self.due = False

    def end_window(self) -> None:
        """Note that the window's gradient is complete, also if the run ends within the window."""
        self.due = self.in_use

    def end_budget(self) -> None:
        """Note that no more gradients come: those so far make the last step."""
        self.due = self._gradients is not None and self._gradients.begun

    def add(self, gradient: torch.Tensor) -> None:
        """Add a batch's gradient, (P,) float32, CPU; kept."""
        if self._gradients is not None:
            self._gradients.accumulate(gradient)

    def take(self) -> torch.Tensor | None:
        """Return the gradient to step with, (P,) float32, CPU; None with other rules."""
        self.due = False
        return None if self._gradients is None else self._gradients.take()
