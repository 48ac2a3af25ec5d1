"""A meeting of two, as gossip runs it."""

from __future__ import annotations

import asyncio

from xpeer.network.agreement import Agreement
from xpeer.round import Exchanged, Meeting, MeetingPlan, Trainer


async def meet(trainer: Trainer, agreement: Agreement, deadline_s: float) -> Exchanged:
    """Exchange with the one partner, and merge."""
    meeting = Meeting(
        trainer,
        MeetingPlan(
            meeting_id=agreement.exchange_id,
            slot=agreement.slot,
            fragment=agreement.fragment,
            averaging=agreement.averaging,
            expected=[agreement.peer_id],
            gather_s=deadline_s,
        ),
    )
    running = asyncio.create_task(meeting.run())
    try:
        return await meeting.exchange(agreement, weighting="equal", deadline_s=deadline_s)
    finally:
        await running
