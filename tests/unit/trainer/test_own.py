"""Own steps of real trainers: what they leave alone, what they cost, and how they go on."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from tests.unit.training.homes import make_homes
from xpeer.accounts.own_model import OwnModel, facts_of
from xpeer.config import Home
from xpeer.errors import BudgetSpentError, ConfigError, ExitCode, LocalError
from xpeer.estimate import room
from xpeer.estimate.room import Room
from xpeer.founding_model import LoraOptions
from xpeer.manifest import End
from xpeer.manifest.signed import SignedManifest
from xpeer.trainer import build, own
from xpeer.trainer.build import assemble
from xpeer.trainer.own import OwnTraining, Wishes
from xpeer.trainer.setup import TrainerSetup
from xpeer.training import checkpoint

STEPS = 8
PLAN = ("end.steps=8", "privacy.epsilon=8", "optimiser.learning_rate=0.003")


class KilledError(BaseException):
    """The process died: nothing is saved or closed any more."""


def trained(folder: Path, privacy: Any, keep_back: float = 0.5, **more: Any) -> TrainerSetup:
    """A home whose part of the swarm's run is over."""
    (setup,) = make_homes(folder, 1, privacy=privacy, changes=PLAN, **more)
    rules = msgspec.structs.replace(setup.config.privacy, keep_back=keep_back)
    setup = msgspec.structs.replace(
        setup, config=msgspec.structs.replace(setup.config, privacy=rules)
    )
    node = assemble(setup)
    node.trainer.run(steps=STEPS)
    assert node.trainer.counters.step == STEPS
    node.checkpoints.copy()()
    node.close()
    return setup


def training(setup: TrainerSetup, said: list[str] | None = None, **wishes: Any) -> OwnTraining:
    report = said.append if said is not None else (lambda _line: None)
    return OwnTraining(Home(Path(setup.home)), setup.config, Wishes(**wishes), report)


def finetuned(setup: TrainerSetup, said: list[str] | None = None, **wishes: Any) -> OwnModel:
    made = training(setup, said, **wishes).run()
    assert made is not None
    return made


def test_own_steps_are_charged_to_the_register_of_the_swarms_steps(tmp_path: Path) -> None:
    setup = trained(tmp_path, "record")
    home, other = Home(Path(setup.home)), tmp_path / "other"
    rules = msgspec.structs.replace(setup.config.privacy, register=str(other))
    config = msgspec.structs.replace(setup.config, privacy=rules)
    with pytest.raises(ConfigError, match="is not this home's register") as caught:
        OwnTraining(home, config, Wishes(steps=10), lambda _line: None)
    assert caught.value.exit_code == ExitCode.BAD_CONFIG
    assert str(tmp_path / "register") in caught.value.problem
    assert not other.exists()


