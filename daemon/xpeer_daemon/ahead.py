"""Which members are far ahead of a node that has parameters, or may be, as far as it knows."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping

from xpeer.identity import PeerId
from xpeer.manifest import Manifest
from xpeer_daemon.claims import heard_step
from xpeer_daemon.conditions import names
from xpeer_daemon.conduct import Conduct
from xpeer_daemon.node import Node
from xpeer_daemon.offers import Offers
from xpeer_daemon.store import Store
from xpeer_daemon.swarm_view import SwarmView

log = logging.getLogger("xpeer.daemon")

BEHIND_WINDOWS, BEHIND_SHARE = 4, 0.05
"""A node lies far behind if a donor is more windows ahead than this, and also more than this
fraction of the donor's steps. Training and merging make up for less by themselves, and the node's
own optimiser moments are worth more than the difference."""


class Ahead:
    """Members that may be far ahead of one node.

    Args:
        view: knows the holders, and what steps they told of.
        manifest: of the swarm.
        offers: knows who owes an offer.
        conduct: knows whose parameters are not wanted.

    Attributes:
        members: those of the last look; empty before the first one.
        offering: those of them that offered parameters, and they are wanted.
        unconfirmed: members that say that they are far ahead, and too few others are nearly so far.
            They are named at the end; what they offer is not wanted.
    """

    def __init__(
        self, view: SwarmView, manifest: Manifest, offers: Offers, conduct: Conduct
    ) -> None:
        self._view, self._manifest = view, manifest
        self._offers, self._conduct = offers, conduct
        self.members: list[PeerId] = []
        self.offering: list[PeerId] = []
        self.unconfirmed: list[PeerId] = []

    def is_far(self, step: int, own_step: int) -> bool:
        """Whether a node at `own_step` lies far behind a donor at `step`."""
        return own_step < self.least_step(step)

    def least_step(self, step: int) -> int:
        """The first step at which a node does not lie far behind a donor at `step`."""
        windows = BEHIND_WINDOWS * self._manifest.round.window_steps
        return math.ceil(step - max(windows, BEHIND_SHARE * step))

    def look(self, own_step: int, offered: Mapping[PeerId, bool] | None) -> None:
        """Note who may be far ahead.

        Args:
            own_step: see `candidates`.
            offered: see there. None = the time was over before they had answered, so those that
                offered parameters before still do.
        """
        if offered is not None:
            self.members = self.candidates(own_step, offered)
            self.offering = [peer for peer in self.members if peer in offered]
        else:
            self.members = self.candidates(own_step, dict.fromkeys(self.offering, True))
            self.offering = [peer for peer in self.members if peer in self.offering]

    def candidates(self, own_step: int, offered: Mapping[PeerId, bool]) -> list[PeerId]:
        """Members that may be far ahead: by their offers, or they told of such a step, or they owe
        an offer.

        Who can't be reached and never told its step does not count: it may be so for good.

        Args:
            own_step: of our parameters.
            offered: whether the offer of each member that made one is wanted.
        """
        found = list[PeerId]()
        without = self._conduct.blamed | self._conduct.worse
        for peer in self._view.holders():
            step = heard_step(self._view, peer)
            if peer in offered:
                ahead = offered[peer]
            elif step is None:
                ahead = self._offers.owes_an_offer(peer)
            else:
                ahead = self.is_far(step, own_step) and not self._offers.offers_none(peer)
            if ahead and peer not in without:
                found.append(peer)
        return found

    def end(self, node: Node, store: Store, own_step: int, *, caught_up: bool) -> None:
        """Say how the node caught up, or that it goes on though members may be far ahead."""
        left = [] if caught_up else [*self.members, *self.unconfirmed]
        who = names(self._view, left)
        node.health.hold("not-caught-up", bool(left), who=who, step=own_step)
        if caught_up:
            store.add_event("caught-up", f"from step {own_step}")
        elif left:
            store.add_event("not-caught-up", f"step {own_step}; perhaps ahead: {who}")
            log.warning("step %d is gone on with, and these may be far ahead: %s", own_step, who)
        self.members, self.offering, self.unconfirmed = [], [], []
