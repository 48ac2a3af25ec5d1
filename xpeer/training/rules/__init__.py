"""The aggregation rules by their names in the manifest (`round.rule`)."""

from __future__ import annotations

from xpeer.manifest import Round
from xpeer.training.rules.base import Rule
from xpeer.training.rules.gradient import GradientAveraging
from xpeer.training.rules.outer import DiLoCo, GASLoC, NoLoCo

__all__ = ["GradientAveraging", "Rule", "make", "vectors_of"]

_OUTER: dict[str, tuple[type[DiLoCo] | type[NoLoCo] | type[GASLoC], float, float, float]] = {
    # rate, momentum, consensus: the papers' own
    "diloco": (DiLoCo, 0.7, 0.9, 0.0),
    "noloco": (NoLoCo, 0.7, 0.5, 0.7),
    "gasloc": (GASLoC, 1.0, 0.2, 1.0),
}


def make(round_: Round) -> Rule:
    """The manifest's rule, in its initial state."""
    if round_.rule == "gradient":
        return GradientAveraging()
    if round_.rule not in _OUTER:
        return Rule()
    kind, rate, momentum, consensus = _OUTER[round_.rule]
    return kind(
        rate if round_.outer_rate is None else round_.outer_rate,
        momentum if round_.outer_momentum is None else round_.outer_momentum,
        consensus if round_.consensus_rate is None else round_.consensus_rate,
    )


def vectors_of(round_: Round) -> int:
    """V: values sent per parameter of a fragment."""
    if round_.rule == "gradient":
        return GradientAveraging.vectors
    return _OUTER[round_.rule][0].vectors if round_.rule in _OUTER else Rule.vectors
