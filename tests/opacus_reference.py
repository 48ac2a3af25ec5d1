"""Opacus' per-record gradients, clipped and summed: a third opinion, beside autograd's.

It shares no code with our engines. Its hooks note what goes into each layer and what comes back.
Its rules for each kind of layer turn that into one gradient per record (Yousefpour et al. 2021,
arXiv:2109.12298).
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from opacus.grad_sample import GradSampleModule
from torch import Tensor, nn

from xpeer.privacy.clipping import RecordLosses, trainable


def clipped_by_opacus(
    model: nn.Module, record_losses: RecordLosses, records: Tensor, clip_norm: float
) -> tuple[Tensor, list[Tensor]]:
    """Norms (n,) before clipping, and the sums of clipped gradients in the order of `trainable`.

    The hooks skip layers in evaluation mode, so layers that have parameters are in training mode
    meanwhile. Dropouts have none, and drop only if the model was in training mode before.
    """
    parameters: list[Any] = trainable(model)
    evaluating = [m for m in model.modules() if m._parameters and not m.training]
    for module in evaluating:
        module.training = True
    wrapped = GradSampleModule(model, loss_reduction="sum")
    try:
        with warnings.catch_warnings():
            # the first layer's input is token numbers, which have no gradient
            warnings.filterwarnings("ignore", message="Full backward hook is firing")
            losses, tokens = record_losses(wrapped, records)
            (losses / tokens).sum().backward()
        samples = [p.grad_sample for p in parameters]
    finally:
        wrapped.to_standard_module()
        model.zero_grad(set_to_none=True)
        for module in evaluating:
            module.training = False
    norms = torch.cat([sample.flatten(1) for sample in samples], 1).norm(dim=1)
    factors = (clip_norm / norms).clamp(max=1.0)
    return norms, [torch.tensordot(factors, sample, dims=1) for sample in samples]
