"""What we remember of every partner, and counts over all exchanges.

Skipped slots are counted apart from failures: it is nobody's fault if a slot has no partner for us,
or if the partner is busy or not due.
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
MIN_DEADLINE_S = 5.0
"""Time that every exchange may take."""
DEADLINE_MULTIPLE = 4.0
"""A partner may take this many times as long as its exchanges took so far."""
FIRST_MULTIPLE = 8.0
"""In our first exchange with it, a partner may take this many times the other partners' median
duration."""

ORDINARY = frozenset(
    {
        Reason.NO_PARTNER, Reason.NOT_DUE, Reason.BUSY, Reason.GROUP_TOO_SMALL, Reason.PAUSED,
        Reason.AVOIDED, Reason.NOT_PROPOSED,
    }
)  # fmt: skip
"""Reasons that occur in a healthy swarm. They are no failures, and are logged at debug level."""
_NOT_THEIRS = frozenset({Reason.TRAINER_RESTARTED, Reason.SIDECAR_DOWN, Reason.LEDGER_WENT_BACK})
"""Failures after which we do not avoid the partner: the first two are ours, and the third ends by
itself when a ledger has caught up."""


class Events:
    """Receives what happens to partners. This class ignores all of it."""

    def name_of(self, peer_id: PeerId) -> str:
        """Name of a partner for the log."""
        return peer_id[-8:]

    def exchanged(self, agreement: Agreement, result: Exchanged, took_s: float) -> None:
        """An exchange is done; it took this many seconds."""

    def skipped(self, peer_id: str, slot: int, reason: str, detail: str) -> None:
        """A slot's exchange failed or did not begin.

        Args:
            peer_id: the partner; "" if the slot had none for us.
            slot: number of the slot.
            reason: a reason code.
            detail: more about it, for the log.
        """

    def went_back(self, peer_id: PeerId, highest_counter: int, detail: str) -> None:
        """A partner's ledger shows fewer charges than before; called once an hour at most."""

    def caught_up(self, peer_id: PeerId) -> None:
        """That ledger shows as many charges again; called once, after `went_back`."""


class Partners:
    """The record of every partner, and counts over all of them.

    Args:
        clock: shared wall clock, seconds.
        events: receives what happens.
        slot_s: length of a slot.
        rates: receives how fast exchanges are.

    Attributes:
        failures: number of failed exchanges by reason code.
        skips: number of slots without an exchange by reason code, where that is no failure.
        exchanges: number of exchanges that were done, with all partners.
        last_done_s: when the last one was done; None until there is one.
        one_sided: number of exchanges that we merged and the partner reported as not merged.
        values_sent: number of values sent in exchanges that were done.
        payload_bytes_sent: number of bytes that carried them.
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
        """A partner's record. A new one is made if there is none."""
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
        """Note that both agreed to an exchange."""
        record = self[agreement.peer_id]
        record.ids.began(agreement.exchange_id, agreement.slot)
        return record

    def done(self, agreement: Agreement, result: Exchanged, took_s: float) -> None:
        """Count an exchange that both sides accepted."""
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
        """Count a proposal that was not agreed to, or an exchange that failed.

        Args:
            peer_id: the partner.
            slot: of the exchange.
            error: why it failed.
            agreement: None if the partner had not agreed to the exchange.
            lost_s: how long it took.
        """
        record = self[peer_id]
        if isinstance(error, RefusedError) and error.reason == Reason.LEDGER_WENT_BACK:
            if record.ledger.refused():
                log.warning(
                    "%s says that our privacy ledger went back, and does not meet us until it has "
                    "caught up",
                    peer_id,
                )
        self._blame(record, error, agreement, lost_s)
        self.count_no_exchange(peer_id, slot, error.reason, error.detail)

    def _blame(
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
        """Partners that we avoid now, after their failures.

        If more than half of the partners fail, the fault is more likely ours: nobody is avoided.

        Args:
            partners: all that are alive.
            proposing: True: whom not to propose to. False: whose proposals to refuse.
        """
        self._num_partners = max(1, len(partners))
        now_s = self._clock()
        records = {peer: self._records[peer] for peer in partners if peer in self._records}
        paused = {peer: r for peer, r in records.items() if r.backoff.active(now_s)}
        if 2 * len(paused) > len(partners):
            return frozenset()
        return frozenset(peer for peer, r in paused.items() if proposing or r.backoff.shuns)

    def shuns(self, peer_id: PeerId) -> bool:
        """Whether we refuse a peer's proposals, by our record of it alone, whatever the others'."""
        record = self._records.get(peer_id)
        return record is not None and record.backoff.shuns and record.backoff.active(self._clock())

    def refusing_our_ledger(self) -> list[PeerId]:
        """Partners that say that our ledger went back."""
        return [peer for peer, record in self._records.items() if record.ledger.refuses_ours]

    def count_no_exchange(
        self, peer_id: PeerId | str, slot: int, reason: str, detail: str = ""
    ) -> None:
        """Count a slot without an exchange: as a failure, or as skipped if that is ordinary."""
        ordinary = reason in ORDINARY
        (self.skips if ordinary else self.failures)[reason] += 1
        if peer_id:
            self[PeerId(peer_id)].came_to_nothing(reason, ordinary=ordinary)
        level = logging.DEBUG if ordinary else logging.INFO
        who = self._events.name_of(PeerId(peer_id)) if peer_id else "nobody"
        log.log(level, "slot %d: no exchange with %s: %s %s", slot, who, reason, detail)
        self._events.skipped(peer_id, slot, reason, detail)

    def deadline_s(self, peer_id: PeerId, longest_s: float) -> float:
        """How long an exchange with this partner may take, `longest_s` at most.

        It follows from the partner's earlier exchanges, or else from the other partners'. Without
        any exchange it is `longest_s`. Each timeout in a row doubles it, so that an exchange with
        an honest but slow partner succeeds in the end.
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
            PeerError: its ledger went back and has not caught up.
        """
        record = self[peer_id]
        self.one_sided += record.ids.one_sided(theirs.unresolved)
        is_news = record.ledger.shows(theirs.ledger_counter, self._clock())
        if record.ledger.state is LedgerState.WENT_BACK:
            if is_news:
                self._report_went_back(peer_id, record.ledger)
            raise PeerError(Reason.LEDGER_WENT_BACK, record.ledger.detail)
        if is_news:
            self._events.caught_up(peer_id)

    def _report_went_back(self, peer_id: PeerId, ledger: LedgerWatch) -> None:
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
        """Continue from what was known when the daemon last ended.

        Args:
            counters: PeerIDs with the highest number of charges that each ledger has shown.
            went_back: `LedgerWatch.detail` of ledgers that went back, by PeerID.
            caught_up: PeerIDs of those that have caught up since.
        """
        for peer_id, counter in counters:
            self[PeerId(peer_id)].ledger.restore(
                counter,
                went_back.get(peer_id, ""),
                caught_up=peer_id in caught_up,
                now_s=self._clock(),
            )

    def take_unresolved(self, peer_id: PeerId) -> list[int]:
        """Exchanges that the partner may have merged alone. Each is returned once."""
        return self[peer_id].ids.take_unresolved()
