"""The slot clock: it begins our meetings, and answers proposals.

At every slot of the shared clock the matching names our partner, or our group. Of any two members
the one with the lower PeerID proposes and the other answers. Training goes on meanwhile. A slot in
which an exchange was due and none began is counted with a reason.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
from collections.abc import Awaitable, Callable, Collection, Coroutine
from typing import Any

from xpeer.errors import LocalError, PeerError, Reason
from xpeer.forms import Form
from xpeer.gossip import matching
from xpeer.gossip.company import PAIR, Company
from xpeer.gossip.meetings import Meetings
from xpeer.gossip.pace import Pace, Start
from xpeer.gossip.partners import Partners
from xpeer.gossip.view import GossipTrainer, NodeView
from xpeer.identity import PeerId
from xpeer.manifest import Manifest
from xpeer.network.agreement import Agreement, ProposalHandler, Proposer, UnresolvedError
from xpeer.wire.messages import Propose, Terms

log = logging.getLogger("xpeer.gossip")

PROPOSAL_TIMEOUT_S = 10.0
MAX_FALLBACKS = 2
PATIENT_SLOTS = 2
"""After this many slots in which an exchange was due and none began, we accept proposals of members
that the slot does not match with us. If we always did, a member that proposes all the time would be
the only one that we ever meet."""


class Gossip(ProposalHandler):
    """Runs exchanges at slots and answers proposals.

    Args:
        me: our PeerID.
        swarm_id: seed of the matching.
        manifest: says slots, fragments, codec, weighting and deadlines.
        host: the node.
        proposer: sends proposals over our links.
        nudge: asks a member with a lower PeerID to propose to us.
        clock: shared wall clock, seconds; it numbers the slots.
        partners: remembers how exchanges went.
    """

    def __init__(
        self,
        *,
        me: PeerId,
        swarm_id: str,
        manifest: Manifest,
        host: NodeView,
        proposer: Proposer,
        nudge: Callable[[PeerId], Awaitable[None]],
        clock: Callable[[], float],
        partners: Partners,
    ) -> None:
        self._me = me
        self._swarm_id = swarm_id
        self._round = manifest.round
        self._host = host
        self._proposer = proposer
        self._nudge = nudge
        self._clock = clock
        self._partners = partners
        self._company = Company(me, swarm_id, manifest.round, host, partners)
        self._weighting = self._round.policy.weighting
        self._pace = Pace(manifest.round)
        self._meetings = Meetings(
            me=me,
            swarm_id=swarm_id,
            rules=manifest.round,
            partners=partners,
            spawn=self._spawn,
            due_again=self._pace.again,
        )
        self._tasks: set[asyncio.Task[None]] = set()
        self._last_partner = ""
        self._idle_slots = 0
        # Who is to propose to us, and since which slot; None = nobody is, or it has proposed
        self._awaited: tuple[PeerId, int] | None = None

    async def run(self) -> None:
        """Begin one slot after another, until cancelled."""
        try:
            slot_s = self._round.slot_s
            slot = matching.slot_number(self._clock(), slot_s)
            while True:
                self._begin_slot(slot)
                await asyncio.sleep((slot + 1) * slot_s - self._clock())
                # a sleep may end a moment early: never the same slot twice
                slot = max(slot + 1, matching.slot_number(self._clock(), slot_s))
        finally:
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)

    def _begin_slot(self, slot: int) -> None:
        partners = self._host.partners()
        awaited, self._awaited = self._awaited, None
        if awaited is not None:
            self._partners.count_no_exchange(*awaited, Reason.NOT_PROPOSED)
        if self._host.idle_reason() is not None or not self._due():
            self._idle_slots = 0
            return
        self._idle_slots += 1
        if not partners:
            self._partners.count_no_exchange("", slot, Reason.NO_PARTNER)
        elif self._asynchronous():
            self._meet_anybody(slot, partners)
        elif self._round.group == PAIR:
            self._meet_partner(slot, partners)
        else:
            self._meet_group(slot)

    def _meet_partner(self, slot: int, partners: Collection[PeerId]) -> None:
        """Propose to the slot's partner if our PeerID is the lower one; else wait for its proposal.
        If we avoid that partner, propose to a fallback at once; the matching stays as it is.
        """
        candidates = self._company.candidates(slot)
        if not candidates:
            detail = "the others meet one another"
            self._partners.count_no_exchange("", slot, Reason.NO_PARTNER, detail)
            return
        avoided, first = self._company.avoided(), candidates[0]
        if first in avoided:
            self._partners.count_no_exchange(first, slot, Reason.AVOIDED)
        elif first < self._me and not self._company.has_nothing_due(first, slot):
            self._awaited = first, slot
        elif self._proposer.busy_with(first):
            self._partners.count_no_exchange(first, slot, Reason.BUSY)
        free = [peer for peer in candidates if peer not in avoided]
        ours = [peer for peer in free if self._may_propose(peer, slot)]
        if ours and (first in avoided or ours[0] == first):
            self._spawn(self._propose(slot, ours[: 1 + MAX_FALLBACKS]))

    def _meet_group(self, slot: int) -> None:
        """Propose to the members of our group with higher PeerIDs, and wait for the lower ones.

        Groups begin in every `Meetings.stride`-th slot: if members began in any slot, they would
        wait for one another in turn. A masked group needs all its members, so that nobody may be in
        two of them.
        """
        if slot % self._meetings.stride or (self._round.masks and len(self._meetings)):
            return
        company = self._company.group_without_avoided(slot)
        others = [peer for peer in company if not self._company.has_nothing_due(peer, slot)]
        trainer = self._host.trainer
        if trainer is None or not others:
            return
        least = self._round.least_group
        if 1 + len(others) < least:
            detail = f"the slot leaves {1 + len(others)} of {least} for us"
            self._partners.count_no_exchange("", slot, Reason.GROUP_TOO_SMALL, detail)
            return
        meeting = self._meetings.join(trainer, slot, averaging=self._averaging(), expected=others)
        if meeting is None:
            return
        for peer_id in others:
            if self._may_propose(peer_id, slot):
                self._spawn(self._propose(slot, [peer_id]))

    def _meet_anybody(self, slot: int, partners: Collection[PeerId]) -> None:
        """Choose any partner and propose to it, or have it propose if its PeerID is the lower one.
        An asynchronous rule uses no matching.
        """
        avoided = self._company.avoided()
        free = [peer for peer in partners if peer not in avoided]
        others = [peer for peer in free if peer != self._last_partner] or free
        if not others:
            self._partners.count_no_exchange("", slot, Reason.AVOIDED, "all partners are avoided")
            return
        peer_id = random.SystemRandom().choice(others)
        if self._may_propose(peer_id, slot):
            self._spawn(self._propose(slot, [peer_id]))
        elif self._me > peer_id:
            self._awaited = peer_id, slot
            self._spawn(self._ask_for_proposal(peer_id))

    async def _ask_for_proposal(self, peer_id: PeerId) -> None:
        with contextlib.suppress(PeerError):  # the next slot asks another partner
            await self._nudge(peer_id)

    def nudged(self, peer_id: PeerId) -> None:
        """Propose to a member with a higher PeerID that has just asked for it, if we may."""
        slot = matching.slot_number(self._clock(), self._round.slot_s)
        if (
            self._asynchronous()
            and self._host.idle_reason() is None
            and peer_id in self._host.partners()
            and peer_id not in self._company.avoided()
            and self._may_propose(peer_id, slot)
            and slot > self._partners[peer_id].ids.last_slot
        ):
            self._spawn(self._propose(slot, [peer_id]))

    def _may_propose(self, peer_id: PeerId, slot: int) -> bool:
        busy = self._proposer.busy_with(peer_id)
        return self._me < peer_id and not busy and not self._company.has_nothing_due(peer_id, slot)

    def _averaging(self) -> bool:
        """Whether our meetings average plainly. Masked groups always do, so that all agree."""
        return self._round.masks or not self._host.training()

    def _asynchronous(self) -> bool:
        """Whether we meet without a matching now. Once training is over, everybody uses it."""
        return not self._round.policy.uses_slots and self._host.training()

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._discard_task)

    def _discard_task(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("an exchange ended by an error of ours", exc_info=error)

    async def _propose(self, slot: int, candidates: list[PeerId]) -> None:
        """Propose to one candidate after another until one agrees, then exchange with it."""
        trainer = self._host.trainer
        fragment = matching.fragment_of(self._swarm_id, slot, self._round.fragments)
        averaging = self._averaging()
        if trainer is None:
            return
        if not self._meetings.joinable(slot, fragment, averaging, candidates[0]):
            return
        num_values = trainer.fragment_values(fragment, averaging=averaging)
        form = Form(self._round.payload_codec, num_values)
        for peer_id in candidates:
            began = self._clock()
            try:
                agreement = await self._proposer.propose(
                    peer_id,
                    self,
                    slot=slot,
                    fragment=fragment,
                    averaging=averaging,
                    form=form,
                    timeout_s=min(PROPOSAL_TIMEOUT_S, self._round.deadline_s),
                )
            except PeerError as e:
                self._meetings.give_up(peer_id, slot, fragment)
                self._partners.failed(peer_id, slot, e, lost_s=self._clock() - began)
                continue
            healthy = False
            try:
                healthy = await self._exchange(trainer, agreement)
            finally:
                await self._proposer.done(peer_id, healthy=healthy)
            return

    async def _exchange(self, trainer: GossipTrainer, agreement: Agreement) -> bool:
        """Run an exchange and count its result; returns whether the link stays usable."""
        peer_id, slot = agreement.peer_id, agreement.slot
        self._partners.began(agreement)
        self._last_partner = peer_id
        is_pair, averaging = self._round.group == PAIR, agreement.averaging
        expected = [peer_id] if is_pair else self._company.group_without_avoided(slot)
        meeting = self._meetings.join(trainer, slot, averaging=averaging, expected=expected)
        began = self._clock()
        start: Start | None = None
        try:
            if meeting is None or not meeting.expects(peer_id):
                await agreement.refuse(Reason.BUSY)
                raise PeerError(Reason.BUSY, "the fragment is in another meeting")
            start = self._pace.began(trainer, began)
            self._idle_slots = 0
            deadline_s = self._partners.deadline_s(peer_id, self._round.deadline_s)
            result = await meeting.exchange(
                agreement, weighting=self._weighting, deadline_s=deadline_s
            )
        except PeerError as e:
            if isinstance(e, UnresolvedError):
                self._partners[peer_id].ids.unresolved(e.exchange_id)
            self._partners.failed(peer_id, slot, e, agreement, self._clock() - began)
            self._allow_another(start)
            return False
        except LocalError as e:  # the trainer died, or reaches no step boundary
            self._partners.count_no_exchange(peer_id, slot, Reason.TRAINER_RESTARTED, str(e))
            self._allow_another(start)
            return False
        self._partners.done(agreement, result, self._clock() - began)
        return True

    def _allow_another(self, start: Start | None) -> None:
        """Have the pace not count a pair's failed exchange. A group's meeting goes on."""
        if start is not None and self._round.group == PAIR:
            self._pace.failed(start)

    # The answering side (ProposalHandler)

    def terms(self, peer_id: PeerId, slot: int) -> Terms:
        """Our terms towards this partner. Unresolved exchanges are in them once."""
        trainer = self._host.trainer
        if trainer is None:
            raise PeerError(Reason.NOT_READY, "no trainer")
        weight, group_weight = self._weights(peer_id, slot)
        loss, age = self._host.quality() if self._weighting == "quality" else (None, 0.0)
        return Terms(
            weight=weight,
            group_weight=group_weight,
            loss_public=loss,
            loss_age=age,
            epoch=trainer.epoch,
            ledger_counter=trainer.ledger_counter,
            unresolved=self._partners.take_unresolved(peer_id),
        )

    def _weights(self, peer_id: PeerId, slot: int) -> tuple[float, float]:
        """n_i, and the sum of n over our group in the slot, ourselves included."""
        others = [peer_id] if self._round.group == PAIR else self._company.group(slot)
        if self._weighting != "tokens":
            return 1.0, 1.0 + len(others)
        own = self._host.declared_rate(self._me)
        return own, own + sum(self._host.declared_rate(peer) for peer in others)

    def refusal_of(self, peer_id: PeerId, proposal: Propose) -> str | None:
        """Why we refuse this proposal: a reason code. None = we accept it."""
        trainer = self._host.trainer
        if trainer is None:
            return Reason.NOT_READY
        if (reason := self._host.idle_reason()) is not None:
            return reason
        if not self._host.may_exchange(peer_id):
            return Reason.NOT_DUE
        if self._company.shunned(peer_id):
            return Reason.AVOIDED
        patience = max(2, round(PROPOSAL_TIMEOUT_S / self._round.slot_s))
        now = matching.slot_number(self._clock(), self._round.slot_s)
        fragment = matching.fragment_of(self._swarm_id, proposal.slot, self._round.fragments)
        if abs(proposal.slot - now) > patience or proposal.fragment != fragment:
            return Reason.WRONG_SLOT
        if proposal.codec != self._round.payload_codec:
            return Reason.WRONG_CODEC
        if proposal.num_values != trainer.fragment_values(fragment, averaging=proposal.averaging):
            return Reason.WRONG_MODEL
        record = self._partners[peer_id]
        if record.ids.is_replay(proposal.exchange_id, proposal.slot):
            return Reason.REPLAYED
        if not self._meetings.joinable(proposal.slot, fragment, proposal.averaging, peer_id):
            return Reason.BUSY
        return None if self._is_due_with(peer_id, proposal, fragment) else Reason.NOT_DUE

    def _is_due_with(self, peer_id: PeerId, proposal: Propose, fragment: int) -> bool:
        """Whether an exchange is due between us, by the window's pace and the slot's matching."""
        if self._company.has_nothing_due(peer_id, proposal.slot):
            return False
        if self._host.training() and proposal.averaging and self._round.policy.waits:
            return False  # averaging would move the parameters under the gathered gradients
        if not self._host.training() and not proposal.averaging:
            return False  # it does not know yet that we take no more steps
        if fragment in self._meetings:  # the meeting of its group, which expects it
            return True
        if self._asynchronous():
            return peer_id != self._last_partner or len(self._host.partners()) == 1
        return self._due() and (
            self._idle_slots >= PATIENT_SLOTS
            or self._company.matched(peer_id, proposal.slot)
            or self._company.left_free(proposal.slot)
        )

    def before_agreement(self, peer_id: PeerId, theirs: Terms) -> None:
        """See `Partners.reconcile`. Every proposal to us comes here first."""
        if self._awaited is not None and self._awaited[0] == peer_id:
            self._awaited = None
        self._partners.reconcile(peer_id, theirs)

    async def take_part(self, agreement: Agreement) -> None:
        """Run an exchange that a member with a lower PeerID proposed and we agreed to."""
        trainer = self._host.trainer
        if trainer is None or not await self._exchange(trainer, agreement):
            raise PeerError(Reason.CLOSED, "the exchange failed; its link is dropped")

    # Pace

    def _due(self) -> bool:
        """Whether the pace allows another exchange. A node that takes no steps has no pace."""
        trainer = self._host.trainer
        if trainer is None:
            return False
        return not self._host.training() or self._pace.due(trainer, self._clock())
