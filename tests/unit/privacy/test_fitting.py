"""Steps that run out of memory on the way. The fault stands at the boundary, where torch raises it:
in the model, in the backward pass, or where sums are added up.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn

from tests.unit.accounts.ledgers import open_declared
from tests.unit.privacy.models import llama, record_losses, some_records
from tests.unit.privacy.test_mechanism import grads, manifest, scripted
from xpeer.accounts.ledger import Ledger
from xpeer.errors import LocalError
from xpeer.privacy import at_once
from xpeer.privacy.clipping import (
    BookKeepingEngine,
    FunctionalEngine,
    MicrobatchEngine,
    cache_records,
)
from xpeer.privacy.fitting import bytes_of_passes, until_it_fits
from xpeer.privacy.mechanism import RecordMechanism, build_mechanism
from xpeer.privacy.options import Options
from xpeer.shortage import out_of_memory

Place = Literal["forward", "backward"]
GPU = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
CPU = RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to")


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    with open_declared(tmp_path / "ledger.sqlite") as opened:
        yield opened


class Small:
    """Memory for so many records a pass; what needs more fails, but the first pass of a step.

    Attributes:
        passes: records of each pass that was tried.
        armed: True iff memory is short.
    """

    def __init__(self, fits: int, error: Exception, place: Place) -> None:
        self.fits, self.error, self.place = fits, error, place
        self.passes: list[int] = []
        self.armed = False

    def __call__(self, model: nn.Module, records: Tensor) -> tuple[Tensor, Tensor]:
        losses, tokens = record_losses(model, records)
        if not self.armed or torch._C._functorch.is_functorch_wrapped_tensor(records):
            return losses, tokens
        self.passes.append(len(records))
        fails = len(records) > self.fits and len(self.passes) > 1
        if fails and self.place == "forward":
            raise self.error
        if fails:
            losses.register_hook(self._fail)
        return losses, tokens

    def _fail(self, _grad: Tensor) -> None:
        raise self.error


def made(ledger: Ledger, mode: Any, losses: Any, micro_batch: int, **more: Any) -> Any:
    model = llama(tied=True)
    engine = BookKeepingEngine(model, losses, micro_batch=micro_batch)
    options = Options(micro_batch=micro_batch, engine=engine, **more)
    mechanism = build_mechanism(manifest(mode=mode), model, some_records(), losses, ledger, options)
    if isinstance(mechanism, RecordMechanism):
        scripted(mechanism, [0, 1, 2, 3, 4, 5, 6])
    return model, mechanism


@pytest.mark.parametrize("error", [GPU, CPU, MemoryError()], ids=["gpu", "cpu", "python"])
@pytest.mark.parametrize("place", ["forward", "backward"])
@pytest.mark.parametrize("mode", ["record", "off"])
def test_a_step_without_memory_is_taken_with_fewer_records_a_pass(
    ledger: Ledger, mode: str, place: Place, error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    """Its gradient is the same, its sample is the same, and it is charged once."""
    model, mechanism = made(ledger, mode, record_losses, 7)
    mechanism.charge_until(1)
    mechanism.step_gradient()
    wanted, charged = [g.clone() for g in grads(model)], ledger.steps_charged
    small = Small(2, error, place)
    model, mechanism = made(ledger, mode, small, 4)
    mechanism.charge_until(1)
    small.armed = True
    with caplog.at_level(logging.WARNING):
        result = mechanism.step_gradient()
    assert small.passes == [4, 3, 2, 2, 2, 1]
    assert result.records == 7
    assert result.zeroed == 0
    for mine, theirs in zip(grads(model), wanted, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)
    assert ledger.steps_charged == 2 * charged
    assert [r.getMessage() for r in caplog.records] == [
        "out of memory: going on with fewer records a pass"
    ]
    small.passes.clear()
    mechanism.charge_until(1)
    mechanism.step_gradient()
    assert max(small.passes) == 2  # it does not try more again


@pytest.mark.parametrize("mode", ["record", "off"])
def test_what_saves_memory_comes_once_a_single_record_does_not_fit(
    ledger: Ledger, mode: str
) -> None:
    small = Small(0, GPU, "forward")

    def relieve() -> str:
        small.fits = 1
        return "layers computed again"

    _, mechanism = made(ledger, mode, small, 1, relieve=relieve)
    mechanism.charge_until(1)
    small.armed, small.passes = True, [1]
    assert mechanism.step_gradient().records
    assert small.fits == 1


@pytest.mark.parametrize("mode", ["record", "off"])
def test_a_record_that_does_not_fit_ends_it_and_names_the_settings(
    ledger: Ledger, mode: str
) -> None:
    small = Small(0, GPU, "backward")
    model, mechanism = made(ledger, mode, small, 2)
    mechanism.charge_until(1)
    small.armed, small.passes = True, [1]
    with pytest.raises(LocalError, match="single record") as e:
        mechanism.step_gradient()
    for setting in ("training.micro_batch", "training.checkpoint_activations", "precision"):
        assert setting in str(e.value)
    if mode == "record":
        assert all(p.grad is None for p in model.parameters())


def test_other_errors_are_no_lack_of_memory(ledger: Ledger) -> None:
    small = Small(0, RuntimeError("expected m1 and m2 to have the same dtype"), "forward")
    _, mechanism = made(ledger, "record", small, 2)
    mechanism.charge_until(1)
    small.armed, small.passes = True, [1]
    with pytest.raises(RuntimeError, match="same dtype"):
        mechanism.step_gradient()
    assert not out_of_memory(ValueError("can't allocate memory"))


def test_engines_halve_until_one() -> None:
    model, records = llama(tied=True), some_records()
    assert MicrobatchEngine(model, record_losses).shrink() == ""
    for engine in (BookKeepingEngine, FunctionalEngine):
        sums = [torch.zeros_like(p) for p in model.parameters()]
        made = engine(model, record_losses, micro_batch=5)
        made.accumulate(records, 1.0, sums)
        assert [made.shrink() for _ in range(3)] == ["fewer records a pass"] * 2 + [""]


def test_a_gpu_takes_as_many_records_as_its_memory_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first pass, of one record, must not decide that a pass has one record for ever."""
    assert cache_records(torch.empty(1, 128, device="meta", dtype=torch.int64)) > 1000
    free = 11 << 30
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 80 << 30))
    assert bytes_of_passes(torch.device("cuda"), 1 << 30) == 4 << 30
    free = 1 << 30
    assert bytes_of_passes(torch.device("cuda"), 1 << 30) == 1 << 30
    assert bytes_of_passes(torch.device("cpu"), 7) == 7


@pytest.mark.parametrize("gpu", [True, False])
def test_a_gpu_gives_back_what_it_holds_before_the_next_attempt(
    gpu: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: done.append("given back"))

    def work() -> int:
        done.append("tried")
        if len(done) < 3:
            raise GPU
        return 7

    def shrink() -> str:
        done.append("shrunk")
        return "less"

    assert until_it_fits(work, shrink) == 7
    assert done == ["tried", *(["given back"] if gpu else []), "shrunk", "tried"]


def test_a_gpu_computes_fewer_values_at_once_as_the_last_resort(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(at_once._Part, "divisor", 1)
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    assert at_once.halve(cpu) == ""
    for divisor in (2, 4, 8, 16):
        assert at_once.halve(gpu) == "fewer logits at a time"
        assert at_once.values_at_once(gpu, 64, 1 << 10) == (1 << 10) // divisor
    assert at_once.halve(gpu) == ""
    assert at_once.values_at_once(cpu, 64, 1 << 10) == 64
