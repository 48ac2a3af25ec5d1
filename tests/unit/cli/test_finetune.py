"""`xpeer finetune`, and the own model in the commands that use a model."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file

from tests.cases.support import environment
from tests.fake_daemon import HEALTHY, answering
from tests.unit.training.homes import make_homes
from xpeer.accounts.ledger import Ledger
from xpeer.accounts.model_card import card_of, files
from xpeer.accounts.own_model import OwnModel, OwnPlan
from xpeer.cli import main
from xpeer.config import Home
from xpeer.control import Client
from xpeer.errors import ExitCode
from xpeer.manifest.signed import SignedManifest
from xpeer.phase import Phase
from xpeer.trainer.build import assemble
from xpeer.training import checkpoint
from xpeer_daemon.lock import HomeLock

WINDOW = 2
"""Own steps between two checkpoints, if there are 20."""
CONFIG = """
[data]
shard = ["{home}/shard"]
[training]
threads = 1
device = "cpu"
validation_records = 4
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Home:
    (setup,) = make_homes(tmp_path_factory.mktemp("swarm"), 1, privacy="off")
    made = Home(Path(setup.home))
    made.path.chmod(0o700)
    made.config.write_text(CONFIG.format(home=made.path))
    node = assemble(setup)
    node.trainer.run(steps=4)
    node.checkpoints.copy()()
    node.close()
    return made


def xpeer(home: Home, *arguments: str | Path) -> tuple[int, str, str]:
    words = [str(each) for each in (*arguments, "--home", home.path)]
    done = CliRunner().invoke(main, words, prog_name="xpeer")
    return done.exit_code, done.stdout, done.stderr


def test_the_own_model_is_used_only_by_name(home: Home, tmp_path: Path) -> None:
    code, _, err = xpeer(home, "checkpoint", "export", "--own", "--hf", tmp_path / "none")
    assert code == ExitCode.ERROR
    assert "make one: `xpeer finetune`" in err

    with HomeLock.acquire(home):
        code, _, err = xpeer(home, "finetune")
    assert code == ExitCode.ERROR
    assert "xpeer stop --home" in err
    with HomeLock.acquire(home):
        code, _, err = xpeer(home, "finetune", "--stop")
    assert code == ExitCode.ERROR
    assert f"doesn't answer at {home.path}/xpeer.sock - set daemon.socket" in err
    assert not home.own.exists()

    options = ("--steps", "10", "--keep", "last", "--json")
    code, out, err = xpeer(home, "finetune", *options)
    assert code == ExitCode.OK, err
    made = json.loads(out)
    assert (made["kept_step"], made["plan"]["swarm_step"], made["epsilon_spent"]) == (10, 4, 0.0)
    assert "checkpoint export --own" not in out
    assert "step 10: loss on held-out own text" in err

    weights = {}
    for name, own in (("swarm", ()), ("own", ("--own",))):
        code, _, err = xpeer(home, "checkpoint", "export", *own, "--hf", tmp_path / name)
        assert code == ExitCode.OK, err
        weights[name] = load_file(tmp_path / name / "model.safetensors")
        card = (tmp_path / name / "README.md").read_text()
        assert ("This is not the swarm's model" in card) == (name == "own")
    changed = [key for key, swarm in weights["swarm"].items()
               if not torch.equal(swarm, weights["own"][key])]  # fmt: skip
    assert changed

    (tmp_path / "text").write_text("the quick brown fox jumps over the lazy dog. " * 20)
    losses = []
    for own in ((), ("--own",)):
        code, out, err = xpeer(home, "eval", *own, "--text", tmp_path / "text", "--json")
        assert code == ExitCode.OK, err
        losses.append(json.loads(out)["loss_per_token"])
    assert losses[1] < losses[0]
    code, _, err = xpeer(home, "eval", "--own", "--model", tmp_path, "--text", tmp_path / "text")
    assert code == ExitCode.BAD_CONFIG
    assert "--own and --model" in err


@pytest.fixture
def private_home(tmp_path: Path, register_of_the_test: Path) -> Home:
    """Its part of the swarm's run is over, and half of the budget is kept back."""
    changes = ("end.steps=4", "privacy.epsilon=8", "privacy.noise_multiplier=2")
    (setup,) = make_homes(tmp_path, 1, privacy="record", changes=changes)
    home = Home(Path(setup.home))
    home.path.chmod(0o700)
    home.config.write_text(CONFIG.format(home=home.path) + "[privacy]\nkeep_back = 0.5\n")
    rules = msgspec.structs.replace(
        setup.config.privacy, keep_back=0.5, register=str(register_of_the_test)
    )
    config = msgspec.structs.replace(setup.config, privacy=rules)
    node = assemble(msgspec.structs.replace(setup, config=config))
    node.trainer.run(steps=4)
    node.checkpoints.copy()()
    node.close()
    return home


