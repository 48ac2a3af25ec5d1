"""The privacy cost of steps: Poisson-subsampled Gaussian mechanisms, composed. Pure numbers.

Setting: neighbouring shards differ by one record, added or removed; every step samples each record
with probability q and adds N(0, sigma^2 C^2 I) to a sum whose records are clipped to norm C
(Abadi et al. 2016, arXiv:1607.00133, algorithm 1). Composition is by privacy loss distributions
(Doroshenko et al. 2022, "Connect the dots", arXiv:2207.04380), which bounds epsilon from above;
Renyi differential privacy (Mironov et al. 2019, arXiv:1908.10530) is a looser cross-check.

What this module does not give: a guarantee for documents of several records (group privacy: m
records cost m times epsilon), nor for anything that leaves the node beside the noised steps.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, Final

from xpeer.errors import ConfigError, LocalError
from xpeer.leaves import Local, seen_by
from xpeer.manifest.privacy import DELTA_MIN

_INTERVAL: Final = 2e-4
"""Widest interval into which the privacy loss is discretised. With it epsilon lies within 1e-4 of
the limit in the tests' table. It does not depend on the number of steps, so epsilon grows with
every step."""
_COARSER: Final = (20, 4, 1)
"""Factors by which a search widens the interval, one after the other. Wide intervals are much
faster, and their epsilon only errs upwards."""
_DELTA_SLACK: Final = 1e-12
"""Subtracted from delta, because a sum of a distribution's doubles errs by some 2e-14. Below
`DELTA_MIN` the distribution is not used: the simple bound alone counts."""
_AT_ONCE: Final = 1024
"""Steps composed in one go; see `_composed`."""
_HOPELESS: Final = 1000.0
"""Above this epsilon the simple bound is good enough. The distribution would need gigabytes."""
SIGMA_GRID: Final = 1000
"""Calibrated noise multipliers are multiples of a thousandth."""
SIGMA_MAX: Final = 10_000


@seen_by("home", "sigma and q follow from the shard's size")
@dataclass(frozen=True, slots=True)
class Segment:
    """Steps of one kind, charged at once.

    Args:
        noise_multiplier: sigma, standard deviation of the noise over the clipping norm; > 0.
        sampling_probability: q, in (0, 1]; 1 = every record in every step.
        steps: number of steps; >= 0.

    Raises:
        LocalError: a number is outside its range or not finite. No default replaces it.
    """

    noise_multiplier: Local[float]
    sampling_probability: Local[float]
    steps: Local[int]

    def __post_init__(self) -> None:
        """Refuse numbers for which no cost is defined."""
        _check(self.noise_multiplier, "noise multiplier", self.noise_multiplier > 0)
        q = self.sampling_probability
        _check(q, "sampling probability", 0 < q <= 1)
        if isinstance(self.steps, bool) or not isinstance(self.steps, int):
            raise LocalError(f"privacy accountant: steps {self.steps!r} is not a whole number")
        _check(self.steps, "number of steps", self.steps >= 0)


def default_delta(num_records: int) -> float:
    """The delta for n records where none is set: min(1e-5, n^-1.1), but at least 1e-10.

    It is well below 1 / n.

    Raises:
        LocalError: fewer than one record.
    """
    _check(num_records, "number of records", num_records >= 1)
    return float(max(DELTA_MIN, min(1e-5, num_records**-1.1)))


def epsilon(segments: Iterable[Segment], delta: float) -> float:
    """An upper bound of epsilon at this delta for all segments together; 0 without any.

    Args:
        segments: in any order; those with equal sigma and q are added up.
        delta: in (0, 1).

    Raises:
        LocalError: numbers out of range.
    """
    _check_delta(delta)
    return _epsilon(tuple(merge(segments)), delta, 1)


def epsilon_worst(histories: Iterable[Iterable[Segment]], delta: float) -> float:
    """The largest `epsilon` of several accounts; 0 without any."""
    return max((epsilon(history, delta) for history in histories), default=0.0)


def epsilon_rdp(segments: Iterable[Segment], delta: float) -> float:
    """A looser upper bound of the same epsilon, by Renyi differential privacy.

    Its formulas are independent of those behind `epsilon`.

    Raises:
        LocalError: numbers out of range.
    """
    _check_delta(delta)
    import dp_accounting  # noqa: PLC0415  # slow to import, and only trainers account
    from absl import logging as absl_logging  # noqa: PLC0415
    from dp_accounting import rdp  # noqa: PLC0415

    accountant = rdp.RdpAccountant()
    absl_logging.get_absl_logger().addFilter(_without_dropped_orders)
    try:
        for segment in merge(segments):
            noise = dp_accounting.GaussianDpEvent(segment.noise_multiplier)
            step = dp_accounting.PoissonSampledDpEvent(segment.sampling_probability, noise)
            accountant.compose(step, segment.steps)
    finally:
        absl_logging.get_absl_logger().removeFilter(_without_dropped_orders)
    return float(accountant.get_epsilon(delta))


def merge(segments: Iterable[Segment]) -> list[Segment]:
    """Add up segments of equal sigma and q, in order of appearance; drop those without steps."""
    steps: dict[tuple[float, float], int] = {}
    for segment in segments:
        key = (segment.noise_multiplier, segment.sampling_probability)
        steps[key] = steps.get(key, 0) + segment.steps
    return [Segment(sigma, q, count) for (sigma, q), count in steps.items() if count]


def calibrate(
    epsilon_target: float,
    delta: float,
    sampling_probability: float,
    steps: int,
    spent: Sequence[Segment] = (),
) -> float:
    """Find the smallest noise multiplier, a multiple of 1/1000, that keeps steps within the target.

    Takes seconds.

    Args:
        epsilon_target: bound for the spent and the further steps together.
        delta: in (0, 1).
        sampling_probability: q of the further steps.
        steps: number of further steps.
        spent: steps already charged, of any kinds.

    Raises:
        LocalError: numbers out of range.
        ConfigError: no noise reaches the target.
    """
    _check_target(epsilon_target, delta)
    if steps < 1:
        raise LocalError(f"privacy accountant: can't calibrate noise for {steps} steps")

    def cost(coarser: int, thousandths: int) -> float:
        segment = Segment(thousandths / SIGMA_GRID, sampling_probability, steps)
        return _epsilon(tuple(merge([*spent, segment])), delta, coarser)

    start = SIGMA_GRID
    while cost(_COARSER[0], start) > epsilon_target:
        start *= 2
        if start > SIGMA_MAX * SIGMA_GRID:
            raise ConfigError(
                f"privacy.epsilon {epsilon_target} can't be reached with {steps} steps at "
                f"sampling probability {sampling_probability}",
                "raise privacy.epsilon, or plan fewer steps",
            )
    thousandths = _last_within(epsilon_target, cost, start, 0)
    while cost(1, thousandths) > epsilon_target:  # rounding; never seen so far
        thousandths += 1
    return thousandths / SIGMA_GRID


def steps_within(
    epsilon_target: float,
    delta: float,
    spent: Sequence[Segment],
    noise_multiplier: float,
    sampling_probability: float,
    limit: int,
) -> int:
    """The largest number of further steps of one kind that fits the target after those spent.

    Takes seconds. Ask once, then compare whole numbers.

    Args:
        epsilon_target: bound for the spent and the further steps together.
        delta: in (0, 1).
        spent: steps already charged, of any kinds.
        noise_multiplier: sigma of the further steps.
        sampling_probability: q of the further steps.
        limit: largest answer that is of interest.

    Returns:
        0 .. limit.

    Raises:
        LocalError: numbers out of range.
    """
    _check_target(epsilon_target, delta)
    _check(limit, "limit of steps", limit >= 0)
    Segment(noise_multiplier, sampling_probability, limit)
    if spent and epsilon(spent, delta) > epsilon_target:
        return 0  # e.g. where a part of the budget was kept back later

    def cost(coarser: int, steps: int) -> float:
        more = Segment(noise_multiplier, sampling_probability, steps)
        return _epsilon(tuple(merge([*spent, more])), delta, coarser)

    fitting = _last_within(epsilon_target, cost, 0, limit + 1)
    while fitting and cost(1, fitting) > epsilon_target:  # rounding; never seen so far
        fitting -= 1
    return fitting


def _last_within(target: float, cost: Callable[[int, int], float], start: int, end: int) -> int:
    """Search with coarse costs first, then go on from there with finer ones; see `_Search`."""
    last, rise = start, None
    for coarser in _COARSER:
        search = _Search(target, partial(cost, coarser), last, end, rise)
        last, rise = search.last_within(), search.rise
    return last


class _Search:
    """Search for the last whole number whose cost is within a target.

    Cost rises from `start` towards `end`. The cost at `start` is assumed to be within the target.
    The cost at `end` is assumed to exceed it, and is never computed.

    Strides grow until one goes too far. Then the search interpolates (false position), but every
    third try halves the interval, since on some curves interpolation hardly advances.

    Attributes:
        rise: slope of the cost, per whole number. None until it is known.
    """

    def __init__(
        self,
        target: float,
        cost: Callable[[int], float],
        start: int,
        end: int,
        rise: float | None,
    ) -> None:
        self.rise = rise
        self._target, self._cost = target, cost
        self._near, self._near_cost = start, cost(start)
        self._far, self._far_cost = end, math.inf
        self._too_far = False
        """True iff a number beyond the target was tried."""
        self._towards = 1 if end > start else -1
        self._stride = max(1, start // 8)

    def last_within(self) -> int:
        tries = 0
        while (gap := abs(self._far - self._near)) > 1:
            tries += 1
            ahead = min(max(1, self._ahead(gap, tries)), gap - 1)
            self._try(self._near + self._towards * ahead)
        return self._near

    def _ahead(self, gap: int, tries: int) -> int:
        by_rise = (self._target - self._near_cost) / self.rise if self.rise else math.inf
        if self._too_far:
            usable = tries % 3 and math.isfinite(self._far_cost) and by_rise < gap
            return int(by_rise) if usable else gap // 2
        if tries == 1 and self.rise:
            return int(min(by_rise, gap))
        stride, self._stride = self._stride, 4 * self._stride
        return max(stride, int(min(by_rise, gap))) if self.rise else stride

    def _try(self, number: int) -> None:
        cost = self._cost(number)
        if cost > self._target:
            self._far, self._far_cost, self._too_far = number, cost, True
        before, before_cost = self._near, self._near_cost
        if cost <= self._target:
            self._near, self._near_cost = number, cost
        if self._too_far:
            before, before_cost = self._far, self._far_cost
        if self._near != before:
            self.rise = abs(before_cost - self._near_cost) / abs(before - self._near)


@lru_cache(maxsize=256)
def _epsilon(merged: tuple[Segment, ...], delta: float, coarser: int) -> float:
    if not merged:
        return 0.0
    bound = _simple_bound(merged, delta)
    if bound > _HOPELESS or delta < DELTA_MIN:
        return bound
    ranges = [_loss_range(s.noise_multiplier, s.sampling_probability) for s in merged]
    interval = max(min(_INTERVAL, min(ranges) / 1e3), max(ranges) / 2e5) * coarser
    whole: Any = None
    for segment in merged:
        one = _single(segment.noise_multiplier, segment.sampling_probability, interval)
        part = _composed(one, segment.steps)
        whole = part if whole is None else whole.compose(part)
    # both are upper bounds; at a minute delta the distribution's truncated tails make it useless
    return min(bound, max(0.0, float(whole.get_epsilon_for_delta(delta - _DELTA_SLACK))))


def _composed(one: Any, steps: int) -> Any:
    """The distribution of so many steps, composed in two stages.

    In one stage the library would raise a size to the power of the number of steps. For a million
    steps that is an integer of megabytes.
    """
    whole, rest = divmod(steps, _AT_ONCE)
    if not whole:
        return one.self_compose(steps)
    many = one.self_compose(_AT_ONCE).self_compose(whole)
    return many.compose(one.self_compose(rest)) if rest else many


@lru_cache(maxsize=16)
def _single(sigma: float, q: float, interval: float) -> Any:
    # imported late: scipy and the library take over a second
    from dp_accounting.pld import privacy_loss_distribution as pld  # noqa: PLC0415

    return pld.from_gaussian_mechanism(
        sigma, sampling_prob=q, value_discretization_interval=interval, use_connect_dots=True
    )


def _loss_range(sigma: float, q: float) -> float:
    """Largest privacy loss of a step, up to ten standard deviations of its noise."""
    unsampled = 0.5 / sigma**2 + 10.0 / sigma
    if unsampled > 500.0:  # exp would overflow, and log(q) matters little
        return unsampled
    return math.log1p(q * math.expm1(unsampled))


def _simple_bound(merged: Sequence[Segment], delta: float) -> float:
    """Renyi DP of order 2 in closed form: arXiv:1908.10530, section 3.3; 1702.07476, prop. 3."""
    order_2 = 0.0
    for segment in merged:
        inverse = 1.0 / segment.noise_multiplier
        exponent = inverse * inverse  # may be inf, where ** would raise
        if exponent < 500.0:
            exponent = math.log1p(segment.sampling_probability**2 * math.expm1(exponent))
        order_2 += segment.steps * exponent
    return order_2 + math.log(1.0 / delta)


def _without_dropped_orders(record: logging.LogRecord) -> bool:
    """Hide a harmless warning: the library leaves an order whose series does not converge out of a
    minimum, so its epsilon only errs upwards.
    """
    return "_compute_log_a_frac failed to converge" not in record.getMessage()


def _check_target(epsilon_target: float, delta: float) -> None:
    _check(epsilon_target, "epsilon", epsilon_target > 0)
    _check_delta(delta)


def _check_delta(delta: float) -> None:
    _check(delta, "delta", 0 < delta < 1)


def _check(value: float, what: str, in_range: bool) -> None:
    if not in_range or not math.isfinite(value):  # NaN is in no range
        raise LocalError(
            f"privacy accountant: {what} {value!r} is out of range",
            "correct the manifest's privacy section",
        )
