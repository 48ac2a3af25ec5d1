"""What two members say to each other inside a sealed session, and how large it may be.

Small messages are msgpack, tagged by type; bulk (an update, a state) follows a message that
announced its size, in raw frames.
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

Id = Annotated[int, Meta(ge=0, le=(1 << 63) - 1)]
Step = Annotated[int, Meta(ge=0, lt=1 << 40)]
"""A schedule has to survive any step that a donor claims: 2**40 steps are 34,000 years of one a
second."""
Size = Annotated[int, Meta(ge=0, lt=1 << 48)]
Digest = Annotated[bytes, Meta(min_length=32, max_length=32)]
Code = Annotated[str, Meta(max_length=32, pattern="^[a-z0-9-]+\\Z")]


@seen_by("partners")
class Message(Struct, frozen=True, forbid_unknown_fields=True, tag=True):
    """Base of everything below."""


@seen_by(
    "partners",
    "weights are of declared speeds, never of tokens or records counted here; charges "
    "follow the clock of steps and writes, and end where the budget does: that tells "
    "the shard's size in steps of 3 %, if the manifest fixes sigma and the run does "
    "not end first",
)
class Terms(Struct, frozen=True, forbid_unknown_fields=True):
    """One side's part of an exchange."""

    weight: Public[Annotated[float, Meta(gt=0, le=1e6)]]
    """Declared tokens per second where the manifest's rule weights by tokens, else 1."""
    group_weight: Public[Annotated[float, Meta(gt=0, le=1e9)]]
    """The same, summed over the group as we see it."""
    epoch: Timing[Id]
    """Drawn at every start of the trainer: an exchange never survives its restart."""
    ledger_counter: Timing[Id]
    """Privacy charges so far: a peer whose counter went back was restored from an old copy."""
    unresolved: Timing[Annotated[list[Id], Meta(max_length=MAX_UNRESOLVED)]] = []
    """Exchanges with this partner that we accepted and, hearing nothing more, did not merge."""
    loss_public: Derived[float | None] = None
    """On the manifest's public text, nats per token, where the rule weights by quality."""
    loss_age: Timing[Annotated[float, Meta(ge=0, le=1e6)]] = 0.0
    """Windows since that was measured."""


@seen_by("partners")
class Propose(Message, frozen=True):
    """The lower PeerID proposes the exchange of one fragment."""

    exchange_id: Public[Id]
    slot: Public[Id]
    fragment: Public[Annotated[int, Meta(ge=0, lt=1024)]]
    codec: Public[Code]
    num_values: Public[Size]
    averaging: Timing[bool]
    """Plain averaging of the parameters, whatever the manifest's rule: one of us takes no steps."""
    terms: Parts[Terms]

    @property
    def form(self) -> Form:
        """Of both payloads, by the proposer's word."""
        return Form(self.codec, self.num_values)


@seen_by("partners")
class Agree(Message, frozen=True):
    """The higher PeerID takes part."""

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
    """The partner's payload is complete and sane: merge once both accepted."""

    exchange_id: Public[Id]
    digest: Derived[Digest]
    """Of the frames that it came in, as `network.bulk` makes it."""


@seen_by(
    "partners",
    "of errors.Reason: the pace of windows, or a judgement of the partner's own bytes",
)
class Refuse(Message, frozen=True):
    """No, with a reason code; the session stays open."""

    exchange_id: Public[Id]
    reason: Timing[Code]


@seen_by("partners", "keys, digests")
class MaskStep(Message, frozen=True):
    """What a member of a masked group says to every other at one step, before it shows anything."""

    exchange_id: Public[Id]
    step: Public[Literal["key", "lock", "commit", "echo"]]
    value: Derived[Digest]
    """key: X25519, made for this group alone. Else a digest, lock: of members and keys; commit: of
    our masked payload; echo: of all commitments."""


@seen_by("partners", "what its link carried")
class StateRequest(Message, frozen=True, omit_defaults=True):
    """A joiner asks for the current parameters; or, where that broke off, for the rest of them."""

    digest: Derived[Digest | None] = None
    """What it was offered, and holds the beginning of; None = it begins. Who no longer has that, or
    is older than this field, ends the session."""
    start: Timing[Size] = 0
    """Bytes that it has."""


@seen_by(
    "members",
    "what a joiner is given: released parameters, averaged with those partners showed",
)
class StateOffer(Message, frozen=True):
    """The donor's parameters follow, flat float32 little endian; it stands by digest and loss."""

    num_params: Public[Size]
    step: Timing[Step]
    loss_public: Derived[float]
    digest: Derived[Digest]
    signature: Derived[Annotated[bytes, Meta(min_length=64, max_length=64)]]


@seen_by("members")
class StateReceived(Message, frozen=True):
    """The joiner holds all of it."""

    digest: Derived[Digest]


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
