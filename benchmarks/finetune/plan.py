"""Which runs are wanted next, and what came of them."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import Any, Final

import msgspec

from benchmarks.finetune.jobs import EPSILON, Finetuned, Lone
from benchmarks.privacy import setting, tuning
from benchmarks.privacy.work import Job, Known

OWN_RATES: Final = (1e-3, 2e-3, 4e-3, 8e-3)
SWARM_RATES: Final = (4e-3, 8e-3)
LONE_RATES: Final = (2e-3, 4e-3)


@dataclass(frozen=True)
class Plan:
    """All that is to be run.

    Args:
        seeds: of the public start.
        quick: few steps, one rate: shows that everything runs, not what is better.
    """

    seeds: int = 3
    quick: bool = False

    def wanted(self, known: Known) -> list[Job]:
        """Runs that may be started now; those finished among them."""
        jobs: list[Job] = []
        tuned: list[tuple[Any, Any]] = [self._swarm(known)]
        for runs, best in [*tuned, *(self._lone(peer, known) for peer in self.peers)]:
            jobs += runs
            jobs += self.with_seeds(best) if best is not None else []
        return jobs

    @property
    def peers(self) -> range:
        """That are alone, too."""
        return range(1 if self.quick else setting.PEERS)

    def with_seeds(self, job: Any) -> list[Any]:
        """A tuned run with each seed; the first one is that of the tuning."""
        return [msgspec.structs.replace(job, seed=seed) for seed in range(self.seeds)]

    def rows(self, known: Known) -> list[dict[str, Any]]:
        """One for each seed and peer, when everything has ended."""
        _, swarm = self._swarm(known)
        rows = []
        for peer in self.peers:
            _, lone = self._lone(peer, known)
            for together, alone in zip(self.with_seeds(swarm), self.with_seeds(lone), strict=True):
                of_swarm, of_lone = known[together]["peers"][peer], known[alone]
                own = min(of_swarm["own"], key=lambda run: run["tuning"])
                rows.append(
                    {
                        "seed": together.seed,
                        "kind": setting.kinds()[peer],
                        "start_mixed": known[together]["start"]["mixed"],
                        "swarm": _reported(of_swarm["swarm"]),
                        "finetuned": _reported(own),
                        "alone": _reported(of_lone),
                        "rates": {"swarm": together.rate, "own": own["rate"], "alone": alone.rate},
                        "epsilon_of_swarm": known[together]["epsilon_of_swarm"],
                        "epsilon_finetuned": own["epsilon_spent"],
                        "epsilon_alone": of_lone["epsilon_spent"],
                        "own_steps": own["steps"],
                    }
                )
        return rows

    def _swarm(self, known: Known) -> tuple[list[Finetuned], Finetuned | None]:
        """Tuned by the mixed text's half that is not reported, before anybody's own steps."""
        rates = OWN_RATES[1:2] if self.quick else OWN_RATES

        def make(rate: float) -> Finetuned:
            job = Finetuned(rate=rate, seed=0, own_rates=rates)
            return _short(job, own_steps=2) if self.quick else job

        def score(figures: dict[str, Any]) -> float:
            return statistics.fmean(peer["swarm"]["tuning"] for peer in figures["peers"])

        return tuning.grid(make, score, known, SWARM_RATES[: 1 if self.quick else None])

    def _lone(self, peer: int, known: Known) -> tuple[list[Lone], Lone | None]:
        def make(rate: float) -> Lone:
            job = Lone(rate=rate, seed=0, peer=peer)
            return _short(job) if self.quick else job

        def score(figures: dict[str, Any]) -> float:
            return float(figures["tuning"])

        return tuning.grid(make, score, known, LONE_RATES[: 1 if self.quick else None])


def summary_of(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The claims. `gain`: nats per byte by which finetuned is better than alone, the mean of all
    peers; `worst_gap`: finetuned minus alone, of the peer and seed that gain least.
    """
    found: dict[str, Any] = {"epsilon": EPSILON, "seeds": len({row["seed"] for row in rows})}
    for model in ("finetuned", "alone"):
        found[f"epsilon_{model}"] = round(max(row[f"epsilon_{model}"] for row in rows), 3)
    for text in ("own", "mixed"):
        for model in ("swarm", "finetuned", "alone"):
            found[f"{model}_{text}"] = _mean(row[model][text] for row in rows)
        gaps = [row["finetuned"][text] - row["alone"][text] for row in rows]
        by_seed: dict[int, list[float]] = {}
        for gap, row in zip(gaps, rows, strict=True):
            by_seed.setdefault(row["seed"], []).append(gap)
        found[f"gain_{text}"] = -_mean(gaps)
        found[f"gain_{text}_by_seed"] = [-_mean(each) for each in by_seed.values()]
        found[f"worst_gap_{text}"] = round(max(gaps), 4)
    return found


def table(rows: list[dict[str, Any]]) -> str:
    """For people."""
    lines = [f"{'seed':>4} {'text':<10} {'':>6} {'swarm':>8} {'finetuned':>10} {'alone':>8}"]
    for row in rows:
        for text in ("own", "mixed"):
            values = "".join(f"{row[m][text]:>{w}.4f}" for m, w in COLUMNS)
            lines.append(f"{row['seed']:>4} {row['kind']:<10} {text:>6}{values}")
    return "\n".join(lines)


COLUMNS: Final = (("swarm", 9), ("finetuned", 11), ("alone", 9))


def _reported(losses: dict[str, Any]) -> dict[str, float]:
    return {name: losses[name] for name in ("own", "mixed")}


def _mean(values: Any) -> float:
    return round(statistics.fmean(values), 4)


def _short(job: Any, **more: int) -> Any:
    return msgspec.structs.replace(job, steps=5, batch=16, start_steps=20, **more)
