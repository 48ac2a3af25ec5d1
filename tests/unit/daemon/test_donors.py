"""Whose parameters are taken over, when the initial model is, and when a checkpoint is too old."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from xpeer.accounts.ledger import Ledger
from xpeer.config import Home
from xpeer.errors import LocalError, PeerError, Reason
from xpeer.identity import PeerId
from xpeer.manifest import StateForm
from xpeer.network import giving, pieces
from xpeer.network.pieces import Tree, leaves_of, root_of
from xpeer.network.rates import Rates
from xpeer.phase import Phase, traits_of
from xpeer.wire.messages import PIECE_BYTES, TreeOffer
from xpeer_daemon import donors, offers, parameters
from xpeer_daemon.claims import ranked
from xpeer_daemon.donors import Donors
from xpeer_daemon.parameters import Origin, Parameters, begins
from xpeer_daemon.store import Store

GOOD, WORSE, OLD, LIAR, BUSY, TWIN = (
    PeerId(f"12D3KooW{name}") for name in ("Good", "Worse", "Old", "Liar", "Busy", "Twin")
)
VALUES, LINE = 16, 64
OFFERS = {GOOD: (100, 2.0), WORSE: (100, 3.0), OLD: (20, 2.01), LIAR: (101, 0.1)}
TRUE_LOSS = {GOOD: 2.0, WORSE: 3.0, OLD: 2.01, LIAR: 9.0}


class Offer:
    """As a `Giver`: its parameters are the donor's name, over and over."""

    def __init__(self, donor: PeerId) -> None:
        self.donor = donor
        self.step, self.loss_public = OFFERS[donor]
        self.refused = False
        self.payload = memoryview(donor.encode().ljust(LINE) * (4 * VALUES // LINE))
        leaves = leaves_of(self.payload)
        offer = TreeOffer(
            "float32",
            4 * VALUES,
            self.step,
            self.loss_public,
            root_of(leaves),
            donor.encode().ljust(64),
        )
        self.tree = Tree(donor, offer, leaves)

    async def pieces(self, first: int, count: int) -> AsyncGenerator[tuple[int, memoryview]]:
        for piece in range(first, first + count):
            await asyncio.sleep(0)
            yield piece, self.payload[piece * PIECE_BYTES : (piece + 1) * PIECE_BYTES]

    async def close(self) -> None:
        pass

    def refuse(self) -> None:
        self.refused = True


class Trainer:
    """Measures what it is given; `own` is what it has."""

    def __init__(self, resumed_step: int | None = None) -> None:
        self.resumed_step = resumed_step
        self.step = resumed_step or 0
        self.taken: list[PeerId] = []
        self.stopped = False

    async def import_state(self, payload: bytes, step: int, at_most: float, codec: str) -> float:
        first, last = bytes(payload[:LINE]), bytes(payload[-LINE:])
        if first != last:
            raise PeerError(Reason.REFUSED, "a mixture that is bad")
        donor = PeerId(first.decode().strip())
        if TRUE_LOSS[donor] > at_most:
            raise PeerError(Reason.REFUSED, "worse than it says")
        self.taken.append(donor)
        self.step = step
        return TRUE_LOSS[donor]

    async def stop(self, timeout_s: float) -> int:
        self.stopped = True
        return 0


class Rig:
    def __init__(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, founds: bool) -> None:
        self.store = Store.open(tmp_path / "state.sqlite")
        self.live: list[PeerId] = []
        self.phase = "training"
        self.states: list[Phase] = []
        self.saved = 0
        self.roles: dict[PeerId, str] = {}
        self.heard: dict[PeerId, int | None] = {}
        self.last_saved: tuple[int, float] | None = None
        self.life = SimpleNamespace(
            enter=self.states.append, note="", catching_up=False, fetching=None
        )
        self.node = SimpleNamespace(
            peer_id=PeerId("12D3KooWMe"), checkpoint=self._checkpoint, life=self.life,
            clock=lambda: 1e6, ends=SimpleNamespace(last_saved=lambda: self.last_saved),
        )  # fmt: skip
        self.conditions: set[str] = set()
        self.asked: list[tuple[PeerId, bytes | None]] = []
        """Whom, and for which snapshot."""
        self.node.health = SimpleNamespace(hold=self._hold)
        view: Any = SimpleNamespace(
            others=self._others, holders=self._holders, name_of=str,
            acquaintances=SimpleNamespace(get=self._heard),
        )  # fmt: skip
        manifest = SimpleNamespace(
            model=SimpleNamespace(num_params=VALUES, state_values=VALUES),
            round=SimpleNamespace(window_steps=5),
            start_loss=5.0, state_form=StateForm("float32", VALUES),
            end=SimpleNamespace(steps=300, rounds=None, tokens=None), optimiser=None,
        )  # fmt: skip
        self.manifest = manifest
        us, folder = SimpleNamespace(swarm_id="", manifest_hash=b""), tmp_path / "joining"
        found = Donors(self.node, view, self.store, us, None, manifest, Rates(), folder)  # type: ignore[arg-type] # fakes
        self.donors = found
        self.next_trainer = Trainer()
        self.supervisor = SimpleNamespace(first_start=self._start, renew=self._renew, trainer=None)
        self.renewed = 0
        self.origin = Origin(founds and begins(Home(tmp_path), self.store))
        self.parameters = Parameters(
            self.node, self.store, found, self.supervisor,  # type: ignore[arg-type] # fakes
            self.origin, founds=founds,
        )  # fmt: skip
        monkeypatch.setattr(giving, "ask", self._ask)
        monkeypatch.setattr(donors, "RETRY_S", 0.001)
        monkeypatch.setattr(donors, "DOUBT_S", 0.001)
        monkeypatch.setattr(offers, "LOOK_S", 0.001)
        monkeypatch.setattr(donors, "PATIENCE_S", 0.05)
        monkeypatch.setattr(donors, "GRACE_S", 0.02)
        monkeypatch.setattr(parameters, "POLL_S", 0.001)

    def _others(self) -> dict[PeerId, Any]:
        return {
            peer: SimpleNamespace(phase=self.phase, role=self.roles.get(peer, "member"))
            for peer in self.live
        }

    def _holders(self) -> list[PeerId]:
        return [
            peer
            for peer, record in self._others().items()
            if record.role != "observer" and traits_of(record.phase).holds_parameters
        ]

    def _heard(self, peer: PeerId) -> Any:
        return SimpleNamespace(about=SimpleNamespace(step=self.heard.get(peer)))

    def _hold(self, code: str, active: bool, **_: object) -> None:
        (self.conditions.add if active else self.conditions.discard)(code)

    async def _checkpoint(self) -> str:
        self.saved += 1
        return "path"

    async def _ask(
        self, party: Any, dialler: Any, donor: PeerId, shape: Any, rates: Any, root: bytes | None
    ) -> Offer:
        self.asked.append((donor, root))
        if donor == BUSY:
            raise PeerError(Reason.CLOSED, "it gives to others")
        return Offer(donor)

    async def _start(self) -> Trainer:
        return self.next_trainer

    async def _renew(self, timeout_s: float) -> None:
        self.renewed += 1

    async def hold(self, trainer: Trainer) -> Any:
        return await self.parameters.hold(trainer)  # type: ignore[arg-type] # a fake


def test_the_best_offer_is_the_lowest_loss_and_of_equal_ones_the_most_steps() -> None:
    offers: Any = [Offer(peer) for peer in (WORSE, OLD, GOOD)]
    assert [offer.donor for offer in ranked(offers)] == [GOOD, OLD, WORSE]


async def test_a_joiner_takes_the_best_and_never_one_that_lies(tmp_path, monkeypatch) -> None:
    rig = Rig(tmp_path, monkeypatch, founds=False)
    rig.live = [WORSE, LIAR, OLD, GOOD]
    trainer = Trainer()
    assert await rig.hold(trainer) is trainer
    assert (trainer.taken, rig.saved) == ([GOOD], 1)
    assert rig.origin.source == "awaited"
    kinds = [event.kind for event in rig.store.events()]
    assert sorted(kinds) == ["donor-refused", "took-over"]


async def test_a_refusal_is_said_once_for_each_donor_and_reason(
    tmp_path, monkeypatch, caplog: pytest.LogCaptureFixture
) -> None:
    rig = Rig(tmp_path, monkeypatch, founds=False)
    rig.live = [BUSY]
    asked = 0

    async def ask(party: Any, dialler: Any, donor: PeerId, *_: Any) -> Offer:
        nonlocal asked
        asked += 1
        if asked < 5:
            raise PeerError(Reason.CLOSED, f"it gives to {asked} others")
        if asked < 7:
            raise PeerError(Reason.NOT_READY, "it has none")
        return Offer(GOOD)

    monkeypatch.setattr(giving, "ask", ask)
    await rig.hold(Trainer())
    refused = [event for event in rig.store.events() if event.kind == "donor-refused"]
    assert (len(refused), caplog.text.count("refused")) == (2, 2)


async def test_parameters_worse_than_the_start_need_a_second_donor(tmp_path, monkeypatch) -> None:
    rig = Rig(tmp_path, monkeypatch, founds=False)
    rig.manifest.start_loss, rig.live = 1.0, [GOOD, WORSE]
    trainer = Trainer()
    holding = asyncio.create_task(rig.hold(trainer))
    async with asyncio.timeout(60):
        while not rig.conditions:
            await asyncio.sleep(0.001)
        assert (trainer.taken, rig.conditions) == ([], {"donor-doubtful"})
        rig.live = [GOOD, OLD]  # whose public losses agree
        await holding
    assert (trainer.taken, rig.conditions) == ([GOOD], set())


async def test_who_waits_for_the_operator_asks_seldom(tmp_path, monkeypatch) -> None:
    rig = Rig(tmp_path, monkeypatch, founds=False)
    monkeypatch.setattr(donors, "DOUBT_S", 1e6)
    rig.manifest.start_loss, rig.live = 1.0, [GOOD]
    holding = asyncio.create_task(rig.hold(Trainer()))
    async with asyncio.timeout(60):
        while not rig.conditions:
            await asyncio.sleep(0.001)
    for _ in range(100):  # far more than RETRY_S
        await asyncio.sleep(0.001)
    assert len(rig.asked) == 1
    holding.cancel()


async def test_a_silent_member_keeps_nobody_from_asking_who_comes_later(
    tmp_path, monkeypatch
) -> None:
    rig = Rig(tmp_path, monkeypatch, founds=False)
    monkeypatch.setattr(offers, "MORE_OFFERS_S", 0.001)
    ask, silent = rig._ask, asyncio.Event()

    async def stall(party: Any, dialler: Any, donor: PeerId, *rest: Any) -> Offer:
        if donor == LIAR:
            silent.set()
            await asyncio.Event().wait()
        return await ask(party, dialler, donor, *rest)

    monkeypatch.setattr(giving, "ask", stall)
    rig.live = [LIAR]
    trainer = Trainer()
    holding = asyncio.create_task(rig.hold(trainer))
    async with asyncio.timeout(60):
        await silent.wait()
        rig.live = [LIAR, GOOD]
        await holding
    assert trainer.taken == [GOOD]


async def test_after_a_restart_a_donor_is_asked_for_the_rest_of_what_it_gave(
    tmp_path, monkeypatch
) -> None:
    monkeypatch.setitem(globals(), "VALUES", PIECE_BYTES // 4 + 16)  # two pieces
    real = Offer.pieces

    async def stalls(offer: Offer, first: int, count: int) -> AsyncGenerator[tuple[int, Any]]:
        async for each in real(offer, 0, 1):
            yield each
        await asyncio.Event().wait()

    def unverified(data: bytes, *_: object) -> Tree:  # nobody signs here
        return Tree(*msgspec.msgpack.decode(data, type=tuple[PeerId, TreeOffer, bytes]))

    monkeypatch.setattr(pieces, "from_bytes", unverified)
    monkeypatch.setattr(Offer, "pieces", stalls)
    rig = Rig(tmp_path, monkeypatch, founds=False)
    rig.live = [GOOD]
    holding = asyncio.create_task(rig.hold(Trainer()))
    async with asyncio.timeout(60):
        while not rig.donors._takeover.trees():
            await asyncio.sleep(0.001)
    holding.cancel()
    await asyncio.gather(holding, return_exceptions=True)
    monkeypatch.setattr(Offer, "pieces", real)

    again = Rig(tmp_path, monkeypatch, founds=False)
    again.live = [GOOD]
    trainer = Trainer()
    await again.hold(trainer)
    assert again.asked == [(GOOD, Offer(GOOD).tree.root)]
    assert trainer.taken == [GOOD]


@pytest.mark.parametrize(("here", "first"), [(0.5, OLD), (0.4, GOOD)])
async def test_an_older_snapshot_is_worth_its_rest_if_half_of_it_is_here(
    tmp_path, monkeypatch, here, first
) -> None:
    rig = Rig(tmp_path, monkeypatch, founds=False)
    tree = Offer(OLD).tree
    held: Any = SimpleNamespace(trees=lambda: [tree], bytes_of=lambda _: here * 4 * VALUES)
    rig.donors._takeover = held
    best_first: Any = [Offer(GOOD), Offer(OLD), Offer(WORSE)]
    assert rig.donors._chosen(best_first)[0].donor == first


async def test_the_operator_may_accept_them(tmp_path, monkeypatch) -> None:
    rig = Rig(tmp_path, monkeypatch, founds=False)
    rig.manifest.start_loss, rig.live, rig.donors._accept = 1.0, [GOOD], True
    trainer = Trainer()
    await rig.hold(trainer)
    assert (trainer.taken, rig.conditions) == ([GOOD], set())


async def test_a_liar_is_avoided_for_several_times_what_it_cost(tmp_path, monkeypatch) -> None:
    """Else a low loss, once claimed, would cost a joiner one transfer after another."""
    rig = Rig(tmp_path, monkeypatch, founds=False)
    loop, late_s = asyncio.get_running_loop(), 0.0
    real, time = Offer.pieces, loop.time

    async def slow(offer: Offer, first: int, count: int) -> AsyncGenerator[tuple[int, Any]]:
        nonlocal late_s
        late_s += 1000.0
        async for each in real(offer, first, count):
            yield each

    monkeypatch.setattr(Offer, "pieces", slow)
    monkeypatch.setattr(loop, "time", lambda: time() + late_s)
    rig.live = [LIAR, GOOD]
    await rig.hold(Trainer())
    backoff = rig.donors._offers._failed[LIAR]
    assert backoff.until_s - loop.time() > 2000.0


@pytest.mark.parametrize("order", [1, -1])
async def test_what_several_gave_and_measures_badly_comes_from_one_of_them(
    tmp_path, monkeypatch, order
) -> None:
    """Nobody is blamed for a mixture. Who gave all of it, is."""
    monkeypatch.setitem(globals(), "VALUES", PIECE_BYTES // 4 + 16)  # two pieces
    monkeypatch.setitem(OFFERS, TWIN, OFFERS[GOOD])
    monkeypatch.setitem(TRUE_LOSS, TWIN, 9.0)
    monkeypatch.setattr(
        donors, "ranked", lambda offers: sorted(offers, key=lambda o: order * (o.donor == TWIN))
    )
    rig = Rig(tmp_path, monkeypatch, founds=False)
    rig.live = [GOOD, TWIN]
    trainer = Trainer()
    async with asyncio.timeout(60):
        await rig.hold(trainer)
    assert trainer.taken == [GOOD]
    refused = [event for event in rig.store.events() if event.kind == "donor-refused"]
    assert [event.detail.startswith(TWIN) for event in refused] == [True] * len(refused)
    assert len(refused) == (0 if order == 1 else 1)
    assert not (tmp_path / "joining").exists()


async def test_who_has_to_give_all_is_joined_by_nobody(tmp_path, monkeypatch) -> None:
    rig = Rig(tmp_path, monkeypatch, founds=False)
    rig.live = [GOOD, TWIN]
    monkeypatch.setitem(OFFERS, TWIN, OFFERS[GOOD])
    assert [offer.donor for offer in await rig.donors._more([TWIN])] == [GOOD]
    rig.donors._alone, rig.asked = TWIN, []
    assert (await rig.donors._more([TWIN]), rig.asked) == ([], [])


async def test_a_founder_that_begins_has_the_initial_model_at_once(tmp_path, monkeypatch) -> None:
    rig = Rig(tmp_path, monkeypatch, founds=True)
    assert str(rig.origin.source) == "initial"
    await rig.hold(Trainer())
    assert rig.states == []
    assert str(rig.origin.source) == "awaited"  # from now on others may hold what it gave them


@pytest.mark.parametrize("what", ["a member is known", "the ledger was charged"])
async def test_a_founder_that_lost_its_state_takes_it_from_a_member(
    tmp_path, monkeypatch, what
) -> None:
    rig = Rig(tmp_path, monkeypatch, founds=True)
    if what == "a member is known":
        rig.store.remember_peer(GOOD, [])
    else:
        monkeypatch.setattr(Ledger, "counter", 5)
        Ledger.open(Home(tmp_path).ledger_db).close()
    rig = Rig(tmp_path, monkeypatch, founds=True)  # it starts again
    assert rig.origin.source == "awaited"
    rig.live = [GOOD]
    trainer = Trainer()
    await rig.hold(trainer)
    assert (trainer.taken, trainer.step) == ([GOOD], 100)


async def test_a_founder_whom_nobody_can_help_begins_anew_after_its_patience(
    tmp_path, monkeypatch
) -> None:
    rig = Rig(tmp_path, monkeypatch, founds=True)
    rig.store.remember_peer(GOOD, [])
    rig = Rig(tmp_path, monkeypatch, founds=True)
    rig.live, rig.phase = [GOOD], "fetching"  # it has nothing either
    trainer = Trainer()
    assert await rig.hold(trainer) is rig.next_trainer
    assert (trainer.stopped, trainer.taken) == (True, [])
    assert "--from-initial" in rig.life.note
    assert [event.kind for event in rig.store.events()] == ["began-anew"]


async def test_a_trainer_that_died_before_its_first_checkpoint_brings_no_initial_model(
    tmp_path, monkeypatch
) -> None:
    rig = Rig(tmp_path, monkeypatch, founds=True)
    await rig.hold(Trainer())
    rig.live = [GOOD]
    again = Trainer()
    assert await rig.parameters.hold_again(again)  # type: ignore[arg-type] # a fake
    assert again.taken == [GOOD]
    rig.live = []
    assert not await rig.parameters.hold_again(Trainer())  # type: ignore[arg-type] # a fake
    assert (rig.renewed, rig.origin.source) == (1, "initial")
    assert await rig.parameters.hold_again(Trainer())  # type: ignore[arg-type] # a fake
    assert rig.origin.source == "awaited"


@pytest.mark.parametrize(
    ("own_step", "taken"), [(0, [GOOD]), (46, [GOOD]), (79, [GOOD]), (80, []), (100, []), (200, [])]
)
async def test_a_checkpoint_far_behind_is_replaced_before_anything_is_exchanged(
    tmp_path, monkeypatch, own_step, taken
) -> None:
    rig = Rig(tmp_path, monkeypatch, founds=True)
    rig.live = [GOOD, WORSE]
    trainer = Trainer(resumed_step=own_step)
    await rig.hold(trainer)
    assert (trainer.taken, rig.life.catching_up) == (taken, False)


async def test_who_resumes_alone_exchanges_nothing_until_it_has_looked(
    tmp_path, monkeypatch
) -> None:
    rig = Rig(tmp_path, monkeypatch, founds=False)
    trainer = Trainer(resumed_step=10)
    await rig.hold(trainer)
    assert rig.life.catching_up
    rig.supervisor.trainer = trainer
    looking = asyncio.create_task(rig.parameters.catch_up_later())
    rig.live = [GOOD]
    async with asyncio.timeout(10):
        while rig.life.catching_up:
            await asyncio.sleep(0.001)
    looking.cancel()
    assert trainer.taken == [GOOD]


@pytest.mark.parametrize(
    ("phase", "end", "others", "heard", "taken_at"),
    [
        ("training", 300, [GOOD, WORSE], {}, 105),  # a window beyond what another says
        ("finished", 300, [GOOD, WORSE], {}, 105),
        ("training", 300, [], {}, 299),  # nobody else can say: not the last, at least
        ("training", None, [], {}, 1 << 39),
        ("training", None, [OLD], {OLD: 40}, 45),
        ("training", 300, [BUSY], {BUSY: 0}, 299),  # said before it took them over
        ("training", 300, [BUSY], {BUSY: 90}, 95),
        ("finished", 300, [GOOD], {GOOD: 300}, 300),
    ],
)
async def test_a_step_counts_no_further_than_somebody_else_vouches_for(
    tmp_path, monkeypatch, phase, end, others, heard, taken_at
) -> None:
    rig = Rig(tmp_path, monkeypatch, founds=False)
    rig.manifest.end.steps = end
    monkeypatch.setitem(OFFERS, LIAR, (end or 1 << 39, 1.7))
    monkeypatch.setitem(TRUE_LOSS, LIAR, 1.7)
    rig.live, rig.phase, rig.heard = [LIAR, *others], phase, heard
    trainer = Trainer()
    await rig.hold(trainer)
    assert (trainer.taken, trainer.step) == ([LIAR], taken_at)


@pytest.mark.parametrize(("away_s", "taken"), [(0.01, False), (0.2, True)])
async def test_a_lone_donor_is_ahead_by_no_more_than_time_allows(
    tmp_path, monkeypatch, away_s, taken
) -> None:
    rig = Rig(tmp_path, monkeypatch, founds=False)
    rig.live, rig.last_saved = [GOOD], (70, 1e6 - away_s)
    trainer = Trainer(resumed_step=70)
    await rig.hold(trainer)
    assert (trainer.taken == [GOOD], trainer.step) == (taken, 100 if taken else 70)


async def test_a_donor_that_stalls_holds_up_nobody_who_has_a_checkpoint(
    tmp_path, monkeypatch
) -> None:
    async def stalls(offer: Offer, first: int, _: int) -> AsyncGenerator[tuple[int, memoryview]]:
        if offer.donor == LIAR:
            await asyncio.Event().wait()
        yield first, offer.payload

    monkeypatch.setattr(Offer, "pieces", stalls)
    monkeypatch.setattr(donors, "CATCH_UP_S", 2.0)
    rig = Rig(tmp_path, monkeypatch, founds=False)
    rig.live = [LIAR, GOOD, WORSE]
    trainer = Trainer(resumed_step=20)
    await rig.hold(trainer)
    assert (trainer.taken, rig.life.catching_up) == ([], False)
    assert rig.donors._offers.willing() == [GOOD, WORSE]  # nobody asks it again for a while
    trainer = Trainer()
    await rig.hold(trainer)
    assert trainer.taken == [GOOD]


async def test_a_founder_takes_no_observer_for_a_holder(tmp_path, monkeypatch) -> None:
    rig = Rig(tmp_path, monkeypatch, founds=True)
    rig.store.remember_peer(GOOD, [])
    rig = Rig(tmp_path, monkeypatch, founds=True)
    rig.live, rig.roles = [GOOD], {GOOD: "observer"}
    trainer = Trainer()
    assert await rig.hold(trainer) is rig.next_trainer
    assert trainer.taken == []


async def test_a_founder_whose_donors_all_fail_is_told_of_the_initial_model(
    tmp_path, monkeypatch, caplog
) -> None:
    rig = Rig(tmp_path, monkeypatch, founds=True)
    rig.store.remember_peer(LIAR, [])
    rig = Rig(tmp_path, monkeypatch, founds=True)
    rig.live = [LIAR]
    holding = asyncio.create_task(rig.hold(Trainer()))
    async with asyncio.timeout(10):
        while "none has given" not in rig.life.note:
            await asyncio.sleep(0.001)
    assert "--from-initial" in rig.life.note
    assert sum("--from-initial" in message for message in caplog.messages) == 1
    assert [event.kind for event in rig.store.events()] == ["donor-refused"]
    holding.cancel()


@pytest.mark.parametrize("own_step", [None, 10])
async def test_parameters_that_can_not_be_saved_at_once_are_kept(
    tmp_path, monkeypatch, own_step
) -> None:
    rig = Rig(tmp_path, monkeypatch, founds=False)
    rig.live = [GOOD]

    async def full() -> str:
        raise LocalError("no space is left")

    rig.node.checkpoint = full
    trainer = Trainer(resumed_step=own_step)
    assert await rig.hold(trainer) is trainer
    assert trainer.taken == [GOOD]
