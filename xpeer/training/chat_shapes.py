"""What a chat template writes around the contents of a chat, by the roles of its messages.

To find the answers in a chat, its beginnings are written again and again. Chats with the same
roles are mostly written alike, so that is done once for each row of roles, with words in place of
contents. A shape is used only where it gives the very text that the template writes. Knows nothing
of templates.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

SHAPES_MAX: Final = 4096
"""Most rows of roles that are remembered."""

Span = tuple[int, int]
Key = tuple[tuple[str, ...], tuple[int, ...]]
"""Roles, and the numbers of the messages that are predicted."""


@dataclass(frozen=True, slots=True)
class Marked:
    """A text of which parts are predicted.

    Attributes:
        text: the text.
        spans: beginning and end of each part that is predicted, in characters, ascending.
        is_chat: whether the text has special tokens that count as such, and needs no others.
    """

    text: str
    spans: tuple[Span, ...]
    is_chat: bool


@dataclass(frozen=True, slots=True)
class Shape:
    """A chat without its contents.

    Attributes:
        literals: what stands before, between and behind the contents.
        bounds: of the spans, each as the number of a literal and an offset in it.
    """

    literals: tuple[str, ...]
    bounds: tuple[Span, ...]

    @classmethod
    def of(cls, marked: Marked, contents: Sequence[str]) -> Shape | None:
        """Take the contents out of a chat; None = they are not there once each, in their order."""
        literals, begins, done = [], [0], 0
        for content in contents:
            at = marked.text.find(content, done)
            if at < 0 or marked.text.count(content) != 1:
                return None
            literals.append(marked.text[done:at])
            done = at + len(content)
            begins.append(done)
        literals.append(marked.text[done:])
        bounds = []
        for position in itertools.chain.from_iterable(marked.spans):
            number = bisect.bisect_right(begins, position) - 1
            offset = position - begins[number]
            if offset > len(literals[number]):
                return None
            bounds.append((number, offset))
        return cls(tuple(literals), tuple(bounds))

    def filled(self, contents: Sequence[str]) -> Marked:
        """The chat with other contents."""
        parts, begins, size = [], [], 0
        for literal, content in itertools.zip_longest(self.literals, contents, fillvalue=""):
            begins.append(size)
            parts += [literal, content]
            size += len(literal) + len(content)
        positions = [begins[number] + offset for number, offset in self.bounds]
        spans = tuple(zip(positions[::2], positions[1::2], strict=True))
        return Marked("".join(parts), spans, is_chat=True)


class Shapes:
    """The shapes of a template's chats. A row of roles that comes once costs nothing."""

    def __init__(self) -> None:
        self._known: dict[Key, Shape | None] = {}
        self._met: set[Key] = set()

    def filled(self, key: Key, contents: Sequence[str], text: str) -> Marked | None:
        """The chat, if its shape is known and gives the text that the template has written."""
        shape = self._known.get(key)
        marked = shape.filled(contents) if shape is not None else None
        return marked if marked is not None and marked.text == text else None

    def wants(self, key: Key) -> bool:
        """Whether to learn the shape of these roles: they come for the second time."""
        if key in self._known or len(self._known) >= SHAPES_MAX:
            return False
        if key in self._met:
            return True
        if len(self._met) < SHAPES_MAX:
            self._met.add(key)
        return False

    def learn(self, key: Key, shape: Shape | None) -> None:
        """Keep a shape; None = chats of these roles have none."""
        self._known[key] = shape
