"""Faults with members, seeds and links are named, from the first moment and until they are over."""

from __future__ import annotations

import logging

import pytest

from tests.unit.daemon.fakes import ALPHA, BETA, GAMMA, FakeNode, member
from xpeer.config import NodeConfig, Training
from xpeer.identity import PeerId
from xpeer.status import Progress
from xpeer_daemon import watch
from xpeer_daemon.missed import BACK_S, FORGOTTEN_S, Missed


def test_a_node_that_works_is_ok(fake: FakeNode) -> None:
    fake.passes(300)
    assert fake.node.status().health == "ok"
    assert fake.codes == []


def test_partners_that_fell_silent_are_missed_until_they_are_back(fake: FakeNode) -> None:
    fake.passes(5)
    beta, gamma = fake.members.pop(PeerId(BETA)), fake.members.pop(PeerId(GAMMA))
    fake.passes(65)
    assert fake.node.status().health == "degraded"
    told = fake.text("partners-lost")
    assert told.startswith("2 of 3 known partners are gone: ")
    assert BETA[-8:] in told
    assert "(for 1m 5s)" in told
    fake.members[PeerId(BETA)] = beta
    assert fake.text("partners-lost").startswith("1 of 3 known partners are gone: GammaCCC")
    fake.members[PeerId(GAMMA)] = gamma
    assert fake.codes == []


@pytest.mark.parametrize("phase", ["left", "finished"])
def test_who_left_or_had_finished_is_not_missed(fake: FakeNode, phase: str) -> None:
    ended: list[str] = []
    fake.view.missed.on_ended = ended.append
    fake.passes(2)
    fake.members[PeerId(BETA)] = member(BETA, phase)
    fake.passes(3)
    del fake.members[PeerId(BETA)]
    fake.passes(3)
    assert fake.codes == []
    assert ended == [BETA]


def test_a_founder_is_missed_and_an_observer_is_not(fake: FakeNode) -> None:
    """A founder's certificate says admin; what we remember of earlier starts says no role."""
    missed = Missed()
    missed.restore([(PeerId(ALPHA), 900.0), (PeerId(BETA), 900.0)], 1000.0)
    roster = {
        PeerId(ALPHA): member(ALPHA, role="admin"),
        PeerId(BETA): member(BETA, "observing", role="observer"),
    }
    missed.update(roster, 1010.0)
    assert missed.known == 1
    missed.update(roster, 1119.0)
    assert missed.lost(1119.0) == {}
    missed.update({PeerId(BETA): roster[PeerId(BETA)]}, 1200.0)
    assert missed.lost(1200.0) == {ALPHA: 1119.0}


def test_who_is_gone_for_a_day_is_forgotten(fake: FakeNode) -> None:
    del fake.members[PeerId(BETA)]
    fake.view.missed.restore([(PeerId(BETA), fake.clock() - 60)], fake.clock())
    fake.passes(BACK_S + 2)  # seen before our own start: it gets a minute to be heard of
    assert fake.codes == ["partners-lost"]
    fake.clock.now += FORGOTTEN_S + BACK_S
    fake.record.saved_s = fake.clock()
    fake.works()
    assert fake.codes == []


def test_nobody_is_left(fake: FakeNode) -> None:
    fake.passes(2)
    fake.members.clear()
    fake.passes(2)
    assert set(fake.codes) == {"no-partner", "partners-lost"}


def test_no_seed_answers_while_training(fake: FakeNode) -> None:
    fake.passes(2)
    fake.bootstrapping.silent_seeds = "/ip4/192.0.2.1/tcp/4001: timeout"
    fake.passes(65)
    assert fake.codes == ["no-seed"]
    assert "for 1m 4s: /ip4/192.0.2.1/tcp/4001: timeout" in fake.text("no-seed")
    fake.bootstrapping.silent_seeds = ""
    assert fake.codes == []


@pytest.mark.parametrize(
    ("ahead_s", "told"),
    [(1.9, ""), (-1.9, ""), (2.5, "2 s ahead of"), (-120.4, "120 s behind"), (3e6, "3000000 s")],
)
def test_a_wrong_clock(fake: FakeNode, ahead_s: float, told: str) -> None:
    fake.bootstrapping.clock_ahead_s = ahead_s
    assert fake.codes == (["clock-off"] if told else [])
    if told:
        assert told in fake.text("clock-off")
        assert "2 members" in fake.text("clock-off")


