"""Every fault that a node can have is named, from its first moment and until it is over."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from msgspec import structs

from tests.unit.daemon.fakes import ALPHA, BETA, GAMMA, ME, FakeNode, member
from xpeer.config import Checkpoint, Home, NodeConfig, Training
from xpeer.errors import LocalError, TrainerError
from xpeer.health import Health
from xpeer.identity import PeerId
from xpeer.manifest.signed import Genesis
from xpeer.network.membership.certificates import Certificate
from xpeer.status import Progress
from xpeer.trainer.answers import Losses
from xpeer_daemon import logs, watch
from xpeer_daemon.missed import BACK_S, FORGOTTEN_S, Missed
from xpeer_daemon.presence import Presence
from xpeer_daemon.store import Store


@pytest.fixture
def fake() -> FakeNode:
    return FakeNode(ALPHA, BETA, GAMMA)


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


def test_a_trainer_that_dies_is_named_until_its_steps_are_taken_again(fake: FakeNode) -> None:
    fake.works(339)
    fake.supervisor.trainer, fake.supervisor.down_reason = None, "trainer exited with -9"
    fake.passes(3, working=False)
    status = fake.node.status()
    assert (status.health, status.trainer_runs, status.progress.step) == ("down", False, 340)
    assert fake.text("trainer-down") == "no trainer for 2s: trainer exited with -9"
    fake.supervisor.trainer, fake.supervisor.down_reason = fake.trainer, ""
    fake.step = 100
    fake.works()
    assert fake.codes == ["steps-lost"]
    assert "was at step 340, ended without a checkpoint, and is at step 101" in fake.text(
        "steps-lost"
    )
    fake.works(239)
    assert fake.codes == []


def test_a_trainer_that_stands_still(fake: FakeNode) -> None:
    fake.passes(100)
    fake.record.saved_s = fake.clock()
    for _ in range(119):
        fake.clock.now += 1
        fake.partners.last_done_s = fake.clock()
        assert fake.codes == []
    fake.clock.now += 2
    assert "no-step" in fake.codes
    fake.works()
    assert fake.codes == []


def test_slow_steps_are_not_taken_for_none(fake: FakeNode) -> None:
    for _ in range(10):
        fake.clock.now += 200
        fake.record.saved_s = fake.clock()
        fake.works()
    fake.clock.now += 1900
    fake.partners.last_done_s = fake.record.saved_s = fake.clock()
    assert fake.codes == []
    fake.clock.now += 200
    assert "no-step" in fake.codes


def test_checkpoints_that_do_not_come() -> None:
    fake = FakeNode(ALPHA, config=NodeConfig(checkpoint=Checkpoint(every_s=10)))
    fake.passes(149)
    assert fake.codes == []
    fake.passes(2)
    assert fake.codes == ["checkpoint-late"]
    fake.record.saved_s = fake.clock()
    assert fake.codes == []


async def test_a_checkpoint_that_cannot_be_written(
    fake: FakeNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def full() -> str:
        raise LocalError("checkpoint: No space left on device", "free some")

    async def fine() -> str:
        return "/checkpoints/1"

    monkeypatch.setattr(fake.trainer, "checkpoint", full)
    with pytest.raises(LocalError):
        await fake.node.checkpoint()
    fake.passes(65)
    told = fake.text("checkpoint-failing")
    assert "for 1m 5s (1 tried): checkpoint: No space left on device - free some" in told
    assert fake.node.status().health == "degraded"
    monkeypatch.setattr(fake.trainer, "checkpoint", fine)
    await fake.node.checkpoint()
    assert fake.codes == []


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


def losses(fake: FakeNode, **fields: Any) -> None:
    """The trainer took a step, and says this of its losses."""
    fake.step += 1
    fake.node.follow_trainer("training", Progress(step=fake.step, tokens=1, **fields))


def test_losses_that_cannot_be_measured(fake: FakeNode) -> None:
    losses(fake, loss_problem="CUDA out of memory")
    fake.node.reasons()
    for _ in range(65):
        fake.clock.now += 1
        fake.partners.last_done_s = fake.clock()
        losses(fake, loss_problem="CUDA out of memory")
        fake.node.reasons()
    told = fake.text("evaluation-failing")
    assert told.endswith("can't be measured for 1m 5s: CUDA out of memory")
    assert fake.node.status().health == "degraded"
    losses(fake)
    assert fake.codes == []


async def test_losses_of_the_end_that_cannot_be_measured(
    fake: FakeNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fails() -> Losses:
        raise TrainerError("the trainer failed: OutOfMemoryError", "see the log")

    async def works() -> Losses:
        return Losses(2.0, None)

    monkeypatch.setattr(fake.trainer, "evaluate", fails)
    for _ in range(3):
        with pytest.raises(TrainerError):
            await fake.record.evaluate(fake.trainer)
        fake.passes(10)
    assert "for 29s: the trainer failed: OutOfMemoryError" in fake.text("evaluation-failing")
    monkeypatch.setattr(fake.trainer, "evaluate", works)
    await fake.record.evaluate(fake.trainer)
    assert fake.codes == []


def test_losses_that_are_old(fake: FakeNode) -> None:
    def at(age_s: float) -> list[str]:
        fake.partners.last_done_s = fake.record.saved_s = fake.clock()
        losses(fake, loss_measured_step=1, loss_measured_age_s=age_s)
        return fake.codes

    fake.clock.now += 7200
    assert at(3599) == []
    assert at(3725) == ["evaluation-late"]
    assert "for 1h 2m: that is done at a window's end" in fake.text("evaluation-late")
    assert fake.node.status().health == "ok"
    assert at(2) == []
    fake.is_in("paused")
    assert "evaluation-late" not in at(9999)


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


async def test_a_card_that_no_node_of_the_dht_takes(fake: FakeNode) -> None:
    async def announce(_record: object) -> bool:
        return False

    roster: Any = SimpleNamespace(announce=announce, unstored=True)
    nothing: Any = None
    presence = Presence(fake.node, fake.view, roster, fake.partners, nothing, 1.0)
    await presence.announce("training")
    fake.passes(59)
    assert fake.codes == []
    fake.passes(2)
    assert fake.codes == ["card-failing"]
    fake.members.clear()  # alone there is nobody to take it
    await presence.announce("training")
    assert "card-failing" not in fake.codes


async def test_nobody_answers_the_roster(fake: FakeNode, tmp_path: Path) -> None:
    store, asked = Store.open(tmp_path / "state.sqlite"), asyncio.Event()
    roster: Any = SimpleNamespace(silence="AlphaAAA: timeout")

    async def refresh() -> None:
        asked.set()

    roster.refresh = refresh
    presence = Presence(fake.node, fake.view, roster, fake.partners, store, 1.0)
    refreshing = asyncio.create_task(presence.keep_refreshing())
    await asked.wait()
    refreshing.cancel()
    assert fake.codes == []
    fake.passes(31)
    assert fake.codes == ["roster-failing"]
    assert "for 31s: AlphaAAA: timeout" in fake.text("roster-failing")
    store.close()


async def test_members_are_written_to_disk_in_one_go_and_only_when_there_is_news(
    tmp_path: Path,
) -> None:
    """Each write waits for the disk, and holds up all that the daemon does."""
    fake = FakeNode(*(f"12D3KooW{number:08}" for number in range(64)))
    store = Store.open(tmp_path / "state.sqlite", fake.clock)
    commits: list[str] = []
    store._database.set_trace_callback(lambda sql: commits.append(sql) if sql == "COMMIT" else None)

    async def refresh() -> None:
        return

    roster: Any = SimpleNamespace(silence="", refresh=refresh)
    presence = Presence(fake.node, fake.view, roster, fake.partners, store, 1.0)

    async def look() -> int:
        """One more refresh, three seconds later; how many writes it made."""
        commits.clear()
        fake.clock.now += 3
        refreshing = asyncio.create_task(presence.keep_refreshing())
        await asyncio.sleep(0)
        refreshing.cancel()
        return len(commits)

    assert [await look() for _ in range(20)] == [1] + [0] * 19
    assert len(store.known_peers()) == 64
    assert await look() == 1  # a minute later: they are still here
    newest = PeerId("12D3KooWNewcomer")
    fake.members[newest] = member(newest)
    assert await look() == 1
    assert {p.peer_id for p in store.known_peers() if p.seen_unix_s == fake.clock.now} == {newest}
    fake.partners[newest].ledger.highest = 7
    assert await look() == 1
    store.close()


async def test_an_observer_that_went_while_we_were_down_is_not_missed(tmp_path: Path) -> None:
    fake = FakeNode(ALPHA)
    fake.members[PeerId(BETA)] = member(BETA, "observing", role="observer")
    store = Store.open(tmp_path / "state.sqlite", fake.clock)
    roster: Any = SimpleNamespace(silence="")
    Presence(fake.node, fake.view, roster, fake.partners, store, 1.0)._remember()
    missed = Missed()
    known = [(PeerId(p.peer_id), p.seen_unix_s) for p in store.known_peers()]
    assert len(known) == 2  # its address is kept
    missed.restore(known, fake.clock())
    assert missed.known == 1
    store.close()


def test_changes_are_logged_once(caplog: pytest.LogCaptureFixture, fake: FakeNode) -> None:
    caplog.set_level(logging.INFO)
    fake.is_in("paused")
    logged = watch.log_changes({}, fake.node.reasons())
    logged = watch.log_changes(logged, fake.node.reasons())
    assert caplog.text.count("paused by the operator - `xpeer resume`") == 1
    fake.is_in("training")
    watch.log_changes(logged, fake.node.reasons())
    assert "paused is over" in caplog.text
