"""Records' gradients by an output layer of many tokens, some of its rows at a time.

`layers.Outer` keeps two factors of a layer. Of an output layer one factor is the gradient of the
logits: as many values a record as tokens times vocabulary. `Blocked` does not keep it. It computes
some of its columns again whenever they are asked for. So a pass needs memory for a block, whatever
the vocabulary.

Both times, for the norms and for the sum, the same code computes the same blocks of the same
tensors. So what is added up is what was measured. This is checked, bit by bit: a device whose
products differ from one time to the next could carry a record over its norm.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Final

import torch
from torch import Tensor, nn

from xpeer.errors import ConfigError
from xpeer.privacy.at_once import kind_of, values_at_once
from xpeer.privacy.products import bmm

_CPU_BLOCK: Final = 1 << 22
"""Values of a block on a processor."""
_DEVICE_BLOCK: Final = 1 << 26
"""The same on other devices, where large products pay."""
_CPU_KEPT: Final = 1 << 26
_DEVICE_KEPT: Final = 1 << 25
_BITS: Final = {2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Integers of as many bytes as a value."""


@dataclass(frozen=True, slots=True)
class Blocked:
    """Gradients of B records by a matrix (p, d), as sums over T tokens of outer products.

    As `layers.Outer`, but for `rows`, which are computed when they are asked for.
    """

    rows: Callable[[int, int], Tensor]
    """Columns from, and up to: (B, T, n), in the precision in which the layer computed."""
    cols: Tensor  # (B, T, d)
    num_rows: int
    """p."""
    _measured: dict[tuple[int, int], Tensor] = field(default_factory=dict, repr=False)
    """Checksums, (B, T), of the blocks that `block` has computed."""

    def parts(self) -> Iterator[tuple[int, int]]:
        """The blocks: from, and up to. They depend on shapes and device alone."""
        batch, tokens, width = self.cols.shape
        values = values_at_once(self.cols.device, _CPU_BLOCK, _DEVICE_BLOCK)
        size = max(1, values // (batch * max(tokens, width)))
        for start in range(0, self.num_rows, size):
            yield start, min(start + size, self.num_rows)

    def block(self, start: int, stop: int) -> Tensor:
        """Rows of the gradients, (B, stop - start, d) float32; the caller may change them."""
        rows = self.rows(start, stop)
        self._measured[start, stop] = _checksum(rows)
        return bmm(rows.transpose(1, 2), self.cols)

    def sums(self) -> Tensor:
        """The sum over tokens, without the other factor: (B, p) float32; of a bias."""
        blocks = [self.rows(*part).sum(1, dtype=torch.float32) for part in self.parts()]
        return torch.cat(blocks, 1)

    def add_weighted(self, factors: Tensor, out: Tensor) -> None:
        """Add the sum over records of factor times gradient to `out`, (p, d).

        Of the blocks that `block` has computed: together they have to be all of the matrix.

        Raises:
            ConfigError: they are not what they were then. `out` is of no use any more. The node
                ends: it would happen again after a restart, and cost the charged steps each time.
        """
        if sum(stop - start for start, stop in self._measured) != self.num_rows:
            raise RuntimeError("gradients are added up that were not measured")
        cols = (self.cols.float() * factors[:, None, None]).flatten(0, 1)
        same = torch.ones((), dtype=torch.bool, device=cols.device)
        for (start, stop), checksum in self._measured.items():
            rows = self.rows(start, stop)
            same &= (_checksum(rows) == checksum).all()
            out[start:stop].addmm_(rows.flatten(0, 1).float().T, cols)
        if not bool(same):
            raise ConfigError(
                "the output layer's gradients, computed twice, differ on this device: "
                "a record could exceed privacy.clip_norm",
                "set training.precision to float32, or training.device to cpu; if it happens "
                "there, too, check the machine's memory",
            )


def _checksum(rows: Tensor) -> Tensor:
    """Sums of (B, T, n) values' bits, (B, T): of integers, so that their order does not matter, and
    modulo their size, which is 25 times as fast as in wider ones.
    """
    bits = rows.view(_BITS[rows.element_size()])
    return bits.sum(2, dtype=bits.dtype)


@dataclass(frozen=True, slots=True)
class BlockedCall:
    """One call of an output layer, whose logits are not there."""

    module: nn.Linear
    factors: Blocked


class _Kept:
    """What passes of this process do with the gradients of their logits.

    Attributes:
        allowed: True iff few of them are kept.
        of_a_record: values of the largest record of which they were kept, since `forget`.
    """

    allowed, of_a_record = True, 0


def kept_values(device: torch.device) -> int:
    """Values up to which the gradients of a pass's logits are kept. That is faster than to compute
    them again, by up to a quarter of a pass on a processor.
    """
    return _CPU_KEPT if kind_of(device) == "cpu" else _DEVICE_KEPT


def are_kept(num_values: int, num_records: int, device: torch.device) -> bool:
    """Whether a pass of some records keeps the gradients of its logits, so many values."""
    kept = _Kept.allowed and num_values <= kept_values(device)
    if kept:
        _Kept.of_a_record = max(_Kept.of_a_record, -(-num_values // max(1, num_records)))
    return kept


def forget() -> None:
    """Forget which passes there were."""
    _Kept.of_a_record = 0


def would_not_be_kept(num_records: int, device: torch.device) -> bool:
    """Whether passes kept them, since `forget`, that would not as passes of so many records."""
    return _Kept.of_a_record * num_records > kept_values(device)


@contextmanager
def none_kept() -> Iterator[None]:
    """Meanwhile no pass keeps them, however few they are."""
    _Kept.allowed = False
    try:
        yield
    finally:
        _Kept.allowed = True
