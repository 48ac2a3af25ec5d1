"""The content of a privacy ledger: charges, what they were for, and the chain that binds them.

Knows no files: `ledger` stores the rows that `ChargeChain` makes.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final, NamedTuple

import msgspec
from msgspec import Struct

from xpeer.accounts.accountant import Segment
from xpeer.accounts.histories import ByUnit, History
from xpeer.errors import LocalError
from xpeer.identity import blake2b
from xpeer.leaves import Local, Parts, Public, Timing, seen_by
from xpeer.policies import privacy_policy

DOMAIN: Final = b"xpeer/ledger/v1\0"
MECHANISM: Final = "poisson-subsampled-gaussian"
_PACE_S: Final = 3600.0
"""Span before now whose charges a forecast uses."""
_STILL_S, _STILL = 60.0, 5.0
"""A node is not training if its last charge is older than so many seconds and older than so many
times the mean interval between charges."""


@seen_by("home")
class ChargeContext(Struct, frozen=True, forbid_unknown_fields=True):
    """The context of charges. With a charge's own numbers it determines epsilon."""

    swarm_id: Public[str]
    mode: Public[str]
    """privacy.mode of the manifest."""
    clip_norm: Public[float]
    """C."""
    delta: Local[float]
    epsilon_target: Public[float]
    unit: Public[str] = "record"
    """What epsilon holds for: "record" or "document". "shard" in old charges of mode update, which
    is gone."""
    unix_s: Timing[float] = 0.0
    """Time of the charge."""
    cut: Public[str] = ""
    """How text is cut into records, e.g. "128 byte tokens"; "" unless records are the unit."""
    found_again: Timing[bool] = False
    """True iff this repeats a charge that the ledger had lost and the machine's register still
    held."""
    own: Timing[bool] = False
    """True iff the steps are own steps (`xpeer finetune`). Their effect stays in the home."""

    @property
    def exact_unit(self) -> str:
        """The unit and, for records, how they are cut. Two charges of one text add up only if
        theirs are equal.
        """
        if unit := privacy_policy(self.mode).unit:
            return unit
        return f"record of {self.cut}" if self.unit == "record" and self.cut else self.unit


@seen_by("home")
@dataclass(frozen=True, slots=True)
class Charge:
    """One entry of a ledger."""

    counter: Timing[int]
    """Number of this charge, from 1."""
    segment: Parts[Segment]
    about: Parts[ChargeContext | None]
    """None if an old version charged it, which did not note what a charge was for."""


class Row(NamedTuple):
    """A charge as a row of the ledger's file."""

    counter: int
    mechanism: str
    noise_multiplier: float
    sampling_probability: float
    steps: int
    total_steps: int
    hash: bytes
    about: str


class ChargeChain:
    """All charges of a ledger, each bound to those before it by a hash.

    Args:
        ledger_id: id of the ledger; the first hash is made from it.

    Attributes:
        charges: all charges, oldest first.
        head: hash of the last charge, or of the ledger's id while there is none.
        steps: steps charged, by (noise multiplier, sampling probability), in order of appearance.
        steps_charged: number of all steps.
        by_unit: steps charged, by what epsilon holds for.
        own: own steps charged, by kind as in `steps`.
    """

    def __init__(self, ledger_id: str) -> None:
        self.charges: list[Charge] = []
        self.head = blake2b(DOMAIN, ledger_id.encode())
        self.steps: History = {}
        self.steps_charged = 0
        self.by_unit: ByUnit = {}
        self.own: History = {}

    @property
    def counter(self) -> int:
        """Number of charges. It only ever grows."""
        return len(self.charges)

    def next_row(self, segment: Segment, about: ChargeContext | None) -> Row:
        """Make the row that continues the chain. The caller stores it, then calls `add`."""
        return self._continuing(segment, _noted(about) if about else "")

    def add(self, row: Row) -> None:
        """Append a stored row.

        Raises:
            LocalError: it does not continue the chain, or makes no sense.
        """
        try:
            segment = Segment(row.noise_multiplier, row.sampling_probability, row.steps)
            if row != self._continuing(segment, row.about):
                raise LocalError("it does not continue those before it")
            about = msgspec.json.decode(row.about, type=ChargeContext) if row.about else None
        except (struct.error, msgspec.MsgspecError, ValueError, RecursionError) as e:
            raise LocalError(str(e)) from e
        kind = segment.noise_multiplier, segment.sampling_probability
        history = self.by_unit.setdefault(about.exact_unit if about else "record", {})
        histories = self.steps, history, *([self.own] if about and about.own else [])
        for steps in histories:
            steps[kind] = steps.get(kind, 0) + segment.steps
        self.charges.append(Charge(row.counter, segment, about))
        self.steps_charged, self.head = row.total_steps, row.hash

    def _continuing(self, segment: Segment, noted: str) -> Row:
        counter, total = self.counter + 1, self.steps_charged + segment.steps
        numbers = (segment.noise_multiplier, segment.sampling_probability, segment.steps)
        packed = struct.pack("<qddqq", counter, *numbers, total)
        head = blake2b(
            DOMAIN, self.head, MECHANISM.encode(), packed, *([noted.encode()] if noted else [])
        )
        return Row(counter, MECHANISM, *numbers, total, head, noted)


def _noted(about: ChargeContext) -> str:
    """A context as the ledger stores it. Older versions read it, unless it is that of own steps."""
    noted = msgspec.to_builtins(about)
    if not about.own:
        del noted["own"]
    return msgspec.json.encode(noted).decode()


def in_parts(segments: Sequence[Segment], at_least: int) -> list[Segment]:
    """Split segments into `at_least` parts with the same steps, or fewer if there are fewer steps.

    Never fewer parts than segments.
    """
    parts, spare = [], at_least - len(segments)
    for segment in segments:
        single = max(0, min(spare, segment.steps - 1))
        spare -= single
        parts += [replace(segment, steps=1)] * single
        parts.append(replace(segment, steps=segment.steps - single))
    return parts


def forecast(charges: Sequence[Charge], steps_left: int, now: float) -> float | None:
    """Time at which so many further steps will have been charged, at the pace of the last hour.

    Args:
        charges: all charges, oldest first.
        steps_left: number of further steps.
        now: unix time, seconds.

    Returns:
        Unix time, seconds. None if the node is not training, or has not charged enough yet.
    """
    noted = [
        (charge.about.unix_s, charge.segment.steps)
        for charge in charges
        if charge.about and not charge.about.found_again and now - charge.about.unix_s <= _PACE_S
    ]
    if len(noted) < 2:
        return None
    elapsed_s = noted[-1][0] - noted[0][0]
    if now - noted[-1][0] > max(_STILL_S, _STILL * elapsed_s / (len(noted) - 1)):
        return None
    steps = sum(steps for _, steps in noted[1:])
    return now + steps_left * elapsed_s / steps if elapsed_s > 0 else None
