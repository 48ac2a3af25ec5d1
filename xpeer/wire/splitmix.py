"""SplitMix64, in integers alone."""

from __future__ import annotations


def splitmix64(x: int) -> int:
    """Mix the low 64 bits of x (Steele et al. 2014, figure 17)."""
    mask = (1 << 64) - 1
    z = (x + 0x9E3779B97F4A7C15) & mask
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    return z ^ (z >> 31)
