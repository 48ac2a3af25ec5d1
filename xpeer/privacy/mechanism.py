"""Private gradients, and the stamp without which nothing may be shown to anybody.

Differential privacy for records (Abadi et al. 2016, arXiv:1607.00133, algorithm 1): every step
samples each record with probability q = B / n, clips each gradient to norm C, adds up, and adds
N(0, sigma^2 C^2 I). Steps are charged to the ledger before they are taken. What follows a step,
by any optimiser, mixed with anything partners send, is post-processing.

sigma, q, n, the size of a batch and its loss are this node's secrets: only its own operator sees
them, and q takes n by `told_size`. A step with an empty batch is a step like any other.

If the shard changes between starts, q changes with it: the ledger counts what was taken at the old
rate and what is taken at the new one. sigma, once calibrated, stays; where the remaining steps no
longer fit the budget, or a crash forfeited some, the node stops training a little earlier.

What this module does not give: privacy of documents cut into several records, of the shard's size,
of timing, or of anything tuned by looking at private results.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Final, Protocol

import torch
from torch import Tensor, nn

from xpeer import update
from xpeer.errors import ConfigError, LocalError
from xpeer.manifest import Manifest
from xpeer.privacy import accountant
from xpeer.privacy.budget import Budget, noise_multiplier, told_size
from xpeer.privacy.clipping import DEFAULT_MEMORY_BYTES, Engine, RecordLosses, trainable
from xpeer.privacy.engines import choose_engine, sample_of
from xpeer.privacy.ledger import Ledger
from xpeer.privacy.noise import SecretGenerator
from xpeer.privacy.passes import Passes
from xpeer.privacy.steps import Precision, StepResult, Switchable, result_of
from xpeer.status import PrivacySpent
from xpeer.update import PrivacyStamp, PrivateUpdate, RawUpdate

_PLAIN_CPU_TOKENS: Final = 2048


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

    def step_gradient(self) -> StepResult:
        """Set `grad` of every trainable parameter; uses up one charged step."""

    def stamp(self, raw: RawUpdate) -> PrivateUpdate:
        """Certify a snapshot."""

    def spent(self) -> PrivacySpent:
        """The ledger's answer; may take a moment, on any thread."""

    def close(self) -> None:
        """Wait for a charge that is being written; what is not used by then is lost."""


