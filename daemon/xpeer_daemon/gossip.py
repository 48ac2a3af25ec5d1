"""The slot clock: whom we meet now, and what came of it.

At every slot of the shared clock the matching names our partner; the lower PeerID of the two
proposes, the other answers. Training goes on meanwhile. Everything skipped has a reason code.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter, deque
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Protocol

from xpeer.errors import LocalError, PeerError, Reason
from xpeer.identity import PeerId
from xpeer.manifest import Manifest
from xpeer.network import matching
from xpeer.network.exchange import Agreement, Desk, Proposer, UnresolvedError
from xpeer.round import Exchanged, Trainer, exchange
from xpeer.wire.messages import MAX_UNRESOLVED, Propose, Terms

log = logging.getLogger("xpeer.gossip")

PROPOSAL_TIMEOUT_S = 10.0
MAX_FALLBACKS = 2
REMEMBERED = 256
"""Exchange ids per partner, for one-sided merges and replays."""
MAX_PARTNERS = 4096
PATIENT_SLOTS = 2
"""Slots that we were due without an exchange before a partner that is not the slot's may propose:
else one that proposes all the time would be the only one that we ever meet."""


ORDINARY = frozenset({Reason.NO_PARTNER, Reason.NOT_DUE, Reason.BUSY})
"""Reasons that belong to a healthy swarm; logged at debug level."""


class GossipTrainer(Trainer, Protocol):
    """What gossip asks of the trainer beside exchanges."""

    @property
    def epoch(self) -> int:
        """Drawn at its start."""

    @property
    def step(self) -> int:
        """Local steps done."""

    @property
    def ledger_counter(self) -> int:
        """Privacy charges so far."""

    def fragment_params(self, fragment: int) -> int:
        """Parameters in a fragment."""


class Host(Protocol):
    """The node around gossip."""

    @property
    def trainer(self) -> GossipTrainer | None:
        """The running trainer, if it holds the swarm's parameters."""

    def objection(self) -> str | None:
        """Why this node exchanges nothing now (paused, not ready), or None."""

    def training(self) -> bool:
        """Whether local steps are being taken: then exchanges are paced by them."""

    def partners(self) -> Collection[PeerId]:
        """Live members that exchange, without ourselves."""

    def settled(self, peer_id: PeerId) -> bool:
        """Whether the partner and we both ended, so that no exchange is due between us."""

    def declared_rate(self) -> float:
        """Declared tokens per second (relative), for weighting by tokens."""


@dataclass
class Record:
    """What we remember of one partner."""

    done: int = 0
    failed: int = 0
    last_reason: str = ""
    last_done_s: float | None = None
    payload_bytes: int = 0
    """Sent to it, and as many received from it, in merged exchanges."""
    highest_counter: int = 0
    merged: deque[int] = field(default_factory=lambda: deque(maxlen=REMEMBERED))
    unresolved: deque[int] = field(default_factory=lambda: deque(maxlen=MAX_UNRESOLVED))
    seen: deque[int] = field(default_factory=lambda: deque(maxlen=REMEMBERED))
    last_slot: int = -1
    """Of the last exchange: there is one for a pair and slot."""