def test_own_steps_give_memory_back_where_it_is_short(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the swarm's do. They are not refused: this home has trained."""
    setup, said, done = trained(tmp_path, "off"), list[str](), list[str]()
    monkeypatch.setattr(room, "host", lambda: Room("memory of this machine", 10**6, 10**6))
    monkeypatch.setattr(build, "keep_nothing", lambda: done.append("kept nothing"))
    finetuned(setup, said, steps=1)
    assert done == ["kept nothing"]
    assert any("memory is short" in line for line in said)
    assert any("memory of this machine is 1.00 MB" in line for line in said)


def digests(folder: Path) -> dict[str, str]:
    return {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in sorted(folder.iterdir())}


@pytest.mark.parametrize(
    ("privacy", "lora"), [("record", LoraOptions(rank=2)), ("off", None)], ids=["record", "off"]
)
def test_own_steps_touch_nothing_of_the_swarm(
    tmp_path: Path, privacy: str, lora: LoraOptions | None
) -> None:
    setup = trained(tmp_path, privacy, lora=lora)
    home = Home(Path(setup.home))
    before = digests(home.checkpoints)
    swarm, _ = checkpoint.load_latest(home.checkpoints)
    assert swarm is not None
    said: list[str] = []
    made = finetuned(setup, said, steps=10, keep="last")
    assert digests(home.checkpoints) == before
    kept, _ = checkpoint.load_latest(home.own)
    assert kept is not None
    assert facts_of(kept.counters) == made
    assert (made.steps, made.kept_step, made.plan.swarm_step) == (10, 10, STEPS)
    assert not torch.equal(kept.flat, swarm.flat)
    assert [path.name for path in home.own.iterdir()] == ["ckpt-000000010.safetensors"]
    assert any(line.startswith("step 10: loss on held-out own text") for line in said)
    node = assemble(setup)  # the node goes on in the swarm
    assert torch.equal(node.trainer.parameters.read(), swarm.flat)
    assert node.beginning.steps_forfeited == 0
    if privacy == "record":
        assert 3.5 < made.plan.epsilon_before <= 4 < made.epsilon_spent <= 8
        assert node.mechanism.spent().steps_left == 0
        assert node.ledger.steps_charged == STEPS + 10
    else:
        assert made.epsilon_spent == made.plan.noise_multiplier == 0
        assert not node.ledger.steps_charged
    node.close()


def test_the_best_model_is_kept_and_the_swarms_is_one_of_them(tmp_path: Path) -> None:
    setup = trained(tmp_path, "off")
    learnt = finetuned(setup, steps=20, learning_rate=0.003)
    assert learnt.chosen
    assert learnt.kept_step > 0
    assert learnt.loss_after is not None
    assert learnt.plan.loss_before is not None
    assert learnt.loss_after < learnt.plan.loss_before
    spoilt = finetuned(setup, steps=10, learning_rate=3.0)
    assert spoilt.kept_step == 0
    assert spoilt.loss_after == pytest.approx(spoilt.plan.loss_before)
    home = Home(Path(setup.home))
    swarm, _ = checkpoint.load_latest(home.checkpoints)
    kept, _ = checkpoint.load_latest(home.own)
    assert swarm is not None
    assert kept is not None
    assert torch.equal(kept.flat, swarm.consolidated())


def test_killed_own_steps_go_on_and_refund_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    setup = trained(tmp_path, "record")
    home = Home(Path(setup.home))
    said: list[str] = []
    first = training(setup, said, steps=20)
    assert any("next to nothing is learnt - fewer --steps" in line for line in said)
    charged, taken = first._made.ledger.steps_charged, first._loop.learner.step

    def killed() -> int:
        if first._loop.counters.step == 7:
            raise KilledError
        return taken()

    monkeypatch.setattr(first._loop.learner, "step", killed)
    with pytest.raises(KilledError):
        first.run()
    assert checkpoint.load_latest(home.own)[0] is None
    with pytest.raises(ConfigError, match="--steps 30: an unfinished run has 20"):
        training(setup, steps=30)
    again = training(setup)
    assert again._loop.counters.step in {6, 7}  # it was saved after each measured part
    lost = again._made.ledger.steps_charged - charged - again._loop.counters.step
    assert lost >= 1
    made = again.run()
    assert made is not None
    # sigma was calibrated for 20 steps, and some of them were lost: the budget ends before
    assert 14 <= made.steps <= 20
    assert made.steps + lost >= 20
    assert made.plan.noise_multiplier == first._plan.noise_multiplier
    assert made.epsilon_spent <= 8
    with pytest.raises(BudgetSpentError):
        training(setup, anew=True)
    assert checkpoint.load_latest(home.own)[0] is not None  # a refusal keeps the model


def test_stopped_own_steps_lose_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    setup = trained(tmp_path, "record")
    first = training(setup, steps=20)
    taken = first._loop.learner.step

    def stopped() -> int:
        if first._loop.counters.step == 4:
            first.stop()
        return taken()

    monkeypatch.setattr(first._loop.learner, "step", stopped)
    assert first.run() is None
    again = training(setup)
    assert again._loop.counters.step >= 5
    assert again._made.mechanism.charged().left == 0
    assert again._made.ledger.steps_charged == STEPS + again._loop.counters.step
    made = again.run()
    assert made is not None
    assert made.steps == 20


def test_without_a_part_kept_back_it_says_how_to_get_a_budget(tmp_path: Path) -> None:
    setup = trained(tmp_path, "record", keep_back=0.0)
    with pytest.raises(BudgetSpentError, match=r"set privacy\.keep_back"):
        training(setup, steps=10)
    assert not (Home(Path(setup.home)).own / "running").exists()


def test_the_steps_that_a_run_has_left(tmp_path: Path) -> None:
    setup = trained(tmp_path, "off")
    saved, _ = checkpoint.load_latest(Home(Path(setup.home)).checkpoints)
    assert saved is not None
    manifest = SignedManifest.load(Path(setup.manifest_path)).open()
    for end, left in (
        (End(steps=STEPS), 0),
        (End(steps=20), 20 - STEPS),
        (End(steps=20, rounds=1), 0),
        (End(seconds=1e6), own._FAR),
        (End(), own._FAR),
    ):
        assert own._to_come(msgspec.structs.replace(manifest, end=end), saved) == left, end


def test_a_copy_of_the_home_without_its_ledger_is_refused(tmp_path: Path) -> None:
    setup = trained(tmp_path, "record")
    ledger = Home(Path(setup.home)).ledger_db
    for path in (ledger, Path(f"{ledger}-wal"), Path(f"{ledger}-shm")):
        path.unlink(missing_ok=True)
    with pytest.raises(LocalError, match="is missing, but a checkpoint was made with"):
        training(setup, steps=10)
