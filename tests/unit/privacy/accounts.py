"""Charges, as tests write them."""

from __future__ import annotations

from xpeer.privacy.accountant import Segment
from xpeer.privacy.charges import About
from xpeer.privacy.histories import ByUnit, History


def about_in(swarm_id: str, delta: float = 1e-5) -> About:
    """What charges in a swarm are for."""
    return About(swarm_id, "record", 1.0, delta, 8.0)


def by_unit(*charged: Segment, unit: str = "record") -> ByUnit:
    """As a ledger tells them."""
    history: History = {}
    for each in charged:
        kind = each.noise_multiplier, each.sampling_probability
        history[kind] = history.get(kind, 0) + each.steps
    return {unit: history} if history else {}
