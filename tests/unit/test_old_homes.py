"""Homes that two old versions wrote: today's reads in them what those read, to the byte.

That their daemons start is in `tests/swarm/test_old_homes.py`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.cases.homes import assembled
from tests.fixtures.homes import REMOVED, STARTED, OldHome, moved
from tests.in_memory import load_documents
from tests.unit.cli.test_init import xpeer
from xpeer.accounts.register import Register
from xpeer.errors import ConfigError, ExitCode
from xpeer.manifest.signed import SignedManifest
from xpeer.training import checkpoint, frozen
from xpeer.training.flat import digest, read_flat
from xpeer.training.model import from_folder


@pytest.fixture
def old(request: pytest.FixtureRequest, tmp_path: Path, register_of_the_test: Path) -> OldHome:
    return moved(request.param, tmp_path, register_of_the_test)


started = pytest.mark.parametrize("old", STARTED, indirect=True)
charged = pytest.mark.parametrize("old", [*STARTED, "3a5a91e/update"], indirect=True)
removed = pytest.mark.parametrize("old", REMOVED, indirect=True)


def said(*arguments: str, of: OldHome) -> Any:
    """What a command prints as JSON."""
    code, out, err = xpeer(*arguments, "--home", str(of.home.path), "--json")
    assert code == ExitCode.OK, err
    return json.loads(out)


@started
def test_a_checkpoint_holds_the_same_bytes(old: OldHome) -> None:
    bundle, warnings = checkpoint.load_latest(old.home.checkpoints)
    assert bundle is not None
    assert not warnings
    assert {
        "step": bundle.step,
        "optimiser_step": bundle.optimiser_step,
        "flat": digest(bundle.flat),
        "exp_avg": digest(bundle.exp_avg),
        "exp_avg_sq": digest(bundle.exp_avg_sq),
        "consolidated": digest(bundle.consolidated()),
    } == old.expected["checkpoint"]
    assert bundle.consolidation is not None  # so it was not compared with the parameters again
    assert [each["problem"] for each in said("checkpoint", "verify", of=old)] == [""]


@started
def test_a_trainer_goes_on_from_the_same_bytes(old: OldHome) -> None:
    was, account = old.expected["checkpoint"], old.expected["account"]
    node = assembled(old.home.path)
    trainer, trained = node.trainer, list(node.trainer.parameters.parameters())
    flat = trainer.parameters.read()
    first, second, step = checkpoint.read_moments(
        trainer.learner.optimiser, trained, (flat.clone(), flat.clone())
    )  # fmt: skip
    found = {
        "step": trainer.counters.step, "optimiser_step": step, "flat": digest(flat),
        "exp_avg": digest(first), "exp_avg_sq": digest(second),
    }  # fmt: skip
    assert found == {key: was[key] for key in found}
    assert not node.beginning.warnings
    assert node.ledger_counter() == old.expected["counter"]
    spent = node.spent()
    assert spent.steps_charged == account["steps_charged"]
    assert spent.steps_forfeited == account["steps_charged"] - was["step"]
    trainer.run(1)
    after = node.spent()
    node.close()
    assert trainer.counters.step == was["step"] + 1
    assert node.ledger_counter() > old.expected["counter"]
    assert after.steps_charged > account["steps_charged"]
    assert after.epsilon_spent > account["epsilon_spent"]


@charged
def test_a_ledger_and_the_register_say_what_they_said(old: OldHome) -> None:
    account = said("privacy", "status", of=old)
    del account["ends_unix_s"]
    assert account.pop("own_segments") == []  # since `xpeer finetune` exists
    assert account.pop("epsilon_kept_back") == 0
    assert approximately(account) == old.account
    verdict = said("privacy", "verify", of=old)
    assert verdict["problems"] == []
    assert approximately(verdict) == old.expected["verdict"]
    report = said("privacy", "report", of=old)
    assert len(report["charges"]) == old.expected["counter"]
    files = {
        Path(each["path"]).name: [each["documents"], each["epsilon"]]
        for each in said("privacy", "documents", of=old)
    }
    assert approximately(files) == old.expected["files"]


@started
def test_a_start_would_be_all_right(old: OldHome) -> None:
    code, _, err = xpeer("start", "--dry-run", "--skip-trial", "--home", str(old.home.path))
    assert code == ExitCode.OK, err
    assert "all is well" in err
    _, out, _ = xpeer("id", "--home", str(old.home.path))
    assert out.strip() == old.expected["peer_id"]
    assert SignedManifest.load(old.home.manifest).open(old.expected["swarm_id"])


@charged
def test_the_history_is_all_there(old: OldHome) -> None:
    exchanges = said("events", "--exchanges", of=old)["exchanges"]
    assert len(exchanges) == old.expected["exchanges"] > 0
    (invite,) = said("invite", "list", of=old)
    assert {row["partner"] for row in exchanges} == {invite["subject"]}


@started
def test_an_export_is_of_the_same_parameters(old: OldHome, tmp_path: Path) -> None:
    folder = tmp_path / "export"
    code, _, err = xpeer(
        "checkpoint", "export", "--home", str(old.home.path), "--hf", str(folder)
    )  # fmt: skip
    assert code == ExitCode.OK, err
    model = from_folder(folder)
    frozen.freeze(model, SignedManifest.load(old.home.manifest).open().model.frozen)
    assert digest(read_flat(model)) == old.expected["checkpoint"]["consolidated"]


@removed
@pytest.mark.parametrize("options", [(), ("--dry-run",)])
def test_what_was_removed_is_not_started(old: OldHome, options: tuple[str, ...]) -> None:
    code, _, err = xpeer("start", "--home", str(old.home.path), *options)
    assert code == 8 == int(ExitCode.BAD_CONFIG)
    field = {"old-update": "privacy.mode = update", "old-modulo": "round.codec = int8-modulo"}
    assert field[json.loads(SignedManifest.load(old.home.manifest).body)["name"]] in err
    assert "run this swarm with xpeer 0.1.0 as of 2026-11-29 or earlier" in err


@pytest.mark.parametrize("old", ["3a5a91e/update"], indirect=True)
def test_what_mode_update_charged_still_counts_for_the_documents(
    old: OldHome, register_of_the_test: Path
) -> None:
    documents = [each.id for each in load_documents([str(old.text)])]
    with (
        Register.open(register_of_the_test) as register,
        pytest.raises(ConfigError, match="charged for privacy of each shard"),
    ):
        register.declare("another", {}, documents, unit="record of 64 byte tokens")


def approximately(tree: Any) -> Any:
    """With floats that another version's sums of them may equal: to nine digits."""
    if isinstance(tree, dict):
        return {key: approximately(value) for key, value in tree.items()}
    if isinstance(tree, list):
        return [approximately(value) for value in tree]
    return pytest.approx(tree, rel=1e-9) if isinstance(tree, float) else tree
