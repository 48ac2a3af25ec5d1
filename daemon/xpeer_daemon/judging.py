"""Which offers are good enough to be fetched, by what their donors claim."""

from __future__ import annotations

import logging

from xpeer.manifest import Manifest
from xpeer.network.giving import Giver
from xpeer.trainer.client import TrainerProcess
from xpeer.update import WORSE
from xpeer_daemon.claims import doubtful
from xpeer_daemon.conduct import Conduct
from xpeer_daemon.node import Node
from xpeer_daemon.offers import refuse
from xpeer_daemon.swarm_view import SwarmView

log = logging.getLogger("xpeer.daemon")


class Judge:
    """Judges offers, for one node.

    Args:
        node: its health says if all need the operator's word.
        view: knows names.
        manifest: of the swarm.
        conduct: of all donors.
        accept: PeerID of a donor whose parameters the operator accepts, even if they are
            worse than the swarm's start; None = of nobody.

    Attributes:
        doubts: True iff the last offers need the operator's word.
    """

    def __init__(
        self, node: Node, view: SwarmView, manifest: Manifest, conduct: Conduct, accept: str | None
    ) -> None:
        self._node, self._view, self._manifest = node, view, manifest
        self._conduct = conduct
        self.accept = accept
        self.doubts = False
        self._own_loss: float | None = None
        """Public loss of the trainer's parameters, once it was measured. Offers wait meanwhile, and
        their links are closed if that takes long: then it is known when they are asked again."""

    def forget(self) -> None:
        """Nobody's parameters are wanted any more."""
        self.doubts, self._own_loss = False, None
        self._node.health.clear("donor-doubtful")

    def is_doubtful(self, offer: Giver, offers: list[Giver]) -> bool:
        """Whether an offer needs the operator's word, or another donor's."""
        accepted = offer.donor == self.accept
        return not accepted and doubtful(offer, offers, self._manifest.start_loss)

    def undoubted(self, offers: list[Giver]) -> list[Giver]:
        """Offers that need no word of the operator, without those of blamed donors if there are
        others. If all need it, the node's health says so.

        Blamed donors confirm nobody, and nobody confirms them. Who is doubtful keeps none of them
        from giving.
        """
        voices = self._conduct.unblamed(offers)
        good = [o for o in offers if not self.is_doubtful(o, voices if o in voices else [])]
        self.doubts = bool(offers) and not good
        if offers:
            best = voices[0]
            who = self._view.name_of(best.donor)
            self._node.health.hold(
                "donor-doubtful",
                self.doubts,
                who=who,
                peer_id=best.donor,
                loss=best.loss_public,
                start=self._manifest.start_loss,
            )
        else:
            self._node.health.clear("donor-doubtful")
        return self._conduct.unblamed(good)

    async def better(self, trainer: TrainerProcess, offers: list[Giver]) -> list[Giver]:
        """Offers of parameters that are not worse than ours: others would be fetched in vain."""
        if self._own_loss is None:
            try:
                self._own_loss = (await trainer.evaluate()).public
            except BaseException:
                refuse(offers)
                raise
        own = self._own_loss
        good = [o for o in offers if not o.loss_public > WORSE.above(own)]
        if not good:
            log.info("public loss %.4f: nobody who is far ahead offers as good a one", own)
        return [offer for offer in good if offer.donor not in self._conduct.worse]
