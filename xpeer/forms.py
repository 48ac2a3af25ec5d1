"""Codecs by name, and what a payload holds. Knows no tensors; how values are coded is wire's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal, final

from xpeer.errors import LocalError
from xpeer.leaves import Public, seen_by

BLOCK: Final = 128
"""Number of values with a common quantisation step or check."""
Codec = Literal["float32", "bfloat16", "int8", "int4", "int2"]
"""What a manifest may ask for."""
FLOATS: Final = ("float32", "bfloat16")
"""Of these, the ones whose values are of a torch type of the same name."""
SIZES: Final = {
    "float32": (32, 0),
    "bfloat16": (16, 0),
    "int8": (8, 2),
    "int4": (4, 2),
    "int2": (2, 2),
    "masked16": (16, 4),
    "masked32": (32, 0),
}
"""Of every codec, those of masked groups too: bits of a value, and bytes of each block besides."""


@seen_by("partners", "sent as fields of Propose")
@final
@dataclass(frozen=True, slots=True)
class Form:
    """Codec and number of values of a payload.

    Both sides know it from the manifest and the fragment, so that nobody reads or allocates by a
    length that a peer claims.
    """

    codec: Public[str]
    num_values: Public[int]

    @property
    def num_bytes(self) -> int:
        """Exact size of the payload.

        Raises:
            LocalError: unknown codec.
        """
        if self.codec not in SIZES:
            raise LocalError(f"codec {self.codec!r} is unknown", f"valid: {', '.join(SIZES)}")
        bits, block_bytes = SIZES[self.codec]
        return -(-self.num_values * bits // 8) + block_bytes * num_blocks(self.num_values)


def num_blocks(num_values: int) -> int:
    """Number of blocks; the last one may be short."""
    return -(-num_values // BLOCK)


def diverged() -> LocalError:
    """The error for values that no payload can hold: our own training diverged."""
    return LocalError(
        "the parameters are not finite or too large to be sent: training diverged",
        "restart from an older checkpoint with a smaller learning rate",
    )
