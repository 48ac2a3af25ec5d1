"""Makes the optimiser of local steps.

Its moments are there before the first step is charged. A step of the fused kernel takes no memory
then, so that none is lost for want of it. On other devices (mps) AdamW needs some for each
parameter. A step that breaks off there can't be taken again, since some parameters have moved; but
no private step is taken there, so no charge is lost.
"""

from __future__ import annotations

import torch

from xpeer.errors import ShortOfMemoryError
from xpeer.manifest import Manifest
from xpeer.mixing.parameters import Parameters
from xpeer.shortage import out_of_memory


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


def allocate_moments(optimiser: torch.optim.AdamW) -> None:
    """Make the zero moments that AdamW would make in its first step, unless it has moments.

    Raises:
        ShortOfMemoryError: they do not fit.
    """
    if optimiser.state:
        return
    (group,) = optimiser.param_groups
    try:
        for parameter in group["params"]:
            where = parameter.device if group["fused"] else torch.device("cpu")
            optimiser.state[parameter] = {
                "step": torch.zeros((), dtype=torch.float32, device=where),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }
    except (RuntimeError, MemoryError) as e:
        optimiser.state.clear()
        if not out_of_memory(e):
            raise
        raise ShortOfMemoryError(
            "AdamW's moments, 8 bytes a trained parameter, do not fit into memory beside the model",
            "no step was charged; end what else uses the device, give the trainer more memory, or "
            "set training.device to cpu; in a new swarm train adapters; `xpeer estimate` says what "
            "each phase needs",
        ) from e
