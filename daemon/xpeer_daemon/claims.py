"""What donors claim, and how far others confirm it. Nobody can measure a donor's step."""

from __future__ import annotations

import logging
import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from typing import Final, Protocol, TypeVar

from xpeer.identity import PeerId
from xpeer.manifest import Manifest
from xpeer.phase import traits_of
from xpeer.training.schedule import planned_steps
from xpeer.update import Margin
from xpeer_daemon.node import Node
from xpeer_daemon.swarm_view import SwarmView

log = logging.getLogger("xpeer.daemon")

ALIKE: Final = 1.05
"""Public losses within this factor are about equal."""
UNCONFIRMED: Final = Margin(1.25, 0.5)
"""How much worse than the swarm's start a donor's public loss may be if nobody confirms it. The
start's was measured on a few records only, and the noise of privacy may move a young model away."""
LEAST_STEP_S: Final = 1e-3
"""No step is shorter. This bounds a donor's step where nobody else can confirm it."""


class Claim(Protocol):
    """What an offer and a signed tree have in common."""

    @property
    def donor(self) -> PeerId:
        """The member."""

    @property
    def step(self) -> int:
        """Its steps, as it claims."""

    @property
    def loss_public(self) -> float:
        """Its public loss, as it claims; nats per token."""


_C = TypeVar("_C", bound=Claim)


class Claims:
    """The claims of all members that hold parameters, at one moment.

    Args:
        node: this node.
        view: knows the holders, and what steps they told of.
        manifest: of the swarm.
        offers: the donors' claims.
        own_step: of our parameters; None = we have none.
        saved_at: when they were saved, by the node's clock; None = unknown, or we have none.

    Attributes:
        own_step: as given.
    """

    def __init__(
        self,
        node: Node,
        view: SwarmView,
        manifest: Manifest,
        offers: Sequence[Claim],
        own_step: int | None,
        saved_at: float | None,
    ) -> None:
        self._node, self._view, self._manifest = node, view, manifest
        self.own_step, self._saved_at = own_step, saved_at
        self._steps = {offer.donor: offer.step for offer in offers}
        for peer in view.holders():
            if step := heard_step(view, peer):
                self._steps[peer] = max(step, self._steps.get(peer, 0))

    def step_of(self, claim: Claim) -> int:
        """The step at which our trainer would go on with a donor's parameters.

        It is the donor's step, but at most a window beyond the median of all that hold parameters,
        the donor included. It is the run's last step only if the donor has ended. Otherwise a donor
        could end our training with true parameters and a false step.
        """
        view, last = self._view, planned_steps(self._manifest)
        step = self._bounded(claim, statistics.median_low)
        record = view.others().get(claim.donor)
        if last is not None and (record is None or not traits_of(record.phase).ended):
            step = min(step, max(0, last - 1))
        if step < claim.step:
            log.info("%s says step %d; it counts as %d", claim.donor[-8:], claim.step, step)
        return step

    def perhaps_at(self, claim: Claim) -> int:
        """The step that a donor may have reached: by this it is chosen, not by the one that counts.

        Of two that hold parameters one may lie far behind, or lie. If that one's step decided, we
        would keep our own parameters, however far ahead the other one is. What comes is measured.
        """
        return self._bounded(claim, statistics.median_high)

    def _bounded(self, claim: Claim, median: Callable[[Iterable[int]], int]) -> int:
        own_step, step = self.own_step, claim.step
        others = [step for peer, step in self._steps.items() if peer != claim.donor]
        if others:
            most = max(median([*others, claim.step]), own_step or 0)
            step = min(step, most + self._manifest.round.window_steps)
        elif own_step is not None:
            now_s = self._node.clock()
            away_s = max(0.0, now_s - (now_s if self._saved_at is None else self._saved_at))
            step = min(step, own_step + int(away_s / LEAST_STEP_S))
        return step


def heard_step(view: SwarmView, peer: PeerId) -> int | None:
    """The step that a member told of last; None = it told of none.

    0 is none, too: it may be from before the member took parameters over.
    """
    heard = view.acquaintances.get(peer)
    return (heard.about.step or None) if heard is not None else None


def doubtful(offer: Claim, offers: Sequence[Claim], start_loss: float) -> bool:
    """Whether an offer is worse than what the swarm started from, and nobody confirms it.

    A second donor confirms it with about the same public loss.
    """
    if offer.loss_public <= UNCONFIRMED.above(start_loss):
        return False
    least, most = offer.loss_public / ALIKE, offer.loss_public * ALIKE
    return not any(
        other.donor != offer.donor and least <= other.loss_public <= most for other in offers
    )


def ranked(offers: Sequence[_C]) -> list[_C]:
    """Sort offers, the best first: by public loss, about equal ones by step."""

    def order(offer: _C) -> tuple[int, int]:
        loss = max(offer.loss_public, 1e-9)
        return math.floor(math.log(loss, ALIKE)), -offer.step

    return sorted(offers, key=order)
