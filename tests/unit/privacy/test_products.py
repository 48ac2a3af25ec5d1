"""Factors in 16 bits are multiplied by way of 16 bits, and nothing is lost."""

from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from xpeer.privacy import products
from xpeer.privacy.products import bmm, multiplying_elsewhere


def factors(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    one, two = (torch.randn(3, 127, width, generator=generator) for width in (80, 112))
    return one.to(dtype).transpose(1, 2), two.to(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_product_is_that_of_float32(dtype: torch.dtype) -> None:
    one, two = factors(dtype)
    exact = torch.bmm(one.double(), two.double())
    found = bmm(one, two)
    assert found.dtype == torch.float32
    assert float((found - exact).abs().max() / exact.abs().max()) < 1e-6


class Setting:
    """torch's setting, and what it was at each product."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.fp32_precision, self.seen = "as before", list[str]()
        self._multiply = torch.bmm
        monkeypatch.setattr(products, "_SETTING", self)
        monkeypatch.setattr(torch, "bmm", self.multiply)

    def multiply(self, one: torch.Tensor, two: torch.Tensor) -> torch.Tensor:
        self.seen.append(self.fp32_precision)
        return self._multiply(one, two)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_setting_holds_for_exact_products_alone(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    setting = Setting(monkeypatch)
    bmm(*factors(dtype))
    assert setting.seen == ["bf16" if dtype == torch.bfloat16 else "as before"]
    with pytest.raises(RuntimeError):
        bmm(*reversed(factors(dtype)))
    assert setting.fp32_precision == "as before"


@pytest.mark.parametrize(("size", "way"), [(2.0**60, "bf16"), (2.0**61, "as before")])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_a_huge_factor_would_show_what_is_dropped(
    size: float, way: str, sign: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    setting = Setting(monkeypatch)
    for place in range(2):
        two = list(factors(torch.bfloat16))
        two[place][0, 1, 2] = sign * size
        bmm(*two)
    assert setting.seen == [way, way]


def test_small_products_are_not_worth_a_look(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "_is_exact", lambda _: pytest.fail("it was looked at"))
    one, two = factors(torch.bfloat16)
    assert bmm(one[:, :8], two).shape == (3, 8, 112)


def test_numbers_that_are_hardly_there_count() -> None:
    tiny, huge = (torch.full((1, 64, 64), 2.0**power).bfloat16() for power in (-130, 120))
    assert float(bmm(tiny, huge).max()) == 64 * 2.0**-10


def test_a_processor_has_the_setting() -> None:
    assert isinstance(products._SETTING.fp32_precision, str)


def test_no_other_thread_multiplies_in_fewer_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    setting, began = Setting(monkeypatch), threading.Event()
    one, two = factors(torch.bfloat16)

    def measure() -> None:
        began.set()
        with multiplying_elsewhere():
            torch.bmm(one.float(), two.float())

    other = threading.Thread(target=measure)

    def multiply(one: torch.Tensor, two: torch.Tensor) -> torch.Tensor:
        if threading.current_thread() is not other:
            other.start()
            assert began.wait(10)
        return setting.multiply(one, two)

    monkeypatch.setattr(torch, "bmm", multiply)
    bmm(one, two)
    other.join()
    assert setting.seen == ["bf16", "as before"]


def test_while_another_thread_multiplies_all_is_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    setting = Setting(monkeypatch)
    with multiplying_elsewhere():
        bmm(*factors(torch.bfloat16))
    bmm(*factors(torch.bfloat16))
    assert setting.seen == ["as before", "bf16"]


class OnGpu:
    """A factor as on a GPU, and torch's product of two."""

    def __init__(self, factor: torch.Tensor) -> None:
        self.factor, self.shape, self.dtype = factor, factor.shape, factor.dtype
        self.device = SimpleNamespace(type="cuda")

    def float(self) -> OnGpu:
        return OnGpu(self.factor.float())


class Gpu:
    """Multiplies as torch does there. Meanwhile another thread compiles, and puts the setting back
    when the product is done.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.seen = list[tuple[Any, ...]]()
        self._restored = list[str]()
        monkeypatch.setattr(torch, "bmm", self.multiply)

    def multiply(self, one: Any, two: Any, out_dtype: torch.dtype | None = None) -> Any:
        if out_dtype is not None:  # what torch refuses
            assert one.dtype == two.dtype
            assert one.dtype in (torch.bfloat16, torch.float16)
        self._restored.append(torch.backends.cuda.matmul.fp32_precision)
        self.seen.append((one.dtype, out_dtype))
        return torch.matmul(one.factor.double(), two.factor.double())

    def compiled(self) -> None:
        """The other thread puts back what it found when it began."""
        for found in self._restored:
            torch.backends.cuda.matmul.fp32_precision = found


def test_on_a_gpu_factors_are_multiplied_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu, default = Gpu(monkeypatch), torch.backends.cuda.matmul.fp32_precision
    one, two = (OnGpu(factor) for factor in factors(torch.bfloat16))
    try:
        bmm(one, two)  # type: ignore[arg-type]
        gpu.compiled()
        assert torch.backends.cuda.matmul.fp32_precision == default
    finally:
        torch.backends.cuda.matmul.fp32_precision = default
    assert gpu.seen == [(torch.bfloat16, torch.float32)]


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_others_are_multiplied_in_float32_on_a_gpu(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu = Gpu(monkeypatch)
    one, two = (OnGpu(factor) for factor in factors(dtype))
    bmm(one, two)  # type: ignore[arg-type]
    assert gpu.seen == [(torch.float32, None)]
    assert not products._is_exact(one)  # type: ignore[arg-type]


def test_torch_multiplies_in_this_way() -> None:
    one, two = (factor.to("meta") for factor in factors(torch.bfloat16))
    found = torch.bmm(one, two, out_dtype=torch.float32)
    assert (found.dtype, found.shape) == (torch.float32, (3, 80, 112))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA")
def test_a_gpu_loses_nothing_either() -> None:
    one, two = factors(torch.bfloat16)
    exact = torch.bmm(one.double(), two.double())
    found = bmm(one.cuda(), two.cuda()).cpu()
    assert float((found - exact).abs().max() / exact.abs().max()) < 1e-6
