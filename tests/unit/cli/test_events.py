"""`xpeer events`: the history that the daemon writes."""

from __future__ import annotations

import os
from pathlib import Path

import msgspec
import pytest
from click.testing import CliRunner, Result

from xpeer.cli import main
from xpeer.cli.events import History
from xpeer.config import Home
from xpeer.errors import ExitCode
from xpeer_daemon.store import RoundRow, Store

PEER = "12D3KooWSahP5pFRCEfaziPEba7urXGeif6T1y8jmodzdFUvzBHj"


def told(home: Path, *arguments: str) -> Result:
    return CliRunner(env={"XPEER_HOME": str(home)}).invoke(main, ["events", *arguments])


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """As of a daemon that runs."""
    store = Store.open(Home(tmp_path).state_db, clock=lambda: 1_800_000_000.0)
    store.add_event("trainer-restarted", "epoch 7")
    store.add_event("ledger-went-back", f"{PEER} \x1b[2J 9 now, 12 before")
    store.add_round(RoundRow(slot=7, partner=PEER, fragment=2, distance=0.25, seconds=1.5))
    store.add_round(RoundRow(slot=8, partner=PEER, reason="timeout", detail="no answer"))
    return store


def test_events_in_the_order_in_which_they_happened(tmp_path: Path, store: Store) -> None:
    first, second = told(tmp_path).stdout.splitlines()
    assert first.endswith("  trainer-restarted  epoch 7")
    assert second.endswith(f"  ledger-went-back  {PEER} \\x1b[2J 9 now, 12 before")
    assert told(tmp_path, "-n", "1").stdout.splitlines() == [second]
    store.close()
    assert told(tmp_path).stdout.splitlines() == [first, second]


def test_exchanges_and_why_they_failed(tmp_path: Path, store: Store) -> None:
    first, second = told(tmp_path, "--exchanges").stdout.splitlines()
    assert first.endswith(f"slot 7  {PEER[-8:]}  merged in 1.50 s, distance 0.2500  fragment 2")
    assert second.endswith(f"slot 8  {PEER[-8:]}  timeout: no answer")
    store.close()


def test_as_json(tmp_path: Path, store: Store) -> None:
    answer = msgspec.json.decode(told(tmp_path, "--json").stdout, type=History)
    assert [event.kind for event in answer.events] == ["trainer-restarted", "ledger-went-back"]
    answer = msgspec.json.decode(told(tmp_path, "--json", "--exchanges").stdout, type=History)
    assert [(row.slot, row.seconds, row.reason) for row in answer.exchanges] == [
        (7, 1.5, ""), (8, None, "timeout")
    ]  # fmt: skip
    store.close()


def test_without_a_history_and_with_a_damaged_one(tmp_path: Path) -> None:
    answer = told(tmp_path)
    assert answer.exit_code == ExitCode.NOT_RUNNING
    assert "there is no history" in answer.stderr
    path = Home(tmp_path).state_db
    for content in (b"no database at all" * 100, b"", os.urandom(4096)):
        path.write_bytes(content)
        answer = told(tmp_path)
        assert answer.exit_code == ExitCode.BAD_CONFIG
        assert answer.stderr.startswith("xpeer: error: history ")
    assert path.exists()
