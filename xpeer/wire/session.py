"""A sealed session between two members: handshake and frames, without any IO.

Both sides send a HELLO: a fresh X25519 key and what they believe the session is, signed with their
identity key. The frame keys come from the Diffie-Hellman secret of the fresh keys, the swarm key
and both HELLOs, so that they are forward secret, and void for whoever lacks the swarm key. Each
HELLO lists the ciphers that its sender has; the choice follows from both lists, so whoever would
change it has to forge a signature. `frames` has the rest.

What it does not give: hiding that, when and how much two peers talk; safety for a session whose
frame keys leak from memory while it is open.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal, Protocol

import msgspec
from msgspec import Meta, Struct
from nacl import bindings
from nacl.exceptions import CryptoError
from nacl.public import PrivateKey

from xpeer.errors import PeerError, Reason
from xpeer.identity import Domain, Identity, PeerId, blake2b, verify
from xpeer.leaves import Public, seen_by
from xpeer.wire.aead import Cipher, supported
from xpeer.wire.frames import Opener, Sealer
from xpeer.wire.messages import PROTOCOL_VERSION, Code, unpack

MAX_HELLO_BYTES = 1 << 10

Purpose = Literal["exchange", "state"]
Key = Annotated[bytes, Meta(min_length=32, max_length=32)]


@seen_by("members")
class Hello(Struct, frozen=True, forbid_unknown_fields=True):
    """The signed body of the first message each way."""

    version: Public[int]
    purpose: Public[Purpose]
    swarm_id: Public[str]
    manifest_hash: Public[Key]
    sender: Public[str]
    receiver: Public[str]
    serial: Public[int]
    """Of the sender's membership certificate."""
    ephemeral: Public[Key]
    """X25519 public key, made for this session alone."""
    ciphers: Public[Annotated[list[Code], Meta(min_length=1, max_length=4)]]
    """What the sender has, the best first."""
    answers: Public[bytes] = b""
    """Responder: BLAKE2b-256 of the initiator's HELLO."""


@seen_by("members")
class SignedHello(Struct, frozen=True, forbid_unknown_fields=True):
    """A HELLO as it travels."""

    body: Public[bytes]
    signature: Public[bytes]


_hello = msgspec.msgpack.Decoder(Hello)
_signed_hello = msgspec.msgpack.Decoder(SignedHello)


class SwarmKeys(Protocol):
    """Where the swarm key is asked for; `network.keyring.KeyRing` in production."""

    @property
    def current(self) -> bytes:
        """32 bytes that only members hold."""


@dataclass(frozen=True, slots=True)
class Credentials:
    """What we bring to every handshake.

    Attributes:
        identity: our key.
        swarm_id: fingerprint of the swarm.
        keys: asked for the swarm key when the frame keys are derived.
        manifest_hash: 32 bytes; both must train by the same manifest.
        serial: of our certificate.
    """

    identity: Identity
    swarm_id: str
    keys: SwarmKeys
    manifest_hash: bytes
    serial: int


