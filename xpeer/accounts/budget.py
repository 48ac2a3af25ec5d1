"""The budget of a node: it permits steps, which are charged first, until epsilon is spent.

Knows no tensors. The accountant is asked once for the largest number of steps that still fit.
After that only whole numbers are compared.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Final, NamedTuple

from xpeer.accounts import accountant
from xpeer.accounts.accountant import Segment
from xpeer.accounts.ledger import Ledger
from xpeer.accounts.register import BudgetExceededError
from xpeer.errors import ConfigError, LocalError
from xpeer.manifest import Manifest

SIGMA_SETTING: Final = "noise_multiplier"
"""Key of the calibrated sigma in the ledger."""
STEPS_MAX: Final = 10_000_000
_SMOOTHING: Final = 0.8
"""Weight of the earlier charges in the smoothed duration of a charge."""
_ANEW: Final = 0.05
"""Where other homes charge too, the steps left are counted again once this node has charged so
large a fraction of them."""


class Bound(NamedTuple):
    """A limit that further steps have to keep."""

    epsilon: float
    spent: list[Segment]
    """Steps that count towards it, besides the further ones."""


Bounds = Callable[[list[Segment]], list[Bound]]
"""The limits of further steps, for a document that was charged these steps."""


class Charged(NamedTuple):
    """Steps that a mechanism charged since it was made."""

    made: int = 0
    """Steps charged, on the disk or on the way there."""
    used: int = 0
    """Charged steps that were taken."""
    seconds: float = 0.0
    """Duration of a charge, smoothed."""
    possible: int = 0
    """Steps that the budget allows in all. Charges of earlier starts are included."""
    left: int = 0
    """Steps that may be taken now: on the disk, and not taken yet."""

    @property
    def under_way(self) -> int:
        """Steps whose charge is on the way to the disk. `charge_until` waits for it."""
        return self.made - self.used - self.left


class Budget:
    """Permission for steps of one kind, from a ledger that may hold charges of other kinds.

    `begin`, `prepare` and `use` belong to one thread.

    Args:
        ledger: ledger of this home.
        epsilon: bound for everything that any document of the shard was charged.
        bounds: further limits, which take the place of epsilon's (`spending`); None = there is that
            one.
        delta: delta at which epsilon is computed.
        noise_multiplier: sigma of the steps to come.
        sampling_probability: q of the steps to come.

    Raises:
        ConfigError: nothing was charged yet, and even one step exceeds the budget.
    """

    def __init__(
        self,
        ledger: Ledger,
        *,
        epsilon: float,
        delta: float,
        noise_multiplier: float,
        sampling_probability: float,
        bounds: Bounds | None = None,
    ) -> None:
        self._ledger, self._delta = ledger, delta
        self._bounds = bounds or (lambda spent: [Bound(epsilon, spent)])
        self._sigma, self._q = noise_multiplier, sampling_probability
        self._lock = threading.Lock()
        self._left = self._count(STEPS_MAX)
        if not self._left and not ledger.steps_charged and not any(ledger.histories()):
            part = min(bound.epsilon for bound in self._bounds([]))
            less = f", of which {part:g} is not kept back" if part < epsilon else ""
            raise ConfigError(
                f"privacy.noise_multiplier {noise_multiplier:g}: a single step, with sampling "
                f"probability {sampling_probability:.3g}, costs more than privacy.epsilon "
                f"{epsilon:g}{less}",
                "train on more text, or in a swarm with more noise (`xpeer privacy plan`)",
            )
        self._since_counted = 0
        """Steps charged since `_left` was last counted by the accountant."""
        self._charged_before = ledger.steps_charged
        self._permitted = 0
        """Steps on the disk that were not used yet."""
        self._used = 0
        self._prepared_steps = 0
        """Steps that `_prepared` is to charge; 0 while there is none."""
        self._seconds: float | None = None
        """Smoothed duration of a charge. None until the first."""
        self._possible = ledger.steps_charged + self._left
        self._prepared: Future[int] | None = None
        """A charge that runs on another thread. None until `prepare`, and again after `begin`."""
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="privacy-ledger")

    @property
    def left(self) -> int:
        """Steps that can still be charged. Takes seconds where other homes charge, too."""
        with self._lock:
            if self._ledger.shared and self._since_counted > _ANEW * self._left:
                self._left, self._since_counted = self._count(self._left), 0
            return self._left

    @property
    def overdrawn(self) -> bool:
        """Whether more steps were used than this process charged."""
        return self._used > self._ledger.steps_charged - self._charged_before

    @property
    def charged(self) -> Charged:
        """Steps charged through this budget, and how far they are."""
        made = self._used + self._permitted + self._prepared_steps
        return Charged(made, self._used, self._seconds or 0.0, self._possible, self._permitted)

    def begin(self, steps: int) -> int:
        """Charge until `steps` may be used. Prepared and unused charges count.

        The charges are on the disk when this returns. They are never refunded.

        Returns:
            Number of steps that may be used now. Fewer than asked where the budget ends; 0 when it
            is spent.

        Raises:
            LocalError: the ledger can't be written, now or when the charge was prepared.
        """
        _check_steps(steps)
        prepared, self._prepared = self._prepared, None
        if prepared is not None:
            self._permitted += prepared.result()
            self._prepared_steps = 0
        if steps > self._permitted:
            self._permitted += self._charge(steps - self._permitted)
        return self._permitted

    def prepare(self, steps: int) -> None:
        """Charge `steps` more on another thread, so that the next `begin` need not wait.

        Does nothing while an earlier prepared charge waits for `begin`. If the process ends before
        the steps are used, their charge is lost.
        """
        _check_steps(steps)
        if self._prepared is None and steps:
            self._prepared_steps = steps
            self._prepared = self._writer.submit(self._charge, steps)

    def use(self) -> None:
        """Use up one charged step.

        Raises:
            LocalError: no charged step is left.
        """
        if self._permitted < 1:
            raise LocalError(
                "a private step was asked for and none is charged", "charge_until comes first"
            )
        self._permitted -= 1
        self._used += 1

    def close(self) -> None:
        """Wait for a charge that is being written. The ledger's owner closes the ledger."""
        self._writer.shutdown(wait=True)

    def _charge(self, steps: int) -> int:
        with self._lock:
            steps = min(steps, self._left)
            while steps:
                try:
                    began = time.perf_counter()
                    self._ledger.charge(Segment(self._sigma, self._q, steps), self._fits)
                    took_s = time.perf_counter() - began
                    before_s = took_s if self._seconds is None else self._seconds
                    self._seconds = _SMOOTHING * before_s + (1 - _SMOOTHING) * took_s
                    break
                except BudgetExceededError:
                    self._left = steps = self._count(steps - 1)
            self._left -= steps
            self._since_counted += steps
            return steps

    def _count(self, limit: int) -> int:
        """Count the steps that still fit for every document of the shard, `limit` at most."""
        for spent in self._ledger.histories():
            limit = steps_within(self._bounds(spent), self._delta, self._sigma, self._q, limit)
        return limit

    def _fits(self, histories: list[list[Segment]], more: Segment) -> bool:
        return all(
            accountant.epsilon([*bound.spent, more], self._delta) <= bound.epsilon
            for spent in histories
            for bound in self._bounds(spent)
        )


