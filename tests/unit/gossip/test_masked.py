"""A masked group over real sealed links: the mean, drop-outs at every step, and members who lie."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.vector import Vector
from xpeer.errors import PeerError, Reason, TrainerError
from xpeer.gossip import masks
from xpeer.gossip.masked import MaskedGroup, MaskedMeeting
from xpeer.identity import Identity, PeerId
from xpeer.network.agreement import Agreement, Party, UnresolvedError
from xpeer.network.link import Link
from xpeer.network.membership.certificates import Membership, Scope
from xpeer.network.membership.keyring import KeyRing
from xpeer.network.stream import Stream
from xpeer.round import Exchanged, MeetingPlan
from xpeer.wire import messages
from xpeer.wire.fixedpoint import Grid
from xpeer.wire.messages import Accept, MaskStep, Payload, Terms

SWARM = "ab" * 32
GRID = Grid(16, 2.0**-14)
N = 3000  # one fragment, padded to lines
TERMS = Terms(weight=1.0, group_weight=3.0, epoch=1, ledger_counter=0)


class Everybody(Membership):
    def allows(self, peer_id: str, scope: Scope) -> bool:
        return True


class Member:
    """One peer of the group: its values, its meeting, its ends of the links."""

    def __init__(self, identity: Identity, values: torch.Tensor, grid: Grid = GRID) -> None:
        self.identity, self.peer_id = identity, identity.peer_id
        self.before = values.clone()
        self.trainer = Vector(values, 1, "int8", grid)
        self.party = Party(
            identity, SWARM, KeyRing(b"k" * 32), b"m" * 32, 1, Everybody(SWARM, None)
        )
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


@pytest.mark.parametrize("grid", [GRID, Grid(32, 2.0**-20)], ids=lambda g: g.codec)
@pytest.mark.parametrize("k", [3, 4, 8])
async def test_the_group_ends_at_the_mean_up_to_the_grid(k: int, grid: Grid):
    async with group(k, grid) as g:
        await g.meet()
        mean = mean_of(g.members)
        for member in g.members:
            assert float((member.values - mean).abs().max()) <= 2 * grid.step + 1e-7
            assert member.meeting.merged
            assert member.trainer.exchanges.merges == 1
        after = torch.stack([m.values for m in g.members]).double().mean(0)
        assert float((after - mean).abs().max()) < 1e-7  # the mean is kept exactly
        for results in g.results.values():
            assert all(isinstance(r, Exchanged) and r.distance > 0 for r in results.values())


async def test_what_travels_is_not_what_a_member_holds():
    """The payload of each is seen by all; only their sum is the values' sum."""
    async with group(3) as g:
        seen: list[bytes] = []
        for member in g.members:
            for agreement in member.agreements.values():
                receive = agreement.link.receive_bulk

                async def tap(num_bytes: int, receive: Any = receive) -> Any:
                    payload, digest = await receive(num_bytes)
                    seen.append(bytes(payload))
                    return payload, digest

                agreement.link.receive_bulk = tap  # type: ignore[method-assign,assignment]
        await g.meet()
        assert g.merged() == [0, 1, 2]
        assert len(seen) == 6
        assert len(set(seen)) == 3  # one payload of each member, the same to all partners
        for payload in set(seen):
            codes = torch.frombuffer(bytearray(payload[: 2 * N]), dtype=torch.int16).float()
            assert 18_000 < float(codes.std()) < 20_000  # uniform: 2^16 / sqrt(12) = 18,919
            for member in g.members:
                plain = (member.before / GRID.step).float()
                assert abs(float(torch.corrcoef(torch.stack([codes, plain]))[0, 1])) < 0.1


def dies_at(kind: type, step: str = "") -> Callable[[PeerId, Any], Any]:
    def change(_to: PeerId, message: Any) -> Any:
        hit = isinstance(message, kind) and getattr(message, "step", step) == step
        return None if hit else message

    return change


DEATHS = {
    "key": dies_at(MaskStep, "key"),
    "lock": dies_at(MaskStep, "lock"),
    "commit": dies_at(MaskStep, "commit"),
    "echo": dies_at(MaskStep, "echo"),
    "reveal": dies_at(Payload),
    "accept": dies_at(Accept),
}


@pytest.mark.parametrize("step", DEATHS)
@pytest.mark.parametrize("k", [3, 4])
async def test_a_member_that_dies_costs_the_slot_and_nothing_else(k: int, step: str):
    async with group(k) as g:
        dead = g.members[1]
        dead.spoil(DEATHS[step])
        await g.meet()
        assert g.merged() == []
        for member in (m for m in g.members if m is not dead):
            shown = member.meeting.revealed
            assert (shown is not None) == (step in ("reveal", "accept"))
            results = g.results[member.peer_id]
            if step == "accept":
                assert all(isinstance(e, UnresolvedError) for e in results.values())
            else:
                assert all(isinstance(e, PeerError) for e in results.values())
                assert not any(isinstance(e, UnresolvedError) for e in results.values())
        # a slot later: fresh keys, and the same values, as nothing came of them
        again = Group([Member(m.identity, m.before) for m in g.members])
        await again.link()
        await again.meet()
        assert len(again.merged()) == k
        again.close()


