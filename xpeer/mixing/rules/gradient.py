"""Gradient aggregation: one optimiser step for all, on the mean of everybody's gradients.

    g_i = mean gradient of H batches at the same theta;  theta <- AdamW(theta, mean_j g_j)

With H = 1, all peers in one group and nobody missing, this is data parallel training, step by
step. The step needs the others' gradients, so this is the only rule that waits for the network, at
most for an exchange's deadline. A peer that is then alone steps with its own gradient. The
parameters travel along and are averaged, too, so that peers that missed an exchange converge again
(D-PSGD, Lian et al. 2017, algorithm 1). What the codec drops of a gradient is added to the next one
(error feedback, Seide et al. 2014; Karimireddy et al. 2019, algorithm 2).

A meeting may end after the step of its window: partners' windows end later than ours, and so does
what they wait for. Its parameters are averaged all the same, but its gradient is not used again.
"""

from __future__ import annotations

import torch

from xpeer.errors import TrainerError
from xpeer.mixing.rules.base import Correction, GradientSum, Rule
from xpeer.policies import RULES

_RESIDUAL = "residual"


class GradientAveraging(Rule):
    """Sends gradient and parameters, all of them as one fragment.

    Attributes:
        averaged: (P,) float32: the group's mean gradient. None until it is merged.
    """

    vectors = RULES["gradient"].vectors
    parameters_at = 1
    reads_own = True

    def __init__(self) -> None:
        self.averaged: torch.Tensor | None = None
        self._sum: torch.Tensor | None = None
        self._batches = 0
        self._window = 0
        """Counts windows, to know a meeting that ends after its own one."""
        self._sent = torch.empty(0)
        """(P,) float32: g + e of the meeting in flight; empty if there is none."""
        self._sent_window = 0
        """The window that it belongs to."""
        self._residual: torch.Tensor | None = None

    def begin(self, fragment: int, theta: torch.Tensor) -> None:
        """Forget all gradients: they belong to other parameters."""
        self.averaged = self._sum = self._residual = None
        self._batches = 0
        self._window += 1

    @property
    def gradients(self) -> GradientSum:
        """This rule itself: it sums up gradients."""
        return self

    @property
    def begun(self) -> bool:
        """Whether a gradient was added since the last step."""
        return self._sum is not None

    def accumulate(self, gradient: torch.Tensor) -> None:
        """Add a batch's gradient, (P,) float32, CPU; kept."""
        self._sum = gradient if self._sum is None else self._sum.add_(gradient)
        self._batches += 1

    def take(self) -> torch.Tensor:
        """Return the group's mean gradient, or our own if there is none, and begin the next sum.

        Returns:
            (P,) float32, CPU.
        """
        gradient = self._mean() if self.averaged is None else self.averaged
        self.averaged, self._sum, self._batches = None, None, 0
        self._window += 1
        return gradient

    def outgoing(self, fragment: int, theta: torch.Tensor) -> torch.Tensor:
        """Return two vectors: g + e (the residual), then theta."""
        mean = self._mean()
        self._sent = mean if self._residual is None else mean + self._residual
        self._sent_window = self._window
        return torch.cat((self._sent, theta))

    def correct(
        self,
        fragment: int,
        theta: torch.Tensor,
        own: torch.Tensor,
        shift: torch.Tensor,
    ) -> Correction:
        """Return the parameters' shift, with the mean gradient and the new residual as state."""
        return Correction(shift[1], (own[0] + shift[0], self._sent - own[0]))

    def merged(self, fragment: int, state: tuple[torch.Tensor, ...]) -> None:
        """Keep the residual, and the mean gradient for the optimiser if its step is still due."""
        averaged, self._residual = state
        if self._sent_window == self._window:
            self.averaged = averaged
        self._sent = torch.empty(0)

    def state(self) -> dict[str, torch.Tensor]:
        """Return the residual, if there is one."""
        return {} if self._residual is None else {_RESIDUAL: self._residual}

    def restore(self, state: dict[str, torch.Tensor]) -> None:
        """Restore what `state` returned."""
        self._residual = state.get(_RESIDUAL)

    def _mean(self) -> torch.Tensor:
        if self._sum is None:
            raise TrainerError("no gradient was accumulated")
        return self._sum / self._batches
