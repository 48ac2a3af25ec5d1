"""Real trainers and the machine's register: other homes, edited shards, older checkpoints."""

from __future__ import annotations

import shutil
from pathlib import Path

import msgspec
import pytest

from tests.unit.training.homes import make_homes
from xpeer.config import Data, Home
from xpeer.errors import ConfigError
from xpeer.trainer.assembled import Assembled
from xpeer.trainer.build import assemble
from xpeer.trainer.setup import TrainerSetup

FEW = (
    "privacy.noise_multiplier=2",
    "privacy.epsilon=8",
    "optimiser.batch_records=2",
    "optimiser.sequence_tokens=64",
)


def with_shard(setup: TrainerSetup, shard: Path) -> TrainerSetup:
    config = msgspec.structs.replace(setup.config, data=Data(shard=[str(shard)]))
    return msgspec.structs.replace(setup, config=config)


def trained(setup: TrainerSetup, steps: int) -> Assembled:
    node = assemble(setup)
    node.trainer.run(steps=steps)
    return node


def test_the_same_text_in_another_home_or_swarm_goes_on(tmp_path: Path) -> None:
    (tmp_path / "1").mkdir()
    (tmp_path / "2").mkdir()
    first, _ = make_homes(tmp_path / "1", 2, privacy="record", changes=FEW)
    (other,) = make_homes(
        tmp_path / "2", 1, privacy="record", changes=(*FEW, "optimiser.learning_rate=0.002")
    )
    assert first.swarm_id != other.swarm_id
    register = first.config.privacy
    other = msgspec.structs.replace(
        other, config=msgspec.structs.replace(other.config, privacy=register)
    )
    node = trained(first, 8)
    spent = node.spent()
    node.close()
    assert spent.epsilon_spent > 0
    # another swarm, another home, some of the documents gone and one added
    shard = Path(other.config.data.shard[0])
    for name in ("0", "1"):
        (shard / f"{name}.txt").unlink()
    (shard / "new.txt").write_text("entirely different words, many times over. " * 20)
    again = trained(other, 0)
    goes_on = again.spent()
    assert goes_on.epsilon_spent >= spent.epsilon_spent
    assert goes_on.steps_left is not None
    assert any("other homes of this machine" in note for note in again.beginning.notes)
    again.close()
    # elsewhere on the machine: another register, a whole budget
    config = msgspec.structs.replace(
        other.config, privacy=msgspec.structs.replace(register, register=str(tmp_path / "else"))
    )
    whole = trained(msgspec.structs.replace(other, config=config), 0)
    fresh = whole.spent()
    whole.close()
    assert fresh.epsilon_spent == 0.0
    assert fresh.steps_left is not None
    assert fresh.steps_left > goes_on.steps_left


def test_two_homes_at_once_count_together(tmp_path: Path) -> None:
    setups = make_homes(tmp_path, 2, privacy="record", changes=FEW)
    setups[1] = with_shard(setups[1], Path(setups[0].config.data.shard[0]))
    nodes = [assemble(setup) for setup in setups]
    before = nodes[0].spent().steps_left
    for _ in range(3):
        for node in nodes:
            node.trainer.run(steps=4)
    charged = [node.ledger.steps_charged for node in nodes]
    for node in nodes:
        node.mechanism.close()
    together = [sum(s.steps for s in node.ledger.histories()[0]) for node in nodes]
    assert together[0] == together[1] == sum(node.ledger.steps_charged for node in nodes)
    assert min(charged) >= 12
    spent = [node.spent() for node in nodes]
    assert spent[0].epsilon_spent == spent[1].epsilon_spent
    assert before is not None
    for node in nodes:
        node.ledger.close()


def test_an_older_checkpoint_or_none_refunds_nothing(tmp_path: Path) -> None:
    (setup,) = make_homes(tmp_path, 1, privacy="record", changes=FEW)
    node = trained(setup, 4)
    node.checkpoints.copy()()
    spent = [node.spent()]
    node.close()
    kept, saved = tmp_path / "older", Home(Path(setup.home)).checkpoints
    shutil.copytree(saved, kept)
    node = trained(setup, 8)
    node.checkpoints.copy()()
    spent.append(node.spent())
    node.close()
    for how in ("older", "none"):
        shutil.rmtree(saved)
        if how == "older":
            shutil.copytree(kept, saved)
        node = trained(setup, 0)
        spent.append(node.spent())
        node.close()
    epsilons = [each.epsilon_spent for each in spent]
    assert epsilons == sorted(epsilons)
    assert epsilons[1] > epsilons[0]
    assert spent[-1].steps_charged >= 12


def test_a_ledger_from_before_the_register_goes_on(tmp_path: Path) -> None:
    (setup,) = make_homes(tmp_path, 1, privacy="record", changes=FEW)
    node = trained(setup, 4)
    spent = node.spent()
    node.close()
    shutil.rmtree(setup.config.privacy.register)
    node = trained(setup, 0)
    assert node.spent().epsilon_spent >= spent.epsilon_spent
    assert any("lacked" in note for note in node.beginning.warnings)
    node.close()


def test_documents_charged_as_records_are_not_charged_as_documents(tmp_path: Path) -> None:
    (tmp_path / "1").mkdir()
    (tmp_path / "2").mkdir()
    (first,) = make_homes(tmp_path / "1", 1, privacy="record", changes=FEW)
    (other,) = make_homes(
        tmp_path / "2", 1, privacy="record", changes=(*FEW, "privacy.unit=document")
    )
    trained(first, 4).close()
    config = msgspec.structs.replace(other.config, privacy=first.config.privacy)
    with pytest.raises(ConfigError, match="don't add up"):
        assemble(msgspec.structs.replace(other, config=config))
