"""What a hostile member does; everything else of it is an honest node."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Final

import torch

ATTACK_VARIABLE: Final = "HOSTILE_ATTACK"
Shown = Callable[[torch.Tensor], torch.Tensor]


def flip(theta: torch.Tensor) -> torch.Tensor:
    """Thrice the opposite of its own parameters."""
    return -3.0 * theta


class Drift:
    """Its own parameters, moved in one direction a little farther at every exchange."""

    def __init__(self) -> None:
        self._shown = 0

    def __call__(self, theta: torch.Tensor) -> torch.Tensor:
        """Move them."""
        self._shown += 1
        generator = torch.Generator().manual_seed(theta.numel())  # the same direction each time
        direction = torch.randn(theta.numel(), generator=generator)
        far = 0.02 * self._shown * float(theta.norm()) / math.sqrt(theta.numel())
        return theta + far * direction


def not_a_number(theta: torch.Tensor) -> torch.Tensor:
    """Values that can't be merged."""
    return torch.full_like(theta, 3e38)


SHOWN: Final[dict[str, Callable[[], Shown]]] = {
    "flip": lambda: flip,
    "drift": Drift,
    "overflow": lambda: not_a_number,
}
"""Attacks by what is shown."""
STALLS: Final = ("stall", "silent", "refuse")
"""Attacks by what is said: nothing after AGREE, no ACCEPT, a refusal of every proposal."""
ALL: Final = (*SHOWN, *STALLS)
LATE: Final = "late"
"""No attack: everybody merges four steps later than it could."""
