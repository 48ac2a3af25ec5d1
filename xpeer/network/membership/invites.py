"""Invitations: a token holds the swarm's fingerprint, seeds, and a signed right to join.

A token for one PeerID is useless to anybody else. A bearer token also holds a key that signs for
the newcomer's PeerID. Whoever holds it before it expires can join, as often as they like: a limit
of uses would need a server. The admin key signs the whole token, its seeds included, so an altered
one is refused before anybody is contacted.

What this does not give: proof that the swarm is the one that was meant. Compare its fingerprint
over another channel.
"""

from __future__ import annotations

import base64
import binascii
import secrets
from typing import Annotated

import msgspec
from msgspec import Meta, Struct
from nacl.signing import SigningKey

from xpeer.errors import ConfigError, NotAuthorisedError
from xpeer.identity import Domain, Identity, PeerId, verify_with
from xpeer.leaves import Parts, Public, seen_by
from xpeer.manifest.signed import Genesis
from xpeer.needs import Needs
from xpeer.network.membership.certificates import (
    BEARER_PREFIX,
    Certificate,
    Credential,
    Role,
    unpack,
)

PREFIX = "xpeer1."
MAX_TOKEN_CHARS = 4096
MAX_SEEDS = 16
MEMBERSHIP_S = 365 * 86400
_REMEDY = "copy the whole token again, or ask for a new one (`xpeer invite create`)"


@seen_by("anybody")
class Token(Struct, frozen=True, forbid_unknown_fields=True):
    """An invitation token: `xpeer invite create` prints it as text."""

    name: Public[Annotated[str, Meta(max_length=200)]]
    seeds: Public[Annotated[list[Annotated[str, Meta(max_length=300)]], Meta(max_length=MAX_SEEDS)]]
    body: Public[bytes]
    """The certificate, as signed."""
    signature: Public[bytes]
    bearer: Public[bytes] = b""
    """Secret seed of the bearer key; empty in a token for one PeerID."""
    seal: Public[bytes] = b""
    """The admin key's signature over everything else."""
    needs: Parts[Needs | None] = None
    """What members need besides their text. None = nothing, or an earlier version made the token;
    the field is then left out of the token's bytes."""

    def __repr__(self) -> str:
        """Without the secret: with a bearer token from a log, anybody could join."""
        return f"Token({self.name!r}, {len(self.seeds)} seeds)"

    def __str__(self) -> str:
        """As text to be copied."""
        said = msgspec.structs.asdict(self)
        if self.needs is None:
            del said["needs"]
        return PREFIX + base64.urlsafe_b64encode(msgspec.msgpack.encode(said)).decode().rstrip("=")

    @classmethod
    def parse(cls, text: str) -> Token:
        """Read a token.

        Raises:
            NotAuthorisedError: it is not a token, is damaged, or has control characters that a
                terminal would obey.
        """
        text = text.strip()
        if not text.startswith(PREFIX) or len(text) > MAX_TOKEN_CHARS:
            raise NotAuthorisedError(
                f"this is not a token: it does not start with {PREFIX}", _REMEDY
            )
        encoded = text.removeprefix(PREFIX)
        try:
            data = base64.b64decode(
                encoded + "=" * (-len(encoded) % 4), altchars=b"-_", validate=True
            )
            token = unpack(data, cls, "token")
            intact = str(token) == text and token._is_sealed()
        except (binascii.Error, ValueError, NotAuthorisedError) as e:
            raise NotAuthorisedError("the token is damaged", _REMEDY) from e
        if not intact:
            raise NotAuthorisedError("the token is damaged or was altered", _REMEDY)
        needs = msgspec.structs.astuple(token.needs) if token.needs is not None else ()
        words = token.name, *token.seeds, *(said for said in needs if isinstance(said, str))
        if not all(said.isprintable() for said in words):
            raise NotAuthorisedError(
                f"the token's name {token.name!r}, a seed, or what it says that members need has "
                "control characters",
                "don't join: whoever made it wants to deceive; ask somebody you know for another",
            )
        return token

    def _statement(self) -> bytes:
        said = (self.name, self.seeds, self.body, self.signature, self.bearer)
        return msgspec.msgpack.encode(said if self.needs is None else (*said, self.needs))

    def _is_sealed(self) -> bool:
        admin = self.certificate.genesis.admin
        return verify_with(admin, Domain.TOKEN, self._statement(), self.seal)

    @property
    def certificate(self) -> Certificate:
        """The certificate in the token. It is not verified before `credential_for`."""
        return unpack(self.body, Certificate, "token")

    @property
    def swarm_id(self) -> str:
        """Fingerprint of the swarm that the token is for."""
        return self.certificate.genesis.swarm_id

    def credential_for(self, identity: Identity, now_unix_s: float) -> Credential:
        """Turn the token into this peer's credential.

        Raises:
            NotAuthorisedError: the token was altered, has expired, or is for another PeerID.
        """
        if len(self.signature) != 64 or len(self.bearer) not in (0, 32):
            raise NotAuthorisedError("the token is damaged", _REMEDY)
        binding = b""
        if self.bearer:
            bearer = Identity(SigningKey(self.bearer))
            binding = bearer.sign(Domain.BEARER, identity.peer_id.encode())
        credential = Credential(self.body, self.signature, identity.peer_id, binding)
        certificate = credential.verify(self.swarm_id, now_unix_s)
        if now_unix_s >= certificate.join_before_unix_s:
            late_s = now_unix_s - certificate.join_before_unix_s
            raise NotAuthorisedError(
                f"the token expired {late_s / 3600:.1f} hours ago",
                "ask an admin for a new one (`xpeer invite create`)",
            )
        return credential


