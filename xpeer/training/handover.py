"""Parameters from a donor to a joiner: makes the copy, and checks it before it is used."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Final

import torch

from xpeer.errors import PeerError, Reason
from xpeer.mixing.cut import padded
from xpeer.mixing.exchanges import Exchanges
from xpeer.mixing.parameters import Parameters
from xpeer.mixing.received import consolidate_
from xpeer.training.flat import all_finite
from xpeer.training.measuring import Measurements
from xpeer.update import WORSE

LARGEST: Final = 1e6
"""No parameter is larger. Beyond 1e19 a square is infinite in float32, and each norm squares."""
STRANGE: Final = 1000.0
"""Highest loss on tokens in any order, nats per token. Models that are sure of themselves have some
tens; if it is more, a record with such a token may end the run."""


def copy_for_joiner(
    out: torch.Tensor, parameters: Parameters, exchanges: Exchanges
) -> Callable[[], None]:
    """Copy the parameters for a joiner, at a boundary.

    They are averaged with those that partners sent last. In masked groups, only the groups' means
    are copied. Nothing is measured here: that takes as long as many steps, and is done beside
    training (`Measurements.public_of_copy`).

    Args:
        out: (num_params,) float32, CPU; written to.
        parameters: our own.
        exchanges: has the values that partners sent.

    Returns:
        A function that completes `out`. Call it on any thread, before anything else happens to
        `out`.
    """
    if exchanges.common is not None:
        exchanges.common.read(out)
        return _complete
    received = exchanges.consolidation.now()
    if not received:
        parameters.read(out)
        return _complete
    whole = padded(len(out))
    own = out if whole == len(out) else torch.zeros(whole)  # large models are of whole lines
    parameters.read(own[: len(out)])

    def finish() -> None:
        consolidate_(own, exchanges.fragments, received)
        if own is not out:
            out.copy_(own[: len(out)])

    return finish


def _complete() -> None:
    """Nothing is left to do."""


def require_numbers(flat: torch.Tensor) -> None:
    """Refuse parameters that are not finite, or huge.

    Raises:
        PeerError: they are (NOT_FINITE, REFUSED).
    """
    if not all_finite(flat):
        raise PeerError(Reason.NOT_FINITE, "the state has values that are not finite")
    low, high = map(float, torch.aminmax(flat))
    if (largest := max(-low, high)) > LARGEST:
        raise PeerError(Reason.REFUSED, f"the state has values up to {largest:.3g}")


def step_after(own_step: int, step: int, until: int | None) -> int:
    """The step at which a trainer with parameters goes on with a donor's: it is never set back.

    Args:
        own_step: that it is at.
        step: of the donor.
        until: at this step, or beyond, it does not take a donor's any more; None = it does.

    Raises:
        PeerError: it has come so far (NOT_AHEAD).
    """
    if until is not None and own_step >= until:
        raise PeerError(Reason.NOT_AHEAD, f"step {own_step} is reached here by now")
    return max(own_step, step)


def require_as_good(
    flat: torch.Tensor,
    parameters: Parameters,
    measurements: Measurements,
    before: float,
    at_most: float,
) -> None:
    """Refuse a donor's parameters that are worse than ours, or than the donor said.

    Args:
        flat: (num_params,) float32, CPU: the donor's.
        parameters: our own; unchanged afterwards.
        measurements: measures the public loss.
        before: public loss of our own parameters; NaN = ours are random.
        at_most: highest public loss to accept.

    Raises:
        PeerError: they are worse than `at_most` (REFUSED), or than ours (WORSE_THAN_OURS), or bad
            on tokens that the public text may lack (REFUSED, NOT_FINITE).
    """
    with parameters.with_values(flat):
        measured, strange = measurements.public_of_others(), measurements.any_tokens_of_others()
    if not measured <= at_most:  # NaN is refused, too
        detail = f"public loss {measured:.3f}, at most {at_most:.3f} is taken"
        raise PeerError(Reason.REFUSED, detail)
    if not strange <= STRANGE:
        reason = Reason.REFUSED if math.isfinite(strange) else Reason.NOT_FINITE
        raise PeerError(reason, f"loss {strange:.3g} on tokens in any order")
    if measured > WORSE.above(before):
        raise PeerError(Reason.WORSE_THAN_OURS, f"public loss {measured:.3f}, ours is {before:.3f}")
