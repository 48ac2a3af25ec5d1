"""Estimates how much of what adapters do is lost because their factors are averaged apart.

A node never holds all of a partner's parameters of one moment: a meeting exchanges one fragment. So
the newest difference to a partner is kept of each fragment, and all of them together stand for one
partner. It is the difference before the merge, when peers are the farthest apart, so the estimate
is rather too high: other fragments have been merged since. Differences come from what partners
sent and what we sent, and so they are derived from released values.

The training thread only copies the adapters' parameters, when losses are measured. All else is done
by another thread, with float64 products that take seconds for a large model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from xpeer.mixing.cut import padded
from xpeer.mixing.factors import FactorPair, misalignment
from xpeer.mixing.fragments import Fragments


class Misalignment:
    """The newest differences to partners, and what they say.

    Args:
        pairs: the adapted layers of which both factors are trained.
        fragments: how the parameters are cut.

    Attributes:
        submit: runs work, on another thread where there is one that trains.
        latest: see `factors.misalignment`. None until it was computed with every fragment merged
            once, and after the parameters were replaced. 0 if no layer can be misaligned.
    """

    def __init__(self, pairs: Sequence[FactorPair], fragments: Fragments) -> None:
        self.submit: Callable[[Callable[[], None]], object] = _at_once
        self._pairs = list(pairs)
        self.latest: float | None = None if self._pairs else 0.0
        self._fragments = fragments
        self._newest: dict[int, torch.Tensor] = {}
        self._computing = False
        """True iff work was submitted that has not ended."""
        self._parameters = 0
        """Counts how often the parameters were replaced."""

    def begin(self) -> None:
        """Forget everything: the parameters were replaced."""
        self._newest.clear()
        self._parameters += 1
        self.latest = None if self._pairs else 0.0

    def copy(self, difference: torch.Tensor) -> torch.Tensor:
        """Copy a difference of a fragment, (n,) float32, before it is overwritten.

        Returns:
            (n,) bfloat16: two bytes a parameter.
        """
        return difference.to(torch.bfloat16)

    def merged(self, fragment: int, difference: torch.Tensor) -> None:
        """Remember what `copy` returned of a fragment that was merged."""
        self._newest[fragment] = difference

    def measure(self, read: Callable[[], torch.Tensor]) -> None:
        """Begin to compute `latest` from the present parameters; on the training thread.

        Nothing begins while an earlier computation runs, or before every fragment was merged once.

        Args:
            read: copies our parameters, (num_params,) float32, CPU.
        """
        complete = len(self._newest) == self._fragments.num_fragments
        if not self._pairs or self._computing or not complete:
            return
        self._computing = True
        flat, newest, parameters = read(), dict(self._newest), self._parameters

        def compute() -> None:
            try:
                found = self._of(flat, newest)
            finally:
                self._computing = False
            if parameters == self._parameters:
                self.latest = found

        self.submit(compute)

    def _of(self, flat: torch.Tensor, newest: dict[int, torch.Tensor]) -> float:
        whole = torch.zeros(padded(flat.numel()), dtype=torch.bfloat16)
        for fragment, difference in newest.items():
            self._fragments.add_(whole, fragment, difference)
        return misalignment(self._pairs, flat, whole)


def _at_once(work: Callable[[], None]) -> None:
    work()
