"""A masked group: the mean, drop-outs at every step, and troubles of our own."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.unit.gossip.masked_groups import GRID, Group, Member, N, group, mean_of
from tests.unit.network.test_agreement import SWARM
from xpeer.errors import PeerError, Reason, TrainerError
from xpeer.gossip.masked import MaskedGroup, MaskedMeeting
from xpeer.identity import PeerId
from xpeer.network.agreement import UnresolvedError
from xpeer.round import Exchanged, MeetingPlan
from xpeer.wire import messages
from xpeer.wire.fixedpoint import Grid
from xpeer.wire.messages import Accept, MaskStep, Payload


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

                agreement.link.receive_bulk = tap  # type: ignore[method-assign]
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
