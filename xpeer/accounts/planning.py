"""Planning of a privacy budget before anything is trained: noise, sampling, cost."""

from __future__ import annotations

import math

from msgspec import Struct

from xpeer.accounts import accountant
from xpeer.accounts.accountant import Segment
from xpeer.accounts.budget import coarse_size
from xpeer.accounts.signal import noise_norm
from xpeer.errors import ConfigError
from xpeer.leaves import Public, seen_by
from xpeer.manifest.privacy import DELTA_MAX, DELTA_MIN


@seen_by("home", "of the operator's own numbers")
class Plan(Struct, frozen=True, kw_only=True):
    """Noise, sampling and cost that a budget leads to."""

    epsilon: Public[float]
    delta: Public[float]
    unit: Public[str]
    """The unit that is counted and protected: "record" or "document"."""
    records: Public[int]
    """Number of units in the shard."""
    batch: Public[int]
    """Expected number of units a step."""
    sampling_probability: Public[float]
    steps: Public[int]
    noise_multiplier: Public[float]
    noise_to_signal: Public[float]
    """Standard deviation of the noise in each coordinate of the mean gradient, over C:
    sigma / batch. The norm of a mean of clipped gradients can't exceed C."""
    noise_norm: Public[float | None]
    """Norm of the whole noise over C: sigma / batch * sqrt(parameters). None if the number of
    parameters is unknown."""
    passes: Public[float]
    """How often the run goes over the shard, on average."""
    tokens_per_step: Public[int | None]
    """Expected tokens a step. None if the length of a record is unknown."""
    curve: Public[list[tuple[int, float]]]
    """Epsilon after some numbers of steps: (steps, epsilon), the last at the end of the run."""


def plan(
    *,
    epsilon: float,
    records: int,
    batch: int,
    steps: int,
    delta: float | None = None,
    sequence_tokens: int | None = None,
    parameters: int | None = None,
    unit: str = "record",
) -> Plan:
    """Calibrate the noise that so many private steps need. Takes seconds.

    Args:
        epsilon: budget, spent when the last step is taken.
        records: n, units in the shard.
        batch: expected units a step.
        steps: number of private steps.
        delta: None = `accountant.default_delta`.
        sequence_tokens: tokens of a record, for `tokens_per_step`; None = unknown.
        parameters: number of trained parameters, for `noise_norm`; None = unknown.
        unit: "record" or "document": what `records` and `batch` count.

    Raises:
        ConfigError: a number out of range, or out of reach.
    """
    for name, value in (("--records", records), ("--batch", batch), ("--steps", steps)):
        if value < 1:
            raise ConfigError(f"{name} {value} is not positive", "give at least 1")
    if batch > records:
        raise ConfigError(
            f"--batch {batch} is more than the {records} records", "give --batch of at most that"
        )
    if not (math.isfinite(epsilon) and epsilon > 0):
        raise ConfigError(f"--epsilon {epsilon} is not positive", "e.g. --epsilon 8")
    if delta is not None and not DELTA_MIN <= delta <= DELTA_MAX:
        raise ConfigError(
            f"--delta {delta} is not between {DELTA_MIN:g} and {DELTA_MAX:g}", "e.g. --delta 1e-5"
        )
    size = coarse_size(records)  # nodes round alike
    batch = min(batch, size)
    delta = delta or accountant.default_delta(size)
    q = batch / size
    sigma = accountant.calibrate(epsilon, delta, q, steps)
    marks = sorted({max(1, round(steps * part)) for part in (0.1, 0.25, 0.5, 0.75, 1.0)})
    return Plan(
        epsilon=epsilon,
        delta=delta,
        unit=unit,
        records=records,
        batch=batch,
        sampling_probability=q,
        steps=steps,
        noise_multiplier=sigma,
        noise_to_signal=sigma / batch,
        noise_norm=noise_norm(sigma, batch, parameters) if parameters else None,
        passes=steps * batch / records,
        tokens_per_step=batch * sequence_tokens if sequence_tokens else None,
        curve=[(at, accountant.epsilon([Segment(sigma, q, at)], delta)) for at in marks],
    )
