"""`xpeer estimate`."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from xpeer.cli import main
from xpeer.errors import ExitCode
from xpeer.estimate import planned
from xpeer.estimate.remembered import Rehearsals
from xpeer.estimate.step import Step, StepMemory
from xpeer.founding_model import PRESETS
from xpeer.privacy.steps import Precision

SOME = StepMemory(num_trained=1000, num_frozen=0, weights=1, moments=1, working=1)


def estimate(*arguments: object) -> Result:
    command = ["estimate", *map(str, arguments)]
    return CliRunner().invoke(main, command, catch_exceptions=False)


def test_a_row_for_each_phase(tmp_path: Path) -> None:
    file = tmp_path / "other.json"
    file.write_text(json.dumps(PRESETS["tiny"]))
    done = estimate("--model-config", file, "--link-mbit", 8, "--fragments", 1)
    assert done.exit_code == ExitCode.OK, done.stderr
    rows = [line.split()[0] for line in done.stdout.splitlines()[2:]]
    names = ["init", "start", "step", "exchange", "window", "checkpoint", "export", "join"]
    assert rows == names
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


def test_what_does_not_fit_is_answered_with_what_would() -> None:
    arguments = "--preset", "small", "--sequence-tokens", 256, "--micro-batch", 64
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
        (("--preset", "tiny", "--model-config", "x.json"), "2 of --model"),
        (("--preset", "tiny", "--lora-target", "q_proj"), "need --lora-rank"),
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
