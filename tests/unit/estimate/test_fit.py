"""What a node needs is compared with what there is, before it trains."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
import torch
from safetensors.torch import save_file

from tests.unit.training.loops import manifest_with
from xpeer.config import Checkpoint, Data, Home, NodeConfig, Training
from xpeer.errors import ConfigError, ExitCode
from xpeer.estimate import fit as fitting
from xpeer.estimate import phases, room
from xpeer.estimate.fit import Fit
from xpeer.estimate.remembered import Rehearsals
from xpeer.estimate.room import Room
from xpeer.estimate.step import Step, StepMemory, memory_of
from xpeer.founding_model import PRESETS
from xpeer.manifest import Manifest
from xpeer.manifest.model import BASE_BLOCK, QUANTISED, BaseDtype, Lora, Model
from xpeer.manifest.privacy import Privacy
from xpeer.training.model import num_params, skeleton

CPU, GPU = torch.device("cpu"), torch.device("cuda")
COUNT = num_params(skeleton(PRESETS["tiny"]))
WEIGHTS = 4 * COUNT
SETTINGS = NodeConfig(training=Training(precision="float32"))
GB = 10**9


def manifest(**changes: Any) -> Manifest:
    model = Model(config=PRESETS["tiny"], num_params=COUNT, initial_digest="")
    return manifest_with(model=model, **changes)


class Fixed(Rehearsals):
    """Every step of one record needs `working` bytes besides weights and moments."""

    def __init__(self, working: int = 0) -> None:
        super().__init__()
        self.steps: list[Step] = []
        self.working = working

    def of(self, step: Step) -> StepMemory:
        self.steps.append(step)
        return StepMemory(
            num_trained=COUNT,
            num_frozen=0,
            weights=WEIGHTS,
            moments=2 * WEIGHTS,
            working=WEIGHTS + self.working * step.micro_batch // (4 if step.recompute else 1),
        )


def having(most: int, free: int | None = None, host: int = 100 * GB) -> Callable[..., Room]:
    def here(device: torch.device) -> Room:
        if device == CPU and host != 100 * GB:
            return Room("memory of this machine", host, host)
        return Room("memory of it", most, most if free is None else free)

    return here


def examine(
    tmp_path: Path,
    rehearsals: Rehearsals,
    here: Callable[..., Room],
    device: torch.device = GPU,
    config: NodeConfig = SETTINGS,
    **more: Any,
) -> Fit:
    return fitting.examine(
        manifest(), config, Home(tmp_path), device, rehearsals, here=here, **more
    )


def test_what_is_far_smaller_is_not_even_rehearsed(tmp_path: Path) -> None:
    made = Fixed()
    fit = examine(tmp_path, made, having(100 * GB))
    assert (fit.warnings, fit.problems, made.steps, fit.rehearsed) == ([], [], [], False)
    assert "less than" in fit.notes[0]
    fit = examine(tmp_path, made, having(10 * 16 * COUNT, host=99 * GB), asked=True)
    assert (len(made.steps), fit.rehearsed, fit.warnings) == (1, True, [])
    assert "about" in fit.notes[0]


def test_the_rough_bound_is_above_what_is_rehearsed(tmp_path: Path) -> None:
    for device, mode in ((CPU, "record"), (GPU, "off")):
        privacy = Privacy(mode=mode, noise_multiplier=1.0)  # type: ignore[arg-type]
        founded = manifest(privacy=privacy)
        sizes = fitting.sizes_of(founded, SETTINGS, device)
        exact = memory_of(sizes.step)
        assert sizes.least <= exact.peak + 4096 <= sizes.bound.peak
        assert sizes.bound.num_trained == exact.num_trained


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8", "nf4"])
def test_a_base_counts_as_it_is_held(dtype: BaseDtype) -> None:
    """A base in 4 bits is not refused where the same one in 16 bits would not fit."""
    block: Any = BASE_BLOCK if dtype in QUANTISED else 0
    wide = {**PRESETS["tiny"], "hidden_size": 256, "intermediate_size": 1024}
    model = Model(wide, 47_104, "", Lora(4, 8.0, 1, ""), base_dtype=dtype, base_block=block)
    sizes = fitting.sizes_of(manifest_with(model=model), SETTINGS, GPU)
    exact = memory_of(sizes.step)
    assert sizes.least <= exact.peak <= 1.2 * sizes.bound.peak  # half of it decides
    assert sizes.frozen_bytes <= exact.weights


def test_what_can_never_fit_is_refused_in_an_instant(tmp_path: Path) -> None:
    made = Fixed()
    fit = examine(tmp_path, made, having(16 * COUNT - 1, host=99 * GB))
    with pytest.raises(ConfigError, match="weights, moments and gradients alone") as refused:
        fit.require()
    assert refused.value.exit_code == ExitCode.BAD_CONFIG
    assert "--lora-rank" in refused.value.remedy
    assert "training.check_fit = warn" in refused.value.remedy
    assert made.steps == []
    assert fit.memory is not None, "a founder still wants to know what others need"


def test_records_shrink_and_layers_are_computed_again_before_anything_is_refused(
    tmp_path: Path,
) -> None:
    config = msgspec.structs.replace(
        SETTINGS, training=Training(precision="float32", micro_batch=8)
    )
    made = Fixed(working=WEIGHTS)
    fit = examine(tmp_path, made, having(6 * WEIGHTS, host=99 * GB), config=config)
    fit.require()
    (warning,) = fit.warnings
    assert "set training.micro_batch = 1" in warning
    fit = examine(tmp_path, Fixed(working=40 * WEIGHTS), having(6 * WEIGHTS, host=99 * GB))
    with pytest.raises(ConfigError, match="a step of a single record needs about"):
        fit.require()


def test_a_family_whose_layers_can_not_be_computed_again_may_start(tmp_path: Path) -> None:
    """No error names a setting that nobody made."""
    config = {"model_type": "openai-gpt", "n_embd": 64, "n_layer": 2, "n_head": 2}
    config |= {"vocab_size": 512, "n_positions": 128}
    count = num_params(skeleton(config))
    founded = manifest_with(model=Model(config=config, num_params=count, initial_digest=""))
    own = Training(precision="float32", micro_batch=8)
    rehearsed = memory_of(fitting.sizes_of(founded, NodeConfig(training=own), GPU).step)
    fit = fitting.examine(
        founded,
        NodeConfig(training=own),
        Home(tmp_path),
        GPU,
        Rehearsals(),
        here=having(rehearsed.peak - 1, host=99 * GB),
    )
    fit.require()
    (warning,) = fit.warnings
    assert warning.endswith("set training.micro_batch = 1")


def test_sizes_that_are_no_numbers_are_bounded_all_the_same(monkeypatch) -> None:
    model: Any = skeleton(PRESETS["tiny"])
    config: Any = SimpleNamespace(hidden_size=[64, 128], vocab_size=320)  # of several towers
    config.get_text_config = lambda: config
    model.config = config
    monkeypatch.setattr(fitting, "skeleton", lambda config: model)
    assert fitting.sizes_of(manifest(), SETTINGS, CPU).rough > 0


def test_codes_are_no_pages_of_a_file(tmp_path: Path) -> None:
    """A processor can't do without them, as it can without weights that it reads from a file."""
    wide = {**PRESETS["tiny"], "hidden_size": 2048, "intermediate_size": 8192}
    trained = Lora(1, 2.0, 1, "")
    here = having(phases.PROCESS + 20_000_000, host=phases.PROCESS + 20_000_000)

    def problems(dtype: BaseDtype) -> list[ConfigError]:
        block: Any = BASE_BLOCK if dtype in QUANTISED else 0
        model = Model(wide, 10_000, "", trained, base_dtype=dtype, base_block=block)
        founded, made = manifest_with(model=model), Fixed()
        fit = fitting.examine(founded, SETTINGS, Home(tmp_path), CPU, made, here=here)
        return fit.problems

    assert problems("bfloat16") == []
    (problem,) = problems("nf4")
    assert "weights, moments and gradients alone" in problem.problem