def killed_after(home: Home, begins: str) -> list[str]:
    """Run `xpeer finetune` until it says a line that begins so, then kill it; its lines so far."""
    words = [sys.executable, "-m", "xpeer.cli", "finetune", "--home", str(home.path)]
    lines = []
    with subprocess.Popen(
        [*words, "--steps", "20"], stderr=subprocess.PIPE, text=True, env=environment()
    ) as process:
        assert process.stderr is not None
        try:
            for line in process.stderr:
                lines.append(line)
                if line.startswith(begins):
                    break
        finally:
            process.kill()
    assert process.returncode == -signal.SIGKILL, "".join(lines)
    return lines


@pytest.mark.timeout(300)  # three starts of a process, each with the accountant's work
def test_a_kill_forfeits_what_was_charged_since_the_last_checkpoint(private_home: Home) -> None:
    """20 own steps have a checkpoint for each two of them. First before there is one."""
    home = private_home
    swarm, _ = checkpoint.load_latest(home.checkpoints)
    assert swarm is not None
    killed_after(home, "20 own steps")
    lines = killed_after(home, "step 8:")
    again = next(line for line in lines if line.startswith("20 own steps"))
    assert "begins again: a run ended before its first checkpoint" in again

    saved, _ = checkpoint.load_latest(home.own / "running")
    assert saved is not None
    assert saved.step >= 8
    with Ledger.look(home.ledger_db) as ledger:
        charged = sum(segment.steps for segment in ledger.own_segments())
    lost = charged - saved.step
    assert 0 <= lost <= 2 * WINDOW, "at most a window for each kill"

    code, out, err = xpeer(home, "finetune", "--json")
    assert code == ExitCode.OK, err
    assert f"(goes on at step {saved.step})" in err
    made = json.loads(out)
    # what was lost is missing at the end; a row of the register alone is charged at the start
    assert 20 - 2 * WINDOW <= made["steps"] <= 20
    assert made["epsilon_spent"] <= 8
    after, _ = checkpoint.load_latest(home.checkpoints)
    assert after is not None
    assert torch.equal(after.flat, swarm.flat)
    assert not (home.own / "running").exists()


def test_a_home_that_never_trained_says_what_comes_first(home: Home, tmp_path: Path) -> None:
    other = Home(tmp_path / "other")
    other.path.mkdir(mode=0o700)
    other.manifest.write_bytes(home.manifest.read_bytes())
    other.config.write_text(CONFIG.format(home=home.path))
    code, _, err = xpeer(other, "finetune")
    assert code == ExitCode.ERROR
    assert "train first: `xpeer start`" in err


@pytest.mark.parametrize("state", [Phase.TRAINING, Phase.CLOSING, Phase.FINISHED])
def test_stop_ends_only_a_node_that_has_finished(
    home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, state: Phase
) -> None:
    ended: list[float] = []
    monkeypatch.setattr(
        Client, "stop_and_wait", lambda _client, timeout_s, **_more: ended.append(timeout_s)
    )
    other = Home(tmp_path / "other")
    other.path.mkdir(mode=0o700)
    other.manifest.write_bytes(home.manifest.read_bytes())
    with answering(tmp_path / "s", msgspec.structs.replace(HEALTHY, state=state)):
        monkeypatch.setenv("XPEER_DAEMON_SOCKET", str(tmp_path / "s"))
        code, _, err = xpeer(other, "finetune", "--stop")
    assert code != ExitCode.OK
    if state == Phase.FINISHED:
        assert len(ended) == 1
        assert "start it again afterwards: `xpeer start --home" in err
    else:
        assert not ended
        assert f"the node is {state}: it has not finished" in err
        assert "xpeer stop --home" in err


def test_the_card_says_what_epsilon_does_not_cover(home: Home) -> None:
    manifest = SignedManifest.load(home.manifest).open()
    private = msgspec.structs.replace(
        manifest, privacy=msgspec.structs.replace(manifest.privacy, mode="record")
    )
    own = OwnModel(
        plan=OwnPlan(steps=10, learning_rate=0.01, keep="best", swarm_step=4),
        steps=10,
        kept_step=6,
        loss_after=1.0,
        loss_public_after=1.0,
        epsilon_spent=8.0,
        epsilon_target=8.0,
        delta=1e-5,
        chosen=True,
    )
    card = card_of(private, "swarm", 6, None, None, own)
    assert (card.step, card.own_steps, card.chosen) == (4, 6, True)
    words = files(card)["README.md"].decode()
    assert "for 6 further steps on its own text alone" in words
    assert "Epsilon does not cover that choice" in words
    of_swarm = files(card_of(private, "swarm", 6, None))["README.md"].decode()
    assert "own text alone" not in of_swarm
