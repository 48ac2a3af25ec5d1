"""Taking over the parameters of another member: by a node that has none, or lies far behind.

The initial model is for a swarm in which nobody holds parameters. A member that lost its own, even
the founder, takes over another's. So does one whose checkpoint lies far behind the others: merging
old parameters would pull everybody back. Its ledger stays its own.

The node asks donors for offers, and tries the best one first: the one with the lowest public loss,
or with the most steps among about equal losses. The trainer measures the loss before the offer
replaces anything. Nobody can measure an offer's step, so it counts only as far as other members
confirm it. A donor that failed is avoided for a while.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import random
from typing import Final

from xpeer.errors import LocalError, PeerError
from xpeer.gossip.backoff import Backoff
from xpeer.identity import PeerId
from xpeer.manifest import Manifest
from xpeer.network import donation
from xpeer.network.agreement import Dialler, Party
from xpeer.network.donation import Offered
from xpeer.network.rates import Rates
from xpeer.phase import Phase, traits_of
from xpeer.trainer.client import TrainerProcess
from xpeer.training.schedule import planned_steps
from xpeer_daemon.node import Node
from xpeer_daemon.store import Store
from xpeer_daemon.swarm_view import SwarmView

log = logging.getLogger("xpeer.daemon")

RETRY_S = 2.0
ASKED: Final = 8
"""Number of members that are asked for an offer at the same time, at most."""
MORE_OFFERS_S: Final = 5.0
"""After the first offer the others have this long, or as long as the first one took if that is
longer."""
TOLERANCE: Final = 1.15, 0.05
"""How much worse than offered a donor's public loss may be: factor, and nats on top."""
ALIKE: Final = 1.05
"""Public losses within this factor are about equal."""
BEHIND_WINDOWS, BEHIND_SHARE = 4, 0.05
"""A node lies far behind if a donor is more windows ahead than this, and also more than this
fraction of the donor's steps. Training and merging make up for less by themselves, and the node's
own optimiser moments are worth more than the difference."""
PATIENCE_S: Final = 300.0
"""A founder that lost its parameters waits this long for a member that holds the swarm's."""
FROM_INITIAL: Final = "(`xpeer start --from-initial` begins at once with the initial model)"
GRACE_S: Final = 5.0
"""A node that resumes waits this long for members that it knows. Then it trains, and asks later."""

CATCH_UP_S: Final = 900.0
"""A node with a good checkpoint looks for better parameters for this long. Then it trains."""
STALE_S: Final = 10.0
"""After a longer failure the other offers may have lapsed, so they are asked for anew."""
LEAST_STEP_S: Final = 1e-3
"""No step is shorter. This bounds a donor's step where nobody else can confirm it."""