class RecordMechanism:
    """DP-SGD over the records of this shard.

    `begin_window`, `step_gradient` and `stamp` belong to one thread.

    Args:
        manifest: with privacy.mode "record".
        model: on its device.
        records: (n, T) int64, CPU; each is a unit of privacy.
        record_losses: sums of losses and counts of tokens by record.
        ledger: of this shard.
        micro_batch: records per pass; 0 = the engine chooses.
        memory_bytes: bound of what the engine keeps during a pass.
        precision: of forward passes in steps; engines are compared in float32.
        engine: to use instead of choosing one by `choose_engine`.

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
    ) -> None:
        rules = manifest.privacy
        if rules.mode != "record":
            raise ConfigError(f"privacy.mode is {rules.mode!r}: records are not protected")
        _check_records(records)
        self._parameters = trainable(model)
        self._device = next(model.parameters()).device
        self._records = records
        self._clip_norm = rules.clip_norm
        self._target = rules.epsilon
        size = told_size(len(records))
        self._expected = min(manifest.optimiser.batch_records, size)
        self._q = self._expected / size
        self._delta = rules.delta or accountant.default_delta(size)
        self._ledger = ledger
        self._sigma = noise_multiplier(manifest, ledger, self._delta, self._q)
        self._generator = SecretGenerator(self._device)
        self.notes: list[str] = []
        if engine is None:
            sample = sample_of(records).to(self._device)
            losses = Switchable(record_losses)
            engine, refused = choose_engine(
                model, losses, sample, micro_batch=micro_batch, memory_bytes=memory_bytes
            )
            losses.precision = precision
            if refused:
                self.notes.append(f"private gradients by {engine.name}; refused: {refused}")
        self.engine = engine.name
        self._engine = engine
        self._incomplete = False
        self._budget = Budget(
            ledger,
            epsilon=self._target,
            delta=self._delta,
            noise_multiplier=self._sigma,
            sampling_probability=self._q,
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

    def step_gradient(self) -> StepResult:
        """Sample, clip, add up, add noise: grad = (sum + N(0, sigma^2 C^2 I)) / expected batch.

        Raises:
            LocalError: no charged step is left: `begin_window` comes first.
        """
        self._budget.use()
        with self._all_or_nothing():
            chosen = self._generator.poisson_sample(len(self._records), self._q)
            batch = self._records[chosen].to(self._device)
            sums = [_zeroed_grad(p) for p in self._parameters]
            told = self._engine.accumulate(batch, self._clip_norm, sums)
            for total in sums:
                noise = torch.empty_like(total)
                total.add_(self._generator.gaussian_(noise, self._sigma * self._clip_norm))
                total.div_(self._expected)
        return result_of(told)

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
        return PrivacySpent(
            mode="record",
            epsilon_spent=accountant.epsilon(self._ledger.segments(), self._delta),
            epsilon_target=self._target,
            delta=self._delta,
            noise_multiplier=self._sigma,
            steps_charged=self._ledger.steps_charged,
            steps_left=self._budget.left,
            engine=self.engine,
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


class OffMechanism:
    """Plain minibatches, for a swarm whose manifest says that records need no protection.

    Nothing is clipped by record, noised or charged; updates may reveal the text.

    Args:
        manifest: with privacy.mode "off".
        model: on its device.
        records: (n, T) int64, CPU.
        record_losses: sums of losses and counts of tokens by record.
        micro_batch: records per pass; 0 = all at once, or what suits a processor's caches.
        seen: `seen` of an earlier start.
        precision: of forward passes.

    Raises:
        ConfigError: the manifest asks for privacy, or there are no records.
    """

    engine = "plain"

    def __init__(
        self,
        manifest: Manifest,
        model: nn.Module,
        records: Tensor,
        record_losses: RecordLosses,
        *,
        micro_batch: int = 0,
        seen: Tensor | None = None,
        precision: Precision = nullcontext,
    ) -> None:
        if manifest.privacy.mode != "off":
            raise ConfigError(
                f"privacy.mode is {manifest.privacy.mode!r}: training without privacy is refused",
                "found another swarm with privacy.mode off, if the text is no secret",
            )
        _check_records(records)
        self.notes: list[str] = []
        self._model = model
        self._parameters = trainable(model)
        self._device = next(model.parameters()).device
        self._records = records
        self._record_losses = Switchable(record_losses)
        self._record_losses.precision = precision
        self._batch = min(manifest.optimiser.batch_records, len(records))
        self._clip = manifest.optimiser.gradient_clip
        cached = max(1, _PLAIN_CPU_TOKENS // records.shape[1])
        self._micro_batch = micro_batch or (cached if self._device.type == "cpu" else self._batch)
        self._passes = Passes(records, seen)

    @property
    def seen(self) -> Tensor:
        """See `Passes.seen`."""
        return self._passes.seen

    def begin_window(self, steps: int) -> int:
        """All of them: nothing is charged."""
        return steps

    def prepare_window(self, steps: int) -> None:
        """Nothing is charged."""

    def step_gradient(self) -> StepResult:
        """Mean gradient over the tokens of the next records in shuffled order, clipped as one."""
        chosen = self._passes.take(self._batch)
        told: list[tuple[Tensor, Tensor]] = []
        for parameter in self._parameters:
            parameter.grad = None
        for part in torch.split(self._records[chosen], self._micro_batch):
            losses, tokens = self._record_losses(self._model, part.to(self._device))
            torch.autograd.backward(losses.sum())
            told.append((losses.detach().sum(), tokens.sum()))
        total = float(torch.stack([loss for loss, _ in told]).sum())
        tokens_seen = int(torch.stack([count for _, count in told]).sum())
        with torch.no_grad():
            for parameter in self._parameters:
                if parameter.grad is not None:
                    parameter.grad.div_(max(1, tokens_seen))
        if self._clip:
            torch.nn.utils.clip_grad_norm_(self._parameters, self._clip)
        return StepResult(
            loss=total / tokens_seen if tokens_seen else None,
            records=len(chosen),
            tokens=tokens_seen,
        )

    def stamp(self, raw: RawUpdate) -> PrivateUpdate:
        """Say that the manifest asks for no privacy."""
        stamp = PrivacyStamp(mode="off", steps_charged=0, issuer=update._ISSUER)
        return PrivateUpdate(values=raw.values, step=raw.step, stamp=stamp)

    def spent(self) -> PrivacySpent:
        """Nothing is accounted for."""
        return PrivacySpent(mode="off", engine=self.engine)

    def close(self) -> None:
        """Nothing to wait for."""


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
    """
    if manifest.privacy.mode == "off":
        return OffMechanism(
            manifest,
            model,
            records,
            record_losses,
            micro_batch=micro_batch,
            seen=seen,
            precision=precision,
        )
    if manifest.privacy.mode == "update":
        from xpeer.privacy.update_mode import UpdateMechanism  # noqa: PLC0415 - it needs the above

        return UpdateMechanism(
            manifest,
            model,
            records,
            record_losses,
            ledger,
            micro_batch=micro_batch,
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
    )


def _check_records(records: Tensor) -> None:
    if records.dim() != 2 or not len(records):
        raise ConfigError(
            f"the shard has no records to train on (shape {tuple(records.shape)})",
            "check data.shard",
        )


def _zeroed_grad(parameter: nn.Parameter) -> Tensor:
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    return parameter.grad.zero_()
