"""Faults of the disk, of the home's files and of the certificate are named until they are over."""

from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from msgspec import structs

from tests.unit.daemon.fakes import ME, FakeNode
from xpeer.config import Home
from xpeer.health import Health
from xpeer.manifest.signed import Genesis
from xpeer.network.membership.certificates import Certificate
from xpeer_daemon import logs, watch
from xpeer_daemon.store import Store

DAY_S = 86_400


@pytest.mark.parametrize(
    ("lifetime_days", "notice_days"),
    [(365, 36.5), (30, 7), (10, 5), (3650, 365)],
)
def test_a_membership_that_ends_is_told_in_time(
    fake: FakeNode, lifetime_days: int, notice_days: float
) -> None:
    began_s = int(fake.clock.now)
    ends_s = began_s + lifetime_days * DAY_S
    founder = Genesis(b"k" * 32, b"h" * 32)
    fake.node.certificate = Certificate(founder, ME, "member", 1, began_s, began_s, ends_s)

    def at(now_s: float) -> list[str]:
        fake.clock.now = fake.record.saved_s = now_s
        fake.works()
        return fake.codes

    assert at(ends_s - notice_days * DAY_S - 1) == []
    assert at(ends_s - notice_days * DAY_S) == ["certificate-expiring"]
    assert at(ends_s - 2 * 3600 - 180) == ["certificate-expiring"]
    assert "expires in 2h 3m, at 19" in fake.text("certificate-expiring")
    assert fake.node.status().health == "degraded"
    assert at(ends_s) == ["certificate-expired"]
    fake.members.clear()  # nobody answers it any more: that is no news
    assert at(ends_s + 3700) == ["certificate-expired"]
    assert "expired 1h 1m ago, at " in fake.text("certificate-expired")
    (reason,) = fake.node.reasons()
    assert "`xpeer invite create --for PEERID`" in reason.remedy
    assert "`xpeer start --join TOKEN`" in reason.remedy
    assert fake.node.status().health == "down"
    fake.node.certificate = structs.replace(fake.node.certificate, not_after_unix_s=ends_s * 2)
    assert not {"certificate-expired", "certificate-expiring"} & set(fake.codes)


def test_a_disk_that_is_nearly_full(fake: FakeNode) -> None:
    watch.look_at_disk(fake.node, 1_000_000)
    assert "1 MB free" in fake.text("disk-nearly-full")
    for free in (10**12, None):  # None: nobody can say
        watch.look_at_disk(fake.node, free)
        assert fake.codes == []
    assert watch.free_bytes(Path("/nonexistent/folder")) is None


def test_a_state_file_that_cannot_be_written(tmp_path: Path) -> None:
    health = Health(lambda: 0.0)
    store = Store.open(tmp_path / "state.sqlite", health=health)
    store._database.execute("PRAGMA query_only = ON")
    store.add_event("x")
    store.add_event("y")
    (reason,) = health.reasons()
    assert reason.code == "state-file-failing"
    assert "(2 tried): attempt to write a readonly database" in reason.text
    store._database.execute("PRAGMA query_only = OFF")
    store.add_event("z")
    assert health.reasons() == []
    store.close()


def test_a_log_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    health = Health(lambda: 0.0)
    logs.setup(Home(tmp_path), "info", "text")
    try:
        logs.watch(health)
        (file,) = [h for h in logging.getLogger().handlers if isinstance(h, logs._File)]

        def full(text: str) -> int:
            raise OSError(28, "No space left on device")

        stream = file.stream
        file.stream = cast(Any, SimpleNamespace(
            write=full, flush=lambda: None, close=lambda: None, seek=lambda *_: 0, tell=lambda: 0
        ))  # fmt: skip
        logging.getLogger("xpeer").error("a")
        (reason,) = health.reasons()
        assert reason.code == "log-failing"
        assert "(1 lines lost): [Errno 28] No space left" in reason.text
        file.stream = stream
        logging.getLogger("xpeer").error("b")
        assert health.reasons() == []
    finally:
        logs.close()
    assert "error xpeer: b" in (tmp_path / "daemon.log").read_text()
