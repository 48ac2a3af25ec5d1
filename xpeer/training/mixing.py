"""The rule that moves parameters towards a partner's; no IO, no clock, no processes.

    z = Q(theta_j[f]) - Q(theta_i[f])          theta_i[f] += w z     at a later step boundary

Both sides know both quantised snapshots, so with w = 1/2 the sum theta_i + theta_j is unchanged to
float rounding, whatever the codec drops and however late either side merges: what is added here is
exactly what is subtracted there. With weights by tokens, w_i + w_j = 1 and the sum weighted by the
tokens is unchanged. A clipped z breaks this on one side; that is counted.

Boyd et al. 2006, "Randomized gossip algorithms", eq. 1 is the rule at w = 1/2 without a codec.
"""

from __future__ import annotations

import hashlib
import math
import statistics
from collections import deque
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch

from xpeer.errors import LocalError, PeerError, Reason
from xpeer.wire import codec as wire_codec

MERGE_WEIGHT_BOUNDS: Final = (0.1, 0.9)
"""No partner, however many tokens it declares, replaces more than this share of our parameters."""
CLIP_MULTIPLE: Final = 4.0
CLIP_AFTER: Final = 5
"""Accepted norms needed for a median to mean something."""
CLIP_HISTORY: Final = 64
CLIP_FLOOR: Final = 0.01
"""Relative distance that is never clipped. int8 alone makes 0.006; after consolidation the median
tends to zero, and would otherwise keep peers apart for ever."""
_PERMUTED_AT_ONCE: Final = 1 << 16


class Fragments:
    """The strided parts of the parameters that slots exchange in turn.

    The permutation is a function of the swarm alone, in integer arithmetic that does not depend on
    any library's random numbers. It permutes within runs of 65,536 parameters, which is random
    enough to spread every layer over all fragments, and needs no memory of the model's size twice.

    Args:
        num_params: P.
        num_fragments: F, at most P.
        swarm_id: seeds the permutation.
    """

    def __init__(self, num_params: int, num_fragments: int, swarm_id: str) -> None:
        if not 1 <= num_fragments <= num_params:
            raise LocalError(
                f"round.fragments = {num_fragments} does not fit {num_params} parameters",
                "choose fewer fragments",
            )
        self.num_params = num_params
        self.num_fragments = num_fragments
        self._indices = _strided_parts(num_params, num_fragments, swarm_id)

    def indices(self, fragment: int) -> torch.Tensor:
        """Sorted positions of a fragment, (fragment_params,) int64 or int32, CPU.

        Raises:
            LocalError: no such fragment.
        """
        if not 0 <= fragment < self.num_fragments:
            raise LocalError(f"fragment {fragment} does not exist: there are {self.num_fragments}")
        return self._indices[fragment]


def fragment_params(num_params: int, num_fragments: int, fragment: int) -> int:
    """Number of values in a fragment, without building it: len(range(f, P, F))."""
    return len(range(fragment, num_params, num_fragments))


def _strided_parts(num_params: int, num_fragments: int, swarm_id: str) -> list[torch.Tensor]:
    """sorted(permutation[f::F]) for every f."""
    seed = int.from_bytes(hashlib.blake2b(swarm_id.encode(), digest_size=8).digest(), "little")
    dtype = np.int32 if num_params < 2**31 else np.int64
    parts: list[list[np.ndarray]] = [[] for _ in range(num_fragments)]
    low_bits = np.uint64(_PERMUTED_AT_ONCE - 1)
    for start in range(0, num_params, _PERMUTED_AT_ONCE):
        local = np.arange(min(_PERMUTED_AT_ONCE, num_params - start), dtype=np.uint64)
        # a random key above, the position below: one plain sort permutes, and nothing is tied
        keys = _splitmix64(local + np.uint64(start), seed) & ~low_bits
        permuted = np.sort(keys | local) & low_bits
        fragment_of = np.empty(len(local), dtype=np.uint16)
        fragment_of[permuted] = (np.arange(len(local)) + start) % num_fragments
        order = np.argsort(fragment_of, kind="stable")  # by fragment, sorted within each
        ends = np.cumsum(np.bincount(fragment_of, minlength=num_fragments))[:-1]
        for fragment, chosen in enumerate(np.split(order, ends)):
            parts[fragment].append((chosen + start).astype(dtype))
    return [torch.from_numpy(np.concatenate(part)) for part in parts]


