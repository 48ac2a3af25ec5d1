"""One exchange of a round, start to end: read this file first.

An update on its way from a shard to everybody's checkpoint:

    shard        training/shard.py      text -> records; they never leave the trainer
    train        privacy/mechanism.py   per record: clip; per batch: noise; charged beforehand
    snapshot     training/exchanges.py  a fragment of the parameters, at a step boundary
    compress     wire/codec.py          takes a PrivateUpdate and nothing else
    seal         wire/session.py        to this partner, for this session
    exchange     network/exchange.py    ours against theirs, both accept or neither merges
    verify       training/exchanges.py  size, finite, norm
    merge        training/mixing.py     theta += w (Q(theta_j) - Q(theta_i)), at a step boundary
    checkpoint   training/checkpoint.py

Training goes on meanwhile: each `await` below waits for the network or for the trainer's next step
boundary, and the trainer waits for none of them.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Literal, Protocol

from xpeer.errors import PeerError, Reason
from xpeer.network.exchange import Agreement
from xpeer.update import CompressedUpdate, PeerUpdate

WEIGHT_BOUNDS = 1e-3, 1e3
"""Of declared tokens per second, relative: nobody's word outweighs everybody else."""


class Trainer(Protocol):
    """The trainer process as an exchange sees it."""

    async def snapshot(self, exchange_id: int, fragment: int) -> CompressedUpdate:
        """A private, compressed fragment, taken at the next step boundary."""

    async def verify(self, exchange_id: int, update: PeerUpdate) -> float:
        """Relative distance between the partner's values and ours. Raises PeerError."""

    async def merge(self, exchange_id: int, weight: float) -> None:
        """Merge what was verified, at the next step boundary."""

    def drop(self, exchange_id: int) -> None:
        """Forget this exchange; harmless if it is unknown."""


@dataclass(frozen=True, slots=True)
class Exchanged:
    """What came of it."""

    distance: float
    """||Q(theta_j) - Q(theta_i)|| / ||Q(theta_i)|| on the fragment."""
    num_bytes: int
    num_values: int


async def exchange(
    trainer: Trainer,
    agreement: Agreement,
    *,
    weighting: Literal["equal", "tokens"],
    deadline_s: float,
) -> Exchanged:
    """Exchange one fragment with one partner, after both agreed to.

    Raises:
        PeerError: nothing was merged here; `UnresolvedError` if the partner may have.
    """
    exchange_id = agreement.exchange_id
    weight = 0.5
    if weighting == "tokens":
        weight = mixing_weight(agreement.ours.weight, agreement.theirs.weight)
    try:
        async with asyncio.timeout(deadline_s):
            update = await trainer.snapshot(exchange_id, agreement.fragment)
            received = await agreement.swap(update)
            distance = await trainer.verify(exchange_id, received)
            await agreement.settle()
            await trainer.merge(exchange_id, weight)
    except TimeoutError as e:
        trainer.drop(exchange_id)
        raise PeerError(Reason.TIMEOUT, f"not accepted within {deadline_s:g} s") from e
    except BaseException:
        trainer.drop(exchange_id)
        raise
    return Exchanged(distance, agreement.num_bytes, agreement.num_values)


def mixing_weight(own: float, partner: float) -> float:
    """w_j = tokens_j / (tokens_i + tokens_j) (FedAvg, McMahan et al. 2017), from declared weights.

    Raises:
        PeerError: the partner's weight is not within `WEIGHT_BOUNDS`.
    """
    low, high = WEIGHT_BOUNDS
    if not low <= partner <= high:
        raise PeerError(Reason.MALFORMED, f"declared weight {partner!r} is not in [{low}, {high}]")
    own = min(max(own, low), high)
    return partner / (own + partner)
