"""Donors that link again and again and give nothing: they are given up, and not chosen again."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from tests.unit.daemon.test_fetching import FOR_EVER_S, Donor, Rig, donor, gathered
from xpeer.errors import PeerError, Reason
from xpeer_daemon import fetching
from xpeer_daemon.gathered import Gathered

__all__ = ["gathered"]


async def test_a_donor_that_only_links_again_is_given_up(
    gathered: Gathered, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetching, "AGAIN_WITHIN_S", 5.0)
    flaps = donor(after=0, error=PeerError(Reason.CLOSED, "it goes"))
    rig, loop = Rig(gathered, [flaps]), asyncio.get_running_loop()
    time, came = loop.time, 0
    monkeypatch.setattr(loop, "time", lambda: time() + came)

    async def again(_: Any) -> Any:
        nonlocal came
        came += 1  # and a second has passed
        return flaps

    rig.fetch._again = again
    assert not await rig.run()
    assert (rig.lost, came <= 5) == ([(flaps.donor, Reason.CLOSED)], True)


async def test_of_many_that_come_back_at_once_only_as_many_as_are_wanted_have_a_link(
    gathered: Gathered, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each of them saw a free place when it was asked again."""
    monkeypatch.setattr(fetching, "AGAIN_WITHIN_S", FOR_EVER_S)
    broke = PeerError(Reason.CLOSED, "it goes")
    flaps = [donor(after=0, error=broke) for _ in range(15)]
    rig = Rig(gathered, flaps, wanted=2)
    together, links, came = asyncio.Event(), list[int](), 0

    async def again(link: Any) -> Any:
        nonlocal came
        came += 1
        if came == len(flaps):
            together.set()
        await together.wait()
        return Donor(link.tree)

    adopt = Gathered.adopt

    def counted(self: Gathered, tree: Any, in_use: Any = ()) -> None:
        links.append(len(in_use))
        adopt(self, tree, in_use)

    monkeypatch.setattr(Gathered, "adopt", counted)
    rig.fetch._again = again
    assert await rig.run()
    assert (max(links[len(flaps) :]), rig.lost) == (2, [])


async def test_one_that_links_and_then_never_answers_is_given_up(gathered: Gathered) -> None:
    stalls = donor(after=0, error=PeerError(Reason.CLOSED, "it goes"))
    rig = Rig(gathered, [stalls])

    async def again(_: Any) -> Any:
        await donor(after=0).pieces(0, 1).__anext__()  # for ever

    rig.fetch._again = again
    assert not await rig.run()
    assert rig.lost == [(stalls.donor, Reason.CLOSED)]


async def test_who_is_looked_for_in_vain_is_avoided_when_others_do_not_fit(
    gathered: Gathered, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else it would be chosen again at once, since its offer is the best."""
    monkeypatch.setattr(fetching, "AGAIN_WITHIN_S", FOR_EVER_S)
    monkeypatch.setattr(fetching, "PAUSE_S", FOR_EVER_S)
    flaps = donor(after=0, error=PeerError(Reason.CLOSED, "it goes"))
    rig = Rig(gathered, [flaps])
    rig.unfit = [donor(step=500)]
    assert not await rig.run()
    assert rig.lost == [(flaps.donor, Reason.TIMEOUT)]


async def test_a_donor_of_whom_nothing_is_wanted_any_more_is_let_go(gathered: Gathered) -> None:
    """As after a restart that finds everything here."""
    assert await Rig(gathered, [donor()]).run()
    late = Rig(gathered, [Donor(donor().tree)])
    assert await late.run()
    assert late.donors[0].dropped
