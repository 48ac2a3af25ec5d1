"""What stands in for a mechanism while there is no text to train on: no step, and honest accounts.

Which documents the missing text holds is not known now; what they were charged is: the machine's
register remembers the text that this home trained on last.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from xpeer import update
from xpeer.accounts import accountant
from xpeer.accounts.account_view import AccountView
from xpeer.accounts.budget import STEPS_MAX, Charged, delta_of
from xpeer.accounts.chain import ChargeContext
from xpeer.accounts.ledger import Ledger
from xpeer.accounts.register import Register
from xpeer.errors import LocalError
from xpeer.manifest import Manifest
from xpeer.privacy.steps import StepResult
from xpeer.status import PrivacySpent
from xpeer.update import PrivacyStamp, PrivateUpdate, RawUpdate

_UNKNOWN_SIZE: Final = 1 << 40
"""Of a text whose size nobody noted: delta, and so epsilon, is as for the largest."""


class IdleMechanism:
    """Takes no step. What the parameters hold was charged before: it is a checkpoint's, or others'.

    Args:
        manifest: of the swarm.
        swarm_id: its id.
        ledger: of this home.
        register: of the machine, which this closes; None without privacy.
        seen: of the checkpoint, for the next one.

    Raises:
        LocalError: the register can't be read, or the ledger not be written.
    """

    engine = "none: there is no text"

    def __init__(
        self,
        manifest: Manifest,
        swarm_id: str,
        ledger: Ledger,
        register: Register | None,
        seen: Tensor | None,
    ) -> None:
        self.notes: list[str] = []
        self._mode = manifest.privacy.mode
        self._charges = manifest.privacy.policy.charges
        self._target = manifest.privacy.epsilon
        self._ledger, self._register = ledger, register
        self._seen = torch.empty(0, dtype=torch.int64) if seen is None else seen
        self.steps_behind = 0
        """That the ledger lacked, and the register holds: charged again."""
        if register is not None:
            noted = _noted(ledger) or _about(manifest, swarm_id)
            self.steps_behind = ledger.catch_up(register, noted)

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
        charged = self._ledger.steps_charged if self._charges else 0
        stamp = PrivacyStamp(mode=self._mode, steps_charged=charged, issuer=update._ISSUER)
        return PrivateUpdate(values=raw.values, step=raw.step, stamp=stamp)

    def spent(self) -> PrivacySpent:
        """What the ledger and the register know together of the text that was trained on last."""
        about = _noted(self._ledger)
        if self._register is None or about is None:
            return PrivacySpent(mode=self._mode, engine=self.engine)
        of_text = AccountView(self._ledger, self._register).of_shard()
        last, left = self._ledger.charges()[-1].segment, STEPS_MAX
        for history in of_text:
            left = accountant.steps_within(
                self._target,
                about.delta,
                history,
                last.noise_multiplier,
                last.sampling_probability,
                left,
            )
        return PrivacySpent(
            mode=self._mode,
            epsilon_spent=accountant.epsilon_worst(of_text, about.delta),
            epsilon_target=self._target,
            delta=about.delta,
            noise_multiplier=last.noise_multiplier,
            steps_charged=self._ledger.steps_charged,
            steps_left=left,
            unit=about.unit,
            engine=self.engine,
        )

    def close(self) -> None:
        """Nothing to wait for."""
        if self._register is not None:
            self._register.close()


def _noted(ledger: Ledger) -> ChargeContext | None:
    """What the newest charge says of itself that says anything."""
    return next((c.about for c in reversed(ledger.charges()) if c.about is not None), None)


def _about(manifest: Manifest, swarm_id: str) -> ChargeContext:
    rules = manifest.privacy
    delta = delta_of(manifest, _UNKNOWN_SIZE)
    return ChargeContext(swarm_id, rules.mode, rules.clip_norm, delta, rules.epsilon, rules.unit)
