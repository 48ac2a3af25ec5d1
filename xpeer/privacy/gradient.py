"""One private step: sample, clip, add up, add noise. Knows no ledger: `mechanism` charges first.

    grad = (sum over sampled units of their vectors, norm C at most + N(0, sigma^2 C^2 I)) / B

with q = B / n. B is the expected number of units. The number sampled is private.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from xpeer.manifest import Manifest
from xpeer.privacy.clipping import Clipped, Engine
from xpeer.privacy.fitting import until_it_fits
from xpeer.privacy.noise import SecretGenerator
from xpeer.privacy.norms import ClipNorm
from xpeer.privacy.options import DEFAULT, Options
from xpeer.privacy.ranks import Alone
from xpeer.privacy.steps import Records, StepResult, result_of
from xpeer.privacy.units import Sample, Units


class Sampling(NamedTuple):
    """The sampling of units.

    Attributes:
        expected: B, the expected number of units of a step.
        probability: q, with which steps are charged.
    """

    expected: int
    probability: float


def sampling_of(manifest: Manifest, size: int) -> Sampling:
    """The sampling that gives the manifest's batch.

    Args:
        manifest: of the swarm.
        size: number of units of the shard, made coarse by `coarse_size`, since others may infer q.
    """
    expected = min(manifest.optimiser.batch_records, size)
    return Sampling(expected, expected / size)


class PrivateGradient:
    """Private steps over the units of this shard. For one thread.

    Args:
        parameters: trained parameters, on their device.
        engine: clips the records' gradients.
        records: (n, T) int64, CPU.
        units: units of privacy, made of these records, for all ranks.
        clip_norm: C, and the noise that goes with it.
        sampling: B, summed over all ranks, and q.
        generator: makes noise and samples.
        options: its ranks take each step in common, with the same units and B; how memory is saved.
    """

    def __init__(
        self,
        parameters: Sequence[nn.Parameter],
        engine: Engine,
        records: Records,
        units: Units,
        clip_norm: ClipNorm,
        sampling: Sampling,
        generator: SecretGenerator,
        options: Options = DEFAULT,
    ) -> None:
        self.engine = engine
        self.generator = generator
        self.clip_norm = clip_norm
        self.expected = sampling.expected
        self._ranks = options.ranks or Alone()
        self._relieve = options.relieve
        self._parameters = parameters
        self._device = parameters[0].device
        self._records = records
        self._probability = sampling.probability
        self._units = units.part(self._ranks.rank, self._ranks.world)

    def step(self) -> StepResult:
        """Take a step: set `grad` of every parameter, and C of the next step."""
        norm = self.clip_norm.norm
        sample = self._units.sample(self.generator, self._probability)
        batch = self._records[sample.indices].to(self._device)
        bounds = (sample.fractions * norm).to(self._device)

        def clip_and_add_up() -> tuple[list[Tensor], Clipped]:
            sums = [_zeroed_grad(p) for p in self._parameters]
            return sums, self.engine.accumulate(batch, bounds, sums)

        sums, clipped = until_it_fits(clip_and_add_up, self._shrink)
        of_rank = 1 / math.sqrt(self._ranks.world)  # std of a rank's noise over the step's
        for total in sums:
            self.generator.add_gaussian_(total, self.clip_norm.gradient_multiplier * norm * of_rank)
        counted = self._noised_count(clipped, bounds, sample, of_rank)
        self._ranks.add_up([*sums, *counted])
        for total in sums:
            total.div_(self.expected)
        for count in counted:
            self.clip_norm.follow(float(count), self.expected)
        return result_of(clipped, self.clip_norm.norm if counted else None)

    def _shrink(self) -> str:
        return self.engine.shrink() or self._relieve()

    def _noised_count(
        self, clipped: Clipped, bounds: Tensor, sample: Sample, of_rank: float
    ) -> list[Tensor]:
        """Sum over units of b - 1/2, plus noise: one () float64. Empty where C is fixed.

        b is the fraction of a unit's records that are within their bounds. A gradient that is not
        finite is never within its bound.
        """
        std = self.clip_norm.count_std
        if std is None:
            return []
        within = (clipped.norms <= bounds).cpu().double()
        total = ((within - 0.5) * sample.fractions).sum()
        noise = self.generator.gaussian_(torch.empty((), dtype=torch.float64), std * of_rank)
        return [(total + noise).to(self._device)]


def _zeroed_grad(parameter: nn.Parameter) -> Tensor:
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    return parameter.grad.zero_()
