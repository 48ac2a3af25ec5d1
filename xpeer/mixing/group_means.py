"""What a masked group's sum says, and what others may know of our parameters because of it.

    z = mean of the others' values - Q(theta_i[f])        shift = (k - 1) / k  z

The others' mean takes the place of a partner's values in every respect: the distance, the norm's
limit, and what consolidation remembers. Nobody's own difference can be told, so the limit bounds
that of the mean as a whole: a single far member is diluted by k - 1 before it is seen.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch

from xpeer.errors import PeerError, Reason
from xpeer.mixing.buffers import Buffers
from xpeer.mixing.differences import Difference, bounded
from xpeer.mixing.fragments import Fragments, padded
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
    shown: ReceivedFragment | None
    """The others' mean; None if it was clipped."""
    mean: torch.Tensor | None  # (n,) float32, on the grid
    """The group's; None if it was clipped."""


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
        total: the sum of all k payloads, with k as `parties`.
        limit: of ||z||.
        buffers: where memory is taken.

    Raises:
        PeerError: not a group (MALFORMED), or as `fixedpoint.difference`.
    """
    parties = total.parties
    if not 2 <= parties <= fixedpoint.MAX_PARTIES:
        raise PeerError(Reason.MALFORMED, f"a sum over {parties} members")
    z = buffers.take(theta.numel())
    fixedpoint.difference(grid, own, total.payload, parties, z)
    found = bounded(z, theta, limit)
    if found.clipped:
        return Sum(found, None, None)
    mean = fixedpoint.rounded(grid, theta, own).add_(z, alpha=(parties - 1) / parties)
    return Sum(found, received_mean(theta, z, buffers), mean)


class GroupMeans:
    """What other members know of our parameters already, and a joiner may be given: where they were
    set from (the initial model, a donor's), and of every fragment the mean of the last group.

    A donor's own parameters would show a joiner, or whoever says that it is one, what masks hide
    from partners. A group's mean is what its members know; it is at most a window old, and rounded
    to the grid like all that the group showed. Costs four bytes for each parameter, in memory and
    in a checkpoint. Used by the training thread alone.

    Args:
        fragments: how the parameters are cut.
    """

    def __init__(self, fragments: Fragments) -> None:
        self._fragments = fragments
        self._flat = torch.empty(0)  # (num_params padded to whole lines,) float32, CPU

    def begin(self, flat: torch.Tensor) -> None:
        """The parameters were set anew, to (num_params,) float32, CPU, that other members know."""
        self._flat = torch.nn.functional.pad(flat, (0, padded(flat.numel()) - flat.numel()))

    def merged(self, fragment: int, mean: torch.Tensor) -> None:
        """A group with this mean, (n,) float32, CPU, is merged."""
        before = self._fragments.gather(self._flat, fragment)
        self._fragments.add_(self._flat, fragment, mean - before)

    def read(self, out: torch.Tensor) -> None:
        """Copy to (num_params,) float32."""
        out.copy_(self._flat[: out.numel()])

    def state(self) -> dict[str, torch.Tensor]:
        """For a checkpoint."""
        return {_NAME: self._flat}

    def restore(self, state: dict[str, torch.Tensor]) -> None:
        """What `state` gave: a checkpoint's own parameters are not common."""
        if _NAME in state:
            self._flat = state[_NAME].clone()
