"""What we remember of one partner: how exchanges went, which, and what its ledger has shown."""

from __future__ import annotations

import enum
from collections import deque
from collections.abc import Iterable

from xpeer.gossip.backoff import Backoff
from xpeer.wire.messages import MAX_UNRESOLVED

REMEMBERED = 256
"""Exchange ids per partner, for one-sided merges and replays."""
SAID_AGAIN_S = 3600.0
"""A ledger that goes back again and again is logged once in so long."""
_SMOOTHING = 0.8


class LedgerState(enum.Enum):
    """What a partner's privacy ledger has shown of itself."""

    STEADY = "steady"
    """It never went back."""
    WENT_BACK = "went back"
    """It showed fewer charges than before, and has not shown as many again."""
    CAUGHT_UP = "caught up"
    """It once went back, and has shown as many charges again since."""


class LedgerWatch:
    """Watches that a partner's ledger only grows.

    Attributes:
        highest: most charges that it has shown.
        state: what follows from all that it has shown.
        detail: the numbers when it last went back; "" if it never did.
        refuses_ours: True iff the partner says that our ledger went back, and has not met us since.
    """

    def __init__(self) -> None:
        self.highest = 0
        self.state = LedgerState.STEADY
        self.detail = ""
        self.refuses_ours = False
        self._said_s: float | None = None  # when the operator was last told that it went back
        self._to_be_said = False  # True iff the operator was told so, and not that it caught up

    def restore(self, highest: int, detail: str, *, caught_up: bool, now_s: float) -> None:
        """What was known when the daemon last ended."""
        self.highest, self.detail = highest, detail
        if detail:
            self.state = LedgerState.CAUGHT_UP if caught_up else LedgerState.WENT_BACK
            self._said_s = now_s
        self._to_be_said = self.state is LedgerState.WENT_BACK

    def refused(self) -> bool:
        """The partner says that our ledger went back. Whether that is news."""
        news, self.refuses_ours = not self.refuses_ours, True
        return news

    def met(self) -> None:
        """The partner exchanged with us: our ledger is good enough for it."""
        self.refuses_ours = False

    def shows(self, charges: int, now_s: float) -> bool:
        """It shows so many charges. Whether that is news for the operator: see `state`."""
        if charges < self.highest:
            self.state, self.detail = (
                LedgerState.WENT_BACK,
                f"{charges} charges now, {self.highest} before",
            )
            if self._said_s is not None and now_s - self._said_s < SAID_AGAIN_S:
                return False
            self._said_s, self._to_be_said = now_s, True
            return True
        self.highest = charges
        if self.state is LedgerState.STEADY:
            return False
        self.state = LedgerState.CAUGHT_UP
        news, self._to_be_said = self._to_be_said, False
        return news


class ExchangeIds:
    """Which exchanges there were with one partner.

    Attributes:
        last_slot: of the last exchange: there is one for a pair and slot.
    """

    def __init__(self) -> None:
        self.last_slot = -1
        self._seen: deque[int] = deque(maxlen=REMEMBERED)
        self._merged: deque[int] = deque(maxlen=REMEMBERED)
        self._unresolved: deque[int] = deque(maxlen=MAX_UNRESOLVED)

    def began(self, exchange_id: int, slot: int) -> None:
        """It was agreed to."""
        self._seen.append(exchange_id)
        self.last_slot = max(self.last_slot, slot)

    def is_replay(self, exchange_id: int, slot: int) -> bool:
        """Whether we have taken part in this one, or in one of this slot or a later one."""
        return exchange_id in self._seen or slot <= self.last_slot

    def merged(self, exchange_id: int) -> None:
        """We merged it, and so did the partner as far as we know."""
        self._merged.append(exchange_id)

    def one_sided(self, reported: Iterable[int]) -> int:
        """The partner did not merge these; how many of them we did."""
        ours = [exchange_id for exchange_id in reported if exchange_id in self._merged]
        for exchange_id in ours:
            self._merged.remove(exchange_id)
        return len(ours)

    def unresolved(self, exchange_id: int) -> None:
        """We did not merge it, and the partner may have."""
        self._unresolved.append(exchange_id)

    def take_unresolved(self) -> list[int]:
        """All of these that the partner has not been told of."""
        taken = list(self._unresolved)
        self._unresolved.clear()
        return taken


class Record:
    """What we remember of one partner.

    Attributes:
        done: exchanges.
        failed: exchanges that came to nothing.
        skipped: slots that the schedule left out.
        last_reason: of the last failure; else of the last slot that was skipped; "" = none yet.
        last_done_s: when the last exchange was done; None until there is one.
        payload_bytes: sent to it, and as many received from it, in merged exchanges.
        seconds: an exchange takes, smoothed; None until there is one.
        ledger: what its privacy ledger has shown.
        ids: which exchanges there were.
        backoff: for how long it is left alone.
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
        """Both sides merged."""
        before = took_s if self.seconds is None else self.seconds
        self.seconds = _SMOOTHING * before + (1 - _SMOOTHING) * took_s
        self.ids.merged(exchange_id)
        self.ledger.met()
        self.done += 1
        self.last_done_s = now_s
        self.payload_bytes += num_bytes

    def came_to_nothing(self, reason: str, *, ordinary: bool) -> None:
        """A slot, for a reason that belongs to the schedule (ordinary) or is a failure."""
        self.skipped += ordinary
        self.failed += not ordinary
        if not (ordinary and self.failed):
            self.last_reason = reason
