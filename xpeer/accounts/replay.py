"""An independent computation of epsilon, by which an auditor checks the stored charges.

The accountant (`accountant`) composes distributions of dp-accounting. This module writes the
privacy loss random variable of one step down in closed form, puts it on a grid, and composes it by
Fourier transforms: Gopi, Lee and Wutschitz 2021, "Numerical composition of differential privacy",
arXiv:2106.02848, algorithm 1, with the mean-preserving rounding of section 5.2. The two have
nothing in common but the definition of a charge.

With or without a record, a step draws from P = (1 - q) N(0, sigma^2) + q N(1, sigma^2) or from
Q = N(0, sigma^2), and the loss at t is

    y(t) = ln P(t) / Q(t) = ln(1 - q + q exp((t - 1/2) / sigma^2)),    t ~ P   (a record is removed)
   -y(t),                                                              t ~ Q   (a record is added)

    delta(epsilon) = E[(1 - exp(epsilon - Y))+],    Y = the sum of the losses of all steps,

for either direction; epsilon is the larger of the two.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from xpeer.accounts.accountant import Segment, merge
from xpeer.errors import LocalError

EPSILON_ERROR: Final = 2e-3
"""Error of epsilon that theorem 1.1 allows, absolute. It sets the grid, with DELTA_ERROR."""
DELTA_ERROR: Final = 1e-3
"""Error of delta that theorem 1.1 allows, relative to delta. Let epsilon() be the composition on
the grid and error = DELTA_ERROR * delta. Then the exact epsilon lies between
epsilon(delta + error) - EPSILON_ERROR and epsilon(delta - error) + EPSILON_ERROR."""
_LEAST_DELTA: Final = 1e-11
"""Smallest delta. Rounding of doubles adds up to about 1e-12 over a grid."""
_MOST_POINTS: Final = 1 << 24
_ORDERS: Final = np.concatenate([np.linspace(0.05, 1, 20), np.linspace(1.25, 64, 252)])
"""Exponents that are tried for Chernoff's bound on the tail of the composed loss."""

_Floats = npt.NDArray[np.float64]
_Cdf = Callable[[_Floats], _Floats]


@dataclass(frozen=True, slots=True)
class Replayed:
    """An estimate of epsilon, and bounds that hold for certain, rounding of doubles aside."""

    lower: float
    estimate: float
    upper: float


@dataclass(frozen=True, slots=True)
class _Loss:
    """One step's loss, in one direction (a record is removed, or added).

    Attributes:
        cdf: y -> probability of a loss of at most y.
        low: only a negligible part of the loss lies below.
        high: only a negligible part of the loss lies above.
    """

    cdf: _Cdf
    low: float
    high: float


def epsilon_replayed(segments: Iterable[Segment], delta: float) -> float:
    """The estimate of `replay` alone."""
    return replay(segments, delta).estimate


def replay(segments: Iterable[Segment], delta: float) -> Replayed:
    """Compute epsilon at this delta for all segments together; 0 without any.

    Takes about a second.

    Args:
        segments: charged steps, in any order.
        delta: in (0, 1).

    Raises:
        LocalError: the cost is too large for a grid, or delta is too small for doubles.
    """
    charged = merge(segments)
    if not charged:
        return Replayed(0.0, 0.0, 0.0)
    if delta < _LEAST_DELTA:
        raise LocalError(f"privacy replay: delta {delta:.3g} is too small for double precision")
    directions = [_replayed(charged, delta, adding) for adding in (False, True)]
    return Replayed(
        max(0.0, *(each.lower for each in directions)),
        max(each.estimate for each in directions),
        max(each.upper for each in directions),
    )


def _replayed(charged: Sequence[Segment], delta: float, adding: bool) -> Replayed:
    values, masses = _composed(charged, delta, adding)
    error = delta * DELTA_ERROR
    return Replayed(
        _smallest(values, masses, delta + error) - EPSILON_ERROR,
        _smallest(values, masses, delta),
        _smallest(values, masses, delta - error) + EPSILON_ERROR,
    )