def steps_within(
    bounds: Iterable[Bound], delta: float, noise_multiplier: float, q: float, limit: int
) -> int:
    """Count the further steps, `limit` at most, that keep all bounds. Takes seconds."""
    for bound in bounds:
        limit = accountant.steps_within(
            bound.epsilon, delta, bound.spent, noise_multiplier, q, limit
        )
    return limit


def delta_of(manifest: Manifest, num_units: int) -> float:
    """Delta of a shard in mode record: the manifest's, else the default for its coarse size."""
    return manifest.privacy.delta or accountant.default_delta(coarse_size(num_units))


def coarse_size(num_records: int) -> int:
    """Round the size of a shard down to its six leading bits.

    q, sigma and delta follow from the rounded size alone, so that most shards that differ by one
    record are sampled and noised alike. Whoever watches a peer can infer sigma and q from the
    magnitude of its noise and from when its budget ends.

    A step between two rounded sizes is 1.6 to 3.1 % wide. One record more or less is still visible
    at the edge of a step, and always below 64 records.
    """
    spare = max(0, num_records.bit_length() - 6)
    return num_records >> spare << spare


def noise_multiplier(
    manifest: Manifest,
    ledger: Ledger,
    delta: float,
    sampling_probability: float,
    epsilon: float | None = None,
) -> float:
    """Sigma: the manifest's, else the ledger's, else one calibrated now and kept in the ledger.

    It is calibrated so that `end.steps` steps spend epsilon; None = the whole budget. A calibrated
    sigma reveals the size of the shard, so it never leaves the node.

    Raises:
        ConfigError: neither sigma nor end.steps is set, or no sigma reaches the target.
        LocalError: the value in the ledger is no sigma.
    """
    if manifest.privacy.noise_multiplier is not None:
        return manifest.privacy.noise_multiplier
    stored = ledger.settings(SIGMA_SETTING)
    if stored is None:
        if manifest.end.steps is None:
            raise ConfigError(
                "privacy.noise_multiplier and end.steps are both unset",
                "sigma can't be calibrated; the manifest needs one of them",
            )
        target = manifest.privacy.epsilon if epsilon is None else epsilon
        sigma = accountant.calibrate(target, delta, sampling_probability, manifest.end.steps)
        stored = ledger.set_once(SIGMA_SETTING, repr(sigma))
    try:
        sigma = float(stored)
    except ValueError:
        sigma = math.nan
    if not (math.isfinite(sigma) and sigma > 0):
        raise LocalError(
            f"privacy ledger {ledger.path}: {SIGMA_SETTING} is {stored!r}",
            "restore the ledger from a copy made after the last training step",
        )
    return sigma


def _check_steps(steps: int) -> None:
    if steps < 0:
        raise ValueError(f"{steps} steps")
