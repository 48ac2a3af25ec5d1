"""The step of a manifest: as a node's settings have it, and as small as they let it become."""

from __future__ import annotations

from dataclasses import replace
from typing import Final

import torch

from xpeer.config import Training
from xpeer.estimate.step import Precision, Step
from xpeer.manifest import Manifest
from xpeer.privacy import clipping, plain
from xpeer.privacy.at_once import DeviceKind, kind_of
from xpeer.training.losses import choose_device
from xpeer.training.precision import choose_precision
from xpeer.training.recompute import layers_of

LONG_S: Final = 10.0
"""A rehearsal that takes longer is worth a word."""


def step_of(manifest: Manifest, settings: Training, device: torch.device) -> Step:
    """A step as a trainer begins with it. It may go on with fewer records a pass.

    Args:
        manifest: of the swarm.
        settings: of the node.
        device: to train on.

    Raises:
        ConfigError: the device can't compute in `training.precision`.
    """
    precision = choose_precision(settings.precision, device)[0].name
    return Step(
        config=manifest.model.config,
        lora=manifest.model.lora,
        frozen=manifest.model.frozen,
        base_dtype=manifest.model.base_dtype,
        sequence_tokens=manifest.optimiser.sequence_tokens,
        micro_batch=settings.micro_batch or _records(manifest, device),
        private=manifest.privacy.policy.charges,
        precision=known_precision(precision),
        recompute=settings.checkpoint_activations == "on",
        device=kind_of(device),
    )


def smallest(step: Step, settings: Training, model: torch.nn.Module) -> Step:
    """The step that is left where memory runs out: of one record, in layers that are computed again
    if settings and model allow that.

    Args:
        step: of `step_of`.
        settings: of the node.
        model: of the step, with or without values.
    """
    again = settings.checkpoint_activations in ("auto", "on") and bool(layers_of(model))
    return replace(step, micro_batch=1, recompute=again)


def known_precision(name: str) -> Precision:
    """The precision of this name."""
    return "bfloat16" if name == "bfloat16" else "float32"


def device_and_precision(
    device: str, precision: str, *, private: bool
) -> tuple[DeviceKind, Precision, str]:
    """The kind of device and the precision that settings mean, and why, in words.

    Args:
        device: cpu, cuda, or auto: what this machine would train on.
        precision: as `training.precision`; auto = as the device is best at. Of a GPU that is not
            in this machine it is assumed that it computes in bfloat16.
        private: whether gradients are private; then another device may be chosen.
    """
    here = choose_device(private=private)[0] if device == "auto" else torch.device(device)
    if precision in ("float32", "bfloat16"):
        return kind_of(here), known_precision(precision), ""
    if here.type == "cuda" and not torch.cuda.is_available():
        why = "this machine has no GPU: bfloat16 is assumed (--precision float32 for old ones)"
        return "cuda", "bfloat16", why
    chosen, why = choose_precision("auto", here)
    return kind_of(here), known_precision(chosen.name), why


def _records(manifest: Manifest, device: torch.device) -> int:
    """Records of a pass where `training.micro_batch` does not say it.

    On a GPU a pass is made smaller until it fits, so only one record counts. On a CPU the system
    kills a process that takes too much, so what the engine begins with counts.
    """
    if device.type != "cpu":
        return 1
    length = manifest.optimiser.sequence_tokens
    if manifest.privacy.policy.clips_records:
        records = clipping.cache_records(torch.empty(0, length))
    else:
        records = max(1, plain.CPU_TOKENS // length)
    return min(records, manifest.optimiser.batch_records)
