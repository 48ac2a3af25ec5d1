"""Nodes of two old versions, started by today's: they go on where those ended."""

from __future__ import annotations

import json
import os
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from tests.cases.homes import call
from tests.cases.support import Nodes, running_nodes
from tests.fixtures.homes import HERE, STARTED, moved
from xpeer.training import checkpoint


@pytest.fixture
def nodes(tmp_path: Path) -> Iterator[Nodes]:
    with running_nodes(tmp_path) as running:
        yield running


def charges(ledger: Path) -> list[tuple[object, ...]]:
    """Rows of a ledger that nobody has open."""
    with closing(sqlite3.connect(f"{ledger.as_uri()}?mode=ro&immutable=1", uri=True)) as database:
        return database.execute("SELECT * FROM charges ORDER BY counter").fetchall()


@pytest.mark.parametrize("name", STARTED)
def test_a_node_goes_on_from_what_an_old_version_left(
    name: str, tmp_path: Path, nodes: Nodes
) -> None:
    old = moved(name, tmp_path, Path(os.environ["XPEER_PRIVACY_REGISTER"]))
    was, account = old.expected["checkpoint"], old.expected["account"]
    nodes.start("home")
    nodes.until(
        "home",
        lambda status: (
            status.progress.step > was["step"] + 5
            and status.privacy.steps_charged > account["steps_charged"] + 5
        ),
    )
    status = nodes.status_json("home")
    assert status["peer_id"] == old.expected["peer_id"]
    assert status["swarm_id"] == old.expected["swarm_id"]
    spent = status["privacy"]
    assert spent["steps_charged"] > account["steps_charged"] + 5
    assert spent["steps_forfeited"] == account["steps_charged"] - was["step"]
    assert spent["epsilon_spent"] > account["epsilon_spent"]
    assert nodes.stop("home") == 0
    assert f"resumed at step {was['step']}" in nodes.log("home")

    bundle, warnings = checkpoint.load_latest(old.home.checkpoints)
    assert bundle is not None
    assert not warnings
    assert bundle.step > was["step"] + 5
    rows = charges(old.home.ledger_db)
    assert rows[: old.expected["counter"]] == charges(HERE / name / "home" / "ledger.sqlite")
    assert len(rows) > old.expected["counter"]
    now = json.loads(call("privacy", "status", "--home", old.home.path, "--json").stdout)
    assert now["ledger_id"] == account["ledger_id"]
    assert [each["documents"] for each in now["documents"]] == [40]
    verified = call("privacy", "verify", "--home", old.home.path, "--json")
    assert verified.exit_code == 0, verified.stderr
    found = json.loads(verified.stdout)
    assert found["steps_registered"] == now["steps_charged"] > account["steps_charged"]
