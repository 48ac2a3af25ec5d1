"""This node's meetings, at most one of each fragment: who may join them, and how they end."""

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
from xpeer.manifest import Round
from xpeer.round import Given, Meeting

MIN_GATHER_S, GATHER_SLOTS = 2.0, 2
"""An exchange that has not begun after this long does not hold up the merge of the others."""


class Meetings:
    """What is being exchanged now.

    Args:
        me: our PeerID.
        swarm_id: says which fragment a slot exchanges.
        rules: of the manifest.
        partners: the book.
        keep: runs a meeting to its end.
        due_again: a masked group did not come together: the window's pace has lost nothing.

    Attributes:
        stride: slots between two at which groups begin to meet: as many as their members wait for
            one another. Whoever missed one is there for the next, as is everybody who waited.
    """

    def __init__(
        self,
        *,
        me: PeerId,
        swarm_id: str,
        rules: Round,
        partners: Partners,
        keep: Callable[[Coroutine[Any, Any, None]], None],
        due_again: Callable[[], None],
    ) -> None:
        self._us = MaskedGroup(me, swarm_id, rules.group, rules.deadline_s)
        self._rules = rules
        self._partners = partners
        self._keep = keep
        self._due_again = due_again
        self._running: dict[int, Meeting | MaskedMeeting] = {}  # by fragment
        self._revealed: dict[int, int] = {}  # in vain: local steps by fragment
        self._epoch: int | None = None  # of the trainer that revealed it
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
        """Whether an exchange with this partner can begin, or join its group's meeting."""
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
        """The slot's meeting, begun if need be; None = the fragment is in another one."""
        fragment = matching.fragment_of(self._us.swarm_id, slot, self._rules.fragments)
        meeting = self._running.get(fragment)
        if meeting is not None:
            same = (meeting.slot, meeting.averaging) == (slot, averaging)
            return meeting if same and not meeting.closed else None
        self._last_id += 1
        given = Given(
            meeting_id=self._last_id,
            slot=slot,
            fragment=fragment,
            averaging=averaging,
            expected=expected,
            gather_s=self._gather_s,
        )
        if self._rules.masks:
            self._follow(trainer)
            before = self._revealed.get(fragment)
            meeting = MaskedMeeting(trainer, self._us, before, **given)
        else:
            meeting = Meeting(trainer, self._rules.least_group, **given)
        self._running[fragment] = meeting
        self._keep(self._hold(meeting, trainer.epoch))
        return meeting

    def give_up(self, peer_id: PeerId, slot: int, fragment: int) -> None:
        """There will be no exchange with this one in this slot."""
        meeting = self._running.get(fragment)
        if meeting is not None and meeting.slot == slot:
            meeting.give_up(peer_id)

    async def _hold(self, meeting: Meeting | MaskedMeeting, epoch: int) -> None:
        """Until everybody's exchange has ended and what was accepted is merged."""
        try:
            await meeting.run()
        except (PeerError, LocalError) as e:
            for peer_id, exchange_id in meeting.accepted.items():  # they merged, we did not
                self._partners[peer_id].ids.unresolved(exchange_id)
            reason = e.reason if isinstance(e, PeerError) else Reason.TRAINER_RESTARTED
            self._partners.skipped("", meeting.slot, reason, str(e))
        finally:
            del self._running[meeting.fragment]
            if isinstance(meeting, MaskedMeeting):
                self._remember(meeting, epoch)

    def _follow(self, trainer: GossipTrainer) -> None:
        """A trainer that resumes is back at values that may have been shown, to nobody knows whom:
        no group may see them until it has taken a step.
        """
        if trainer.epoch != self._epoch:
            self._epoch, self._revealed = trainer.epoch, {}
            if trainer.resumed_step is not None:
                fragments = range(self._rules.fragments)
                self._revealed = dict.fromkeys(fragments, trainer.resumed_step)

    def _remember(self, meeting: MaskedMeeting, epoch: int) -> None:
        if not meeting.merged and meeting.revealed is None:
            self._due_again()
        elif epoch != self._epoch:
            return  # values of a trainer that is gone
        elif meeting.merged:
            self._revealed.pop(meeting.fragment, None)
        elif meeting.revealed is not None:
            self._revealed[meeting.fragment] = meeting.revealed
