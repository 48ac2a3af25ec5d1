"""Who belongs to the swarm: certificates signed by the admin key, checked by anyone.

A certificate says: this PeerID (or whoever holds this bearer key) may take part in this role until
then. It contains the genesis (admin key and hash of the first manifest), to which the swarm's
fingerprint commits. So a bootstrap node can check it, though it knows only the fingerprint.
`Certificate` is what the admin signs. `Credential` is a certificate as its holder presents it.

What this does not give: nobody can revoke a certificate before `not_after` (a later version may).
Bearer tokens have no limit of uses: whoever holds one before `join_before` can join, with any
PeerID.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable
from typing import Annotated, Literal, TypeVar

import msgspec
from msgspec import Meta, Struct

from xpeer.errors import NotAuthorisedError
from xpeer.identity import Domain, Identity, verify_with
from xpeer.leaves import Parts, Public, seen_by
from xpeer.manifest.signed import Genesis

MAX_CREDENTIAL_BYTES = 2048
MAX_REMEMBERED = 4096
CLOCK_SKEW_S = 300.0
"""A certificate made by a clock this far ahead of ours still counts."""
BEARER_PREFIX = "bearer:"

Role = Literal["member", "observer", "admin", "infrastructure"]
Scope = Literal["dht", "observer", "member"]
"""What a caller's certificate has to allow; the weakest first."""

_SCOPES: dict[Role, frozenset[Scope]] = {
    "infrastructure": frozenset({"dht"}),
    "observer": frozenset({"dht", "observer"}),
    "member": frozenset({"dht", "observer", "member"}),
    "admin": frozenset({"dht", "observer", "member"}),
}
_T = TypeVar("_T")
_Signature = Annotated[bytes, Meta(min_length=64, max_length=64)]
_Name = Annotated[str, Meta(max_length=80)]


@seen_by("anybody")
class Certificate(Struct, frozen=True, forbid_unknown_fields=True):
    """The right to take part, as the admin key signs it."""

    genesis: Parts[Genesis]
    subject: Public[_Name]
    """A PeerID; or "bearer:" and a hex Ed25519 key, whose holder chooses the PeerID."""
    role: Public[Role]
    serial: Public[Annotated[int, Meta(ge=0, le=(1 << 63) - 1)]]
    not_before_unix_s: Public[int]
    join_before_unix_s: Public[int]
    """Members hand over the swarm key until then."""
    not_after_unix_s: Public[int]
    """When the membership ends."""


@seen_by("anybody")
class Credential(Struct, frozen=True, forbid_unknown_fields=True):
    """A certificate as its holder presents it."""

    body: Public[bytes]
    """The Certificate as msgpack. The signature is over these bytes."""
    signature: Public[_Signature]
    peer_id: Public[_Name]
    binding: Public[bytes] = b""
    """The bearer key's signature over peer_id; empty without a bearer key."""

    @classmethod
    def issue(cls, admin: Identity, certificate: Certificate, peer_id: str) -> Credential:
        """Sign a certificate for a PeerID."""
        body = msgspec.msgpack.encode(certificate)
        return cls(body, admin.sign(Domain.CERTIFICATE, body), peer_id)

    def verify(self, swarm_id: str, now_unix_s: float) -> Certificate:
        """Check signatures, holder, swarm and dates. That needs no network.

        Raises:
            NotAuthorisedError: a check failed; its text says which.
        """
        certificate = unpack(self.body, Certificate, "certificate")
        if certificate.genesis.swarm_id != swarm_id:
            raise NotAuthorisedError(
                f"the certificate is of swarm {certificate.genesis.swarm_id[:16]}, "
                f"not {swarm_id[:16]}",
                "ask an admin of this swarm for an invitation",
            )
        admin = certificate.genesis.admin
        if not verify_with(admin, Domain.CERTIFICATE, self.body, self.signature):
            raise NotAuthorisedError(
                "the certificate's signature is wrong", "ask an admin for a new invitation"
            )
        self._check_holder(certificate)
        if now_unix_s + CLOCK_SKEW_S < certificate.not_before_unix_s:
            raise NotAuthorisedError("the certificate is not valid yet", "check this node's clock")
        if now_unix_s >= certificate.not_after_unix_s:
            raise NotAuthorisedError(
                "the membership certificate has expired", "ask an admin for a new invitation"
            )
        return certificate

    def _check_holder(self, certificate: Certificate) -> None:
        if certificate.subject.startswith(BEARER_PREFIX):
            try:
                bearer = bytes.fromhex(certificate.subject.removeprefix(BEARER_PREFIX))
            except ValueError:
                bearer = b""
            if not verify_with(bearer, Domain.BEARER, self.peer_id.encode(), self.binding):
                raise NotAuthorisedError(
                    "the bearer key did not sign for this PeerID", "join with the token again"
                )
        elif certificate.subject != self.peer_id:
            raise NotAuthorisedError(
                f"the certificate is for {certificate.subject}, not {self.peer_id}",
                "ask an admin for an invitation for this PeerID (`xpeer id`)",
            )

    def claimed_swarm(self) -> str:
        """The swarm that the certificate names. It is not verified."""
        return unpack(self.body, Certificate, "certificate").genesis.swarm_id

    def to_bytes(self) -> bytes:
        """As msgpack."""
        return msgspec.msgpack.encode(self)

    @classmethod
    def from_bytes(cls, data: bytes) -> Credential:
        """Read what `to_bytes` wrote.

        Raises:
            NotAuthorisedError: it is too large or malformed.
        """
        if len(data) > MAX_CREDENTIAL_BYTES:
            raise NotAuthorisedError(
                f"a credential of {len(data)} bytes is too large", "restore it, or join again"
            )
        return unpack(data, cls, "credential")


