"""Private gradients, and the stamp without which nothing may leave the node.

Differential privacy for records or documents (Abadi et al. 2016, arXiv:1607.00133, algorithm 1):
every step samples each unit with probability q = B / n, bounds what it gives by norm C, adds up,
and adds N(0, sigma^2 C^2 I); see `gradient`, `units` and `norms`. Steps are charged to the ledger
before they are taken. What any optimiser makes of a step, mixed with anything partners send, is
post-processing.

sigma, q, n, the size of a batch and its loss are this node's secrets. Only its own operator sees
them. q follows from n as rounded by `coarse_size`. A step with an empty batch is a step like any
other.

If the shard changes between starts, q changes with it. The ledger counts steps at the old q and
steps at the new one. sigma, once calibrated, stays. If the remaining steps no longer fit the
budget, or a crash forfeited some, the node stops training a little earlier.

What this module does not give: privacy of documents cut into several records where the unit is the
record, of the shard's size, of timing, or of anything tuned by looking at private results.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final, Protocol

import torch
from torch import Tensor, nn

from xpeer import update
from xpeer.accounts import accountant
from xpeer.accounts.budget import Budget, Charged, coarse_size, delta_of
from xpeer.accounts.ledger import Ledger
from xpeer.accounts.signal import noise_norm
from xpeer.accounts.spending import WHOLE, Spending
from xpeer.errors import ConfigError, LocalError
from xpeer.manifest import Manifest
from xpeer.privacy import noise
from xpeer.privacy.clipping import RecordLosses, trainable
from xpeer.privacy.engine_memory import EngineMemory, setting_of
from xpeer.privacy.engines import Choice, choose_engine, sample_of
from xpeer.privacy.gradient import PrivateGradient, sampling_of
from xpeer.privacy.norms import clip_norm_of
from xpeer.privacy.options import DEFAULT, Options
from xpeer.privacy.plain import OffMechanism
from xpeer.privacy.steps import Records, StepResult, check_records
from xpeer.privacy.units import units_of
from xpeer.status import PrivacySpent
from xpeer.update import PrivacyStamp, PrivateUpdate, RawUpdate

__all__ = ["Mechanism", "OffMechanism", "RecordMechanism", "build_mechanism"]

_MOST_BATCHES: Final = 4
"""A drawn batch has at most so many times the expected records."""


class Mechanism(Protocol):
    """Makes gradients, charges for them, and certifies snapshots of what was trained with them.

    Attributes:
        engine: name of the engine that computes the gradients.
        notes: sentences for the operator, e.g. why faster engines were refused.
    """

    engine: str
    notes: list[str]

    @property
    def seen(self) -> Tensor:
        """Names of the records that the present pass has used, (m,) int64, for checkpoints. Empty
        under privacy, where records are sampled.
        """

    def charge_until(self, steps: int) -> int:
        """Charge until so many steps may be taken. The charges are on the disk when this returns.

        Returns:
            Number of steps that may be taken; 0 = the budget is spent.
        """

    def charge_ahead(self, steps: int) -> None:
        """Begin to charge further steps in the background. `charge_until` waits for them."""

    def charged(self) -> Charged:
        """Steps charged since this was made, and how far they are."""

    def step_gradient(self) -> StepResult:
        """Set `grad` of every trainable parameter. This uses up one charged step."""

    def stamp(self, raw: RawUpdate) -> PrivateUpdate:
        """Certify a snapshot, so that it may leave the node."""

    def spent(self) -> PrivacySpent:
        """The cost of all charges. May take a moment; on any thread."""

    def close(self) -> None:
        """Wait for a charge that is being written. Charged steps that were not taken are lost."""


class RecordMechanism:
    """DP-SGD over the records, or the documents, of this shard.

    `charge_until`, `step_gradient` and `stamp` belong to one thread.

    Args:
        manifest: a manifest with privacy.mode "record".
        model: the model, on its device.
        records: (n, T) int64, CPU.
        record_losses: sums of losses and counts of tokens by record.
        ledger: this home's ledger, with its documents declared.
        options: how this node computes.
        owners: the document of each record, (n,) int64, ascending; needed where documents are the
            unit.
        spending: what the steps are for, and which part of the budget they may spend.

    Raises:
        ConfigError: another mode, no records, or a model that can't be trained privately.
        LocalError: the ledger can't be read or written.
    """

    def __init__(
        self,
        manifest: Manifest,
        model: nn.Module,
        records: Records,
        record_losses: RecordLosses,
        ledger: Ledger,
        options: Options = DEFAULT,
        *,
        owners: Tensor | None = None,
        spending: Spending = WHOLE,
    ) -> None:
        section = manifest.privacy
        if not section.policy.clips_records:
            raise ConfigError(f"privacy.mode is {section.mode!r}: records are not protected")
        check_records(records)
        units = units_of(section.unit, len(records), owners, section.document_records)
        self._parameters = trainable(model)
        self._ledger, self._unit, self._target = ledger, units.kind, section.epsilon
        self._delta = delta_of(manifest, len(units))
        sampling = sampling_of(manifest, coarse_size(len(units)))
        allowed = spending.allowance(manifest, ledger, self._delta, sampling.probability)
        self._sigma, self._kept_back = allowed.noise_multiplier, allowed.epsilon_kept_back
        choice = _engine(manifest, model, records, record_losses, sampling.expected, options)
        self.engine = choice.engine.name
        self.notes: list[str] = [f"private gradients by {self.engine}: {choice.reason}"]
        self._choice = choice
        self._gradient = PrivateGradient(
            self._parameters,
            choice.engine,
            records,
            units,
            clip_norm_of(section, self._sigma, sampling.expected, options.clip_norm),
            sampling,
            noise.SecretGenerator(next(model.parameters()).device, options.generator),
            options,
        )
        values = sum(parameter.numel() for parameter in self._parameters)
        self._noise_norm = noise_norm(self._sigma, sampling.expected, values)
        self._incomplete = False
        """True iff a step has begun and not ended, or broke off. It stays True after a step that
        broke off."""
        self._budget = Budget(
            ledger,
            epsilon=self._target,
            delta=self._delta,
            noise_multiplier=self._sigma,
            sampling_probability=sampling.probability,
            bounds=allowed.bounds,
        )

    @property
    def seen(self) -> Tensor:
        """Empty: records are sampled, so there is no pass over them."""
        return torch.empty(0, dtype=torch.int64)

    def charge_until(self, steps: int) -> int:
        """Charge until so many steps may be taken; see `Budget.begin`."""
        return self._budget.begin(steps)

    def charge_ahead(self, steps: int) -> None:
        """Charge further steps in the background; see `Budget.prepare`."""
        self._budget.prepare(steps)

    def charged(self) -> Charged:
        """See `Budget.charged`."""
        return self._budget.charged

    def step_gradient(self) -> StepResult:
        """Sample, clip, add up, add noise; see `PrivateGradient`.

        Raises:
            LocalError: no charged step is left. `charge_until` comes first.
        """
        self._budget.use()
        with self._all_or_nothing():
            return self._gradient.step()

    def stamp(self, raw: RawUpdate) -> PrivateUpdate:
        """Certify a snapshot: every step behind it was clipped, noised and charged.

        Raises:
            LocalError: a step was not charged, or broke off before its noise was added.
        """
        if self._incomplete or self._budget.overdrawn:
            what = "broke off half-way" if self._incomplete else "was not charged"
            raise LocalError(
                f"a private step {what}: nothing that follows from it may leave this node",
                "restart the node: it goes on from its last checkpoint",
            )
        stamp = PrivacyStamp(
            mode="record",
            steps_charged=self._ledger.steps_charged,
            issuer=update._ISSUER,
        )
        return PrivateUpdate(values=raw.values, step=raw.step, stamp=stamp)

    def spent(self) -> PrivacySpent:
        """The cost of all charges in the ledger, taken or not. For the operator only.

        Takes tenths of a second if the ledger has changed. On any thread.
        """
        # steps are charged meanwhile: counted before epsilon, so that epsilon covers them all
        left, charged = self._budget.left, self._ledger.steps_charged
        return PrivacySpent(
            mode="record",
            epsilon_spent=accountant.epsilon_worst(self._ledger.histories(), self._delta),
            epsilon_target=self._target,
            epsilon_kept_back=self._kept_back,
            delta=self._delta,
            noise_multiplier=self._sigma,
            steps_charged=charged,
            steps_left=left,
            unit=self._unit,
            noise_norm=self._noise_norm,
            clip_norm=self._gradient.clip_norm.norm,
            engine=self.engine,
            engine_reason=self._choice.reason,
            engine_refused=self._choice.refused,
        )

    def close(self) -> None:
        """Wait for a charge that is being written. The ledger's owner closes the ledger."""
        self._budget.close()

    @contextmanager
    def _all_or_nothing(self) -> Iterator[None]:
        """Remember a step that breaks off, and delete its gradients, which may lack their noise."""
        before, self._incomplete = self._incomplete, True
        done = False
        try:
            yield
            self._incomplete, done = before, True
        finally:
            if not done:
                for parameter in self._parameters:
                    parameter.grad = None