def test_a_checkpoints_copy_counts_on_a_cpu(tmp_path: Path) -> None:
    """What is short is named, and a remedy leaves room for it."""
    config = msgspec.structs.replace(
        SETTINGS, training=Training(precision="float32", micro_batch=4)
    )
    peak = (
        Fixed(working=WEIGHTS)
        .of(Step(config={}, sequence_tokens=1, micro_batch=4, private=False))
        .peak
    )
    free = phases.PROCESS + peak + 12 * COUNT // 2
    fit = fitting.examine(
        manifest(),
        config,
        Home(tmp_path),
        CPU,
        made := Fixed(working=WEIGHTS),
        here=lambda device: Room("memory of it", 2 * free, free),
    )
    (warning,) = fit.warnings
    assert "while a checkpoint is written" in warning
    assert "set training.micro_batch = 1" in warning
    assert made.steps


@pytest.mark.parametrize("spare", [0, 1])
def test_memory_is_short_where_freed_memory_has_no_room(tmp_path: Path, spare: int) -> None:
    """So a trainer has it given back. On a GPU the C library has nothing to do with it."""
    made = Fixed(working=WEIGHTS)
    step = made.of(Step(config={}, sequence_tokens=1, micro_batch=1, private=False))
    needed = step.peak + phases.donor_bytes(COUNT, phases.Wire.of(manifest()))
    free = needed + phases.slack(step) - 1 + spare
    settings = msgspec.structs.replace(
        SETTINGS, training=Training(precision="float32", micro_batch=1)
    )
    here = having(2 * free, free=free)
    fit = examine(tmp_path, made, here, CPU, config=settings)
    assert fit.short is not bool(spare)
    assert ("given back" in " ".join(fit.notes)) is fit.short
    assert not examine(tmp_path, made, having(free, free=1)).short


