"""Parameters from a donor to a joiner: what is given, and what is accepted."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Final

import torch

from xpeer.errors import PeerError, Reason
from xpeer.mixing.exchanges import Exchanges
from xpeer.mixing.parameters import Parameters
from xpeer.mixing.received import consolidate
from xpeer.training.measuring import Measurements

WORSE: Final = 1.05, 0.02
"""A donor's parameters may be this much worse on the public text than those that they replace:
factor, nats."""


def copy_for_joiner(
    out: torch.Tensor,
    parameters: Parameters,
    exchanges: Exchanges,
    measurements: Measurements,
    public_loss: Callable[[], float],
) -> Callable[[], float]:
    """At a boundary: the parameters averaged with those that partners sent last. Of masked groups,
    their means alone.

    The loss that goes with it is the last one measured of our own parameters, since measuring
    takes as long as many steps: averages are hardly ever worse, and a joiner measures itself.
    A group's means may be, and are measured.

    Args:
        out: (num_params,) float32, CPU; written.
        parameters: our own.
        exchanges: what partners sent.
        measurements: the last ones.
        public_loss: measures, if need be.

    Returns:
        To be called on any thread, before anything else happens to `out`: finishes it; the
        public loss.
    """
    if exchanges.common is not None:
        exchanges.common.read(out)
        with parameters.with_values(out):
            measured = measurements.public_of_others()
        return lambda: measured
    loss = measurements.public
    loss = public_loss() if loss is None else loss
    own, received = parameters.read(), exchanges.consolidation.now()

    def finish() -> float:
        out.copy_(consolidate(own, exchanges.fragments, received) if received else own)
        return loss

    return finish


def require_numbers(flat: torch.Tensor) -> None:
    """Refuse what is not finite.

    Raises:
        PeerError: NOT_FINITE.
    """
    if not bool(torch.isfinite(flat).all()):
        raise PeerError(Reason.NOT_FINITE, "the state has values that are not finite")


def require_as_good(
    flat: torch.Tensor,
    parameters: Parameters,
    measurements: Measurements,
    before: float,
    at_most: float,
) -> None:
    """Refuse a donor's parameters that are worse than ours, or than it said.

    Args:
        flat: (num_params,) float32, CPU.
        parameters: our own; they stay.
        measurements: measures.
        before: public loss of our own; NaN = they are those of chance.
        at_most: public loss that the donor's may have.

    Raises:
        PeerError: REFUSED.
    """
    with parameters.with_values(flat):
        measured = measurements.public_of_others()
    factor, nats = WORSE
    if not math.isnan(before):
        at_most = min(at_most, factor * before + nats)
    if not measured <= at_most:  # or no number at all
        detail = f"public loss {measured:.3f}, at most {at_most:.3f} is taken"
        raise PeerError(Reason.REFUSED, detail)
