"""Admission: any member hands the manifest and the swarm key to a peer with a right to join.

The reply is sealed to the newcomer's PeerID. The newcomer checks the manifest against the
fingerprint in its token, and the swarm key against the digest in the manifest.
"""

from __future__ import annotations

import logging
import time

import msgspec
from msgspec import Struct

from xpeer.errors import ConfigError, NotAuthorisedError, PeerError, Reason
from xpeer.identity import Identity, PeerId, seal_to
from xpeer.leaves import Public, seen_by
from xpeer.manifest.signed import MAX_MANIFEST_BYTES, SignedManifest, swarm_key_digest
from xpeer.network.membership.certificates import MAX_CREDENTIAL_BYTES
from xpeer.network.membership.keyring import KeyRing
from xpeer.network.swarm import Swarm

log = logging.getLogger("xpeer.network")

PROTOCOL = "xpeer/admit/1"
CALL_TIMEOUT_S = 30.0


@seen_by("members")
class Admission(Struct, frozen=True, forbid_unknown_fields=True):
    """Manifest and swarm key as a member hands them over; sealed as a whole."""

    manifest: Public[bytes]
    swarm_key: Public[bytes]


_decoder = msgspec.msgpack.Decoder(Admission)


async def serve(swarm: Swarm, manifest: SignedManifest, keyring: KeyRing) -> None:
    """Admit peers whose introduction carried a right to join that has not expired."""
    signed = manifest.to_bytes()

    async def handle(peer_id: PeerId, request: bytes) -> bytes:
        certificate = swarm.membership.certificate_of(peer_id)
        if certificate is None or not swarm.membership.may_join(certificate):
            log.info("not admitted: %s has no right to join, or it expired", peer_id)
            return b""
        log.info("admitted %s as %s", peer_id, certificate.role)
        admission = Admission(signed, keyring.current)
        return seal_to(peer_id, msgspec.msgpack.encode(admission))

    await swarm.serve_call(PROTOCOL, handle, "observer", MAX_CREDENTIAL_BYTES)


async def request(
    swarm: Swarm, identity: Identity, swarm_id: str, member: PeerId
) -> tuple[SignedManifest, bytes]:
    """Ask one member for admission.

    Returns:
        The manifest, checked against the fingerprint, and the swarm key (32 bytes).

    Raises:
        PeerError: the member does not answer, is no member, or hands over something else.
        NotAuthorisedError: it refused, and our right to join has expired.
    """
    sealed = await swarm.call(member, PROTOCOL, b"", CALL_TIMEOUT_S)
    if not swarm.membership.allows(member, "observer"):
        raise PeerError(Reason.NOT_A_MEMBER, f"{member[-8:]} has shown no certificate of a member")
    if not sealed:
        own = swarm.membership.own
        if own is not None and swarm.membership.may_join(own.verify(swarm_id, time.time())):
            raise PeerError(Reason.REFUSED, f"{member[-8:]} says that our right to join is over")
        raise NotAuthorisedError(
            "the right to join has expired", "ask an admin for a new token (`xpeer invite create`)"
        )
    if len(sealed) > MAX_MANIFEST_BYTES + 4096:
        raise PeerError(Reason.OVERSIZE, "admission")
    try:
        admission = _decoder.decode(identity.open(sealed))
        manifest = SignedManifest.from_bytes(admission.manifest)
        expected = manifest.open(swarm_id).swarm_key_digest
    except (msgspec.MsgspecError, UnicodeDecodeError, NotAuthorisedError, ConfigError) as e:
        raise PeerError(Reason.MALFORMED, f"admission by {member[-8:]}: {e}") from e
    if expected and swarm_key_digest(admission.swarm_key) != expected:
        raise PeerError(Reason.TAMPERED, f"{member[-8:]} handed over a wrong swarm key")
    if len(admission.swarm_key) != 32:
        raise PeerError(Reason.MALFORMED, "admission holds no swarm key")
    return manifest, admission.swarm_key