class Donors:
    """Fetches parameters from other members, for one node.

    Args:
        node: its phase and note say what is going on.
        view: knows who holds parameters.
        store: remembers events.
        party: our identity and keys.
        dialler: opens streams.
        manifest: of the swarm.
        rates: speeds that transfers and exchanges reached.
    """

    def __init__(
        self,
        node: Node,
        view: SwarmView,
        store: Store,
        party: Party,
        dialler: Dialler,
        manifest: Manifest,
        rates: Rates,
    ) -> None:
        self._node, self._view, self._store = node, view, store
        self._party, self._dialler, self._manifest = party, dialler, manifest
        self._rates = rates
        self._failed: dict[PeerId, Backoff] = {}

    def _willing(self) -> list[PeerId]:
        """Members that hold parameters, without those that failed a while ago."""
        now = asyncio.get_running_loop().time()
        failed = self._failed
        return [p for p in self._view.holders() if p not in failed or not failed[p].active(now)]

    async def take_over(self, trainer: TrainerProcess, patience_s: float = math.inf) -> bool:
        """Give the swarm's parameters to a trainer that has none.

        Args:
            trainer: awaits them.
            patience_s: how long to wait for a member that holds any. It is finite for a founder,
                that may begin the swarm anew.

        Returns:
            Whether the trainer has them now.
        """
        life, clock = self._node.life, asyncio.get_running_loop().time
        life.enter(Phase.FETCHING)
        until, has_warned = clock() + patience_s, False
        while True:
            holders = self._view.holders()
            if not holders and clock() >= until:
                return False
            life.note = f"fetching: {len(holders)} members could give the parameters"
            if not holders and patience_s < math.inf:
                life.note = (
                    "this swarm ran before, and its parameters are lost here: waiting "
                    f"{until - clock():.0f} s more for a member that holds them {FROM_INITIAL}"
                )
            elif clock() >= until:
                life.note = (
                    f"this swarm ran before, and its parameters are lost here: {len(holders)} "
                    f"members say that they hold them, and none has given them {FROM_INITIAL}"
                )
                if not has_warned:
                    log.warning("%s", life.note)
                has_warned = True
            if await self._take_over_best(trainer, self._willing(), own_step=None):
                life.note = ""
                return True
            await asyncio.sleep(RETRY_S)

    async def catch_up(self, trainer: TrainerProcess, own_step: int) -> bool:
        """Take over a donor's parameters if ours lie far behind; returns whether there was a donor
        to ask.
        """
        if not self._view.holders():
            return False
        clock = asyncio.get_running_loop().time
        until = clock() + CATCH_UP_S
        while True:
            succeeded = await self._take_over_best(trainer, self._willing(), own_step, until)
            if succeeded:
                self._store.add_event("caught-up", f"from step {own_step}")
            if succeeded is not None or clock() + donation.PAUSE_S >= until:
                return True
            await asyncio.sleep(donation.PAUSE_S)

    async def _take_over_best(
        self,
        trainer: TrainerProcess,
        donors: list[PeerId],
        own_step: int | None,
        until: float | None = None,
    ) -> bool | None:
        """Take over the best offer that is as good as it says.

        Args:
            trainer: gets the parameters.
            donors: members to ask for offers.
            own_step: offers that are not far ahead of this step are refused; None: none are.
            until: end by the loop's clock. Only the measuring may end later.

        Returns:
            Whether the trainer has an offer's parameters. None = an attempt failed after so long
            that the other offers have to be asked for again.
        """
        clock = asyncio.get_running_loop().time
        offers = list[Offered]()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout_at(until):
                offers = await self._offers(donors)
        steps = {offer.donor: self._confirmed_step(offer, offers, own_step) for offer in offers}
        remaining = [
            offer
            for offer in ranked(offers)
            if own_step is None or self.far_ahead(steps[offer.donor], own_step)
        ]
        for offer in offers:
            if offer not in remaining:
                offer.refuse()
        while remaining:
            offer, began = remaining.pop(0), clock()
            succeeded = await self._import(trainer, offer, steps[offer.donor], until)
            if succeeded or clock() - began > STALE_S:
                for other in remaining:
                    other.refuse()
                return True if succeeded else None
        return False

    def _confirmed_step(self, offer: Offered, offers: list[Offered], own_step: int | None) -> int:
        """The step at which our trainer would go on with an offer's parameters.

        It is the offer's step, but at most a window beyond what another holder says, in an offer or
        as its own step. It is the run's last step only if the donor has ended. Otherwise a donor
        could end our training with true parameters and a false step.
        """
        view, last = self._view, planned_steps(self._manifest)
        claims = [other.step for other in offers if other.donor != offer.donor]
        for peer in self._view.holders():
            heard = view.acquaintances.get(peer)
            if peer != offer.donor and heard is not None and heard.about.step:
                claims.append(heard.about.step)  # 0 may be from before it took parameters over
        step = offer.step
        if claims:
            most = max(*claims, own_step or 0)
            step = min(step, most + self._manifest.round.window_steps)
        elif own_step is not None and (saved := self._node.ends.last_saved()) is not None:
            away_s = max(0.0, self._node.clock() - saved[1])
            step = min(step, own_step + int(away_s / LEAST_STEP_S))
        record = view.others().get(offer.donor)
        if last is not None and (record is None or not traits_of(record.phase).ended):
            step = min(step, max(0, last - 1))
        if step < offer.step:
            log.info("%s says step %d; it counts as %d", offer.donor[-8:], offer.step, step)
        return step

    def far_ahead(self, step: int, own_step: int) -> bool:
        """Whether a node at `own_step` lies far behind a donor at `step`."""
        windows = BEHIND_WINDOWS * self._manifest.round.window_steps
        return step - own_step > max(windows, BEHIND_SHARE * step)

    async def _offers(self, holders: list[PeerId]) -> list[Offered]:
        """Offers of some members, from those that answer about as soon as the first one."""
        clock = asyncio.get_running_loop().time
        began, offers = clock(), list[Offered]()
        asked = random.sample(holders, min(ASKED, len(holders)))
        waiting = {asyncio.create_task(self._ask(donor)) for donor in asked}
        timeout_s: float | None = None
        try:
            while waiting:
                done, waiting = await asyncio.wait(
                    waiting, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED
                )
                if not done:
                    break
                offers += [offer for task in done if (offer := task.result()) is not None]
                if offers and timeout_s is None:
                    timeout_s = max(MORE_OFFERS_S, clock() - began)
        except BaseException:
            for offer in offers:
                offer.refuse()
            raise
        finally:
            for task in waiting:
                task.cancel()
            await asyncio.gather(*waiting, return_exceptions=True)
        return offers

    async def _ask(self, donor: PeerId) -> Offered | None:
        values, last = self._manifest.model.state_values, planned_steps(self._manifest)
        try:
            offer = await donation.ask(self._party, self._dialler, donor, values, self._rates)
        except PeerError as e:
            self._refused(donor, str(e))
            return None
        if last is not None and offer.step > last:  # with it our run would be over at once
            offer.refuse()
            self._refused(donor, f"step {offer.step}, the run ends at {last}")
            return None
        return offer

    async def _import(
        self, trainer: TrainerProcess, offer: Offered, step: int, until: float | None
    ) -> bool:
        factor, nats = TOLERANCE
        clock = asyncio.get_running_loop().time
        began, donor = clock(), offer.donor
        try:
            async with asyncio.timeout_at(until):
                state = await offer.take()
            at_most = factor * state.loss_public + nats
            await trainer.import_state(state.payload, step, at_most)
        except (PeerError, TimeoutError) as e:
            why = str(e) or f"not all of it came within {clock() - began:.0f} s"
            self._refused(donor, why)
            backoff = self._failed.setdefault(donor, Backoff())
            backoff.failed(clock(), donation.PAUSE_S, clock() - began, why, agreed=True)
            return False
        self._failed.pop(donor, None)
        log.info("took over the parameters of %s at step %d", donor[-8:], step)
        try:
            await self._node.checkpoint()  # any checkpoint on the disk is of older parameters
        except LocalError as e:  # the node's health says so, and the next attempt may succeed
            log.warning("the parameters that were taken over are not saved yet: %s", e)
        return True

    def _refused(self, donor: PeerId, why: str) -> None:
        log.warning("parameters from %s refused: %s", donor[-8:], why)
        self._store.add_event("donor-refused", f"{donor}: {why}")


def ranked(offers: list[Offered]) -> list[Offered]:
    """Sort offers, the best first: by public loss, about equal ones by step."""

    def order(offer: Offered) -> tuple[int, int]:
        loss = max(offer.loss_public, 1e-9)
        return math.floor(math.log(loss, ALIKE)), -offer.step

    return sorted(offers, key=order)
