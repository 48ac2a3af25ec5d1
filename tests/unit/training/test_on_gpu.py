"""What training does on a GPU alone, with a GPU that is pretended."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode

from tests.pretend_cuda import CUDA, PretendCuda
from tests.unit.training.loops import Parameters, manifest_with
from xpeer.mixing import fragments
from xpeer.mixing.cut import LINE, RUN, fragment_size
from xpeer.training import head, losses
from xpeer.training.flat import FlatVector
from xpeer.training.losses import autocast, choose_losses
from xpeer.training.model import build
from xpeer.training.optimiser import make_optimiser
from xpeer.training.placed import on_best, on_device

LLAMA: dict[str, Any] = {
    "model_type": "llama", "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1,
    "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 40,
    "max_position_embeddings": 16, "eos_token_id": 1, "tie_word_embeddings": True,
}  # fmt: skip
GPU = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


@pytest.mark.parametrize("supported", [True, False])
def test_losses_are_measured_in_bfloat16_where_a_gpu_has_it(
    supported: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    entered: list[tuple[str, torch.dtype]] = []

    def context(kind: str, *, dtype: torch.dtype) -> contextlib.AbstractContextManager[None]:
        entered.append((kind, dtype))
        return contextlib.nullcontext()

    def has(*, including_emulation: bool) -> bool:
        assert not including_emulation
        return supported

    monkeypatch.setattr(torch, "autocast", context)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", has)
    for device in (CUDA, torch.device("cpu")):
        with autocast(device):
            pass
    assert entered == [("cuda", torch.bfloat16)] * supported


def test_the_optimiser_is_fused_on_a_gpu() -> None:
    manifest, parameters = manifest_with(), Parameters(1)
    with PretendCuda():
        made = make_optimiser(manifest, parameters)
        assert made.defaults["fused"]
    elsewhere: Any = SimpleNamespace(
        parameters=lambda: [parameters.weight, torch.nn.Parameter(torch.empty(2, device="meta"))]
    )
    assert not make_optimiser(manifest, elsewhere).defaults["fused"]


def test_pieces_of_a_loss_are_those_of_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(losses, "_CPU_VALUES", 3 * 40)
    monkeypatch.setattr(losses, "_DEVICE_VALUES", 5 * 40)
    monkeypatch.setattr(head, "_CPU_LOGITS_FROZEN", 4 * 40)
    monkeypatch.setattr(head, "_DEVICE_LOGITS", 8 * 40)
    rows: list[int] = []
    real = torch.nn.functional.cross_entropy

    def noted(logits: torch.Tensor, *arguments: Any, **keywords: Any) -> torch.Tensor:
        rows.append(len(logits))
        return real(logits, *arguments, **keywords)

    monkeypatch.setattr(losses, "cross_entropy", noted)
    model = build(LLAMA, seed=1)
    chosen, _ = choose_losses(model)
    records = torch.randint(0, 40, (1, 12), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        here = chosen(model, records)
        assert rows == [3, 1, 3, 1, 3]
        rows.clear()
        with PretendCuda():
            there = chosen(model, records)
    assert rows == [5, 3, 3]
    torch.testing.assert_close(here[0], there[0])


class Copied(TorchFunctionMode):
    """What is brought to a GPU is a copy, which is on the CPU here."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.to and args[1] == CUDA:
            return args[0].clone()
        return func(*args, **(kwargs or {}))


def test_values_are_on_the_device_within_the_block_and_come_back_as_they_were() -> None:
    """With the very memory: it may be pages of a file."""
    model: Any = build(LLAMA, seed=1)
    tensors = [*model.parameters(), *model.buffers()]
    before = [(x.data_ptr(), x.clone()) for x in tensors]
    with pytest.raises(KeyError), Copied(), on_device(model, CUDA):
        assert not {x.data_ptr() for x in tensors} & {place for place, _ in before}
        assert model.lm_head.weight is model.model.embed_tokens.weight
        raise KeyError
    for tensor, (place, values) in zip(tensors, before, strict=True):
        assert tensor.data_ptr() == place
        assert torch.equal(tensor, values)


@pytest.mark.parametrize("fault", ["", "moving", "computing"])
def test_a_model_is_measured_on_a_gpu_if_it_fits(
    fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tried = build(LLAMA, seed=1), []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: tried.append("given back"))

    @contextlib.contextmanager
    def placed(of: torch.nn.Module, device: torch.device) -> Any:
        assert of is model
        assert device == CUDA
        tried.append("moved")
        if fault == "moving":
            raise GPU
        yield
        tried.append("moved back")

    def work() -> int:
        tried.append("computed")
        if fault == "computing" and len(tried) == 2:
            raise GPU
        return 7

    monkeypatch.setattr("xpeer.training.placed.on_device", placed)
    assert on_best(model, CUDA, work) == 7
    expected = {
        "": ["moved", "computed", "moved back"],
        "moving": ["moved", "given back", "computed"],
        "computing": ["moved", "computed", "given back", "computed"],
    }
    assert tried == expected[fault]
    tried.clear()
    assert on_best(model, torch.device("cpu"), work) == 7
    assert tried == ["computed"]


def test_other_errors_are_not_tried_again_on_the_cpu() -> None:
    def work() -> int:
        raise KeyError

    model = build(LLAMA, seed=1)
    with PretendCuda(), pytest.raises(KeyError):
        on_best(model, CUDA, work)


class Moved(TorchFunctionMode):
    """Notes the largest tensor that goes from one device to another, and in what it was computed.

    Attributes:
        values: of that tensor.
    """

    values = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.Tensor.copy_, torch.Tensor.to, torch.Tensor.add_):
            self.values = max(self.values, args[0].numel())
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("count", [1, 3])
def test_a_fragment_is_never_whole_on_the_gpu(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is copied, and added, in pieces: of one fragment, it would be the model once more."""
    monkeypatch.setattr(fragments, "_PIECE", 2 * RUN * LINE)
    num_params = 20 * count * count * RUN * LINE + 100
    vector, wanted = FlatVector(num_params, count), torch.arange(float(num_params))
    vector.write(wanted)
    sizes = [fragment_size(num_params, count, f) for f in range(count)]
    taken = [torch.empty(size) for size in sizes]
    moved = Moved()
    with PretendCuda(), moved:
        for f in range(count):
            vector.gather(f, taken[f])
            vector.add_(f, taken[f], 2.0)
    assert moved.values == 2 * RUN * LINE
    assert torch.equal(vector.read(), 3 * wanted)
