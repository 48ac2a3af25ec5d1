"""A forecast, before anything is spent, of whether a private run can learn: noise against signal.

A step's mean of clipped gradients has norm C at most. The noise that is added to it has norm
sigma C sqrt(d) / B over d parameters with B units a step. Over T steps along one direction the
signal grows as T and the noise as sqrt(T). The limits come from the runs in docs/privacy.md.
"""

from __future__ import annotations

import math
from typing import Final

STEP_MAX: Final = 50.0
"""Largest norm of a step's noise, over C. Beyond it no number of steps helps in practice."""
RUN_MAX: Final = 10.0
"""Largest norm of a step's noise, over C and the square root of the number of steps."""
SIGMA_LEAST: Final = 0.5
"""Sigma to assume where none is known yet. A few steps on a large shard need it at epsilon 8."""
REMEDY: Final = (
    "more records a step (optimiser.batch_records), more steps (end.steps), or adapters alone "
    "(`xpeer init --model FOLDER --lora-rank 8`)"
)


def noise_norm(noise_multiplier: float, batch: int, parameters: int) -> float:
    """Norm of the noise of a step's mean gradient, over C."""
    return noise_multiplier * math.sqrt(parameters) / max(1, batch)


def drowns(norm: float, steps: int | None) -> bool:
    """Whether the noise drowns the signal, so that next to nothing can be learnt.

    Args:
        norm: see `noise_norm`.
        steps: number of steps of the whole run; None = unknown.
    """
    return norm > STEP_MAX or (steps is not None and norm > RUN_MAX * math.sqrt(max(1, steps)))
