"""Factors in 16 bits are multiplied by way of 16 bits, and nothing is lost."""

from __future__ import annotations

import pytest
import torch

from xpeer.privacy import products
from xpeer.privacy.products import bmm


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
        monkeypatch.setattr(products, "_WAYS", {"cpu": (self, "fewer")})
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
    assert setting.seen == ["fewer" if dtype == torch.bfloat16 else "as before"]
    with pytest.raises(RuntimeError):
        bmm(*reversed(factors(dtype)))
    assert setting.fp32_precision == "as before"


@pytest.mark.parametrize(("size", "way"), [(2.0**60, "fewer"), (2.0**61, "as before")])
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


def test_all_devices_have_the_setting() -> None:
    for setting, _ in products._WAYS.values():
        assert isinstance(setting.fp32_precision, str)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA")
def test_a_gpu_loses_nothing_either() -> None:
    one, two = factors(torch.bfloat16)
    exact = torch.bmm(one.double(), two.double())
    found = bmm(one.cuda(), two.cuda()).cpu()
    assert float((found - exact).abs().max() / exact.abs().max()) < 1e-6
