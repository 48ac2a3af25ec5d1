"""Errors of a trainer that no restart cures end the node: each restart would cost charged steps."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.unit.training.homes import make_homes
from xpeer.errors import ConfigError, ExitCode
from xpeer.trainer.client import TrainerProcess
from xpeer.trainer.setup import TrainerSetup
from xpeer_daemon import supervisor as supervisor_module
from xpeer_daemon.supervisor import Supervisor

ROOT = Path(__file__).parents[3]


async def test_gradients_that_differ_end_the_node_however_long_it_ran(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Deaths after minutes are not counted, so it would be restarted for ever."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.setattr(supervisor_module, "QUIET_S", 0.0)
    monkeypatch.setattr(supervisor_module, "FIRST_DELAY_S", 0.0)
    (setup,) = make_homes(tmp_path, 1, privacy="record")

    async def start(given: TrainerSetup) -> TrainerProcess:
        program = "tests.unit.trainer.unsteady"
        return await TrainerProcess.start(given, lambda _event: None, program=program)

    async def restarted(trainer: TrainerProcess) -> None:
        await trainer.kill()
        pytest.fail("it was started again")

    supervisor = Supervisor(lambda: setup, start)
    await supervisor.first_start()
    with pytest.raises(ConfigError, match="computed twice, differ") as e:
        await supervisor.run(restarted)
    assert e.value.exit_code == ExitCode.BAD_CONFIG  # systemd does not restart it either
    assert "training.precision to float32" in e.value.remedy
    assert supervisor.restarts == 0
