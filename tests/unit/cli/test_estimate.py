"""`xpeer estimate`."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result

from tests.cases.support import model_folder
from xpeer.cli import main
from xpeer.errors import ExitCode
from xpeer.estimate import planned
from xpeer.estimate.remembered import Rehearsals
from xpeer.estimate.step import Step, StepMemory
from xpeer.founding_model import PRESETS
from xpeer.manifest.model import Lora
from xpeer.manifest.signed import SignedManifest
from xpeer.privacy.steps import Precision
from xpeer.training.adapters import adapt
from xpeer.training.export import export_hf
from xpeer.training.kept import Source
from xpeer.training.model import build, from_folder

SOME = StepMemory(num_trained=1000, num_frozen=0, weights=1, moments=1, working=1)


def estimate(*arguments: object) -> Result:
    command = ["estimate", *map(str, arguments)]
    return CliRunner().invoke(main, command, catch_exceptions=False)


def test_a_row_for_each_phase(tmp_path: Path) -> None:
    file = tmp_path / "other.json"
    file.write_text(json.dumps(PRESETS["tiny"]))
    done = estimate("--model-config", file, "--link-mbit", 8, "--fragments", 1)
    assert done.exit_code == ExitCode.OK, done.stderr
    *lines, last = done.stdout.splitlines()[3:]
    rows = [line.split()[0] for line in lines]
    names = ["init", "start", "step", "exchange", "window", "checkpoint"]
    names += ["export", "donate", "join"]
    assert rows == names
    assert last.endswith("more where there is room: the C library keeps freed memory")
    on_gpu = estimate("--model-config", file, "--device", "cuda", "--precision", "float32")
    assert "C library" not in on_gpu.stdout
    found = json.loads(estimate("--preset", "tiny", "--link-mbit", 8, "--json").stdout)
    join = next(phase for phase in found["phases"] if phase["name"] == "join")
    assert join["wire"] == 4 * found["num_params"]
    assert join["wire_s"] == pytest.approx(join["wire"] / 1e6)
    assert found["fits"] is None


def test_a_rule_that_sends_two_values_needs_twice_the_bytes() -> None:
    def exchange(*more: object) -> int:
        found = json.loads(estimate("--preset", "tiny", "--json", *more).stdout)
        return next(int(phase["wire"]) for phase in found["phases"] if phase["name"] == "exchange")

    assert exchange("--rule", "noloco") == pytest.approx(2 * exchange(), rel=1e-3)
    assert exchange("--rule", "gradient") > 8 * exchange()  # it knows one fragment alone


def test_auto_precision_is_what_this_machine_would_choose(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def device_that_has_it(*_: object) -> tuple[Precision, str]:
        return Precision("bfloat16", contextlib.nullcontext), "computing in bfloat16: so"

    monkeypatch.setattr(planned, "choose_precision", device_that_has_it)
    rehearsed: list[Step] = []

    def rehearse(_self: Rehearsals, step: Step) -> StepMemory:
        rehearsed.append(step)
        return SOME

    monkeypatch.setattr(Rehearsals, "of", rehearse)
    done = estimate("--preset", "tiny", "--precision", "auto")
    assert done.exit_code == ExitCode.OK
    assert "computing in bfloat16: so" in done.stderr
    assert [step.precision for step in rehearsed] == ["bfloat16"]


def test_a_gpu_that_is_not_here_computes_in_bfloat16(rehearsed: list[Step]) -> None:
    """Not in what this machine's processor is best at."""
    if torch.cuda.is_available():
        pytest.skip("there is one here")
    for more in ((), ("--precision", "bfloat16"), ("--precision", "float32")):
        done = estimate("--preset", "tiny", "--device", "cuda", *more)
        assert done.exit_code == ExitCode.OK
        said = "no GPU: bfloat16 is assumed" in done.stderr
        assert said == (not more)
        precision = rehearsed[-1].precision
        first = done.stdout.splitlines()[0]
        assert first == f"a step on cuda in {precision}, 1 record a pass"
    assert [step.precision for step in rehearsed] == ["bfloat16", "bfloat16", "float32"]
    assert {step.device for step in rehearsed} == {"cuda"}


