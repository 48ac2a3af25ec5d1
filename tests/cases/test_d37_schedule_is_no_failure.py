"""D37: a lone node, or one that closes, counted slots without a partner as failed exchanges."""

from __future__ import annotations

from typing import Any, cast

import pytest

from tests.unit.daemon.fakes import FakeNode
from tests.unit.gossip.rigs import OTHER, Rig
from xpeer.cli.render import status_lines
from xpeer.errors import PeerError, Reason
from xpeer.gossip.partners import Partners
from xpeer.network.link import RefusedError
from xpeer.status import Status

SCHEDULE = [Reason.NOT_DUE, Reason.BUSY, Reason.PAUSED]


def status_with(partners: Partners) -> Status:
    fake = FakeNode()
    cast(Any, fake.node.member).partners = partners
    return fake.node.status()


async def test_a_lone_node_has_no_failed_exchange(monkeypatch: pytest.MonkeyPatch) -> None:
    rig = Rig(monkeypatch)
    rig.host.live = []
    for _ in range(5):
        await rig.slot()
    status = status_with(rig.partners)
    assert sum(status.exchanges_failed.values()) == 0
    assert any(
        line.startswith("exchanges") and " 0 failed" in line for line in status_lines(status)
    )


@pytest.mark.parametrize("reason", SCHEDULE)
async def test_a_partner_that_is_not_to_meet_us_now_failed_nothing(
    monkeypatch: pytest.MonkeyPatch, reason: str
) -> None:
    rig = Rig(monkeypatch)
    rig.proposer.fails[OTHER] = RefusedError(reason)
    await rig.slot()
    status = status_with(rig.partners)
    assert (status.exchanges_failed, status.exchanges_skipped) == ({}, {reason: 1})
    record = rig.partners[OTHER]
    assert (record.failed, record.skipped, record.last_reason) == (0, 1, reason)
    assert any(f"1 {reason}" in line for line in status_lines(status))


async def test_what_failed_is_still_a_failure_and_the_schedule_hides_no_reason(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rig = Rig(monkeypatch)
    rig.proposer.fails[OTHER] = PeerError(Reason.TIMEOUT)
    await rig.slot()
    rig.partners.count_no_exchange(OTHER, 2, Reason.NOT_DUE)
    status = status_with(rig.partners)
    assert status.exchanges_failed == {Reason.TIMEOUT: 1}
    assert (rig.partners[OTHER].failed, rig.partners[OTHER].last_reason) == (1, Reason.TIMEOUT)