async def test_who_is_to_blame_is_told_apart_from_who_is_not():
    async with group(3) as g:
        g.members[1].spoil(DEATHS["lock"])
        await g.meet()
        dead = g.members[1].peer_id
        for i in (0, 2):
            results = g.results[g.members[i].peer_id]
            reasons = {p: e.reason for p, e in results.items() if isinstance(e, PeerError)}
            assert reasons.pop(dead) in (Reason.TRUNCATED, Reason.CLOSED)
            assert set(reasons.values()) <= {Reason.GROUP_FAILED, Reason.TRUNCATED, Reason.CLOSED}


async def test_a_silent_member_is_waited_for_no_longer_than_a_step():
    async with group(4) as g:
        for agreement in g.members[0].agreements.values():
            send = agreement.link.send

            async def silent(message: Any, send: Any = send) -> None:
                if not (isinstance(message, MaskStep) and message.step in ("commit", "echo")):
                    await send(message)

            agreement.link.send = silent  # type: ignore[method-assign]
        async with asyncio.timeout(5):
            await g.meet(step_s=0.3)
        assert g.merged() == []
        assert Reason.TIMEOUT in g.reasons(1) | g.reasons(2) | g.reasons(3)
        assert all(m.meeting.revealed is None for m in g.members)


@pytest.mark.parametrize("k", [3, 4])
async def test_a_group_of_another_size_shows_nothing(k: int):
    """With fewer than agreed, two colluders of four could exclude one of the honest two."""
    async with group(k) as g:
        await g.meet(absent=(k - 1,))
        assert g.merged() == []
        assert all(g.reasons(i) == {Reason.GROUP_TOO_SMALL} for i in range(k - 1))
        assert all(m.meeting.revealed is None for m in g.members[:-1])


# Lies


def changed(step: str, to: PeerId) -> Callable[[PeerId, Any], Any]:
    """Says something else at this step to one of the others."""

    def change(peer_id: PeerId, message: Any) -> Any:
        if isinstance(message, MaskStep) and message.step == step and peer_id == to:
            return MaskStep(message.exchange_id, message.step, b"\x09" * 32)
        return message

    return change


async def test_other_keys_for_others_are_noticed_before_anything_is_masked():
    async with group(3) as g:
        g.members[0].spoil(changed("key", g.members[2].peer_id))
        await g.meet()
        assert g.merged() == []
        assert Reason.WRONG_ROSTER in g.reasons(1) | g.reasons(2)
        assert all(m.meeting.revealed is None for m in g.members)


async def test_other_commitments_for_others_are_noticed_before_anything_is_shown():
    async with group(3) as g:
        g.members[0].spoil(changed("commit", g.members[1].peer_id))
        await g.meet()
        assert g.merged() == []
        assert Reason.EQUIVOCATION in g.reasons(1) | g.reasons(2)
        assert all(m.meeting.revealed is None for m in g.members[1:])


@pytest.mark.parametrize("to", ["all", "one"])
async def test_another_payload_than_committed_to_is_refused_by_all(to: str):
    async with group(3) as g:
        liar, victim = g.members[2], g.members[0]
        for peer_id, agreement in liar.agreements.items():
            send_bulk = agreement.link.send_bulk

            async def other(payload: Any, send_bulk: Any = send_bulk) -> bytes:
                changed = bytearray(payload)
                changed[5] ^= 1
                return bytes(await send_bulk(changed))

            if to == "all" or peer_id == victim.peer_id:
                agreement.link.send_bulk = other  # type: ignore[method-assign,assignment]
        await g.meet()
        assert g.merged() == []
        assert Reason.WRONG_COMMITMENT in g.reasons(0)
        assert all(m.meeting.revealed is not None for m in g.members[:2])


@pytest.mark.parametrize("step", ["lock", "echo"])
async def test_a_lie_about_what_was_heard_ends_it_before_anything_is_shown(step: str):
    async with group(3) as g:
        g.members[0].spoil(changed(step, g.members[2].peer_id))
        await g.meet()
        assert g.merged() == []
        # the one who was lied to; the others are told by it
        assert g.members[2].meeting.revealed is None