@pytest.fixture
def rehearsed(monkeypatch: pytest.MonkeyPatch) -> list[Step]:
    """The steps that are rehearsed; with layers computed again each needs a tenth."""
    steps: list[Step] = []

    def rehearse(_self: Rehearsals, step: Step) -> StepMemory:
        steps.append(step)
        working = 10**8 if step.recompute else 10**9
        return StepMemory(num_trained=1000, num_frozen=0, weights=1, moments=1, working=working)

    monkeypatch.setattr(Rehearsals, "of", rehearse)
    return steps


def step_founded(tmp_path: Path, *options: object) -> tuple[Any, Any]:
    """Adapters and type of the base, as `xpeer init` decides with these options."""
    where = ["--home", str(tmp_path / "home"), "--swarm", "s", "--skip-trial", "--skip-estimate"]
    done = CliRunner().invoke(main, ["init", *where, *map(str, options)], catch_exceptions=False)
    assert done.exit_code == ExitCode.OK, done.output
    model = SignedManifest.load(tmp_path / "home" / "manifest.json").open().model
    assert model.lora is not None
    return (model.lora.rank, model.lora.targets, model.lora.train), model.base_dtype


@pytest.mark.parametrize("source", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize(
    "options",
    [
        ("--lora-rank", 2),
        ("--lora-rank", 8, "--lora-target", "q_proj,v_proj", "--lora-train", "B"),
        ("--lora-rank", 2, "--lora-target", r"model\.layers\.\d{1,2}\.mlp\..*"),
        ("--lora-rank", 2, "--base-dtype", "bfloat16"),
    ],
)
def test_the_step_is_that_of_the_swarm_that_init_would_found(
    tmp_path: Path, rehearsed: list[Step], source: str, options: tuple[object, ...]
) -> None:
    folder = tmp_path / "model"
    whole = from_folder(model_folder(tmp_path / "whole"))
    export_hf(whole, None, folder, source=Source({"dtype": source}))
    options = "--model", folder, *options
    lora, dtype = step_founded(tmp_path, *options, "--tokenizer", "bytes")
    assert estimate(*options).exit_code == ExitCode.OK
    (step,) = rehearsed
    assert step.lora is not None
    assert (step.lora.rank, step.lora.targets, step.lora.train) == lora
    assert step.base_dtype == dtype


@pytest.mark.parametrize("source", ["float16", "bfloat16"])
def test_a_base_that_is_converted_needs_room_for_that(tmp_path: Path, source: str) -> None:
    folder = tmp_path / "model"
    whole = from_folder(model_folder(tmp_path / "whole"))
    export_hf(whole, None, folder, source=Source({"dtype": source}))
    size = (folder / "model.safetensors").stat().st_size

    def disk(*options: object) -> dict[str, int]:
        found = json.loads(estimate("--model", folder, "--json", *options).stdout)
        return {phase["name"]: phase["disk"] for phase in found["phases"]}

    adapters, converts = disk("--lora-rank", 2), source == "float16"
    assert (adapters["init"] > 1.95 * size) == converts  # the header is not counted
    assert (adapters["start"] > 0.95 * size) == converts
    assert disk()["start"] == 0, "weights that are trained are memory"


def test_adapters_to_go_on_with_decide_rank_and_layers(
    tmp_path: Path, rehearsed: list[Step]
) -> None:
    adapted = adapt(build(PRESETS["tiny"], seed=1), Lora(3, 6.0, 1, "", ["q_proj"]))
    adapted.save_pretrained(tmp_path / "adapters")  # type: ignore[operator] # peft's
    done = estimate("--preset", "tiny", "--lora-from", tmp_path / "adapters")
    assert done.exit_code == ExitCode.OK, done.stderr
    (step,) = rehearsed
    assert step.lora is not None
    assert (step.lora.rank, step.lora.targets) == (3, ["q_proj"])


def test_layers_are_computed_again_where_a_node_would(rehearsed: list[Step]) -> None:
    def recomputed(*options: object) -> list[bool]:
        rehearsed.clear()
        estimate("--preset", "tiny", *options)
        return [step.recompute for step in rehearsed]

    assert recomputed() == recomputed("--memory-gb", 2) == [False]
    assert recomputed("--checkpoint-activations", "--memory-gb", 2) == [True]
    assert recomputed("--checkpoint-activations", "on") == [True]
    done = estimate("--preset", "tiny", "--memory-gb", 0.5)
    assert done.exit_code == ExitCode.OK
    assert "layers are computed again" in done.stderr
    assert "fits into 0.5 GB" in done.stdout
    done = estimate("--preset", "tiny", "--memory-gb", 0.5, "--checkpoint-activations", "off")
    assert done.exit_code == ExitCode.ERROR
    assert "training.checkpoint_activations = on" in done.stdout


def test_what_does_not_fit_is_answered_with_what_would() -> None:
    arguments: tuple[object, ...] = "--preset", "small", "--sequence-tokens", 256
    arguments += "--micro-batch", 64, "--precision", "float32"  # auto depends on the processor
    assert estimate(*arguments, "--memory-gb", 4).stdout.endswith("a step fits into 4 GB\n")
    done = estimate(*arguments, "--memory-gb", 0.06)
    assert done.exit_code == ExitCode.ERROR
    assert "it would with: training.micro_batch = 1" in done.stdout
    done = estimate(*arguments, "--memory-gb", 0.01)
    assert done.exit_code == ExitCode.ERROR
    assert "no setting helps" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ((), "give one of them"),
        (("--preset", "tiny", "--model-config", __file__), "2 of --model"),
        (("--preset", "tiny", "--lora-target", "q_proj"), "needs --lora-rank"),
        (("--preset", "tiny", "--base-dtype", "nf4"), "needs --lora-rank"),
        (("--preset", "tiny", "--lora-from", ".", "--lora-rank", 2), "--lora-from does not go"),
        (("--preset", "tiny", "--lora-rank", 2, "--lora-target", "nothing"), "nothing"),
        (("--preset", "tiny", "--memory-gb", 0), "--memory-gb"),
        (("--preset", "tiny", "--micro-batch", 0), "--micro-batch"),
        (("--model-config", "missing.json"), "missing.json"),
    ],
)
def test_bad_arguments_are_named(arguments: tuple[object, ...], word: str) -> None:
    done = estimate(*arguments)
    assert done.exit_code == ExitCode.BAD_CONFIG
    assert word in done.stderr


@pytest.mark.parametrize("source", ["float32", "bfloat16"])
def test_a_config_says_before_the_download_what_the_whole_folder_says(
    tmp_path: Path, rehearsed: list[Step], source: str
) -> None:
    folder, config = tmp_path / "model", tmp_path / "config"
    whole = from_folder(model_folder(tmp_path / "whole"))
    export_hf(whole, None, folder, source=Source({"dtype": source}))
    config.mkdir()
    (config / "config.json").write_bytes((folder / "config.json").read_bytes())
    for named in (
        ("--model", folder),
        ("--model", config),
        ("--model-config", folder / "config.json"),
    ):
        done = estimate(*named, "--lora-rank", 2)
        assert done.exit_code == ExitCode.OK, done.stderr
    assert [step.base_dtype for step in rehearsed] == [source] * 3
    assert all(step.lora == rehearsed[0].lora for step in rehearsed)


def test_a_folder_with_weights_of_another_kind_is_refused_all_the_same(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(PRESETS["tiny"]))
    assert estimate("--model", tmp_path).exit_code == ExitCode.OK
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    done = estimate("--model", tmp_path)
    assert done.exit_code == ExitCode.BAD_CONFIG
    assert "GGUF" in done.stderr
