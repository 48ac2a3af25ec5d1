"""The loop that dials, without a network: whom, how often, and what the operator is told."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

from xpeer.errors import PeerError, Reason
from xpeer.identity import Identity, PeerId
from xpeer.network import introductions
from xpeer.network.addresses import AddressBook, reachable
from xpeer.network.seeds import HEALTHY_TARGETS, Answer, Bootstrapping

A, B, C = (Identity.generate().peer_id for _ in range(3))


class Network:
    """Answers with clocks, or with why not; counts."""

    def __init__(self, **answers: float | str) -> None:
        self.answers = {PeerId(name): answer for name, answer in answers.items()}
        self.dialled: list[PeerId] = []
        self.deaf: set[PeerId] = set()
        self.settled = 0

    def targets(self) -> dict[PeerId, str]:
        return {peer: f"/address/of/{peer}" for peer in self.answers}

    async def dial(self, peer_id: PeerId) -> Answer:
        self.dialled.append(peer_id)
        answer = self.answers[peer_id]
        if isinstance(answer, str):
            raise PeerError(answer)
        return Answer(answer, peer_id not in self.deaf)

    async def settle(self) -> None:
        self.settled += 1

    def loop(self) -> Bootstrapping:
        return Bootstrapping(self.targets, self.dial, self.settle)


async def test_nobody_known_is_no_failure():
    network = Network()
    loop = network.loop()
    assert await loop.once()
    assert (loop.note, network.settled) == ("", 0)


async def test_one_answer_is_enough():
    network = Network(a=Reason.UNREACHABLE, b=0.0)
    loop = network.loop()
    assert await loop.once()
    assert (loop.note, network.settled) == ("", 1)


async def test_no_answer_names_an_address_and_a_reason():
    loop = Network(a=Reason.UNREACHABLE, b=Reason.TIMEOUT).loop()
    assert not await loop.once()
    assert loop.note == "no seed answers: /address/of/a: unreachable"


@pytest.mark.parametrize(
    ("clocks", "note"),
    [
        ([0.0], ""),
        ([2.9, -2.9], ""),
        ([60.0, 61.0, 0.0], "60 s behind"),
        ([-300.0], "300 s ahead of"),
        ([0.0, 1e9, 0.1], ""),  # one liar, or one broken clock that is not ours
    ],
)
async def test_a_clock_that_most_disagree_with_is_told(clocks: list[float], note: str):
    loop = Network(**{str(n): clock for n, clock in enumerate(clocks)}).loop()
    assert await loop.once()  # reached all the same
    assert note in loop.note
    assert bool(note) == bool(loop.note)


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """How long the loop means to wait; it does not wait."""
    waits: list[float] = []

    class NoTime:
        def __init__(self, delay_s: float) -> None:
            waits.append(delay_s)

        async def __aenter__(self) -> None:
            await asyncio.sleep(0)
            raise TimeoutError

        async def __aexit__(self, *error: object) -> None:
            return

    monkeypatch.setattr(asyncio, "timeout", NoTime)
    return waits


async def run_until(loop: Bootstrapping, done: Callable[[], bool]) -> None:
    task = asyncio.create_task(loop.run())
    while not done():
        await asyncio.sleep(0)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def test_back_off_doubles_to_a_minute_and_starts_anew_after_success(waits):
    network = Network(a=Reason.UNREACHABLE)
    loop = network.loop()
    await run_until(loop, lambda: len(waits) >= 9)
    assert waits[:9] == [1, 2, 4, 8, 16, 32, 60, 60, 60]
    assert not loop.reached.is_set()
    waits.clear()
    network.answers = {PeerId("a"): 0.0}
    await run_until(loop, lambda: len(waits) >= 2)
    assert waits[:2] == [60, 60]
    assert loop.reached.is_set()
    waits.clear()
    network.answers = {PeerId("a"): Reason.UNREACHABLE}
    await run_until(loop, lambda: len(waits) >= 2)
    assert waits[:2] == [1, 2]
    assert not loop.reached.is_set()


async def test_while_all_is_well_a_few_are_dialled_and_neighbours_seldom_looked_for(waits):
    network = Network(**{str(n): 0.0 for n in range(16)})
    await run_until(network.loop(), lambda: len(waits) >= 11)
    assert len(network.dialled) == 16 + 10 * HEALTHY_TARGETS
    assert network.settled == 3  # of 11
    assert len(set(network.dialled[16:])) > HEALTHY_TARGETS
    network.answers = dict.fromkeys(network.answers, Reason.UNREACHABLE)
    loop = network.loop()
    loop.reached.set()
    assert not await loop.once()


async def test_an_error_of_ours_does_not_end_the_loop(waits, caplog):
    network = Network(a=0.0)
    loop, count = network.loop(), 0

    async def broken() -> None:
        nonlocal count
        count += 1
        raise RuntimeError("a DHT node that is being replaced")

    loop._find_neighbours = broken
    await run_until(loop, lambda: count >= 3)
    assert "being replaced" in caplog.text


async def test_dialling_again_does_not_wait():
    network = Network(a=0.0)
    loop = network.loop()
    task = asyncio.create_task(loop.run())
    await loop.reached.wait()
    loop.lost()
    loop.again()
    async with asyncio.timeout(10):  # the next time would be in a minute
        await loop.reached.wait()
    assert len(network.dialled) == 2
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


def test_a_seed_may_have_several_addresses_and_we_are_none():
    first, second = f"/ip4/10.0.0.1/tcp/1/p2p/{A}", f"/dns4/a.example/tcp/1/p2p/{A}"
    own, word = f"/ip4/10.0.0.2/tcp/1/p2p/{B}", f"/ip4/10.0.0.3/tcp/1/p2p/{A}"
    book = AddressBook(B, [first, own, second])
    book.learn([word, f"/ip4/10.0.0.4/tcp/1/p2p/{C}"], hearsay=False)
    assert book.of(A) == [first, second, word]
    assert book.targets() == {A: first, C: f"/ip4/10.0.0.4/tcp/1/p2p/{C}"}
    assert book.candidates() == [C, A]


def test_loopback_is_told_only_if_it_is_all_there_is():
    loopback, outside = "/ip4/127.0.0.1/tcp/1", "/ip4/192.0.2.1/tcp/1"
    assert reachable([loopback, "/ip6/::1/tcp/1", outside]) == [outside]
    assert reachable([loopback]) == [loopback]


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_an_introduction_lasts_a_while():
    clock = Clock()
    introduced = introductions.Introduced(clock)
    assert A not in introduced
    introduced.accepted(A)
    assert A in introduced
    introduced.forget(A)
    assert A not in introduced
    introduced.accepted(A)
    clock.now += introductions.KNOWN_S
    assert A not in introduced


def test_who_refuses_us_is_left_alone_for_longer_every_time():
    clock = Clock()
    introduced = introductions.Introduced(clock)
    pauses = []
    for _ in range(9):
        introduced.refused(A)
        assert A not in introduced
        started = clock.now
        while introduced.is_left_alone(A):
            clock.now += 0.5
        pauses.append(clock.now - started)
    assert pauses == [1, 2, 4, 8, 16, 32, 60, 60, 60]
    assert not introduced.is_left_alone(B)
    introduced.accepted(A)
    introduced.refused(A)
    clock.now += 1
    assert not introduced.is_left_alone(A)


def test_what_is_remembered_of_introductions_is_bounded():
    introduced = introductions.Introduced(Clock())
    for n in range(introductions.MAX_NOTED + 10):
        introduced.accepted(PeerId(f"a{n}"))
        introduced.refused(PeerId(f"r{n}"))
    assert len(introduced._since) == len(introduced._refused) == introductions.MAX_NOTED
    introduced.clear()
    assert not introduced._since
    assert not introduced._refused


async def test_silent_seeds_are_seen_while_members_answer():
    members = {f"m{n}": 0.0 for n in range(3 * HEALTHY_TARGETS)}
    network = Network(s1=Reason.UNREACHABLE, s2=0.0, **members)
    seeds = [PeerId("s1"), PeerId("s2")]
    loop = Bootstrapping(network.targets, network.dial, network.settle, seeds)
    await loop.once()
    loop.reached.set()
    assert loop.silent_seeds == ""
    network.answers[PeerId("s2")] = Reason.TIMEOUT
    while not loop.silent_seeds:  # a seed is among the few that are dialled while all is well
        before = len(network.dialled)
        assert await loop.once()
        dialled = network.dialled[before:]
        assert len(dialled) == HEALTHY_TARGETS
        assert set(dialled) & set(seeds)
    assert loop.silent_seeds == "/address/of/s1: unreachable"
    network.answers[PeerId("s2")] = 0.0
    while loop.silent_seeds:
        await loop.once()


async def test_our_clock_is_compared_with_those_who_answer():
    network = Network(a=119.0, b=120.0, c=121.0, d=Reason.TIMEOUT)
    loop = network.loop()
    await loop.once()
    assert (loop.clock_ahead_s, loop.clocks) == (-120.0, 3)


async def test_those_who_cannot_call_us_back_are_counted():
    network = Network(a=0.0, b=0.0, c=Reason.TIMEOUT)
    network.deaf = {PeerId("a"), PeerId("b"), PeerId("c")}
    loop = network.loop()
    await loop.once()
    assert (loop.unheard, loop.clocks) == (2, 2)
    network.deaf.remove(PeerId("b"))
    await loop.once()
    assert (loop.unheard, loop.clocks) == (1, 2)
