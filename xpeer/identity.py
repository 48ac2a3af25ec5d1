"""One Ed25519 key per peer: libp2p identity, signatures, and sealing.

The key is made with PyNaCl and stored as libp2p's `PrivateKey` protobuf, so the sidecar reads the
same file. A PeerID of this kind *contains* the public key (multihash "identity"), so whoever knows
a PeerID can verify that peer's signatures and seal to it. Format: libp2p specs, peer-ids.md.

What this module does not give: forward secrecy (see `wire.session`), revocation, membership.
"""

from __future__ import annotations

import hashlib
import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import NewType

import base58
from nacl.exceptions import BadSignatureError, CryptoError
from nacl.public import PrivateKey, PublicKey, SealedBox
from nacl.signing import SigningKey, VerifyKey

from xpeer.errors import ConfigError, NotAuthorisedError

PeerId = NewType("PeerId", str)
"""A libp2p PeerID of an Ed25519 key in base58: 12D3Koo…"""

SIGNATURE_BYTES = 64
# protobuf: field 1 (key type) = 1 (Ed25519), field 2 (data) of 64 bytes: seed || public key
_PRIVATE_PREFIX = bytes([0x08, 0x01, 0x12, 0x40])
# multihash "identity", 36 bytes: protobuf of the public key, field 1 = 1, field 2 of 32 bytes
_PEER_ID_PREFIX = bytes([0x00, 0x24, 0x08, 0x01, 0x12, 0x20])


class Domain:
    """Domain-separation prefixes: a signature made for one purpose is void for every other."""

    MANIFEST = b"xpeer/manifest/v1\0"
    CERTIFICATE = b"xpeer/certificate/v1\0"
    BEARER = b"xpeer/bearer/v1\0"
    TOKEN = b"xpeer/token/v1\0"
    DHT_RECORD = b"xpeer/dht-record/v1\0"
    CARD = b"xpeer/card/v1\0"
    HELLO = b"xpeer/hello/v1\0"
    TREE = b"xpeer/state-tree/v1\0"
    SWARM_ID = b"xpeer/swarm-id/v1\0"
    SWARM_KEY = b"xpeer/swarm-key/v1\0"
    MASKS = b"xpeer/masks/v1\0"


def peer_id_of(verify_key: bytes) -> PeerId:
    """PeerID of a 32-byte Ed25519 public key."""
    return PeerId(base58.b58encode(_PEER_ID_PREFIX + verify_key).decode())


def public_key_of(peer_id: str) -> VerifyKey:
    """The Ed25519 public key inside a PeerID.

    Raises:
        ValueError: the PeerID is not of an inlined Ed25519 key.
    """
    try:
        raw = base58.b58decode(peer_id)
    except ValueError as e:
        raise ValueError(f"PeerID {peer_id!r} is not base58") from e
    if len(raw) != len(_PEER_ID_PREFIX) + 32 or not raw.startswith(_PEER_ID_PREFIX):
        raise ValueError(f"PeerID {peer_id!r} does not hold an Ed25519 key (12D3Koo...)")
    return VerifyKey(raw[len(_PEER_ID_PREFIX) :])


def verify(peer_id: str, domain: bytes, message: bytes, signature: bytes) -> bool:
    """Whether `signature` is this peer's over `message` for this purpose."""
    try:
        return verify_with(bytes(public_key_of(peer_id)), domain, message, signature)
    except ValueError:
        return False


def verify_with(verify_key: bytes, domain: bytes, message: bytes, signature: bytes) -> bool:
    """Whether the holder of this 32-byte Ed25519 key made `signature`."""
    if len(signature) != SIGNATURE_BYTES or len(verify_key) != 32:
        return False
    try:
        VerifyKey(verify_key).verify(domain + message, signature)
    except (BadSignatureError, CryptoError, ValueError):
        return False
    return True


def seal_to(peer_id: str, plaintext: bytes) -> bytes:
    """Encrypt to a PeerID (libsodium sealed box on its X25519 key). The sender stays anonymous."""
    key: PublicKey = public_key_of(peer_id).to_curve25519_public_key()
    return bytes(SealedBox(key).encrypt(plaintext))


