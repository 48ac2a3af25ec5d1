"""The choice of the precision. CUDA is a fake: what torch would say of a GPU."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.unit.training.homes import make_homes
from xpeer.errors import ConfigError
from xpeer.trainer.build import assemble
from xpeer.training.precision import WORTH_IT, choose_precision

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def clock_of(seconds: Callable[[torch.dtype], float], monkeypatch: pytest.MonkeyPatch) -> object:
    """A clock by which products take so long."""
    now = [0.0]

    def product(a: torch.Tensor, b: torch.Tensor) -> None:
        now[0] += seconds(a.dtype)

    monkeypatch.setattr(torch, "mm", product)
    return lambda: now[0]


@pytest.mark.parametrize(("ratio", "name"), [(1.6, "bfloat16"), (1.4, "float32"), (0.3, "float32")])
def test_a_cpu_is_measured(ratio: float, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert 1.4 < WORTH_IT < 1.6
    clock = clock_of(lambda dtype: 1.0 if dtype == torch.float32 else 1 / ratio, monkeypatch)
    precision, why = choose_precision("auto", CPU, clock)  # type: ignore[arg-type]
    assert precision.name == name
    assert f"{ratio:.1f}" in why


def test_one_slow_measurement_does_not_decide(monkeypatch: pytest.MonkeyPatch) -> None:
    """While something else ran, say. The least of several times counts."""
    times = iter([90.0, 2.0, 1.0, 1.0, 1.0, 90.0, 0.5, 0.4, 0.5, 0.5])
    clock = clock_of(lambda dtype: next(times), monkeypatch)
    _, why = choose_precision("auto", CPU, clock)  # type: ignore[arg-type]
    assert "2.5 times as fast" in why


@pytest.mark.parametrize("fast", [True, False])
def test_a_gpu_says_itself_whether_it_has_it(fast: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Emulation does not count: it is slow."""
    monkeypatch.setattr(
        torch.cuda,
        "is_bf16_supported",
        lambda including_emulation=True: fast or including_emulation,
    )
    precision, why = choose_precision("auto", CUDA)
    assert precision.name == ("bfloat16" if fast else "float32")
    assert "this GPU" in why
    assert choose_precision("bfloat16", CUDA)[0].name == "bfloat16"
    assert choose_precision("float32", CUDA)[0].name == "float32"


def test_a_gpu_without_it_is_refused_if_it_is_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: False)
    with pytest.raises(ConfigError, match=r"training\.precision = bfloat16") as e:
        choose_precision("bfloat16", CUDA)
    assert "float32" in str(e.value)


def test_other_devices_compute_in_float32() -> None:
    assert choose_precision("auto", torch.device("mps"))[0].name == "float32"


@pytest.mark.parametrize("mode", ["record", "off"])
def test_the_setting_reaches_steps_and_measurements(mode: Any, tmp_path: Path) -> None:
    """All products of a training node's matrices are in bfloat16, and its parameters are not."""
    seen: set[torch.dtype] = set()
    (setup,) = make_homes(tmp_path, 1, privacy=mode, precision="bfloat16")
    made = assemble(setup)
    assert made.beginning.precision == "bfloat16"
    assert any("training.precision" in note for note in made.beginning.notes)
    linear = next(m for m in made.model.modules() if isinstance(m, torch.nn.Linear))
    linear.register_forward_hook(lambda _module, _inputs, output: seen.add(output.dtype))
    made.trainer.measure()
    assert seen == {torch.bfloat16}
    before = made.trainer.parameters.read().clone()
    made.trainer.run(2)
    assert seen == {torch.bfloat16}
    after = made.trainer.parameters.read()
    assert after.dtype == torch.float32
    assert not torch.equal(before, after)
    made.close()
