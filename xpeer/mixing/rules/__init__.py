"""The aggregation rules by their names in the manifest (`round.rule`)."""

from __future__ import annotations

from typing import Final

from xpeer.manifest.round import Round
from xpeer.mixing.rules.base import GradientSum, Rule
from xpeer.mixing.rules.gradient import GradientAveraging
from xpeer.mixing.rules.outer import DiLoCo, GASLoC, NoLoCo

__all__ = ["GradientSum", "Rule", "make"]

_OUTER: Final = {"diloco": DiLoCo, "noloco": NoLoCo, "gasloc": GASLoC}


def make(round_: Round) -> Rule:
    """The manifest's rule, in its initial state."""
    outer = round_.policy.outer
    if outer is None:
        return GradientAveraging() if round_.policy.waits else Rule()
    return _OUTER[round_.rule](
        outer.rate if round_.outer_rate is None else round_.outer_rate,
        outer.momentum if round_.outer_momentum is None else round_.outer_momentum,
        outer.consensus if round_.consensus_rate is None else round_.consensus_rate,
    )
