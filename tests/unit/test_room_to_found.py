"""`xpeer init` refuses what this machine can't hold before it loads the model."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.cases.support import model_folder
from tests.unit.test_trial import init
from tests.unit.training.loops import manifest_with
from xpeer.cli import needed
from xpeer.config import Home, NodeConfig
from xpeer.errors import ExitCode
from xpeer.estimate import phases, room, to_found
from xpeer.estimate.fit import Fit
from xpeer.estimate.room import Room
from xpeer.founding_model import PRESETS, LoraOptions, foreseen, initial_model
from xpeer.manifest.model import Lora, Model
from xpeer.training import model as loading

MB = 10**6
NAMES = {"whole": [], "adapters": ["--lora-rank", "2"]}
CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return model_folder(tmp_path / "m", torch_dtype="bfloat16")


@pytest.fixture
def unread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "_loaded", lambda *_, **__: pytest.fail("weights were loaded"))


@pytest.fixture
def small_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "host", lambda: Room("memory of this machine", MB, MB))


@pytest.fixture
def large_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "disk", lambda _: Room("the disk", 10**15, 10**15))


def left(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.mark.usefixtures("unread", "small_memory")
@pytest.mark.parametrize("kind", NAMES)
@pytest.mark.parametrize("skipped", [[], ["--skip-trial"], ["--skip-estimate"]])
def test_too_little_memory_is_refused_before_weights_are_loaded(
    tmp_path: Path, source: Path, kind: str, skipped: list[str]
) -> None:
    code, err = init(tmp_path / "h", "--model", source, *NAMES[kind], *skipped)
    assert code == ExitCode.BAD_CONFIG, err
    assert "memory of this machine is 1.00 MB" in err
    assert "--lora-rank" in err
    assert ("--skip-trial" in err) == ("--skip-trial" not in skipped)
    assert "training.check_fit = warn (XPEER_TRAINING_CHECK_FIT)" in err
    assert left(tmp_path) == {"m"}


@pytest.mark.usefixtures("unread")
@pytest.mark.parametrize("kind", NAMES)
def test_too_small_a_disk_is_refused_before_weights_are_loaded(
    tmp_path: Path, source: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil._ntuple_diskusage(10**9, 10**9, 10_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    code, err = init(tmp_path / "h", "--model", source, *NAMES[kind])
    assert code == ExitCode.BAD_CONFIG, err
    for part in ("to found this swarm needs", "10.0 kB are free", "--home"):
        assert part in err
    assert left(tmp_path) == {"m"}


@pytest.mark.usefixtures("small_memory")
@pytest.mark.parametrize("wanted", ["warn", "skip"])
def test_the_comparison_can_be_switched_off(
    tmp_path: Path, source: Path, wanted: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XPEER_TRAINING_CHECK_FIT", wanted)
    code, err = init(tmp_path / "h", "--model", source, "--tokenizer", "bytes", "--skip-trial",
                     "--skip-estimate")  # fmt: skip
    assert code == 0, err
    assert ("memory of this machine is 1.00 MB" in err) == (wanted == "warn")


@pytest.mark.usefixtures("small_memory")
def test_a_model_that_can_not_be_built_is_the_loaders_to_refuse(tmp_path: Path) -> None:
    (file := tmp_path / "config.json").write_text('{"model_type": "nothing", "vocab_size": 259}')
    code, err = init(tmp_path / "h", "--model-config", file)
    assert (code, "no known model" in err) == (ExitCode.BAD_CONFIG, True), err


@pytest.mark.parametrize(
    "lora", [None, LoraOptions(2), LoraOptions(2, targets=("q_proj",), train="B")]
)
def test_what_is_foreseen_is_what_is_founded(source: Path, lora: LoraOptions | None) -> None:
    made, seen = (
        initial_model(source, None, None, lora).section(),
        foreseen(source, None, None, lora),
    )
    assert (seen.num_params, seen.base_dtype) == (made.num_params, made.base_dtype)
    if made.lora is not None and seen.lora is not None:
        assert (seen.lora.rank, seen.lora.targets) == (made.lora.rank, made.lora.targets)
    assert (seen.lora is None) == (lora is None)


COUNT = 1_000_000_000
"""Trained parameters that are claimed, beside those of a tiny model."""


def examined(
    most: int, device: torch.device = CPU, *, trial: bool = True, of_gpu: int = 0, **model: Any
) -> Fit:
    def here(asked: torch.device) -> Room:
        found = of_gpu if asked.type == "cuda" else most
        return Room(f"memory of {asked.type}", found, found)

    section = Model(PRESETS["tiny"], initial_digest="", **{"num_params": COUNT, **model})
    manifest = manifest_with(model=section)
    where = Home(Path("/"))
    return to_found.examine(manifest, NodeConfig(), where, device, None, trial=trial, here=here)


@pytest.mark.usefixtures("large_disk")
def test_a_trial_takes_a_step_and_a_checkpoint_beside_it() -> None:
    assert examined(35 * COUNT).problems == []
    (problem,) = examined(30 * COUNT).problems
    assert "36" in problem.problem
    assert examined(30 * COUNT, trial=False).problems == []
    (problem,) = examined(4 * COUNT, trial=False).problems
    assert "--skip-trial" not in problem.remedy


@pytest.mark.usefixtures("large_disk")
def test_a_trial_gives_memory_back_where_it_is_short() -> None:
    most = 36 * COUNT + phases.PROCESS
    assert examined(most + 100 * MB).short
    assert not examined(2 * most).short
    assert not examined(most, trial=False).short
    assert not examined(most, GPU, of_gpu=most).short


@pytest.mark.usefixtures("large_disk", "small_memory")
@pytest.mark.parametrize("short", [False, True])
def test_init_gives_memory_back_before_it_loads(
    tmp_path: Path, source: Path, short: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    real = loading._loaded

    def loaded(*arguments: Any, **more: Any) -> Any:
        done.append("loaded")
        return real(*arguments, **more)

    monkeypatch.setattr(loading, "_loaded", loaded)
    monkeypatch.setattr(needed, "keep_nothing", lambda: done.append("kept nothing"))
    fit = Fit()
    if short:
        fit.be_short()
    monkeypatch.setattr(to_found, "examine", lambda *_, **__: fit)
    code, err = init(tmp_path / "h", "--model", source, "--tokenizer", "bytes", "--skip-estimate",
                     "--skip-trial")  # fmt: skip
    assert code == 0, err
    assert done[: 1 + short] == [*["kept nothing"] * short, "loaded"]
    assert ("memory is short" in err) is short


@pytest.mark.usefixtures("large_disk")
def test_a_gpu_holds_the_step_of_a_trial() -> None:
    assert examined(24 * COUNT, GPU, of_gpu=17 * COUNT).problems == []
    (problem,) = examined(24 * COUNT, GPU, of_gpu=15 * COUNT).problems
    assert "memory of cuda" in problem.problem
    assert "--skip-trial" in problem.remedy
    assert examined(24 * COUNT, GPU, of_gpu=15 * COUNT, trial=False).problems == []
    (problem,) = examined(15 * COUNT, GPU, of_gpu=17 * COUNT).problems
    assert "memory of cpu" in problem.problem


@pytest.mark.usefixtures("large_disk")
def test_what_is_not_free_now_is_a_warning() -> None:
    def here(_: torch.device) -> Room:
        return Room("memory", 40 * COUNT, 20 * COUNT)

    section = Model(PRESETS["tiny"], COUNT, "")
    fit = to_found.examine(
        manifest_with(model=section), NodeConfig(), Home(Path("/")), CPU, None,
        trial=True, here=here,
    )  # fmt: skip
    assert (len(fit.warnings), fit.problems) == (1, [])


def test_a_base_in_4_bits_is_written_in_16() -> None:
    section = Model(
        {**PRESETS["tiny"], "hidden_size": 256, "intermediate_size": 1024}, 47_104, "",
        Lora(4, 8.0, 1, ""), base_dtype="nf4", base_block=64,
    )  # fmt: skip
    from xpeer.estimate.fit import sizes_of
    from xpeer.estimate.step import memory_of

    manifest = manifest_with(model=section)
    sizes = sizes_of(manifest, NodeConfig(), CPU)
    exact = phases.init_of(memory_of(sizes.step), phases.Wire.of(manifest))
    rough = phases.init_of(sizes.bound, phases.Wire.of(manifest))
    assert rough.disk == pytest.approx(exact.disk, rel=0.1)
    assert rough.host == pytest.approx(exact.host, rel=0.1)