def test_a_node_that_nobody_can_call(fake: FakeNode) -> None:
    fake.bootstrapping.clocks, fake.bootstrapping.unheard = 3, 2
    assert fake.codes == []
    fake.bootstrapping.unheard = 3
    assert fake.codes == ["not-called-back"]
    assert "none of the 3 peers" in fake.text("not-called-back")
    fake.bootstrapping.clocks = fake.bootstrapping.unheard = 0
    assert fake.codes == []


def test_a_partner_that_never_ends(fake: FakeNode) -> None:
    fake.node.follow_trainer("closing", Progress(step=1000, tokens=1))
    fake.members[PeerId(BETA)] = member(BETA, "closing")
    fake.passes(70, working=False)
    assert "waiting-for-the-end" in fake.codes
    told = fake.text("waiting-for-the-end")
    assert "has waited 1m 10s for AlphaAAA (still training), GammaCCC (still training)" in told
    fake.members = {PeerId(BETA): member(BETA, "closing")}
    assert "waiting-for-the-end" not in fake.codes


def test_waiting_for_peers_counts_as_the_table_of_peers_does() -> None:
    fake = FakeNode(ALPHA, BETA, config=NodeConfig(training=Training(min_peers=2)))
    fake.members = {PeerId(p): member(p, "joining") for p in (ALPHA, BETA)}
    fake.is_in("waiting")
    assert fake.text("waiting-for-peers") == (
        "waiting for training.min_peers = 2: 0 of 2 live members are there (2 joining)"
    )


def test_who_was_admitted_does_not_look_for_seeds_any_more() -> None:
    fake = FakeNode(admitted=False)
    fake.is_in("joining")
    fake.life.note = "joining: no member has answered yet"
    assert fake.text("joining") == "joining: no member has answered yet"
    fake = FakeNode(ALPHA)
    fake.is_in("joining")
    fake.life.note = "the trainer reads the shard and the model"
    assert fake.codes == ["starting"]


def test_exchanges_that_fail(fake: FakeNode) -> None:
    fake.node.health.failed("exchange-failed", "AlphaAAA: timeout")
    fake.node.health.failed("exchange-failed", "BetaBBBB: closed")
    assert fake.node.status().health == "ok"
    assert "2 exchanges in a row failed" in fake.text("exchange-failed")
    assert "BetaBBBB: closed" in fake.text("exchange-failed")
    fake.passes(62)
    fake.partners.last_done_s = fake.clock() - 61
    assert "no-exchange" in fake.codes


def test_time_without_exchanges_counts_from_when_they_were_to_be_expected(fake: FakeNode) -> None:
    """Not from the daemon's start: the node may have waited for members, or have been paused."""
    fake.partners.last_done_s = None
    fake.is_in("waiting")
    fake.clock.now += 7200
    fake.is_in("training")
    assert "no-exchange" not in fake.codes
    fake.partners.last_done_s = fake.clock()
    fake.is_in("paused")
    fake.clock.now += 7200
    fake.is_in("training")
    assert "no-exchange" not in fake.codes
    fake.clock.now += 61
    assert "no-exchange" in fake.codes


def test_who_takes_long_steps_has_exchanges_seldom() -> None:
    fake = FakeNode(ALPHA)  # an exchange is due every two steps
    fake.life.since_s = 0.0
    for _ in range(3):
        fake.clock.now += 90
        fake.works()
    fake.clock.now += 4 * 180
    assert "no-exchange" not in fake.codes
    fake.clock.now += 1
    assert "no-exchange" in fake.codes


def test_a_sidecar_that_is_down(fake: FakeNode) -> None:
    fake.swarm.sidecar_alive = False
    fake.members.clear()
    assert fake.codes == ["sidecar-down"]
    assert fake.node.status().health == "down"


def test_changes_are_logged_once(caplog: pytest.LogCaptureFixture, fake: FakeNode) -> None:
    caplog.set_level(logging.INFO)
    fake.is_in("paused")
    logged = watch.log_changes({}, fake.node.reasons())
    logged = watch.log_changes(logged, fake.node.reasons())
    assert caplog.text.count("paused by the operator - `xpeer resume`") == 1
    fake.is_in("training")
    watch.log_changes(logged, fake.node.reasons())
    assert "paused is over" in caplog.text
