"""AdamW and its moments, which stay on this node: only its own checkpoints hold them."""

from __future__ import annotations

import torch

from xpeer.manifest import Manifest
from xpeer.training.parts import Parameters


def make_optimiser(manifest: Manifest, parameters: Parameters) -> torch.optim.AdamW:
    """AdamW (Loshchilov & Hutter 2019) with zero moments.

    The fused kernel does one pass over the memory; it exists for CPU and CUDA.
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


def read_moments(
    optimiser: torch.optim.AdamW, parameters: Parameters
) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Copy first and second moments, (num_params,) float32, CPU, and the number of updates."""
    first = torch.zeros(parameters.num_params)
    second = torch.zeros(parameters.num_params)
    start, steps = 0, 0
    for p in parameters.parameters():
        end = start + p.numel()
        if state := optimiser.state.get(p):
            first[start:end].copy_(state["exp_avg"].view(-1))
            second[start:end].copy_(state["exp_avg_sq"].view(-1))
            steps = int(state["step"])
        start = end
    return first, second, steps


def write_moments(
    optimiser: torch.optim.AdamW,
    parameters: Parameters,
    first: torch.Tensor,
    second: torch.Tensor,
    steps: int,
) -> None:
    """Put back what `read_moments` copied. Zero updates leave the optimiser fresh."""
    if steps == 0:
        return
    start = 0
    for p in parameters.parameters():
        end = start + p.numel()
        # the fused kernel keeps its counter beside the parameters
        fused = optimiser.param_groups[0]["fused"]
        optimiser.state[p] = {
            "step": torch.tensor(float(steps), device=p.device if fused else "cpu"),
            "exp_avg": first[start:end].to(p.device, copy=True).view_as(p),
            "exp_avg_sq": second[start:end].to(p.device, copy=True).view_as(p),
        }
        start = end
