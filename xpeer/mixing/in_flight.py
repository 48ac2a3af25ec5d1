"""The stages of a meeting in flight, as types: a call that comes too early or twice is refused.

    Certified --compress--> Sent --verify, once for each partner--> Sent
                                 --resolve--> Resolved --merge-->

A meeting may be dropped at any stage. Stages are immutable: the next one replaces the one before.

Invariant: there is one helper. Everything that happens off the training thread (compress, verify,
resolve) runs on one thread, one call after the other. While the helper works on a stage, other
threads may drop the meeting, but none replaces the stage. So the helper's next stage is complete.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Final, TypeVar

import torch

from xpeer.errors import PeerError, Reason, TrainerError
from xpeer.forms import Form
from xpeer.mixing.differences import Difference
from xpeer.mixing.received import ReceivedFragment
from xpeer.mixing.rules import Rule
from xpeer.mixing.rules.base import Correction
from xpeer.mixing.screen import Scale
from xpeer.wire.codec import Payload

MAX_IN_FLIGHT: Final = 16
"""Meetings at a time. Each holds one fragment in float32, and one more for each partner."""
MAX_GROUP: Final = 64


@dataclass(frozen=True, slots=True)
class Certified:
    """The fragment was copied, and the mechanism has certified the values to send."""

    fragment: int
    step: int
    """Local steps taken before the snapshot."""
    rule: Rule
    theta: torch.Tensor  # (n,) float32, CPU
    """The snapshot."""
    scale: Scale
    """The measure of honest partners' distances."""


@dataclass(frozen=True, slots=True)
class Verified:
    """One partner's payload, or a masked group's sum, in comparison with ours."""

    partner: str
    """PeerID; empty for a sum."""
    difference: Difference
    received: ReceivedFragment | None
    """The partner's values, or the mean of a group's other members. None if they were clipped, or
    if the combiner trusts no single partner."""
    mean: torch.Tensor | None = None  # (n,) float32, on the grid
    """A masked group's mean, ours included. None if it was clipped, or for a single partner."""


@dataclass(frozen=True, slots=True)
class Sent:
    """Our payload is made. Partners' payloads are verified one by one."""

    snapshot: Certified
    form: Form
    """The form of our payload, and of each partner's."""
    payload: torch.Tensor  # (bytes,) uint8
    own: Payload | torch.Tensor
    """Our payload, or what it decodes to, (V n,) float32, to compare partners' payloads with."""
    verified: Mapping[int, Verified]
    """Verified payloads by exchange id."""

    def with_verified(self, exchange_id: int, verified: Verified) -> Sent:
        """Return the stage with one more verified partner.

        Raises:
            TrainerError: this exchange was verified before.
            PeerError: too many partners (BUSY).
        """
        self.require_new(exchange_id)
        return replace(self, verified={**self.verified, exchange_id: verified})

    def require_new(self, exchange_id: int) -> None:
        """Check that one more exchange can be verified; raises what `with_verified` raises."""
        if exchange_id in self.verified:
            raise TrainerError(f"exchange {exchange_id} was verified before")
        if len(self.verified) >= MAX_GROUP:
            raise PeerError(Reason.BUSY, f"{MAX_GROUP} partners in one meeting")


@dataclass(frozen=True, slots=True)
class Resolved:
    """The correction is computed. It is added at the next step boundary."""

    sent: Sent
    correction: Correction
    accepted: tuple[Verified, ...]
    """The exchanges in the correction: those that both sides accepted."""
    received: tuple[ReceivedFragment, ...]
    """Values that consolidation will remember."""
    apart: torch.Tensor | None = None  # (n,) bfloat16
    """Difference to the last partner, for `misalignment`; None where no adapters are trained."""


Stage = Certified | Sent | Resolved
_S = TypeVar("_S", Certified, Sent, Resolved)


class InFlight:
    """Meetings by their ids, each at one stage. Thread-safe.

    Attributes:
        seconds_blocked: time that the training thread waited for another one to let go of the lock.
    """

    def __init__(self) -> None:
        self.seconds_blocked = 0.0
        self._stages: dict[int, Stage] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        """Number of meetings."""
        return len(self._stages)

    # ---- on the training thread ---------------------------------------------------------------

    def require_room(self, meeting_id: int, fragment: int) -> None:
        """Check that a meeting may begin.

        Raises:
            PeerError: too many meetings are in flight, or this fragment is (BUSY).
            TrainerError: the id is in use.
        """
        with self._waiting():
            if meeting_id in self._stages:
                raise TrainerError(f"meeting {meeting_id} has its snapshot already")
            if len(self._stages) >= MAX_IN_FLIGHT:
                raise PeerError(Reason.BUSY, f"{MAX_IN_FLIGHT} meetings are in flight")
            if any(_snapshot(stage).fragment == fragment for stage in self._stages.values()):
                raise PeerError(Reason.BUSY, f"fragment {fragment} is in flight")

    def begin(self, meeting_id: int, snapshot: Certified) -> None:
        """Add a meeting at its first stage."""
        with self._waiting():
            self._stages[meeting_id] = snapshot

    def end(self, meeting_id: int) -> Resolved | None:
        """Remove a meeting to merge it; None = it was dropped.

        Raises:
            TrainerError: the meeting is not resolved.
        """
        with self._waiting():
            stage = self._stages.pop(meeting_id, None)
        if stage is None:
            return None
        return _require(meeting_id, stage, Resolved)

    def clear(self) -> None:
        """Drop all meetings."""
        with self._lock:
            self._stages.clear()

    @contextmanager
    def _waiting(self) -> Iterator[None]:
        began = time.perf_counter()
        with self._lock:
            self.seconds_blocked += time.perf_counter() - began
            yield

    # ---- on the helper ------------------------------------------------------------------------

    def at(self, meeting_id: int, kind: type[_S]) -> _S:
        """Return the meeting's stage, which has to be of this kind.

        Raises:
            PeerError: the meeting was dropped (CLOSED).
            TrainerError: it is at another stage.
        """
        with self._lock:
            stage = self._stages.get(meeting_id)
        if stage is None:
            raise _dropped(meeting_id)
        return _require(meeting_id, stage, kind)

    def advance(self, meeting_id: int, before: Stage, after: Stage) -> None:
        """Replace the stage that the helper began with by the next one.

        Raises:
            PeerError: the meeting was dropped meanwhile (CLOSED).
            TrainerError: another helper has replaced the stage.
        """
        with self._lock:
            now = self._stages.get(meeting_id)
            if now is None:
                raise _dropped(meeting_id)
            if now is not before:
                raise TrainerError(f"two helpers work on meeting {meeting_id}")
            self._stages[meeting_id] = after

    # ---- on any thread ------------------------------------------------------------------------

    def drop(self, meeting_id: int) -> None:
        """Forget a meeting; an unknown one is ignored."""
        with self._lock:
            self._stages.pop(meeting_id, None)


def _snapshot(stage: Stage) -> Certified:
    if isinstance(stage, Resolved):
        return stage.sent.snapshot
    return stage.snapshot if isinstance(stage, Sent) else stage


def _require(meeting_id: int, stage: Stage, kind: type[_S]) -> _S:
    if not isinstance(stage, kind):
        detail = f"is {type(stage).__name__.lower()}, not {kind.__name__.lower()}"
        raise TrainerError(f"meeting {meeting_id} {detail}")
    return stage


def _dropped(meeting_id: int) -> PeerError:
    return PeerError(Reason.CLOSED, f"meeting {meeting_id} was dropped")
