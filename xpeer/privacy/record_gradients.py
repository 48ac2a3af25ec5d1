"""Each record's gradient by one parameter, gathered while a backward pass reaches its layers."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor, nn

from xpeer.privacy.blocks import Blocked
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
    factors give the norm. Where a factor is too large to be kept (`Blocked`), the gradient is
    written down a block of rows at a time, together with all other terms of the same rows: so where
    terms cancel, nothing is lost.

    Attributes:
        nbytes: bytes of what was taken, twice those of factors, and of what was written down.
    """

    def __init__(self, parameter: nn.Parameter, num_tokens: int) -> None:
        self._shape = parameter.shape
        self._small = parameter.numel() <= _WRITTEN_RATIO * num_tokens * num_tokens
        self._written: Tensor | None = None  # (B, *shape) float32
        self._terms: list[Outer] = []
        self._blocked: list[Blocked] = []
        self.nbytes = 0

    def take(self, part: Part) -> None:
        """Add what a call of a layer contributes."""
        self.nbytes += 2 * _factor_bytes(part)
        if isinstance(part, Blocked):
            self._blocked.append(part)
        elif isinstance(part, Outer) and (self._blocked or not self._writes):
            self._terms.append(part)
        else:
            self._write(part)
            while self._terms and not self._blocked:
                self._write(self._terms.pop())

    @property
    def _writes(self) -> bool:
        return self._small or self._written is not None

    def _write(self, part: Outer | Tensor) -> None:
        one = part.written(self._shape) if isinstance(part, Outer) else part
        if self._written is None:
            self._written = one
            self.nbytes += one.nbytes
        else:  # not in place: it may be the very gradient that flows on
            self._written = self._written + one

    def squares(self) -> Tensor | float:
        """Squared norm of each record's gradient, (B,) float64."""
        if self._blocked:
            return self._squares_of_blocks(*self._blocked)
        if self._written is not None:
            return squared_norms(self._written)
        total: Tensor | float = 0.0
        reach: Tensor | float = 0.0
        for i, a in enumerate(self._terms):
            for b in self._terms[i:]:
                total = total + a.inner(b) * (1.0 if a is b else 2.0)
            reach = reach + a.reach()
        return torch.maximum(torch.as_tensor(total), torch.as_tensor(_CANCELLED * reach * reach))

    def _squares_of_blocks(self, first: Blocked, *others: Blocked) -> Tensor:
        total = torch.zeros(len(first.cols), dtype=torch.float64, device=first.cols.device)
        for start, stop in first.parts():
            block = first.block(start, stop)
            for other in others:
                block += other.block(start, stop)
            for term in self._terms:
                term.add_block(start, stop, block)
            if self._written is not None:
                block += self._written[:, start:stop]
            rows = torch.linalg.vector_norm(block, dim=2)
            total += rows.double().square().sum(1)
        return total

    def add_weighted(self, factors: Tensor, total: Tensor) -> None:
        """Add the sum over records of factor times gradient."""
        if self._written is not None:
            total.view(-1).addmv_(self._written.flatten(1).T, factors)
        for term in self._terms:
            term.add_weighted(factors, total)
        for blocked in self._blocked:
            blocked.add_weighted(factors, total)


def _factor_bytes(part: Part) -> int:
    if isinstance(part, Tensor):
        return part.nbytes
    return part.cols.nbytes + (part.rows.nbytes if isinstance(part, Outer) else 0)
