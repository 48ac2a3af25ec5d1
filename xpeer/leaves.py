"""Markers for values that leave this node: how each field is treated, and who reads a structure.

    @seen_by("partners", why="...")
    class Accept(Message, frozen=True):
        exchange_id: Public[Id]
        digest: Derived[Digest]

The markers change nothing at run time: they are notes, not a filter. Tests read them.
`tests/unit/test_leaves.py` fails for a field without a marker. `test_non_interference.py` trains on
different shards with equal released gradients, and fails if a public or derived field differs.
`python -m tests.leaving` writes the table of docs/privacy.md.

Treatments, from harmless to private, while privacy is on:

    public    follows from the manifest, from public data, from randomness of its own, or is the
              operator's own word (an address, a declared speed)
    derived   computed from released parameters and public data alone: post-processing
    noised    computed from records, clipped, noised and charged before it leaves
    timing    reveals how many steps were taken by when, and nothing else of the text. Not
              protected: a larger random batch makes a longer step, and everybody has a clock
    withheld  exists, and is not sent or made while privacy is on
    local     may depend on records. For this node's operator: the Unix socket, files of the home,
              the log. Whoever passes them on passes on private data
    parts     holds other marked structures, or their bytes

What this module does not give: the network does not hide sizes, numbers and times of messages.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import Annotated, Final, Literal, TypeVar

T = TypeVar("T")
K = TypeVar("K")


class Treatment(StrEnum):
    """Why it is harmless that a value leaves this node, if it is."""

    PUBLIC = "public"
    DERIVED = "derived"
    NOISED = "noised"
    TIMING = "timing"
    WITHHELD = "withheld"
    LOCAL = "local"
    PARTS = "parts"


Public = Annotated[T, Treatment.PUBLIC]
Derived = Annotated[T, Treatment.DERIVED]
Noised = Annotated[T, Treatment.NOISED]
Timing = Annotated[T, Treatment.TIMING]
Withheld = Annotated[T, Treatment.WITHHELD]
Local = Annotated[T, Treatment.LOCAL]
Parts = Annotated[T, Treatment.PARTS]

Audience = Literal["anybody", "members", "partners", "export", "node", "home"]
"""node: the daemon from its trainer, or the operator from the daemon. home: files of the home.
export: whoever is given an export or a trained model's card."""

ATTRIBUTE: Final = "__leaves__"
"""Name of the class attribute that holds the `Destination`. A subclass declares its own."""


@dataclass(frozen=True, slots=True)
class Destination:
    """Where a structure goes.

    Args:
        audience: who reads it; None = it stays in this node.
        why: an explanation for readers of the table.
        all_public: True iff all its fields are public, also those that are added later.
    """

    audience: Audience | None
    why: str = ""
    all_public: bool = False


def seen_by(
    audience: Audience, why: str = "", *, all_public: bool = False
) -> Callable[[type[K]], type[K]]:
    """Declare who reads a structure. Each of its fields needs a marker, unless all are public."""
    return _declare(Destination(audience, why, all_public))


def stays(why: str) -> Callable[[type[K]], type[K]]:
    """Declare that a structure never leaves this node. Its fields need no markers."""
    return _declare(Destination(None, why))


def _declare(destination: Destination) -> Callable[[type[K]], type[K]]:
    def mark(kind: type[K]) -> type[K]:
        setattr(kind, ATTRIBUTE, destination)
        return kind

    return mark
