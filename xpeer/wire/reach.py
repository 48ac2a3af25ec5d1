"""How far partners' values are from ours, block by block: what a modulo codec sends modulo.

A modulo codec is as fine as its reach is small, and overflows where the reach is too small. Nobody
knows a partner's values before they arrive, but differences change slowly: the reach of a block is
kept at a margin above the largest difference that was seen there lately. An overflow that the
check noticed doubles it, so that a block which drifted away comes back.

Knows nothing of fragments' meaning, of files and of partners: one reach serves all of them.
"""

from __future__ import annotations

from typing import Final

import torch

from xpeer.errors import LocalError
from xpeer.wire.blockwise import BLOCK, INITIAL_SHARE, num_blocks

MARGIN: Final = 2.0
"""Times the largest difference seen."""
DECAY: Final = 0.9
"""Per exchange: a reach shrinks no faster than this, so that one quiet exchange isn't trusted."""


class Reach:
    """The reach of every block of every fragment."""

    def __init__(self) -> None:
        self._reaches: dict[int, torch.Tensor] = {}

    def of(self, fragment: int) -> torch.Tensor | None:
        """For `codec.encode`: (blocks,) float32, or None before anything was seen."""
        return self._reaches.get(fragment)

    def saw(self, fragment: int, own: torch.Tensor, largest: torch.Tensor) -> None:
        """Learn from an exchange, merged or not.

        Args:
            fragment: which was exchanged.
            own: (n,) float32, our values of it.
            largest: difference of each block, or -1, as `Norms.largest` of `merge.difference`.

        Raises:
            LocalError: of another size.
        """
        seen = largest
        if seen.numel() != num_blocks(own.numel()):
            raise LocalError("a reach is learnt from one difference for each block")
        before = self._reaches.get(fragment)
        if before is None:
            before = _largest(own) * INITIAL_SHARE
        quiet = torch.maximum(seen * MARGIN, before * DECAY)
        # at least the first guess: nothing doubles zero
        wider = torch.maximum(before * 2.0, _largest(own) * INITIAL_SHARE)
        self._reaches[fragment] = torch.where(seen < 0, wider, quiet)


def _largest(values: torch.Tensor) -> torch.Tensor:
    """(blocks,) float32."""
    padded = torch.nn.functional.pad(values.abs(), (0, -values.numel() % BLOCK))
    return padded.view(-1, BLOCK).amax(1)