async def test_a_replayed_attempt_meets_other_keys_and_is_noticed():
    """All that a member said in an earlier slot, again; its old key is in no one's roster."""
    captured: dict[PeerId, dict[str, bytes]] = {}

    def listens(to: PeerId, message: Any) -> Any:
        if isinstance(message, MaskStep):
            captured.setdefault(to, {})[message.step] = message.value
        return message

    def replays(to: PeerId, message: Any) -> Any:
        if isinstance(message, MaskStep):
            return MaskStep(message.exchange_id, message.step, captured[to][message.step])
        return message

    async with group(3) as g:
        g.members[0].spoil(listens)
        await g.meet()
        assert len(g.merged()) == 3
        again = Group([Member(m.identity, m.before) for m in g.members])
        await again.link()
        again.members[0].spoil(replays)
        await again.meet()
        assert again.merged() == []
        assert Reason.WRONG_ROSTER in again.reasons(1) | again.reasons(2)
        assert all(m.meeting.revealed is None for m in again.members)
        again.close()


async def test_a_degenerate_key_ends_the_attempt_before_anything_is_shown(
    monkeypatch: pytest.MonkeyPatch,
):
    made: list[masks.Ephemeral] = []

    def first_is_degenerate() -> masks.Ephemeral:
        made.append(fresh())
        if len(made) == 1:
            made[0].public = bytes(32)
        return made[-1]

    fresh = masks.Ephemeral
    monkeypatch.setattr(masks, "Ephemeral", first_is_degenerate)
    async with group(3) as g:
        await g.meet()
        assert g.merged() == []
        assert Reason.TAMPERED in g.reasons(0) | g.reasons(1) | g.reasons(2)
        assert all(m.meeting.revealed is None for m in g.members)


async def test_values_too_far_apart_are_merged_by_nobody():
    async with group(3, Grid(16, 2.0**-20)) as g:
        await g.meet()
        assert g.merged() == []
        assert all(Reason.OUT_OF_RANGE in g.reasons(i) for i in range(3))


# What was revealed in vain


async def test_what_was_shown_in_vain_is_shown_after_a_step_only():
    async with group(4) as g:
        await g.meet(0)
        assert g.merged() == []
        assert g.reasons(1) == {Reason.REVEALED_BEFORE} or Reason.NOT_DUE in g.reasons(1)
        assert all(m.meeting.revealed is None for m in g.members)
    async with group(4) as g:
        for member in g.members:
            member.trainer.step = 1
        await g.meet(0)
        assert len(g.merged()) == 4


# Our own troubles


async def test_a_trainer_that_fails_is_told_to_the_others():
    async with group(3) as g:

        async def fails(*_: object, **__: object) -> Any:
            raise TrainerError("it died")

        g.members[1].trainer.snapshot = fails  # type: ignore[method-assign]
        await g.meet()
        assert g.merged() == []
        assert g.reasons(1) == {Reason.TRAINER_RESTARTED}


async def test_a_meeting_that_is_cancelled_lets_go_of_its_links():
    async with group(3) as g:
        member = g.members[0]
        member.meeting = MaskedMeeting(
            member.trainer,
            MeetingPlan(
                meeting_id=1, slot=7, fragment=0, averaging=True, gather_s=0.5,
                expected=list(member.agreements),
            ),
            MaskedGroup(member.peer_id, SWARM, 3, 6.0),
        )  # fmt: skip
        exchanges = [
            asyncio.ensure_future(member.meeting.exchange(a, weighting="equal", deadline_s=9))
            for a in member.agreements.values()
        ]
        running = asyncio.create_task(member.meeting.run())
        first = next(iter(g.members[1].agreements.values()))
        assert isinstance(await first.link.receive(2), MaskStep)
        running.cancel()
        ended = await asyncio.gather(running, *exchanges, return_exceptions=True)
        assert all(isinstance(e, asyncio.CancelledError | PeerError) for e in ended)
        assert all(a.link.closed for a in member.agreements.values())


def test_messages_are_bounded():
    key = MaskStep(1, "key", b"k" * 32)
    assert messages.decode(messages.encode(key)) == key
    for bad in (
        MaskStep(1, "key", b"k" * 31),
        MaskStep(1, "peek", b"d" * 32),  # type: ignore[arg-type]
        MaskStep(-1, "key", b"k" * 32),
    ):
        with pytest.raises(PeerError, match=Reason.MALFORMED):
            messages.decode(messages.encode(bad))


async def test_a_merge_that_fails_after_all_accepted_is_not_taken_for_one():
    """The partners are told of it later: `accepted` names what they merged alone."""
    async with group(3) as g:
        failing = g.members[0]

        async def merge(meeting_id: int, weights: dict[int, float]) -> None:
            failing.trainer.drop(meeting_id)
            raise PeerError(Reason.CLOSED, "the trainer has gone on")

        failing.trainer.merge = merge  # type: ignore[method-assign]
        await g.meet()
        assert g.merged() == [1, 2]
        ended = g.ended[failing.peer_id]
        assert isinstance(ended, PeerError)
        assert ended.reason == Reason.CLOSED
        assert not failing.meeting.merged
        assert set(failing.meeting.accepted) == set(failing.agreements)
        assert [g.ended[m.peer_id] for m in g.members[1:]] == [None, None]
