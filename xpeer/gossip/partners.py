"""What we remember of every partner, and what came of all exchanges.

What belongs to the schedule is counted apart from failures: a slot without a partner, or a partner
that is not due or busy, is nobody's fault.
"""

from __future__ import annotations

import logging
import statistics
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping

from xpeer.errors import PeerError, Reason
from xpeer.gossip.record import LedgerState, LedgerWatch, Record
from xpeer.identity import PeerId
from xpeer.network.agreement import Agreement, UnresolvedError
from xpeer.network.link import RefusedError
from xpeer.network.rates import Rates
from xpeer.round import Exchanged
from xpeer.wire.messages import Terms

log = logging.getLogger("xpeer.gossip")

MAX_PARTNERS = 4096
MIN_DEADLINE_S, DEADLINE_MULTIPLE = 5.0, 4.0
"""A partner may take this many times as long as its exchanges took so far."""
FIRST_MULTIPLE = 8.0
"""One that we never exchanged with may take this many times as long as the others' do, in the
median."""

ORDINARY = frozenset(
    {
        Reason.NO_PARTNER, Reason.NOT_DUE, Reason.BUSY, Reason.GROUP_TOO_SMALL, Reason.PAUSED,
        Reason.AVOIDED,
    }
)  # fmt: skip
"""Reasons that belong to a healthy swarm's schedule: no failures, and logged at debug level."""
_NOT_THEIRS = frozenset({Reason.TRAINER_RESTARTED, Reason.SIDECAR_DOWN, Reason.LEDGER_WENT_BACK})
"""Failures for which a partner is not left alone: ours, and what ends when its ledger has caught
up."""


class Events:
    """What happens to partners; by itself it notes nothing."""

    def name_of(self, peer_id: PeerId) -> str:
        """What people call a partner, for the log."""
        return peer_id[-8:]

    def exchanged(self, agreement: Agreement, result: Exchanged, took_s: float) -> None:
        """An exchange is done, after so many seconds."""

    def skipped(self, peer_id: str, slot: int, reason: str, detail: str) -> None:
        """Nothing came of an exchange with a partner, or ("") with nobody."""

    def went_back(self, peer_id: PeerId, highest_counter: int, detail: str) -> None:
        """A ledger shows fewer charges than it once did; said once an hour at most."""

    def caught_up(self, peer_id: PeerId) -> None:
        """It shows as many again, once for each time that it was said to have gone back."""


