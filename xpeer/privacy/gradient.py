"""One private step: sample, clip, add up, add noise. Knows no ledger: `mechanism` charges first.

    grad = (sum over sampled units of what they give, norm C at most + N(0, sigma^2 C^2 I)) / B

with q = B / n; B is the number of units expected, not the number sampled, which is private.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from xpeer.manifest import Manifest
from xpeer.privacy.clipping import Clipped, Engine
from xpeer.privacy.noise import SecretGenerator
from xpeer.privacy.norms import ClipNorm
from xpeer.privacy.ranks import Alone, Ranks
from xpeer.privacy.steps import StepResult, result_of
from xpeer.privacy.units import Sample, Units


class Sampling(NamedTuple):
    """How units are sampled.

    Attributes:
        expected: B, units of a step.
        probability: q that steps are charged with.
    """

    expected: int
    probability: float


def sampling_of(manifest: Manifest, size: int) -> Sampling:
    """The manifest's batch, of a shard of so many units as others may infer (`coarse_size`)."""
    expected = min(manifest.optimiser.batch_records, size)
    return Sampling(expected, expected / size)


class PrivateGradient:
    """Steps over the units of this shard; one thread.

    Args:
        parameters: that are trained, on their device.
        engine: clips the records' gradients.
        records: (n, T) int64, CPU.
        units: of privacy, made of these records; of all ranks.
        clip_norm: C, and the noise that goes with it.
        sampling: B, of all ranks together, and q.
        generator: of noise and samples.
        ranks: that take each step together; all have the same units and the same B.
    """

    def __init__(
        self,
        parameters: Sequence[nn.Parameter],
        engine: Engine,
        records: Tensor,
        units: Units,
        clip_norm: ClipNorm,
        sampling: Sampling,
        generator: SecretGenerator,
        ranks: Ranks | None = None,
    ) -> None:
        self.engine = engine
        self.generator = generator
        self.clip_norm = clip_norm
        self.expected = sampling.expected
        self._ranks = ranks or Alone()
        self._parameters = parameters
        self._device = parameters[0].device
        self._records = records
        self._probability = sampling.probability
        self._units = units.part(self._ranks.rank, self._ranks.world)

    def step(self) -> StepResult:
        """Set `grad` of every parameter, and C of the next step."""
        norm = self.clip_norm.norm
        sample = self._units.sample(self.generator, self._probability)
        batch = self._records[sample.indices].to(self._device)
        bounds = (sample.shares * norm).to(self._device)
        sums = [_zeroed_grad(p) for p in self._parameters]
        told = self.engine.accumulate(batch, bounds, sums)
        share = 1 / math.sqrt(self._ranks.world)
        for total in sums:
            noise = torch.empty_like(total)
            std = self.clip_norm.gradient_multiplier * norm * share
            total.add_(self.generator.gaussian_(noise, std))
        counted = self._noised_count(told, bounds, sample, share)
        self._ranks.add_up([*sums, *counted])
        for total in sums:
            total.div_(self.expected)
        for count in counted:
            self.clip_norm.follow(float(count), self.expected)
        return result_of(told, self.clip_norm.norm if counted else None)

    def _noised_count(
        self, told: Clipped, bounds: Tensor, sample: Sample, share: float
    ) -> list[Tensor]:
        """Sum over units of b - 1/2, with its noise, where C follows it: () float64.

        b is the share of a unit's records within their bounds; a gradient that is not finite is
        within none.
        """
        std = self.clip_norm.count_std
        if std is None:
            return []
        within = (told.norms <= bounds).cpu().double()
        total = ((within - 0.5) * sample.shares).sum()
        noise = self.generator.gaussian_(torch.empty((), dtype=torch.float64), std * share)
        return [(total + noise).to(self._device)]


def _zeroed_grad(parameter: nn.Parameter) -> Tensor:
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    return parameter.grad.zero_()