def create_token(
    admin: Identity,
    genesis: Genesis,
    *,
    name: str,
    seeds: list[str],
    for_peer: PeerId | None,
    role: Role,
    ttl_s: float,
    now_unix_s: float,
    needs: Needs | None = None,
) -> Token:
    """Make an invitation.

    Args:
        admin: the swarm's admin key.
        genesis: of the swarm.
        name: of the swarm, for people.
        seeds: multiaddresses of bootstrap nodes or members.
        for_peer: the only PeerID that can use it; None = make a bearer token.
        role: of whoever joins with it.
        ttl_s: the right to join expires after this.
        now_unix_s: wall clock.
        needs: what members need besides their text.

    Raises:
        ConfigError: the seeds do not fit into a token.
    """
    bearer = b"" if for_peer else bytes(SigningKey.generate())
    holder = f"{BEARER_PREFIX}{bytes(SigningKey(bearer).verify_key).hex()}" if bearer else ""
    certificate = grant(genesis, for_peer or holder, role, ttl_s, now_unix_s)
    body = msgspec.msgpack.encode(certificate)
    plain = Token(name, seeds, body, admin.sign(Domain.CERTIFICATE, body), bearer, needs=needs)
    token = msgspec.structs.replace(plain, seal=admin.sign(Domain.TOKEN, plain._statement()))
    try:
        return Token.parse(str(token))
    except NotAuthorisedError as e:
        raise ConfigError(
            f"a token can't hold these {len(seeds)} seeds or this name",
            f"name at most {MAX_SEEDS} seeds of usual length with --seed",
        ) from e


def grant(
    genesis: Genesis, subject: str, role: Role, ttl_s: float, now_unix_s: float
) -> Certificate:
    """Make a certificate that is valid from now on; it is not signed yet."""
    now = int(now_unix_s)
    return Certificate(
        genesis=genesis,
        subject=subject,
        role=role,
        serial=secrets.randbits(63),
        not_before_unix_s=now,
        join_before_unix_s=now + int(ttl_s),
        not_after_unix_s=now + max(MEMBERSHIP_S, int(ttl_s)),
    )
