"""What two members say to each other inside a sealed session, and how large it may be.

Small messages are msgpack, tagged by type; bulk (an update, a state) follows a message that
announced its size, in raw frames.
"""

from __future__ import annotations

from typing import Annotated, Literal, TypeVar

import msgspec
from msgspec import Meta, Struct

from xpeer.errors import PeerError, Reason
from xpeer.update import Form

PROTOCOL_VERSION = 1
MAX_MESSAGE_BYTES = 8 << 10
MAX_UNRESOLVED = 16

Id = Annotated[int, Meta(ge=0, le=(1 << 63) - 1)]
Step = Annotated[int, Meta(ge=0, lt=1 << 40)]
"""A schedule has to survive any step that a donor claims: 2**40 steps are 34,000 years of one a
second."""
Size = Annotated[int, Meta(ge=0, lt=1 << 48)]
Digest = Annotated[bytes, Meta(min_length=32, max_length=32)]
Code = Annotated[str, Meta(max_length=32, pattern="^[a-z0-9-]+\\Z")]


class Message(Struct, frozen=True, forbid_unknown_fields=True, tag=True):
    """Base of everything below."""


class Terms(Struct, frozen=True, forbid_unknown_fields=True):
    """One side's part of an exchange."""

    weight: Annotated[float, Meta(gt=0, le=1e6)]
    """Declared tokens per second where the manifest's rule weights by tokens, else 1."""
    group_weight: Annotated[float, Meta(gt=0, le=1e9)]
    """The same, summed over the group as we see it."""
    epoch: Id
    """Drawn at every start of the trainer: an exchange never survives its restart."""
    ledger_counter: Id
    """Privacy charges so far: a peer whose counter went back was restored from an old copy."""
    unresolved: Annotated[list[Id], Meta(max_length=MAX_UNRESOLVED)] = []
    """Exchanges with this partner that we accepted and, hearing nothing more, did not merge."""
    loss_public: float | None = None
    """On the manifest's public text, nats per token, where the rule weights by quality."""
    loss_age: Annotated[float, Meta(ge=0, le=1e6)] = 0.0
    """Windows since that was measured."""


class Propose(Message, frozen=True):
    """The lower PeerID proposes the exchange of one fragment."""

    exchange_id: Id
    slot: Id
    fragment: Annotated[int, Meta(ge=0, lt=1024)]
    codec: Code
    num_values: Size
    averaging: bool
    """Plain averaging of the parameters, whatever the manifest's rule: one of us takes no steps."""
    terms: Terms

    @property
    def form(self) -> Form:
        """Of both payloads, by the proposer's word."""
        return Form(self.codec, self.num_values)


class Agree(Message, frozen=True):
    """The higher PeerID takes part."""

    exchange_id: Id
    terms: Terms


class Payload(Message, frozen=True):
    """Bulk of exactly this size follows."""

    exchange_id: Id
    num_bytes: Size


class Accept(Message, frozen=True):
    """The partner's payload is complete and sane: merge once both accepted."""

    exchange_id: Id
    digest: Digest
    """Of the frames that it came in, as `network.bulk` makes it."""


class Refuse(Message, frozen=True):
    """No, with a reason code; the session stays open."""

    exchange_id: Id
    reason: Code


class MaskStep(Message, frozen=True):
    """What a member of a masked group says to every other at one step, before it shows anything."""

    exchange_id: Id
    step: Literal["key", "lock", "commit", "echo"]
    value: Digest
    """key: X25519, made for this group alone. Else a digest, lock: of members and keys; commit: of
    our masked payload; echo: of all commitments."""


class StateRequest(Message, frozen=True, omit_defaults=True):
    """A joiner asks for the current parameters; or, where that broke off, for the rest of them."""

    digest: Digest | None = None
    """What it was offered, and holds the beginning of; None = it begins. Who no longer has that, or
    is older than this field, ends the session."""
    start: Size = 0
    """Bytes that it has."""


class StateOffer(Message, frozen=True):
    """The donor's parameters follow, flat float32 little endian; it stands by digest and loss."""

    num_params: Size
    step: Step
    loss_public: float
    digest: Digest
    signature: Annotated[bytes, Meta(min_length=64, max_length=64)]


class StateReceived(Message, frozen=True):
    """The joiner holds all of it."""

    digest: Digest


AnyMessage = (
    Propose | Agree | Payload | Accept | Refuse | MaskStep | StateRequest | StateOffer
    | StateReceived
)  # fmt: skip

_encoder = msgspec.msgpack.Encoder()
_decoder: msgspec.msgpack.Decoder[AnyMessage] = msgspec.msgpack.Decoder(AnyMessage)
_T = TypeVar("_T")


def encode(message: AnyMessage) -> bytes:
    """To msgpack."""
    return _encoder.encode(message)


def decode(data: bytes) -> AnyMessage:
    """From msgpack.

    Raises:
        PeerError: too large, unknown, or a field out of bounds.
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


def state_statement(
    swarm_id: str, manifest_hash: bytes, step: int, loss_public: float, digest: bytes
) -> bytes:
    """What a donor signs (Domain.STATE) about the parameters that it hands out."""
    return msgspec.msgpack.encode([swarm_id, manifest_hash, step, loss_public, digest])
