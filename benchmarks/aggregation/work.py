"""Finds each method's rate, then runs it with every seed; finished runs are kept."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from benchmarks import common
from benchmarks.aggregation.setting import (
    CLOUDS,
    FIRST_RATES,
    METHODS,
    RATES,
    ROUNDS,
    TUNING_ROUNDS,
    Method,
    Trial,
)  # fmt: skip
from benchmarks.aggregation.train import train
from benchmarks.simulator import corpora

VERSION: Final = 1
"""Raised whenever the same trial would give other figures."""

Figures = dict[str, Any]


def default_cache() -> Path:
    """The user's cache folder."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "xpeer" / "aggregation" / "runs.jsonl"


class Kept:
    """Runs trials, each once.

    Args:
        path: of finished ones, one line each; None: kept nowhere.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._known: dict[str, Figures] = {}
        if path is not None and path.exists():
            for line in path.read_text().splitlines():
                if line.endswith("}"):  # a line cut off by a crash is run again
                    entry = json.loads(line)
                    self._known[entry["key"]] = entry["figures"]

    def __call__(self, trial: Trial) -> Figures:
        """Its figures."""
        text = corpora.digest(corpora.collect(CLOUDS))
        named = json.dumps([VERSION, text, dataclasses.asdict(trial)])
        key = hashlib.blake2b(named.encode(), digest_size=12).hexdigest()
        if key not in self._known:
            figures = self._known[key] = train(trial)
            common.say(
                f"{trial.method}, {trial.rounds} rounds, rate {trial.rate:g}, seed {trial.seed}: "
                f"loss {figures['loss']:.4f}, accuracy {figures['accuracy']:.4f}"
            )
            if self._path is not None:
                self._path.parent.mkdir(parents=True, exist_ok=True)
                with self._path.open("a") as file:
                    file.write(json.dumps({"key": key, "figures": figures}) + "\n")
        return self._known[key]


def tuned_rate(method: Method, figures: Callable[[Trial], Figures]) -> float:
    """The best of RATES on held-out text that is reported nowhere: one with worse neighbours."""
    rates = set(FIRST_RATES)
    while True:
        losses = {
            rate: figures(Trial(method, rate, 0, TUNING_ROUNDS))["tuning"] for rate in sorted(rates)
        }
        best = RATES.index(min(losses, key=lambda rate: losses[rate]))
        missing = {RATES[i] for i in (best - 1, best + 1) if 0 <= i < len(RATES)} - rates
        if not missing:
            return RATES[best]
        rates |= missing


def results(seeds: int, figures: Callable[[Trial], Figures]) -> dict[str, dict[str, Any]]:
    """By method: its rate, and figures for every seed."""
    found: dict[str, dict[str, Any]] = {}
    for method in METHODS:
        rate = tuned_rate(method, figures)
        runs = [figures(Trial(method, rate, seed, ROUNDS)) for seed in range(seeds)]
        found[method] = {"rate": rate, "runs": runs}
    return found


def quick_results(figures: Callable[[Trial], Figures]) -> dict[str, dict[str, Any]]:
    """Few rounds at one rate: shows that everything runs, not what is better."""
    rate = FIRST_RATES[-1]
    return {m: {"rate": rate, "runs": [figures(Trial(m, rate, 0, 5))]} for m in METHODS}
