"""Memory that runs out is no fault of xpeer: every command says what to set."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from click.testing import CliRunner
from transformers import AutoModelForCausalLM

from tests.cases.support import model_folder
from tests.unit.training.homes import make_homes
from xpeer.cli import main
from xpeer.errors import ExitCode, ShortOfMemoryError, TrainerError
from xpeer.shortage import in_words, out_of_memory
from xpeer.trainer.answers import error_of, failure_of
from xpeer.training import tensor_file
from xpeer.training.model import build, export_hf, from_folder, read_config

GPU = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total")
CPU = RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to 12345")
KINDS = pytest.mark.parametrize("error", [GPU, CPU, MemoryError()], ids=["gpu", "cpu", "python"])


def raises(error: BaseException) -> Any:
    def fail(*_: object, **__: object) -> NoReturn:
        raise error

    return fail


@KINDS
def test_it_names_settings_and_no_number(error: BaseException) -> None:
    """What was asked for may follow from the number of records that were sampled."""
    assert out_of_memory(error)
    said = str(in_words(error))
    assert "training.checkpoint_activations" in said
    assert "ran out of memory" in said
    assert not re.search(r"2\.00|12345|GiB", said)
    assert ("training.device to cpu" in said) == (error is GPU)


def test_what_was_said_already_is_said_again() -> None:
    error = ShortOfMemoryError("a single record does not fit", "set this")
    assert out_of_memory(error)
    assert in_words(error) is error
    assert not out_of_memory(RuntimeError("expected m1 and m2 to have the same dtype"))


@KINDS
def test_a_trainer_tells_its_daemon(error: BaseException) -> None:
    """As an error that may pass, so that it is restarted."""
    told = error_of(failure_of(error))
    assert type(told) is TrainerError
    assert "ran out of memory" in told.problem
    assert "training.micro_batch" in told.remedy
    assert failure_of(error).trace, "the log still has it"
    assert type(error_of(failure_of(in_words(error)))) is TrainerError


@KINDS
@pytest.mark.parametrize("command", ["generate", "eval", "export", "finetune", "init"])
def test_every_command_says_what_to_set(
    command: str, error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("xpeer.training.trained.from_export", raises(error))
    monkeypatch.setattr("xpeer.training.initial.saved_model", raises(error))
    monkeypatch.setattr("xpeer.trainer.own.OwnTraining", raises(error))
    monkeypatch.setattr("xpeer.training.loop.TrainingLoop.run", raises(error))
    (setup,) = make_homes(tmp_path, 1)
    Path(setup.home).chmod(0o700)
    text = tmp_path / "text"
    text.write_text("some text")
    new = ["--home", str(tmp_path / "new"), "--set", "optimiser.sequence_tokens=32"]
    arguments = {
        "generate": ["generate", "--model", str(tmp_path), "--prompt", "a"],
        "eval": ["eval", "--model", str(tmp_path), "--text", str(text)],
        "export": ["checkpoint", "export", "--home", setup.home, "--hf", str(tmp_path / "out")],
        "finetune": ["finetune", "--home", setup.home],
        "init": ["init", "--swarm", "s", "--preset", "tiny", *new],
    }[command]
    done = CliRunner().invoke(main, arguments)
    assert done.exit_code == ExitCode.ERROR, done.stderr
    assert "ran out of memory - " in done.stderr
    assert "a fault of xpeer" not in done.stderr
    assert "training.checkpoint_activations" in done.stderr


@KINDS
def test_a_folder_is_not_blamed(
    error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither the model's, which is loaded, nor the export's, which is loaded again."""
    folder = model_folder(tmp_path / "m")
    model = build(read_config(folder), seed=1)
    real = AutoModelForCausalLM.from_pretrained
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", raises(error))
    for work in (lambda: from_folder(folder), lambda: export_hf(model, None, tmp_path / "out")):
        with pytest.raises((ShortOfMemoryError, MemoryError)):
            work()
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", real)
    monkeypatch.setattr("xpeer.training.reloading.logits_of", raises(error))
    with pytest.raises((ShortOfMemoryError, MemoryError)):
        export_hf(model, None, tmp_path / "out")


def test_a_disk_is_not_blamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensor_file, "save_file", raises(CPU))
    with pytest.raises(ShortOfMemoryError, match="this machine ran out of memory"):
        tensor_file.write_tensors(tmp_path / "file", {"a": torch.zeros(2)}, {})


_THREADS = """
import re, threading, sys
from pathlib import Path
from xpeer.shortage import give_back, share_freed

def resident():
    return int(re.search(r"RssAnon:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) / 1000

def blocks():
    return [bytearray(b"x") * 60_000 for _ in range(1000)]

def use():
    kept = blocks()
    barrier.append(kept.pop())  # what lies last in the heap stays, so that the heap can't shrink
    del kept

if sys.argv[1] == "shared":
    share_freed()
before, barrier = resident(), []
thread = threading.Thread(target=use)
thread.start()
thread.join()
held = blocks()
print(round(resident() - before))
del held
if sys.argv[1] == "shared":
    give_back()
    print(round(resident() - before))
"""


def test_memory_that_a_thread_freed_is_used_by_others_and_given_back() -> None:
    alone, (shared, after) = (
        [int(line) for line in subprocess.run(
            [sys.executable, "-c", _THREADS, kind], capture_output=True, text=True, check=True
        ).stdout.split()]
        for kind in ("alone", "shared")
    )  # fmt: skip
    assert alone[0] > 100, "an arena of its own"
    assert shared < 80
    assert after < 20


_PIECES = """
import re, sys
from pathlib import Path
from xpeer.shortage import keep_nothing

def resident():
    return int(re.search(r"RssAnon:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) / 1000

if sys.argv[1] == "nothing":
    keep_nothing()
del [bytearray(b"x") * 30_000_000 for _ in range(3)][:]  # blocks of 30 MB are no longer mapped
before = resident()
blocks = [bytearray(b"x") * 1_000_000 for _ in range(200)]
del blocks[:-1]
print(round(resident() - before))
"""


def test_where_memory_is_short_freed_blocks_are_given_back() -> None:
    kept, nothing = (
        int(subprocess.run(
            [sys.executable, "-c", _PIECES, kind], capture_output=True, text=True, check=True
        ).stdout)
        for kind in ("pieces", "nothing")
    )  # fmt: skip
    assert kept > 100
    assert nothing < 10
