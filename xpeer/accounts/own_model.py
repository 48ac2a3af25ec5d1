"""Facts about an own model (`xpeer finetune`): what was planned, what came of it, what it cost."""

from __future__ import annotations

from typing import Any, Final, Literal

import msgspec
from msgspec import Struct

from xpeer.leaves import Derived, Local, Parts, Public, Timing, seen_by

Keep = Literal["best", "last"]
"""best: the model with the lowest loss on held-out own text. last: the last one."""
_KEY: Final = "own"
"""Key of the facts in the counters of the kept model's file."""


@seen_by("home")
class OwnPlan(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a run of own steps does. It is on the disk before the first step is charged."""

    steps: Public[int]
    learning_rate: Public[float]
    keep: Public[Keep]
    swarm_step: Timing[int]
    """Step of the swarm's model that own steps begin with."""
    noise_multiplier: Local[float] = 0.0
    """Sigma; 0 without privacy."""
    epsilon_before: Local[float] = 0.0
    loss_before: Local[float | None] = None
    """Loss of the swarm's model on held-out text; None = nothing is held out. Nats per token."""
    loss_public_before: Derived[float] = 0.0


@seen_by("home")
class OwnModel(Struct, frozen=True, kw_only=True):
    """Facts about the kept model, in its file and as `xpeer finetune --json` prints them."""

    plan: Parts[OwnPlan]
    steps: Timing[int]
    """Own steps that were taken."""
    kept_step: Local[int]
    """Own steps behind the kept model; 0 = it is the swarm's model."""
    loss_after: Local[float | None]
    """Loss of the kept model on held-out text, nats per token; None = nothing is held out."""
    loss_public_after: Local[float]
    """Loss of the kept model on the manifest's public text, nats per token."""
    epsilon_spent: Local[float]
    """Cost of all steps that were charged, those of the swarm's run included."""
    epsilon_target: Public[float]
    delta: Local[float]
    chosen: Public[bool]
    """True iff held-out text decided which step was kept."""


def noted(facts: OwnModel) -> dict[str, Any]:
    """The facts as the counters of a checkpoint hold them."""
    return {_KEY: msgspec.to_builtins(facts)}


def facts_of(counters: dict[str, Any]) -> OwnModel | None:
    """Read what `noted` made from the counters of a checkpoint; None = it is no own model."""
    found = counters.get(_KEY)
    return None if found is None else msgspec.convert(found, OwnModel)
