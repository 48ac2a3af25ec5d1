"""What tests need, and nobody but the product may make."""

from __future__ import annotations

from xpeer.update import PrivacyStamp, received_stamp


def privacy_stamp(mode: str = "record", steps_charged: int = 1) -> PrivacyStamp:
    """A mechanism's stamp, as it arrives from the trainer."""
    return received_stamp(mode, steps_charged)
