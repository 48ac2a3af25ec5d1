"""Parameters on their way to a joiner over a link that breaks."""

from __future__ import annotations

import asyncio
import contextlib
import random
import socket
from collections.abc import Callable

import msgspec
import pytest

from tests.unit.network.test_agreement import party
from xpeer.errors import PeerError, Reason
from xpeer.identity import Identity, PeerId
from xpeer.manifest import StateForm
from xpeer.network import donation
from xpeer.network import rates as rates_module
from xpeer.network import turns as turns_module
from xpeer.network.link import Link
from xpeer.network.rates import Pace, Rates
from xpeer.network.shelf import Shelf
from xpeer.network.stream import Stream
from xpeer.network.turns import Turns
from xpeer.network.uplink import Uplink
from xpeer.update import ModelState, StateCopy
from xpeer.wire.frames import FRAME_BYTES
from xpeer.wire.messages import StateOffer, StateRequest, encode

FRAMES = 24
PAYLOAD = random.Random(1).randbytes(FRAMES * FRAME_BYTES - 400)
FORM = StateForm("float32", len(PAYLOAD) // 4)


class Source:
    """A trainer, of which each snapshot is another."""

    def __init__(self) -> None:
        self.exports = self.step = 0

    async def export_state(self) -> StateCopy:
        self.exports += 1
        return StateCopy(ModelState(payload=PAYLOAD, step=self.exports, loss_public=1.0), 0.0)


class DonorLink(Link):
    """Breaks after so many frames of bulk, if any."""

    frames: int | None = None
    break_now: Callable[[], None]
    noticed = True
    """Whether this end learns it at once, or when it is dropped."""
    sent = 0

    def __init__(self, peer_id: PeerId, stream: Stream) -> None:
        super().__init__(peer_id, stream, 5.0)
        self._dropped = asyncio.Event()

    async def send_bulk(self, payload: bytes | memoryview, pace: Pace | None = None) -> bytes:
        if self.frames is None:
            DonorLink.sent += len(payload)
            return await super().send_bulk(payload, pace)
        part = memoryview(payload)[: self.frames * FRAME_BYTES]
        DonorLink.sent += len(part)
        if part:
            await super().send_bulk(part, pace)
        self.break_now()
        if not self.noticed:
            await self._dropped.wait()
        raise PeerError(Reason.CLOSED, "the stream broke while sending")

    def abort(self) -> None:
        self._dropped.set()
        super().abort()


class Network:
    """A donor, and a joiner whose links to it break: one after so many frames, for each number."""

    def __init__(
        self,
        breaks: list[int | None],
        *,
        noticed: bool = True,
        unreachable: int = 0,
        mbit_per_s: float = 0.0,
        places: int = 2,
    ) -> None:
        self.donor, self.joiner = Identity.generate(), Identity.generate()
        self.source = self.first = Source()
        self.rates = Rates()
        self.turns = Turns(places, self.rates)
        self.uplink = Uplink(mbit_per_s, clock=lambda: 0.0)
        self.dialled = 0
        self._breaks, self._noticed, self._unreachable = breaks, noticed, unreachable
        self._handle = donation.serving(
            party(self.donor),
            lambda: self.source,
            FORM,
            self.turns,
            Shelf(1),
            self.uplink,
        )
        self._tasks: list[asyncio.Task[None]] = []
        DonorLink.sent = 0

    async def open_link(self, peer_id: PeerId, protocol: str, timeout_s: float) -> Link:
        self.dialled += 1
        if self.dialled > 1 and self._unreachable:
            self._unreachable -= 1
            raise PeerError(Reason.UNREACHABLE, "no route")
        ours, theirs = socket.socketpair()
        link = DonorLink(self.joiner.peer_id, Stream(theirs))
        link.frames = self._breaks.pop(0) if self._breaks else None
        link.noticed = self._noticed
        stream = Stream(ours)
        # the end of what was sent is read before the break
        link.break_now = lambda: theirs.shutdown(socket.SHUT_WR)
        self._tasks.append(asyncio.ensure_future(self._serve(link)))
        return Link(self.donor.peer_id, stream, 5.0)

    async def _serve(self, link: Link) -> None:
        with contextlib.suppress(PeerError):
            await self._handle(link)

    async def ask(self) -> donation.Offered:
        return await donation.ask(
            party(self.joiner), self, self.donor.peer_id, len(PAYLOAD) // 4, self.rates
        )

    async def fetch(self) -> ModelState:
        try:
            return await (await self.ask()).take()
        finally:
            await self.ended()

    async def ended(self) -> None:
        """Wait until the donor has dropped every link."""
        async with asyncio.timeout(20):
            await asyncio.gather(*self._tasks)


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(donation, "RESUME_PAUSE_S", 0.0)


@pytest.mark.parametrize("noticed", [True, False], ids=["both notice", "the donor does not"])
@pytest.mark.parametrize(("breaks", "unreachable"), [([9], 0), ([9], 3), ([4, 5, 0, 1], 0)])
async def test_a_joiner_goes_on_where_the_link_broke(
    breaks: list[int | None], unreachable: int, noticed: bool
) -> None:
    network = Network(list(breaks), noticed=noticed, unreachable=unreachable)
    given = await network.fetch()
    assert bytes(given.payload) == PAYLOAD
    assert (given.step, network.source.exports) == (1, 1)  # of one snapshot
    assert DonorLink.sent == len(PAYLOAD)  # nothing came twice
    assert network.dialled == 1 + len(breaks) + unreachable


async def test_joiners_of_earlier_versions_are_bounded_too(monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    monkeypatch.setattr(rates_module.Pace.wait, "__defaults__", (slept.append,))
    network = Network([], mbit_per_s=8.0)  # 1e6 bytes a second, by a clock that stands still
    given = await network.fetch()
    assert bytes(given.payload) == PAYLOAD
    assert slept == pytest.approx([n * FRAME_BYTES / 1e6 for n in range(1, FRAMES)])


async def test_nobody_is_sent_a_snapshot_more_than_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turns_module, "PAUSE_S", 0.0)
    network = Network([9, None, None, None])
    for _ in range(2):  # breaks do not count
        assert bytes((await network.fetch()).payload) == PAYLOAD
    with pytest.raises(PeerError):
        await network.fetch()
    assert network.source.exports == 1
    assert DonorLink.sent == 2 * len(PAYLOAD)


async def test_what_was_refused_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turns_module, "PAUSE_S", 0.0)
    network = Network([])
    for _ in range(4):
        with contextlib.suppress(PeerError):
            await network.fetch()
    (spent,) = network.turns._spent.values()
    assert spent.num_bytes == 2 * len(PAYLOAD)


