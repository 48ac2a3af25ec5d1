"""Makes the optimiser of local steps."""

from __future__ import annotations

import torch

from xpeer.manifest import Manifest
from xpeer.mixing.parameters import Parameters


def make_optimiser(manifest: Manifest, parameters: Parameters) -> torch.optim.AdamW:
    """Make AdamW (Loshchilov & Hutter 2019) with zero moments.

    The fused kernel passes over the memory once; it exists for CPU and CUDA.
    """
    trained = list(parameters.parameters())
    rules = manifest.optimiser
    return torch.optim.AdamW(
        trained,
        lr=rules.learning_rate,
        betas=(rules.beta1, rules.beta2),
        weight_decay=rules.weight_decay,
        fused=all(p.device.type in {"cpu", "cuda"} for p in trained),
    )
