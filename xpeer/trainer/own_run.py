"""What `build.assemble` needs to make a trainer of own steps instead of the swarm's."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from xpeer.accounts.spending import OwnSpending
from xpeer.manifest import Manifest
from xpeer.training.checkpoint import Bundle


@dataclass(frozen=True)
class OwnRun:
    """A run of own steps (`own.OwnTraining`).

    Attributes:
        manifest: the swarm's, with the schedule of own steps.
        saved: the state to begin with.
        folder: its checkpoints.
        spending: what its steps may spend.
    """

    manifest: Manifest
    saved: Bundle
    folder: Path
    spending: OwnSpending
