"""Error feedback: what a codec drops of one difference is added to the next.

    p = d + e        send Q(p)        e = p - Q(p)

Seide et al. 2014 (1-bit SGD); Karimireddy et al. 2019, algorithm 1, which shows that it mends any
Q with ||x - Q(x)||^2 <= (1 - delta) ||x||^2, as the direct int codecs to nearest have. It is for
rules whose differences are taken from an anchor that both sides share. With gossip on parameters
there is no anchor: the residual would stay on one peer while partners change.

What it does not give: privacy. The residual is made of values that the privacy mechanism stamped,
and stays post-processing of them.
"""

from __future__ import annotations

from typing import Final

import torch

from xpeer.errors import LocalError
from xpeer.update import PrivateUpdate

_KEY: Final = "feedback."


class ErrorFeedback:
    """The residual e of every fragment; none before the first difference was sent."""

    def __init__(self) -> None:
        self._residuals: dict[int, torch.Tensor] = {}

    def correct(self, fragment: int, update: PrivateUpdate) -> PrivateUpdate:
        """p: the difference to send instead.

        Raises:
            LocalError: the fragment had another size before.
        """
        residual = self._residuals.get(fragment)
        if residual is None:
            return update
        if residual.shape != update.values.shape:
            raise LocalError(
                f"fragment {fragment} has {update.values.numel()} values, its residual "
                f"{residual.numel()}",
                "it belongs to another model",
            )
        return PrivateUpdate(update.values + residual, update.step, update.stamp)

    def sent(self, fragment: int, corrected: PrivateUpdate, arrived: torch.Tensor) -> None:
        """Keep what was lost, once the partner has accepted.

        Never call it for an exchange that failed: nothing was sent then, the anchor did not move,
        and the next difference holds this one again.

        Args:
            fragment: which.
            corrected: p, as `correct` gave it.
            arrived: Q(p), (n,) float32: our own payload, decoded.
        """
        self._residuals[fragment] = corrected.values - arrived

    def state(self) -> dict[str, torch.Tensor]:
        """For a checkpoint."""
        return {f"{_KEY}{f}": e.clone() for f, e in self._residuals.items()}

    def load(self, state: dict[str, torch.Tensor]) -> None:
        """Take what `state` gave; other entries are ignored."""
        self._residuals = {
            int(name.removeprefix(_KEY)): e.clone()
            for name, e in state.items()
            if name.startswith(_KEY)
        }
