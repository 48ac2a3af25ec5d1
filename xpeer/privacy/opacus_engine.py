"""Gradients of single records by opacus's hooks, clipped and summed (see `clipping`).

Hooks note what goes into each layer and comes back; opacus's rules for each layer turn that into
one gradient per record (Yousefpour et al. 2021, arXiv:2109.12298). Only the hooks are used: its
PrivacyEngine would own the loader, the optimiser and the count of steps.

What this module does not give: any certainty that opacus understood the model. `choose_engine`
compares it with plain autograd first. HF's GPT-2 needs position ids of its own for every record.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from xpeer.errors import LocalError
from xpeer.privacy.clipping import (
    DEFAULT_MEMORY_BYTES,
    Bound,
    Clipped,
    RecordLosses,
    batches,
    cache_records,
    clip_factors,
    squared_norms,
    trainable,
)

_EXPECTED_WARNINGS = (
    # the first layer's input is token numbers, which have no gradient
    "Full backward hook is firing when gradients are computed with respect to module outputs",
)


class OpacusEngine:
    """Some records in one pass, each gradient written down.

    Opacus' hooks are in place only during `accumulate`, and the parameters' own `grad` is left as
    it was. They look only at layers in training mode, so those that have parameters are put into it
    for that time; whether dropouts drop stays the model's decision.

    Args:
        model: records must not influence one another.
        record_losses: the loss.
        micro_batch: records per pass; 0 = as many as the memory allows.
        memory_bytes: for the gradients that are written down.

    Raises (from `accumulate`):
        LocalError: opacus told no gradient for a parameter that has one.
    """

    name = "opacus"

    def __init__(
        self,
        model: nn.Module,
        record_losses: RecordLosses,
        *,
        micro_batch: int = 0,
        memory_bytes: int = DEFAULT_MEMORY_BYTES,
    ) -> None:
        self._model = model
        self._record_losses = record_losses
        self._parameters = trainable(model)
        record_bytes = 4 * sum(p.numel() for p in self._parameters)
        self._micro_batch = micro_batch
        self._fits = max(1, memory_bytes // max(1, record_bytes))

    def accumulate(self, records: Tensor, clip_norm: Bound, sums: Sequence[Tensor]) -> Clipped:
        """See `clipping.Engine`."""
        size = self._micro_batch or min(self._fits, cache_records(records))
        with _hooked(self._model, self._parameters):
            told = [
                self._pass(part, bounds, sums) for part, bounds in batches(records, clip_norm, size)
            ]
        empty = torch.zeros(0, device=records.device)
        return Clipped(
            torch.cat([empty, *(c.losses for c in told)]),
            torch.cat([empty.long(), *(c.tokens for c in told)]),
            torch.cat([empty.double(), *(c.norms for c in told)]),
        )

    def _pass(self, records: Tensor, bounds: Tensor, sums: Sequence[Tensor]) -> Clipped:
        with torch.enable_grad(), _without_expected_warnings():
            losses, tokens = self._record_losses(self._model, records)
            (losses / tokens.clamp(min=1)).sum().backward()  # type: ignore[no-untyped-call]
        with torch.no_grad():
            grads = [_taken(p, len(records)) for p in self._parameters]
            squares = torch.zeros(len(records), dtype=torch.float64, device=records.device)
            for grad in grads:
                if grad is not None:
                    squares += squared_norms(grad)
            norms = squares.sqrt()
            factors = clip_factors(norms, bounds)
            bad = ~torch.isfinite(norms)
            for total, grad in zip(sums, grads, strict=True):
                if grad is None:
                    continue
                if bool(bad.any()):  # 0 times infinity is not 0
                    grad[bad] = 0.0
                total.view(-1).addmv_(grad.flatten(1).T, factors.to(grad.dtype))
        return Clipped(losses.detach(), tokens, norms)


def _taken(parameter: nn.Parameter, batch: int) -> Tensor | None:
    """The gradients by record, (B, *shape), taken off the parameter; None where there is none."""
    found = getattr(parameter, "grad_sample", None)
    has_gradient = parameter.grad is not None
    parameter.grad = None
    parameter.grad_sample = None  # type: ignore[attr-defined]  # opacus reads and writes it
    if found is None and not has_gradient:
        return None
    if not isinstance(found, Tensor) or found.shape != (batch, *parameter.shape):
        raise LocalError("opacus told no gradient for each record of some layer")
    return found


@contextmanager
def _hooked(model: nn.Module, parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    # imported late: slow, and only this engine needs it
    from opacus.grad_sample.grad_sample_module import GradSampleHooks  # noqa: PLC0415

    # backward would add the sum of unclipped gradients to whatever is there
    kept = [p.grad for p in parameters]
    evaluating = [m for m in model.modules() if m._parameters and not m.training]
    for module in evaluating:
        module.training = True
    for parameter in parameters:
        parameter.grad = None
    hooks: GradSampleHooks | None = None
    try:
        hooks = GradSampleHooks(model, batch_first=True, loss_reduction="sum")
        yield
    finally:
        if hooks is not None:
            hooks.cleanup()
        for module in model.modules():
            for name in ("activations", "max_batch_len"):
                if hasattr(module, name):  # left by a pass that failed
                    delattr(module, name)
        for module in evaluating:
            module.training = False
        for parameter, grad in zip(parameters, kept, strict=True):
            parameter.grad = grad


@contextmanager
def _without_expected_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        for message in _EXPECTED_WARNINGS:
            warnings.filterwarnings("ignore", message=message)
        yield
