"""Which runs are wanted next, and what came of them."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import Any, Final, get_args

import msgspec

from benchmarks.lora.jobs import Factors
from benchmarks.privacy import tuning
from benchmarks.privacy.work import Job, Known
from xpeer.manifest.model import LoraTrain

EPSILONS: Final[tuple[float | None, ...]] = (8.0, None)
"""None: privacy off. The claimed one first."""
TRAINED: Final[tuple[LoraTrain, ...]] = get_args(LoraTrain)
FIRST_RATES: Final = (8e-3, 16e-3)


@dataclass(frozen=True)
class Plan:
    """All that is to be run.

    Args:
        seeds: of the public start and of the adapters.
        quick: few steps, one rate: shows that everything runs, not what is better.
    """

    seeds: int = 3
    quick: bool = False

    def wanted(self, known: Known) -> list[Job]:
        """Runs that may be started now; those finished among them."""
        jobs: list[Job] = []
        for epsilon in self.epsilons:
            for train in TRAINED:
                runs, best = self.tuned(train, epsilon, known)
                jobs += runs
                jobs += self.with_seeds(best) if best is not None else []
        return jobs

    @property
    def epsilons(self) -> tuple[float | None, ...]:
        """With privacy alone, if quick."""
        return EPSILONS[:1] if self.quick else EPSILONS

    def with_seeds(self, job: Factors) -> list[Factors]:
        """A tuned run with each seed; the first one is that of the tuning."""
        return [msgspec.structs.replace(job, seed=seed) for seed in range(self.seeds)]

    def tuned(
        self, train: LoraTrain, epsilon: float | None, known: Known
    ) -> tuple[list[Factors], Factors | None]:
        """Runs of the grid, and the best of them; see `tuning.grid`."""

        def make(rate: float) -> Factors:
            job = Factors(train=train, epsilon=epsilon, rate=rate, seed=0)
            if self.quick:
                return msgspec.structs.replace(job, steps=5, batch=16, start_steps=20)
            return job

        def score(figures: dict[str, Any]) -> float:
            return statistics.fmean(peer["tuning"] for peer in figures["peers"])

        return tuning.grid(make, score, known, FIRST_RATES[: 1 if self.quick else None])

    def rows(self, known: Known) -> list[dict[str, Any]]:
        """One for each method and epsilon, when everything has ended."""
        rows = []
        for epsilon in self.epsilons:
            for train in TRAINED:
                _, best = self.tuned(train, epsilon, known)
                if best is None:
                    raise RuntimeError(f"{train} at epsilon {epsilon} was not tuned")
                found = [known[job] for job in self.with_seeds(best)]
                losses = [statistics.fmean(p["report"] for p in f["peers"]) for f in found]
                rows.append(
                    {
                        "train": train,
                        "epsilon": epsilon,
                        "rate": best.rate,
                        "loss": losses,
                        "start": [each["start"] for each in found],
                        "misalignment": [each["misalignment"] for each in found],
                        "epsilon_spent": [each["epsilon_spent"] for each in found],
                        "trained_params": found[0]["trained_params"],
                    }
                )
        return rows


def summary_of(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The claims. `b_minus_both` below 0: B alone is better; each value is of one seed."""
    found: dict[str, Any] = {"seeds": len(rows[0]["loss"])}
    for epsilon in dict.fromkeys(row["epsilon"] for row in rows):
        name = "off" if epsilon is None else f"eps{epsilon:g}"
        pair = {row["train"]: row for row in rows if row["epsilon"] == epsilon}
        for train, row in pair.items():
            found[f"{train.lower()}_{name}"] = round(statistics.fmean(row["loss"]), 4)
            found[f"{train.lower()}_{name}_rate"] = row["rate"]
        gaps = [b - both for b, both in zip(pair["B"]["loss"], pair["both"]["loss"], strict=True)]
        found[f"b_minus_both_{name}"] = [round(gap, 4) for gap in gaps]
        found[f"resolved_{name}"] = len(gaps) > 1 and len({gap > 0 for gap in gaps}) == 1
        found[f"misalignment_{name}"] = round(max(pair["both"]["misalignment"]), 5)
    return found


def table(rows: list[dict[str, Any]]) -> str:
    """For people."""
    lines = [f"{'trained':<8} {'epsilon':>7} {'rate':>7} {'values':>8}  loss, each seed"]
    for row in rows:
        epsilon = "off" if row["epsilon"] is None else f"{row['epsilon']:g}"
        losses = ", ".join(f"{loss:.4f}" for loss in row["loss"])
        rate, values = f"{row['rate']:g}", row["trained_params"]
        lines.append(f"{row['train']:<8} {epsilon:>7} {rate:>7} {values:>8,}  {losses}")
    return "\n".join(lines)
