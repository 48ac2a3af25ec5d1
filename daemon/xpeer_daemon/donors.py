"""Taking over the parameters of another member: by a node that has none, or lies far behind.

The initial model is for a swarm in which nobody holds parameters. A member that lost its own, even
the founder, takes over another's. So does one whose checkpoint lies far behind the others: merging
old parameters would pull everybody back. Its ledger stays its own.

The node asks donors for offers, and tries the best one first: the one with the lowest public loss,
or with the most steps among about equal losses. The trainer measures the loss before the offer
replaces anything. Nobody can measure an offer's step, so it counts only as far as other members
confirm it (`claims`). A donor that failed is avoided for a while. Several donors whose offers are
alike give pieces at the same time (`takeover`).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
from collections.abc import Collection
from typing import Final

from xpeer.errors import LocalError, PeerError, Reason
from xpeer.identity import PeerId
from xpeer.manifest import Manifest
from xpeer.network import turns
from xpeer.network.giving import DIAL_TIMEOUT_S, Giver
from xpeer.network.shelf import PREPARE_TIMEOUT_S
from xpeer.phase import Phase
from xpeer.trainer.client import TrainerProcess
from xpeer_daemon.ahead import Ahead
from xpeer_daemon.claims import Claim, Claims, ranked
from xpeer_daemon.conduct import ALONE_TRIES, Conduct
from xpeer_daemon.importing import TOLERANCE, Import
from xpeer_daemon.judging import Judge
from xpeer_daemon.node import Node
from xpeer_daemon.offers import MORE_OFFERS_S, Offers, refuse
from xpeer_daemon.store import Store
from xpeer_daemon.swarm_view import SwarmView
from xpeer_daemon.takeover import Ended, Takeover

log = logging.getLogger("xpeer.daemon")

RETRY_S = 2.0
DOUBT_S = 15.0
"""Offers that need the operator's word, or a second donor's, are asked for again after this time:
each costs the donor a copy now and then."""
PARALLEL: Final = 3
"""Number of donors that give at the same time, at most."""
PATIENCE_S: Final = 300.0
"""A founder that lost its parameters waits this long for a member that holds the swarm's, and as
long again if the last one is gone."""
FROM_INITIAL: Final = "(`xpeer start --from-initial` begins at once with the initial model)"
GRACE_S: Final = 5.0
"""A node that resumes waits this long for members that it knows. Then it trains, and asks later."""
CATCH_UP_S: Final = 900.0
"""A node with a good checkpoint looks for better parameters for this long, and for as long again if
a donor that was not tried offers some then, as long as that time serves to try one. Then it trains.
"""
STALE_S: Final = 10.0
"""After a longer failure the other offers may have lapsed, so they are asked for anew."""


class Donors:
    """Fetches parameters from other members, for one node.

    Args:
        node: its phase and note say what is going on.
        view: knows who holds parameters.
        store: remembers events.
        manifest: of the swarm.
        offers: asks members.
        takeover: gathers what they give.
        accept: PeerID of the donor whose parameters the operator accepts, even if they are
            worse than the swarm's start; None = of nobody.
    """

    def __init__(
        self,
        node: Node,
        view: SwarmView,
        store: Store,
        manifest: Manifest,
        offers: Offers,
        takeover: Takeover,
        accept: str | None = None,
    ) -> None:
        self._node, self._view, self._store = node, view, store
        self._manifest = manifest
        self._offers, self._takeover = offers, takeover
        self._conduct = Conduct(view, node.life)
        self._ahead = Ahead(view, manifest, offers, self._conduct)
        self._judge = Judge(node, view, manifest, self._conduct, accept)
        self._known: TrainerProcess | None = None
        """The trainer that caught up last, or tried to."""
        self._known_saved_at: float | None = None
        self._import = Import(node, store, manifest, offers, takeover, self._conduct, self._ahead)

    async def take_over(self, trainer: TrainerProcess, patience_s: float = math.inf) -> bool:
        """Give the swarm's parameters to a trainer that has none.

        Args:
            trainer: awaits them.
            patience_s: how long to wait while no member holds any. It is finite for a founder,
                that may begin the swarm anew.

        Returns:
            Whether the trainer has them now.
        """
        life, clock = self._node.life, asyncio.get_running_loop().time
        life.enter(Phase.FETCHING)
        until, has_warned = clock() + patience_s, False
        gone_until = until
        while True:
            holders = self._view.holders()
            if not holders and clock() >= gone_until:
                self.forget()
                return False
            life.note = f"fetching: {len(holders)} members could give the parameters"
            if not holders and patience_s < math.inf:
                life.note = (
                    "this swarm ran before, and its parameters are lost here: waiting "
                    f"{gone_until - clock():.0f} s more for a member that holds them {FROM_INITIAL}"
                )
            elif clock() >= until:
                life.note = (
                    f"this swarm ran before, and its parameters are lost here: {len(holders)} "
                    f"members say that they hold them, and none has given them {FROM_INITIAL}"
                )
                if not has_warned:
                    log.warning("%s", life.note)
                has_warned = True
            came = self._takeover.came
            if await self._take_over_best(trainer, own_step=None):
                life.note = ""
                self.forget()
                return True
            if holders or self._takeover.came > came:  # lines break, and what they gave is here
                gone_until = clock() + patience_s
            await asyncio.sleep(DOUBT_S if self._judge.doubts else RETRY_S)

    def forget(self) -> None:
        """Remove what was fetched so far, and forget who failed how: nobody's parameters are wanted
        any more.
        """
        self._takeover.forget()
        self._conduct.forget()
        self._judge.forget()

    async def catch_up(self, trainer: TrainerProcess) -> bool:
        """Take over a donor's parameters if ours lie far behind; returns whether there was a donor
        to ask. The trainer may take steps meanwhile.
        """
        saved_at = self._saved_at(trainer)
        if not self._view.holders():
            return False
        self._node.life.compares = True
        try:
            own_step, succeeded = await self._caught_up(trainer, saved_at)
        finally:
            self._node.life.compares = False
        self._ahead.end(self._node, self._store, own_step, caught_up=succeeded)
        self._node.life.note = ""
        self.forget()
        return True

    def _saved_at(self, trainer: TrainerProcess) -> float | None:
        """When the checkpoint was saved that this trainer resumed from; None = unknown.

        Once it has gone on, that checkpoint is removed some time. A trainer that began anew has
        shared no step with anybody, so the time says nothing: long ago.
        """
        if trainer is not self._known:
            self._known, step = trainer, trainer.resumed_step
            self._known_saved_at = self._node.ends.saved_at(step) if step is not None else 0.0
        return self._known_saved_at

    async def _caught_up(self, trainer: TrainerProcess, saved_at: float | None) -> tuple[int, bool]:
        """Returns the step from which the node has caught up, or goes on; and whether it has."""
        clock = asyncio.get_running_loop().time
        until, tries = clock() + CATCH_UP_S, -1
        while True:
            own_step = max(trainer.step, trainer.resumed_step or 0)  # it has yet to report
            succeeded = await self._take_over_best(trainer, own_step, until, saved_at)
            if succeeded is not None:
                return own_step, succeeded
            if clock() + turns.PAUSE_S >= until:
                in_vain = self._conduct.fresh_tries == tries
                if in_vain or not self._conduct.untried(self._ahead.offering):
                    return own_step, False
                until, tries = clock() + turns.PAUSE_S + CATCH_UP_S, self._conduct.fresh_tries
            await asyncio.sleep(turns.PAUSE_S)

    async def _take_over_best(
        self,
        trainer: TrainerProcess,
        own_step: int | None,
        until: float | None = None,
        saved_at: float | None = None,
    ) -> bool | None:
        """Take over the best offer that is as good as it says.

        Args:
            trainer: gets the parameters.
            own_step: offers that are not far ahead of this step, or worse than the trainer's
                parameters, are refused; None: none are.
            until: end by the loop's clock. Only the measuring may end later.
            saved_at: when the checkpoint was saved that the trainer went on from; None = unknown.

        Returns:
            Whether the trainer has an offer's parameters. None = offers have to be asked for again:
            an attempt failed and took long, or one donor has to give everything; or members may be
            far ahead of `own_step`, and have not given.
        """
        clock = asyncio.get_running_loop().time
        offers = list[Giver]()
        in_time = False
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout_at(until):
                offers = await self._ask(own_step)
                in_time = True
        claims = Claims(self._node, self._view, self._manifest, offers, own_step, saved_at)
        conduct, remaining = self._conduct, ranked(offers)
        if own_step is None:
            remaining = self._judge.undoubted(remaining)
        else:
            remaining = conduct.unblamed(await self._far_ahead(trainer, remaining, claims))
        others = [offer for offer in remaining if offer.donor != conduct.alone]
        if others and (conduct.alone_failed >= ALONE_TRIES or len(others) == len(remaining)):
            self._let_go_alone()
            remaining = others
        remaining = conduct.untried_first(remaining)
        refuse([offer for offer in offers if offer not in remaining])
        wanted = {offer.donor for offer in remaining}
        try:
            while remaining and (until is None or clock() < until):
                chosen, began = self._chosen(remaining), clock()
                remaining = [offer for offer in remaining if offer not in chosen]
                taken = await self._attempt(trainer, chosen, claims, until)
                if taken is not False:
                    return bool(taken)
                if conduct.alone is not None or clock() - began > STALE_S:
                    return None
        finally:
            refuse(remaining)
            if own_step is not None:
                offered = {offer.donor: offer.donor in wanted for offer in offers}
                self._ahead.look(own_step, offered if in_time else None)
        return None if self._ahead.members else False

    async def _far_ahead(
        self, trainer: TrainerProcess, offers: list[Giver], claims: Claims
    ) -> list[Giver]:
        """Offers of donors that are far ahead, as others confirm, and not worse than our own.

        Notes who says so unconfirmed.
        """
        ahead, own_step = self._ahead, claims.own_step or 0
        said = [offer for offer in offers if ahead.is_far(offer.step, own_step)]
        if said:
            said = await self._judge.better(trainer, said)
        far = [offer for offer in said if ahead.is_far(claims.perhaps_at(offer), own_step)]
        unconfirmed = {offer.donor for offer in said if offer not in far}
        if offers:
            ahead.unconfirmed = sorted(unconfirmed - self._conduct.blamed)
        return far

    async def _ask(self, own_step: int | None) -> list[Giver]:
        """Offers: of who has to give everything alone if that is enough to decide, else of all."""
        await self._takeover.recall()
        first = [tree.donor for tree in self._takeover.trees()]
        if own_step is not None:
            first += self._ahead.candidates(own_step, {})
        offers = await self._ask_alone()
        if offers and own_step is None and not self._judge.is_doubtful(offers[0], offers):
            return offers
        within_s = MORE_OFFERS_S if offers else math.inf  # its link would not last longer
        try:
            asked = [offer.donor for offer in offers]
            return [*offers, *await self._offers.ask_all(first, asked, within_s)]
        except BaseException:
            refuse(offers)
            raise

    async def _ask_alone(self) -> list[Giver]:
        """The offer of who has to give everything alone; empty if anybody may give, or it failed
        ALONE_TRIES times, or took as long as a copy may take. It is asked by itself: who spoilt the
        mixture would answer sooner.
        """
        conduct, donor = self._conduct, self._conduct.alone
        until = asyncio.get_running_loop().time() + DIAL_TIMEOUT_S + PREPARE_TIMEOUT_S
        while donor is not None and donor in self._view.holders():
            if conduct.alone_failed >= ALONE_TRIES:
                break
            try:
                async with asyncio.timeout_at(until):
                    return [await self._offers.ask_one(donor)]
            except TimeoutError:
                conduct.alone_takes_too_long()
            except PeerError as e:
                conduct.alone_offers_nothing(busy=e.reason == Reason.CLOSED)
            await asyncio.sleep(turns.PAUSE_S)
        return []

    def _let_go_alone(self) -> None:
        """Let others give than who should have given all alone. It rests unless it was busy."""
        if (donor := self._conduct.alone) is None:
            return
        if not self._conduct.alone_is_busy:
            self._offers.avoid(donor, "it gives nothing any more")
        self._takeover.drop(donor)  # with others' its pieces were bad already
        self._conduct.let_alone_go()

    def _chosen(self, offers: list[Giver]) -> list[Giver]:
        """The donors to fetch from at the same time: the best one, and others that are alike."""
        conduct = self._conduct
        best = next((o for o in offers if o.donor == conduct.alone), self._half_here(offers))
        if best.donor in conduct.shy and conduct.alone is None:
            conduct.has_to_give_alone(best.donor)
        if best.donor == conduct.alone:
            return [best]
        others = [o for o in offers if o is not best and o.donor not in conduct.shy]
        return [best, *[o for o in others if self._alike(best, o)][: PARALLEL - 1]]

    def _half_here(self, offers: list[Giver]) -> Giver:
        """The best offer that half of the parameters is here for; else the best one.

        If a transfer takes long, snapshots of now are not alike with those that it began with. The
        rest of these comes faster than all of others.
        """
        best = offers[0]
        half = self._manifest.state_form.num_bytes / 2
        for offer in offers:
            alike = [tree for tree in self._takeover.trees() if self._alike(offer, tree)]
            here = sum(map(self._takeover.bytes_of, alike))
            good = offer.loss_public <= TOLERANCE.above(best.loss_public)
            if good and here >= half and offer.donor not in self._conduct.shy:
                return offer
        return best

    async def _more(self, without: Collection[PeerId]) -> list[Giver]:
        """Further offers, the best first; none while one donor alone has to give all."""
        if self._conduct.alone is not None:
            return []
        without = [*without, *self._conduct.blamed, *self._conduct.shy]
        return ranked(await self._offers.ask_all(without=without, any_will_do=True))

    async def _others_offer(self, without: Collection[PeerId]) -> bool:
        """Whether any member but these offers parameters now, of whatever kind."""
        offers = await self._offers.ask_all(without=without, any_will_do=True)
        refuse(offers)
        return bool(offers)

    def _alike(self, best: Claim, other: Claim) -> bool:
        """Whether pieces of another snapshot may be put together with those of the best one.

        Both losses are about equal, as the mixture is measured by the lower one.

        Neighbours differ by the consensus distance. Snapshots of other times differ by training,
        too.
        """
        far = self._ahead.is_far(best.step, other.step) or self._ahead.is_far(other.step, best.step)
        losses = best.loss_public, other.loss_public
        return not far and max(losses) <= TOLERANCE.above(min(losses))

    async def _attempt(
        self, trainer: TrainerProcess, chosen: list[Giver], claims: Claims, until: float | None
    ) -> bool | None:
        """Whether the trainer has these donors' parameters; None = nobody's have room."""
        first, clock = chosen[0], asyncio.get_running_loop().time
        began, alone = clock(), first.donor == self._conduct.alone
        self._conduct.begins(first.donor)
        try:
            ended = await self._takeover.gather(
                chosen,
                1 if alone else PARALLEL,
                lambda tree: self._alike(first, tree) and (not alone or tree.donor == first.donor),
                self._more,
                until,
                CATCH_UP_S,
                self._others_offer,
            )
        except LocalError as e:
            refuse(chosen)
            if until is None:
                raise
            log.warning("the node goes on with its own parameters: %s", e)  # e.g. a full disk
            return None
        if ended is Ended.WHOLE:
            return await self._import.into(trainer, claims, clock() - began)
        self._conduct.ended(first.donor, ended)
        return False
