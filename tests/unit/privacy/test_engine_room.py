"""The self-test of engines where memory is short: as in a step, less is computed at a time."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.unit.accounts.ledgers import open_declared
from tests.unit.privacy.alive import Alive
from tests.unit.privacy.models import llama, record_losses, some_records
from tests.unit.privacy.test_engine_check import HALF
from tests.unit.privacy.test_mechanism import manifest
from xpeer.errors import ConfigError, ShortOfMemoryError
from xpeer.privacy import record_gradients
from xpeer.privacy.clipping import BookKeepingEngine, FunctionalEngine, trainable
from xpeer.privacy.engine_memory import EngineMemory
from xpeer.privacy.engines import Choice, choose_engine
from xpeer.privacy.mechanism import build_mechanism
from xpeer.privacy.options import Options
from xpeer.privacy.steps import Switchable

GPU = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


def no_time() -> float:
    return 0.0


class Card:
    """A loss on a card with memory for so many records that are computed with their gradients.

    Attributes:
        fits: records of a pass.
        vmap: True iff vmap fits, which computes gradients of several passes at once.
        relieved: how often it was asked to save memory.
        helps: records that fit more by the first of these.
    """

    def __init__(self, fits: int, *, vmap: bool = True, helps: int = 0) -> None:
        self.fits, self.vmap, self.helps = fits, vmap, helps
        self.relieved = 0

    def __call__(self, model: nn.Module, records: Tensor) -> tuple[Tensor, Tensor]:
        wrapped = torch._C._functorch.is_functorch_wrapped_tensor(records)
        if (wrapped and not self.vmap) or (torch.is_grad_enabled() and len(records) > self.fits):
            raise GPU
        return record_losses(model, records)

    def relieve(self) -> str:
        self.relieved += 1
        if self.relieved > 1:
            return ""
        self.fits += self.helps
        return "layers computed again"

    def choose(self, **options: Any) -> Choice:
        sample = some_records()[:4]
        return choose_engine(
            llama(tied=True), self, sample, clock=no_time, relieve=self.relieve, **options
        )


def test_a_record_that_fits_only_if_layers_are_computed_again() -> None:
    card = Card(fits=0, helps=1, vmap=False)
    choice = card.choose()
    assert choice.engine.name == "book-keeping"
    assert card.relieved == 1
    with pytest.raises(ShortOfMemoryError, match="single record"):
        Card(fits=0).choose()


def test_the_mechanism_passes_it_on(tmp_path: Path) -> None:
    card = Card(fits=0, helps=1, vmap=False)
    options = Options(relieve=card.relieve)
    with open_declared(tmp_path / "ledger.sqlite") as ledger:
        made = build_mechanism(
            manifest(mode="record"), llama(tied=True), some_records(), card, ledger, options
        )
        made.charge_until(1)
        made.step_gradient()
        made.close()
    assert card.relieved >= 1


def test_layers_are_not_computed_again_for_vmap() -> None:
    """It would not fit any better, and others, which fit, would be slower from then on."""
    card = Card(fits=4, vmap=False)
    choice = card.choose()
    assert choice.engine.name == "book-keeping"
    assert "refused vmap: it ran out of memory" in choice.reason
    assert choice.refused == "", "book-keeping is preferred to it anyway"
    assert card.relieved == 0


def test_a_choice_for_want_of_memory_is_not_remembered(tmp_path: Path) -> None:
    """It is in the reason, which status and the log show; the next start has a new chance."""

    class Fast(BookKeepingEngine):
        short = True

        def accumulate(self, *arguments: Any) -> Any:
            if Fast.short:
                raise GPU
            return super().accumulate(*arguments)

    memory = EngineMemory(tmp_path, "this")
    model, losses = llama(tied=True), Switchable(record_losses)

    def choose() -> Choice:
        candidates = [partial(make, model, losses) for make in (Fast, FunctionalEngine)]
        sample = some_records()[:4]
        return choose_engine(
            model, losses, sample, candidates=candidates, clock=no_time, memory=memory
        )

    choice = choose()
    assert choice.engine.name == "vmap"
    assert "refused book-keeping: it ran out of memory" in choice.reason
    assert choice.reason.endswith("the next start tries again, with what memory it has")
    assert choice.refused == "book-keeping: it ran out of memory"
    assert memory.recall() is None
    Fast.short = False
    assert choose().engine.name == "book-keeping"
    assert memory.recall() is not None
    Fast.short = True
    assert choose().engine.name == "vmap"
    Fast.short = False
    assert choose().engine.name == "book-keeping", "what was remembered before stays"


def test_want_of_memory_of_an_engine_that_comes_later_is_forgotten(tmp_path: Path) -> None:
    """vmap never fits a large model: else each start would try all engines anew."""
    memory = EngineMemory(tmp_path, "this")
    choice = Card(fits=4, vmap=False).choose(memory=memory)
    assert choice.engine.name == "book-keeping"
    assert memory.recall() == ("book-keeping", choice.reason, "")


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_memory_that_runs_out_once_refuses_nothing(precision: str) -> None:
    """Wherever in the self-test it is: what was done before the fault does not count twice."""
    calls, fails_at = 0, -1

    def losses(model: nn.Module, records: Tensor) -> tuple[Tensor, Tensor]:
        nonlocal calls
        calls += 1
        if calls - 1 == fails_at:
            raise GPU
        return record_losses(model, records)

    def choose() -> Choice:
        nonlocal calls
        calls = 0
        model, switchable = llama(tied=True), Switchable(losses)
        candidates: list[Callable[[], Any]] = [
            lambda: BookKeepingEngine(model, switchable, micro_batch=2)
        ]
        options: dict[str, Any] = {"precision": HALF} if precision == "bfloat16" else {}
        return choose_engine(
            model, switchable, some_records()[:4], candidates=candidates, clock=no_time,
            relieve=lambda: "less of something", **options,
        )  # fmt: skip

    assert choose().engine.name == "book-keeping"
    for fails_at in range(0, calls, 1 if calls < 40 else 3):
        choice = choose()
        assert choice.engine.name == "book-keeping", (fails_at, choice.reason)
        assert "refused" not in choice.reason, (fails_at, choice.reason)


def test_the_self_test_holds_no_more_than_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step: a sum and two moments for each parameter. Here: the expected sum, which a GPU's host
    holds, the engine's, and that of its factors.
    """
    monkeypatch.setattr(record_gradients, "_WRITTEN_RATIO", 0)
    model = llama(tied=True, hidden_size=128, intermediate_size=256, num_hidden_layers=8)
    losses = Switchable(record_losses)
    size = 4 * sum(p.numel() for p in trainable(model))
    candidates = [partial(BookKeepingEngine, model, losses, micro_batch=1)]
    with Alive() as memory:
        choice = choose_engine(
            model, losses, some_records()[:4], candidates=candidates, clock=no_time, precision=HALF
        )
    assert choice.engine.name == "book-keeping"
    assert "refused" not in choice.reason
    assert memory.peak < 3.9 * size, memory.peak / size


@pytest.mark.parametrize("records", [1, 3])
def test_gradients_of_all_records_are_never_larger_than_an_engine_may_keep(records: int) -> None:
    """A given number of records a pass counted more than memory, and one record always was tried:
    on a processor the system ends a process that takes too much.
    """
    model = llama(tied=True)
    of_one = 8 * sum(p.numel() for p in trainable(model))
    sizes: list[int] = []

    def losses(model: nn.Module, some: Tensor) -> tuple[Tensor, Tensor]:
        sizes.append(len(some))
        return record_losses(model, some)

    engine = FunctionalEngine(model, losses, micro_batch=8, memory_bytes=records * of_one)
    sums = [torch.zeros_like(p) for p in trainable(model)]
    engine.accumulate(some_records(6), 1.0, sums)
    assert len(sizes) == 6 // records, "vmap calls it once a pass"
    with pytest.raises(ConfigError, match="one record needs about"):
        FunctionalEngine(model, losses, micro_batch=8, memory_bytes=of_one - 1)
    choice = choose_engine(model, losses, some_records(4), memory_bytes=of_one - 1, clock=no_time)
    assert choice.engine.name == "book-keeping"
    assert "refused vmap" in choice.reason
