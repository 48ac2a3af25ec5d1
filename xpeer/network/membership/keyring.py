"""The current swarm key. All code that seals or opens with it holds a reference to one key ring.

So a key that is replaced here is replaced for all of them. No message announces another key yet.
This module does not know where the key is stored (`founding`) or who gets it (`admission`).
"""

from __future__ import annotations

from nacl.secret import SecretBox

from xpeer.identity import blake2b


class KeyRing:
    """Gives the current swarm key, and keys that are derived from it.

    Ask it each time something is sealed or opened, and do not keep the answer. Then another key is
    in use from the next message on.

    Args:
        key: 32 bytes that only members hold.

    Attributes:
        current: the key that is in use, 32 bytes.
        key_epoch: number of keys that this ring had before the current one.
    """

    def __init__(self, key: bytes) -> None:
        self.current = key
        self.key_epoch = 0

    def replace(self, key: bytes) -> None:
        """Seal and open with another key (32 bytes) from now on."""
        self.current, self.key_epoch = key, self.key_epoch + 1

    def derived(self, purpose: bytes, *more: bytes) -> bytes:
        """A key of 32 bytes for one purpose. The swarm key can't be computed from it.

        Args:
            purpose: names one use and its version; no other use may have the same.
            more: tells several keys of one purpose apart.
        """
        return blake2b(purpose, self.current, *more)

    def box(self, purpose: bytes) -> SecretBox:
        """A box for one purpose, which only members can fill and open. Do not keep it."""
        return SecretBox(self.derived(purpose))
