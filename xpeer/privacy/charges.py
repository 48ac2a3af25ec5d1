"""What a privacy ledger holds: charges, what they were for, and the chain that binds them."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from msgspec import Struct

from xpeer.identity import blake2b
from xpeer.privacy.accountant import Segment
from xpeer.privacy.ledger_file import DOMAIN

MECHANISM: Final = "poisson-subsampled-gaussian"
_PACE_S: Final = 3600.0
"""Over which a forecast looks back."""


class About(Struct, frozen=True, forbid_unknown_fields=True):
    """What charges are for: with a charge's own numbers, all that epsilon follows from."""

    swarm_id: str
    mode: str
    """privacy.mode of the manifest."""
    clip_norm: float
    """C."""
    delta: float
    epsilon_target: float
    unit: str = "record"
    """What epsilon holds for: a record, a document, or (mode update) the shard."""
    unix_s: float = 0.0
    """When it was charged."""


@dataclass(frozen=True, slots=True)
class Charge:
    """As it is stored."""

    counter: int
    segment: Segment
    about: About | None
    """None: charged by a version that did not note it."""


def link(before: bytes, counter: int, segment: Segment, total: int, noted: str) -> bytes:
    """The hash of a charge and all before it.

    Args:
        before: the last charge's link.
        counter: of this charge.
        segment: charged.
        total: steps of all charges with this one.
        noted: `About` as it is stored.
    """
    numbers = struct.pack(
        "<qddqq",
        counter,
        segment.noise_multiplier,
        segment.sampling_probability,
        segment.steps,
        total,
    )
    return blake2b(
        DOMAIN, before, MECHANISM.encode(), numbers, *([noted.encode()] if noted else [])
    )


def forecast(charges: Sequence[Charge], steps_left: int, now: float) -> float | None:
    """When so many further steps will have been charged, at the pace of the last hour.

    Args:
        charges: oldest first.
        steps_left: to be charged.
        now: unix time, seconds.

    Returns:
        Unix time, seconds; None if no pace is known.
    """
    noted = [c for c in charges if c.about and now - c.about.unix_s <= _PACE_S]
    if len(noted) < 2 or noted[0].about is None or noted[-1].about is None:
        return None
    elapsed_s = noted[-1].about.unix_s - noted[0].about.unix_s
    steps = sum(charge.segment.steps for charge in noted[1:])
    return now + steps_left * elapsed_s / steps if elapsed_s > 0 else None
