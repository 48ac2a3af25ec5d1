"""The region of a whole model between daemon and trainer, in the form that joiners are sent.

    float32     (num_params,) float32, then the frozen values
    bfloat16    (num_params,) bfloat16, then the frozen values

Frozen values are in `model.frozen.dtype` of the manifest, which rounds none of them.

Narrowing happens in place, piece by piece, so that it needs no memory of the model's size.
"""

from __future__ import annotations

from typing import Final

import torch

from xpeer.forms import Form
from xpeer.manifest import StateForm

DTYPES: Final = {"float32": torch.float32, "bfloat16": torch.bfloat16}
"""By `StateForm.codec`."""
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
    region: memoryview, form: StateForm, codec: str | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Read a region in the form that joiners are sent.

    Args:
        region: of a model; with trained values in float32 the results are views of it.
        form: of the manifest.
        codec: what the trained values are in; None = that of the form.

    Returns:
        The trained values, (num_params,) float32, and the frozen ones, (num_frozen,) of their type.
    """
    codec, count = codec or form.codec, form.num_params
    trained = torch.frombuffer(region, dtype=DTYPES[codec], count=count)
    size, kind = Form(codec, count).num_bytes, DTYPES[form.frozen_codec]
    if not form.num_frozen:
        return trained.float(), torch.empty(0, dtype=kind)
    behind = region[size : size + kind.itemsize * form.num_frozen]
    if codec != "float32":  # they may lie at an address that their type can't have
        behind = memoryview(bytearray(behind))
    return trained.float(), torch.frombuffer(behind, dtype=kind)
