"""Private gradients, and the stamp without which nothing may be shown to anybody.

Differential privacy for records or documents (Abadi et al. 2016, arXiv:1607.00133, algorithm 1):
every step samples each unit with probability q = B / n, bounds what it gives by norm C, adds up,
and adds N(0, sigma^2 C^2 I); see `gradient`, `units` and `norms`. Steps are charged to the ledger
before they are taken. What follows a step, by any optimiser, mixed with anything partners send, is
post-processing.

sigma, q, n, the size of a batch and its loss are this node's secrets: only its own operator sees
them, and q takes n by `told_size`. A step with an empty batch is a step like any other.

If the shard changes between starts, q changes with it: the ledger counts what was taken at the old
rate and what is taken at the new one. sigma, once calibrated, stays; where the remaining steps no
longer fit the budget, or a crash forfeited some, the node stops training a little earlier.

What this module does not give: privacy of documents cut into several records where the unit is the
record, of the shard's size, of timing, or of anything tuned by looking at private results.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from xpeer import update
from xpeer.errors import ConfigError, LocalError
from xpeer.manifest import Manifest
from xpeer.privacy import accountant, noise
from xpeer.privacy.budget import Budget, delta_of, noise_multiplier, told_size
from xpeer.privacy.clipping import DEFAULT_MEMORY_BYTES, Engine, RecordLosses, trainable
from xpeer.privacy.engine_memory import EngineMemory, setting_of
from xpeer.privacy.engines import Choice, choose_engine, sample_of
from xpeer.privacy.gradient import PrivateGradient
from xpeer.privacy.ledger import Ledger
from xpeer.privacy.norms import clip_norm_of
from xpeer.privacy.plain import OffMechanism
from xpeer.privacy.ranks import Ranks
from xpeer.privacy.signal import noise_norm
from xpeer.privacy.steps import Charged, Precision, StepResult, Switchable, check_records
from xpeer.privacy.units import units_of
from xpeer.status import PrivacySpent
from xpeer.update import PrivacyStamp, PrivateUpdate, RawUpdate

__all__ = ["Mechanism", "OffMechanism", "RecordMechanism", "build_mechanism"]


class Mechanism(Protocol):
    """What makes gradients, and certifies what comes of them."""

    engine: str
    """Name of what computes the gradients."""
    notes: list[str]
    """What the operator should know, e.g. why faster engines were refused."""

    @property
    def seen(self) -> Tensor:
        """Where the pass over the records is, (m,) int64, for checkpoints. Empty under privacy."""

    def begin_window(self, steps: int) -> int:
        """Charge, durably, until so many steps may be taken; how many may: 0 = budget spent."""

    def prepare_window(self, steps: int) -> None:
        """Begin to charge further steps in the background; `begin_window` collects them."""

    def charged(self) -> Charged:
        """What was charged since this was made, and what became of it."""

    def step_gradient(self) -> StepResult:
        """Set `grad` of every trainable parameter; uses up one charged step."""

    def stamp(self, raw: RawUpdate) -> PrivateUpdate:
        """Certify a snapshot."""

    def spent(self) -> PrivacySpent:
        """The ledger's answer; may take a moment, on any thread."""

    def close(self) -> None:
        """Wait for a charge that is being written; what is not used by then is lost."""


