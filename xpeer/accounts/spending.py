"""What private steps may spend: steps of the swarm's run, and own steps (`xpeer finetune`).

Both kinds are charged to the same ledger, and add up to one epsilon. A node may keep back a part of
its epsilon from the swarm's run (`privacy.keep_back`). Then the run ends earlier, or with more
noise, and own steps spend the rest.

Knows no tensors, and charges nothing: that is `budget`'s business.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Protocol

from xpeer.accounts import accountant
from xpeer.accounts.accountant import Segment
from xpeer.accounts.budget import Bound, Bounds, noise_multiplier, steps_within
from xpeer.accounts.ledger import Ledger
from xpeer.errors import BudgetSpentError
from xpeer.manifest import Manifest

LEAST_REST: Final = 0.02
"""Fraction of epsilon that has to be left for own steps. With less they would learn noise."""


@dataclass(frozen=True)
class Allowance:
    """The noise of steps to come, and the limits that they keep."""

    noise_multiplier: float
    bounds: Bounds
    epsilon_kept_back: float = 0.0
    """The part of epsilon that these steps leave alone."""


class Spending(Protocol):
    """Says what one kind of steps may spend."""

    def allowance(
        self, manifest: Manifest, ledger: Ledger, delta: float, sampling_probability: float
    ) -> Allowance:
        """Ask once, when the documents of the text are declared to the ledger. Takes seconds."""


@dataclass(frozen=True)
class SwarmSpending:
    """Steps of the swarm's run. They leave what is kept back.

    Attributes:
        keep_back: fraction of epsilon that these steps may not spend.
    """

    keep_back: float = 0.0

    def allowance(
        self, manifest: Manifest, ledger: Ledger, delta: float, sampling_probability: float
    ) -> Allowance:
        """Take the run's noise, calibrated to what is not kept back, and its limits.

        Raises:
            ConfigError: no noise is enough.
        """
        part = self.part_of(manifest.privacy.epsilon)
        sigma = noise_multiplier(manifest, ledger, delta, sampling_probability, part)
        whole = manifest.privacy.epsilon
        return Allowance(sigma, self.bounds(whole, ledger), whole - part)

    def part_of(self, epsilon: float) -> float:
        """The part of epsilon that these steps may spend."""
        return epsilon * (1.0 - self.keep_back)

    def bounds(self, epsilon: float, ledger: Ledger) -> Bounds:
        """All steps together keep epsilon. Those that are not own steps keep their part of it."""

        def bounds(spent: list[Segment]) -> list[Bound]:
            own = ledger.own_segments()
            others = Bound(self.part_of(epsilon), _without(spent, own))
            whole = Bound(epsilon, spent)
            if not self.keep_back:
                return [whole]
            return [whole, others] if own else [others]

        return bounds


WHOLE: Final = SwarmSpending()
"""Nothing is kept back from the swarm's steps."""


@dataclass(frozen=True)
class OwnSpending:
    """Own steps. They spend what the swarm's run leaves, and what is kept back from it.

    Attributes:
        steps: number of own steps to come.
        swarm: what the swarm's steps may spend.
        swarm_steps: steps that the swarm's run still has. Room is left for as many of them as may
            still be taken, as if they were charged.
        noise_multiplier: sigma of own steps that go on; None = calibrate it, so that all of them
            fit.
    """

    steps: int
    swarm: SwarmSpending
    swarm_steps: int = 0
    noise_multiplier: float | None = None

    def allowance(
        self, manifest: Manifest, ledger: Ledger, delta: float, sampling_probability: float
    ) -> Allowance:
        """Calibrate the noise of own steps, and leave room for the swarm's.

        Own steps that go on are never refused here: what they have learnt can still be kept.

        Raises:
            BudgetSpentError: too little is left; says how to get a budget.
            ConfigError: no noise is enough.
        """
        epsilon, q = manifest.privacy.epsilon, sampling_probability
        to_come = self._to_come(manifest, ledger, delta, q)
        histories = [[*spent, *to_come] for spent in ledger.histories()] or [to_come]
        sigma = self.noise_multiplier
        if sigma is None:
            left = epsilon - accountant.epsilon_worst(histories, delta)
            if left < LEAST_REST * epsilon:
                kept = self.swarm.keep_back
                raise _too_little(epsilon, max(0.0, left), kept, to_come=bool(to_come))
            sigma = _calibrated(epsilon, delta, q, self.steps, histories)
        return Allowance(sigma, lambda spent: [Bound(epsilon, [*spent, *to_come])])

    def _to_come(self, manifest: Manifest, ledger: Ledger, delta: float, q: float) -> list[Segment]:
        """Steps that the swarm's run may still take."""
        if not self.swarm_steps:
            return []
        allowed, limit = self.swarm.allowance(manifest, ledger, delta, q), self.swarm_steps
        for spent in ledger.histories():
            limit = steps_within(allowed.bounds(spent), delta, allowed.noise_multiplier, q, limit)
        return [Segment(allowed.noise_multiplier, q, limit)] if limit else []


def _calibrated(
    epsilon: float, delta: float, q: float, steps: int, histories: Sequence[list[Segment]]
) -> float:
    """The least sigma with which the steps fit after each of these histories."""
    sigma = 0.0
    for spent in histories:
        further = Segment(sigma, q, steps) if sigma else None
        if further is None or accountant.epsilon([*spent, further], delta) > epsilon:
            sigma = max(sigma, accountant.calibrate(epsilon, delta, q, steps, spent))
    return sigma


def _without(spent: list[Segment], own: list[Segment]) -> list[Segment]:
    """Take own steps out of a history. What it has too few of, it loses all of."""
    fewer = {(each.noise_multiplier, each.sampling_probability): each.steps for each in own}
    rest = []
    for each in spent:
        kind = each.noise_multiplier, each.sampling_probability
        if (steps := each.steps - fewer.get(kind, 0)) > 0:
            rest.append(Segment(*kind, steps))
    return rest


def _too_little(
    epsilon: float, left: float, keep_back: float, *, to_come: bool
) -> BudgetSpentError:
    """The error where nothing is left for own steps."""
    problem = (
        f"epsilon {left:.3g} of {epsilon:g} is left for own steps, too little to learn anything"
    )
    if to_come:
        remedy = "wait for the end of the swarm's run, or take its part with --spend-all"
    elif keep_back:
        remedy = (
            f"what privacy.keep_back ({keep_back:g}) kept is spent as well: `xpeer privacy status` "
            "shows by what, `xpeer privacy documents` which files; what is spent stays spent"
        )
    else:
        remedy = (
            "set privacy.keep_back, e.g. to 0.25, before a swarm's run; what this one spent stays "
            "spent. Text that no home of this machine trained on has a whole budget: name it alone "
            "in data.shard"
        )
    return BudgetSpentError(problem, remedy)
