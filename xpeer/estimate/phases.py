"""What a node needs in each phase of a run: memory, disk, and bytes and time on the wire.

The memory of a step is rehearsed (`estimate.step`). The host's memory is a number of bytes for each
parameter, as `benchmarks/memory` measured it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from msgspec import Struct

from xpeer.estimate.step import StepMemory
from xpeer.forms import Form
from xpeer.leaves import Parts, Public, seen_by
from xpeer.manifest import LARGE_STATE, Manifest
from xpeer.manifest.round import Round
from xpeer.mixing.cut import largest, padded
from xpeer.policies import RulePolicy

PROCESS: Final = 620 << 20
"""A trainer before there is a model: torch, transformers, accounts."""
_BUILT: Final = 7
"""Bytes of a trained parameter in a first start, before the parameters are on their device."""
_RESTART: Final = 12.1
"""The same in a start from a checkpoint; on a CPU its parameters and moments are among them."""
_COPIES: Final = 12
"""Bytes of a trained parameter that are copied for a checkpoint: values and moments."""
_SAVE: Final = 8 + _COPIES
"""Bytes of a trained parameter while a checkpoint is written: with partners' values. In a founder's
trial, which writes one, nothing takes more."""
_SHARED: Final = 4
"""Bytes of each parameter in the memory that daemon and trainer share for a donation."""
_DONATIONS: Final = 2
"""Donations that a daemon may hold at once."""
_TESTED: Final = 12
"""Bytes of a trained parameter that the self-test of engines takes on the device for its sums."""
_SLACK: Final = 400 << 20
_SLACK_SHARE: Final = 0.7
"""The most freed memory that the C library was seen to keep: bytes in a small step, and part of a
large one's working memory."""
_EXPORT: Final = 9
"""Bytes of a trained parameter while a model is exported: its own and those that partners sent."""
_EXPORT_FROZEN: Final = 0.8
"""Bytes of a frozen one: matrices are merged, converted, written and compared one by one."""
_FILE: Final = 13
"""Bytes of a trained parameter in a checkpoint: values, moments, what consolidation adds."""
_STATE: Final = 4
"""Bytes of each value that a rule keeps."""
_WEIGHT: Final = 4
"""Bytes of a trained parameter's value."""


@seen_by("node", "printed by xpeer estimate")
class Phase(Struct, frozen=True, kw_only=True):
    """What a phase needs at its peak, in bytes."""

    name: Public[str]
    """exchange: of one fragment with one partner. window: all exchanges of a window."""
    device: Public[int] = 0
    """Memory of the device; on a CPU, of the trainer without its libraries."""
    host: Public[int] = 0
    """Memory of the process on the host, besides the device's; donate: and of the daemon."""
    slack: Public[int] = 0
    """Freed memory that the C library may keep besides: on a CPU, unless memory is short there."""
    disk: Public[int] = 0
    wire: Public[int] = 0
    """Sent, or received; an exchange does both at once."""
    wire_s: Public[float | None] = None
    """Seconds of that at the link's rate; None = no rate was given."""


@seen_by("node", "printed by xpeer estimate")
class Estimate(Struct, frozen=True, kw_only=True):
    """What a run needs."""

    num_params: Public[int]
    """Trained parameters."""
    frozen_params: Public[int]
    """Parameters that stay as they are."""
    phases: Parts[list[Phase]]
    fits: Public[bool | None] = None
    """Whether a step fits into the memory that was named; None = none was."""
    remedy: Public[str] = ""
    """Settings with which it would fit; empty = it fits, or none helps."""


@dataclass(frozen=True, kw_only=True)
class Wire:
    """How parameters are exchanged: fields of a manifest's `round`, and the link."""

    fragments: int
    codec: str
    rule: RulePolicy = Round().policy
    """It decides how many values of each parameter are sent, kept and saved."""
    partners: int = 1
    """Members that an exchange is with; of an unlimited group, one."""
    bits_per_s: float | None = None

    @classmethod
    def of(cls, manifest: Manifest) -> Wire:
        """The manifest's, without a rate."""
        section = manifest.round
        return cls(
            fragments=section.fragments,
            codec=section.payload_codec,
            rule=section.policy,
            partners=max(1, section.group - 1),
        )

    def payload(self, num_trained: int) -> int:
        """Bytes of the largest payload."""
        values = self.rule.vectors * largest(num_trained, self.fragments)
        return Form(self.codec, values).num_bytes

    def state(self, num_trained: int) -> int:
        """Bytes of all trained parameters on their way to a joiner, as in `Manifest.state_form`."""
        halved = num_trained >= LARGE_STATE and self.codec != "float32"
        return (2 if halved else 4) * num_trained