class RecordMechanism:
    """DP-SGD over the records, or the documents, of this shard.

    `begin_window`, `step_gradient` and `stamp` belong to one thread.

    Args:
        manifest: with privacy.mode "record".
        model: on its device.
        records: (n, T) int64, CPU.
        record_losses: sums of losses and counts of tokens by record.
        ledger: of this shard.
        micro_batch: records per pass; 0 = the engine chooses.
        memory_bytes: bound of what the engine keeps during a pass.
        precision: of forward passes in steps; engines are compared in float32.
        engine: to use instead of choosing one by `choose_engine`.
        owners: the document of each record, (n,) int64, ascending; needed where documents are the
            unit.
        generator: of noise.
        clip_norm: C of a checkpoint, where it adapts; None = begin with the manifest's.
        ranks: of this node that take each step together; the ledger is that of one of them.
        cache: folder where the choice of the engine is remembered.

    Raises:
        ConfigError: another mode, no records, or a model that can't be trained privately.
        LocalError: the ledger.
    """

    def __init__(
        self,
        manifest: Manifest,
        model: nn.Module,
        records: Tensor,
        record_losses: RecordLosses,
        ledger: Ledger,
        *,
        micro_batch: int = 0,
        memory_bytes: int = DEFAULT_MEMORY_BYTES,
        precision: Precision = nullcontext,
        engine: Engine | None = None,
        owners: Tensor | None = None,
        generator: noise.Generator = "fast",
        clip_norm: float | None = None,
        ranks: Ranks | None = None,
        cache: Path | None = None,
    ) -> None:
        rules = manifest.privacy
        if not rules.policy.clips_records:
            raise ConfigError(f"privacy.mode is {rules.mode!r}: records are not protected")
        check_records(records)
        units = units_of(rules.unit, len(records), owners, rules.document_records)
        self._parameters = trainable(model)
        self._target = rules.epsilon
        size = told_size(len(units))
        expected = min(manifest.optimiser.batch_records, size)
        self._delta = delta_of(manifest, len(units))
        self._ledger = ledger
        self._unit = units.kind
        q = expected / size
        self._sigma = noise_multiplier(manifest, ledger, self._delta, q)
        device = next(model.parameters()).device
        if engine is None:
            losses = Switchable(record_losses)
            sample = sample_of(records).to(device)
            details = rules.mode, rules.unit, expected, micro_batch, memory_bytes
            choice = choose_engine(
                model,
                losses,
                sample,
                micro_batch=micro_batch,
                memory_bytes=memory_bytes,
                memory=EngineMemory(cache, setting_of(model, records, *details)) if cache else None,
            )
            losses.precision = precision
        else:
            choice = Choice(engine, "it was asked for")
        self.engine = choice.engine.name
        self.notes: list[str] = [f"private gradients by {self.engine}: {choice.reason}"]
        self._engine_reason = choice.reason
        self._gradient = PrivateGradient(
            self._parameters,
            choice.engine,
            records,
            units,
            clip_norm_of(rules, self._sigma, expected, clip_norm),
            expected,
            q,
            noise.SecretGenerator(device, generator),
            ranks,
        )
        values = sum(parameter.numel() for parameter in self._parameters)
        self._noise_norm = noise_norm(self._sigma, expected, values)
        self._incomplete = False
        self._budget = Budget(
            ledger,
            epsilon=self._target,
            delta=self._delta,
            noise_multiplier=self._sigma,
            sampling_probability=q,
        )

    @property
    def seen(self) -> Tensor:
        """Nothing: batches are samples."""
        return torch.empty(0, dtype=torch.int64)

    def begin_window(self, steps: int) -> int:
        """Charge until so many steps may be taken, and how many may; see `Budget.begin`."""
        return self._budget.begin(steps)

    def prepare_window(self, steps: int) -> None:
        """Charge further steps in the background; see `Budget.prepare`."""
        self._budget.prepare(steps)

    def charged(self) -> Charged:
        """See `Budget.charged`."""
        return self._budget.charged

    def step_gradient(self) -> StepResult:
        """Sample, clip, add up, add noise: see `PrivateGradient`.

        Raises:
            LocalError: no charged step is left: `begin_window` comes first.
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
        """What the ledger's charges cost together, taken or not. For the operator only.

        Computed when the ledger has changed: tenths of a second. On any thread.
        """
        # in this order: steps are charged meanwhile, and epsilon holds for all that are told
        left, charged = self._budget.left, self._ledger.steps_charged
        return PrivacySpent(
            mode="record",
            epsilon_spent=accountant.epsilon_worst(self._ledger.histories(), self._delta),
            epsilon_target=self._target,
            delta=self._delta,
            noise_multiplier=self._sigma,
            steps_charged=charged,
            steps_left=left,
            unit=self._unit,
            noise_norm=self._noise_norm,
            clip_norm=self._gradient.clip_norm.norm,
            engine=self.engine,
            engine_reason=self._engine_reason,
        )

    def close(self) -> None:
        """Wait for a charge that is being written. The ledger is its owner's to close."""
        self._budget.close()

    @contextmanager
    def _all_or_nothing(self) -> Iterator[None]:
        """Leave no gradient behind that lacks its noise, and remember a step that broke off."""
        before, self._incomplete = self._incomplete, True
        done = False
        try:
            yield
            self._incomplete, done = before, True
        finally:
            if not done:
                for parameter in self._parameters:
                    parameter.grad = None


def build_mechanism(
    manifest: Manifest,
    model: nn.Module,
    records: Tensor,
    record_losses: RecordLosses,
    ledger: Ledger,
    *,
    micro_batch: int = 0,
    memory_bytes: int = DEFAULT_MEMORY_BYTES,
    seen: Tensor | None = None,
    precision: Precision = nullcontext,
    owners: Tensor | None = None,
    generator: noise.Generator = "fast",
    clip_norm: float | None = None,
    cache: Path | None = None,
) -> Mechanism:
    """The mechanism that the manifest asks for. Takes seconds where privacy is accounted for.

    Args:
        manifest: of the swarm.
        model: on its device.
        records: (n, T) int64, CPU.
        record_losses: sums of losses and counts of tokens by record.
        ledger: of this shard; untouched without privacy.
        micro_batch: training.micro_batch of the node.
        memory_bytes: bound of what the engine keeps during a pass.
        seen: of the checkpoint.
        precision: of forward passes in steps, e.g. autocast.
        owners: the document of each record, (n,) int64, ascending.
        generator: privacy.generator of the node.
        clip_norm: of the checkpoint, where it adapts.
        cache: folder where the choice of the engine is remembered.
    """
    if not manifest.privacy.policy.charges:
        return OffMechanism(
            manifest,
            model,
            records,
            record_losses,
            micro_batch=micro_batch,
            seen=seen,
            precision=precision,
        )
    return RecordMechanism(
        manifest,
        model,
        records,
        record_losses,
        ledger,
        micro_batch=micro_batch,
        memory_bytes=memory_bytes,
        precision=precision,
        owners=owners,
        generator=generator,
        clip_norm=clip_norm,
        cache=cache,
    )
