"""The messages of two members in a sealed session, with bounds for each field.

Messages are msgpack, tagged by type. Bulk (an update, a piece) follows in raw frames, after a
message that announces its size.
"""

from __future__ import annotations

from typing import Annotated, Literal, TypeVar

import msgspec
from msgspec import Meta, Struct

from xpeer.errors import PeerError, Reason
from xpeer.forms import Form
from xpeer.leaves import Derived, Parts, Public, Timing, seen_by

PROTOCOL_VERSION = 1
MAX_MESSAGE_BYTES = 8 << 10
MAX_UNRESOLVED = 16
PIECE_BYTES = 1 << 20
"""Size of all pieces of a donor's parameters but the last. It is signed, and never negotiated."""
MAX_PIECES = 64
"""Pieces that a joiner asks for at once."""

Id = Annotated[int, Meta(ge=0, le=(1 << 63) - 1)]
Step = Annotated[int, Meta(ge=0, lt=1 << 40)]
"""A schedule has to work with any step that a donor claims. 2**40 steps of a second each take
34,000 years."""
Size = Annotated[int, Meta(ge=0, lt=1 << 48)]
Digest = Annotated[bytes, Meta(min_length=32, max_length=32)]
Code = Annotated[str, Meta(max_length=32, pattern="^[a-z0-9-]+\\Z")]


@seen_by("partners")
class Message(Struct, frozen=True, forbid_unknown_fields=True, tag=True):
    """Base of all messages."""


@seen_by(
    "partners",
    "weights are of declared speeds, never of tokens or records counted here; charges "
    "follow the clock of steps and writes, and end where the budget does: that tells "
    "the shard's size in steps of 3 %, if the manifest fixes sigma and the run does "
    "not end first",
)
class Terms(Struct, frozen=True, forbid_unknown_fields=True):
    """What one side declares for an exchange."""

    weight: Public[Annotated[float, Meta(gt=0, le=1e6)]]
    """Declared tokens per second if the manifest's rule weights by tokens, else 1."""
    group_weight: Public[Annotated[float, Meta(gt=0, le=1e9)]]
    """Sum of the weights in the group, as the sender sees it."""
    epoch: Timing[Id]
    """Drawn at random at every start of the sender's trainer. No member acts on it today."""
    ledger_counter: Timing[Id]
    """Privacy charges so far. A peer whose counter went back was restored from an old copy."""
    unresolved: Timing[Annotated[list[Id], Meta(max_length=MAX_UNRESOLVED)]] = []
    """Exchanges with this partner that the sender accepted, and did not merge since no answer came.
    """
    loss_public: Derived[float | None] = None
    """Loss on the manifest's public text, nats per token. None unless the rule weights by quality.
    """
    loss_age: Timing[Annotated[float, Meta(ge=0, le=1e6)]] = 0.0
    """Windows since `loss_public` was measured."""


@seen_by("partners")
class Propose(Message, frozen=True):
    """A proposal of the lower PeerID to exchange one fragment."""

    exchange_id: Public[Id]
    slot: Public[Id]
    fragment: Public[Annotated[int, Meta(ge=0, lt=1024)]]
    codec: Public[Code]
    num_values: Public[Size]
    averaging: Timing[bool]
    """True iff parameters are plainly averaged, whatever the manifest's rule, since one of the two
    takes no steps."""
    terms: Parts[Terms]

    @property
    def form(self) -> Form:
        """Form of both payloads, as the proposer claims."""
        return Form(self.codec, self.num_values)


@seen_by("partners")
class Agree(Message, frozen=True):
    """The higher PeerID agrees to an exchange."""

    exchange_id: Public[Id]
    terms: Parts[Terms]


@seen_by(
    "partners",
    "its size follows from codec and fragment; its bytes are update.CompressedUpdate",
)
class Payload(Message, frozen=True):
    """Bulk of exactly this size follows."""

    exchange_id: Public[Id]
    num_bytes: Public[Size]


@seen_by("partners")
class Accept(Message, frozen=True):
    """The partner's payload is complete and valid. Both merge once both accepted."""

    exchange_id: Public[Id]
    digest: Derived[Digest]
    """Digest of the payload's frames, as `network.bulk` makes it."""


@seen_by(
    "partners",
    "of errors.Reason: the pace of windows, or a judgement of the partner's own bytes",
)
class Refuse(Message, frozen=True):
    """A refusal with a reason code. The session stays open."""

    exchange_id: Public[Id]
    reason: Timing[Code]


@seen_by("partners", "keys, digests")
class MaskStep(Message, frozen=True):
    """What a member of a masked group sends to every other in one turn, before its payload."""

    exchange_id: Public[Id]
    step: Public[Literal["key", "lock", "commit", "echo"]]
    value: Derived[Digest]
    """key: an X25519 key, made for this group alone. lock: digest of members and keys. commit:
    digest of our masked payload. echo: digest of all commitments."""


@seen_by("partners", "what its link carried")
class TreeRequest(Message, frozen=True):
    """A joiner asks for the hash tree of a donor's parameters."""

    root: Derived[Digest | None] = None
    """Of the tree under which the joiner has pieces already; None = it has none."""


@seen_by(
    "members",
    "what a joiner is given: released parameters, averaged with those partners showed",
)
class TreeOffer(Message, frozen=True):
    """The hashes of the pieces follow as bulk. The donor signs all of it, and the hashes' root."""

    codec: Public[Code]
    num_bytes: Public[Size]
    """Of all pieces together."""
    step: Timing[Step]
    loss_public: Derived[float]
    root: Derived[Digest]
    signature: Derived[Annotated[bytes, Meta(min_length=64, max_length=64)]]


@seen_by("partners", "the pace of its link")
class PiecesRequest(Message, frozen=True):
    """A joiner asks for pieces in a row. They follow, each as bulk of its own."""

    first: Timing[Size]
    count: Timing[Annotated[int, Meta(ge=1, le=MAX_PIECES)]]


AnyMessage = (
    Propose | Agree | Payload | Accept | Refuse | MaskStep | TreeRequest | TreeOffer | PiecesRequest
)

_encoder = msgspec.msgpack.Encoder()
_decoder: msgspec.msgpack.Decoder[AnyMessage] = msgspec.msgpack.Decoder(AnyMessage)
_T = TypeVar("_T")


def encode(message: AnyMessage) -> bytes:
    """A message as msgpack."""
    return _encoder.encode(message)


def decode(data: bytes) -> AnyMessage:
    """Read a message from msgpack.

    Raises:
        PeerError: it is too large or unknown, or a field is out of bounds.
    """
    if len(data) > MAX_MESSAGE_BYTES:
        raise PeerError(Reason.OVERSIZE, f"message of {len(data)} bytes")
    return unpack(data, _decoder)


def unpack(data: bytes, decoder: msgspec.msgpack.Decoder[_T]) -> _T:
    """Decode bytes that a partner chose.

    Raises:
        PeerError: they are not what the decoder's type says.
    """
    try:
        return decoder.decode(data)
    except (msgspec.MsgspecError, UnicodeDecodeError) as e:
        raise PeerError(Reason.MALFORMED, f"{str(e)[:120]!r}") from e


def tree_statement(swarm_id: str, manifest_hash: bytes, donor: str, offer: TreeOffer) -> bytes:
    """The bytes that a donor signs (Domain.TREE) for the pieces that it hands out."""
    return msgspec.msgpack.encode(
        [
            *(swarm_id, manifest_hash, donor, PIECE_BYTES),
            *(offer.codec, offer.num_bytes, offer.step, offer.loss_public, offer.root),
        ]
    )