def _splitmix64(index: np.ndarray, seed: int) -> np.ndarray:
    """Steele et al. 2014, figure 17: the same 64 bits on every machine."""
    z = (index + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(seed)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.asarray(z ^ (z >> np.uint64(31)))


def bounded_weight(weight: float) -> float:
    """Into `MERGE_WEIGHT_BOUNDS`, which is symmetric: both sides' weights still add up to one.

    Raises:
        LocalError: not a number.
    """
    if not math.isfinite(weight):
        raise LocalError(f"mixing weight {weight!r} is not a number")
    low, high = MERGE_WEIGHT_BOUNDS
    return min(max(weight, low), high)


@dataclass(frozen=True, slots=True)
class Correction:
    """What a verified partner's snapshot asks of our parameters."""

    values: torch.Tensor  # (fragment_params,) float32, CPU: z, clipped if need be
    norm: float
    """||z|| after clipping."""
    distance: float
    """||z|| / ||Q(theta_i[f])|| before clipping."""
    clipped: bool


class NormLimit:
    """Bounds ||z|| by a multiple of the running median of accepted norms.

    Until five were accepted there is no median, and the limit is the norm of our own fragment: all
    start from the same parameters, so no honest partner is that far away. Recorded norms are those
    after clipping, so that one partner moves the median slowly.
    """

    def __init__(self) -> None:
        self._accepted: deque[float] = deque(maxlen=CLIP_HISTORY)

    def limit(self, own_norm: float) -> float:
        """Largest ||z|| that passes unclipped, given ||Q(theta_i[f])||."""
        if len(self._accepted) < CLIP_AFTER:
            return own_norm
        median = statistics.median(self._accepted)
        return max(CLIP_MULTIPLE * median, CLIP_FLOOR * own_norm)

    def accepted(self, norm: float) -> None:
        """A correction of this norm is merged."""
        self._accepted.append(norm)


def correction(own: torch.Tensor, peer: torch.Tensor, norm_limit: NormLimit) -> Correction:
    """Get z, and how far apart the two snapshots are.

    Args:
        own: Q(theta_i[f]), (n,) float32, as the partner decoded it.
        peer: Q(theta_j[f]), (n,) float32, finite; overwritten by z.
        norm_limit: of this trainer.

    Raises:
        PeerError: the difference overflows.
    """
    z = peer.sub_(own)
    norm, own_norm = _norm(z), _norm(own)
    if not math.isfinite(norm):
        raise PeerError(Reason.NOT_FINITE, "the difference of the parameters overflows")
    limit = norm_limit.limit(own_norm)
    clipped = own_norm > 0 and norm > limit
    if clipped:
        z.mul_(limit / norm)
    return Correction(
        values=z,
        norm=min(norm, limit) if clipped else norm,
        distance=norm / own_norm if own_norm > 0 else float(norm > 0),
        clipped=clipped,
    )


def decode_peer(codec: str, payload: memoryview, expected_codec: str, n: int) -> torch.Tensor:
    """A partner's payload as values, (n,) float32.

    Raises:
        PeerError: another codec than the manifest's, or as `codec.decode`.
    """
    if codec != expected_codec:
        raise PeerError(Reason.WRONG_CODEC, "the payload is not of the manifest's codec")
    return wire_codec.decode(codec, payload, n)


def _norm(values: torch.Tensor) -> float:
    """||x||, accumulated in float64 so that large float32 values don't overflow on the way."""
    return float(torch.linalg.vector_norm(values, dtype=torch.float64))
