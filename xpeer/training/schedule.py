"""When training ends and how fast it learns until then; pure functions of the counters."""

from __future__ import annotations

import math
from typing import Any

import msgspec
from msgspec import Struct

from xpeer.leaves import Derived, Local, Noised, Timing, seen_by
from xpeer.manifest import Manifest

JOINER_WARMUP_STEPS = 20
"""At most; fresh moments need a few gradients before their ratio means anything."""


@seen_by("home")
class Counters(Struct, kw_only=True):
    """How far training has come. Saved in checkpoints."""

    step: Timing[int] = 0
    """Optimiser steps; a joiner starts at its donor's."""
    window: Timing[int] = 0
    tokens: Local[int] = 0
    """Tokens this node trained on."""
    seconds: Timing[float] = 0.0
    """Time spent training."""
    moments_step: Timing[int] = 0
    """Step at which the moments were zero."""
    joined: Timing[bool] = False
    """Whether those were a joiner's fresh moments."""
    merges: Timing[int] = 0
    merges_clipped: Derived[int] = 0
    charges_used: Timing[int] = 0
    """Privacy charges of this node that are behind its parameters: the rest of the ledger's were
    lost with processes that died, or with a newer checkpoint."""
    clip_norm: Noised[float | None] = None
    """C of the next private step, where it adapts."""

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, for a checkpoint."""
        return msgspec.to_builtins(self)  # type: ignore[no-any-return]

    @classmethod
    def from_dict(cls, saved: dict[str, Any]) -> Counters:
        """What `to_dict` gave; counters that a later version added start at zero."""
        return msgspec.convert(saved, cls, strict=False)


def share_done(counters: Counters, manifest: Manifest) -> float | None:
    """How much of the run is over: 1 or more = ended; None = it has no end.

    Under privacy, tokens count as declared (batch times sequence length): the realised Poisson
    batches are private data, and when a node ends is visible to all.
    """
    end, optimiser = manifest.end, manifest.optimiser
    tokens = counters.tokens
    if manifest.privacy.policy.hides_batches:
        tokens = counters.step * optimiser.batch_records * optimiser.sequence_tokens
    shares = [
        done / limit
        for done, limit in (
            (counters.step, end.steps),
            (counters.window, end.rounds),
            (tokens, end.tokens),
            (counters.seconds, end.seconds),
        )
        if limit is not None
    ]
    return max(shares, default=None)


def planned_steps(manifest: Manifest) -> int | None:
    """Steps until the end, as far as the manifest alone tells; None = it depends on the clock."""
    end, optimiser = manifest.end, manifest.optimiser
    limits = []
    if end.steps is not None:
        limits.append(end.steps)
    if end.rounds is not None and manifest.round.window_s is None:
        limits.append(end.rounds * manifest.round.window_steps)
    if end.tokens is not None:
        limits.append(-(-end.tokens // (optimiser.batch_records * optimiser.sequence_tokens)))
    return min(limits, default=None)


def learning_rate(counters: Counters, manifest: Manifest) -> float:
    """Rate of the next step: warm-up times decay over the share that is done.

    Without an end there is no decay. A joiner warms up shortly, towards the swarm's current rate.
    """
    rate = manifest.optimiser.learning_rate
    return rate * warmed_up(counters, manifest) * _decay(counters, manifest)


def warmed_up(counters: Counters, manifest: Manifest) -> float:
    """How much of the rate the warm-up allows the next step: above 0, at most 1."""
    warmup = manifest.optimiser.warmup_steps
    if counters.joined:
        warmup = min(warmup, JOINER_WARMUP_STEPS)
    since = counters.step - counters.moments_step + 1
    return min(1.0, since / warmup) if warmup else 1.0


def _decay(counters: Counters, manifest: Manifest) -> float:
    optimiser = manifest.optimiser
    done = share_done(counters, manifest)
    if done is None or optimiser.schedule == "constant":
        return 1.0
    done = min(done, 1.0)
    left = 1.0 - done if optimiser.schedule == "linear" else (1 + math.cos(math.pi * done)) / 2
    return optimiser.final_rate + (1.0 - optimiser.final_rate) * left
