"""A trainer refuses what can't fit before it reads anything, and only at a home's first start."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest

from tests.unit.accounts.ledgers import about_in
from tests.unit.training.homes import make_homes
from xpeer import dry_run
from xpeer.accounts.accountant import Segment
from xpeer.accounts.ledger import Ledger
from xpeer.accounts.register import Register
from xpeer.config import Home
from xpeer.errors import ConfigError
from xpeer.estimate import room
from xpeer.estimate.remembered import NAME
from xpeer.estimate.room import Room
from xpeer.manifest.signed import SignedManifest
from xpeer.trainer import build
from xpeer.trainer.build import assemble
from xpeer.trainer.setup import TrainerSetup


@pytest.fixture
def setup(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TrainerSetup:
    monkeypatch.setattr(room, "host", lambda: Room("memory of this machine", 10**6, 10**6))
    for part in (build, dry_run):  # it would last as long as the process
        monkeypatch.setattr(part, "keep_nothing", lambda: None)
    return make_homes(tmp_path, 1)[0]


def of(setup: TrainerSetup, **changes: Any) -> TrainerSetup:
    training = msgspec.structs.replace(setup.config.training, **changes)
    config = msgspec.structs.replace(setup.config, training=training)
    return msgspec.structs.replace(setup, config=config)


def test_a_first_start_is_refused_before_the_text_is_read(
    setup: TrainerSetup, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "text_if_any", lambda *_: pytest.fail("the text was read"))
    with pytest.raises(ConfigError, match=r"memory of this machine is 1\.00 MB"):
        assemble(setup)


@pytest.mark.parametrize("how", ["it has trained", "warn", "skip"])
def test_others_are_warned_at_most(setup: TrainerSetup, how: str) -> None:
    if how == "it has trained":
        setup = msgspec.structs.replace(setup, has_trained=True)
    else:
        setup = of(setup, check_fit=how)
    made = assemble(setup)
    made.close()
    said = [line for line in made.beginning.warnings if "memory of this machine" in line]
    assert len(said) == (how != "skip")
    assert not (Path(setup.home) / "cache" / NAME).exists(), "nothing had to be rehearsed"


@pytest.mark.parametrize("most", [10**6, 10**12])
def test_freed_memory_is_given_back_where_memory_is_short(
    setup: TrainerSetup, monkeypatch: pytest.MonkeyPatch, most: int
) -> None:
    """Before the model is loaded."""
    done: list[str] = []
    real = build._restore

    def restore(*arguments: Any) -> Any:
        done.append("loaded")
        return real(*arguments)

    monkeypatch.setattr(build, "_restore", restore)
    monkeypatch.setattr(build, "keep_nothing", lambda: done.append("kept nothing"))
    monkeypatch.setattr(room, "host", lambda: Room("memory of this machine", most, most))
    assemble(of(setup, check_fit="warn")).close()
    assert done == (["kept nothing", "loaded"] if most == 10**6 else ["loaded"])


@pytest.mark.parametrize("check_fit", ["refuse", "skip"])
def test_memory_is_short_where_a_trainer_was_killed(
    setup: TrainerSetup, monkeypatch: pytest.MonkeyPatch, check_fit: str
) -> None:
    """Whatever the estimate says. It is said once."""
    most, done = 10**12, list[str]()
    monkeypatch.setattr(room, "host", lambda: Room("memory of this machine", most, most))
    monkeypatch.setattr(build, "keep_nothing", lambda: done.append("kept nothing"))
    made = assemble(msgspec.structs.replace(of(setup, check_fit=check_fit), was_killed=True))
    made.close()
    assert done == ["kept nothing"]
    assert len([note for note in made.beginning.notes if "memory is short" in note]) == 1


def test_a_dry_run_refuses_what_a_start_refuses(
    setup: TrainerSetup, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A home that charged steps has trained, with a checkpoint or without. It computes as a start
    does: memory is given back where it is short.
    """
    home, said = Home(Path(setup.home)), list[str]()
    manifest = SignedManifest.load(home.manifest).open()
    with pytest.raises(ConfigError, match=r"memory of this machine is 1\.00 MB"):
        dry_run._examine_room(home, setup.config, manifest, said.append)
    with Ledger.open(home.ledger_db) as ledger:
        documents = ["0" * 64]
        ledger.declare_documents(Register.open(tmp_path / "r"), documents, about_in("swarm"))
        ledger.charge(Segment(1.0, 0.1, 1))
    monkeypatch.setattr(dry_run, "keep_nothing", lambda: said.append("kept nothing"))
    dry_run._examine_room(home, setup.config, manifest, said.append)
    assert any("memory of this machine" in line for line in said)
    assert said[0] == "kept nothing"


def test_a_start_that_comes_near_is_rehearsed_once(
    setup: TrainerSetup, monkeypatch: pytest.MonkeyPatch
) -> None:
    most = 10**9
    monkeypatch.setattr(room, "host", lambda: Room("memory of this machine", most, most))
    made = assemble(setup)
    made.close()
    assert any("a step needs about" in note for note in made.beginning.notes)
    assert not [line for line in made.beginning.warnings if "memory" in line]
    assert (Path(setup.home) / "cache" / NAME).exists()
