"""Members that fell silent without a word, and since when."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from xpeer.identity import PeerId
from xpeer.roster.cards import MemberRecord

FORGOTTEN_S = 86_400.0
"""One that is gone for so long is not missed any more."""
BACK_S = 60.0
"""After our own start the others get this long to be heard of."""


class Missed:
    """Who should be here and is not.

    Args:
        on_ended: told of each that left, whose run was over when it went, or that is forgotten.
    """

    def __init__(self, on_ended: Callable[[PeerId], None] = lambda _: None) -> None:
        self.on_ended = on_ended
        self._seen_s: dict[PeerId, float] = {}
        self._phases: dict[PeerId, str] = {}

    def restore(self, seen: Iterable[tuple[PeerId, float]], now_s: float) -> None:
        """Members that were seen before our own start, and when."""
        for peer, seen_s in seen:
            if now_s - seen_s < FORGOTTEN_S:
                self._seen_s[peer] = now_s + BACK_S

    def look(self, members: Mapping[PeerId, MemberRecord], now_s: float) -> None:
        """Who is there now."""
        for peer, record in members.items():
            if record.phase == "left":
                self._forget(peer)
            elif record.role == "member":
                self._seen_s[peer], self._phases[peer] = now_s, record.phase
        for peer, seen_s in list(self._seen_s.items()):
            if peer in members:
                continue
            if self._phases.get(peer) == "finished" or now_s - seen_s > FORGOTTEN_S:
                self._forget(peer)

    def _forget(self, peer: PeerId) -> None:
        if self._seen_s.pop(peer, None) is not None:
            self._phases.pop(peer, None)
            self.on_ended(peer)

    def lost(self, now_s: float) -> dict[PeerId, float]:
        """Those that are gone, with the time when they were last here."""
        return {peer: seen_s for peer, seen_s in self._seen_s.items() if seen_s < now_s}

    @property
    def known(self) -> int:
        """Members that are here or missed."""
        return len(self._seen_s)