@dataclass(frozen=True, slots=True)
class Identity:
    """A peer's secret key. `repr` never shows it."""

    signing_key: SigningKey

    def __repr__(self) -> str:
        """Only the public half."""
        return f"Identity({self.peer_id})"

    @classmethod
    def generate(cls) -> Identity:
        """Make a new key from the operating system's randomness."""
        return cls(SigningKey.generate())

    @property
    def peer_id(self) -> PeerId:
        """The libp2p PeerID, which is the public key."""
        return peer_id_of(bytes(self.signing_key.verify_key))

    @property
    def verify_key(self) -> bytes:
        """The 32-byte public key."""
        return bytes(self.signing_key.verify_key)

    def sign(self, domain: bytes, message: bytes) -> bytes:
        """A 64-byte signature, good only for this domain."""
        return bytes(self.signing_key.sign(domain + message).signature)

    def open(self, sealed: bytes) -> bytes:
        """Decrypt what `seal_to` made for this peer.

        Raises:
            NotAuthorisedError: it was not sealed to this peer, or was altered.
        """
        key: PrivateKey = self.signing_key.to_curve25519_private_key()
        try:
            return bytes(SealedBox(key).decrypt(sealed))
        except (CryptoError, ValueError, TypeError) as e:
            raise NotAuthorisedError("a sealed message is not for this peer or was altered") from e

    def to_libp2p(self) -> bytes:
        """The 68-byte libp2p `PrivateKey` protobuf that the sidecar reads."""
        return _PRIVATE_PREFIX + bytes(self.signing_key) + self.verify_key

    @classmethod
    def from_libp2p(cls, data: bytes) -> Identity:
        """Read the 68-byte protobuf.

        Raises:
            ValueError: the key type or the length is wrong, or the halves do not match.
        """
        if len(data) != len(_PRIVATE_PREFIX) + 64 or not data.startswith(_PRIVATE_PREFIX):
            raise ValueError(f"not a libp2p Ed25519 private key ({len(data)} bytes, expected 68)")
        seed, public = data[4:36], data[36:]
        key = SigningKey(seed)
        if bytes(key.verify_key) != public:
            raise ValueError("its public half does not match its private half")
        return cls(key)

    def save(self, path: Path) -> None:
        """Write a new key file, mode 0400.

        Raises:
            FileExistsError: there is a file already; keys are never overwritten.
        """
        write_secret(path, self.to_libp2p())

    @classmethod
    def load(cls, path: Path) -> Identity:
        """Read a key file that only its owner may read.

        Raises:
            ConfigError: it is missing, unreadable, readable by others, or malformed.
        """
        data = read_secret(path, "identity key", "make one with `xpeer init` or `xpeer id`")
        try:
            return cls.from_libp2p(data)
        except ValueError as e:
            raise ConfigError(
                f"identity key {path}: {e}", "restore the file from a backup, or remove it"
            ) from e


def write_secret(path: Path, data: bytes) -> None:
    """Write a new file, mode 0400, never readable by others at any moment, fsynced."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o400)
    with os.fdopen(fd, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def read_secret(path: Path, what: str, how_to_make: str) -> bytes:
    """Read a small secret file.

    Raises:
        ConfigError: it is missing or unreadable, or group or others have any right on it.
    """
    try:
        with path.open("rb") as file:
            mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
            data = file.read(4096)
    except FileNotFoundError as e:
        raise ConfigError(f"{what} {path} does not exist", how_to_make) from e
    except OSError as e:
        raise ConfigError(
            f"{what} {path} can't be read: {e.strerror}", "check its owner and mode (0400)"
        ) from e
    if mode & 0o077:
        raise ConfigError(
            f"{what} {path} has mode {mode:04o}: others can use it", f"run: chmod 0400 {path}"
        )
    return data


def blake2b(*parts: bytes | memoryview, size: int = 32) -> bytes:
    """BLAKE2b over length-prefixed parts, so that no two lists of parts collide."""
    digest = hashlib.blake2b(digest_size=size)
    for part in parts:
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return digest.digest()
