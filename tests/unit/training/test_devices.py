"""What a node does on its device: the same on a processor, for everybody, and on a GPU.

`make gpu` runs them with CUDA. What needs CUDA and nothing else is in `test_gpu`.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from click.testing import CliRunner
from torch import Tensor, nn

from tests.unit.privacy.models import gpt2, llama, some_records
from tests.unit.training.homes import make_homes
from tests.unit.training.test_packing import T, records
from tests.unit.training.test_quantised import library_of_torch
from xpeer.cli import main
from xpeer.config import Privacy
from xpeer.estimate.step import Step, memory_of, take
from xpeer.founding_model import PRESETS, LoraOptions
from xpeer.manifest.model import BaseDtype
from xpeer.privacy import blocks
from xpeer.privacy.blocks import Blocked
from xpeer.privacy.clipping import BookKeepingEngine, MicrobatchEngine, trainable
from xpeer.privacy.steps import FULL, Switchable
from xpeer.trainer.build import assemble
from xpeer.trainer.setup import TrainerSetup
from xpeer.training.compiled import compile_layers
from xpeer.training.losses import choose_losses, record_losses
from xpeer.training.model import build
from xpeer.training.packing import choose_packing
from xpeer.training.precision import choose_precision

CUDA = pytest.param(
    "cuda",
    marks=[
        pytest.mark.gpu,
        pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device here"),
    ],
)
on_each = pytest.mark.parametrize("device", ["cpu", CUDA])
MIB = 1 << 20


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def home(folder: Path, device: str, **more: Any) -> TrainerSetup:
    (setup,) = make_homes(folder, 1, device=device, **more)
    return setup


def steps(setup: TrainerSetup, count: int) -> tuple[Tensor, list[float]]:
    """Parameters after some steps, and the public loss before, half-way and behind them."""
    made = assemble(setup)
    losses = [made.trainer.measure()[0]]
    for _ in range(2):
        made.trainer.run(count // 2)
        losses.append(made.trainer.measure()[0])
    assert made.trainer.counters.step == count
    parameters = made.trainer.parameters.read()
    assert torch.isfinite(parameters).all()
    made.close()
    return parameters, losses


@on_each
@pytest.mark.parametrize("privacy", ["off", "record"])
@pytest.mark.parametrize("base", ["bfloat16", "nf4", "int8"])
def test_adapters_of_a_base_in_fewer_bits(
    tmp_path: Path, device: str, base: BaseDtype, privacy: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    if base != "bfloat16" and importlib.util.find_spec("bitsandbytes") is None:
        if device == "cuda":
            pytest.skip("bitsandbytes is not installed")
        monkeypatch.setitem(sys.modules, "bitsandbytes.functional", library_of_torch())
    setup = home(tmp_path, device, privacy=privacy, lora=LoraOptions(2, base_dtype=base))
    start = assemble(setup)
    before = start.trainer.parameters.read()
    start.close()
    after, losses = steps(setup, 2)
    assert not torch.equal(before, after)
    assert all(0.0 < loss < 10.0 for loss in losses)


def clipped(engine: Any, model: nn.Module, low: Any) -> tuple[Tensor, Tensor]:
    losses = Switchable(choose_losses(model)[0])
    losses.precision = low
    sums = [torch.zeros_like(p) for p in trainable(model)]
    sample = some_records().to(sums[0].device)
    told = engine(model, losses).accumulate(sample, 0.5, sums)
    return told.norms, torch.cat([total.flatten() for total in sums])


@on_each
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", [llama, gpt2])
@pytest.mark.parametrize("low", ["float32", "bfloat16"])
def test_an_output_layer_in_blocks_is_computed_twice_to_the_last_bit(
    device: str, family: Any, tied: bool, low: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else `Blocked.add_weighted` refuses to go on."""
    for name, size in (("KEPT", 0), ("BLOCK", 3 * 7 * 16)):
        monkeypatch.setattr(blocks, f"_CPU_{name}", size)
        monkeypatch.setattr(blocks, f"_DEVICE_{name}", size)
    added = list[tuple[int, int]]()
    real = Blocked.add_weighted

    def counted(self: Blocked, factors: Tensor, out: Tensor) -> None:
        added.extend(self.parts())
        real(self, factors, out)

    monkeypatch.setattr(Blocked, "add_weighted", counted)
    model, where = family(tied=tied).to(device), torch.device(device)
    exact_norms, exact = clipped(MicrobatchEngine, model, FULL)
    assert added == []
    norms, sums = clipped(BookKeepingEngine, model, choose_precision(low, where)[0])
    assert len(added) > 1
    assert sums.dtype == torch.float32
    near = 1e-4 if low == "float32" else 0.1
    assert float((sums - exact).norm() / exact.norm()) < near
    torch.testing.assert_close(norms, exact_norms, rtol=near, atol=0)


