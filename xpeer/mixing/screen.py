"""How far a partner's vectors may be from ours before they are clipped.

    limit_j = clamp(4 * median over the partners k != j of (median of their accepted norms),
                    8 M, 16 M)

M is how far our own training moves a fragment between two merges of it: honest partners train as
we do, so they are a few M away (docs/decisions.md has the measurements). While our learning rate
warms up, faster partners have a larger one; M is scaled up for that.

What was clipped teaches nothing, a partner's own norms never bound itself, and M caps what all
others could teach: nobody raises its own limit, and several together not beyond the cap. Each
clipped merge in a row halves what is left of the next one that is beyond the limit, to 2 M at
least; what is within the limit passes.

All of it follows from values that were exchanged: M is the distance between two of our own
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
"""From ||Q(theta_i[f])|| and ||z|| to the norm that z keeps: its own, or a smaller one."""

CLIP_MULTIPLE: Final = 4.0
CLIP_AFTER: Final = 5
"""Norms accepted from others that are needed for a median to mean something."""
CLIP_HISTORY: Final = 16
"""Norms kept of a partner."""
MAX_PARTNERS: Final = 64
"""Whose norms are kept: those who met us last."""
CLIP_FLOOR: Final = 0.01
"""Relative distance that is never clipped. int8 alone makes 0.006; after consolidation the medians
tend to zero, and would otherwise keep peers apart for ever."""
FLOOR, CAP = 8.0, 16.0
"""In units of M; the cap while there is no median, too. Of honest partners 99 of 100 are within
4.2 M at equal speeds; a peer that is four times slower than the others sees them at up to 15 M."""
NARROWEST: Final = 2.0
"""In units of M: what is left at least of one that is clipped again and again."""
STALE_SHARE: Final = 0.5
"""Of our own norm: how far others may be from parameters that were fetched or read from a
checkpoint, while M says nothing yet."""
STALE_MERGES: Final = 10
"""Merges of each fragment after which M is believed again: a joiner warms up, and moves little."""
LEAST_WARMED_UP: Final = 0.25
"""Share of the learning rate that M is scaled up from, at least."""
_SAMPLE: Final = 4096
_MOST_CLIPPED: Final = 8
_MOVEMENTS: Final = 32


@dataclass(frozen=True, slots=True)
class Scale:
    """What honest distances are measured by."""

    moved: float = 0.0
    """M; 0: we have not trained."""
    stale: bool = False
    """Our parameters may lie behind the others'."""


class Movement:
    """How far our own training moves fragments between merges: M.

    Estimated from some 4,096 values of each fragment. Used by the training thread alone.

    Args:
        num_fragments: F.
    """

    def __init__(self, num_fragments: int) -> None:
        self._num_fragments = num_fragments
        self._base: dict[int, torch.Tensor] = {}
        self._recent: deque[float] = deque(maxlen=_MOVEMENTS)
        self._stale_merges = 0

    def begin(self, fragment: int, theta: torch.Tensor) -> None:
        """The fragment was set anew: at the start, or to a donor's; (n,) float32, CPU."""
        self._base[fragment] = _sample(theta)
        self._recent.clear()
        self._stale_merges = 0

    def lies_behind(self) -> None:
        """What was set is a checkpoint's or a donor's: others have trained on meanwhile."""
        self._stale_merges = STALE_MERGES * self._num_fragments

    def scale(self, fragment: int, theta: torch.Tensor, warmed_up: float = 1.0) -> Scale:
        """At a snapshot: how far training has moved it since its last merge, or usually does.

        Args:
            fragment: which.
            theta: (n,) float32, CPU.
            warmed_up: share of the learning rate that the warm-up allows; partners that are further
                move that much farther.
        """
        now = self._moved(fragment, theta)
        usual = statistics.median(self._recent) if self._recent else 0.0
        moved = max(now, usual) / max(warmed_up, LEAST_WARMED_UP)
        return Scale(moved, self._stale_merges > 0)

    def merged(
        self, fragment: int, theta: torch.Tensor, correction: torch.Tensor, scale: float
    ) -> None:
        """A correction, (n,) float32, was added to what had this snapshot."""
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
        of_differences: the vector holds no parameters but a gradient or a pseudo-gradient: our own
            is then the measure, and honest partners differ by more than its norm.
    """

    def __init__(self, *, of_differences: bool = False) -> None:
        self._of_differences = of_differences
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
            scale: what our own training says; None: nothing.
            partner: whose own norms don't count; "" = a group's, which has no others.
        """
        floor, cap = self._bounds(own_norm, scale or Scale())
        median = self._median(partner)
        wanted = cap if median is None else min(max(CLIP_MULTIPLE * median, floor), cap)
        return max(wanted, CLIP_FLOOR * own_norm)

    def kept(
        self, own_norm: float, norm: float, scale: Scale | None = None, partner: str = ""
    ) -> float:
        """What is left of a ||z||: all within the limit; beyond it ever less of one that was
        clipped the times before. Arguments as for `limit`.
        """
        wanted = self.limit(own_norm, scale, partner)
        if norm <= wanted:
            return norm
        moved = own_norm if self._of_differences else (scale or Scale()).moved
        narrowed = wanted * 0.5 ** self._clipped.get(partner, 0)
        return max(narrowed, min(wanted, NARROWEST * moved), CLIP_FLOOR * own_norm)

    def clipped(self, partner: str) -> None:
        """A correction is merged in part: it teaches nothing but that."""
        with self._lock:
            self._clipped[partner] = min(_MOST_CLIPPED, self._clipped.get(partner, 0) + 1)
            if len(self._clipped) > MAX_PARTNERS:
                del self._clipped[next(iter(self._clipped))]

    def accepted(self, norm: float, partner: str = "") -> None:
        """A correction of this norm is merged, and was not clipped."""
        with self._lock:
            self._clipped.pop(partner, None)
            norms = self._accepted.setdefault(partner, deque(maxlen=CLIP_HISTORY))
            norms.append(norm)
            self._accepted.move_to_end(partner)
            if len(self._accepted) > MAX_PARTNERS:
                self._accepted.popitem(last=False)

    def _bounds(self, own_norm: float, scale: Scale) -> tuple[float, float]:
        moved = own_norm if self._of_differences else scale.moved
        if scale.stale:
            return FLOOR * moved, max(FLOOR * moved, STALE_SHARE * own_norm)
        if moved > 0:
            return FLOOR * moved, CAP * moved
        return 0.0, own_norm  # all start from the same: nobody honest is that far away

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
    """Some values, evenly spread; an odd stride, so that rows of matrices are not met alike."""
    return theta[:: (theta.numel() // _SAMPLE) | 1].clone()
