"""Members that fell silent and did not say that they leave, and since when."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from xpeer.identity import PeerId
from xpeer.roster.cards import MemberRecord

FORGOTTEN_S = 86_400.0
"""A member that is gone for this long is not missed any more."""
BACK_S = 60.0
"""After our own start nobody is missed for this long: we have not heard of the others yet."""


class Missed:
    """Members that should be here and are not.

    Args:
        on_ended: called with each member that is not missed any more: it left, its run was over
            when it went, or it is gone for `FORGOTTEN_S`.
    """

    def __init__(self, on_ended: Callable[[PeerId], None] = lambda _: None) -> None:
        self.on_ended = on_ended
        self._seen_s: dict[PeerId, float] = {}
        self._phases: dict[PeerId, str] = {}

    def restore(self, seen: Iterable[tuple[PeerId, float]], now_s: float) -> None:
        """Expect members that were last seen before our own start, at these times."""
        for peer, seen_s in seen:
            if now_s - seen_s < FORGOTTEN_S:
                self._seen_s[peer] = now_s + BACK_S

    def update(self, members: Mapping[PeerId, MemberRecord], now_s: float) -> None:
        """Note who is in the roster now, and forget those that are not missed any more."""
        for peer, record in members.items():
            if record.phase == "left":
                self._forget(peer)
            elif record.role == "observer":
                self._seen_s.pop(peer, None)  # after `restore`, which does not know roles
            else:  # a founder is an admin, and a partner
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
        """Missed members, with the time when each was last seen."""
        return {peer: seen_s for peer, seen_s in self._seen_s.items() if seen_s < now_s}

    @property
    def known(self) -> int:
        """Number of members that are here or missed."""
        return len(self._seen_s)
