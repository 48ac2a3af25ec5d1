"""A donor's parameters in pieces of 1 MiB, each with its hash, under one signature.

    leaf_i = BLAKE2b-256(piece_i)      root = BLAKE2b-256(leaf_0 || leaf_1 || ...)

The donor signs the root with swarm, manifest, its own PeerID, codec, sizes, step and public loss.
So a piece proves by itself which snapshot of whom it belongs to: a joiner keeps it across links,
restarts and the loss of its donor, and a tree of another swarm is void. A list of leaves is a tree
of one level: 14 GB have 14,000 leaves, and those are less than half a piece.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from typing import Final

import msgspec

from xpeer.errors import PeerError, Reason
from xpeer.identity import Domain, Identity, PeerId, blake2b, verify
from xpeer.manifest import StateForm
from xpeer.update import ModelState
from xpeer.wire.messages import PIECE_BYTES, TreeOffer, tree_statement

HASH_BYTES: Final = 32
MAX_LOSS_PUBLIC = 20.0
"""Nats per token; guessing among a million tokens gives 14. The joiner compares the parameters with
the donor's claim, so a claim without a bound would let any parameters pass."""


class Shape:
    """What all donors' parameters have in common; the manifest says it, never a peer.

    Args:
        form: of the parameters.

    Attributes:
        codec: form of the trained values.
        num_bytes: of all pieces together.
    """

    def __init__(self, form: StateForm) -> None:
        self.form, self.codec, self.num_bytes = form, form.codec, form.num_bytes

    @property
    def num_pieces(self) -> int:
        """Number of pieces; the last one may be shorter."""
        return -(-self.num_bytes // PIECE_BYTES)

    def place(self, piece: int) -> slice:
        """Where a piece lies."""
        start = piece * PIECE_BYTES
        return slice(start, min(start + PIECE_BYTES, self.num_bytes))

    def size(self, piece: int) -> int:
        """Bytes of a piece."""
        return min(PIECE_BYTES, self.num_bytes - piece * PIECE_BYTES)


@dataclass(frozen=True, slots=True)
class Signer:
    """Of whose swarm trees have to be.

    Attributes:
        swarm_id: fingerprint of the swarm.
        manifest_hash: of its manifest.
    """

    swarm_id: str
    manifest_hash: bytes


@dataclass(frozen=True, slots=True)
class Tree:
    """A donor's signed tree; it is verified. Made by `sign` and `verified`.

    Attributes:
        donor: who signed it.
        offer: the signed values.
        leaves: (num_pieces * HASH_BYTES,) the hashes.
    """

    donor: PeerId
    offer: TreeOffer
    leaves: bytes

    @property
    def step(self) -> int:
        """The donor's steps, as it claims."""
        return self.offer.step

    @property
    def loss_public(self) -> float:
        """The donor's loss on the public text, as it claims; nats per token."""
        return self.offer.loss_public

    @property
    def root(self) -> bytes:
        """What the donor knows its snapshot by. Equal snapshots of two donors have the same."""
        return self.offer.root

    @property
    def name(self) -> bytes:
        """What no other tree has: the signature, which names donor, step and loss, too."""
        return self.offer.signature

    def holds(self, piece: int, data: memoryview) -> bool:
        """Whether these bytes are this piece of it."""
        return hash_of(data) == self.leaf(piece)

    def leaf(self, piece: int) -> bytes:
        """The hash of this piece of it."""
        return self.leaves[piece * HASH_BYTES : (piece + 1) * HASH_BYTES]

    def to_bytes(self) -> bytes:
        """For the home of the joiner; read by `from_bytes`."""
        return msgspec.msgpack.encode([self.donor, self.offer, self.leaves])


def hash_of(piece: memoryview) -> bytes:
    """BLAKE2b-256 of a piece."""
    return hashlib.blake2b(piece, digest_size=HASH_BYTES).digest()


def leaves_of(payload: memoryview) -> bytes:
    """The hashes of all pieces of a payload, one behind the other."""
    starts = range(0, len(payload), PIECE_BYTES)
    return b"".join(hash_of(payload[start : start + PIECE_BYTES]) for start in starts)


def root_of(leaves: bytes) -> bytes:
    """The root of a tree with these leaves."""
    return blake2b(leaves)


def sign(
    signer: Signer, identity: Identity, shape: Shape, state: ModelState, leaves: bytes
) -> TreeOffer:
    """Sign the tree of our own parameters."""
    unsigned = TreeOffer(
        codec=shape.codec,
        num_bytes=shape.num_bytes,
        step=state.step,
        loss_public=state.loss_public,
        root=root_of(leaves),
        signature=bytes(64),
    )
    signed = tree_statement(signer.swarm_id, signer.manifest_hash, identity.peer_id, unsigned)
    signature = identity.sign(Domain.TREE, signed)
    return msgspec.structs.replace(unsigned, signature=signature)


def check_offer(signer: Signer, donor: PeerId, offer: TreeOffer, shape: Shape) -> None:
    """Refuse an offer that is not this donor's, or not of our manifest's model.

    Raises:
        PeerError: it is not.
    """
    statement = tree_statement(signer.swarm_id, signer.manifest_hash, donor, offer)
    if not verify(donor, Domain.TREE, statement, offer.signature):
        raise PeerError(Reason.TAMPERED, "the donor did not sign this tree")
    if offer.codec != shape.codec:
        raise PeerError(Reason.WRONG_CODEC, f"{offer.codec}, the manifest has {shape.codec}")
    if offer.num_bytes != shape.num_bytes:
        raise PeerError(
            Reason.WRONG_MODEL, f"{offer.num_bytes} bytes, the manifest has {shape.num_bytes}"
        )
    if not math.isfinite(offer.loss_public):
        raise PeerError(Reason.NOT_FINITE, "the donor's own loss is not finite")
    if not 0 <= offer.loss_public <= MAX_LOSS_PUBLIC:
        raise PeerError(Reason.REFUSED, f"the donor's own loss is {offer.loss_public:.3g}")


def verified(signer: Signer, donor: PeerId, offer: TreeOffer, leaves: bytes, shape: Shape) -> Tree:
    """Check an offer with its leaves.

    Raises:
        PeerError: see `check_offer`; or the leaves are not those that the donor signed.
    """
    check_offer(signer, donor, offer, shape)
    if len(leaves) != shape.num_pieces * HASH_BYTES or root_of(leaves) != offer.root:
        raise PeerError(Reason.DIGEST_MISMATCH, "not the hashes that the donor signed")
    return Tree(donor, offer, leaves)


def from_bytes(data: bytes, signer: Signer, shape: Shape) -> Tree:
    """Read what `Tree.to_bytes` wrote, and verify it again.

    Raises:
        PeerError: it is of another swarm or model, or was altered.
    """
    try:
        donor, offer, leaves = msgspec.msgpack.decode(data, type=tuple[str, TreeOffer, bytes])
    except msgspec.MsgspecError as e:
        raise PeerError(Reason.MALFORMED, "not a tree") from e
    return verified(signer, PeerId(donor), offer, leaves, shape)
