"""A canary gradient against the sequence of noised sums: the strongest attacker we can be.

After Nasr et al. 2023 (arXiv:2302.07956), on the mechanism itself, many times over. The attacker
chooses the shard, and so knows that nothing but the canary touches one coordinate (a Dirac
gradient, clipped to C); it sees every noised sum of T steps, knows sigma and q, and decides by the
likelihood ratio whether the canary was there. Where it was not, a record without any gradient
lies in its place, so that q is the same. Its bound comes close to the claimed epsilon: what else
leaks, and by how much noise falls short, would show here first.
"""

from __future__ import annotations

import math
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import msgspec
import numpy as np
import torch
from msgspec import Struct
from scipy import stats
from torch import nn

from benchmarks.privacy import bounds, setting
from benchmarks.privacy.ledgers import open_ledger
from xpeer.manifest.privacy import Privacy
from xpeer.privacy.clipping import Engine
from xpeer.privacy.engines import choose_engine, sample_of
from xpeer.privacy.mechanism import OffMechanism, RecordMechanism
from xpeer.privacy.options import Options

RECORDS: Final = 40
STEPS: Final = 8
DELTA: Final = 1e-5
_TOKENS, _CANARY, _PAD = 12, 0, 11
_LENGTH: Final = 4
_LOUD: Final = 3.0
"""Norm of every record's gradient before it is clipped to 1."""


@dataclass(frozen=True)
class _Seen:
    """One run, as the attacker sees it."""

    sums: list[float]
    """The canary's coordinate of every step's noised sum."""
    sigma: float | None
    claimed: float | None
    """The ledger's epsilon."""


class Whitebox(Struct, frozen=True, kw_only=True, tag=True):
    """Many short runs, in half of which the canary was in the shard."""

    epsilon: float | None
    batch: int = RECORDS
    """Expected; of RECORDS. All of them: no sampling, where bounds are tightest."""
    runs: int = 1000
    """With the canary, and as many without."""

    def figures(self) -> dict[str, Any]:
        """Lower bounds beside what is claimed."""
        model = _Sums()
        rng = np.random.default_rng(0)
        ordinary = torch.from_numpy(
            rng.integers(_CANARY + 1, _PAD, (RECORDS - 1, 1)).repeat(_LENGTH, axis=1)
        )
        canary = torch.full((1, _LENGTH), _CANARY)
        silent = torch.full((1, _LENGTH), _PAD)
        engine = choose_engine(model, _losses, sample_of(torch.cat([canary, ordinary]))).engine
        scores: dict[bool, list[float]] = {True: [], False: []}
        seen = _Seen([], None, None)
        for _ in range(self.runs):
            for there in (True, False):
                records = torch.cat([ordinary, canary if there else silent])
                seen = self._one(model, engine, records)
                scores[there].append(_score(seen, self.batch / RECORDS))
        figures = self._bounds(np.array(scores[True]), np.array(scores[False]))
        return figures | {"claimed": seen.claimed, "noise_multiplier": seen.sigma}

    def _one(self, model: nn.Module, engine: Engine, records: torch.Tensor) -> _Seen:
        manifest = setting.manifest_of(self.epsilon, rate=1.0, batch=self.batch, steps=STEPS)
        weight = next(model.parameters())
        sums = []
        if self.epsilon is None:
            plain = OffMechanism(manifest, model, records, _losses)
            for _ in range(STEPS):
                plain.step_gradient()
                assert weight.grad is not None
                sums.append(float(weight.grad[_CANARY]))
            return _Seen(sums, None, None)
        manifest = msgspec.structs.replace(
            manifest, privacy=Privacy(epsilon=self.epsilon, delta=DELTA)
        )
        with tempfile.TemporaryDirectory() as folder, open_ledger(Path(folder), manifest) as ledger:
            mechanism = RecordMechanism(
                manifest, model, records, _losses, ledger, Options(engine=engine)
            )
            for _ in range(mechanism.charge_until(STEPS)):
                mechanism.step_gradient()
                assert weight.grad is not None
                sums.append(self.batch * float(weight.grad[_CANARY]))
            told = mechanism.spent()
            mechanism.close()
        return _Seen(sums, told.noise_multiplier, told.epsilon_spent)

    def _bounds(self, present: bounds.Floats, absent: bounds.Floats) -> dict[str, Any]:
        """Thresholds are chosen by one half of the runs, and judged by the other."""
        half = len(present) // 2
        together = np.concatenate([present[:half], absent[:half]])
        threshold = max(
            (float(t) for t in np.quantile(together, np.linspace(0, 1, 101))),
            key=lambda t: _telling(t, present[:half], absent[:half]),
        )
        rates = _rates(threshold, present[half:], absent[half:])
        figures: dict[str, Any] = {
            "area": bounds.area(present, absent),
            "bound": bounds.epsilon_of_rates(*rates, DELTA),
            "runs": 2 * len(present),
        }
        if self.epsilon is not None:
            family = bounds.Family(self.batch / RECORDS, STEPS, DELTA)
            figures["bound_within_family"] = family.epsilon(*rates)
        return figures


def _rates(threshold: float, present: bounds.Floats, absent: bounds.Floats) -> tuple[float, float]:
    """Upper ends of false positives and false negatives."""
    error = (1 - bounds.CONFIDENCE) / 2
    return (
        bounds.at_most(int((absent >= threshold).sum()), len(absent), error),
        bounds.at_most(int((present < threshold).sum()), len(present), error),
    )


def _telling(threshold: float, present: bounds.Floats, absent: bounds.Floats) -> float:
    """Mu of the Gaussian pair with such rates (Dong et al. 2019, arXiv:1905.02383, eq. 6): only
    chooses among thresholds.
    """
    rates = _rates(threshold, present, absent)
    return -float(sum(stats.norm.ppf(np.clip(rates, 1e-9, 1 - 1e-9))))


def _score(seen: _Seen, q: float) -> float:
    """Log of P(sums | canary in the shard) over P(sums | not), C = 1; or what is there at all."""
    if seen.sigma is None:
        return sum(map(abs, seen.sums))
    variance = seen.sigma**2
    exponents = np.array([(2 * value - 1) / (2 * variance) for value in seen.sums])
    if q == 1:
        return float(exponents.sum())
    return float(np.logaddexp(math.log(1 - q), math.log(q) + exponents).sum())


class _Sums(nn.Module):
    """One parameter for each token; a record's gradient counts its tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(_TOKENS))

    def forward(self, records: torch.Tensor) -> torch.Tensor:
        """(B, T) int64 to (B, T)."""
        return self.weight[records]


def _losses(model: nn.Module, records: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    counted = records != _PAD
    return (_LOUD * model(records) * counted).sum(1), counted.sum(1)
