"""What donors did while this node fetches parameters: who comes last, and who gives no more."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from typing import Final, TypeVar

from xpeer.identity import PeerId
from xpeer_daemon.claims import Claim
from xpeer_daemon.conditions import names
from xpeer_daemon.life import Life
from xpeer_daemon.swarm_view import SwarmView
from xpeer_daemon.takeover import Ended

ALONE_TRIES: Final = 3
"""Who has to give everything alone may offer nothing, or lose its line, so often in a row."""

_C = TypeVar("_C", bound=Claim)


class Conduct:
    """Of all donors, from the first attempt until this node has parameters or wants none.

    Args:
        view: knows names.
        life: gets who wasted how many attempts, in words.

    Attributes:
        alone: the only donor to fetch from, since a mixture with others was bad; None = any.
        alone_failed: how often it offered nothing, or gave hardly anything, since it gave WORTH.
        alone_is_busy: True iff it failed, and each time because it was busy.
        blamed: donors that gave all and it was bad. They give nothing as long as anybody else
            offers parameters.
        shy: donors that had to give everything alone and did not. They give to no mixture any more,
            since they may have spoilt one: if they are chosen, they give everything alone.
        fresh_tries: how many attempts began with a donor that had not been tried in vain before.
        worse: donors whose parameters were as good as they say, and worse than ours.
    """

    def __init__(self, view: SwarmView, life: Life) -> None:
        self._view, self._life = view, life
        self.blamed: set[PeerId] = set()
        self.shy: set[PeerId] = set()
        self.worse: set[PeerId] = set()
        self._tried: set[PeerId] = set()
        """Donors that were chosen first, and hardly anything came. They come after all others."""
        self._once_tried: set[PeerId] = set()
        """Donors that were among them at any time: they have had their turn."""
        self._cut: set[PeerId] = set()
        """Donors that were chosen first when our own time was nearly over."""
        self.fresh_tries = 0
        self._wasted: Counter[PeerId] = Counter()
        """How many attempts each donor that was chosen first cost: hardly anything came, or it was
        bad."""
        self.let_all_give()

    def has_to_give_alone(self, donor: PeerId) -> None:
        """Fetch from this donor alone."""
        self.alone: PeerId | None = donor
        self.alone_failed, self.alone_is_busy = 0, False

    def let_all_give(self) -> None:
        """Fetch from any donors."""
        self.alone, self.alone_failed, self.alone_is_busy = None, 0, False

    def let_alone_go(self) -> None:
        """Fetch from any donors, because the one that had to give everything alone did not."""
        if self.alone is not None:
            self.shy.add(self.alone)
            self._tries({self.alone})
            self.wastes(self.alone)
        self.let_all_give()

    def alone_offers_nothing(self, *, busy: bool) -> None:
        """Note that who has to give everything alone was asked in vain."""
        self.alone_is_busy = busy and (self.alone_is_busy or not self.alone_failed)
        self.alone_failed += 1

    def alone_takes_too_long(self) -> None:
        """Note that who has to give everything alone has had the time for a copy, and no more tries
        are left.
        """
        self.alone_failed, self.alone_is_busy = ALONE_TRIES, False

    def unblamed(self, offers: Sequence[_C]) -> list[_C]:
        """Offers of donors that are not blamed, if there are any; else all."""
        return [offer for offer in offers if offer.donor not in self.blamed] or list(offers)

    def untried_first(self, offers: Sequence[_C]) -> list[_C]:
        """Put donors last that were tried in vain, until all were: else those that claim the best
        and give nothing would be chosen in turn.
        """
        if all(offer.donor in self._tried for offer in offers):
            self._tried.clear()
        return sorted(offers, key=lambda offer: offer.donor in self._tried)

    def untried(self, donors: Collection[PeerId]) -> list[PeerId]:
        """Those of these donors that were never tried in vain."""
        return [donor for donor in donors if donor not in self._once_tried]

    def ended(self, first: PeerId, how: Ended) -> None:
        """Note how an attempt ended in which not all came.

        Args:
            first: the donor that was chosen first.
            how: it ended.
        """
        if how is Ended.CUT and first not in self._cut:
            self._cut.add(first)  # it is told apart from who offers at the last moment each time
        elif how is not Ended.SOME:  # else its line broke, as lines do
            self._tries({first})
            self.wastes(first)
        if first == self.alone:
            failed = {Ended.SOME: 0, Ended.LITTLE: self.alone_failed + 1}
            failed[Ended.CUT] = self.alone_failed
            self.alone_failed = failed.get(how, ALONE_TRIES)
            self.alone_is_busy = False

    def come_late(self, donors: Iterable[PeerId]) -> None:
        """Put donors last that are not far ahead any more: they would be chosen again and again."""
        self._tries(donors)

    def begins(self, first: PeerId) -> None:
        """Note that an attempt begins in which this donor was chosen first."""
        self.fresh_tries += first not in self._once_tried

    def _tries(self, donors: Iterable[PeerId]) -> None:
        donors = set(donors)
        self._tried |= donors
        self._once_tried |= donors

    def wastes(self, donor: PeerId) -> None:
        """Count an attempt that this donor cost, for the node's health."""
        self._wasted[donor] += 1
        counts = {peer: f"{count} in vain" for peer, count in self._wasted.most_common()}
        self._life.wasted = f"attempts: {names(self._view, list(counts), counts)}"

    def forget(self) -> None:
        """Begin anew."""
        self.let_all_give()
        self.fresh_tries = 0
        tried = self._tried, self._once_tried, self._cut, self._wasted
        for known in (self.blamed, self.shy, self.worse, *tried):
            known.clear()
        self._life.wasted = ""