def _engine(
    manifest: Manifest,
    model: nn.Module,
    records: Records,
    record_losses: RecordLosses,
    expected: int,
    options: Options,
) -> Choice:
    """The engine that was asked for, else the fastest one that is exact."""
    if options.engine is not None:
        return Choice(options.engine, "it was asked for")
    memory = None
    section, micro_batch, memory_bytes = manifest.privacy, options.micro_batch, options.memory_bytes
    if options.cache is not None:
        details = section.mode, section.unit, expected, micro_batch, memory_bytes
        precision = options.precision.name
        memory = EngineMemory(options.cache, setting_of(model, records, *details, precision))
    return choose_engine(
        model,
        record_losses,
        sample_of(records).to(next(model.parameters()).device),
        micro_batch=micro_batch,
        memory_bytes=memory_bytes,
        memory=memory,
        precision=options.precision,
        relieve=options.relieve,
        most_records=micro_batch or _MOST_BATCHES * expected,
    )


def build_mechanism(
    manifest: Manifest,
    model: nn.Module,
    records: Records,
    record_losses: RecordLosses,
    ledger: Ledger,
    options: Options = DEFAULT,
    *,
    owners: Tensor | None = None,
    seen: Tensor | None = None,
    spending: Spending = WHOLE,
) -> Mechanism:
    """Build the mechanism that the manifest asks for. Takes seconds under privacy.

    Args:
        manifest: the swarm's manifest.
        model: the model, on its device.
        records: (n, T) int64, CPU.
        record_losses: sums of losses and counts of tokens by record.
        ledger: this home's ledger; untouched without privacy.
        options: how this node computes.
        owners: the document of each record, (n,) int64, ascending.
        seen: `seen` of the last checkpoint.
        spending: what the steps are for; nothing is charged without privacy.
    """
    if not manifest.privacy.policy.charges:
        return OffMechanism(manifest, model, records, record_losses, options, seen=seen)
    return RecordMechanism(
        manifest,
        model,
        records,
        record_losses,
        ledger,
        options,
        owners=owners,
        spending=spending,
    )