class Membership:
    """Decides whom this node lets in, by the credentials that it saw and the operator's seeds.

    Args:
        swarm_id: fingerprint.
        own: the credential that we present; None for a bootstrap node without a certificate.
        clock: wall clock, seconds.

    Attributes:
        own: as above; the node itself never changes it.
    """

    def __init__(
        self, swarm_id: str, own: Credential | None, clock: Callable[[], float] = time.time
    ) -> None:
        self.swarm_id = swarm_id
        self.own = own
        self._clock = clock
        self._known: OrderedDict[str, tuple[Certificate, bytes]] = OrderedDict()
        self._seeds: set[str] = set()

    def admit(self, peer_id: str, data: bytes) -> Certificate:
        """Verify and remember the credential of this peer.

        If the peer has several valid ones, the one issued last counts. Nobody can bring back an
        earlier one.

        Raises:
            NotAuthorisedError: the credential is another peer's; or see `Credential.verify`.
        """
        credential = Credential.from_bytes(data)
        if credential.peer_id != peer_id:
            raise NotAuthorisedError("the credential is another peer's")
        certificate = credential.verify(self.swarm_id, self._clock())
        known = self.certificate_of(peer_id)
        if known is None or certificate.not_before_unix_s >= known.not_before_unix_s:
            self._known[peer_id] = certificate, data
        self._known.move_to_end(peer_id)
        if len(self._known) > MAX_REMEMBERED:
            self._known.popitem(last=False)
        return certificate

    def certificate_of(self, peer_id: str) -> Certificate | None:
        """The peer's certificate; None if it has shown none, or it expired."""
        certificate, _ = self._known.get(peer_id, (None, b""))
        if certificate is not None and self._clock() >= certificate.not_after_unix_s:
            del self._known[peer_id]
            return None
        return certificate

    def credential_of(self, peer_id: str) -> bytes | None:
        """The peer's credential as bytes, to be passed on; None if there is no valid one."""
        valid = self.certificate_of(peer_id) is not None
        return self._known[peer_id][1] if valid else None

    def may_join(self, certificate: Certificate) -> bool:
        """Whether members may still hand the swarm key to this certificate's holder."""
        return self._clock() < certificate.join_before_unix_s

    def trust_seed(self, peer_id: str) -> None:
        """Let a configured bootstrap node take part in the DHT, and in nothing else."""
        self._seeds.add(peer_id)

    def allows(self, peer_id: str, scope: Scope) -> bool:
        """Whether this peer may use handlers of this scope."""
        certificate = self.certificate_of(peer_id)
        if certificate is not None:
            return scope in _SCOPES[certificate.role]
        return scope == "dht" and peer_id in self._seeds


def unpack(data: bytes, kind: type[_T], what: str) -> _T:
    """Decode msgpack from outside.

    Args:
        data: anything.
        kind: the type that it should hold.
        what: a name for it, for the error's text.

    Raises:
        NotAuthorisedError: it does not hold a `kind`.
    """
    try:
        return msgspec.msgpack.decode(data, type=kind)
    except (msgspec.MsgspecError, ValueError, RecursionError) as e:
        raise NotAuthorisedError(
            f"the {what} is malformed", "restore it, or ask an admin for a new token"
        ) from e