class Gossip(Desk):
    """Runs exchanges at slots and answers proposals.

    Args:
        me: our PeerID.
        swarm_id: seeds the matching.
        manifest: slots, fragments, codec, weighting, deadlines.
        host: the node.
        proposer: our links.
        num_bytes: exact payload size of (codec, num_values).
        clock: shared wall clock, seconds; slots are numbered by it.
        on_exchanged: told of every merge (partner, slot, fragment, result).
        on_skipped: told of every failure (partner or "", slot, reason, detail).
    """

    def __init__(
        self,
        *,
        me: PeerId,
        swarm_id: str,
        manifest: Manifest,
        host: Host,
        proposer: Proposer,
        num_bytes: Callable[[str, int], int],
        clock: Callable[[], float],
        on_exchanged: Callable[[PeerId, int, int, Exchanged], None],
        on_skipped: Callable[[str, int, str, str], None],
    ) -> None:
        self._me = me
        self._swarm_id = swarm_id
        self._round = manifest.round
        self._host = host
        self._proposer = proposer
        self._num_bytes = num_bytes
        self._clock = clock
        self._on_exchanged = on_exchanged
        self._on_skipped = on_skipped
        self._in_flight: set[int] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._last_start: tuple[int, float] | None = None  # (step, clock)
        self._idle_slots = 0
        self.partners: dict[PeerId, Record] = {}
        self.failures: Counter[str] = Counter()
        self.exchanges = 0
        self.one_sided = 0
        self.values_sent = 0
        self.payload_bytes_sent = 0

    def remember(self, peer_id: PeerId, ledger_counter: int) -> None:
        """What a partner's ledger showed before this start."""
        self._record(peer_id).highest_counter = ledger_counter

    def highest_counter(self, peer_id: PeerId) -> int:
        """The highest count of privacy charges that a partner has shown."""
        record = self.partners.get(peer_id)
        return record.highest_counter if record else 0

    async def run(self) -> None:
        """One slot after another, until cancelled."""
        try:
            slot_s = self._round.slot_s
            slot = matching.slot_number(self._clock(), slot_s)
            while True:
                self._begin(slot)
                await asyncio.sleep((slot + 1) * slot_s - self._clock())
                # a sleep may end a moment early: never the same slot twice
                slot = max(slot + 1, matching.slot_number(self._clock(), slot_s))
        finally:
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)

    def _begin(self, slot: int) -> None:
        partners = self._host.partners()
        if self._host.objection() is not None or not self._due():
            self._idle_slots = 0
            return
        self._idle_slots += 1
        candidates = matching.partner(self._swarm_id, slot, [*partners, self._me], self._me)
        if not candidates:
            if not partners:  # with an odd number of peers, one is left over in every slot
                self._skip("", slot, Reason.NO_PARTNER)
            return
        # The lower PeerID of a pair proposes; the higher one waits for it.
        free = [peer for peer in candidates if not self._proposer.busy_with(peer)]
        ours = [peer for peer in free if self._me < peer and not self._host.settled(peer)]
        if ours and ours[0] == candidates[0]:
            task = asyncio.create_task(self._propose(slot, ours[: 1 + MAX_FALLBACKS]))
            self._tasks.add(task)
            task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("an exchange ended by an error of ours", exc_info=error)

    async def _propose(self, slot: int, candidates: list[PeerId]) -> None:
        trainer = self._host.trainer
        fragment = matching.fragment_of(self._swarm_id, slot, self._round.fragments)
        if trainer is None or fragment in self._in_flight:
            return
        num_values = trainer.fragment_params(fragment)
        for peer_id in candidates:
            try:
                agreement = await self._proposer.propose(
                    peer_id,
                    self,
                    slot=slot,
                    fragment=fragment,
                    codec=self._round.codec,
                    num_values=num_values,
                    num_bytes=self._num_bytes(self._round.codec, num_values),
                    timeout_s=min(PROPOSAL_TIMEOUT_S, self._round.deadline_s),
                )
            except PeerError as e:
                self._skip(peer_id, slot, e.reason, e.detail)
                continue
            healthy = False
            try:
                healthy = await self._exchange(trainer, agreement)
            finally:
                await self._proposer.done(peer_id, healthy=healthy)
            return

    async def _exchange(self, trainer: GossipTrainer, agreement: Agreement) -> bool:
        """Run it and count it; whether the link stays usable."""
        peer_id, slot = agreement.peer_id, agreement.slot
        record = self._record(peer_id)
        record.seen.append(agreement.exchange_id)
        record.last_slot = max(record.last_slot, slot)
        self._in_flight.add(agreement.fragment)
        self._last_start = (trainer.step, self._clock())
        self._idle_slots = 0
        try:
            result = await exchange(
                trainer,
                agreement,
                weighting=self._round.weighting,
                deadline_s=self._round.deadline_s,
            )
        except UnresolvedError as e:
            record.unresolved.append(e.exchange_id)
            self._skip(peer_id, slot, e.reason, e.detail)
            return False
        except PeerError as e:
            self._skip(peer_id, slot, e.reason, e.detail)
            return False
        except LocalError as e:  # the trainer died, or reaches no step boundary
            self._skip(peer_id, slot, Reason.TRAINER_RESTARTED, str(e))
            return False
        finally:
            self._in_flight.discard(agreement.fragment)
        record.merged.append(agreement.exchange_id)
        record.done += 1
        record.last_done_s = self._clock()
        record.payload_bytes += result.num_bytes
        self.exchanges += 1
        self.values_sent += result.num_values
        self.payload_bytes_sent += result.num_bytes
        self._on_exchanged(peer_id, slot, agreement.fragment, result)
        return True

    # The answering side (Desk)

    def terms(self, peer_id: PeerId) -> Terms:
        """Our terms towards this partner; what is unresolved is told once."""
        trainer = self._host.trainer
        if trainer is None:
            raise PeerError(Reason.NOT_READY, "no trainer")
        record = self._record(peer_id)
        unresolved = list(record.unresolved)
        record.unresolved.clear()
        return Terms(
            weight=self._host.declared_rate(),
            epoch=trainer.epoch,
            ledger_counter=trainer.ledger_counter,
            unresolved=unresolved,
        )

    def objection(self, peer_id: PeerId, proposal: Propose) -> str | None:
        """Why we do not take part in this proposal, or None."""
        trainer = self._host.trainer
        if trainer is None:
            return Reason.NOT_READY
        if (reason := self._host.objection()) is not None:
            return reason
        patience = max(2, round(PROPOSAL_TIMEOUT_S / self._round.slot_s))
        now = matching.slot_number(self._clock(), self._round.slot_s)
        fragment = matching.fragment_of(self._swarm_id, proposal.slot, self._round.fragments)
        if abs(proposal.slot - now) > patience or proposal.fragment != fragment:
            return Reason.WRONG_SLOT
        if proposal.codec != self._round.codec:
            return Reason.WRONG_CODEC
        if proposal.num_values != trainer.fragment_params(fragment):
            return Reason.WRONG_MODEL
        record = self._record(peer_id)
        if proposal.exchange_id in record.seen or proposal.slot <= record.last_slot:
            return Reason.REPLAYED
        if fragment in self._in_flight:
            return Reason.BUSY
        if not self._due() or self._host.settled(peer_id):
            return Reason.NOT_DUE
        if self._idle_slots < PATIENT_SLOTS and not self._matched(peer_id, proposal.slot):
            return Reason.NOT_DUE
        return None

    def _matched(self, peer_id: PeerId, slot: int) -> bool:
        """Whether the slot's matching, as we see it, pairs us."""
        members = {*self._host.partners(), self._me, peer_id}
        return matching.partner(self._swarm_id, slot, members, self._me)[:1] == [peer_id]

    def settled_before(self, peer_id: PeerId, theirs: Terms) -> None:
        """Count merges that the partner reports as one-sided, and watch its ledger."""
        record = self._record(peer_id)
        for exchange_id in theirs.unresolved:
            if exchange_id in record.merged:
                record.merged.remove(exchange_id)
                self.one_sided += 1
        if theirs.ledger_counter < record.highest_counter:
            raise PeerError(
                Reason.LEDGER_WENT_BACK,
                f"{theirs.ledger_counter} charges now, {record.highest_counter} before",
            )
        record.highest_counter = theirs.ledger_counter

    async def take_part(self, agreement: Agreement) -> None:
        """Run the exchange that a lower PeerID proposed and we agreed to."""
        trainer = self._host.trainer
        if trainer is None or not await self._exchange(trainer, agreement):
            raise PeerError(Reason.CLOSED, "the exchange failed; its link is dropped")

    # Pace

    def _due(self) -> bool:
        """Whether the window's pace allows another exchange: F of them in H steps or window_s."""
        trainer = self._host.trainer
        if trainer is None:
            return False
        if self._last_start is None or not self._host.training():
            return True
        step, started = self._last_start
        fragments = self._round.fragments
        if (trainer.step - step) * fragments >= self._round.window_steps:
            return True
        window_s = self._round.window_s
        return window_s is not None and (self._clock() - started) * fragments >= window_s

    def _record(self, peer_id: PeerId) -> Record:
        record = self.partners.get(peer_id)
        if record is None:
            record = self.partners[peer_id] = Record()
            if len(self.partners) > MAX_PARTNERS:
                del self.partners[next(iter(self.partners))]
        return record

    def _skip(self, peer_id: PeerId | str, slot: int, reason: str, detail: str = "") -> None:
        self.failures[reason] += 1
        if peer_id:
            record = self._record(PeerId(peer_id))
            record.failed += 1
            record.last_reason = reason
        level = logging.DEBUG if reason in ORDINARY else logging.INFO
        log.log(
            level, "slot %d skipped with %s: %s %s", slot, peer_id[-8:] or "nobody", reason, detail
        )
        self._on_skipped(peer_id, slot, reason, detail)
