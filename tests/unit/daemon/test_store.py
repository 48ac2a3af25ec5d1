"""What the node remembers, and that no damage to it ever stops the node."""

from __future__ import annotations

import logging
import sqlite3
from pathlib import Path

import pytest

from xpeer.errors import ConfigError
from xpeer.health import Health
from xpeer_daemon import store as module
from xpeer_daemon.store import KnownPeer, RoundRow, Store


class Clock:
    """Seconds that pass when told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        self.now += 1
        return self.now


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "state.sqlite"


def test_everything_survives_a_restart(path: Path) -> None:
    store = Store.open(path, Clock())
    store.add_round(RoundRow(slot=7, partner="b", fragment=2, distance=0.5, seconds=1.5))
    store.add_round(RoundRow(slot=8, reason="no-partner", detail="alone"))
    store.add_event("joined", "through a seed")
    store.remember_peer("b", ["/ip4/192.0.2.1/tcp/1"], 5)
    store.close()
    store = Store.open(path, Clock())
    assert store.rounds() == [
        RoundRow(slot=8, reason="no-partner", detail="alone", unix_s=1002.0),
        RoundRow(slot=7, partner="b", fragment=2, distance=0.5, seconds=1.5, unix_s=1001.0),
    ]
    assert [(e.kind, e.detail) for e in store.events()] == [("joined", "through a seed")]
    assert store.known_peers() == [
        KnownPeer(
            peer_id="b", addresses=["/ip4/192.0.2.1/tcp/1"], seen_unix_s=1004.0, ledger_counter=5
        )
    ]
    store.close()


def test_writes_are_on_the_disk_before_they_return(path: Path) -> None:
    store = Store.open(path)
    assert store._database.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    assert store._database.execute("PRAGMA synchronous").fetchone() == (2,)  # FULL
    store.close()


def test_counters_never_go_back_and_addresses_stay(path: Path) -> None:
    store = Store.open(path, Clock())
    store.remember_peer("b", ["/old"], 5)
    store.remember_peer("b", [], 3)
    store.remember_peer("c", ["/c"])
    assert [(p.peer_id, p.addresses, p.ledger_counter) for p in store.known_peers()] == [
        ("c", ["/c"], 0),
        ("b", ["/old"], 5),
    ]
    store.remember_peer("b", ["/new"], 6)
    assert store.known_peers(limit=1)[0].addresses == ["/new"]
    store.close()


@pytest.mark.parametrize("damage", ["garbage", "page", "other-tables", "newer"])
def test_damage_is_moved_aside(path: Path, damage: str, caplog: pytest.LogCaptureFixture) -> None:
    store = Store.open(path)
    for slot in range(200):
        store.add_round(RoundRow(slot=slot, detail="x" * 100))
    store.close()
    if damage == "garbage":
        path.write_bytes(b"not a database at all" * 100)
    elif damage == "page":
        data = bytearray(path.read_bytes())
        data[4096:] = b"\xff" * (len(data) - 4096)
        path.write_bytes(data)
    elif damage == "other-tables":
        path.unlink()
        with sqlite3.connect(path) as database:
            database.execute("PRAGMA journal_mode=WAL")
            database.execute("CREATE TABLE rounds (x)")
        database.close()
    else:
        with sqlite3.connect(path) as database:
            database.execute("PRAGMA user_version=99")
        database.close()
    content = path.read_bytes()
    with caplog.at_level(logging.WARNING):
        store = Store.open(path, lambda: 1234.0)
    assert store.rounds() == []
    store.add_round(RoundRow(slot=1))
    assert len(store.rounds()) == 1
    store.close()
    assert path.with_name("state.sqlite.damaged-1234").read_bytes() == content
    assert "moved to state.sqlite.damaged-1234" in caplog.text


def test_a_truncated_file_starts(path: Path) -> None:
    store = Store.open(path)
    store.add_event("x")
    store.close()
    size = path.stat().st_size
    for length in range(0, size, 1000):
        path.write_bytes(path.read_bytes()[:length])
        store = Store.open(path)
        store.add_event("y")
        assert [event.kind for event in store.events(1)] == ["y"]
        store.close()


def test_a_folder_that_can_not_be_written_is_the_operators(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="can't be opened"):
        Store.open(tmp_path / "no" / "state.sqlite")
    (tmp_path / "state.sqlite").mkdir()
    with pytest.raises(ConfigError, match="is no file"):
        Store.open(tmp_path / "state.sqlite")
    assert (tmp_path / "state.sqlite").is_dir()


def test_a_full_disk_costs_history_only(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    health = Health(Clock())
    store = Store.open(path, health=health)
    pages = store._database.execute("PRAGMA page_count").fetchone()[0]
    store._database.execute(f"PRAGMA max_page_count={pages}")
    for _ in range(3):
        store.add_event("x", "y" * 100_000)
    assert health.count("state-file-failing") == 3
    assert caplog.text.count("history can't be written") == 1
    assert store.events() == []
    store.close()


def test_history_is_bounded(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PRUNE_EVERY", 10)
    monkeypatch.setattr(module, "MAX_ROUNDS", 5)
    monkeypatch.setattr(module, "MAX_EVENTS", 3)
    monkeypatch.setattr(module, "MAX_PEERS", 2)
    store = Store.open(path, Clock())
    for number in range(10):
        store.add_round(RoundRow(slot=number))
        store.add_event("e", str(number))
        store.remember_peer(str(number), ["/a"])
    assert [row.slot for row in store.rounds()] == [9, 8, 7, 6, 5]
    assert [row.detail for row in store.events()] == ["9", "8", "7"]
    assert [peer.peer_id for peer in store.known_peers()] == ["9", "8"]
    store.close()
