"""Each record's gradient by one parameter, gathered while a backward pass reaches its layers."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor, nn

from xpeer.privacy.layers import Outer, Part

_WRITTEN_RATIO: Final = 20
"""Write a record's gradient of a matrix down if the matrix has at most so many times T^2 values.
Otherwise compute its norm from T^2 inner products. Between 8 and 40 it hardly matters."""
_CANCELLED: Final = 1e-5
"""A squared norm from inner products counts as at least so many times its reach squared
(`Outer.reach`). Where terms cancel, rounding errs by up to 1e-6 of the reach squared. A partner
could choose parameters that make terms cancel, and without this bound the record would go
unclipped. Real text cancels to about 1 / T."""
_PIECE: Final = 4096
"""Values whose squares are added in float32 on a processor. Longer sums lose too much: 1e-4 of the
norm of 5 M values, 2% of that of 60 M equal ones."""


def squared_norms(gradients: Tensor) -> Tensor:
    """Squared norm of each record's gradient, (B, ...) float32 -> (B,) float64."""
    flat = gradients.flatten(1)
    if flat.device.type != "cpu":
        return torch.linalg.vector_norm(flat, dim=1, dtype=torch.float64).square()  # type: ignore[no-any-return]
    pieces = [torch.linalg.vector_norm(piece, dim=1) for piece in torch.split(flat, _PIECE, dim=1)]
    return torch.stack(pieces).double().square().sum(0)


class RecordGradients:
    """Each record's gradient by one parameter, during one pass.

    The gradient of every record is written down at once, if the matrix is small or the term is no
    sum of outer products. Then nothing else is kept of a layer. Otherwise T^2 inner products of the
    factors give the norm.

    Attributes:
        nbytes: bytes of what was taken, twice those of factors, and of what was written down.
    """

    def __init__(self, parameter: nn.Parameter, num_tokens: int) -> None:
        self._shape = parameter.shape
        self._small = parameter.numel() <= _WRITTEN_RATIO * num_tokens * num_tokens
        self._written: Tensor | None = None  # (B, *shape) float32
        self._terms: list[Outer] = []
        self.nbytes = 0

    def take(self, part: Part) -> None:
        """Add what a call of a layer contributes."""
        ends = (part.rows, part.cols) if isinstance(part, Outer) else (part,)
        self.nbytes += 2 * sum(x.nbytes for x in ends)
        if isinstance(part, Outer) and not (self._small or self._written is not None):
            self._terms.append(part)
            return
        self._write(part)
        while self._terms:
            self._write(self._terms.pop())

    def _write(self, part: Part) -> None:
        one = part.written(self._shape) if isinstance(part, Outer) else part
        if self._written is None:
            self._written = one
            self.nbytes += one.nbytes
        else:  # not in place: it may be the very gradient that flows on
            self._written = self._written + one

    def squares(self) -> Tensor | float:
        """Squared norm of each record's gradient, (B,) float64."""
        if self._written is not None:
            return squared_norms(self._written)
        total: Tensor | float = 0.0
        reach: Tensor | float = 0.0
        for i, a in enumerate(self._terms):
            for b in self._terms[i:]:
                total = total + a.inner(b) * (1.0 if a is b else 2.0)
            reach = reach + a.reach()
        return torch.maximum(torch.as_tensor(total), torch.as_tensor(_CANCELLED * reach * reach))

    def add_weighted(self, factors: Tensor, total: Tensor) -> None:
        """Add the sum over records of factor times gradient."""
        if self._written is not None:
            total.view(-1).addmv_(self._written.flatten(1).T, factors)
        for part in self._terms:
            part.add_weighted(factors, total)
