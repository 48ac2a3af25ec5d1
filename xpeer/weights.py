"""w_j: how far a pair's exchange moves us towards the partner. Pure functions of declared values.

For every pair, with p_ij + p_ji = 1 and the same S on both sides:

    w_ij = p_ij S,   S = (n_i + n_j) / sum n  over the group

So in a group of two, w_ij + w_ji = 1. The pair's sum (weighted by n if that is the rule) stays as
it was, whoever else is missing. In a full group the result is the weighted mean.

Declared values may be lies. So p is bounded, and nobody can outweigh all others.
"""

from __future__ import annotations

import math
from typing import Final

from xpeer.errors import PeerError, Reason
from xpeer.policies import Weighting
from xpeer.wire.messages import Terms

WEIGHT_BOUNDS: Final = 1e-3, 1e3
"""Bounds of a declared weight, in relative tokens per second."""
TOKEN_SHARES: Final = 0.1, 0.9
QUALITY_SHARES: Final = 0.25, 0.75
"""Narrower bounds, since a loss is easier to invent than tokens, which a roster shows over time."""
QUALITY_SLOPE: Final = 10.0
"""Per nat: in a pair, a model that is better by 0.1 nats on the public text gets p = 0.73."""


def of_pair(weighting: Weighting, ours: Terms, theirs: Terms) -> float:
    """w_ij of one exchange.

    Args:
        weighting: of the manifest's rule.
        ours: our terms.
        theirs: the partner's.

    Raises:
        PeerError: a value that the partner declares is out of bounds (MALFORMED).
    """
    low, high = WEIGHT_BOUNDS
    if not low <= theirs.weight <= high:
        detail = f"declared weight {theirs.weight!r} is not in [{low}, {high}]"
        raise PeerError(Reason.MALFORMED, detail)
    both = ours.weight + theirs.weight
    share = both / max(both, ours.group_weight, theirs.group_weight)
    if weighting == "tokens":
        return _bounded(theirs.weight / both, TOKEN_SHARES) * share
    if weighting == "quality":
        return _bounded(_of_quality(ours, theirs), QUALITY_SHARES) * share
    return 0.5 * share


def _of_quality(ours: Terms, theirs: Terms) -> float:
    """Softmax of the two losses on the public text; the older one's age weakens it."""
    if ours.loss_public is None or theirs.loss_public is None:
        return 0.5
    better_by = QUALITY_SLOPE * (ours.loss_public - theirs.loss_public)
    if not math.isfinite(better_by):
        raise PeerError(Reason.MALFORMED, f"declared loss {theirs.loss_public!r}")
    age = max(ours.loss_age, theirs.loss_age)
    return 0.5 + 0.5 * math.tanh(better_by / 2) / math.sqrt(1.0 + age)


def _bounded(share: float, bounds: tuple[float, float]) -> float:
    return min(max(share, bounds[0]), bounds[1])
