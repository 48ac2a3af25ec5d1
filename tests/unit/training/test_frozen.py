"""What no text reaches: found by following the text, and kept out of everything that trains."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec
import pytest
import torch
from torch import nn

from tests.unit.test_manifest import manifest
from xpeer.errors import ConfigError, LocalError
from xpeer.manifest import Manifest
from xpeer.manifest.model import Frozen
from xpeer.training import frozen
from xpeer.training.flat import FlatParameters, digest, read_flat
from xpeer.training.model import build
from xpeer.training.reach import out_of_reach

GPT2 = {
    "model_type": "gpt2", "vocab_size": 64, "n_embd": 16, "n_layer": 1, "n_head": 2,
    "n_positions": 40,
}  # fmt: skip
POSITIONS = "transformer.wpe.weight"
LENGTH = 12


class Tower(nn.Module):
    """An image tower that text never enters."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Linear(3, 4)


def test_parts_that_are_never_called() -> None:
    model: Any = build(GPT2, seed=1)
    model.transformer.tower = Tower()
    found = out_of_reach(model, LENGTH, 64)
    assert found == {
        POSITIONS: (0, LENGTH - 1),
        "transformer.tower.patches.weight": (0, 0),
        "transformer.tower.patches.bias": (0, 0),
    }
    for parameter in model.transformer.tower.parameters():
        parameter.requires_grad_(False)
    assert set(out_of_reach(model, LENGTH, 64)) == {POSITIONS}  # what isn't trained needs no word


def looking(act: Callable[[torch.Tensor], object]) -> Callable[..., Any]:
    """A hook on the embedding: Python looks at what came out."""

    def hook(module: nn.Module, inputs: object, out: torch.Tensor) -> None:
        act(out)

    return hook


@pytest.mark.parametrize(
    "act",
    [
        lambda x: x.sum().item(),
        lambda x: x.tolist(),
        lambda x: bool((x > 0).any()),
        lambda x: (x > 0).nonzero(),
        lambda x: x[x > 0],
        lambda x: x.numpy(),
        lambda x: int(x.argmax()),
    ],
)
def test_where_text_decides_everything_is_reached(act: Callable[[torch.Tensor], object]) -> None:
    model: Any = build(GPT2, seed=1)
    model.transformer.wte.register_forward_hook(looking(act))
    assert out_of_reach(model, LENGTH, 64) == {}


def test_text_written_into_a_tensor_is_followed() -> None:
    model: Any = build(GPT2, seed=1)
    original = model.transformer.wpe.forward

    def by_text(places: torch.Tensor) -> torch.Tensor:
        buffer = torch.zeros_like(places)
        buffer.view(-1)[:3].copy_(model.seen[:3])  # through a view
        out: torch.Tensor = original(buffer + places)
        return out

    def keep(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        model.seen = inputs[0].flatten() * 0

    model.transformer.wte.register_forward_pre_hook(keep)
    model.transformer.wpe.forward = by_text
    assert out_of_reach(model, LENGTH, 64) == {}


def test_a_table_that_is_read_whole_is_reached() -> None:
    model: Any = build(GPT2, seed=1)
    model.transformer.wte.register_forward_hook(
        lambda module, inputs, out: out + model.transformer.wpe.weight.mean()
    )
    assert out_of_reach(model, LENGTH, 64) == {}


def test_frozen_and_put_together_again() -> None:
    model: Any = build(GPT2, seed=1)
    names = [name for name, _ in model.named_parameters()]
    before = read_flat(model)
    part = frozen.find(model, LENGTH, 64)
    assert part is not None
    assert torch.equal(read_flat(model), before)  # looking changes nothing
    rows = LENGTH - 1
    assert (part.parameters, part.num_values) == ({POSITIONS: (0, rows)}, (40 - rows) * 16)
    frozen.freeze(model, part)
    assert model.transformer.wpe.weight.shape == (rows, 16)
    assert [name for name, _ in model.named_parameters()] == names
    flat = FlatParameters(model)
    assert flat.num_params == before.numel() - part.num_values
    assert frozen.fits(model, part)
    with pytest.raises(LocalError, match="are not the"):
        frozen.restore(model, part, torch.zeros(part.num_values))
    frozen.restore(model, part, frozen.values(model, part))
    flat.write(flat.read() + 1)  # as noise would
    frozen.thaw(model, part)
    moved = read_flat(model) - before
    table = dict(
        zip(names, torch.split(moved, [p.numel() for p in model.parameters()]), strict=True)
    )
    kept = table.pop(POSITIONS).view(40, 16)
    assert torch.equal(kept[rows:], torch.zeros(40 - rows, 16))
    assert float(kept[:rows].min()) > 0.99
    assert all(float(value.min()) > 0.99 for value in table.values())


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_values_of_bfloat16_are_kept_and_given_in_it(dtype: str) -> None:
    """As those of a model that was published in it: nothing is rounded."""
    model: Any = build(GPT2, seed=1)
    if dtype == "bfloat16":
        model.bfloat16().float()
    part = frozen.find(model, LENGTH, 64)
    assert part is not None
    assert part.dtype == dtype
    before = model.transformer.wpe.weight.detach().clone()
    frozen.freeze(model, part)
    kept = frozen.values(model, part)
    assert str(kept.dtype) == f"torch.{dtype}"
    assert digest(kept.float()) == part.digest
    frozen.write(model, part, torch.zeros_like(kept))
    assert not frozen.fits(model, part)
    frozen.restore(model, part, kept)
    assert frozen.fits(model, part)
    frozen.restore(model, part, kept.float())  # as an older checkpoint has them
    frozen.thaw(model, part)
    assert torch.equal(model.transformer.wpe.weight, before)


def test_a_manifest_that_names_what_is_not_there() -> None:
    for wrong in ("transformer.nothing.weight", "transformer.wpe.bias"):
        with pytest.raises(ConfigError, match=r"model\.frozen names"):
            frozen.freeze(build(GPT2, seed=1), Frozen({wrong: (0, 4)}, 1, ""))
    with pytest.raises(ConfigError, match=r"model\.frozen names"):
        frozen.freeze(build(GPT2, seed=1), Frozen({POSITIONS: (0, 41)}, 1, ""))
    with pytest.raises(ConfigError, match="num_values is 7, this model has 32"):
        frozen.freeze(build(GPT2, seed=1), Frozen({POSITIONS: (0, 38)}, 7, ""))


def test_older_manifests_train_everything() -> None:
    tree = msgspec.to_builtins(manifest())
    for field in ("frozen", "generation", "source"):
        tree["model"].pop(field)
    old = msgspec.convert(tree, Manifest)
    assert old.model.frozen is None
    assert old.model.state_values == old.model.num_params
    tree["model"]["frozen"] = {"parameters": {POSITIONS: [0, 4]}, "num_values": 9, "digest": ""}
    given = msgspec.convert(tree, Manifest).state_form
    assert (given.num_frozen, given.frozen_codec) == (9, "float32")
    model = build(GPT2, seed=1)
    before = read_flat(model)
    frozen.freeze(model, old.model.frozen)
    assert torch.equal(read_flat(model), before)
    assert frozen.values(model, None).numel() == 0