class Handshake:
    """One side of the HELLO exchange. The initiator sends first; the responder answers.

    Args:
        own: our credentials.
        partner: whom we mean to talk to (libp2p authenticated it already).
        purpose: what the session is for.
        initiator: whether we opened the stream.
        ciphers: what we have, the best first.
    """

    def __init__(
        self,
        own: Credentials,
        partner: PeerId,
        *,
        purpose: Purpose,
        initiator: bool,
        ciphers: tuple[Cipher, ...] | None = None,
    ) -> None:
        self._own = own
        self._partner = partner
        self._purpose: Purpose = purpose
        self._initiator = initiator
        self._ciphers = ciphers or supported()
        self._secret = PrivateKey.generate()
        self._ours = b""
        self._theirs = b""
        self._their_ephemeral = b""
        self._their_ciphers: list[str] = []

    def hello(self) -> bytes:
        """Our HELLO; a responder calls this after `receive`."""
        if not self._initiator and not self._theirs:
            raise RuntimeError("a responder answers: receive() comes first")
        body = msgspec.msgpack.encode(
            Hello(
                version=PROTOCOL_VERSION,
                purpose=self._purpose,
                swarm_id=self._own.swarm_id,
                manifest_hash=self._own.manifest_hash,
                sender=self._own.identity.peer_id,
                receiver=self._partner,
                serial=self._own.serial,
                ephemeral=bytes(self._secret.public_key),
                ciphers=list(self._ciphers),
                answers=b"" if self._initiator else blake2b(self._theirs),
            )
        )
        self._ours = msgspec.msgpack.encode(
            SignedHello(body, self._own.identity.sign(Domain.HELLO, body))
        )
        return self._ours

    def receive(self, data: bytes) -> Hello:
        """Check the partner's HELLO.

        Raises:
            PeerError: malformed, not the partner's, for somebody else, another swarm, manifest,
                version or purpose, or a replay.
        """
        if len(data) > MAX_HELLO_BYTES:
            raise PeerError(Reason.OVERSIZE, f"HELLO of {len(data)} bytes")
        signed = unpack(data, _signed_hello)
        if not verify(self._partner, Domain.HELLO, signed.body, signed.signature):
            raise PeerError(Reason.TAMPERED, "HELLO is not signed by the partner")
        hello = unpack(signed.body, _hello)
        self._check(hello)
        self._theirs = data
        self._their_ephemeral = hello.ephemeral
        self._their_ciphers = hello.ciphers
        return hello

    def _check(self, hello: Hello) -> None:
        if hello.version != PROTOCOL_VERSION:
            raise PeerError(Reason.WRONG_VERSION, f"partner speaks version {hello.version}")
        if hello.swarm_id != self._own.swarm_id:
            raise PeerError(Reason.WRONG_SWARM, "partner is of another swarm")
        if hello.manifest_hash != self._own.manifest_hash:
            raise PeerError(Reason.WRONG_MODEL, "partner trains by another manifest")
        if (hello.sender, hello.receiver) != (self._partner, self._own.identity.peer_id):
            raise PeerError(Reason.TAMPERED, "HELLO is of or for another peer")
        if hello.purpose != self._purpose:
            raise PeerError(Reason.MALFORMED, "HELLO is for another protocol")
        expected = blake2b(self._ours) if self._initiator else b""
        if hello.answers != expected:
            raise PeerError(Reason.REPLAYED, "HELLO answers another one than ours")

    def session(self) -> Session:
        """Derive the frame keys; both HELLOs must have passed.

        Raises:
            PeerError: the partner's fresh key is degenerate, or it has no cipher of ours.
        """
        cipher = self._common_cipher()
        try:
            shared = bindings.crypto_scalarmult(bytes(self._secret), self._their_ephemeral)
        except (CryptoError, RuntimeError) as e:
            raise PeerError(Reason.TAMPERED, "degenerate key in HELLO") from e
        first, second = (
            (self._ours, self._theirs) if self._initiator else (self._theirs, self._ours)
        )
        swarm_key = self._own.keys.current
        forth = blake2b(b"initiator", shared, swarm_key, first, second)
        back = blake2b(b"responder", shared, swarm_key, first, second)
        ours, theirs = (forth, back) if self._initiator else (back, forth)
        return Session(ours, theirs, cipher)

    def _common_cipher(self) -> Cipher:
        """The first on the initiator's list that is on the responder's, too."""
        theirs, ours = self._their_ciphers, self._ciphers
        if self._initiator:
            common = [cipher for cipher in ours if cipher in theirs]
        else:
            common = [cipher for name in theirs for cipher in ours if cipher == name]
        if not common:
            raise PeerError(Reason.MALFORMED, "no cipher in common")
        return common[0]


class Session:
    """Seals our frames in order and opens the partner's in order.

    The two directions share nothing that changes, so two threads may work at once, one on each.

    Args:
        send_key: 32 bytes, ours.
        receive_key: 32 bytes, the partner's.
        cipher: of both directions.
    """

    def __init__(self, send_key: bytes, receive_key: bytes, cipher: Cipher) -> None:
        self._keys = send_key, receive_key
        self.cipher: Cipher = cipher
        self.sealer = Sealer(send_key, cipher)
        self.opener = Opener(receive_key, cipher)

    def child(self, label: bytes) -> Session:
        """A session of its own with the same partner, for another stream; forward secret alike.

        Args:
            label: never used before in this session, and the same at both ends.
        """
        ours, theirs = (blake2b(b"child", key, label) for key in self._keys)
        return Session(ours, theirs, self.cipher)
