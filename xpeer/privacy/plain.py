"""Training without privacy, for swarms whose manifest says so."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

import torch
from torch import Tensor, nn

from xpeer import update
from xpeer.accounts.budget import Charged
from xpeer.errors import ConfigError
from xpeer.manifest import Manifest
from xpeer.privacy.clipping import RecordLosses, trainable
from xpeer.privacy.fitting import halved, until_it_fits
from xpeer.privacy.options import DEFAULT, Options
from xpeer.privacy.passes import Passes
from xpeer.privacy.steps import Records, StepResult, Switchable, check_records
from xpeer.status import PrivacySpent
from xpeer.update import PrivacyStamp, PrivateUpdate, RawUpdate

CPU_TOKENS: Final = 2048
"""Tokens of a pass on a processor. Larger passes fall out of its caches."""


class OffMechanism:
    """Plain minibatches, for a swarm whose manifest says that records need no protection.

    Gradients are not clipped by record, noised or charged. Updates may reveal the text.

    Args:
        manifest: a manifest with privacy.mode "off".
        model: the model, on its device.
        records: (n, T) int64, CPU.
        record_losses: sums of losses and counts of tokens by record.
        options: how this node computes. A micro_batch of 0 means all records at once, or on a CPU
            what suits its caches; it counts rows where several records are in one.
        seen: `seen` of an earlier start.

    Raises:
        ConfigError: the manifest asks for privacy, or there are no records.
    """

    engine = "plain"

    def __init__(
        self,
        manifest: Manifest,
        model: nn.Module,
        records: Records,
        record_losses: RecordLosses,
        options: Options = DEFAULT,
        *,
        seen: Tensor | None = None,
    ) -> None:
        if manifest.privacy.policy.charges:
            raise ConfigError(
                f"privacy.mode is {manifest.privacy.mode!r}: training without privacy is refused",
                "found another swarm with privacy.mode off, if the text is no secret",
            )
        check_records(records)
        self.notes: list[str] = []
        self._model = model
        self._parameters = trainable(model)
        self._device = next(model.parameters()).device
        self._records = records
        self._record_losses = Switchable(record_losses)
        self._record_losses.precision = options.precision
        self._batch = min(manifest.optimiser.batch_records, len(records))
        self._clip = manifest.optimiser.gradient_clip
        cached = max(1, CPU_TOKENS // records.shape[1])
        whole = cached if self._device.type == "cpu" else self._batch
        self._micro_batch = options.micro_batch or whole
        self._relieve = options.relieve
        self._divide = options.divide
        self._passes = Passes(records, seen)

    @property
    def seen(self) -> Tensor:
        """See `Passes.seen`."""
        return self._passes.seen

    def charge_until(self, steps: int) -> int:
        """Allow all steps: none is charged."""
        return steps

    def charge_ahead(self, steps: int) -> None:
        """Do nothing: no step is charged."""

    def charged(self) -> Charged:
        """Return zeros: no step is charged."""
        return Charged()

    def step_gradient(self) -> StepResult:
        """Set `grad` to the mean gradient over the tokens of the next records in shuffled order.

        The mean is clipped as a whole, if the manifest asks for that.
        """
        chosen = self._passes.take(self._batch)
        measured = until_it_fits(lambda: self._add_up(self._records[chosen]), self._shrink)
        total = float(torch.stack([loss for loss, _ in measured]).sum())
        tokens_seen = int(torch.stack([count for _, count in measured]).sum())
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

    def _add_up(self, records: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Set `grad` to the sum over these records; returns losses and tokens of each pass."""
        measured: list[tuple[Tensor, Tensor]] = []
        for parameter in self._parameters:
            parameter.grad = None
        for part in self._parts(records):
            losses, tokens = self._record_losses(self._model, part)
            torch.autograd.backward(losses.sum())
            measured.append((losses.detach().sum(), tokens.sum()))
        return measured

    def _parts(self, records: Tensor) -> Iterable[Tensor]:
        """The records of each pass."""
        if self._divide is not None:
            return self._divide(records, self._micro_batch)
        return (part.to(self._device) for part in torch.split(records, self._micro_batch))

    def _shrink(self) -> str:
        """Compute with fewer records a pass; see `fitting.until_it_fits`."""
        self._micro_batch, words = halved(min(self._micro_batch, self._batch))
        return words or self._relieve()

    def stamp(self, raw: RawUpdate) -> PrivateUpdate:
        """Stamp a snapshot as one of a swarm without privacy."""
        stamp = PrivacyStamp(mode="off", steps_charged=0, issuer=update._ISSUER)
        return PrivateUpdate(values=raw.values, step=raw.step, stamp=stamp)

    def spent(self) -> PrivacySpent:
        """Return the mode and the engine: there is no account."""
        return PrivacySpent(mode="off", engine=self.engine)

    def close(self) -> None:
        """Do nothing: no charge is being written."""