def test_a_setting_that_would_help_is_named(tmp_path: Path) -> None:
    never = Training(precision="float32", checkpoint_activations="off")
    config = msgspec.structs.replace(SETTINGS, training=never)
    made = Fixed(working=8 * WEIGHTS)
    fit = examine(tmp_path, made, having(8 * WEIGHTS, host=99 * GB), config=config)
    with pytest.raises(ConfigError) as refused:
        fit.require()
    assert refused.value.remedy.startswith("set training.checkpoint_activations = on")


def test_an_estimate_that_is_a_little_too_large_refuses_nobody(tmp_path: Path) -> None:
    fit = examine(tmp_path, Fixed(), having(int(0.95 * 4 * WEIGHTS) + 1, host=99 * GB))
    assert not [p for p in fit.problems if "single record" in p.problem]


def test_memory_that_others_use_now_is_a_warning(tmp_path: Path) -> None:
    fit = examine(tmp_path, Fixed(), having(GB, free=WEIGHTS, host=99 * GB))
    fit.require()
    (warning,) = fit.warnings
    assert "are free now" in warning


def test_the_process_counts_on_a_cpu(tmp_path: Path) -> None:
    fit = examine(tmp_path, Fixed(), having(phases.PROCESS, host=phases.PROCESS), CPU)
    assert len(fit.problems) == 1


