"""A merged export is made tensor by tensor: neither base nor result is in memory as a whole."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from benchmarks.families.models import FAMILIES, VOCABULARY
from xpeer.errors import LocalError
from xpeer.manifest.model import Lora
from xpeer.training import adapters, export, reloading
from xpeer.training.export import export_hf
from xpeer.training.held import hold
from xpeer.training.kept import Source
from xpeer.training.losses import transformers_model
from xpeer.training.model import build
from xpeer.training.tensor_file import Pending, spill

IDS = torch.randint(0, VOCABULARY, (2, 16), generator=torch.Generator().manual_seed(3))
LORA = Lora(rank=2, alpha=4.0, seed=5, base_digest="")
DTYPES = {"float16": torch.float16, "float32": torch.float32, "bfloat16": torch.bfloat16}


def adapted(family: str) -> torch.nn.Module:
    """A base in bfloat16, with adapters that do something."""
    torch.set_num_threads(1)
    made = adapters.adapt(hold(build(FAMILIES[family], seed=1), torch.bfloat16), LORA)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "lora_B" in name:
                parameter.add_(0.05)
    return made


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_base_is_widened_one_matrix_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str, dtype: str
) -> None:
    model = adapted(family)
    expected = {
        key: product.added_to(parameter.detach())
        for parameter in model.parameters()
        for key, product in adapters.products(model).items()
        if key == id(parameter)
    }
    at_once: list[weakref.ref[torch.Tensor]] = []
    real = adapters.Product.added_to

    def added_to(self: adapters.Product, weight: torch.Tensor) -> torch.Tensor:
        assert not [made for made in at_once if made() is not None], "two were there at once"
        assert weight.dtype == torch.bfloat16
        made = real(self, weight)
        at_once.append(weakref.ref(made))
        return made

    monkeypatch.setattr(adapters.Product, "added_to", added_to)
    loaded: list[Any] = []
    load = AutoModelForCausalLM.from_pretrained

    def from_pretrained(*arguments: Any, **options: Any) -> Any:
        loaded.append(options["dtype"])
        return load(*arguments, **options)

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", from_pretrained)
    inner = transformers_model(model)
    done = export_hf(
        model, None, tmp_path / "out", source=Source({**FAMILIES[family], "dtype": dtype})
    )
    assert done.dtype == dtype
    assert loaded == [DTYPES[dtype]], "then its values stay in the pages of the file"
    assert len(at_once) == len(expected) * (1 if dtype == "float32" else 2) > 0
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert {value.dtype for value in written.values()} == {DTYPES[dtype]}
    for name, parameter in inner.named_parameters():
        value = expected.get(id(parameter), parameter.detach())
        assert torch.equal(written[name], value.to(DTYPES[dtype])), name
    matrices = [p for p in inner.parameters() if id(p) in expected]
    assert {p.dtype for p in matrices} == {torch.bfloat16}, "the model itself was not widened"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert not list((tmp_path / "out").glob(".writing-*"))


def test_a_weight_that_is_not_as_written_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = adapted("llama")
    load = reloading.load_model

    def damaged(folder: Path, dtype: torch.dtype) -> Any:
        made = load(folder, dtype)
        with torch.no_grad():
            made.get_parameter("model.layers.0.mlp.up_proj.weight").data[0, 0] += 0.25
        return made

    monkeypatch.setattr(reloading, "load_model", damaged)
    with pytest.raises(LocalError, match=r"up_proj\.weight is not what was trained"):
        export_hf(model, None, tmp_path / "out", source=Source({"dtype": "float16"}))
    assert not list(tmp_path.iterdir())


def test_logits_that_differ_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapters.Product, "added_to", lambda self, weight: weight.float() + 0.5)
    with pytest.raises(LocalError, match="its logits differ"):
        export_hf(adapted("llama"), None, tmp_path / "out", source=Source({"dtype": "float16"}))


def test_a_full_model_is_not_copied_where_its_type_is_kept(tmp_path: Path) -> None:
    model = build(FAMILIES["llama"], seed=1)
    state = export._written(model, torch.float32, {}, tmp_path)
    own = model.state_dict()
    assert all(value.data_ptr() == own[name].data_ptr() for name, value in state.items())
    half = export._written(model, torch.float16, {}, tmp_path)
    assert all(torch.equal(value, own[name].half()) for name, value in half.items())
    assert half["lm_head.weight"] is half["model.embed_tokens.weight"] or (
        own["lm_head.weight"].data_ptr() != own["model.embed_tokens.weight"].data_ptr()
    )
    assert not list(tmp_path.iterdir())


def test_spilled_tensors_are_those_that_were_made(tmp_path: Path) -> None:
    values = {
        "wide": torch.arange(6, dtype=torch.float64).view(2, 3),
        "narrow": torch.arange(5, dtype=torch.float32),
        "none": torch.empty(0, 3),
        "number": torch.tensor(3.0),
    }
    pending = {
        name: Pending(torch.bfloat16, tuple(value.shape), value.clone)
        for name, value in values.items()
    }
    made = spill(pending, tmp_path)
    assert not list(tmp_path.iterdir()), "it has no name"
    for name, value in values.items():
        assert torch.equal(made[name], value.bfloat16())
    made["wide"].add_(1)  # its own pages
    assert spill({}, tmp_path) == {}


def test_what_was_to_be_made_has_to_have_the_shape_that_was_said(tmp_path: Path) -> None:
    wrong = Pending(torch.float32, (2, 2), lambda: torch.zeros(4))
    with pytest.raises(ValueError, match="was due"):
        spill({"x": wrong}, tmp_path)
    assert not list(tmp_path.iterdir())
