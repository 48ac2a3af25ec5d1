"""The swarm key of now, held by reference by all who seal with it.

Knows neither where the key is kept (`founding`) nor who is given it (`joining`). No message
announces another key yet; whoever replaces it here reaches everybody who seals or opens.
"""

from __future__ import annotations

from nacl.secret import SecretBox

from xpeer.identity import blake2b


class KeyRing:
    """Gives the current swarm key, and keys that follow from it.

    Ask whenever something is sealed or opened, and keep nothing of the answer: a key that was
    replaced is used from the next message on.

    Args:
        key: 32 bytes that only members hold.

    Attributes:
        current: 32 bytes: the key of now.
        key_epoch: keys that it had before this one.
    """

    def __init__(self, key: bytes) -> None:
        self.current = key
        self.key_epoch = 0

    def replace(self, key: bytes) -> None:
        """Seal and open with another key (32 bytes) from now on."""
        self.current, self.key_epoch = key, self.key_epoch + 1

    def derived(self, purpose: bytes, *more: bytes) -> bytes:
        """32 bytes that follow from the key and the purpose, and say nothing of the key.

        Args:
            purpose: of one use alone, with its version.
            more: which of several keys for it.
        """
        return blake2b(purpose, self.current, *more)

    def box(self, purpose: bytes) -> SecretBox:
        """A box that members alone can fill and open, for one purpose; not to be kept."""
        return SecretBox(self.derived(purpose))