def _composed(charged: Sequence[Segment], delta: float, adding: bool) -> tuple[_Floats, _Floats]:
    """Values of the loss of all steps on the grid, and their probabilities."""
    steps = sum(segment.steps for segment in charged)
    negligible = delta * DELTA_ERROR
    width = EPSILON_ERROR / math.sqrt(steps / 2 * math.log(12 / negligible))
    losses = [_loss(segment, negligible / (8 * steps), adding) for segment in charged]
    singles = [_on_grid(loss, width) for loss in losses]
    reach = _reach(singles, [segment.steps for segment in charged], negligible / 4, width)
    points = 1 << math.ceil(math.log2(2 * reach / width + 2))
    if points > _MOST_POINTS:
        raise LocalError(
            f"privacy replay: {points} grid points are needed for the charges of {steps} steps",
            "their epsilon is far beyond any target",
        )
    spectrum = np.ones(points // 2 + 1, dtype=np.complex128)
    shift = 0.0
    for (first, masses, moved), segment in zip(singles, charged, strict=True):
        ring = np.zeros(points)
        np.add.at(ring, (first + np.arange(len(masses))) % points, masses)
        spectrum *= np.fft.rfft(ring) ** segment.steps
        shift += moved * segment.steps
    composed = np.fft.irfft(spectrum, points)
    composed = np.roll(composed, points // 2).clip(min=0.0)
    values: _Floats = (np.arange(points, dtype=np.float64) - points // 2) * width + shift
    return values, composed


def _loss(segment: Segment, negligible: float, adding: bool) -> _Loss:
    from scipy.special import ndtr, ndtri  # noqa: PLC0415 - slow to import

    sigma, q = segment.noise_multiplier, segment.sampling_probability
    span = float(-ndtri(negligible)) * sigma
    least = math.log1p(-q) if q < 1 else -math.inf

    def loss(t: float) -> float:
        grows = (t - 0.5) / sigma**2
        return float(np.logaddexp(least, math.log(q) + grows))

    def draw(y: _Floats) -> _Floats:
        """The draw t at which the loss is y; minus infinity if y is below the least loss."""
        above = y > least
        inside = np.where(above, y, 1.0)
        # ln(e^y - (1 - q)) without overflow
        rest = inside + np.log1p(-np.exp(np.minimum(least - inside, -1e-300)))
        return np.where(above, sigma**2 * (rest - math.log(q)) + 0.5, -np.inf)

    if adding:

        def added(y: _Floats) -> _Floats:
            below: _Floats = ndtr(-draw(-y) / sigma)  # P_Q(-y(t) <= y) = P_Q(t >= t(-y))
            return below

        return _Loss(added, -loss(span), -loss(-span))

    def removed(y: _Floats) -> _Floats:
        t = draw(y)
        below: _Floats = (1 - q) * ndtr(t / sigma) + q * ndtr((t - 1) / sigma)
        return below

    return _Loss(removed, loss(-span), loss(1 + span))


def _on_grid(loss: _Loss, width: float) -> tuple[int, _Floats, float]:
    """Put a loss on multiples of `width`.

    Returns:
        Index of the first point; probabilities of the points; what to add to each point, so that
        the mean on the grid is that of the truncated loss.
    """
    first = math.floor(loss.low / width) - 1
    last = math.ceil(loss.high / width) + 1
    if last - first > _MOST_POINTS:
        raise LocalError("privacy replay: one step costs too much for a grid")
    edges: _Floats = (np.arange(first, last + 2, dtype=np.float64) - 0.5) * width
    below = loss.cdf(edges)
    masses = np.diff(below)
    total = masses.sum()
    masses = masses / total
    points = np.arange(first, last + 1) * width
    # E[Y] = integral of the tails, by parts on a finer grid
    return first, masses, _mean(loss, edges[0], edges[-1], total) - float(points @ masses)


def _mean(loss: _Loss, low: float, high: float, total: float) -> float:
    """Mean of the loss between two values: high - the integral of its distribution function."""
    nodes, weights = np.polynomial.legendre.leggauss(8)
    cuts = np.linspace(low, high, 4097)
    half = np.diff(cuts) / 2
    middle = (cuts[:-1] + cuts[1:]) / 2
    below_low = float(loss.cdf(np.array([low]))[0])
    at = middle[:, None] + half[:, None] * nodes
    inside = (loss.cdf(at.ravel()).reshape(at.shape) - below_low) / total
    return high - float(((inside * weights).sum(1) * half).sum())


def _reach(
    singles: Sequence[tuple[int, _Floats, float]],
    steps: Sequence[int],
    negligible: float,
    width: float,
) -> float:
    """Find L such that the composed loss leaves -L..L with negligible probability (Chernoff)."""
    bound = {1.0: np.zeros(len(_ORDERS)), -1.0: np.zeros(len(_ORDERS))}
    for (first, masses, moved), count in zip(singles, steps, strict=True):
        values = (first + np.arange(len(masses))) * width + moved
        positive = masses > 0
        logs, values = np.log(masses[positive]), values[positive]
        for sign, sums in bound.items():
            for i, order in enumerate(_ORDERS):
                exponents = logs + sign * order * values
                top = exponents.max()
                sums[i] += count * (top + math.log(np.exp(exponents - top).sum()))
    tail = math.log(1 / negligible)
    return max(float(((sums + tail) / _ORDERS).min()) for sums in bound.values()) + 2 * width


def _smallest(values: _Floats, masses: _Floats, delta: float) -> float:
    """The epsilon >= 0 at which delta(epsilon) is this delta."""
    tail = np.cumsum(masses[::-1])[::-1]
    with np.errstate(over="ignore"):
        weighted = np.cumsum((masses * np.exp(-values))[::-1])[::-1]

    def delta_at(epsilon: float) -> float:
        first = int(np.searchsorted(values, epsilon, side="right"))
        if first >= len(values):
            return 0.0
        return float(tail[first] - math.exp(epsilon) * weighted[first])

    low, high = 0.0, max(0.0, float(values[-1]))
    if delta_at(low) <= delta:
        return 0.0
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if delta_at(middle) > delta else (low, middle)
    return high