async def test_a_donor_that_no_longer_has_it_says_so_at_once() -> None:
    network = Network([9])
    offered = await network.ask()
    network.source = Source()  # its trainer was started again
    with pytest.raises(PeerError, match=r"broke off at .* and did not go on") as error:
        await offered.take()
    assert (error.value.reason, network.dialled) == (Reason.CLOSED, 2)
    assert network.source.exports == 0


async def test_what_was_hardly_begun_takes_no_memory() -> None:
    """Offers that a joiner refuses end so."""
    network = Network([1])
    with pytest.raises(PeerError, match="did not go on"):
        await network.fetch()
    assert network.dialled == 2


async def test_breaks_buy_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    network = Network([9])
    offered = await network.ask()
    monkeypatch.setattr(rates_module, "GRACE_S", 0.0)

    def too_slow(pace: Pace, num_bytes: int) -> float:
        if num_bytes == 0:
            raise PeerError(Reason.TIMEOUT, "slower than 64 KiB/s")
        return 60.0

    monkeypatch.setattr(Pace, "allows_s", too_slow)
    with pytest.raises(PeerError, match="slower"):
        await offered.take()
    assert network.dialled == 1


async def test_nobody_gets_the_rest_of_what_another_was_given(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(donation, "RESUME_WITHIN_S", 0.0)
    network = Network([9], unreachable=1)
    offered = await network.ask()
    digest = offered._offer.digest
    with pytest.raises(PeerError, match="did not go on"):
        await offered.take()
    await network.ended()  # the donor keeps the rest
    network.joiner = thief = Identity.generate()
    link = await network.open_link(network.donor.peer_id, donation.PROTOCOL, 5.0)
    shake = party(thief).handshake(network.donor.peer_id, "state", initiator=True)
    await link.connect(shake, initiator=True)
    await link.send(StateRequest(digest, FRAME_BYTES))
    with pytest.raises(PeerError, match=Reason.CLOSED):
        await link.receive()
    link.abort()
    await network.ended()
    turns = Turns(2, Rates())
    turns.broke(network.donor.peer_id, digest, Pace(1.0))
    assert not await turns.may(network.joiner.peer_id, StateRequest(digest, FRAME_BYTES))
    assert not await turns.may(network.donor.peer_id, StateRequest(bytes(32), FRAME_BYTES))
    assert await turns.may(network.donor.peer_id, StateRequest(digest, FRAME_BYTES))


async def test_who_keeps_its_receipt_back_makes_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turns_module, "YIELDS_S", 0.0)
    network = Network([], places=1)
    holds = await network.ask()
    await holds._link.receive_into(memoryview(bytearray(len(PAYLOAD))))
    network.joiner = Identity.generate()
    assert bytes((await network.fetch()).payload) == PAYLOAD
    holds.refuse()


async def test_a_lost_donor_is_not_waited_for_if_others_can_give_as_fast(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(donation, "RESUME_WITHIN_S", 1e6)
    network = Network([9], unreachable=1_000_000)
    offered = await network.ask()
    with pytest.raises(PeerError, match="did not go on"):
        async with asyncio.timeout(60):
            await offered.take(others=True)
    await network.ended()


async def test_a_donor_that_is_silent_when_it_is_asked_for_the_rest_is_given_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(donation, "RESUME_WITHIN_S", 0.05)
    network = Network([9])
    offered = await network.ask()

    async def silent(_: StateRequest) -> tuple[Link, StateOffer]:
        await asyncio.Event().wait()
        raise AssertionError

    offered._again = silent
    with pytest.raises(PeerError, match="did not go on"):
        async with asyncio.timeout(60):
            await offered.take()
    await network.ended()


def test_who_begins_asks_as_before() -> None:
    """Donors of the first release refuse what they do not know."""
    assert msgspec.msgpack.decode(encode(StateRequest())) == {"type": "StateRequest"}


def test_of_bytes_that_were_not_sent_none_count() -> None:
    turns, peer = Turns(2, Rates()), Identity.generate().peer_id
    pace = Pace(1.0)
    pace.moved = 1000

    async def scenario() -> int:
        turns.broke(peer, bytes(32), pace)
        return turns.pace(peer, StateRequest(bytes(32), 1 << 40)).moved

    assert asyncio.run(scenario()) == 1000
