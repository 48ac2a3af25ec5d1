"""Pieces from several donors at once: lost donors, slow donors, donors that lie."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Collection, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.unit.daemon.test_gathered import tree_of
from tests.unit.network.test_giving import PAYLOAD, SIGNER
from xpeer.errors import PeerError, Reason
from xpeer.identity import PeerId
from xpeer.manifest import StateForm
from xpeer.network.pieces import Shape, Tree
from xpeer.wire.messages import PIECE_BYTES
from xpeer_daemon import fetching
from xpeer_daemon.fetching import Fetch, Speed
from xpeer_daemon.gathered import Gathered

PIECES = 40
SHAPE = Shape(StateForm("float32", PIECES * PIECE_BYTES // 4))


class Donor:
    """Gives any bytes: it is `Giver` that verifies. After so many pieces it fails, or stalls."""

    def __init__(self, tree: Tree, after: int | None = None, error: PeerError | None = None):
        self.tree, self.donor = tree, tree.donor
        self.given: list[int] = []
        self.data = memoryview(b"1")
        self._after, self._error = after, error
        self.dropped = self.closed = False

    async def pieces(self, first: int, count: int) -> AsyncGenerator[tuple[int, memoryview]]:
        for piece in range(first, first + count):
            if len(self.given) == self._after:
                if self._error is not None:
                    raise self._error
                await asyncio.Event().wait()  # it trickles
            await asyncio.sleep(0)
            self.given.append(piece)
            yield piece, self.data

    async def close(self) -> None:
        self.closed = True

    def refuse(self) -> None:
        self.dropped = True


class Rig:
    def __init__(self, gathered: Gathered, donors: list[Donor], wanted: int = 0) -> None:
        self.gathered, self.donors = gathered, donors
        self.lost: list[tuple[PeerId, str]] = []
        self.back: dict[PeerId, Donor] = {}
        self.others: list[Donor] = []
        """Who offers, when others are asked; each once."""
        self.asked = 0
        self.without: list[Collection[PeerId]] = []
        self.unfit: list[Donor] = []
        """Whose offers do not fit, and who go on offering."""
        self.fetch = Fetch(
            gathered,
            wanted or len(donors),
            fits=lambda tree: tree.step == 7,
            again=self._again,
            more=self._more,
            lost=lambda peer, e: self.lost.append((peer, e.reason)),
            on_piece=lambda _donor, _size: None,
        )

    async def _more(self, without: Collection[PeerId]) -> Any:
        self.asked += 1
        self.without.append(without)
        others, self.others = self.others, []
        return [each for each in (*others, *self.unfit) if each.donor not in without]

    async def _again(self, giver: Any) -> Any:
        if giver.donor not in self.back:
            raise PeerError(Reason.UNREACHABLE, "it is gone")
        return self.back[giver.donor]

    async def run(self) -> bool:
        async with asyncio.timeout(60):
            return await self.fetch.run(self.donors)  # type: ignore[arg-type] # fakes

    def given_by(self, donor: Donor) -> set[int]:
        number = self.gathered._number_of(donor.tree)
        return {p for p, source in enumerate(self.gathered._source) if source == number}


@pytest.fixture
def gathered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Gathered]:
    monkeypatch.setattr(fetching, "PAUSE_S", 0.0)
    monkeypatch.setattr(fetching, "AGAIN_WITHIN_S", 0.01)
    monkeypatch.setattr(fetching, "MORE_S", 0.001)
    monkeypatch.setattr(fetching, "MORE_MOST_S", 0.01)
    opened = Gathered.open(tmp_path / "joining", SHAPE, SIGNER)
    yield opened
    opened.close()


def donor(step: int = 7, after: int | None = None, error: PeerError | None = None) -> Donor:
    return Donor(tree_of(PAYLOAD, step), after, error)


def killed() -> Donor:
    """Gives five pieces, and no more."""
    return donor(after=5, error=PeerError(Reason.TRUNCATED, "killed"))


async def test_donors_share_the_work_and_no_piece_comes_twice(gathered: Gathered) -> None:
    rig = Rig(gathered, [donor(), donor()])
    assert await rig.run()
    given = [piece for each in rig.donors for piece in each.given]
    assert all(len(each.given) >= 8 for each in rig.donors)
    assert len(given) <= PIECES + fetching.RUN  # what one owes at the end may be asked of both
    assert set(given) == set(range(PIECES))


async def test_only_what_a_lost_donor_owes_is_fetched_from_another(gathered: Gathered) -> None:
    dies = killed()
    rig = Rig(gathered, [dies, donor()])
    assert await rig.run()
    assert len(rig.given_by(dies)) == 5  # and they stay
    assert dies.dropped
    # it is no loss if the other one has given all before it could come back
    assert set(rig.lost) <= {(dies.donor, Reason.TRUNCATED)}


async def test_all_donors_lost_leaves_what_came(gathered: Gathered) -> None:
    rig = Rig(gathered, [donor(after=5, error=PeerError(Reason.CLOSED, "gone"))])
    assert not await rig.run()
    assert len(gathered.missing()) == PIECES - 5
    other = Rig(gathered, [donor()])
    assert await other.run()
    assert len(other.donors[0].given) == PIECES - 5


async def test_a_donor_that_comes_back_goes_on(gathered: Gathered) -> None:
    dies = donor(after=5, error=PeerError(Reason.CLOSED, "the line broke"))
    rig = Rig(gathered, [dies])
    rig.back[dies.donor] = again = Donor(dies.tree)
    assert await rig.run()
    assert (len(again.given), rig.lost) == (PIECES - 5, [])


async def test_a_liar_is_not_looked_for_again(gathered: Gathered) -> None:
    lies = donor(after=3, error=PeerError(Reason.DIGEST_MISMATCH, "not what it signed"))
    rig = Rig(gathered, [lies, donor()])
    rig.back[lies.donor] = Donor(lies.tree)
    assert await rig.run()
    assert rig.lost == [(lies.donor, Reason.DIGEST_MISMATCH)]
    assert rig.back[lies.donor].given == []


async def test_a_donor_that_trickles_holds_up_nobody(gathered: Gathered) -> None:
    slow = donor(after=1)
    rig = Rig(gathered, [slow, donor()])
    assert await rig.run()
    assert len(rig.given_by(slow)) == 1
    assert slow.dropped


FOR_EVER_S = 1e6


@pytest.fixture
def looks_for_ever(gathered: Gathered, monkeypatch: pytest.MonkeyPatch) -> None:
    """A donor that is gone is looked for as long as the test takes, not as `gathered` says."""
    monkeypatch.setattr(fetching, "AGAIN_WITHIN_S", FOR_EVER_S)
    monkeypatch.setattr(fetching, "PAUSE_S", FOR_EVER_S)


@pytest.mark.usefixtures("looks_for_ever")
async def test_who_has_lost_all_donors_asks_others_at_once(gathered: Gathered) -> None:
    dies = killed()
    rig = Rig(gathered, [dies])
    rig.others = [other := donor()]
    assert await rig.run()
    assert (len(rig.given_by(dies)), len(other.given)) == (5, PIECES - 5)
    assert rig.lost == []  # it was still looked for


async def test_others_join_in_while_fewer_give_than_are_wanted(gathered: Gathered) -> None:
    stays = donor(after=5)
    rig = Rig(gathered, [stays], wanted=2)
    running = asyncio.create_task(rig.run())
    while rig.asked < 3:  # now and then, as long as nobody is there
        await asyncio.sleep(0)
    rig.others = [donor(), third := donor()]
    assert await running
    assert (third.given, third.dropped) == ([], True)  # two are enough


async def test_nobody_is_asked_while_enough_give(gathered: Gathered) -> None:
    """However often it is looked. Before both have a link, others may be asked."""
    looked, asked = asyncio.Event(), list[int]()

    class Waits(Donor):
        async def pieces(self, first: int, count: int) -> AsyncGenerator[tuple[int, memoryview]]:
            async for each in super().pieces(first, count):
                yield each
                await looked.wait()

    rig = Rig(gathered, [Waits(tree_of(PAYLOAD, 7)) for _ in range(2)], wanted=2)
    real = rig.fetch._giving

    def giving() -> list[PeerId]:
        if len(found := real()) == 2:
            asked.append(rig.asked)
            if len(asked) == 5:
                looked.set()
        return found

    rig.fetch._giving = giving  # type: ignore[method-assign]
    assert await rig.run()
    assert set(asked) == {rig.asked}


@pytest.mark.usefixtures("looks_for_ever")
async def test_what_fits_to_nothing_is_waited_for_no_longer_than_it_is_worth(
    gathered: Gathered,
) -> None:
    """The only donor is gone, and others offer what can't be put together with its pieces."""
    dies = killed()
    dies.data = memoryview(bytes(PIECE_BYTES))  # its speed counts
    rig = Rig(gathered, [dies])
    rig.others = [other := donor(step=500)]  # once: then it rests
    assert not await rig.run()
    assert (other.given, other.dropped) == ([], True)
    assert all(other.donor in without for without in rig.without[1:])
    assert gathered.num_bytes == 5 * PIECE_BYTES


