"""What the daemon asks of its trainer, as data."""

from __future__ import annotations

from msgspec import Struct

from xpeer.phase import Order
from xpeer.training.setup import TrainerSetup
from xpeer.update import Form


class Begin(Struct, frozen=True, tag=True):
    """First message to the child: what it needs to start."""

    setup: TrainerSetup
    slot_bytes: int
    state_bytes: int
    num_slots: int


class Snapshot(Struct, frozen=True, tag=True):
    """Take a fragment at the next boundary, compress it into the slot."""

    meeting_id: int
    fragment: int
    averaging: bool
    """Average the parameters, whatever the manifest's rule."""
    slot: int


class Verify(Struct, frozen=True, tag=True):
    """Decode and check a partner's payload in the slot."""

    meeting_id: int
    exchange_id: int
    slot: int
    form: Form
    parties: int = 1
    """Of a masked group's sum: k."""
    partner: str = ""
    """Whose payload it is: a PeerID."""


class Merge(Struct, frozen=True, tag=True):
    """Merge verified payloads at the next boundary; answered once that is queued."""

    meeting_id: int
    weights: dict[int, float]
    """w_j of every exchange that was accepted."""


class Drop(Struct, frozen=True, tag=True):
    """Forget a meeting; not answered."""

    meeting_id: int


class ExportState(Struct, frozen=True, tag=True):
    """Write all parameters to the arena's region."""


class ImportState(Struct, frozen=True, tag=True):
    """Replace all parameters by the arena's region."""

    step: int
    at_most: float = float("inf")
    """Public loss that they may have."""


class Run(Struct, frozen=True, tag=True):
    """Change the mode."""

    mode: Order


class WriteCheckpoint(Struct, frozen=True, tag=True):
    """Save now."""


class Evaluate(Struct, frozen=True, tag=True):
    """Measure the losses on public and held-out text now."""


class Stop(Struct, frozen=True, tag=True):
    """Save and exit."""


Command = (
    Snapshot | Verify | Merge | Drop | ExportState | ImportState | Run | WriteCheckpoint | Evaluate
    | Stop
)  # fmt: skip


class Request(Struct, frozen=True, tag=True):
    """A command with the number that its reply will carry."""

    number: int
    command: Command


ToTrainer = Begin | Request
