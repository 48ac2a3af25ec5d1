"""Parameters on their way to a joiner: narrowed in place, and the frozen ones never."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from xpeer.forms import Form
from xpeer.manifest import StateForm
from xpeer.training import handed_out
from xpeer.training.handed_out import DTYPES, narrow, widened


@pytest.mark.parametrize(("num_params", "num_frozen"), [(1000, 7), (999, 5), (1001, 0), (1, 3)])
@pytest.mark.parametrize("codec", ["float32", "bfloat16"])
@pytest.mark.parametrize("kept", ["float32", "bfloat16"])
def test_a_region_comes_back_in_its_form(
    codec: str, kept: Any, num_params: int, num_frozen: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(handed_out, "_VALUES", 64)
    form = StateForm(codec, num_params, num_frozen, kept)
    values = torch.randn(num_params + num_frozen, generator=torch.Generator().manual_seed(1))
    region = memoryview(bytearray(form.most_bytes))
    own, behind = widened(region, form, "float32")
    own.copy_(values[:num_params])
    behind.copy_(values[num_params:])
    given = behind.clone()
    assert given.dtype == DTYPES[kept]
    narrow(region, num_params, codec)
    trained, frozen = widened(region, form)
    rounded = values[:num_params] if codec == "float32" else values[:num_params].bfloat16().float()
    assert torch.equal(trained, rounded)
    assert torch.equal(frozen, given)

    size = {"float32": 4, "bfloat16": 2}[kept]
    assert form.num_bytes == Form(codec, num_params).num_bytes + size * num_frozen
    assert form.most_bytes == 4 * num_params + size * num_frozen
