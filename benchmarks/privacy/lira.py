"""Likelihood ratios of membership, every run's others being its shadow models.

Carlini et al. 2022 (arXiv:2112.03570), algorithm 1 with the fixed variance of section VI-C: with a
few shadow models, means belong to the record and variances to all records.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from benchmarks.privacy.bounds import Floats

Flags = npt.NDArray[np.bool_]
_PRIOR: float = 1.0
"""Shadow models' worth of trust in the average record, where a record was seldom in or out."""


def ratios(losses: Floats, included: Flags) -> Floats:
    """How much rather a member, for each run by the other runs.

    Args:
        losses: (runs, records).
        included: (runs, records).

    Returns:
        (runs, records): log of P(loss | in) over P(loss | out).
    """
    runs = len(losses)
    out = np.zeros_like(losses)
    for run in range(runs):
        others = np.arange(runs) != run
        out[run] = _of_run(losses[run], losses[others], included[others])
    return out


def _of_run(own: Floats, shadow: Floats, included: Flags) -> Floats:
    # what all losses of a shadow model share is that model's, not the records'
    level = shadow.mean(axis=1, keepdims=True)
    own, shadow = own - own.mean(), shadow - level
    difference = shadow[included].mean() - shadow[~included].mean()
    centre = shadow.mean(axis=0)
    share = included.mean(axis=0)
    # a record's mean, as it were half in, half out
    neutral = centre - (share - 0.5) * difference
    means = {True: neutral + difference / 2, False: neutral - difference / 2}
    residual = shadow - np.where(included, means[True], means[False])
    count = len(shadow)
    variance = (residual**2).mean() * (1 + 1 / max(count - _PRIOR, 1)) + 1e-12
    ratio: Floats = ((own - means[False]) ** 2 - (own - means[True]) ** 2) / (2 * variance)
    return ratio
