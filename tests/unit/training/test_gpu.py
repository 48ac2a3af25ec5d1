"""What only a GPU can show. `make gpu` runs these; they are skipped where torch finds none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.unit.privacy.models import adapted, gpt2, llama, some_records
from tests.unit.training.homes import make_homes
from xpeer.privacy.clipping import BookKeepingEngine, MicrobatchEngine, trainable
from xpeer.privacy.engines import choose_engine
from xpeer.privacy.noise import SecretGenerator
from xpeer.privacy.steps import FULL, Switchable
from xpeer.trainer.build import assemble
from xpeer.training.flat import FlatVector
from xpeer.training.losses import choose_losses
from xpeer.training.precision import choose_precision
from xpeer.training.recompute import Recomputing

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device here"),
]
CUDA = torch.device("cuda")
MODELS: dict[str, Any] = {
    "llama": lambda: llama(tied=False),
    "llama-tied": lambda: llama(tied=True),
    "gpt2-tied": lambda: gpt2(tied=True),
    "llama-lora": lambda: adapted(llama(tied=True)),
}


def summed(engine: Any, model: nn.Module, losses: Any, bound: float) -> tuple[Tensor, Tensor]:
    sums = [torch.zeros_like(p) for p in trainable(model)]
    told = engine(model, losses).accumulate(some_records().to(CUDA), bound, sums)
    return told.norms, torch.cat([x.flatten() for x in sums])


@pytest.mark.parametrize("name", MODELS)
def test_the_self_test_passes_in_both_precisions(name: str) -> None:
    model = MODELS[name]().to(CUDA)
    low, _ = choose_precision("auto", CUDA)
    for precision in {FULL, low}:
        losses = Switchable(choose_losses(model)[0])
        sample = some_records()[:4].to(CUDA)
        choice = choose_engine(model, losses, sample, precision=precision)
        assert "refused book-keeping" not in choice.reason, choice.reason


@pytest.mark.parametrize("name", MODELS)
def test_engines_in_half_precision_are_near_those_in_float32(name: str) -> None:
    model = MODELS[name]().to(CUDA)
    losses = Switchable(choose_losses(model)[0])
    norms, exact = summed(MicrobatchEngine, model, losses, 0.5)
    found, sums = summed(BookKeepingEngine, model, losses, 0.5)
    torch.testing.assert_close(found, norms, rtol=1e-4, atol=0)
    assert float((sums - exact).norm() / exact.norm()) < 1e-4
    losses.precision, _ = choose_precision("bfloat16", CUDA)
    found, sums = summed(BookKeepingEngine, model, losses, 0.5)
    assert float((sums - exact).norm() / exact.norm()) < 0.1
    assert sums.dtype == torch.float32


def test_layers_computed_again_need_less_memory_and_give_the_same() -> None:
    model = llama(tied=True, num_hidden_layers=8, hidden_size=256).to(CUDA).train()
    losses, _ = choose_losses(model)
    found = []
    for again in (False, True):
        if again:
            Recomputing(model).switch_on()
        torch.cuda.reset_peak_memory_stats()
        nats, _ = losses(model, some_records(512).to(CUDA))
        before = torch.cuda.memory_allocated()
        gradient = torch.autograd.grad(nats.sum(), trainable(model))
        found.append((before, torch.cat([g.flatten() for g in gradient])))
    (kept, exact), (kept_again, same) = found
    assert kept_again < 0.7 * kept
    torch.testing.assert_close(same, exact, rtol=1e-4, atol=1e-5 * float(exact.norm()))


def test_noise_and_fragments_take_a_part_of_a_matrix() -> None:
    """No second one is there: in a merge nothing is begun again with less."""
    vector = FlatVector(1 << 26, 1, CUDA)
    secret, fragment = SecretGenerator(CUDA), torch.empty(1 << 26)
    for work in (
        lambda: secret.add_gaussian_(vector._flat, 1.0),
        lambda: vector.gather(0, fragment),
        lambda: vector.add_(0, fragment, -1.0),
    ):
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        assert torch.cuda.max_memory_allocated() - before < vector._flat.nbytes // 2
    assert float(fragment.std()) == pytest.approx(1.0, rel=0.01)
    assert not bool(vector.read().any()), "what was copied was taken off again"


def test_memory_that_runs_out_is_backed_off_from(tmp_path: Path) -> None:
    """All memory but for a little is taken; the step has to be taken with fewer records a pass."""
    (setup,) = make_homes(tmp_path, 1, device="cuda", changes=("optimiser.batch_records=64",))
    made = assemble(setup)
    made.trainer.run(1)
    torch.cuda.empty_cache()
    allowed = torch.cuda.memory_allocated() + (8 << 20)
    total = torch.cuda.get_device_properties(CUDA).total_memory
    torch.cuda.set_per_process_memory_fraction(allowed / total)
    try:
        made.trainer.run(2)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert made.trainer.counters.step == 3
    made.close()


@pytest.mark.parametrize("mode", ["record", "off"])
def test_a_node_trains_in_the_precision_that_the_gpu_is_fast_at(mode: Any, tmp_path: Path) -> None:
    (setup,) = make_homes(tmp_path, 1, privacy=mode, device="cuda")
    made = assemble(setup)
    fast = torch.cuda.is_bf16_supported(including_emulation=False)
    assert made.beginning.precision == ("bfloat16" if fast else "float32")
    made.trainer.run(4)
    loss, _ = made.trainer.measure()
    assert 0.0 < loss < 10.0
    made.close()


def test_fragments_are_copied_from_the_device_and_back_exactly(tmp_path: Path) -> None:
    (setup,) = make_homes(tmp_path, 1, device="cuda")
    made = assemble(setup)
    flat = made.trainer.parameters.read()
    assert flat.device.type == "cpu"
    changed = flat + torch.linspace(0, 1, len(flat))
    made.trainer.parameters.write(changed)
    assert torch.equal(made.trainer.parameters.read(), changed)
    made.close()
