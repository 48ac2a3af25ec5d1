"""How far a partner's vectors may be from ours before they are clipped.

    limit_j = clamp(4 * median over the partners k != j of (median of their accepted norms),
                    8 M, 16 M)

M is how far our own training moves a fragment between two merges of it. Honest partners train as we
do, so they are a few M away (docs/decisions.md has the measurements). While our learning rate warms
up, partners that are further along move more than we do; when it has decayed, those that lie behind
do. M is scaled up for both.

Clipped norms are not counted as accepted, and a partner's own norms do not count for its own limit.
So nobody can raise its own limit, and several partners that collude can't raise it beyond the cap.
If a partner is clipped several times in a row, each further difference beyond the limit is clipped
to half as much as the one before, but not below 2 M. A difference within the limit always passes.

The limits depend only on values that were exchanged: M is the distance between two of our own
snapshots, less what merges added.
"""

from __future__ import annotations

import statistics
import threading
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Final

import torch

Limit = Callable[[float, float], float]
"""Maps ||Q(theta_i[f])|| and ||z|| to the norm that z keeps: its own, or a smaller one."""

CLIP_MULTIPLE: Final = 4.0
CLIP_AFTER: Final = 5
"""Accepted norms of other partners below which a median means nothing."""
CLIP_HISTORY: Final = 16
"""Number of norms kept for each partner."""
MAX_PARTNERS: Final = 64
"""Number of partners whose norms are kept: those whose differences were merged last."""
CLIP_FLOOR: Final = 0.01
"""Relative distance that is never clipped. int8 alone causes 0.006. During closing the medians tend
to zero, and without this floor they would keep peers apart for ever."""
FLOOR, CAP = 8.0, 16.0
"""Bounds of the limit in units of M. While there is no median, the limit is the cap. 99 of 100
honest partners are within 4.2 M at equal speeds. A peer that is four times slower than the others
sees them at up to 15 M."""
NARROWEST: Final = 2.0
"""In units of M: the least norm that repeated clipping leaves."""
STALE_SHARE: Final = 0.5
"""Fraction of our own norm: how far others may be from parameters that we have just fetched or read
from a checkpoint, while M says nothing yet."""
STALE_MERGES: Final = 10
"""Merges of each fragment before M is trusted again: a joiner warms up, and moves little."""
LEAST_WARMED_UP: Final = 0.25
"""M is divided by the warmed-up fraction of the learning rate, but by no less than this."""
LEAST_DECAYED: Final = 0.5
"""M is divided by the fraction of the rate that its decay has left, but by no less than this."""
_SAMPLE: Final = 4096
_MOST_CLIPPED: Final = 8
_MOVEMENTS: Final = 32


@dataclass(frozen=True, slots=True)
class Scale:
    """The measure of honest distances."""

    moved: float = 0.0
    """M; 0 = we have not trained."""
    stale: bool = False
    """Whether our parameters may lie behind the others'."""


@dataclass(frozen=True, slots=True)
class RateShare:
    """What is left of the manifest's learning rate now, as fractions of it."""

    warmed_up: float = 1.0
    """By the warm-up alone."""
    decayed: float = 1.0
    """By the decay alone."""

    @property
    def least(self) -> float:
        """The smallest share of other members' movements that ours may be."""
        return max(self.warmed_up, LEAST_WARMED_UP) * max(self.decayed, LEAST_DECAYED)


FULL_RATE: Final = RateShare()


class Movement:
    """How far our own training moves fragments between merges: M.

    It is estimated from some 4,096 values of each fragment. Only the training thread uses it.

    Args:
        num_fragments: F.
    """

    def __init__(self, num_fragments: int) -> None:
        self._num_fragments = num_fragments
        self._base: dict[int, torch.Tensor] = {}
        self._recent: deque[float] = deque(maxlen=_MOVEMENTS)
        self._stale_merges = 0

    def begin(self, fragment: int, theta: torch.Tensor) -> None:
        """Start again from new values of a fragment, (n,) float32, CPU."""
        self._base[fragment] = _sample(theta)
        self._recent.clear()
        self._stale_merges = 0

    def lies_behind(self) -> None:
        """Note that the new values are a checkpoint's or a donor's: others trained on since."""
        self._stale_merges = STALE_MERGES * self._num_fragments

    def scale(self, fragment: int, theta: torch.Tensor, rate: RateShare = FULL_RATE) -> Scale:
        """M at a snapshot.

        It is how far training moved the fragment since its last merge, or how far it usually moves
        fragments between merges, whichever is more.

        Args:
            fragment: f.
            theta: (n,) float32, CPU: the snapshot.
            rate: of ours now. M is divided by it: partners elsewhere in the run move that much
                more.
        """
        now = self._moved(fragment, theta)
        usual = statistics.median(self._recent) if self._recent else 0.0
        moved = max(now, usual) / rate.least
        return Scale(moved, self._stale_merges > 0)

    def merged(
        self, fragment: int, theta: torch.Tensor, correction: torch.Tensor, scale: float
    ) -> None:
        """Note that a correction, (n,) float32, was added to a fragment with this snapshot."""
        moved = self._moved(fragment, theta)
        if moved > 0:
            self._recent.append(moved)
        self._base[fragment] = _sample(theta).add_(_sample(correction), alpha=scale)
        self._stale_merges = max(0, self._stale_merges - 1)

    def _moved(self, fragment: int, theta: torch.Tensor) -> float:
        now = _sample(theta)
        difference = float((now - self._base[fragment]).norm())
        return difference * float((theta.numel() / max(1, now.numel())) ** 0.5)


