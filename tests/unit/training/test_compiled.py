"""Compiled layers. torch's compiler is a fake: a real one needs minutes, and may not be there."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.unit.training.homes import make_homes
from xpeer.trainer.build import assemble
from xpeer.training import losses
from xpeer.training.recompute import Again, Recomputing, layers_of


class Compiler:
    """In place of `torch.compile`.

    Attributes:
        compiled: number of functions that it was given.
        calls: number of calls of those.
    """

    def __init__(self, error: Exception | None = None) -> None:
        self.compiled = self.calls = 0
        self._error = error

    def __call__(self, function: Callable[..., Any]) -> Callable[..., Any]:
        self.compiled += 1

        def run(*args: Any, **kwargs: Any) -> Any:
            self.calls += 1
            if self._error is not None:
                raise self._error
            return function(*args, **kwargs)

        return run


@pytest.fixture(autouse=True)
def dynamo() -> Iterator[None]:
    before = torch._dynamo.config.suppress_errors
    yield
    torch._dynamo.config.suppress_errors = before


def trained(folder: Path, mode: Any = "off", **settings: Any) -> tuple[list[str], torch.Tensor]:
    (setup,) = make_homes(folder, 1, privacy=mode, compile="on", **settings)
    made = assemble(setup)
    assert all(p.grad is None for p in made.model.parameters())
    made.trainer.run(2)
    assert made.trainer.counters.step == 2
    made.close()
    return made.beginning.notes, made.trainer.parameters.read()


@pytest.mark.parametrize("again", ["on", "off"])
def test_steps_use_compiled_layers(
    again: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler = Compiler()
    monkeypatch.setattr(torch, "compile", compiler)
    notes, _ = trained(tmp_path, checkpoint_activations=again)
    assert "2 layers compiled" in notes
    assert compiler.compiled == 2
    assert compiler.calls > 4


def test_a_compiler_that_fails_is_done_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler = Compiler(RuntimeError("no C++ compiler, in /home/somebody"))
    monkeypatch.setattr(torch, "compile", compiler)
    notes, _ = trained(tmp_path)
    assert "layers are not compiled, and steps are slower: RuntimeError" in notes
    assert compiler.calls == 1


@pytest.mark.parametrize("again", ["on", "auto"])
def test_what_is_tried_out_fits_where_a_step_does(
    again: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One record, and with layers computed again where steps need that, or are let."""
    records: list[tuple[int, bool]] = []
    switched = [again == "on"]
    switch_on, real = Recomputing.switch_on, losses._of_tokens

    def noted_switch(self: Recomputing) -> str:
        switched[0] = True
        return switch_on(self)

    def short(model: Any, output: Any, ids: torch.Tensor, *more: Any) -> torch.Tensor:
        records.append((len(ids), switched[0]))
        if torch.is_grad_enabled() and not (len(ids) == 1 and switched[0]):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(model, output, ids, *more)

    monkeypatch.setattr(Recomputing, "switch_on", noted_switch)
    monkeypatch.setattr(losses, "_of_tokens", short)
    monkeypatch.setattr(torch, "compile", compiler := Compiler())
    notes, _ = trained(tmp_path, checkpoint_activations=again, micro_batch=1, pack="off")
    assert "2 layers compiled" in notes
    assert compiler.compiled == 2
    assert records[0] == (1, again == "on")


def test_layers_that_are_computed_again_stay_so_without_a_compiler(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler = Compiler(RuntimeError("no C++ compiler"))
    monkeypatch.setattr(torch, "compile", compiler)
    (setup,) = make_homes(tmp_path, 1, compile="on", checkpoint_activations="on")
    made = assemble(setup)
    assert any("layers are not compiled" in note for note in made.beginning.notes)
    assert "layers are not compiled" in made.beginning.uncompiled
    assert all(isinstance(layer.forward, Again) for layer in layers_of(made.model))
    made.trainer.run(1)
    assert compiler.calls == 1
    made.close()


def test_with_privacy_nothing_is_compiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = Compiler()
    monkeypatch.setattr(torch, "compile", compiler)
    notes, _ = trained(tmp_path, "record")
    assert any("not with privacy" in note for note in notes)
    assert compiler.compiled == 0
