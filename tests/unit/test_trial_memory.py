"""What a trial holds: one model at a time, whichever device it is on."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.unit.test_trial import KINDS, init
from xpeer import trial
from xpeer.estimate import room
from xpeer.founding_model import initial_model
from xpeer.trainer.assembled import Assembled
from xpeer.trainer.build import assemble
from xpeer.training.initial import trained_model


class Watch:
    """Knows which of the tensors that it was shown are alive."""

    def __init__(self) -> None:
        self._shown: list[weakref.ref[torch.Tensor]] = []

    def show(self, model: torch.nn.Module) -> None:
        self._shown += [weakref.ref(p) for p in model.parameters()]

    @property
    def shown(self) -> int:
        return len(self._shown)

    @property
    def alive(self) -> int:
        return sum(tensor() is not None for tensor in self._shown)


@pytest.mark.parametrize("kind", ["private", "off", "adapters"])
def test_one_model_is_gone_before_the_next_is_made(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The founder's own, the trainer's, and the one that a restart would have."""
    founders, trainers = Watch(), Watch()
    alive: list[tuple[int, int]] = []
    from xpeer.cli import init as command_module  # the module of `xpeer init`

    def drawn(*arguments: Any, **options: Any) -> Any:
        made = initial_model(*arguments, **options)
        founders.show(made.module)
        return made

    def assembled(setup: Any) -> Assembled:
        alive.append((founders.alive, trainers.alive))
        made = assemble(setup)
        trainers.show(made.model)
        return made

    def rebuilt(*arguments: Any) -> torch.nn.Module:
        alive.append((founders.alive, trainers.alive))
        return trained_model(*arguments)

    monkeypatch.setattr(command_module, "initial_model", drawn)
    monkeypatch.setattr(trial, "assemble", assembled)
    monkeypatch.setattr(trial, "trained_model", rebuilt)
    code, err = init(tmp_path / "h", "--preset", "tiny", *KINDS[kind])
    assert code == 0, err
    assert founders.shown
    assert trainers.shown
    assert alive == [(0, 0), (0, 0)]


def test_the_peak_of_a_gpu_is_asked_of_that_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", {torch.device("cuda:1"): 7}.get)
    assert room.device_peak(torch.device("cuda:1")) == 7
    assert room.device_peak(torch.device("cpu")) == 0


@pytest.mark.parametrize("gpu", [True, False])
def test_memory_is_given_back_to_a_gpu(gpu: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[str] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: given.append("all"))
    room.give_back()
    assert given == ["all"] * gpu


def test_memory_of_a_gpu_is_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _device: (5, 24))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"card {device.index}")
    found = room.of_device(torch.device("cuda:1"))
    assert found == room.Room("memory of card 1", most=24, free=5)
    assert room.of_device(torch.device("cpu")).what != found.what
