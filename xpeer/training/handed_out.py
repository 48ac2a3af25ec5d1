"""The region of a whole model between daemon and trainer, in the form that joiners are sent.

    float32     (num_params,) float32, then the frozen values, float32
    bfloat16    (num_params,) bfloat16, then the frozen values, float32: these are never rounded

Narrowing happens in place, piece by piece, so that it needs no memory of the model's size.
"""

from __future__ import annotations

from typing import Final

import torch

from xpeer.forms import Form

_VALUES: Final = 1 << 20
"""Number of values that are narrowed at once."""


def narrow(region: memoryview, num_params: int, codec: str) -> None:
    """Bring a region from float32 into the form that joiners are sent.

    Args:
        region: trained values in float32, then frozen ones; changed.
        num_params: number of trained values.
        codec: float32 or bfloat16.
    """
    if codec == "float32":
        return
    own = torch.frombuffer(region, dtype=torch.float32, count=num_params)
    out = torch.frombuffer(region, dtype=torch.bfloat16, count=num_params)
    for start in range(0, num_params, _VALUES):
        part = slice(start, start + _VALUES)
        out[part] = own[part].to(torch.bfloat16)  # a copy first: the two overlap
    frozen, size = region[4 * num_params :], Form(codec, num_params).num_bytes
    region[size : size + len(frozen)] = bytes(frozen)


def widened(
    region: memoryview, num_params: int, num_frozen: int, codec: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Read a region in the form that joiners are sent.

    Args:
        region: of a model; in float32 the results are views of it.
        num_params: number of trained values.
        num_frozen: number of frozen values.
        codec: float32 or bfloat16.

    Returns:
        The trained values, (num_params,) float32, and the frozen ones, (num_frozen,) float32.
    """
    if codec == "float32":
        whole = torch.frombuffer(region, dtype=torch.float32, count=num_params + num_frozen)
        return whole[:num_params], whole[num_params:]
    trained = torch.frombuffer(region, dtype=torch.bfloat16, count=num_params).float()
    size = Form(codec, num_params).num_bytes
    behind = bytearray(region[size : size + 4 * num_frozen])
    if not num_frozen:
        return trained, torch.empty(0)
    return trained, torch.frombuffer(behind, dtype=torch.float32)
