"""Parameters on their way to a joiner: narrowed in place, and the frozen ones never."""

from __future__ import annotations

import pytest
import torch

from xpeer.forms import Form
from xpeer.manifest import StateForm
from xpeer.training import handed_out
from xpeer.training.handed_out import narrow, widened


@pytest.mark.parametrize(("num_params", "num_frozen"), [(1000, 7), (999, 5), (1001, 0), (1, 3)])
@pytest.mark.parametrize("codec", ["float32", "bfloat16"])
def test_a_region_comes_back_in_its_form(
    codec: str, num_params: int, num_frozen: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(handed_out, "_VALUES", 64)
    values = torch.randn(num_params + num_frozen, generator=torch.Generator().manual_seed(1))
    region = bytearray(values.numpy().tobytes())
    narrow(memoryview(region), num_params, codec)
    trained, frozen = widened(memoryview(region), num_params, num_frozen, codec)
    rounded = values[:num_params] if codec == "float32" else values[:num_params].bfloat16().float()
    assert torch.equal(trained, rounded)
    assert torch.equal(frozen, values[num_params:])

    form = StateForm(codec, num_params, num_frozen)
    assert form.num_bytes == Form(codec, num_params).num_bytes + 4 * num_frozen
