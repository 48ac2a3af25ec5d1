"""The stages of an update, as types: a stage that was skipped does not type-check.

    RawUpdate --privacy.Mechanism--> PrivateUpdate --wire.codec--> CompressedUpdate
        [--gossip.masks--> MaskedUpdate] --wire.session--> sealed frames --partner--> PeerUpdate

The first three live in the trainer. Only the bytes of a `CompressedUpdate` go to the daemon, and
only sealed frames leave the daemon. A `PrivateUpdate` needs a `PrivacyStamp`. Python can't forbid
anything, but a `PrivacyStamp` refuses to be made by anything but the privacy mechanism.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, NamedTuple, final

from xpeer.forms import Form
from xpeer.leaves import Derived, Local, Noised, Parts, Public, Timing, Withheld, seen_by

if TYPE_CHECKING:
    import torch


class Margin(NamedTuple):
    """By how much a loss on the public text may be above another."""

    factor: float
    nats: float

    def above(self, loss: float) -> float:
        """The highest loss that this allows."""
        return self.factor * loss + self.nats


WORSE: Final = Margin(1.05, 0.02)
"""How much worse than ours a donor's parameters may be."""


@seen_by("node", "never leaves the trainer")
@final
@dataclass(frozen=True, slots=True)
class RawUpdate:
    """Values straight from training. No method sends them anywhere."""

    values: Noised[torch.Tensor]  # (V * fragment_params,) float32, CPU; V as in `Rule.vectors`
    step: Timing[int]
    """Local step at whose boundary the snapshot was taken."""


@seen_by("node")
@final
@dataclass(frozen=True, slots=True)
class PrivacyStamp:
    """The mechanism's statement that every step behind a snapshot was clipped, noised and charged.

    Only the mechanisms of `xpeer.privacy` make one.
    """

    mode: Public[str]
    steps_charged: Local[int]
    issuer: Withheld[object]

    def __post_init__(self) -> None:
        """Refuse a stamp from anywhere else."""
        if self.issuer is not _ISSUER:
            raise TypeError("a PrivacyStamp is made by the privacy mechanism only")


_ISSUER = object()


def received_stamp(mode: str, steps_charged: int) -> PrivacyStamp:
    """A stamp that came from the trainer process, where the mechanism made it.

    Of what runs on nodes, only `xpeer.trainer.client` calls this. Objects can't cross processes, so
    the daemon believes its own trainer over their private socket.
    """
    return PrivacyStamp(mode=mode, steps_charged=steps_charged, issuer=_ISSUER)


@seen_by("node")
@final
@dataclass(frozen=True, slots=True)
class PrivateUpdate:
    """Values that anybody may see: post-processing of charged, noised steps."""

    values: Noised[torch.Tensor]  # as in `RawUpdate`
    step: Timing[int]
    stamp: Parts[PrivacyStamp]


@seen_by(
    "partners",
    "step and stamp stay with the daemon; rounding has randomness of its own",
)
@final
@dataclass(frozen=True, slots=True)
class CompressedUpdate:
    """Private values as bytes of a codec. The trainer hands them to the daemon."""

    payload: Noised[bytes | memoryview]
    form: Parts[Form]
    step: Withheld[int]
    stamp: Withheld[PrivacyStamp]


@seen_by("partners")
@final
@dataclass(frozen=True, slots=True)
class MaskedUpdate:
    """Compressed private values under the masks of one group.

    Only their sum over the group can be read. A masked meeting swaps nothing else.
    """

    payload: Noised[bytes | memoryview]
    form: Parts[Form]


@seen_by("node")
@final
@dataclass(frozen=True, slots=True)
class PeerUpdate:
    """A partner's compressed values, complete and authenticated.

    Their privacy can't be proven, and the trainer verifies them before it merges.
    """

    payload: Derived[bytes | memoryview]
    form: Parts[Form]
    peer_id: Public[str]
    parties: Public[int] = 1
    """Number of members whose values are added up in it, ours included, in a masked group; else 1.
    """


class Checked(NamedTuple):
    """A partner's values that can be merged."""

    distance: float
    """||Q(theta_j) - Q(theta_i)|| / ||Q(theta_i)|| on the fragment."""
    clipped: bool = False
    """True iff the difference is above the norm limit, so that it is merged only in part."""


@seen_by("members")
@final
@dataclass(frozen=True, slots=True)
class ModelState:
    """All parameters of a member at one step boundary, for a joiner. They are private, as updates
    are.
    """

    payload: Noised[bytes | memoryview]  # trained values, then frozen ones, as `StateForm` says
    step: Timing[int]
    loss_public: Derived[float]
    """The donor's loss on the manifest's public text, nats per token."""


class StateCopy(NamedTuple):
    """A copy of a donor's parameters, and what it cost the donor."""

    state: ModelState
    core_s: float
    """Processor time of the trainer's threads that made it, in seconds. It is never sent."""
