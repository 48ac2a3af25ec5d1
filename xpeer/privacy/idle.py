"""A mechanism for a node without text to train on. It takes no step, and its accounts stay honest.

Nobody knows which documents the missing text holds. But the machine's register remembers the
documents that this home trained on last, and what they were charged.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from xpeer import update
from xpeer.accounts import accountant
from xpeer.accounts.account_view import AccountView
from xpeer.accounts.accountant import Segment
from xpeer.accounts.budget import STEPS_MAX, Charged, delta_of, steps_within
from xpeer.accounts.chain import ChargeContext
from xpeer.accounts.ledger import Ledger
from xpeer.accounts.register import Register
from xpeer.accounts.spending import WHOLE, SwarmSpending
from xpeer.errors import LocalError
from xpeer.manifest import Manifest
from xpeer.privacy.steps import StepResult
from xpeer.status import PrivacySpent
from xpeer.update import PrivacyStamp, PrivateUpdate, RawUpdate

_UNKNOWN_SIZE: Final = 1 << 40
"""Size to assume for a text whose size nobody noted. Delta is then that of the largest text."""


class IdleMechanism:
    """A mechanism that takes no step.

    Every step behind the parameters was charged before: they come from a checkpoint, or from other
    members.

    Args:
        manifest: the swarm's manifest.
        swarm_id: its fingerprint.
        ledger: this home's ledger.
        register: the machine's register, closed with this; None without privacy.
        seen: `seen` of the last checkpoint, kept for the next one.
        spending: what steps might spend, if there were text.

    Raises:
        LocalError: the register can't be read, or the ledger can't be written.

    Attributes:
        notes: see `Mechanism.notes`; empty.
        steps_behind: steps that the register held and the ledger lacked. They were charged to the
            ledger again at the start.
    """

    engine = "none: there is no text"

    def __init__(
        self,
        manifest: Manifest,
        swarm_id: str,
        ledger: Ledger,
        register: Register | None,
        seen: Tensor | None,
        spending: SwarmSpending = WHOLE,
    ) -> None:
        self.notes: list[str] = []
        self._mode = manifest.privacy.mode
        self._charges = manifest.privacy.policy.charges
        self._target, self._spending = manifest.privacy.epsilon, spending
        self._ledger, self._register = ledger, register
        self._seen = torch.empty(0, dtype=torch.int64) if seen is None else seen
        self.steps_behind = 0
        if register is not None:
            about = _noted(ledger) or _assumed(manifest, swarm_id)
            self.steps_behind = ledger.catch_up(register, about)

    @property
    def seen(self) -> Tensor:
        """See `Mechanism.seen`: as the last checkpoint had it."""
        return self._seen

    def charge_until(self, steps: int) -> int:
        """Return 0: no step may be taken."""
        return 0

    def charge_ahead(self, steps: int) -> None:
        """Do nothing: no step follows."""

    def charged(self) -> Charged:
        """Return zeros: this charges nothing."""
        return Charged()

    def step_gradient(self) -> StepResult:
        """Refuse to take a step.

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
        """The cost for the documents that this home trained on last, by ledger and register."""
        about = _noted(self._ledger)
        if self._register is None or about is None:
            return PrivacySpent(mode=self._mode, engine=self.engine)
        of_text = AccountView(self._ledger, self._register).of_shard()
        last, left = _last_of_the_swarm(self._ledger), STEPS_MAX
        bounds = self._spending.bounds(self._target, self._ledger)
        for history in of_text:
            sigma, q = last.noise_multiplier, last.sampling_probability
            left = steps_within(bounds(history), about.delta, sigma, q, left)
        return PrivacySpent(
            mode=self._mode,
            epsilon_spent=accountant.epsilon_worst(of_text, about.delta),
            epsilon_target=self._target,
            epsilon_kept_back=self._target - self._spending.part_of(self._target),
            delta=about.delta,
            noise_multiplier=last.noise_multiplier,
            steps_charged=self._ledger.steps_charged,
            steps_left=left,
            unit=about.unit,
            engine=self.engine,
        )

    def close(self) -> None:
        """Close the register."""
        if self._register is not None:
            self._register.close()


def _noted(ledger: Ledger) -> ChargeContext | None:
    """The context of the newest charge that notes one; None if none does."""
    return next((c.about for c in reversed(ledger.charges()) if c.about is not None), None)


def _last_of_the_swarm(ledger: Ledger) -> Segment:
    """The newest charge of the swarm's steps, else the newest one."""
    charges = ledger.charges()
    of_swarm = [c.segment for c in charges if not (c.about and c.about.own)]
    return of_swarm[-1] if of_swarm else charges[-1].segment


def _assumed(manifest: Manifest, swarm_id: str) -> ChargeContext:
    """The context to assume where no charge notes one."""
    section = manifest.privacy
    delta = delta_of(manifest, _UNKNOWN_SIZE)
    return ChargeContext(
        swarm_id, section.mode, section.clip_norm, delta, section.epsilon, section.unit
    )
