"""The norm that gradients are clipped to: fixed, or following a privately estimated quantile.

Adaptive clipping (Andrew et al. 2021, arXiv:1905.03871, algorithm 1 and section 3.1). A step also
asks how many of its units were within the norm C. The answer is released with noise, and C follows
from it alone:

    sum of gradients            + N(0, (sigma_g C)^2 I)     sensitivity C
    sum over units of b - 1/2   + N(0, sigma_b^2)           b in [0, 1], sensitivity 1/2
    C *= exp(-rate (quantile measured - quantile wanted))

The two sums are one Gaussian mechanism. Divided by their noise, they move together by at most
sqrt(1 / sigma_g^2 + 1 / (2 sigma_b)^2). With sigma_g = (sigma^-2 - (2 sigma_b)^-2)^(-1/2) that is
1 / sigma. So a step costs exactly what one with noise multiplier sigma and a fixed C costs. A
little more noise in the gradient pays for the quantile (their theorem 1).

C follows from released numbers, so it may be saved and published. A restart without it begins with
the manifest's C again.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

from xpeer.errors import ConfigError
from xpeer.manifest.privacy import Privacy

_COUNT_FRACTION: Final = 1 / 20
"""sigma_b over the expected units of a step. Their section 3.1 finds this precise enough."""
_COUNT_LEAST: Final = 2.0
"""Least sigma_b over sigma. It matters in small batches: the gradient's noise grows by 3.3% at
most."""
_RANGE: Final = 1e6
"""Bound of C over the manifest's C, and of the manifest's C over C."""


@dataclass(slots=True)
class ClipNorm:
    """C of the next step, and the noise that goes with it.

    Attributes:
        norm: C; `follow` changes it.
        gradient_multiplier: sigma_g, standard deviation of the gradient's noise over C.
        count_std: sigma_b, standard deviation of the noise of the count of units within C. None = C
            is fixed, and units are not counted.
        quantile: fraction of units that is wanted within C.
        rate: rate at which C's logarithm follows.
        start: C of the manifest.
    """

    norm: float
    gradient_multiplier: float
    count_std: float | None = None
    quantile: float = 0.5
    rate: float = 0.2
    start: float = 1.0

    def follow(self, noised_sum: float, expected: int) -> None:
        """Set C for the next step.

        Args:
            noised_sum: sum of b - 1/2 over the units of this step, with its noise.
            expected: B, the expected number of units of a step.
        """
        measured = noised_sum / expected + 0.5
        norm = self.norm * math.exp(-self.rate * (measured - self.quantile))
        self.norm = min(max(norm, self.start / _RANGE), self.start * _RANGE)


def clip_norm_of(
    rules: Privacy, noise_multiplier: float, expected: int, saved: float | None
) -> ClipNorm:
    """The clipping norm that a manifest asks for.

    Args:
        rules: the manifest's privacy section.
        noise_multiplier: sigma, with which a step is charged.
        expected: B, the expected number of units of a step.
        saved: C of the last checkpoint; None = begin with the manifest's.

    Raises:
        ConfigError: the count has so little noise that it alone costs more than a step may.
    """
    if rules.clipping == "fixed":
        return ClipNorm(rules.clip_norm, noise_multiplier)
    least = _COUNT_LEAST * noise_multiplier
    count_std = rules.clip_count_noise or max(_COUNT_FRACTION * expected, least)
    left = noise_multiplier**-2 - (2 * count_std) ** -2
    if left <= 0:
        raise ConfigError(
            f"privacy.clip_count_noise = {count_std:g} is too little: the count alone would cost "
            f"more than a step with noise multiplier {noise_multiplier:g} does",
            f"unset it, or set it to {least:.2g} or more",
        )
    return ClipNorm(
        norm=rules.clip_norm if saved is None else saved,
        gradient_multiplier=left**-0.5,
        count_std=count_std,
        quantile=rules.clip_quantile,
        rate=rules.clip_rate,
        start=rules.clip_norm,
    )
