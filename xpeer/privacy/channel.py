"""A row of the table of everything that leaves (`channels`, which says what the words mean)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal, get_args

Treatment = Literal["public", "derived", "noised", "timing", "withheld", "local", "parts"]
Audience = Literal["anybody", "members", "partners", "node", "home", "export"]
"""Who may read it. node: the daemon from its trainer, or the operator from the daemon."""

TREATMENTS: Final[tuple[Treatment, ...]] = get_args(Treatment)
SEEN_BY_OTHERS: Final[tuple[Audience, ...]] = ("anybody", "members", "partners", "export")


@dataclass(frozen=True, slots=True)
class Channel:
    """A structure that leaves.

    Args:
        audience: who reads it.
        fields: every one of its fields, with its treatment.
        why: what a reader would ask.
    """

    audience: Audience
    fields: dict[str, Treatment]
    why: str = ""


def of(
    audience: Audience,
    *,
    public: str = "",
    derived: str = "",
    noised: str = "",
    timing: str = "",
    withheld: str = "",
    local: str = "",
    parts: str = "",
    why: str = "",
) -> Channel:
    """Names separated by spaces, by treatment."""
    given = (public, derived, noised, timing, withheld, local, parts)
    pairs = [(n, t) for names, t in zip(given, TREATMENTS, strict=True) for n in names.split()]
    if len(dict(pairs)) != len(pairs):
        raise ValueError(f"listed twice: {pairs}")
    return Channel(audience, dict(pairs), why)
