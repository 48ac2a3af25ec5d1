"""Which runs are wanted next, given those that are finished.

A method is tuned on the grid with the first seed, until its best rate has a neighbour on either
side; then its best rates run with all seeds. Rates are chosen by the mean over seeds of the loss on
held-out text that is reported nowhere.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

from benchmarks.convergence.methods import FIRST_RATES, METHODS, RATES, VARIANTS, Setting
from benchmarks.simulator.spec import Run

CLOCK_METHODS: Final = ("spread", "spread all-reduce", "all-reduce", "FedAvg", "gossip", "alone")
TOKEN_METHODS: Final = tuple(name for name in METHODS if name != "FedAvg")
FEW_METHODS: Final = ("synchronous", "alone", "all-reduce", "spread")
KEY_METHODS: Final = (*FEW_METHODS, "spread all-reduce")

Results = Mapping[Run, dict[str, Any]]


@dataclass(frozen=True)
class Block:
    """Methods under one setting."""

    setting: Setting
    methods: tuple[str, ...]
    variants: tuple[str, ...] = ()


@dataclass(frozen=True)
class Plan:
    """All that is to be run, the most telling first.

    Args:
        blocks: in this order.
        seeds: 0 and up.
        first_rates: where tuning starts.
        extend: go on beyond those while the best is at an edge.
        finalists: rates that run with every seed under the first setting; elsewhere the best does.
    """

    blocks: tuple[Block, ...]
    seeds: int = 3
    first_rates: tuple[float, ...] = FIRST_RATES
    extend: bool = True
    finalists: int = 2

    def wanted(self, results: Results) -> list[Run]:
        """Runs that may be started now; empty = all is done."""
        return [
            run for block in self.blocks for run in self._of(block, results) if run not in results
        ]

    def rate(self, setting: Setting, method: str, results: Results) -> float | None:
        """The tuned one, once every finalist has all seeds."""
        grid = self._grid(setting, method, results)
        if any(run not in results for run in grid):
            return None
        finalists = self._finalists(setting, method, results)
        if any(
            run not in results for rate in finalists for run in self._all(setting, method, rate)
        ):
            return None

        def mean(rate: float) -> float:
            runs = self._all(setting, method, rate)
            return statistics.fmean(results[run]["tuning"] for run in runs)

        return min(finalists, key=mean)

    def tuned(self, setting: Setting, method: str, results: Results) -> list[dict[str, Any]] | None:
        """Figures of a method or variant at its rate, one entry per seed; None = not finished."""
        rate = self.rate(setting, "spread" if method in VARIANTS else method, results)
        if rate is None:
            return None
        runs = self._all(setting, method, rate)
        return [results[run] for run in runs] if all(run in results for run in runs) else None

    def _of(self, block: Block, results: Results) -> Iterator[Run]:
        for method in block.methods:
            grid = self._grid(block.setting, method, results)
            yield from grid
            if all(run in results for run in grid):
                for rate in self._finalists(block.setting, method, results):
                    yield from self._all(block.setting, method, rate)
        tuned = self.rate(block.setting, "spread", results) if block.variants else None
        if tuned is not None:
            for method in block.variants:
                yield from self._all(block.setting, method, tuned)

    def _grid(self, setting: Setting, method: str, results: Results) -> list[Run]:
        rates = set(self.first_rates)
        while True:
            grid = [setting.run(method, rate, seed=0) for rate in sorted(rates)]
            if not self.extend or any(run not in results for run in grid):
                return grid
            best = RATES.index(min(grid, key=lambda run: results[run]["tuning"]).rate)
            missing = {RATES[i] for i in (best - 1, best + 1) if 0 <= i < len(RATES)} - rates
            if not missing:
                return grid
            rates |= missing

    def _finalists(self, setting: Setting, method: str, results: Results) -> list[float]:
        grid = self._grid(setting, method, results)
        ranked = sorted(grid, key=lambda run: results[run]["tuning"])
        count = self.finalists if setting == self.blocks[0].setting else 1
        return [run.rate for run in ranked[:count]]

    def _all(self, setting: Setting, method: str, rate: float) -> list[Run]:
        return [setting.run(method, rate, seed) for seed in range(self.seeds)]


def full(peers: Iterable[int], steps: Iterable[int], seeds: int, only: str | None) -> Plan:
    """Every method at the first N and number of steps; few with more peers, or more steps."""
    blocks = []
    counts, lengths = list(peers), list(steps)
    first = Setting(counts[0], lengths[0])
    blocks += [
        Block(first, KEY_METHODS, tuple(VARIANTS)),
        Block(Setting(counts[0], lengths[0], clock=True), CLOCK_METHODS),
        Block(first, TOKEN_METHODS),
    ]
    larger = [Setting(n, lengths[0]) for n in counts[1:]]
    longer = [Setting(counts[0], length) for length in lengths[1:]]
    blocks += [Block(setting, FEW_METHODS) for setting in [*longer, *larger]]
    if only is not None:
        blocks = [Block(b.setting, tuple(m for m in b.methods if m == only), ()) for b in blocks]
    return Plan(tuple(blocks), seeds)
