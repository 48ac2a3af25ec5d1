"""Makes work fit into memory: it is done again with less at a time, from its beginning.

A step that runs out of memory is not lost. Its sample stays, its sums begin at zero again, and it
is charged once. All records of a step add up to the same, however many are in a pass. Its noise is
drawn in smaller parts (`noise`). The optimiser's step takes no memory: its moments are there before
the first step is charged (`training.optimiser`).
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Final, NamedTuple, TypeVar

import torch

from xpeer.errors import ShortOfMemoryError
from xpeer.shortage import out_of_memory

_T = TypeVar("_T")
_STEP: Final = 1 << 32

logger = logging.getLogger("xpeer.training")


class Shortage(NamedTuple):
    """What is said where work does not fit, however little is done at a time."""

    problem: str
    remedy: str


_ONE_RECORD: Final = Shortage(
    "a single record does not fit into memory",
    "a smaller training.micro_batch can't help: set training.checkpoint_activations to on, "
    "training.precision to bfloat16, or give the trainer more memory; in a new swarm a shorter "
    "optimiser.sequence_tokens",
)


def until_it_fits(
    work: Callable[[], _T], shrink: Callable[[], str], shortage: Shortage = _ONE_RECORD
) -> _T:
    """Do work; where memory runs out, do it again with less at a time.

    Args:
        work: begins anew at each call.
        shrink: makes the next attempt smaller. It returns what was changed, for the operator; "" =
            nothing can be.
        shortage: said if nothing can be made smaller any more.

    Raises:
        ShortOfMemoryError: nothing can be made smaller any more.
    """
    while True:
        try:
            return work()
        except (RuntimeError, MemoryError) as e:
            if not out_of_memory(e):
                raise
        # here the error is gone, and with it what its frames held
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        changed = shrink()
        if not changed:
            raise ShortOfMemoryError(*shortage)
        logger.warning("out of memory: going on with %s", changed)


def halved(records: int) -> tuple[int, str]:
    """Half as many records a pass, and words for it; 1 and "" = it was one already.

    The words hold no number: it may follow from the number of records that were sampled.
    """
    return max(1, records // 2), "fewer records a pass" if records > 1 else ""


def bytes_of_passes(device: torch.device, otherwise: int) -> int:
    """Bytes that an engine may keep during a pass: half of what is free on a GPU.

    Rounded down to a multiple of 4 GiB, so that it is the same at the next start.
    """
    if device.type != "cuda":
        return otherwise
    free, _total = torch.cuda.mem_get_info(device)
    return max(otherwise, free // 2 // _STEP * _STEP)
