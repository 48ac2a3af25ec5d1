"""The phases of a node's life as one table: what each means, and which may follow it.

All code that depends on a phase asks this table: gossip, joiners, the end of a run, status.
docs/architecture.md draws it, and a test compares both.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Final, Literal

TrainerPhase = Literal["starting", "training", "paused", "mixing", "closing", "budget-spent"]
"""What the trainer's loop does. mixing: it was ordered to, or it lacks text or parameters. closing:
the end condition was reached. budget-spent: no private step is left. In the last four it takes no
steps, but serves snapshots and merges."""

Order = Literal["train", "mix", "pause"]
"""What the trainer's loop is to do. train: take steps. mix and pause: take none, but serve
snapshots and merges at once. These two differ only in what the operator reads."""


class Phase(enum.StrEnum):
    """Where a node is in its life. The values are what `status` and cards say."""

    STARTING = "starting"
    JOINING = "joining"
    FETCHING = "fetching"
    WAITING = "waiting"
    TRAINING = "training"
    MIXING = "mixing"
    PAUSED = "paused"
    BUDGET_SPENT = "budget-spent"
    CLOSING = "closing"
    FINISHED = "finished"
    OBSERVING = "observing"
    STOPPING = "stopping"

    @property
    def traits(self) -> Traits:
        """What a node does in this phase."""
        return TABLE[self]


@dataclass(frozen=True, kw_only=True)
class Traits:
    """One row of the table.

    Attributes:
        meaning: for people.
        then: phases that may follow. Every phase but the last may be followed by STOPPING.
        order: what the trainer is ordered to do.
        exchanges: True iff the node exchanges with partners.
        ended: True iff the node takes no further steps in this run, as far as it knows.
        holds_parameters: True iff it holds the swarm's parameters and gives them to joiners.
        counts_as_present: True iff such a member counts for `training.min_peers`.
        takes_part: True iff the end of a run considers such a member: it trains, is about to, or
            has ended. Nobody waits for a member that is paused.
        follows_trainer: True iff the phase changes when the trainer's loop does something else.
        card: the phase that the node's card names instead, for members of earlier versions that
            don't know this one; "" = this one.
    """

    meaning: str
    then: frozenset[Phase] = frozenset()
    order: Order = "mix"
    exchanges: bool = False
    ended: bool = False
    holds_parameters: bool = False
    counts_as_present: bool = False
    takes_part: bool = False
    follows_trainer: bool = False
    card: str = ""

    @property
    def delays_the_end(self) -> bool:
        """Whether other members wait for this one before they end: it may take more steps."""
        return self.takes_part and not self.ended


_meets = partial(
    Traits, exchanges=True, holds_parameters=True, counts_as_present=True, takes_part=True
)
_WORKING: Final = (Phase.TRAINING, Phase.MIXING)
_EXCHANGING: Final = (*_WORKING, Phase.BUDGET_SPENT, Phase.CLOSING, Phase.FINISHED)


def _then(*phases: Phase) -> frozenset[Phase]:
    return frozenset({*phases, Phase.STOPPING})


TABLE: Final[Mapping[Phase, Traits]] = {
    Phase.STARTING: Traits(
        meaning="the daemon comes up",
        then=_then(Phase.JOINING),
    ),
    Phase.JOINING: Traits(
        meaning="no member has admitted this node yet, or its trainer reads text and model",
        then=_then(Phase.FETCHING, Phase.WAITING, Phase.OBSERVING),
    ),
    Phase.FETCHING: Traits(
        meaning="the parameters come from a member",
        then=_then(Phase.WAITING, Phase.PAUSED, *_WORKING),
        counts_as_present=True,
        takes_part=True,
    ),
    Phase.WAITING: Traits(
        meaning="fewer members than `training.min_peers` are there",
        then=_then(Phase.FETCHING, Phase.PAUSED, *_WORKING),
        holds_parameters=True,
        counts_as_present=True,
        takes_part=True,
    ),
    Phase.TRAINING: _meets(
        meaning="steps and exchanges",
        then=_then(
            Phase.MIXING, Phase.PAUSED, Phase.BUDGET_SPENT, Phase.CLOSING, Phase.FETCHING
        ),
        order="train",
        follows_trainer=True,
    ),
    Phase.MIXING: _meets(
        meaning="the text can't be read: exchanges without steps",
        then=_then(
            Phase.TRAINING, Phase.PAUSED, Phase.BUDGET_SPENT, Phase.CLOSING, Phase.FETCHING
        ),
        order="train",
        follows_trainer=True,
        card="budget-spent",
    ),
    Phase.PAUSED: Traits(
        meaning="by `xpeer pause`: no steps and no exchanges; the node goes on where it was",
        then=_then(Phase.FETCHING, *_EXCHANGING),
        order="pause",
        holds_parameters=True,
        counts_as_present=True,
    ),
    Phase.BUDGET_SPENT: _meets(
        meaning="no private step is left: exchanges without steps",
        then=_then(
            Phase.TRAINING, Phase.PAUSED, Phase.CLOSING, Phase.FINISHED, Phase.FETCHING
        ),
        order="train",
        ended=True,
        follows_trainer=True,
    ),
    Phase.CLOSING: _meets(
        meaning="the run's last step is taken: exchanges until all models are nearly the same",
        then=_then(
            Phase.TRAINING, Phase.PAUSED, Phase.BUDGET_SPENT, Phase.FINISHED, Phase.FETCHING
        ),
        order="train",
        ended=True,
        follows_trainer=True,
    ),
    Phase.FINISHED: _meets(
        meaning="the run is over and saved; the node serves those who have not finished",
        then=_then(Phase.PAUSED, Phase.FETCHING),
        ended=True,
    ),
    Phase.OBSERVING: Traits(
        meaning="an observer: it sees who is there, and neither trains nor exchanges",
        then=_then(),
    ),
    Phase.STOPPING: Traits(meaning="the daemon saves and ends"),
}  # fmt: skip
"""What a node does in each phase."""

_UNKNOWN: Final = Traits(meaning="said by a member of another version, or one that has left")


def traits_of(phase: str) -> Traits:
    """What a member does in the phase that its card names; in an unknown phase, nothing.

    Args:
        phase: from a card of any version, "left" included.
    """
    return TABLE[Phase(phase)] if phase in _VALUES else _UNKNOWN


_VALUES: Final = frozenset(Phase)
