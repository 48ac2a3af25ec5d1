"""Whether a private run can learn at all: its noise against its signal, before anything is spent.

A step's mean of clipped gradients has norm C at most. The noise that is added to it has norm
sigma C sqrt(d) / B over d parameters with B units a step. Over T steps along one direction the
signal grows as T and the noise as sqrt(T). docs/privacy.md has the runs that the limits are from.
"""

from __future__ import annotations

import math
from typing import Final

STEP_MAX: Final = 50.0
"""Norm of a step's noise, in C: beyond, no number of steps helps in practice."""
RUN_MAX: Final = 10.0
"""The same over the square root of the number of steps."""
SIGMA_LEAST: Final = 0.5
"""Where none is known yet: what few steps of a large shard need at epsilon 8."""
REMEDY: Final = (
    "more records a step (optimiser.batch_records), more steps (end.steps), or adapters alone "
    "(`xpeer init --model FOLDER --lora-rank 8`)"
)


def noise_norm(noise_multiplier: float, batch: int, parameters: int) -> float:
    """Of a step's noise, as a share of C."""
    return noise_multiplier * math.sqrt(parameters) / max(1, batch)


def drowns(norm: float, steps: int | None) -> bool:
    """Whether so much noise leaves next to nothing of what is to be learnt.

    Args:
        norm: see `noise_norm`.
        steps: of the whole run; None = nobody knows.
    """
    return norm > STEP_MAX or (steps is not None and norm > RUN_MAX * math.sqrt(max(1, steps)))
