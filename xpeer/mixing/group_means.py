"""Decodes a masked group's sum, and remembers the groups' means for joiners.

    z = mean of the others' values - Q(theta_i[f])        shift = (k - 1) / k  z

The others' mean takes the place of a partner's values everywhere: for the distance, for the norm's
limit, and in consolidation. No single member's difference is known, so the limit bounds the mean's.
A single far member is diluted by k - 1 before the limit sees it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch

from xpeer.errors import PeerError, Reason
from xpeer.mixing.buffers import Buffers
from xpeer.mixing.cut import padded
from xpeer.mixing.differences import Difference, bounded
from xpeer.mixing.fragments import Fragments
from xpeer.mixing.received import ReceivedFragment, received_mean
from xpeer.mixing.screen import Limit
from xpeer.update import PeerUpdate
from xpeer.wire import fixedpoint
from xpeer.wire.codec import Payload
from xpeer.wire.fixedpoint import Grid

_NAME: Final = "common"


@dataclass(frozen=True, slots=True)
class Sum:
    """A decoded sum."""

    difference: Difference
    received: ReceivedFragment | None
    """The others' mean; None if the difference was clipped."""
    mean: torch.Tensor | None  # (n,) float32, on the grid
    """The whole group's mean, ours included; None if the difference was clipped."""


def decoded(
    grid: Grid,
    theta: torch.Tensor,
    own: Payload,
    total: PeerUpdate,
    limit: Limit,
    buffers: Buffers,
) -> Sum:
    """Decode a masked group's sum.

    Args:
        grid: of the manifest.
        theta: (n,) float32, CPU: our snapshot.
        own: our payload, before it was masked.
        total: the sum of all k payloads; its `parties` is k.
        limit: of ||z||.
        buffers: supplies memory.

    Raises:
        PeerError: k is impossible (MALFORMED), or see `fixedpoint.difference`.
    """
    parties = total.parties
    if not 2 <= parties <= fixedpoint.MAX_PARTIES:
        raise PeerError(Reason.MALFORMED, f"a sum over {parties} members")
    z = buffers.take(theta.numel())
    fixedpoint.difference(grid, own, total.payload, parties, z)
    difference = bounded(z, theta, limit)
    if difference.clipped:
        return Sum(difference, None, None)
    mean = fixedpoint.rounded(grid, theta, own).add_(z, alpha=(parties - 1) / parties)
    return Sum(difference, received_mean(theta, z, buffers), mean)


class GroupMeans:
    """Parameters that other members know already, and that a joiner may therefore get.

    They begin as the parameters that we started from (the initial model or a donor's). Then each
    fragment is the mean of the last group that exchanged it.

    Our own parameters would show a joiner, or an impostor, what masks hide from partners. A group's
    mean is known to its members anyway. It is at most a window old, and rounded to the grid like
    the payloads. This costs four bytes for each parameter, in memory and in a checkpoint. Only the
    training thread uses it.

    Args:
        fragments: how the parameters are cut.
    """

    def __init__(self, fragments: Fragments) -> None:
        self._fragments = fragments
        self._flat = torch.empty(0)  # (num_params padded to whole lines,) float32, CPU

    def begin(self, flat: torch.Tensor) -> None:
        """Start again from (num_params,) float32, CPU: parameters that other members know."""
        self._flat = torch.nn.functional.pad(flat, (0, padded(flat.numel()) - flat.numel()))

    def merged(self, fragment: int, mean: torch.Tensor) -> None:
        """Put the mean of a merged group, (n,) float32, CPU, in the place of its fragment."""
        before = self._fragments.gather(self._flat, fragment)
        self._fragments.add_(self._flat, fragment, mean - before)

    def read(self, out: torch.Tensor) -> None:
        """Copy the parameters to `out`, (num_params,) float32."""
        out.copy_(self._flat[: out.numel()])

    def state(self) -> dict[str, torch.Tensor]:
        """Return tensors for a checkpoint."""
        return {_NAME: self._flat}

    def restore(self, state: dict[str, torch.Tensor]) -> None:
        """Restore what `state` returned; others do not know a checkpoint's own parameters."""
        if _NAME in state:
            self._flat = state[_NAME].clone()
