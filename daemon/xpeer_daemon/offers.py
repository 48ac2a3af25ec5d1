"""Asks members for their parameters, and remembers who failed."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import random
import re
from collections.abc import Awaitable, Callable, Collection, Iterable, Iterator
from typing import Final

from xpeer.errors import PeerError, Reason
from xpeer.gossip.backoff import Backoff
from xpeer.identity import PeerId
from xpeer.manifest import Manifest
from xpeer.network import turns
from xpeer.network.giving import BROKE, Giver
from xpeer.network.shelf import PREPARE_TIMEOUT_S
from xpeer.training.schedule import planned_steps
from xpeer_daemon.store import Store
from xpeer_daemon.swarm_view import SwarmView

log = logging.getLogger("xpeer.daemon")

ASKED: Final = 8
"""Number of members that are asked for an offer at the same time, at most."""
MORE_OFFERS_S: Final = 5.0
"""Once more members have offered something than are silent, these have this long, or as long as
the first offer took if that is longer."""
LOOK_S: Final = 1.0
"""While nobody has offered anything, members that came meanwhile are asked after this time."""
ASK_AGAIN_S: Final = turns.PAUSE_S
"""While nobody has offered anything and somebody is silent, those that had nothing to give are
asked again after this time."""
REASONS: Final = 8
"""Reasons of one donor that are logged, at most."""
GIVES_NONE: Final = "it gives nothing now: others are served, or this node was just before"
_OWING: Final = BROKE | {Reason.SIDECAR_DOWN, Reason.NOT_A_MEMBER}
"""Reasons that say nothing of a member's parameters. One that restarted knows nobody at first, and
strangers may use up the introductions that it takes."""
_DIGITS: Final = re.compile(r"[\d.]+")


class Offers:
    """Asks members, for one node.

    Args:
        view: knows who holds parameters.
        store: remembers events.
        manifest: of the swarm.
        ask: asks one member for its tree, see `Takeover.ask`.
    """

    def __init__(
        self,
        view: SwarmView,
        store: Store,
        manifest: Manifest,
        ask: Callable[[PeerId], Awaitable[Giver]],
    ) -> None:
        self._view, self._store = view, store
        self._manifest, self._ask_for_tree = manifest, ask
        self._failed: dict[PeerId, Backoff] = {}
        self._said: dict[PeerId, set[str]] = {}
        """Why each donor was refused since it last gave its parameters, without numbers."""
        self._silent: set[PeerId] = set()
        """Members that did not answer in PREPARE_TIMEOUT_S when they were asked last."""
        self._why_none: dict[PeerId, str] = {}
        """Why members offered nothing when they were asked last; TIMEOUT until they answer."""

    def willing(self) -> list[PeerId]:
        """Members that hold parameters, without those that failed a while ago."""
        now = asyncio.get_running_loop().time()
        failed = self._failed
        return [p for p in self._view.holders() if p not in failed or not failed[p].active(now)]

    async def ask_all(
        self,
        first: Iterable[PeerId] = (),
        without: Collection[PeerId] = (),
        within_s: float = math.inf,
        *,
        any_will_do: bool = False,
    ) -> list[Giver]:
        """Offers of members, whoever answers first: a copy takes its time, and who lies has one.

        Members that are silent are waited for, until more than they have offered something, but for
        PREPARE_TIMEOUT_S at most, and the next time not again. They keep nobody from asking those
        that come meanwhile, or that had nothing to give before.

        Args:
            first: members to ask before any others.
            without: members that are not asked.
            within_s: time until nobody is waited for any more.
            any_will_do: wait for nobody who is silent once there is an offer.
        """
        clock = asyncio.get_running_loop().time
        began, offers = clock(), list[Giver]()
        ends_at, first_s = began + within_s, 0.0
        asked, waiting = set(without), dict[asyncio.Task[Giver | None], PeerId]()
        had_none = dict[PeerId, float]()
        """When each of those that offered nothing answered."""
        try:
            while clock() < ends_at:
                if not offers:
                    again = {p for p, at in had_none.items() if clock() - at >= ASK_AGAIN_S}
                    resting = asked - again if waiting else asked
                    fresh = self._next(list(first), resting)[: ASKED - len(waiting)]
                    asked.update(fresh)
                    had_none = {p: at for p, at in had_none.items() if p not in fresh}
                    waiting |= {asyncio.create_task(self._ask(donor)): donor for donor in fresh}
                if not waiting:
                    break
                done, _ = await asyncio.wait(
                    waiting,
                    timeout=min(LOOK_S, ends_at - clock()),
                    return_when=asyncio.FIRST_COMPLETED,
                )
                for task in done:
                    donor, offer = waiting.pop(task), task.result()
                    if offer is not None:
                        offers.append(offer)
                    else:
                        had_none[donor] = clock()
                took_s = clock() - began
                first_s = first_s or (took_s if offers else 0.0)
                awaited = [p for p in waiting.values() if p not in self._silent]
                enough = any_will_do or len(offers) > len(awaited) or took_s >= PREPARE_TIMEOUT_S
                if offers and enough:
                    ends_at = min(ends_at, clock() + max(MORE_OFFERS_S, first_s))
        except BaseException:
            refuse(offers)
            raise
        finally:
            for task in waiting:
                task.cancel()
            late = await asyncio.gather(*waiting, return_exceptions=True)
            refuse([o for o in late if o is not None and not isinstance(o, BaseException)])
        return offers

    def _next(self, first: list[PeerId], asked: set[PeerId]) -> list[PeerId]:
        """Members that were not asked yet, in the order in which they are asked."""
        willing = [member for member in self.willing() if member not in asked]
        random.shuffle(willing)
        return sorted(willing, key=lambda member: member not in first)

    async def _ask(self, donor: PeerId) -> Giver | None:
        with contextlib.suppress(PeerError):
            return await self.ask_one(donor)
        return None

    async def ask_one(self, donor: PeerId) -> Giver:
        """The offer of one member, even if it failed a while ago.

        Raises:
            PeerError: it offers nothing. CLOSED: others are served, or this node was just before.
        """
        self._why_none[donor] = Reason.TIMEOUT
        try:
            offer = await self._checked(donor)
        except PeerError as e:
            self._why_none[donor] = e.reason
            raise
        del self._why_none[donor]
        return offer

    def owes_an_offer(self, member: PeerId) -> bool:
        """Whether a member that was asked last might have offered something: it was silent, had no
        time or did not know us, or our own line was down.
        """
        return self._why_none.get(member) in _OWING

    def offers_none(self, member: PeerId) -> bool:
        """Whether a member that was asked last has nothing for us: it need not be asked again."""
        return self._why_none.get(member, Reason.UNREACHABLE) not in _OWING | {Reason.UNREACHABLE}

    async def _checked(self, donor: PeerId) -> Giver:
        last = planned_steps(self._manifest)
        try:
            with self._noting_silence(donor):
                offer = await self._ask_for_tree(donor)
        except PeerError as e:
            self._refused(donor, GIVES_NONE if e.reason == Reason.CLOSED else str(e))
            raise
        if last is not None and offer.step > last:  # with it our run would be over at once
            offer.refuse()
            why = f"step {offer.step}, the run ends at {last}"
            self._refused(donor, why)
            raise PeerError(Reason.REFUSED, why)
        return offer

    @contextlib.contextmanager
    def _noting_silence(self, donor: PeerId) -> Iterator[None]:
        """Note whether a member answers in PREPARE_TIMEOUT_S. Who is let go sooner still might."""
        clock = asyncio.get_running_loop().time
        began, answered = clock(), True
        try:
            yield
        except asyncio.CancelledError:
            answered = False
            raise
        finally:
            if clock() - began >= PREPARE_TIMEOUT_S:
                self._silent.add(donor)
            elif answered:
                self._silent.discard(donor)

    def succeeded(self, donor: PeerId) -> None:
        """Forget what a donor did, since its parameters are taken over."""
        self._failed.pop(donor, None)
        self._said.pop(donor, None)

    def avoid(self, donor: PeerId, why: str, took_s: float = 0.0) -> None:
        """Ask a donor for nothing for a while.

        Args:
            donor: the member.
            why: for people.
            took_s: time that the failure cost.
        """
        self._refused(donor, why)
        backoff = self._failed.setdefault(donor, Backoff())
        now = asyncio.get_running_loop().time()
        backoff.failed(now, turns.PAUSE_S, took_s, why, agreed=True)

    def spare(self, donor: PeerId, why: str) -> None:
        """Ask a donor for nothing for a moment: it gave pieces, and then its line broke.

        That is no failure: on a line that breaks every hour each pause would be twice as long.

        Args:
            donor: the member.
            why: for people.
        """
        self._refused(donor, why)
        backoff = self._failed.setdefault(donor, Backoff())
        now = asyncio.get_running_loop().time()
        backoff.until_s = max(backoff.until_s, now + turns.PAUSE_S)

    def _refused(self, donor: PeerId, why: str) -> None:
        """Say so once for each donor and reason: it is asked again every `donors.RETRY_S`."""
        said, reason = self._said.setdefault(donor, set()), _DIGITS.sub("", why)
        if reason in said or len(said) >= REASONS:  # it words some of them itself
            log.debug("parameters from %s refused once more: %s", donor[-8:], why)
            return
        said.add(reason)
        log.warning("parameters from %s refused: %s", donor[-8:], why)
        self._store.add_event("donor-refused", f"{donor}: {why}")


def refuse(offers: list[Giver]) -> None:
    """Decline offers, because others are better."""
    for offer in offers:
        offer.refuse()
