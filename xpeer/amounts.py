"""Bytes and seconds in words, for people."""

from __future__ import annotations


def size(num_bytes: float) -> str:
    """Bytes in decimal units, e.g. "1.25 GB"."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6)):
        if num_bytes >= factor:
            return f"{num_bytes / factor:.2f} {unit}"
    return f"{num_bytes / 1e3:.1f} kB"


def duration(seconds: float) -> str:
    """Seconds, minutes or hours, e.g. "12.5 s" or "3 min"."""
    if seconds < 120:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
