"""Has the trainer take over the parameters that were gathered, if they are as good as claimed."""

from __future__ import annotations

import logging
import random
from typing import Final

from xpeer.errors import LocalError, PeerError, Reason
from xpeer.manifest import Manifest
from xpeer.network.pieces import Tree
from xpeer.trainer.client import TrainerProcess
from xpeer.update import Margin
from xpeer_daemon.ahead import Ahead
from xpeer_daemon.claims import Claims
from xpeer_daemon.conduct import Conduct
from xpeer_daemon.node import Node
from xpeer_daemon.offers import Offers
from xpeer_daemon.store import Store
from xpeer_daemon.takeover import Takeover

log = logging.getLogger("xpeer.daemon")

TOLERANCE: Final = Margin(1.15, 0.05)
"""How much worse than offered a donor's public loss may be."""


class Import:
    """From all pieces in the home to the trainer's parameters, for one node.

    Args:
        node: saves a checkpoint.
        store: remembers events.
        manifest: of the swarm.
        offers: avoids donors of bad parameters.
        takeover: has the pieces.
        conduct: of all donors.
        ahead: knows how far ahead a donor has to be.
    """

    def __init__(
        self,
        node: Node,
        store: Store,
        manifest: Manifest,
        offers: Offers,
        takeover: Takeover,
        conduct: Conduct,
        ahead: Ahead,
    ) -> None:
        self._node, self._store, self._manifest = node, store, manifest
        self._offers, self._takeover, self._conduct = offers, takeover, conduct
        self._ahead = ahead

    async def into(self, trainer: TrainerProcess, claims: Claims, took_s: float) -> bool:
        """Have the trainer take over what was gathered, if it is as good as its donors say.

        If it is not, and is of several donors, all is fetched from one of them, whose pieces stay:
        nobody is blamed for a mixture. Snapshots of one donor are no such mixture. Chance decides
        who: whoever gave most of it may have been the fastest because it wanted that.
        """
        trees = self._takeover.trees()
        at_most = min(TOLERANCE.above(tree.loss_public) for tree in trees)
        step = min(claims.step_of(tree) for tree in trees)
        ahead = self._ahead.least_step(min(claims.perhaps_at(tree) for tree in trees))
        before = ahead if claims.own_step is not None else None
        try:
            payload, codec = await self._takeover.payload(), self._manifest.state_form.codec
            await trainer.import_state(payload, step, at_most, codec, before)
        except PeerError as e:
            if e.reason == Reason.NOT_AHEAD:
                self._come_late(trees, e)
                return False
            alone = random.choice(sorted({tree.donor for tree in trees}))
            others = [tree for tree in trees if tree.donor != alone]
            self._takeover.keep_of(alone if others else None)
            self._conduct.let_all_give()
            if others:
                self._conduct.has_to_give_alone(alone)
                log.warning("a mixture of %d members' parameters is refused: %s", len(trees), e)
            elif e.reason == Reason.WORSE_THAN_OURS:
                log.info("%s gives worse parameters than ours: %s", alone[-8:], e)
                self._conduct.worse.add(alone)
            else:
                self._offers.avoid(alone, str(e), took_s)
                self._conduct.blamed.add(alone)
                self._conduct.wastes(alone)
            return False
        for tree in trees:
            self._offers.succeeded(tree.donor)
        self._conduct.forget()
        names = ", ".join(tree.donor[-8:] for tree in trees)
        log.info("took over the parameters of %s at step %d", names, step)
        self._store.add_event("took-over", f"step {step}, {self._takeover.summary()}, from {names}")
        await self._save()
        return True

    def _come_late(self, trees: list[Tree], why: PeerError) -> None:
        """Forget what donors gave who are not far ahead any more. That is no fault of theirs."""
        names = ", ".join(tree.donor[-8:] for tree in trees)
        log.info("the parameters of %s are not far ahead any more: %s", names, why)
        self._store.add_event("no-longer-ahead", f"{why.detail}, from {names}")
        self._takeover.keep_of(None)
        self._conduct.let_all_give()
        self._conduct.come_late(tree.donor for tree in trees)

    async def _save(self) -> None:
        try:
            await self._node.checkpoint()  # any checkpoint on the disk is of older parameters
        except LocalError as e:  # the node's health says so, and the next attempt may succeed
            log.warning("the parameters that were taken over are not saved yet: %s", e)
