"""Noise where memory runs out while it is drawn. Each value gets its noise exactly once."""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from tests.pretend_cuda import PretendCuda
from tests.unit.accounts.ledgers import open_declared
from tests.unit.privacy.models import by_autograd, llama, record_losses, some_records
from tests.unit.privacy.test_fitting import CPU, GPU
from tests.unit.privacy.test_mechanism import CLIP, RAW, grads, manifest
from tests.unit.privacy.test_on_gpu import Gpu
from tests.unit.privacy.test_units import Chosen
from xpeer.accounts.ledger import Ledger
from xpeer.errors import LocalError, ShortOfMemoryError
from xpeer.privacy import noise
from xpeer.privacy.clipping import MicrobatchEngine
from xpeer.privacy.mechanism import RecordMechanism
from xpeer.privacy.noise import SecretGenerator
from xpeer.privacy.options import Options

MANY = 200_000
ALL = [0, 1, 2, 3, 4, 5, 6]


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    with open_declared(tmp_path / "ledger.sqlite") as opened:
        yield opened


class Short(TorchFunctionMode):
    """Has operations on values in float64 run out of memory.

    Args:
        fails: says for an operation's number and size whether it does.
        error: what torch raises.

    Attributes:
        failed: how often memory ran out.
    """

    def __init__(self, fails: Callable[[int, int], bool], error: Exception = GPU) -> None:
        super().__init__()
        self.failed = 0
        self._fails, self._error = fails, error
        self._operations = 0

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        wide = [x for x in (*args, out) if isinstance(x, Tensor) and x.dtype == torch.float64]
        if wide and isinstance(out, Tensor):
            self._operations += 1
            if self._fails(self._operations, out.numel()):
                self.failed += 1
                raise self._error
        return out


def require_noised_once(noised: Tensor) -> None:
    """Each value has noise of variance 1: none has none, none has it twice, and none another's."""
    values = noised.flatten().double()
    assert values.unique().numel() > 0.95 * values.numel()
    for part in (values, *torch.chunk(values, 50)):
        assert abs(float(part.mean())) < 6 / math.sqrt(len(part))
        assert abs(float(part.var()) - 1) < 6 * math.sqrt(2 / len(part))
    assert abs(float((values[1:] * values[:-1]).mean())) < 6 / math.sqrt(len(values))


@pytest.mark.parametrize("error", [GPU, CPU, MemoryError()], ids=["gpu", "cpu", "python"])
def test_noise_is_drawn_in_smaller_parts(
    error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    secret, total = SecretGenerator(), torch.full((MANY // 400, 400), 5.0)
    short = Short(lambda _, size: size > 5000, error)
    with caplog.at_level(logging.WARNING), short:
        assert secret.add_gaussian_(total, 1.0) is total
    require_noised_once(total - 5.0)
    assert short.failed == 4, "65,536 were tried, and half as many until 4,096 fitted"
    said = "out of memory: going on with fewer values of noise at a time"
    assert [r.getMessage() for r in caplog.records] == [said] * 4
    with short:
        secret.add_gaussian_(total, 1.0)
    assert short.failed == 4, "it does not try more again"


@pytest.mark.parametrize("kind", ["cpu", "fast", "cryptographic"])
@pytest.mark.parametrize("first", range(1, 19))
def test_no_value_is_noised_twice_wherever_memory_runs_out(
    kind: Any, first: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In whatever operation: what was drawn until then is dropped, and others follow."""
    Gpu(monkeypatch)
    for name in ("_CHUNK", "_DEVICE_CHUNK", "_PHILOX_CHUNK"):
        monkeypatch.setattr(noise, name, 1 << 14)
    cpu = kind == "cpu"
    secret = SecretGenerator() if cpu else SecretGenerator("cuda", kind)
    total = torch.full((MANY,), 5.0)
    short = Short(lambda operation, _: operation in (first, first + 18))
    with contextlib.nullcontext() if cpu else PretendCuda(), short:
        secret.add_gaussian_(total, 1.0)
    assert short.failed == 2
    require_noised_once(total - 5.0)


def test_a_step_whose_noise_runs_out_of_memory_is_neither_lost_nor_charged_again(
    ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, generator = llama(tied=True), Chosen(ALL)
    mechanism = made(ledger, model, generator)
    real, left = noise._box_muller, [GPU, GPU]

    def box_muller(bits: Tensor) -> Tensor:
        made = real(bits)
        if left:
            raise left.pop()
        return made

    monkeypatch.setattr(noise, "_box_muller", box_muller)
    mechanism.charge_until(1)
    assert mechanism.step_gradient().records == 7
    assert ledger.steps_charged == 1
    assert len(generator.asked) == 1, "its sample stays"
    mechanism.stamp(RAW)  # it is complete
    noised = grads(model)
    _, sums = by_autograd(model, some_records(), CLIP)
    for gradient, total in zip(noised, sums, strict=True):
        assert bool((gradient * 100 != total).all()), "each value has noise"


def test_a_step_without_room_for_any_noise_is_never_released(
    ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    def box_muller(_bits: Tensor) -> Tensor:
        raise GPU

    monkeypatch.setattr(noise, "_box_muller", box_muller)
    model = llama(tied=True)
    mechanism = made(ledger, model, Chosen(ALL))
    mechanism.charge_until(1)
    with pytest.raises(ShortOfMemoryError, match="noise"):
        mechanism.step_gradient()
    assert not grads(model)
    with pytest.raises(LocalError, match="broke off"):
        mechanism.stamp(RAW)


def made(ledger: Ledger, model: Any, generator: SecretGenerator) -> RecordMechanism:
    options = Options(engine=MicrobatchEngine(model, record_losses))
    mechanism = RecordMechanism(manifest(), model, some_records(), record_losses, ledger, options)
    mechanism._gradient.generator = generator
    return mechanism
