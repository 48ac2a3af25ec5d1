"""The manifest as it travels and lies on disk: signed by the founder, bound to a fingerprint."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import msgspec
from msgspec import Struct

from xpeer.errors import ConfigError, NotAuthorisedError
from xpeer.identity import Domain, Identity, blake2b, verify_with
from xpeer.leaves import seen_by
from xpeer.manifest import Manifest

MAX_MANIFEST_BYTES = 1 << 20
REMOVED: Final = (
    (
        "round", "codec", ("int8-modulo", "int4-modulo", "int2-modulo"),
        "modulo codecs were removed", "int8",
    ),
    ("privacy", "mode", ("update",), "mode update was removed", "record"),
)  # fmt: skip
"""Values that manifests up to 2026-11-29 could have: section, field, values, why they are gone, and
the value to use now."""


def swarm_key_digest(key: bytes) -> str:
    """Digest of a swarm key. It may be public, since nobody can guess 32 random bytes."""
    return blake2b(Domain.SWARM_KEY, key).hex()


@seen_by("members", all_public=True)
class SignedManifest(Struct, frozen=True, forbid_unknown_fields=True):
    """A manifest as it travels and lies on disk. Make with `sign`, read with `open`."""

    body: str
    """The manifest as JSON. The signature is over these bytes, so nobody ever re-encodes them."""
    admin: bytes
    """Ed25519 public key of the founder's admin key."""
    signature: bytes

    @classmethod
    def sign(cls, manifest: Manifest, admin: Identity) -> SignedManifest:
        """Found a swarm: sign its first manifest."""
        body = msgspec.json.encode(manifest, order="sorted").decode()
        signature = admin.sign(Domain.MANIFEST, body.encode())
        return cls(body=body, admin=admin.verify_key, signature=signature)

    @property
    def genesis(self) -> Genesis:
        """Admin key and hash of this manifest, to which the swarm's fingerprint commits."""
        return Genesis(admin=self.admin, manifest_hash=blake2b(self.body.encode()))

    def open(self, swarm_id: str | None = None) -> Manifest:
        """Verify the signature, the fingerprint if given, and every field.

        Raises:
            NotAuthorisedError: it was altered, or is of another swarm.
            ConfigError: it is signed, but this version can't read it.
        """
        if not verify_with(self.admin, Domain.MANIFEST, self.body.encode(), self.signature):
            raise NotAuthorisedError(
                "the manifest's signature is wrong: it was altered", "fetch it from a member again"
            )
        if swarm_id is not None and self.genesis.swarm_id != swarm_id:
            raise NotAuthorisedError(
                f"the manifest is of swarm {self.genesis.swarm_id[:16]}, not {swarm_id[:16]}",
                "use the token of the swarm that you want to join",
            )
        try:
            return msgspec.json.decode(self.body, type=Manifest)
        except (msgspec.MsgspecError, ValueError, RecursionError) as e:
            raise _unreadable(self.body, e) from e

    def to_bytes(self) -> bytes:
        """As JSON, for the disk and for joiners."""
        return msgspec.json.encode(self)

    @classmethod
    def from_bytes(cls, data: bytes, source: str = "manifest") -> SignedManifest:
        """Read what `to_bytes` wrote. `open` checks the signature."""
        if len(data) > MAX_MANIFEST_BYTES:
            raise ConfigError(
                f"{source} has {len(data)} bytes, at most {MAX_MANIFEST_BYTES}",
                "fetch it from a member again",
            )
        try:
            return msgspec.json.decode(data, type=cls)
        except (msgspec.MsgspecError, ValueError, RecursionError) as e:
            raise ConfigError(f"{source} is malformed: {e}", "fetch it from a member again") from e

    @classmethod
    def load(cls, path: Path) -> SignedManifest:
        """Read a manifest's file."""
        try:
            return cls.from_bytes(path.read_bytes(), f"manifest {path}")
        except OSError as e:
            raise ConfigError(
                f"manifest {path} can't be read: {e.strerror}", "run `xpeer init` first"
            ) from e


def _unreadable(body: str, error: Exception) -> ConfigError:
    """The error for a signed manifest that has a removed value, or is of another version."""
    for section, field, gone, what, instead in REMOVED:
        try:
            value = msgspec.json.decode(body)[section][field]
        except (msgspec.MsgspecError, ValueError, LookupError, TypeError, RecursionError):
            continue
        if value in gone:
            return ConfigError(
                f"manifest: {section}.{field} = {value}: {what}",
                "run this swarm with xpeer 0.1.0 as of 2026-11-29 or earlier, or found another one "
                f"with {section}.{field} = {instead}",
            )
    return ConfigError(f"manifest: {error}", "all members need the same xpeer version")


@seen_by("anybody", all_public=True)
class Genesis(Struct, frozen=True, forbid_unknown_fields=True):
    """The two things a swarm's fingerprint commits to."""

    admin: bytes
    manifest_hash: bytes

    @property
    def swarm_id(self) -> str:
        """64 hex digits: the swarm's fingerprint."""
        return blake2b(Domain.SWARM_ID, self.admin, self.manifest_hash).hex()
