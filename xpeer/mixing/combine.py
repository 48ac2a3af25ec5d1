"""Combines the differences to several partners into one shift, which goes to the rule.

    mean            shift = sum_j w_j z_j
    trimmed mean    shift = mean of what is left of {0, z_1, ..., z_m} in each coordinate
                            without the k largest and the k smallest values

z_j = Q(theta_j) - Q(theta_i) as in `differences`, so that 0 is our own value. The mean keeps the
sum over the group, even if some members are missing. The trimmed mean (Yin et al. 2018, arXiv
1803.01498, definition 2) does not, and is bounded instead: with at most k hostile partners each
coordinate lies between the smallest and the largest honest value, ours included. How far away the
hostile values are makes no difference.

What it does not give: a defence against hostile values that lie among the honest ones and all pull
one way, or against more than k hostile members of one group. Knows nothing of rules and processes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Final, Protocol

import torch

from xpeer.errors import PeerError, Reason
from xpeer.manifest.round import Round

_CHUNK_VALUES: Final = 1 << 14
"""Values of each partner that are compared at a time: 64 KiB, to stay in the second-level cache."""


@dataclass(frozen=True, slots=True)
class Shift:
    """The group's combined values minus our own."""

    values: torch.Tensor  # (V, n) float32: shift / scale
    scale: float = 1.0

    def scaled(self) -> torch.Tensor:
        """The shift itself; overwrites `values`."""
        return self.values if self.scale == 1.0 else self.values.mul_(self.scale)


class Combiner(Protocol):
    """Makes one shift from the differences to one or more partners.

    Attributes:
        trusts_each: whether a single partner's values may go into exports and donations.
    """

    trusts_each: ClassVar[bool]

    def combine(self, differences: Sequence[torch.Tensor], weights: Sequence[float]) -> Shift:
        """Combine the differences; called once for each meeting, on the helper.

        Args:
            differences: z_j of each partner, (V, n) float32, CPU; may be overwritten.
            weights: w_j, in the same order.

        Raises:
            PeerError: too few partners (GROUP_TOO_SMALL).
        """


class Mean:
    """The weighted mean. Our own weight is 1 minus the partners' weights."""

    trusts_each: ClassVar[bool] = True

    def combine(self, differences: Sequence[torch.Tensor], weights: Sequence[float]) -> Shift:
        """Add up. A single difference is weighted later, as it is added to the parameters."""
        first, *others = differences
        if not others:
            return Shift(first, weights[0])
        first.mul_(weights[0])
        for values, weight in zip(others, weights[1:], strict=True):
            first.add_(values, alpha=weight)
        return Shift(first)


class TrimmedMean:
    """The mean without the k largest and the k smallest values of each coordinate.

    The values that are left count alike. Weights are ignored: a partner could claim any.

    Args:
        trim: k.
    """

    trusts_each: ClassVar[bool] = False

    def __init__(self, trim: int) -> None:
        self._trim = trim

    def combine(self, differences: Sequence[torch.Tensor], weights: Sequence[float]) -> Shift:
        """Combine at least 2 k partners: with fewer, k of them could decide alone."""
        del weights
        count, trim = 1 + len(differences), self._trim
        if count < 2 * trim + 1:
            detail = f"{count} of {2 * trim + 1} members that the combiner needs"
            raise PeerError(Reason.GROUP_TOO_SMALL, detail)
        flat = [values.view(-1) for values in differences]
        size = flat[0].numel()
        memory = torch.empty(count + 1, min(_CHUNK_VALUES, size))
        for start in range(0, size, _CHUNK_VALUES):
            part = slice(start, min(start + _CHUNK_VALUES, size))
            *rows, spare = memory[:, : part.stop - part.start]
            rows[0].zero_()
            for row, values in zip(rows[1:], flat, strict=True):
                row.copy_(values[part])
            _move_extremes(rows, trim, spare)
            kept = memory[trim : count - trim, : part.stop - part.start]
            torch.mean(kept, dim=0, out=flat[0][part])
        return Shift(differences[0])


def _move_extremes(rows: list[torch.Tensor], trim: int, spare: torch.Tensor) -> None:
    """Move each coordinate's smallest values to the first rows and its largest to the last.

    Neighbours are compared, as in bubble sort: sorting along this dimension took six times as long.

    Args:
        rows: (n,) each; changed in place.
        trim: number of rows at either end.
        spare: (n,) of any content.
    """
    for done in range(trim):
        last = len(rows) - 1 - done
        for i in range(done, last):
            _put_in_order(rows[i], rows[i + 1], spare)
        for i in range(last - 1, done, -1):
            _put_in_order(rows[i - 1], rows[i], spare)


def _put_in_order(low: torch.Tensor, high: torch.Tensor, spare: torch.Tensor) -> None:
    torch.minimum(low, high, out=spare)
    torch.maximum(low, high, out=high)
    low.copy_(spare)


def make(round_: Round) -> Combiner:
    """The combiner that the manifest names."""
    return TrimmedMean(round_.trim) if round_.combiner == "trimmed-mean" else Mean()
