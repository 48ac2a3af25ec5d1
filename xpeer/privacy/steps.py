"""The result of a step, and the precision in which it computes."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Final, Protocol

import torch
from torch import Tensor, nn

from xpeer.errors import ShardError
from xpeer.privacy.clipping import Clipped, RecordLosses


@dataclass(frozen=True, slots=True)
class Precision:
    """The precision of the passes through the model. Norms, sums and noise stay float32, and
    clipping is exact for the gradients that result.
    """

    name: str = "float32"
    """For logs, and for the memory of the engine that was chosen."""
    context: Callable[[], AbstractContextManager[object]] = nullcontext
    """Makes the context of a forward pass, e.g. `torch.autocast`."""


FULL: Final = Precision()


class Records(Protocol):
    """Training sequences, (n, T) int64: a tensor, or what is cut out of a file when asked."""

    @property
    def shape(self) -> torch.Size:
        """(n, T)."""

    def __len__(self) -> int:
        """Return n."""

    def __getitem__(self, index: Tensor | slice, /) -> Tensor:
        """Return some records, (k, T) int64, CPU: those of a slice, or of indices (k,) int64."""


@dataclass(frozen=True, slots=True)
class StepResult:
    """Loss and counts of a step. All but `clip_norm` is private: for this node's own operator."""

    loss: float | None
    """Mean loss over predicted tokens, nats. None = no record was sampled, NaN = none had a finite
    loss."""
    records: int
    """Number of records."""
    tokens: int
    """Number of predicted tokens."""
    zeroed: int = 0
    """Number of records that were left out, since their gradients are not finite."""
    clip_norm: float | None = None
    """C of the next step. Public, since it follows from released numbers. None unless C adapts."""


class Switchable:
    """A loss whose precision can be changed later.

    Attributes:
        precision: context of the forward passes; full precision until somebody sets it.
    """

    def __init__(self, record_losses: RecordLosses) -> None:
        self._record_losses = record_losses
        self.precision = FULL

    def __call__(self, model: nn.Module, records: Tensor) -> tuple[Tensor, Tensor]:
        """See `clipping.RecordLosses`."""
        with self.precision.context():
            return self._record_losses(model, records)


def result_of(clipped: Clipped, clip_norm: float | None = None) -> StepResult:
    """The result of a step from its batch of clipped records, and C of the next step."""
    good = torch.isfinite(clipped.norms) & torch.isfinite(clipped.losses)
    tokens = int(clipped.tokens[good].sum())
    loss = float(clipped.losses[good].sum()) / tokens if tokens else None
    if len(clipped.norms) and not bool(good.any()):
        loss = math.nan
    return StepResult(
        loss=loss,
        records=len(clipped.norms),
        tokens=int(clipped.tokens.sum()),
        zeroed=int((~torch.isfinite(clipped.norms)).sum()),
        clip_norm=clip_norm,
    )


def check_records(records: Records) -> None:
    """Refuse an empty shard.

    Raises:
        ShardError: there is no record.
    """
    if len(records.shape) != 2 or not len(records):
        raise ShardError(
            f"the shard has no records to train on (shape {tuple(records.shape)})",
            "check data.shard",
        )