def test_the_host_beside_a_gpu(tmp_path: Path) -> None:
    fit = examine(tmp_path, Fixed(), having(GB, host=phases.PROCESS // 2))
    (problem,) = fit.problems
    assert "on the host" in problem.problem


def test_a_model_that_can_not_be_rehearsed_may_start(tmp_path: Path) -> None:
    class Failing(Fixed):
        def of(self, step: Step) -> StepMemory:
            raise NotImplementedError("no fake of this operation")

    fit = examine(tmp_path, Failing(), having(WEIGHTS * 4, host=99 * GB))
    assert not fit.problems
    assert "NotImplementedError" in fit.warnings[0]


def test_the_disk_holds_checkpoints_or_the_first_start_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home, text = Home(tmp_path / "home"), tmp_path / "a.txt"
    home.initial_model.mkdir(parents=True)
    text.write_text("some words " * 25_000)
    keeps = Checkpoint(keep=3)
    config = msgspec.structs.replace(SETTINGS, data=Data(shard=[str(text)]), checkpoint=keeps)
    needed = 4 * 13 * COUNT + 64_000_000

    def with_free(free: int) -> Fit:
        monkeypatch.setattr(room, "disk", lambda folder: Room(f"{folder}", free, free))
        return fitting.examine(manifest(), config, home, GPU, Fixed(), here=having(100 * GB))

    assert not with_free(needed + 10**6).warnings
    assert with_free(needed + 400_000).warnings, "the tokens may just not fit"
    fit = with_free(needed - 1)
    with pytest.raises(ConfigError, match=f"in {home.path}") as refused:
        fit.require()
    assert "checkpoint.keep" in refused.value.remedy
    home.checkpoints.mkdir()
    (home.checkpoints / "ckpt-000000003.safetensors").touch()
    fit = with_free(needed - 13 * COUNT - 1)
    assert fit.warnings, "it has trained, and disks are mended while a node runs"
    fit.require()
    assert not with_free(needed - 13 * COUNT).warnings, "what is there needs no room"


def test_a_joiner_needs_room_for_what_it_is_sent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home, free = Home(tmp_path), 3 * 13 * COUNT + 64_000_000
    monkeypatch.setattr(room, "disk", lambda folder: Room(f"{folder}", free, free))
    fit = fitting.examine(manifest(), SETTINGS, home, GPU, Fixed(), here=having(100 * GB))
    assert len(fit.problems) == 1
    home.initial_model.mkdir()
    fit = fitting.examine(manifest(), SETTINGS, home, GPU, Fixed(), here=having(100 * GB))
    assert not fit.problems


def with_base(dtype: BaseDtype, **changes: Any) -> Manifest:
    block: Any = BASE_BLOCK if dtype in QUANTISED else 0
    wide = {**PRESETS["tiny"], "hidden_size": 512, "intermediate_size": 2048}
    model = Model(wide, 10_000, "", Lora(1, 2.0, 1, ""), base_dtype=dtype, base_block=block)
    return manifest_with(model=model, **changes)


def test_codes_that_are_made_on_the_host_count_beside_a_gpu(tmp_path: Path) -> None:
    """A base of 8 B in 4 bits takes 4.5 GB there before it is on the GPU."""
    founded = with_base("nf4")
    sizes = fitting.sizes_of(founded, SETTINGS, GPU)
    assert 0.56 * sizes.num_codes <= sizes.code_bytes <= 0.57 * sizes.num_codes
    rule = phases.Wire.of(founded).rule

    def problems(host: int) -> list[ConfigError]:
        here = having(100 * GB, host=host)
        fit = fitting.examine(founded, SETTINGS, Home(tmp_path), GPU, Fixed(), here=here)
        return fit.problems

    needed = phases.host_bytes(sizes.num_trained, rule, sizes.code_bytes)
    (problem,) = problems(int(0.9 * needed) - 10)
    assert "on the host" in problem.problem
    assert problems(needed) == []


def test_a_base_that_is_a_pickle_is_read_into_memory(tmp_path: Path) -> None:
    folder, founded = tmp_path / "base", with_base("bfloat16")
    folder.mkdir()
    config = msgspec.structs.replace(SETTINGS, data=Data(base_model=str(folder)))
    sizes = fitting.sizes_of(founded, config, GPU)
    rule = phases.Wire.of(founded).rule
    needed = phases.host_bytes(sizes.num_trained, rule, sizes.mapped_bytes)

    def warnings() -> list[str]:
        fit = fitting.examine(
            founded, config, Home(tmp_path / "home"), GPU, Fixed(),
            here=having(100 * GB, host=needed - 1),
        )  # fmt: skip
        return fit.warnings

    (folder / "pytorch_model.bin").touch()
    assert "on the host" in warnings()[0]
    save_file({"x": torch.zeros(2, 2, dtype=torch.bfloat16)}, folder / "model.safetensors")
    assert warnings() == [], "these are pages of the file"


@pytest.mark.parametrize("device", [CPU, GPU])
def test_what_joiners_cost_is_a_warning(tmp_path: Path, device: torch.device) -> None:
    wire = phases.Wire.of(manifest())
    most = phases.donor_bytes(COUNT, wire) - phases.host_bytes(COUNT, wire.rule)
    assert most >= (4 + 2 * 4) * COUNT
    room_there = phases.donor_bytes(COUNT, wire) - 1
    if device == CPU:
        room_there += 4 * WEIGHTS
    here = having(room_there if device == CPU else 100 * GB, host=room_there)
    fit = examine(tmp_path, Fixed(), here, device)
    fit.require()
    (warning,) = fit.warnings
    assert "while joiners are given its model" in warning
    alone = examine(tmp_path, Fixed(), here, device, lends=False)
    assert not alone.warnings, "own steps give nothing to anybody"


def test_a_base_of_another_type_needs_room_on_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is converted there at each start."""
    home, folder = Home(tmp_path / "home"), tmp_path / "base"
    folder.mkdir()
    home.initial_model.mkdir(parents=True)
    save_file({"x": torch.zeros(5000, 2000, dtype=torch.float16)}, folder / "model.safetensors")
    config = msgspec.structs.replace(
        SETTINGS, data=Data(base_model=str(folder)), checkpoint=Checkpoint(keep=1)
    )
    free = 2 * 13 * 10_000 + 64_000_000 + 20_000_000
    for dtype, missing in (("bfloat16", 1), ("bfloat16", 0), ("float32", 1)):
        there = free - missing
        monkeypatch.setattr(room, "disk", lambda folder, n=there: Room(f"{folder}", n, n))
        founded = with_base(dtype)  # type: ignore[arg-type]
        fit = fitting.examine(founded, config, home, GPU, Fixed(), here=having(100 * GB))
        assert bool(fit.problems) == bool(missing)