async def test_a_donor_that_comes_back_with_other_parameters_is_refused(
    gathered: Gathered,
) -> None:
    """Else it could offer good ones, break off, and give any others in their place."""
    breaks = donor(after=5, error=PeerError(Reason.CLOSED, "the line broke"))
    rig = Rig(gathered, [breaks])
    rig.back[breaks.donor] = other = donor(step=900)
    other.donor = breaks.donor
    assert not await rig.run()
    assert (rig.lost, other.given) == ([(breaks.donor, Reason.REFUSED)], [])


async def test_a_donor_that_comes_and_goes_makes_its_joiner_ask_nobody(
    gathered: Gathered, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetching, "MORE_S", FOR_EVER_S)
    monkeypatch.setattr(fetching, "MORE_MOST_S", FOR_EVER_S)
    monkeypatch.setattr(fetching, "AGAIN_WITHIN_S", FOR_EVER_S)
    flaps = donor(after=0, error=PeerError(Reason.CLOSED, "it goes"))
    rig, came = Rig(gathered, [flaps]), 0

    async def again(_: Any) -> Any:
        nonlocal came
        came += 1
        return flaps if came < 50 else Donor(flaps.tree)

    rig.fetch._again = again
    assert await rig.run()
    assert (came, rig.asked) == (50, 1)