def checkpoint_bytes(num_trained: int, rule: RulePolicy) -> int:
    """Size of a checkpoint."""
    return (_FILE + _STATE * rule.saved) * num_trained


def host_bytes(num_trained: int, rule: RulePolicy, codes: int = 0) -> int:
    """The least that a trainer takes on the host besides what its device holds: with less it can't
    start, or writes no checkpoint.

    Args:
        num_trained: trained parameters.
        rule: decides what is kept of them.
        codes: bytes of a base in 8 or 4 bits, which is made on the host.
    """
    return PROCESS + max(_BUILT * num_trained + codes, (_STATE * rule.kept + _COPIES) * num_trained)


def donor_bytes(num_trained: int, wire: Wire) -> int:
    """What trainer and daemon take on the host while they hand the model to joiners.

    A checkpoint's copies are among it: their memory is kept for the next one.
    """
    apart = 0 if padded(num_trained) == num_trained else 4  # where it is averaged, see `handover`
    each = _STATE * wire.rule.kept + _COPIES + _SHARED + apart
    return PROCESS + each * num_trained + _DONATIONS * wire.state(num_trained)


def slack(step: StepMemory) -> int:
    """Bytes that the C library may keep of freed memory in steps on a CPU.

    It keeps them in pieces, between blocks that are still used, and how many nobody can rehearse.
    `benchmarks/estimate` measured it. Nothing is kept where memory is short: `Fit.short`.
    """
    return min(step.working, max(_SLACK, round(_SLACK_SHARE * step.working)))


def init_of(step: StepMemory, wire: Wire, *, converted: int = 0, trial: bool = True) -> Phase:
    """What a founder needs before a manifest is signed.

    Args:
        step: of `estimate.step.memory_of`.
        wire: how parameters are exchanged.
        converted: bytes of a base model of another type, which is converted on the disk.
        trial: whether a run is tried in small.
    """
    trained, source = step.num_trained, step.source
    each = _SAVE + _STATE * wire.rule.kept if trial else _WEIGHT
    tried = checkpoint_bytes(trained, wire.rule) + 2 * _WEIGHT * trained if trial else 0
    return Phase(
        name="init",
        device=step.peak if trial else 0,
        host=PROCESS + each * trained + max(0, source - _WEIGHT * trained),
        disk=source + max(converted, tried),  # the trial is the later
    )


def phases_of(
    step: StepMemory,
    wire: Wire,
    checkpoints: int,
    *,
    private: bool,
    on_cpu: bool,
    converted: int = 0,
) -> list[Phase]:
    """All phases.

    Args:
        step: of `estimate.step.memory_of`.
        wire: how parameters are exchanged.
        checkpoints: number of checkpoints that are kept.
        private: whether engines are tested at a start.
        on_cpu: whether the device is one.
        converted: bytes of a base model of another type, which is converted on the disk.
    """
    trained = step.num_trained
    payload = wire.payload(trained)
    window = wire.fragments * wire.partners * payload
    file = checkpoint_bytes(trained, wire.rule)
    kept = _STATE * wire.rule.kept
    state = wire.state(trained)

    # those of quantised weights are made on the host; others are pages of the model's files
    codes = step.weights if step.source > step.weights else 0

    def seconds(size: int) -> float | None:
        return None if wire.bits_per_s is None else 8 * size / wire.bits_per_s

    def host(each: float) -> int:
        return PROCESS + round(each * trained)

    return [
        init_of(step, wire, converted=converted),
        Phase(
            name="start",
            device=max(step.weights + _TESTED * trained, step.peak) if private else step.weights,
            host=host(_RESTART + kept) + codes,
            disk=converted,
        ),
        Phase(
            name="step",
            device=step.peak,
            slack=slack(step) if on_cpu else 0,
            host=host(kept),
        ),
        Phase(name="exchange", host=8 * payload, wire=payload, wire_s=seconds(payload)),
        Phase(name="window", wire=window, wire_s=seconds(window)),
        Phase(
            name="checkpoint",
            device=step.peak,
            host=host(_SAVE + kept),
            disk=(checkpoints + 1) * file,
        ),
        Phase(
            name="export",
            host=host(_EXPORT) + round(_EXPORT_FROZEN * step.num_frozen),
            disk=2 * step.source,  # as it is made, and as transformers writes it
        ),
        Phase(name="donate", host=donor_bytes(trained, wire), wire=state, wire_s=seconds(state)),
        Phase(name="join", host=host(8), disk=state, wire=state, wire_s=seconds(state)),
    ]
