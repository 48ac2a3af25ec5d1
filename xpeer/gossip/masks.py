"""Masks that hide the single updates of a group of k >= 3 and cancel in the group's sum.

The two members of every pair in a group derive the same keystream

    shared  = X25519(a's fresh key, b's fresh key)
    key     = BLAKE2b(shared, swarm, slot, fragment, roster's digest, lower, higher)
    stream  = ChaCha20(key)

of integers mod 2^b. The lower PeerID adds it to its payload and the higher one subtracts it
(Bonawitz et al. 2017, "Practical secure aggregation", section 4, without its recovery of drop-outs:
a group that loses a member gives up). The roster's digest binds every key to the group, its slot
and everybody's fresh keys, so that no stream is ever used twice. Members that received different
keys derive different digests, and they compare these before anything is masked.

Whoever lacks the secrets of a pair can't tell its stream from random integers. So c colluding
members of k learn the sum of the other k - c payloads and nothing more.

What this does not give: anything with k = 2 or c = k - 1; differential privacy; protection of sums
that differ in one member only, in one slot or in successive ones; a bound on what a member sends.
The order of messages is `xpeer.gossip.masked`'s business.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20
from nacl import bindings
from nacl.exceptions import CryptoError
from nacl.public import PrivateKey

from xpeer.errors import PeerError, Reason
from xpeer.forms import Form
from xpeer.identity import Domain, PeerId, blake2b

_NONCE: Final = bytes(16)
"""Counter and nonce. Both may be zero: every key is used for one stream."""
_CHUNK_BYTES: Final = 1 << 16

Integers = npt.NDArray[np.unsignedinteger[Any]]
"""Integers of one modulus: 2^16 or 2^32, by their dtype."""


@dataclass(frozen=True, slots=True)
class Group:
    """What a group exchanges, and in which slot."""

    swarm_id: str
    slot: int
    fragment: int
    form: Form

    def roster(self, keys: Mapping[PeerId, bytes]) -> bytes:
        """32-byte digest of what is exchanged, by whom, and with which fresh keys."""
        members = [part for peer in sorted(keys) for part in (peer.encode(), keys[peer])]
        return blake2b(
            Domain.MASKS,
            b"roster",
            self.swarm_id.encode(),
            self.form.codec.encode(),
            *_numbers(self.slot, self.fragment, self.form.num_values),
            *members,
        )


class Ephemeral:
    """An X25519 key for one group alone.

    Attributes:
        public: 32 bytes.
    """

    def __init__(self) -> None:
        self._secret = PrivateKey.generate()
        self.public = bytes(self._secret.public_key)

    def pair_key(
        self, group: Group, roster: bytes, me: PeerId, partner: PeerId, theirs: bytes
    ) -> bytes:
        """The 32-byte key of our stream with one partner.

        Args:
            group: ours.
            roster: the digest that all members locked.
            me: our PeerID.
            partner: the partner's PeerID.
            theirs: the partner's fresh public key.

        Raises:
            PeerError: that key is degenerate (TAMPERED).
        """
        try:
            shared = bindings.crypto_scalarmult(bytes(self._secret), theirs)
        except (CryptoError, RuntimeError) as e:
            raise PeerError(Reason.TAMPERED, "degenerate key for masks") from e
        return blake2b(
            Domain.MASKS,
            b"pair",
            shared,
            group.swarm_id.encode(),
            *_numbers(group.slot, group.fragment),
            roster,
            *(peer.encode() for peer in sorted((me, partner))),
        )


def mask(rings: Sequence[Integers], me: PeerId, keys: Mapping[PeerId, bytes]) -> None:
    """Hide a payload, in place.

    Args:
        rings: its integers, an array for each modulus; one stream runs through all of them.
        me: our PeerID.
        keys: key of our stream with each partner.
    """
    for partner, key in keys.items():
        _apply(rings, key, np.add if me < partner else np.subtract)


def commitment(roster: bytes, peer: PeerId, masked: bytes | memoryview) -> bytes:
    """The digest by which a member commits to its masked payload before it sends it to anybody."""
    return blake2b(Domain.MASKS, b"commitment", roster, peer.encode(), masked)


def echo(roster: bytes, commitments: Mapping[PeerId, bytes]) -> bytes:
    """The digest of all commitments; equal at all members that received the same ones."""
    parts = [part for peer in sorted(commitments) for part in (peer.encode(), commitments[peer])]
    return blake2b(Domain.MASKS, b"echo", roster, *parts)


def _numbers(*numbers: int) -> list[bytes]:
    return [number.to_bytes(8, "little") for number in numbers]


def _apply(rings: Sequence[Integers], key: bytes, operation: np.ufunc) -> None:
    encryptor = Cipher(ChaCha20(key, _NONCE), mode=None).encryptor()
    zeros, stream = bytes(_CHUNK_BYTES), bytearray(_CHUNK_BYTES)
    for ring in rings:
        step = _CHUNK_BYTES // ring.itemsize
        for start in range(0, len(ring), step):
            part = ring[start : start + step]
            encryptor.update_into(zeros[: part.nbytes], stream)
            drawn = np.frombuffer(stream, dtype=ring.dtype, count=len(part))
            operation(part, drawn, out=part)
