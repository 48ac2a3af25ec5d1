"""Estimates how much of what adapters do is lost because their factors are averaged apart.

A node never holds all of a partner's parameters of one moment: a meeting exchanges one fragment. So
the newest difference to a partner is kept of each fragment, and all of them together stand for one
partner. It is the difference before the merge, when peers are the farthest apart, so the estimate
is rather too high: other fragments have been merged since. Differences come from what partners
sent and what we sent, and so they are derived from released values.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from xpeer.mixing.factors import FactorPair, misalignment
from xpeer.mixing.fragments import Fragments, padded


class Misalignment:
    """The newest differences to partners, and what they say.

    Args:
        pairs: the adapted layers of which both factors are trained.
        fragments: how the parameters are cut.
    """

    def __init__(self, pairs: Sequence[FactorPair], fragments: Fragments) -> None:
        self._pairs = list(pairs)
        self._fragments = fragments
        self._newest: dict[int, torch.Tensor] = {}

    def begin(self) -> None:
        """Forget everything: the parameters were replaced."""
        self._newest.clear()

    def copy(self, difference: torch.Tensor) -> torch.Tensor:
        """Copy a difference of a fragment, (n,) float32, before it is overwritten.

        Returns:
            (n,) bfloat16: two bytes a parameter.
        """
        return difference.to(torch.bfloat16)

    def merged(self, fragment: int, difference: torch.Tensor) -> None:
        """Remember what `copy` returned of a fragment that was merged."""
        self._newest[fragment] = difference

    def measure(self, flat: torch.Tensor) -> float | None:
        """Estimate the misalignment between us and our partners.

        Args:
            flat: (num_params,) float32, CPU: our parameters.

        Returns:
            See `factors.misalignment`; None until every fragment was merged once, unless no layer
            can be misaligned.
        """
        if not self._pairs:
            return 0.0
        if len(self._newest) < self._fragments.num_fragments:
            return None
        whole = torch.zeros(padded(flat.numel()), dtype=torch.bfloat16)
        for fragment, difference in self._newest.items():
            self._fragments.add_(whole, fragment, difference)
        return misalignment(self._pairs, flat, whole)
