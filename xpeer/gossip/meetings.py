"""This node's meetings, one for each fragment at most: who may join them, and how they end."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Coroutine
from typing import Any

from xpeer.errors import LocalError, PeerError, Reason
from xpeer.gossip import matching
from xpeer.gossip.masked import MaskedGroup, MaskedMeeting
from xpeer.gossip.partners import Partners
from xpeer.gossip.view import GossipTrainer
from xpeer.identity import PeerId
from xpeer.manifest.round import Round
from xpeer.round import Meeting, MeetingPlan

MIN_GATHER_S, GATHER_SLOTS = 2.0, 2
"""Time that partners have to begin their exchange, in seconds and in slots; the longer one counts.
After it the others are merged without them."""


class Meetings:
    """The meetings that run now.

    Args:
        me: our PeerID.
        swarm_id: determines which fragment a slot exchanges.
        rules: section `round` of the manifest.
        partners: remembers how exchanges went.
        spawn: runs a meeting to its end.
        due_again: called when a masked group was not complete and nothing was revealed, so that
            the exchange does not count for the pace.

    Attributes:
        stride: groups begin to meet in every `stride`-th slot. That is as many slots as members
            wait for one another, so that whoever missed one meeting is free for the next, and so
            are all who waited for it.
    """

    def __init__(
        self,
        *,
        me: PeerId,
        swarm_id: str,
        rules: Round,
        partners: Partners,
        spawn: Callable[[Coroutine[Any, Any, None]], None],
        due_again: Callable[[], None],
    ) -> None:
        self._us = MaskedGroup(me, swarm_id, rules.group, rules.deadline_s)
        self._rules = rules
        self._partners = partners
        self._spawn = spawn
        self._due_again = due_again
        self._running: dict[int, Meeting | MaskedMeeting] = {}  # by fragment
        # Fragment -> local step of values that were revealed but not merged
        self._revealed: dict[int, int] = {}
        self._epoch: int | None = None  # of the trainer that revealed them; None until there is one
        self._last_id = 0
        self._gather_s = max(MIN_GATHER_S, GATHER_SLOTS * rules.slot_s)
        self.stride = math.ceil(self._gather_s / rules.slot_s)

    def __contains__(self, fragment: int) -> bool:
        """Whether a fragment is being exchanged."""
        return fragment in self._running

    def __len__(self) -> int:
        """How many fragments are being exchanged."""
        return len(self._running)

    def joinable(self, slot: int, fragment: int, averaging: bool, peer_id: PeerId) -> bool:
        """Whether an exchange with this partner can begin a meeting, or join its group's."""
        meeting = self._running.get(fragment)
        return meeting is None or (
            (meeting.slot, meeting.averaging) == (slot, averaging) and meeting.expects(peer_id)
        )

    def join(
        self,
        trainer: GossipTrainer,
        slot: int,
        *,
        averaging: bool,
        expected: Collection[PeerId],
    ) -> Meeting | MaskedMeeting | None:
        """The slot's meeting; one is begun if there is none.

        Returns:
            None if the fragment is in the meeting of another slot, or in one that is closed.
        """
        fragment = matching.fragment_of(self._us.swarm_id, slot, self._rules.fragments)
        meeting = self._running.get(fragment)
        if meeting is not None:
            same = (meeting.slot, meeting.averaging) == (slot, averaging)
            return meeting if same and not meeting.closed else None
        self._last_id += 1
        plan = MeetingPlan(
            meeting_id=self._last_id,
            slot=slot,
            fragment=fragment,
            averaging=averaging,
            expected=expected,
            gather_s=self._gather_s,
        )
        if self._rules.masks:
            self._note_trainer(trainer)
            before = self._revealed.get(fragment)
            meeting = MaskedMeeting(trainer, plan, self._us, before)
        else:
            meeting = Meeting(trainer, plan, self._rules.least_group)
        self._running[fragment] = meeting
        self._spawn(self._run_meeting(meeting, trainer.epoch))
        return meeting

    def give_up(self, peer_id: PeerId, slot: int, fragment: int) -> None:
        """Let the slot's meeting wait for this partner no longer."""
        meeting = self._running.get(fragment)
        if meeting is not None and meeting.slot == slot:
            meeting.give_up(peer_id)

    async def _run_meeting(self, meeting: Meeting | MaskedMeeting, epoch: int) -> None:
        """Run a meeting until its merge is queued or it failed, and note how it ended."""
        try:
            await meeting.run()
            for peer_id in meeting.missing:
                if peer_id < self._us.me:
                    self._partners.count_no_exchange(peer_id, meeting.slot, Reason.NOT_PROPOSED)
        except (PeerError, LocalError) as e:
            for peer_id, exchange_id in meeting.accepted.items():  # the partners merged, we did not
                self._partners[peer_id].ids.unresolved(exchange_id)
            reason = e.reason if isinstance(e, PeerError) else Reason.TRAINER_RESTARTED
            self._partners.count_no_exchange("", meeting.slot, reason, str(e))
        finally:
            del self._running[meeting.fragment]
            if isinstance(meeting, MaskedMeeting):
                self._note_revealed(meeting, epoch)

    def _note_trainer(self, trainer: GossipTrainer) -> None:
        """Begin anew with a new trainer. One that resumed has the values of its checkpoint. They
        may have been revealed before, and nobody knows to whom: no group may see them before the
        trainer has taken a step.
        """
        if trainer.epoch != self._epoch:
            self._epoch, self._revealed = trainer.epoch, {}
            if trainer.resumed_step is not None:
                fragments = range(self._rules.fragments)
                self._revealed = dict.fromkeys(fragments, trainer.resumed_step)

    def _note_revealed(self, meeting: MaskedMeeting, epoch: int) -> None:
        if not meeting.merged and meeting.revealed is None:
            self._due_again()
        elif epoch != self._epoch:
            return  # the values were those of a trainer that is gone
        elif meeting.merged:
            self._revealed.pop(meeting.fragment, None)
        elif meeting.revealed is not None:
            self._revealed[meeting.fragment] = meeting.revealed
