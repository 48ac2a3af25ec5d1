"""Fragments, and how ours differ from a partner's; no IO, no clock, no processes.

    z_j = Q(theta_j[f]) - Q(theta_i[f])        shift = sum_j w_j z_j

Both sides of a pair know both quantised snapshots, and z_j here is -z_i there: whatever the codec
drops, however late either side merges and whoever else of the group is missing, what is added here
is subtracted there, to float rounding. A clipped z breaks this on one side; that is counted. What
becomes of the shift is the aggregation rule's business (`xpeer/training/rules`).
"""

from __future__ import annotations

import hashlib
import math
import statistics
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch

from xpeer.errors import LocalError, PeerError, Reason
from xpeer.wire import codec as wire_codec

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


@dataclass(frozen=True, slots=True)
class Difference:
    """How a verified partner's vectors differ from ours."""

    values: torch.Tensor  # (V, n) float32, CPU: z, each vector clipped if need be
    norms: tuple[float, ...]
    """||z|| of each vector, after clipping."""
    distance: float
    """||z|| / ||Q(theta_i[f])|| of the parameters, before clipping."""
    clipped: bool


class NormLimit:
    """Bounds ||z|| by a multiple of the running median of accepted norms.

    Until five were accepted there is no median, and the limit is the norm of our own fragment: all
    start from the same parameters, so no honest partner is that far away. Recorded norms are those
    after clipping, so that one partner moves the median slowly.

    Args:
        of_differences: the vector holds no parameters but a gradient or a pseudo-gradient, in which
            honest partners differ by more than their own norm.
    """

    def __init__(self, *, of_differences: bool = False) -> None:
        self._first = CLIP_MULTIPLE if of_differences else 1.0
        self._accepted: deque[float] = deque(maxlen=CLIP_HISTORY)

    def limit(self, own_norm: float) -> float:
        """Largest ||z|| that passes unclipped, given ||Q(theta_i[f])||."""
        if len(self._accepted) < CLIP_AFTER:
            return self._first * own_norm
        median = statistics.median(self._accepted)
        return max(CLIP_MULTIPLE * median, CLIP_FLOOR * own_norm)

    def accepted(self, norm: float) -> None:
        """A correction of this norm is merged."""
        self._accepted.append(norm)


def difference(
    own: torch.Tensor, peer: torch.Tensor, limits: Sequence[NormLimit], parameters_at: int
) -> Difference:
    """Get z, and how far apart the two snapshots are.

    Args:
        own: Q of what we sent, (V, n) float32, as the partner decoded it.
        peer: Q of what the partner sent, (V, n) float32, finite; overwritten by z.
        limits: one for each vector.
        parameters_at: the vector that holds parameters.

    Raises:
        PeerError: the difference overflows.
    """
    z = peer.sub_(own)
    norms, clipped, distance = [], False, 0.0
    for number, (row, own_row, limit) in enumerate(zip(z, own, limits, strict=True)):
        norm, own_norm = _norm(row), _norm(own_row)
        if not math.isfinite(norm):
            raise PeerError(Reason.NOT_FINITE, "the difference of the parameters overflows")
        if number == parameters_at:
            distance = norm / own_norm if own_norm > 0 else float(norm > 0)
        allowed = limit.limit(own_norm)
        if own_norm > 0 and norm > allowed:
            row.mul_(allowed / norm)
            norm, clipped = allowed, True
        norms.append(norm)
    return Difference(z, tuple(norms), distance, clipped)


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