async def test_donors_that_are_silent_for_ever_make_way(
    gathered: Gathered, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They hold their links, and all the places."""
    monkeypatch.setattr(fetching, "SILENT_S", 0.01)
    silent = [donor(after=0), donor(after=0)]
    rig = Rig(gathered, [*silent], wanted=2)
    while_silent = asyncio.create_task(rig.run())
    while rig.asked < 2:
        await asyncio.sleep(0)
    rig.others = [helpful := donor()]
    assert await while_silent
    assert len(helpful.given) == PIECES
    assert [each.dropped for each in silent].count(True) >= 1


async def test_silent_donors_are_left_for_others_that_do_not_fit(
    gathered: Gathered, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetching, "SILENT_S", 0.01)
    rig = Rig(gathered, [silent := donor(after=0)])
    rig.unfit = [donor(step=500)]
    assert not await rig.run()
    assert rig.lost == [(silent.donor, Reason.TIMEOUT)]


async def test_progress_names_bytes_speed_and_time_left(gathered: Gathered) -> None:
    rig = Rig(gathered, [donor(after=10)])
    running = asyncio.create_task(rig.run())
    async with asyncio.timeout(60):
        while gathered.num_bytes < 10 * PIECE_BYTES:
            await asyncio.sleep(0)
    progress = rig.fetch.progress
    assert progress.bytes_done == 10 * PIECE_BYTES
    assert progress.bytes_total == PIECES * PIECE_BYTES
    assert progress.donors == [rig.donors[0].donor]
    assert progress.eta_s is not None
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)


def test_the_speed_is_that_of_the_last_while() -> None:
    now_s = 0.0
    speed = Speed(lambda: now_s)
    assert speed.bytes_per_s == 0.0
    for _ in range(100):
        now_s += 1.0
        speed.moved(1000)
    assert speed.bytes_per_s == pytest.approx(1000.0)
    now_s += 10.0
    assert speed.bytes_per_s < 1000.0
