"""libsodium's AEADs on buffers of the caller's.

PyNaCl's own bindings of them take and give `bytes`, and allocate each: 0.5 GB/s here, where the
library itself does 3.4 (AES-256-GCM) or 1.4 (ChaCha20-Poly1305). So this calls the library that
PyNaCl has loaded, which lets go of the interpreter's lock meanwhile.
"""

from __future__ import annotations

from typing import Any, Final, Literal

from nacl._sodium import ffi, lib  # type: ignore[import-not-found] # compiled, untyped

Buffer = bytes | bytearray | memoryview
Cipher = Literal["aes-256-gcm", "chacha20-poly1305"]

KEY_BYTES: Final = 32
NONCE_BYTES: Final = 12
TAG_BYTES: Final = 16

_FUNCTIONS: Final[dict[Cipher, tuple[Any, Any]]] = {
    "aes-256-gcm": (lib.crypto_aead_aes256gcm_encrypt, lib.crypto_aead_aes256gcm_decrypt),
    "chacha20-poly1305": (
        lib.crypto_aead_chacha20poly1305_ietf_encrypt,
        lib.crypto_aead_chacha20poly1305_ietf_decrypt,
    ),
}


_lent = ffi.from_buffer
"""A buffer for C, to be used by `with`: it has to be given back before an error goes on. CPython
3.11 crashes if its garbage collector finds a memoryview together with such a buffer, as in the
frames of an error that refer to one another."""


class ForgedError(Exception):
    """What was to be opened was not sealed with this key, nonce and associated data."""


class Aead:
    """One key.

    Args:
        cipher: see `supported`.
        key: 32 bytes.
    """

    def __init__(self, cipher: Cipher, key: bytes) -> None:
        if len(key) != KEY_BYTES:
            raise ValueError(f"a key has {KEY_BYTES} bytes, not {len(key)}")
        self._encrypt, self._decrypt = _FUNCTIONS[cipher]
        self._key = key

    def seal_into(self, nonce: bytes, plaintext: Buffer, data: bytes, out: memoryview) -> None:
        """Encrypt into a buffer of exactly the plaintext's size and TAG_BYTES.

        Args:
            nonce: 12 bytes, never twice with this key.
            plaintext: does not overlap with `out`.
            data: authenticated, not encrypted.
            out: writable.
        """
        size = len(plaintext)
        if len(nonce) != NONCE_BYTES or len(out) != size + TAG_BYTES:
            raise ValueError("nonce or buffer of the wrong size")
        with _lent(plaintext) as source, _lent(out, require_writable=True) as target:
            self._encrypt(
                *(target, ffi.NULL, source, size, data, len(data), ffi.NULL, nonce, self._key)
            )

    def open_into(self, nonce: bytes, sealed: Buffer, data: bytes, out: Buffer) -> None:
        """Decrypt into a buffer of exactly the plaintext's size.

        Raises:
            ForgedError: it does not open; what is in `out` is nobody's plaintext.
        """
        size = len(sealed) - TAG_BYTES
        if size < 0:
            raise ForgedError
        if len(nonce) != NONCE_BYTES or len(out) != size:
            raise ValueError("nonce or buffer of the wrong size")
        with _lent(sealed) as source, _lent(out, require_writable=True) as target:
            failed = self._decrypt(
                *(target, ffi.NULL, ffi.NULL, source, len(sealed), data, len(data)),
                *(nonce, self._key),
            )
        if failed:
            raise ForgedError


def supported() -> tuple[Cipher, ...]:
    """What this machine has, the best first: AES-256-GCM only where the processor does it."""
    if lib.crypto_aead_aes256gcm_is_available():
        return "aes-256-gcm", "chacha20-poly1305"
    return ("chacha20-poly1305",)
