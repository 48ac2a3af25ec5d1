"""Update mode, an experiment: what a peer learnt in a window is released once, clipped and noised.

Every window starts from released parameters, trains without any protection, and ends by releasing

    theta += clip(theta_H - theta, C) + N(0, sigma^2 C^2 I)        over all parameters together

(McMahan et al. 2018, arXiv:1710.06963, algorithm 1, with one user a peer, drawn every time, and
noise of its own). With or without this peer's shard the released vector differs by C at most, so a
window is one Gaussian mechanism with q = 1, and R of them are mu-GDP with mu = sqrt(R) / sigma
(Dong et al. 2019, arXiv:1905.02383, corollary 2), whatever partners send in between. Only what is
released leaves: snapshots, states for joiners, checkpoints, losses that partners are told.

The unit of privacy is a peer's whole shard, so nothing that is public may follow from it, not even
its size: sigma and delta follow from the manifest alone.

What this module does not give: a useful model. The noise has norm sigma C sqrt(P) against an update
of norm C; with fewer than thousands of peers it swamps what they learn. Nor that a peer takes part
at all is hidden, nor how long its steps take.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Final

import msgspec
import torch
from torch import Tensor, nn

from xpeer import update
from xpeer.errors import ConfigError, LocalError
from xpeer.manifest import Manifest, Privacy
from xpeer.privacy import accountant
from xpeer.privacy.budget import Budget
from xpeer.privacy.clipping import RecordLosses
from xpeer.privacy.ledger import Ledger
from xpeer.privacy.noise import SecretGenerator
from xpeer.privacy.plain import OffMechanism
from xpeer.privacy.steps import Charged, Precision, StepResult
from xpeer.status import PrivacySpent
from xpeer.update import PrivacyStamp, PrivateUpdate, RawUpdate

DELTA: Final = 1e-5
"""Unless the manifest says otherwise: a smaller one for larger shards would tell their size."""
_SAFELY: Final = 1.0 - 2.0**-20
"""Rounding to float32 lengthens a vector by 2^-24 of its norm at most."""


class UpdateMechanism:
    """Plain steps, and one noised release of what they came to.

    Everything but `spent` belongs to one thread.

    Args:
        manifest: with privacy.mode "update".
        model: on its device.
        records: (n, T) int64, CPU; all of them are the unit of privacy.
        record_losses: sums of losses and counts of tokens by record.
        ledger: of this shard.
        micro_batch: records per pass; 0 = what suits a processor's caches.
        precision: of forward passes.

    Raises:
        ConfigError: another mode, no records, or no end to calibrate for.
        LocalError: the ledger.
    """

    engine = "one release a window"

    def __init__(
        self,
        manifest: Manifest,
        model: nn.Module,
        records: Tensor,
        record_losses: RecordLosses,
        ledger: Ledger,
        *,
        micro_batch: int = 0,
        precision: Precision = nullcontext,
    ) -> None:
        rules = manifest.privacy
        if rules.mode != "update":
            raise ConfigError(f"privacy.mode is {rules.mode!r}: updates are not protected")
        # nothing of a step is shown, so a step needs no protection of its own
        unseen = msgspec.structs.replace(manifest, privacy=Privacy(mode="off"))
        self._steps = OffMechanism(
            unseen, model, records, record_losses, micro_batch=micro_batch, precision=precision
        )
        self._clip_norm = rules.clip_norm
        self._target = rules.epsilon
        self._delta = delta_of(manifest)
        self._sigma = noise_multiplier(manifest, self._delta)
        self._generator = SecretGenerator(next(model.parameters()).device)
        self._ledger = ledger
        self._budget = Budget(
            ledger,
            epsilon=self._target,
            delta=self._delta,
            noise_multiplier=self._sigma,
            sampling_probability=1.0,
        )
        self.notes = [
            "privacy.mode = update, an experiment: each window's release has noise of norm "
            f"{self._sigma * self._clip_norm:.3g} * sqrt(parameters) on an update of norm "
            f"{self._clip_norm:g} at most"
        ]

    @property
    def seen(self) -> Tensor:
        """Nothing: a restart begins a new pass."""
        return torch.empty(0, dtype=torch.int64)

    def begin_window(self, steps: int) -> int:
        """Charge the window's release, unless one is charged and not yet used.

        Returns:
            All of the steps, or 0: no further release fits the budget.
        """
        return steps if self._budget.begin(1) else 0

    def prepare_window(self, steps: int) -> None:
        """Nothing: a release is dear, and one that is charged ahead is lost with a restart."""

    def charged(self) -> Charged:
        """Of releases: see `Budget.charged`."""
        return self._budget.charged

    def step_gradient(self) -> StepResult:
        """A plain step's gradient: private, as all that follows from it before the release."""
        return self._steps.step_gradient()

    @torch.no_grad()
    def privatise(self, difference: Tensor) -> Tensor:
        """What may be shown of a window, once; uses up its charge.

        Args:
            difference: (P,) float32: what the window's steps changed; overwritten. One that is not
                finite counts as none: that it happened must not show.

        Returns:
            (P,) float32: clipped to norm C, with N(0, sigma^2 C^2 I) added.

        Raises:
            LocalError: no release is charged.
        """
        self._budget.use()
        norm = float(torch.linalg.vector_norm(difference, dtype=torch.float64))
        if not norm < float("inf"):
            difference.zero_()
        elif norm > self._clip_norm:
            difference.mul_(self._clip_norm / norm * _SAFELY)
        noise = torch.empty_like(difference)
        return difference.add_(self._generator.gaussian_(noise, self._sigma * self._clip_norm))

    def stamp(self, raw: RawUpdate) -> PrivateUpdate:
        """Certify a snapshot of what is released (`training.released`).

        Raises:
            LocalError: a release was not charged.
        """
        if self._budget.overdrawn:
            raise LocalError(
                "a release was not charged: nothing that follows from it may leave this node",
                "restart the node: it goes on from its last checkpoint",
            )
        charged = self._ledger.steps_charged
        stamp = PrivacyStamp(mode="update", steps_charged=charged, issuer=update._ISSUER)
        return PrivateUpdate(values=raw.values, step=raw.step, stamp=stamp)

    def spent(self) -> PrivacySpent:
        """What the ledger's releases cost together. On any thread."""
        left, charged = self._budget.left, self._ledger.steps_charged  # epsilon holds for these
        return PrivacySpent(
            mode="update",
            epsilon_spent=accountant.epsilon_worst(self._ledger.histories(), self._delta),
            epsilon_target=self._target,
            delta=self._delta,
            noise_multiplier=self._sigma,
            steps_charged=charged,
            steps_left=left,
            unit="shard",
            clip_norm=self._clip_norm,
            engine=self.engine,
        )

    def close(self) -> None:
        """Wait for a charge that is being written. The ledger is its owner's to close."""
        self._budget.close()


def planned_windows(manifest: Manifest) -> int | None:
    """R: releases until the end, as the manifest alone tells; None = there is no end."""
    end, window = manifest.end, manifest.round.window_steps
    limits = [end.rounds] if end.rounds is not None else []
    if end.steps is not None:
        limits.append(-(-end.steps // window))
    return min(limits, default=None)


def delta_of(manifest: Manifest) -> float:
    """Delta: the manifest's, or `DELTA`."""
    return manifest.privacy.delta or DELTA


def noise_multiplier(manifest: Manifest, delta: float) -> float:
    """Sigma: the manifest's, or as much as the planned windows need; the same at every peer.

    Raises:
        ConfigError: neither sigma nor an end is set, or no noise reaches the target.
    """
    rules = manifest.privacy
    if rules.noise_multiplier is not None:
        return rules.noise_multiplier
    windows = planned_windows(manifest)
    if windows is None:
        raise ConfigError(
            "privacy.noise_multiplier, end.steps and end.rounds are all unset",
            "sigma can't be calibrated; the manifest needs one of them",
        )
    return accountant.calibrate(rules.epsilon, delta, 1.0, windows)
