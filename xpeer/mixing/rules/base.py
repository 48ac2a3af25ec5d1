"""What an aggregation rule is: it says what a fragment sends, and what the answers ask of us.

    outgoing    theta_i[f]                            -> V vectors, sent as one payload
    correct     own = Q(ours), shift = sum_j w_j (Q(theirs_j) - Q(ours))
                                                      -> c, to be added to theta_i[f]
    merged      c was added: the rule's own state follows

own + shift is the group's weighted mean of what was sent, whoever of the group was missing. Every
rule answers with a *correction*, so that training goes on between snapshot and merge; one that is
never merged changes nothing.

What a rule asks of those around it (who meets whom, when, at which weight, how many vectors) is its
policy: `xpeer/policies.py`, which needs no torch.

A rule knows nothing of partners, networks, clocks or processes. A fragment is in flight at most
once. `correct` may run on another thread than the rest, beside anything but `merged`, `moved` and
`begin` of the same fragment.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch


@dataclass(frozen=True, slots=True)
class Correction:
    """What a rule wants to be added to a fragment, after a meeting."""

    values: torch.Tensor  # (n,) float32: c / scale
    state: tuple[torch.Tensor, ...] = ()
    """What the rule has to remember once c was added."""
    scale: float = 1.0


class GradientSum(Protocol):
    """Gradients of a window, of a rule that waits (`RulePolicy.waits`), as the loop uses them.

    Attributes:
        averaged: (P,) float32: the group's mean gradient. None until it is merged.
    """

    averaged: torch.Tensor | None

    @property
    def begun(self) -> bool:
        """Whether a gradient waits for its step."""

    def accumulate(self, gradient: torch.Tensor) -> None:
        """Add a batch's gradient, (P,) float32, CPU; kept."""

    def take(self) -> torch.Tensor:
        """(P,) float32, CPU: the group's mean gradient, or our own; the next sum begins."""


class Rule:
    """One aggregation rule with its state. As it stands: plain averaging, without any state.

        theta_i[f] += sum_j w_j (Q(theta_j[f]) - Q(theta_i[f]))

    `gossip`, `fedavg`, `dynamic` and `asynchronous` are this one, and differ in the weights w_j and
    in who meets whom (`xpeer/weights.py`). Boyd et al. 2006, "Randomized gossip algorithms", eq. 1,
    is it for pairs with equal weights.

    Attributes:
        vectors: V, how many values are sent for each parameter, as its policy says.
        parameters_at: which of the V vectors holds parameters: there the distance is measured.
        movements_at: which of them says how far our parameters moved; None = none of them.
        reads_own: whether `correct` needs `own`; else it need not be decoded.
    """

    vectors: ClassVar[int] = 1
    parameters_at: ClassVar[int] = 0
    movements_at: ClassVar[int | None] = None
    reads_own: ClassVar[bool] = False

    @property
    def gradients(self) -> GradientSum | None:
        """What the loop gathers gradients in. None: the optimiser steps at each of them."""
        return None

    @property
    def is_plain(self) -> bool:
        """Whether it is this class's averaging: a correction is the shift, and nothing is kept."""
        return type(self) is Rule

    def begin(self, fragment: int, theta: torch.Tensor) -> None:
        """The fragment's parameters were set anew: at the start, or those of a donor.

        Args:
            fragment: f.
            theta: (n,) float32, CPU; may be kept, must not be changed.
        """

    def outgoing(self, fragment: int, theta: torch.Tensor) -> torch.Tensor:
        """What to send, at a step boundary: the parameters, unless a rule says otherwise.

        Args:
            fragment: f.
            theta: (n,) float32, CPU: the parameters now; must not be changed.

        Returns:
            (vectors * n,) float32, CPU.
        """
        return theta

    def correct(
        self, fragment: int, theta: torch.Tensor, own: torch.Tensor, shift: torch.Tensor
    ) -> Correction:
        """What to add to the parameters.

        Args:
            fragment: f.
            theta: (n,) float32, CPU: what `outgoing` was given.
            own: (vectors, n) float32: Q of what it returned; empty unless `reads_own`.
            shift: (vectors, n) float32: the group's weighted mean minus `own`; may be overwritten.
        """
        return Correction(shift[self.parameters_at])

    def merged(self, fragment: int, state: tuple[torch.Tensor, ...]) -> None:
        """The correction with this state was added, at a step boundary."""

    def moved(self, fragment: int, correction: torch.Tensor) -> None:
        """The parameters were averaged outside the rule (by (n,) float32): its anchors follow, so
        that this is not taken for progress of our own.
        """

    def state(self) -> dict[str, torch.Tensor]:
        """For a checkpoint: flat float32 tensors under names of the rule's choice."""
        return {}

    def restore(self, state: dict[str, torch.Tensor]) -> None:
        """What `state` gave, after `begin`; what is not in it stays as it began."""