@on_each
def test_packed_records_have_the_losses_that_they_have_alone(device: str) -> None:
    model = build({**PRESETS["tiny"], "max_position_embeddings": T}, seed=1).to(device)
    packed, note = choose_packing(model, T)
    assert packed is not None, note
    sample = records()
    found = torch.cat([packed(model, part)[0] for part in packed.divide(sample, 2)])
    order = torch.cat(packed.divide(sample, 2)).to(device)
    wanted, _ = record_losses(model, order)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("device", [CUDA])  # on a processor its compiler needs minutes
def test_compiled_layers_give_the_same_losses(device: str) -> None:
    model = build(PRESETS["tiny"], seed=1).to(device)
    sample = torch.randint(0, 256, (2, 32), device=device)
    before = record_losses(model, sample)[0].detach()
    note, _ = compile_layers(model, lambda: record_losses(model, sample)[0].sum().backward())
    assert note == "2 layers compiled"
    torch.testing.assert_close(record_losses(model, sample)[0], before, rtol=1e-3, atol=1e-3)


@on_each
def test_noise_of_the_systems_generator(tmp_path: Path, device: str) -> None:
    """A private run with `privacy.generator = cryptographic`."""
    setup = home(tmp_path, device, privacy="record")
    section = Privacy(register=setup.config.privacy.register, generator="cryptographic")
    config = msgspec.structs.replace(setup.config, privacy=section)
    setup = msgspec.structs.replace(setup, config=config)
    first, _ = steps(setup, 2)
    assert first.abs().max() > 0.0


@pytest.mark.parametrize("device", [CUDA])  # of a processor's memory: `benchmarks.estimate`
@pytest.mark.parametrize("private", [False, True])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_step_takes_the_memory_that_was_estimated(
    device: str, private: bool, precision: Any
) -> None:
    config = {
        **PRESETS["small"],
        "hidden_size": 512,
        "intermediate_size": 1408,
        "num_hidden_layers": 6,
    }
    step = Step(
        config=config,
        sequence_tokens=256,
        micro_batch=8,
        private=private,
        precision=precision,
        device="cuda" if device == "cuda" else "cpu",
    )
    estimated = memory_of(step)
    take(step, build(config).to(device), lambda: None)  # what libraries keep
    torch.cuda.empty_cache()
    kept = torch.cuda.memory_allocated()
    model = build(config).to(device)
    take(step, model, torch.cuda.reset_peak_memory_stats)
    measured = torch.cuda.max_memory_allocated() - kept
    assert estimated.peak > 200 * MIB
    assert measured == pytest.approx(estimated.peak, rel=0.15)


@on_each
@pytest.mark.parametrize("privacy", ["off", "record"])
def test_trial_start_and_export(
    tmp_path: Path, device: str, privacy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`xpeer init` tries a step and an export; a trained model is exported again."""
    monkeypatch.setenv("XPEER_TRAINING_DEVICE", device)
    found = tmp_path / "founded"
    small = ["--set", "optimiser.batch_records=4", "--set", "optimiser.sequence_tokens=32"]
    options = ["--swarm", "s", "--preset", "tiny", "--privacy", privacy]
    done = CliRunner().invoke(main, ["init", "--home", str(found), *options, *small])
    assert (done.exit_code, "exported, and loaded again" in done.stderr) == (0, True), done.stderr
    setup = home(tmp_path, device, privacy=privacy)
    made = assemble(setup)
    made.trainer.run(2)
    made.checkpoints.copy()()
    made.close()
    (Path(setup.home) / "config.toml").write_text("")
    arguments = ["checkpoint", "export", "--home", setup.home, "--hf", str(tmp_path / "out")]
    done = CliRunner().invoke(main, arguments)
    assert done.exit_code == 0, done.output
    assert (tmp_path / "out" / "model.safetensors").exists()


@on_each
def test_losses_fall_alike_in_both_precisions(tmp_path: Path, device: str) -> None:
    curves = []
    for setup, precision in zip(
        make_homes(tmp_path, 2, device=device), ("float32", "bfloat16"), strict=True
    ):
        training = msgspec.structs.replace(setup.config.training, precision=precision)
        config = msgspec.structs.replace(setup.config, training=training)
        curves.append(steps(msgspec.structs.replace(setup, config=config), 40)[1])
    for exact, low in zip(*curves, strict=True):
        assert low == pytest.approx(exact, rel=0.05)
    assert all(curve[2] < 0.9 * curve[0] for curve in curves)


@on_each
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_what_joiners_are_given_is_measured_beside_training(
    tmp_path: Path, device: str, precision: str
) -> None:
    made = assemble(home(tmp_path, device, precision=precision))
    loop = made.trainer
    start = loop.parameters.read()
    before = loop.measurements.public_of_copy(start)
    assert before == pytest.approx(loop.measure()[0], rel=1e-3)
    loop.run(2)
    moved = loop.parameters.read()
    assert loop.measurements.public_of_copy(start) == pytest.approx(before, rel=1e-3)
    assert torch.equal(loop.parameters.read(), moved)
    made.close()
