"""What is remembered of partners: lost merges, ledgers that went back, how long exchanges took."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from tests.unit.daemon.fakes import FakeNode
from tests.unit.gossip.rigs import FORM, OTHER, SWARM, Rig
from xpeer.errors import PeerError, Reason
from xpeer.gossip.partners import DEADLINE_MULTIPLE, MIN_DEADLINE_S, Partners
from xpeer.gossip.record import LedgerState
from xpeer.health import Health
from xpeer.network.link import RefusedError
from xpeer.round import Exchanged
from xpeer.wire.messages import Terms
from xpeer_daemon.outcomes import Outcomes
from xpeer_daemon.store import Store


async def test_a_merge_that_the_partner_did_not_make_is_counted_once(rig: Rig):
    await rig.slot()
    theirs = Terms(1.0, 2.0, 1, 0, [1, 99])
    rig.gossip.before_agreement(OTHER, theirs)
    rig.gossip.before_agreement(OTHER, theirs)
    assert rig.partners.one_sided == 1


def test_a_ledger_that_goes_back_is_refused_across_restarts(rig: Rig):
    rig.partners[OTHER].ledger.highest = 5
    rig.gossip.before_agreement(OTHER, Terms(1.0, 2.0, 1, 6))
    with pytest.raises(PeerError, match=Reason.LEDGER_WENT_BACK):
        rig.gossip.before_agreement(OTHER, Terms(1.0, 2.0, 1, 5))
    assert rig.partners[OTHER].ledger.highest == 6


def test_a_ledger_that_goes_back_is_told_once_and_remembered(
    rig: Rig, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    def met(partners: Partners, counter: int) -> None:
        partners.reconcile(OTHER, Terms(1.0, 2.0, 1, counter))

    def restarted() -> tuple[Store, Partners]:
        """As the service does it."""
        store = Store.open(tmp_path / "state.sqlite")

        nothing: Any = None
        outcomes = Outcomes(SWARM, nothing, Health(lambda: now_s), store, nothing)
        book = Partners(lambda: now_s, outcomes)
        known = [(peer.peer_id, peer.ledger_counter) for peer in store.known_peers()]
        book.restore(known, store.went_back(), store.caught_up())
        return store, book

    now_s = 1e6
    store, book = restarted()
    met(book, 20)
    assert book[OTHER].ledger.detail == ""
    for lower in (7, 8, 9):  # the restored peer goes on
        with pytest.raises(PeerError, match=Reason.LEDGER_WENT_BACK):
            met(book, lower)
    assert book[OTHER].ledger.detail == "9 charges now, 20 before"
    assert len(store.events()) == 1
    assert sum("went back" in message for message in caplog.messages) == 1
    store.close()
    store, book = restarted()
    assert (book[OTHER].ledger.highest, book[OTHER].ledger.detail) == (
        20,
        "7 charges now, 20 before",
    )
    with pytest.raises(PeerError, match=Reason.LEDGER_WENT_BACK):
        met(book, 19)
    assert len(store.events()) == 1
    assert book[OTHER].ledger.state is LedgerState.WENT_BACK
    met(book, 20)  # it has caught up, and what it did is still told
    assert book[OTHER].ledger.state is LedgerState.CAUGHT_UP
    met(book, 30)
    assert book[OTHER].ledger.detail
    for counter in range(30, 60):  # it makes a game of it
        met(book, counter)
        with pytest.raises(PeerError, match=Reason.LEDGER_WENT_BACK):
            met(book, counter - 1)
    assert book[OTHER].ledger.detail == "58 charges now, 59 before"
    assert [event.kind for event in store.events()] == ["ledger-caught-up", "ledger-went-back"]
    now_s += 3600
    with pytest.raises(PeerError, match=Reason.LEDGER_WENT_BACK):
        met(book, 58)
    assert len(store.events()) == 3
    met(book, 59)
    assert len(store.events()) == 4
    store.close()
    store, book = restarted()
    assert (book[OTHER].ledger.detail, book[OTHER].ledger.state) == (
        "58 charges now, 59 before",
        LedgerState.CAUGHT_UP,
    )
    store.close()


def test_a_partners_deadline_follows_from_what_it_took(rig: Rig):
    book = rig.partners
    assert book.deadline_s(OTHER, 60.0) == 60.0
    agreement: Any = SimpleNamespace(peer_id=OTHER, slot=1, fragment=0, exchange_id=1, form=FORM)
    book.done(agreement, Exchanged(0.1), 4.0)
    assert book.deadline_s(OTHER, 60.0) == DEADLINE_MULTIPLE * 4.0
    assert book.deadline_s(OTHER, 3.0) == 3.0
    for _ in range(40):
        book.done(agreement, Exchanged(0.1), 0.1)
    assert book.deadline_s(OTHER, 60.0) == MIN_DEADLINE_S


def test_who_refuses_our_ledger_is_told_until_it_meets_us_again(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
):
    fake, live = FakeNode(), [OTHER]
    node, parts = fake.node, cast(Any, fake.node.member)
    monkeypatch.setattr(fake.view, "partners", lambda: live)
    parts.partners = rig.partners
    rig.partners.failed(OTHER, 1, PeerError(Reason.LEDGER_WENT_BACK, "ours of it"))
    assert rig.partners.refusing_our_ledger() == []
    rig.partners.failed(OTHER, 1, RefusedError(Reason.LEDGER_WENT_BACK, ""))
    rig.partners.failed(OTHER, 2, RefusedError(Reason.BUSY, ""))
    (reason,) = [each for each in node.reasons() if each.code == "ledger-behind"]
    assert OTHER[-8:] in reason.text
    live.clear()  # it left
    assert not any(each.code == "ledger-behind" for each in node.reasons())
    live.append(OTHER)
    assert any(each.code == "ledger-behind" for each in node.reasons())
    agreement: Any = SimpleNamespace(peer_id=OTHER, slot=3, fragment=0, exchange_id=1, form=FORM)
    rig.partners.done(agreement, Exchanged(0.1), 1.0)
    assert not any(each.code == "ledger-behind" for each in node.reasons())
