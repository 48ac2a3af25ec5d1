"""What stands in for a mechanism while there is no text to train on: no step, and honest stamps."""

from __future__ import annotations

import torch
from torch import Tensor

from xpeer import update
from xpeer.errors import LocalError
from xpeer.manifest import Manifest
from xpeer.privacy import accountant
from xpeer.privacy.ledger import Ledger
from xpeer.privacy.steps import Charged, StepResult
from xpeer.status import PrivacySpent
from xpeer.update import PrivacyStamp, PrivateUpdate, RawUpdate


class IdleMechanism:
    """Takes no step. What the parameters hold was charged before: it is a checkpoint's, or others'.

    Args:
        manifest: of the swarm.
        ledger: of this home.
        seen: of the checkpoint, for the next one.
    """

    engine = "none: there is no text"

    def __init__(self, manifest: Manifest, ledger: Ledger, seen: Tensor | None) -> None:
        self.notes: list[str] = []
        self._mode = manifest.privacy.mode
        self._target = manifest.privacy.epsilon
        self._ledger = ledger
        self._seen = torch.empty(0, dtype=torch.int64) if seen is None else seen

    @property
    def seen(self) -> Tensor:
        """Where the pass over the records was."""
        return self._seen

    def begin_window(self, steps: int) -> int:
        """None."""
        return 0

    def prepare_window(self, steps: int) -> None:
        """Nothing."""

    def charged(self) -> Charged:
        """Nothing is."""
        return Charged()

    def step_gradient(self) -> StepResult:
        """Never.

        Raises:
            LocalError: always.
        """
        raise LocalError("there is no text to take a step on", "check data.shard")

    def stamp(self, raw: RawUpdate) -> PrivateUpdate:
        """Certify a snapshot: every step behind it was charged."""
        charged = 0 if self._mode == "off" else self._ledger.steps_charged
        stamp = PrivacyStamp(mode=self._mode, steps_charged=charged, issuer=update._ISSUER)
        return PrivateUpdate(values=raw.values, step=raw.step, stamp=stamp)

    def spent(self) -> PrivacySpent:
        """The ledger's answer, as of the last charge."""
        charges = [] if self._mode == "off" else self._ledger.charges()
        about = charges[-1].about if charges else None
        if about is None:
            return PrivacySpent(mode=self._mode, engine=self.engine)
        return PrivacySpent(
            mode=self._mode,
            epsilon_spent=accountant.epsilon_worst(self._ledger.histories(), about.delta),
            epsilon_target=self._target,
            delta=about.delta,
            steps_charged=self._ledger.steps_charged,
            unit=about.unit,
            engine=self.engine,
        )

    def close(self) -> None:
        """Nothing to wait for."""
