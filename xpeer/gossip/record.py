"""What we remember of one partner: its exchanges, and the charges that its ledger has shown."""

from __future__ import annotations

import enum
from collections import deque
from collections.abc import Iterable

from xpeer.gossip.backoff import Backoff
from xpeer.wire.messages import MAX_UNRESOLVED

REMEMBERED = 256
"""Number of exchange ids kept per partner, to notice one-sided merges and replays."""
SAID_AGAIN_S = 3600.0
"""A ledger that keeps going back is logged at most once in this time."""
_SMOOTHING = 0.8


class LedgerState(enum.Enum):
    """Whether a partner's privacy ledger has only grown, as far as we have seen."""

    STEADY = "steady"
    """It never went back."""
    WENT_BACK = "went back"
    """It showed fewer charges than before, and has not shown as many again."""
    CAUGHT_UP = "caught up"
    """It once went back, and has shown as many charges again since."""


class LedgerWatch:
    """Watches whether a partner's ledger only grows.

    Attributes:
        highest: largest number of charges that it has shown.
        state: what follows from all the numbers that it has shown.
        detail: the numbers when it last went back; "" if it never did.
        refuses_ours: True iff the partner says that our ledger went back, and has not exchanged
            with us since.
    """

    def __init__(self) -> None:
        self.highest = 0
        self.state = LedgerState.STEADY
        self.detail = ""
        self.refuses_ours = False
        self._warned_s: float | None = None  # time of the last warning; None until there is one
        self._owes_all_clear = False  # True iff a warning was not yet followed by "caught up"

    def restore(self, highest: int, detail: str, *, caught_up: bool, now_s: float) -> None:
        """Continue from what was known when the daemon last ended."""
        self.highest, self.detail = highest, detail
        if detail:
            self.state = LedgerState.CAUGHT_UP if caught_up else LedgerState.WENT_BACK
            self._warned_s = now_s
        self._owes_all_clear = self.state is LedgerState.WENT_BACK

    def refused(self) -> bool:
        """The partner says that our ledger went back. Whether that is news."""
        news, self.refuses_ours = not self.refuses_ours, True
        return news

    def met(self) -> None:
        """The partner exchanged with us: our ledger is good enough for it."""
        self.refuses_ours = False

    def shows(self, charges: int, now_s: float) -> bool:
        """Note the number of charges that the ledger shows now.

        Returns:
            True iff the operator should read of the new `state`.
        """
        if charges < self.highest:
            self.state, self.detail = (
                LedgerState.WENT_BACK,
                f"{charges} charges now, {self.highest} before",
            )
            if self._warned_s is not None and now_s - self._warned_s < SAID_AGAIN_S:
                return False
            self._warned_s, self._owes_all_clear = now_s, True
            return True
        self.highest = charges
        if self.state is LedgerState.STEADY:
            return False
        self.state = LedgerState.CAUGHT_UP
        is_news, self._owes_all_clear = self._owes_all_clear, False
        return is_news


class ExchangeIds:
    """Ids of the exchanges with one partner.

    Attributes:
        last_slot: slot of the last exchange, -1 until there is one. A pair has one exchange in a
            slot at most.
    """

    def __init__(self) -> None:
        self.last_slot = -1
        self._seen: deque[int] = deque(maxlen=REMEMBERED)
        self._merged: deque[int] = deque(maxlen=REMEMBERED)
        self._unresolved: deque[int] = deque(maxlen=MAX_UNRESOLVED)

    def began(self, exchange_id: int, slot: int) -> None:
        """Note that both agreed to an exchange."""
        self._seen.append(exchange_id)
        self.last_slot = max(self.last_slot, slot)

    def is_replay(self, exchange_id: int, slot: int) -> bool:
        """Whether we took part in this exchange, or in another one of its slot or of a later."""
        return exchange_id in self._seen or slot <= self.last_slot

    def merged(self, exchange_id: int) -> None:
        """Note that we merged an exchange, and so did the partner as far as we know."""
        self._merged.append(exchange_id)

    def one_sided(self, reported: Iterable[int]) -> int:
        """Count how many of the exchanges that the partner did not merge were merged by us.

        Each is counted once.
        """
        ours = [exchange_id for exchange_id in reported if exchange_id in self._merged]
        for exchange_id in ours:
            self._merged.remove(exchange_id)
        return len(ours)

    def unresolved(self, exchange_id: int) -> None:
        """Note that we did not merge an exchange, while the partner may have."""
        self._unresolved.append(exchange_id)

    def take_unresolved(self) -> list[int]:
        """Unresolved exchanges that were not reported to the partner yet. Each is returned once."""
        unresolved = list(self._unresolved)
        self._unresolved.clear()
        return unresolved


class Record:
    """What we remember of one partner.

    Attributes:
        done: number of exchanges that were done.
        failed: number of exchanges that failed.
        skipped: number of slots without an exchange where that is no failure.
        last_reason: reason code of the last failure, else of the last skipped slot; "" = neither
            yet.
        last_done_s: when the last exchange was done; None until there is one.
        payload_bytes: bytes sent to it in merged exchanges; as many were received.
        seconds: smoothed duration of an exchange; None until there is one.
        ledger: what its privacy ledger has shown.
        ids: exchanges that there were.
        backoff: for how long we avoid it.
    """

    def __init__(self) -> None:
        self.done = self.failed = self.skipped = 0
        self.last_reason = ""
        self.last_done_s: float | None = None
        self.payload_bytes = 0
        self.seconds: float | None = None
        self.ledger = LedgerWatch()
        self.ids = ExchangeIds()
        self.backoff = Backoff()

    def exchanged(self, exchange_id: int, num_bytes: int, took_s: float, now_s: float) -> None:
        """Count an exchange that both sides accepted."""
        before = took_s if self.seconds is None else self.seconds
        self.seconds = _SMOOTHING * before + (1 - _SMOOTHING) * took_s
        self.ids.merged(exchange_id)
        self.ledger.met()
        self.done += 1
        self.last_done_s = now_s
        self.payload_bytes += num_bytes

    def came_to_nothing(self, reason: str, *, ordinary: bool) -> None:
        """Count a slot without an exchange: as skipped if that is ordinary, else as failed."""
        self.skipped += ordinary
        self.failed += not ordinary
        if not (ordinary and self.failed):
            self.last_reason = reason