class Partners:
    """The record of every partner, and counts over all of them.

    Args:
        clock: shared wall clock, seconds.
        events: learns what happens.
        slot_s: of the manifest.
        rates: learns how fast exchanges are.

    Attributes:
        failures: how often each reason occurred.
        skips: the same of reasons that belong to the schedule.
        exchanges: done, with anybody.
        last_done_s: when the last one was done; None until there is one.
        one_sided: merges that the partner reported as its own failure.
        values_sent: in all.
        payload_bytes_sent: in all.
    """

    def __init__(
        self,
        clock: Callable[[], float],
        events: Events | None = None,
        slot_s: float = 1.0,
        rates: Rates | None = None,
    ) -> None:
        self._rates = rates or Rates()
        self._clock = clock
        self._events = events or Events()
        self._slot_s = slot_s
        self._num_partners = 1
        self._records: dict[PeerId, Record] = {}
        self.failures: Counter[str] = Counter()
        self.skips: Counter[str] = Counter()
        self.exchanges = 0
        self.last_done_s: float | None = None
        self.one_sided = 0
        self.values_sent = 0
        self.payload_bytes_sent = 0

    def __getitem__(self, peer_id: PeerId) -> Record:
        """A partner's record, made if need be."""
        record = self._records.get(peer_id)
        if record is None:
            record = self._records[peer_id] = Record()
            if len(self._records) > MAX_PARTNERS:
                del self._records[next(iter(self._records))]
        return record

    def get(self, peer_id: PeerId) -> Record | None:
        """A partner's record, if there is one."""
        return self._records.get(peer_id)

    def began(self, agreement: Agreement) -> Record:
        """An exchange was agreed to."""
        record = self[agreement.peer_id]
        record.ids.began(agreement.exchange_id, agreement.slot)
        return record

    def done(self, agreement: Agreement, result: Exchanged, took_s: float) -> None:
        """Both sides accepted."""
        record, form, now_s = self[agreement.peer_id], agreement.form, self._clock()
        record.exchanged(agreement.exchange_id, form.num_bytes, took_s, now_s)
        record.backoff.done(now_s, self._turn_s, clipped=result.clipped)
        self._rates.saw(agreement.peer_id, form.num_bytes, took_s)
        self.exchanges += 1
        self.last_done_s = now_s
        self.values_sent += form.num_values
        self.payload_bytes_sent += form.num_bytes
        self._events.exchanged(agreement, result, took_s)

    def failed(
        self,
        peer_id: PeerId,
        slot: int,
        error: PeerError,
        agreement: Agreement | None = None,
        lost_s: float = 0.0,
    ) -> None:
        """It was proposed, or agreed to, and nothing came of it.

        Args:
            peer_id: the partner.
            slot: of the exchange.
            error: why.
            agreement: what it had agreed to, if it had.
            lost_s: how long that took.
        """
        record = self[peer_id]
        if isinstance(error, RefusedError) and error.reason == Reason.LEDGER_WENT_BACK:
            if record.ledger.refused():
                log.warning(
                    "%s says that our privacy ledger went back, and does not meet us until it has "
                    "caught up",
                    peer_id,
                )
        self._hold_against(record, error, agreement, lost_s)
        self.skipped(peer_id, slot, error.reason, error.detail)

    def _hold_against(
        self, record: Record, error: PeerError, agreement: Agreement | None, lost_s: float
    ) -> None:
        now_s, backoff = self._clock(), record.backoff
        if error.reason in _NOT_THEIRS:
            return
        refused = isinstance(error, RefusedError) and agreement is None
        if refused or error.reason in ORDINARY:
            if isinstance(error, RefusedError):
                backoff.refused(now_s, self._turn_s, error.reason)
            return
        if error.reason == Reason.TIMEOUT or isinstance(error, UnresolvedError):
            backoff.timed_out()
        agreed = agreement is not None
        backoff.failed(now_s, self._turn_s, lost_s, error.reason, agreed=agreed)

    @property
    def _turn_s(self) -> float:
        return self._slot_s * self._num_partners

    def avoided(self, partners: Collection[PeerId], *, proposing: bool = True) -> frozenset[PeerId]:
        """Who is left alone for a while: we do not propose to them.

        If more than half of the partners fail, the fault is more likely ours: nobody is avoided.

        Args:
            partners: all that are alive.
            proposing: we to them; else they to us.
        """
        self._num_partners = max(1, len(partners))
        now_s = self._clock()
        records = {peer: self._records[peer] for peer in partners if peer in self._records}
        paused = {peer: r for peer, r in records.items() if r.backoff.active(now_s)}
        if 2 * len(paused) > len(partners):
            return frozenset()
        return frozenset(peer for peer, r in paused.items() if proposing or r.backoff.shuns)

    def shuns(self, peer_id: PeerId) -> bool:
        """Whether one that is on no list is left alone now, its own proposals included."""
        record = self._records.get(peer_id)
        return record is not None and record.backoff.shuns and record.backoff.active(self._clock())

    def refusing_our_ledger(self) -> list[PeerId]:
        """Partners that say that it went back."""
        return [peer for peer, record in self._records.items() if record.ledger.refuses_ours]

    def skipped(self, peer_id: PeerId | str, slot: int, reason: str, detail: str = "") -> None:
        """Nothing came of it: a failure, or the schedule."""
        ordinary = reason in ORDINARY
        (self.skips if ordinary else self.failures)[reason] += 1
        if peer_id:
            self[PeerId(peer_id)].came_to_nothing(reason, ordinary=ordinary)
        level = logging.DEBUG if ordinary else logging.INFO
        who = self._events.name_of(PeerId(peer_id)) if peer_id else "nobody"
        log.log(level, "slot %d skipped with %s: %s %s", slot, who, reason, detail)
        self._events.skipped(peer_id, slot, reason, detail)

    def deadline_s(self, peer_id: PeerId, longest_s: float) -> float:
        """How long an exchange with this partner may take.

        From what its exchanges took; before it has done any, from what the others' took; and the
        longest while nobody has. Each timeout in a row doubles it, so that one that is slow and
        honest is met in the end.
        """
        record = self[peer_id]
        if record.seconds is not None:
            usual_s = DEADLINE_MULTIPLE * record.seconds
        else:
            others = [r.seconds for r in self._records.values() if r.seconds is not None]
            usual_s = FIRST_MULTIPLE * statistics.median(others) if others else longest_s
        return min(longest_s, max(MIN_DEADLINE_S, usual_s) * 2.0**record.backoff.timeouts)

    def reconcile(self, peer_id: PeerId, theirs: Terms) -> None:
        """Count merges that the partner reports as one-sided, and watch its ledger.

        Raises:
            PeerError: its ledger went back.
        """
        record = self[peer_id]
        self.one_sided += record.ids.one_sided(theirs.unresolved)
        news = record.ledger.shows(theirs.ledger_counter, self._clock())
        if record.ledger.state is LedgerState.WENT_BACK:
            if news:
                self._say_that_it_went_back(peer_id, record.ledger)
            raise PeerError(Reason.LEDGER_WENT_BACK, record.ledger.detail)
        if news:
            self._events.caught_up(peer_id)

    def _say_that_it_went_back(self, peer_id: PeerId, ledger: LedgerWatch) -> None:
        log.warning(
            "the privacy ledger of %s went back: %s; it may spend its budget twice, and is not "
            "met until it has caught up",
            peer_id,
            ledger.detail,
        )
        self._events.went_back(peer_id, ledger.highest, ledger.detail)

    def restore(
        self,
        counters: Iterable[tuple[str, int]],
        went_back: Mapping[str, str],
        caught_up: Collection[str] = (),
    ) -> None:
        """What was known when the daemon last ended.

        Args:
            counters: highest, by PeerID.
            went_back: what was seen of ledgers that did, by PeerID.
            caught_up: those that have since.
        """
        for peer_id, counter in counters:
            self[PeerId(peer_id)].ledger.restore(
                counter,
                went_back.get(peer_id, ""),
                caught_up=peer_id in caught_up,
                now_s=self._clock(),
            )

    def take_unresolved(self, peer_id: PeerId) -> list[int]:
        """Exchanges that the partner may have merged alone: each is given once."""
        return self[peer_id].ids.take_unresolved()
