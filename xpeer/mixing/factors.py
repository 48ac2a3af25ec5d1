"""Low-rank factors B (out, r) and A (r, in) in a flat vector, and what averaging them apart loses.

An adapter adds B A to a layer. Peers average B and A each by itself, which is not the average of
what their adapters do. For two peers

    mean(B A) = mean(B) mean(A) + 1/4 (B1 - B2)(A1 - A2)

so the error is of second order in how far they are apart (docs/aggregation.md). All norms and
decompositions here go through matrices with r or 2 r rows: B A itself is never made.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class FactorPair:
    """Where the two trained factors of one layer lie in the flat vector."""

    a_at: int
    """First value of A."""
    b_at: int
    """First value of B."""
    rank: int
    inputs: int
    outputs: int

    def of(self, flat: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Copy B (out, rank) and A (rank, in) out of a flat vector, as float64.

        Args:
            flat: (at least P,) of any floating type, CPU.
        """
        a = flat[self.a_at : self.a_at + self.rank * self.inputs]
        b = flat[self.b_at : self.b_at + self.outputs * self.rank]
        return b.double().view(self.outputs, self.rank), a.double().view(self.rank, self.inputs)


def misalignment(
    pairs: Sequence[FactorPair], flat: torch.Tensor, difference: torch.Tensor
) -> float:
    """Compute ||mean(BA) - mean(B) mean(A)|| / ||mean(BA)|| of two peers, over all layers.

    Args:
        pairs: the layers; without any there is nothing to misalign.
        flat: (at least P,), CPU: the mean of the two peers' parameters.
        difference: (at least P,), CPU: one peer's parameters minus the other's.

    Returns:
        0 where the products agree or are zero; 1 if nothing of them is left.
    """
    lost = whole = 0.0
    for pair in pairs:
        (b, a), (db, da) = pair.of(flat), pair.of(difference)
        lost += _squared_norm(db / 4, da)
        whole += _squared_norm(torch.cat([b, db / 4], dim=1), torch.cat([a, da]))
    return math.sqrt(lost / whole) if whole > 0 else 0.0


def _squared_norm(b: torch.Tensor, a: torch.Tensor) -> float:
    """||B A||^2 = <B^T B, A A^T>."""
    return max(0.0, float(((b.T @ b) * (a @ a.T)).sum()))
