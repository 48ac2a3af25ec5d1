"""Members of a masked group who lie: all notice it before anything is shown, or nobody merges."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.unit.gossip.masked_groups import Group, Member, group
from xpeer.errors import Reason
from xpeer.gossip import masks
from xpeer.identity import PeerId
from xpeer.wire.messages import MaskStep


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
