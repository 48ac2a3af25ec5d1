"""How many values each fragment has, and which lines: the cut of `fragments`, in numbers alone.

The daemon needs the sizes, and has no torch.
"""

from __future__ import annotations

import functools
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from xpeer.errors import LocalError

LINE: Final = 64
"""Number of values in a line; half a quantisation block."""
RUN: Final = 13


def padded(num_params: int) -> int:
    """P rounded up to whole lines. The values beyond P are and stay zero at every peer."""
    return -(-num_params // LINE) * LINE


class Cut:
    """How a model is cut.

    Args:
        num_params: P.
        num_fragments: F, at most one for each line.

    Attributes:
        blocks: number of whole blocks, of 13 F^2 lines each.
        tails: for each fragment, its lines after the last whole block, sorted, int64.

    Raises:
        LocalError: too many fragments.
    """

    def __init__(self, num_params: int, num_fragments: int) -> None:
        lines = padded(num_params) // LINE
        if not 1 <= num_fragments <= lines:
            raise LocalError(
                f"round.fragments = {num_fragments} does not fit {num_params} parameters",
                f"choose at most {lines}",
            )
        self.num_params, self.num_fragments = num_params, num_fragments
        self.blocks = lines // (num_fragments * num_fragments * RUN)
        self.tails = _tails(lines, num_fragments)

    def size(self, fragment: int) -> int:
        """Number of values in a fragment."""
        self.check(fragment)
        body = self.blocks * self.num_fragments * RUN
        return LINE * (body + len(self.tails[fragment]))

    def check(self, fragment: int) -> None:
        """Refuse a fragment that does not exist.

        Raises:
            LocalError: it does not.
        """
        if not 0 <= fragment < self.num_fragments:
            raise LocalError(f"fragment {fragment} does not exist: there are {self.num_fragments}")


def fragment_size(num_params: int, num_fragments: int, fragment: int) -> int:
    """See `Cut.size`."""
    return _cut(num_params, num_fragments).size(fragment)


def largest(num_params: int, num_fragments: int) -> int:
    """Number of values in the largest fragment."""
    cut = _cut(num_params, num_fragments)
    return max(cut.size(f) for f in range(num_fragments))


@functools.lru_cache(maxsize=8)
def _cut(num_params: int, num_fragments: int) -> Cut:
    return Cut(num_params, num_fragments)


def _tails(lines: int, num_fragments: int) -> list[npt.NDArray[Any]]:
    run = num_fragments * RUN
    block = num_fragments * run
    rest = np.arange(lines - lines % block, lines, dtype=np.int64)
    fragment_of = (rest + rest // run) % num_fragments
    order = np.argsort(fragment_of, kind="stable")
    counts = np.bincount(fragment_of, minlength=num_fragments)
    return np.split(rest[order], np.cumsum(counts)[:-1])
