"""`xpeer finetune`, and the own model in the commands that use a model."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file

from tests.fake_daemon import HEALTHY, answering
from tests.unit.training.homes import make_homes
from xpeer.accounts.model_card import card_of, files
from xpeer.accounts.own_model import OwnModel, OwnPlan
from xpeer.cli import main
from xpeer.config import Home
from xpeer.control import Client
from xpeer.errors import ExitCode
from xpeer.manifest.signed import SignedManifest
from xpeer.phase import Phase
from xpeer.trainer.build import assemble
from xpeer_daemon.lock import HomeLock

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