class NormLimit:
    """Bounds ||z|| of one kind of vector. Thread-safe.

    Args:
        of_differences: whether the vector is a gradient or a pseudo-gradient instead of parameters.
            Then the norm of our own vector takes the place of M.
        of_movements: whether it says how far parameters moved. Then M counts as well: if we took no
            step since the last exchange, our own vector is nearly zero, and partners' are not.
    """

    def __init__(self, *, of_differences: bool = False, of_movements: bool = False) -> None:
        self._of_differences, self._of_movements = of_differences, of_movements
        self._accepted: OrderedDict[str, deque[float]] = OrderedDict()
        self._clipped: dict[str, int] = {}
        self._lock = threading.Lock()

    def of(self, partner: str, scale: Scale) -> Limit:
        """The limit for one partner now."""
        return partial(self.kept, scale=scale, partner=partner)

    def limit(self, own_norm: float, scale: Scale | None = None, partner: str = "") -> float:
        """Largest ||z|| that passes unclipped.

        Args:
            own_norm: ||Q(theta_i[f])||.
            scale: M; None = we have not trained.
            partner: its own norms don't count. "" = a group, for which all norms count.
        """
        floor, cap = self._bounds(own_norm, scale or Scale())
        median = self._median(partner)
        wanted = cap if median is None else min(max(CLIP_MULTIPLE * median, floor), cap)
        return max(wanted, CLIP_FLOOR * own_norm)

    def kept(
        self, own_norm: float, norm: float, scale: Scale | None = None, partner: str = ""
    ) -> float:
        """The norm that z keeps: its own within the limit, a smaller one beyond it.

        The more often in a row the partner was clipped, the less is left. Arguments as for `limit`.
        """
        wanted = self.limit(own_norm, scale, partner)
        if norm <= wanted:
            return norm
        moved = self._measure(own_norm, scale or Scale())
        narrowed = wanted * 0.5 ** self._clipped.get(partner, 0)
        return max(narrowed, min(wanted, NARROWEST * moved), CLIP_FLOOR * own_norm)

    def clipped(self, partner: str) -> None:
        """Count a merged difference that was clipped; its norm is not remembered."""
        with self._lock:
            self._clipped[partner] = min(_MOST_CLIPPED, self._clipped.get(partner, 0) + 1)
            if len(self._clipped) > MAX_PARTNERS:
                del self._clipped[next(iter(self._clipped))]

    def accepted(self, norm: float, partner: str = "") -> None:
        """Remember the norm of a merged difference that was not clipped."""
        with self._lock:
            self._clipped.pop(partner, None)
            norms = self._accepted.setdefault(partner, deque(maxlen=CLIP_HISTORY))
            norms.append(norm)
            self._accepted.move_to_end(partner)
            if len(self._accepted) > MAX_PARTNERS:
                self._accepted.popitem(last=False)

    def _measure(self, own_norm: float, scale: Scale) -> float:
        """What distances are compared with."""
        if self._of_movements:
            return max(own_norm, scale.moved)
        return own_norm if self._of_differences else scale.moved

    def _bounds(self, own_norm: float, scale: Scale) -> tuple[float, float]:
        moved = self._measure(own_norm, scale)
        if scale.stale:
            return FLOOR * moved, max(FLOOR * moved, STALE_SHARE * own_norm)
        if moved > 0:
            return FLOOR * moved, CAP * moved
        return (
            0.0,
            own_norm,
        )  # all members start from the same parameters: no honest one is that far away

    def _median(self, partner: str) -> float | None:
        with self._lock:
            others = [
                list(norms)
                for peer, norms in self._accepted.items()
                if not partner or peer != partner
            ]
        if sum(map(len, others)) < CLIP_AFTER:
            return None
        return statistics.median_low([statistics.median(norms) for norms in others])


def _sample(theta: torch.Tensor) -> torch.Tensor:
    """Some 4,096 evenly spread values. The odd stride hits each row of a matrix at other places."""
    return theta[:: (theta.numel() // _SAMPLE) | 1].clone()
