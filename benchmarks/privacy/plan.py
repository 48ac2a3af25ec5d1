"""Which jobs are wanted next, given those that are finished; the most telling first."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

import msgspec

from benchmarks.privacy import tuning
from benchmarks.privacy.attacked import Attacked
from benchmarks.privacy.inversion import Inversion
from benchmarks.privacy.lora import Lora
from benchmarks.privacy.setting import EPSILONS, PEERS
from benchmarks.privacy.utility import Method, Utility
from benchmarks.privacy.whitebox import RECORDS, Whitebox
from benchmarks.privacy.work import Job, Known

RATES: Final = (1e-3, 2e-3, 4e-3, 8e-3, 16e-3, 32e-3)
"""The grid: a factor of 2. A method is tuned on it until its best rate is no edge."""
FIRST_RATES: Final = (4e-3, 8e-3)
FIRST_EPSILON: Final = 8.0
METHODS: Final[tuple[tuple[Method, int], ...]] = (
    ("swarm", 0),
    *(("alone", peer) for peer in range(PEERS)),
)
"""Each with a rate of its own; every peer alone, too."""
SAMPLED: Final = RECORDS // 4


@dataclass(frozen=True)
class Plan:
    """All that is to be run.

    Args:
        seeds: of the public start.
        audits: runs of `Attacked` for each epsilon.
        quick: tiny jobs, one rate: shows that everything runs, not what is better.
    """

    seeds: int = 3
    audits: int = 4
    quick: bool = False

    def wanted(self, known: Known) -> list[Job]:
        """Jobs that may be started now; those finished among them."""
        jobs: list[Job] = []
        for epsilon in self.epsilons:
            for method, peer in METHODS:
                jobs += self.tuning(method, peer, epsilon, known)
                jobs += self.final(method, peer, epsilon, known) or []
            if epsilon == FIRST_EPSILON:
                jobs += self.audit_jobs()
        return [*jobs, *self.loras()]

    @property
    def epsilons(self) -> tuple[float | None, ...]:
        """The claimed one first."""
        if self.quick:
            return (FIRST_EPSILON,)
        return tuple(sorted(EPSILONS, key=lambda epsilon: epsilon != FIRST_EPSILON))

    @property
    def attacked_epsilons(self) -> tuple[float | None, ...]:
        """Of all audits."""
        return (None, FIRST_EPSILON) if self.quick else EPSILONS

    def audit_jobs(self) -> list[Job]:
        """All attacks."""
        jobs: list[Job] = []
        epsilons = self.attacked_epsilons
        for epsilon in epsilons:
            jobs += self.whiteboxes(epsilon)
            jobs.append(self.inversion(epsilon))
        for seed in range(self.audits):
            jobs += [self.attacked(epsilon, seed) for epsilon in epsilons]
        return jobs

    def attacked(self, epsilon: float | None, seed: int) -> Attacked:
        """Without privacy at the same rate: attackers gain from more steps, not from less."""
        job = Attacked(epsilon=epsilon, seed=seed, rate=8e-3)
        if not self.quick:
            return job
        return msgspec.structs.replace(
            job, steps=8, batch=16, coins=60, members=60, others=100, candidates=31, looks=2,
            start_steps=10,
        )  # fmt: skip

    def whiteboxes(self, epsilon: float | None) -> list[Whitebox]:
        """Without and with sampling. From 1,000 private runs the bound was once 3.2, once 6.3."""
        runs = 60 if self.quick else 1000 if epsilon is None else 4000
        return [Whitebox(epsilon=epsilon, batch=b, runs=runs) for b in (RECORDS, SAMPLED)]

    def inversion(self, epsilon: float | None) -> Inversion:
        """Of few texts if quick."""
        if self.quick:
            return Inversion(epsilon=epsilon, records=1, start_steps=10)
        return Inversion(epsilon=epsilon)

    def loras(self) -> list[Lora]:
        """One short row."""
        return [] if self.quick else [Lora(epsilon=FIRST_EPSILON)]

    def tuning(
        self, method: Method, peer: int, epsilon: float | None, known: Known
    ) -> list[Utility]:
        """With the first seed, on text that is reported nowhere."""
        return self._grid(method, peer, epsilon, known)[0]

    def final(
        self, method: Method, peer: int, epsilon: float | None, known: Known
    ) -> list[Utility] | None:
        """At the tuned rate, one for each seed; None = not tuned yet."""
        _, best = self._grid(method, peer, epsilon, known)
        if best is None:
            return None
        return [msgspec.structs.replace(best, seed=seed) for seed in range(self.seeds)]

    def _grid(
        self, method: Method, peer: int, epsilon: float | None, known: Known
    ) -> tuple[list[Utility], Utility | None]:
        first = FIRST_RATES[: 1 if self.quick else None]
        make = partial(self._job, method, peer, epsilon)
        return tuning.grid(make, _score, known, first, RATES)

    def _job(self, method: Method, peer: int, epsilon: float | None, rate: float) -> Utility:
        job = Utility(method=method, epsilon=epsilon, rate=rate, seed=0, peer=peer)
        if self.quick:
            return msgspec.structs.replace(job, steps=5, batch=16, start_steps=20)
        return job


def _score(figures: dict[str, Any]) -> float:
    return statistics.fmean(figures["tuning"])
