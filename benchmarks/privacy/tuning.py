"""The grid of learning rates on which a method is tuned, as its runs end."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final, TypeVar

from msgspec import Struct

RATES: Final = (5e-4, 1e-3, 2e-3, 4e-3, 8e-3, 16e-3, 32e-3, 64e-3, 128e-3)
"""A factor of 2. A method is tuned until its best rate is no edge of what was tried."""

Run = TypeVar("Run", bound=Struct)


def grid(
    make: Callable[[float], Run],
    score: Callable[[dict[str, Any]], float],
    known: Mapping[Any, dict[str, Any]],
    first: tuple[float, ...],
    rates: tuple[float, ...] = RATES,
) -> tuple[list[Run], Run | None]:
    """Runs that are to be made, and the best of them.

    Args:
        make: a run at a rate.
        score: of a run's figures, on text that is reported nowhere; the least is the best.
        known: figures of finished runs.
        first: rates to begin with, of `rates`. With a single one nothing is tuned.
        rates: all that may be tried, in order.

    Returns:
        The runs so far; and the best one, None until it has a finished neighbour on either side.
    """
    tried = set(first)
    while True:
        runs = {rate: make(rate) for rate in sorted(tried)}
        if any(run not in known for run in runs.values()):
            return list(runs.values()), None
        best = min(runs, key=lambda rate: score(known[runs[rate]]))
        at = rates.index(best)
        missing = {rates[i] for i in (at - 1, at + 1) if 0 <= i < len(rates)} - tried
        if not missing or len(first) == 1:
            return list(runs.values()), runs[best]
        tried |= missing
