"""How this node computes: what its settings ask for, and what model and device allow."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch

from xpeer.config import Training
from xpeer.manifest import Manifest
from xpeer.privacy import at_once
from xpeer.privacy.clipping import CPU_TOKENS, DEFAULT_MEMORY_BYTES, RecordLosses, trainable
from xpeer.privacy.fitting import bytes_of_passes, until_it_fits
from xpeer.privacy.steps import Precision
from xpeer.training.compiled import NOT_WITH_PRIVACY, compile_layers
from xpeer.training.losses import MEASURED_RECORDS, choose_losses, kept_logits
from xpeer.training.packing import PackedLosses, choose_packing
from xpeer.training.precision import choose_precision
from xpeer.training.recompute import Recomputing


@dataclass(frozen=True, kw_only=True, slots=True)
class Computing:
    """The parts of a step that depend on device and settings. Gradients hardly do."""

    precision: Precision
    losses: RecordLosses
    """The model's loss by record."""
    packed: PackedLosses | None
    """The same for steps, with several records in a row; None = each record is a row."""
    relieve: Callable[[], str]
    """See `Options.relieve`."""
    memory_bytes: int
    """See `Options.memory_bytes`."""
    measured_records: int
    """Records of a pass that measures a loss: no more than of a step."""
    notes: list[str] = field(default_factory=list)
    """Why it computes so, in words for the operator."""
    uncompiled: str = ""
    """Why layers are not compiled, though the operator asked for it; empty = they are, or nobody
    asked."""


def computing_of(
    settings: Training, model: torch.nn.Module, device: torch.device, manifest: Manifest
) -> Computing:
    """Choose how to compute.

    Args:
        settings: of this node.
        model: on its device.
        device: to train on.
        manifest: of the swarm.

    Raises:
        ConfigError: a setting asks for what this device or this model can't do.
    """
    precision, why = choose_precision(settings.precision, device)
    losses, of_losses = choose_losses(model)
    notes = [why, of_losses]
    packed = None
    if settings.pack == "auto" and not manifest.privacy.policy.clips_records:
        packed, of_packing = choose_packing(model, manifest.optimiser.sequence_tokens)
        notes.append(of_packing)
    if manifest.privacy.policy.clips_records:
        notes.append(kept_logits(model))
    recomputing, wanted = Recomputing(model), settings.checkpoint_activations
    if wanted == "on":
        notes.append(recomputing.require())

    def relieve() -> str:
        again = recomputing.switch_on() if wanted == "auto" else ""
        return again or at_once.halve(device)

    uncompiled = ""
    if settings.compile == "on" and manifest.privacy.policy.clips_records:
        notes.append(NOT_WITH_PRIVACY)
    elif settings.compile == "on":
        length = manifest.optimiser.sequence_tokens
        passes = partial(_try_out, model, losses, precision, length)
        said, is_compiled = compile_layers(model, partial(until_it_fits, passes, relieve))
        notes.append(said)
        uncompiled = "" if is_compiled else said
    return Computing(
        precision=precision,
        losses=losses,
        packed=packed,
        relieve=relieve,
        memory_bytes=bytes_of_passes(device, DEFAULT_MEMORY_BYTES),
        measured_records=_measured_records(settings, device, manifest),
        notes=[note for note in notes if note],
        uncompiled=uncompiled,
    )


def _try_out(
    model: torch.nn.Module, losses: RecordLosses, precision: Precision, num_tokens: int
) -> None:
    """A forward and a backward pass over a record of arbitrary tokens. It changes nothing."""
    device = next(model.parameters()).device
    records = torch.zeros(1, num_tokens, dtype=torch.int64, device=device)
    with precision.context():
        nats, _ = losses(model, records)
    torch.autograd.grad(nats.sum(), trainable(model), allow_unused=True)


def _measured_records(settings: Training, device: torch.device, manifest: Manifest) -> int:
    """Records of a pass that measures a loss. It needs less for a record than a step does, so with
    as many records it fits where steps do.
    """
    optimiser, most = manifest.optimiser, MEASURED_RECORDS
    if device.type == "cpu":  # the system kills a process that takes too much: begin with few
        most = min(most, max(1, CPU_TOKENS // optimiser.sequence_tokens))
    return min(most, settings.micro_batch or most, optimiser.batch_records)
