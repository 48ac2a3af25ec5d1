"""What a step tells, and the precision in which it computes."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from xpeer.errors import ShardError
from xpeer.privacy.clipping import Clipped, RecordLosses

Precision = Callable[[], AbstractContextManager[object]]
"""E.g. `torch.autocast`, around forward passes of steps. Norms, sums and noise stay float32, and
the clipping is exact for the gradients that come of it."""


@dataclass(frozen=True, slots=True)
class StepResult:
    """What a step tells. Private: for this node's own operator."""

    loss: float | None
    """Mean over predicted tokens, nats; None = no record was sampled, NaN = none had a finite
    loss."""
    records: int
    tokens: int
    """Predicted tokens."""
    zeroed: int = 0
    """Records left out for gradients that are not finite."""
    clip_norm: float | None = None
    """C of the next step, where it follows what steps release; that alone of all this is public."""


class Switchable:
    """The loss, in full precision until told otherwise."""

    def __init__(self, record_losses: RecordLosses) -> None:
        self._record_losses = record_losses
        self.precision: Precision = nullcontext

    def __call__(self, model: nn.Module, records: Tensor) -> tuple[Tensor, Tensor]:
        """See `clipping.RecordLosses`."""
        with self.precision():
            return self._record_losses(model, records)


def result_of(told: Clipped, clip_norm: float | None = None) -> StepResult:
    """What a batch of clipped records tells."""
    good = torch.isfinite(told.norms) & torch.isfinite(told.losses)
    tokens = int(told.tokens[good].sum())
    loss = float(told.losses[good].sum()) / tokens if tokens else None
    if len(told.norms) and not bool(good.any()):
        loss = math.nan
    return StepResult(
        loss=loss,
        records=len(told.norms),
        tokens=int(told.tokens.sum()),
        zeroed=int((~torch.isfinite(told.norms)).sum()),
        clip_norm=clip_norm,
    )


def check_records(records: Tensor) -> None:
    """Refuse an empty shard.

    Raises:
        ShardError: there is no record.
    """
    if records.dim() != 2 or not len(records):
        raise ShardError(
            f"the shard has no records to train on (shape {tuple(records.shape)})",
            "check data.shard",
        )
