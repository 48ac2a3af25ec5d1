"""What rounding takes from an export is said, and hides no fault of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.families.models import FAMILIES
from xpeer.errors import LocalError
from xpeer.manifest.model import Lora
from xpeer.training import adapters
from xpeer.training.export import export_hf
from xpeer.training.held import hold
from xpeer.training.kept import Source
from xpeer.training.model import build

LORA = Lora(rank=2, alpha=4.0, seed=5, base_digest="")


@torch.no_grad()
def trained(family: str, *, adapted: bool) -> torch.nn.Module:
    """A model of bfloat16 values, large ones, after an update that is smaller than their steps."""
    torch.set_num_threads(1)
    model = hold(build(FAMILIES[family], seed=1), torch.bfloat16)
    if adapted:
        model = adapters.adapt(model, LORA)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.add_(3e-3)
        return model
    model = build(FAMILIES[family], seed=1)
    for parameter in model.parameters():
        parameter.copy_(4 * parameter.bfloat16().float())
        parameter.add_(5e-4 * parameter.sign())
    return model


def exported(model: torch.nn.Module, family: str, folder: Path, dtype: str) -> Any:
    return export_hf(model, None, folder, source=Source({**FAMILIES[family], "dtype": dtype}))


def test_an_update_that_rounding_takes_is_said(tmp_path: Path) -> None:
    """Such an export was refused, as if it were not what was trained."""
    family = "llama"
    done = exported(trained(family, adapted=False), family, tmp_path / "16", "bfloat16")
    (note,) = done.notes
    assert note.startswith("rounding to bfloat16 changes the logits by up to")
    assert "--dtype float32" in note
    assert not exported(trained(family, adapted=False), family, tmp_path / "32", "float32").notes


@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_rounding_hides_no_other_config(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str, adapted: bool
) -> None:
    model, config_json = trained(family, adapted=adapted), Source.config_json

    def other(self: Source, *arguments: Any, **options: Any) -> dict[str, Any]:
        config = config_json(self, *arguments, **options)
        name = "rms_norm_eps" if family == "llama" else "layer_norm_epsilon"
        return {**config, name: 1e-3}

    monkeypatch.setattr(Source, "config_json", other)
    with pytest.raises(LocalError, match="its logits differ"):
        exported(model, family, tmp_path / "out", "bfloat16")
    assert not list(tmp_path.iterdir())


def test_rounding_hides_no_adapter_of_another_scale(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, added_to = trained("llama", adapted=True), adapters.Product.added_to

    def twice(self: adapters.Product, weight: torch.Tensor) -> torch.Tensor:
        return 2 * added_to(self, weight) - weight

    monkeypatch.setattr(adapters.Product, "added_to", twice)
    with pytest.raises(LocalError, match="its logits differ"):
        exported(model, "llama", tmp_path / "out", "bfloat16")


def test_the_model_is_what_it_was(tmp_path: Path) -> None:
    model = trained("llama", adapted=False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    kinds = [type(module) for module in model.modules()]
    exported(model, "llama", tmp_path / "out", "bfloat16")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert {value.dtype for value in model.parameters()} == {torch.float32}
    assert [type(module) for module in model.modules()] == kinds
