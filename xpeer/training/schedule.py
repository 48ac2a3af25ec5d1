"""When training ends, and the learning rate until then: pure functions of the counters."""

from __future__ import annotations

import math
from typing import Any

import msgspec
from msgspec import Struct

from xpeer.leaves import Derived, Local, Noised, Timing, seen_by
from xpeer.manifest import Manifest

JOINER_WARMUP_STEPS = 20
"""Longest warm-up of a joiner; the ratio of fresh moments means nothing before a few gradients."""


@seen_by("home")
class Counters(Struct, kw_only=True):
    """How far training has come. Saved in checkpoints."""

    step: Timing[int] = 0
    """Number of optimiser steps; a joiner starts at its donor's."""
    window: Timing[int] = 0
    """Number of windows done; a joiner starts at its donor's."""
    tokens: Local[int] = 0
    """Number of tokens that this node trained on."""
    seconds: Timing[float] = 0.0
    """Time spent training."""
    moments_step: Timing[int] = 0
    """The step at which the moments were zero."""
    joined: Timing[bool] = False
    """True iff the parameters were a donor's at that step."""
    merges: Timing[int] = 0
    """Number of merged meetings."""
    merges_clipped: Derived[int] = 0
    """Number of clipped differences in them."""
    charges_used: Timing[int] = 0
    """Privacy charges whose steps are in this node's parameters. Other charges in the ledger were
    forfeited when a process died, or when a newer checkpoint was lost."""
    clip_norm: Noised[float | None] = None
    """C of the next private step; None if C does not adapt."""

    def to_dict(self) -> dict[str, Any]:
        """Convert to builtins, for a checkpoint."""
        return msgspec.to_builtins(self)  # type: ignore[no-any-return]

    @classmethod
    def from_dict(cls, saved: dict[str, Any]) -> Counters:
        """Convert what `to_dict` returned; counters that a later version added start at zero."""
        return msgspec.convert(saved, cls, strict=False)


def share_done(counters: Counters, manifest: Manifest) -> float | None:
    """The fraction of the run that is over; 1 or more = ended; None = the run has no end.

    Under privacy, every step counts as batch size times sequence length tokens. The sizes of the
    actual Poisson batches are private, while everybody sees when a node ends.
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
    """Number of steps in the run, as far as the manifest says; None = that is open."""
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
    """The learning rate of the next step: the manifest's rate times warm-up times decay.

    Without an end there is no decay. A joiner warms up briefly, towards the swarm's present rate.
    """
    rate = manifest.optimiser.learning_rate
    return rate * warmed_up(counters, manifest) * decayed(counters, manifest)


def warmed_up(counters: Counters, manifest: Manifest) -> float:
    """The fraction of the rate that the warm-up allows for the next step: above 0, at most 1."""
    warmup = manifest.optimiser.warmup_steps
    if counters.joined:
        warmup = min(warmup, JOINER_WARMUP_STEPS)
    since = counters.step - counters.moments_step + 1
    return min(1.0, since / warmup) if warmup else 1.0


def decayed(counters: Counters, manifest: Manifest) -> float:
    """The fraction of the rate that its decay leaves for the next step: at most 1."""
    optimiser = manifest.optimiser
    done = share_done(counters, manifest)
    if done is None or optimiser.schedule == "constant":
        return 1.0
    done = min(done, 1.0)
    left = 1.0 - done if optimiser.schedule == "linear" else (1 + math.cos(math.pi * done)) / 2
    return optimiser.final_rate + (1.0 - optimiser.final_rate) * left
