"""Masked groups over real sealed links."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import torch

from benchmarks.vector import Vector
from tests.unit.network.test_agreement import SWARM, party
from xpeer.errors import PeerError, Reason, TrainerError
from xpeer.gossip.masked import MaskedGroup, MaskedMeeting
from xpeer.identity import Identity, PeerId
from xpeer.network.agreement import Agreement
from xpeer.network.link import Link
from xpeer.network.stream import Stream
from xpeer.round import Exchanged, MeetingPlan
from xpeer.wire.fixedpoint import Grid
from xpeer.wire.messages import Terms

GRID = Grid(16, 2.0**-14)
N = 3000  # one fragment, padded to lines
TERMS = Terms(weight=1.0, group_weight=3.0, epoch=1, ledger_counter=0)


class Member:
    """One peer of the group: its values, its meeting, its ends of the links."""

    def __init__(self, identity: Identity, values: torch.Tensor, grid: Grid = GRID) -> None:
        self.identity, self.peer_id = identity, identity.peer_id
        self.before = values.clone()
        self.trainer = Vector(values, 1, "int8", grid)
        self.party = party(identity)
        self.agreements: dict[PeerId, Agreement] = {}
        self.meeting: MaskedMeeting

    @property
    def values(self) -> torch.Tensor:
        return self.trainer.parameters.read()

    def spoil(self, change: Callable[[PeerId, Any], Any]) -> None:
        """Pass all that we send through `change(to, message)`; None ends all our links."""
        for peer_id, agreement in self.agreements.items():
            self._spoil(peer_id, agreement.link, change)

    def _spoil(self, peer_id: PeerId, link: Link, change: Callable[[PeerId, Any], Any]) -> None:
        send = link.send

        async def changed(message: Any) -> None:
            after = change(peer_id, message)
            if after is None:
                for agreement in self.agreements.values():
                    agreement.link.abort()
                raise PeerError(Reason.CLOSED, "we died")
            await send(after)

        link.send = changed  # type: ignore[method-assign]


class Group:
    """Members in the order of their PeerIDs, all pairs linked."""

    def __init__(self, members: list[Member]) -> None:
        self.members = members
        self.results: dict[PeerId, dict[PeerId, Exchanged | BaseException]] = {}
        self.ended: dict[PeerId, BaseException | None] = {}

    async def link(self) -> None:
        number = 0
        for i, low in enumerate(self.members):
            for high in self.members[i + 1 :]:
                number += 1
                a, b = socket.socketpair()
                near, far = Link(high.peer_id, Stream(a), 2.0), Link(low.peer_id, Stream(b), 2.0)
                ours = low.party.handshake(high.peer_id, "exchange", initiator=True)
                theirs = high.party.handshake(low.peer_id, "exchange", initiator=False)
                await asyncio.gather(
                    near.connect(ours, initiator=True), far.connect(theirs, initiator=False)
                )
                for member, link in ((low, near), (high, far)):
                    member.agreements[link.peer_id] = _agreement(member, link, number)

    async def meet(
        self, before: int | None = None, *, absent: tuple[int, ...] = (), **patience: float
    ) -> None:
        """Everybody's meeting; what came of each pair is in `results`."""
        here = [m for i, m in enumerate(self.members) if i not in absent]
        given = {"deadline_s": 6.0, "step_s": 2.0, **patience}
        running = []
        for member in here:
            member.meeting = MaskedMeeting(
                member.trainer,
                MeetingPlan(
                    meeting_id=1, slot=7, fragment=0, averaging=True, gather_s=0.5,
                    expected=list(member.agreements),
                ),
                MaskedGroup(member.peer_id, SWARM, len(self.members), **given), before,
            )  # fmt: skip
            running.append(asyncio.create_task(self._one(member, absent)))
        await asyncio.gather(*running)

    async def _one(self, member: Member, absent: tuple[int, ...]) -> None:
        gone = {self.members[i].peer_id for i in absent}
        peers = [peer for peer in member.agreements if peer not in gone]
        exchanges = [
            member.meeting.exchange(member.agreements[peer], weighting="equal", deadline_s=9)
            for peer in peers
        ]
        results = asyncio.gather(*exchanges, return_exceptions=True)
        await asyncio.sleep(0)  # they have come
        ended = (await asyncio.gather(member.meeting.run(), return_exceptions=True))[0]
        assert ended is None or isinstance(ended, TrainerError | PeerError), ended
        self.ended[member.peer_id] = ended
        self.results[member.peer_id] = dict(zip(peers, await results, strict=True))

    def merged(self) -> list[int]:
        return [i for i, m in enumerate(self.members) if not torch.equal(m.values, m.before)]

    def reasons(self, member: int) -> set[str]:
        found = self.results[self.members[member].peer_id].values()
        return {e.reason for e in found if isinstance(e, PeerError)}

    def close(self) -> None:
        for member in self.members:
            for agreement in member.agreements.values():
                agreement.link.abort()


def _agreement(member: Member, link: Link, number: int) -> Agreement:
    n = member.trainer.fragment_values(0, averaging=True)
    form = member.trainer.exchanges.payloads.form(n)
    return Agreement(
        link=link, exchange_id=number, slot=7, fragment=0, averaging=True, form=form,
        ours=TERMS, theirs=TERMS,
    )  # fmt: skip


def near(seed: int, apart: float = 0.01, n: int = N) -> torch.Tensor:
    base = torch.randn(n, generator=torch.Generator().manual_seed(99)) * 0.1
    return base + apart * torch.randn(n, generator=torch.Generator().manual_seed(seed))


@asynccontextmanager
async def group(k: int, grid: Grid = GRID, apart: float = 0.01) -> AsyncIterator[Group]:
    """Nothing of it is left behind: no task, no open file."""
    files, tasks = open_files(), asyncio.all_tasks()
    identities = sorted((Identity.generate() for _ in range(k)), key=lambda i: i.peer_id)
    made = Group([Member(each, near(i, apart), grid) for i, each in enumerate(identities)])
    await made.link()
    yield made
    for member in made.members:
        assert not member.trainer.exchanges  # nothing is in flight
    made.close()
    assert asyncio.all_tasks() == tasks
    assert open_files() == files


def open_files() -> int:
    return sum(1 for link in Path("/proc/self/fd").iterdir() if _is_socket(link))


def _is_socket(link: Path) -> bool:
    try:
        return str(link.readlink()).startswith("socket:")
    except FileNotFoundError:  # the listing's own
        return False


def mean_of(members: list[Member]) -> torch.Tensor:
    return torch.stack([m.before for m in members]).double().mean(0)
