"""Rows that are examples to imitate: chats, or prompts with their completions.

    data.text_field = "messages"             a list of messages, each with role and content
    data.text_field = "prompt+completion"    two fields: the first is read, the second predicted

Knows nothing of tokenizers and chat templates.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from xpeer.identity import blake2b
from xpeer.training.formats.rows import Rows, holds_text

CHAT_FIELD: Final = "messages"
BOTH: Final = "+"
ASSISTANT: Final = "assistant"


@dataclass(frozen=True, slots=True)
class Example:
    """One example. It becomes one record, whatever its length.

    Attributes:
        turns: role and content of each message; a prompt and its completion have no roles.
        read: numbers of the assistant's messages that are not to be predicted. They are no part of
            the id: whoever reads less of a text learns the same text.
    """

    turns: tuple[tuple[str, str], ...]
    read: frozenset[int] = frozenset()

    @property
    def texts(self) -> tuple[str, ...]:
        """Roles and contents of all turns."""
        return tuple(text for turn in self.turns for text in turn)

    @property
    def answers(self) -> list[int]:
        """Numbers of the assistant's messages that are to be predicted."""
        return [
            number
            for number, (role, content) in enumerate(self.turns)
            if role == ASSISTANT and number not in self.read and holds_text(content)
        ]

    @property
    def is_chat(self) -> bool:
        """Whether a chat template says how it is written."""
        return bool(self.turns[0][0])

    @property
    def id(self) -> str:
        """BLAKE2b-128 of roles and contents, hex."""
        content = json.dumps(self.turns, ensure_ascii=True).encode()
        return blake2b(b"example", content, size=16).hex()

    def __repr__(self) -> str:
        """Describe the example without its text."""
        return f"Example({len(self.turns)} turns)"


def fields_of(text_field: str) -> tuple[str, ...]:
    """The fields that `data.text_field` names."""
    if not asks_for_examples(text_field):
        return (text_field,)
    return tuple(name.strip() for name in text_field.split(BOTH))


def asks_for_examples(text_field: str) -> bool:
    """Whether `data.text_field` names examples, and not texts."""
    return text_field == CHAT_FIELD or BOTH in text_field


def taken(values: Sequence[object], rows: Rows) -> str | Example | None:
    """Count a row of a table, whatever its format; returns its text or its example.

    Args:
        values: of the fields that `fields_of` names, in that order.
        rows: of the file.

    Returns:
        None = the row is skipped.
    """
    if not asks_for_examples(rows.field):
        (value,) = values
        return rows.take(value)
    example = example_of(values)
    return example if rows.take_example(usable=example is not None) else None


def example_of(values: Sequence[object]) -> Example | None:
    """Make an example of the values of a row's fields; None = they are none.

    There has to be something to predict: a completion, or a message of the assistant. Of two lists
    of messages the first is read, whoever speaks in it. Calls of tools would be lost, as they are
    no text, so a chat with calls is none.
    """
    if len(values) == 2 and all(isinstance(value, str) for value in values):
        prompt, completion = (str(value) for value in values)
        return Example((("", prompt), ("", completion))) if holds_text(completion) else None
    turns: list[tuple[str, str]] = []
    read: set[int] = set()
    for place, value in enumerate(values, start=1):
        if not isinstance(value, list):
            return None
        for message in value:
            turn = _turn(message)
            if turn is None:
                return None
            if turn[0] == ASSISTANT and (place < len(values) or message.get("weight") == 0):
                read.add(len(turns))
            turns.append(turn)
    example = Example(tuple(turns), frozenset(read))
    return example if example.answers else None


def _turn(message: object) -> tuple[str, str] | None:
    if not isinstance(message, Mapping):
        return None
    role, content = message.get("role"), message.get("content")
    if not isinstance(role, str) or not role or not isinstance(content, str):
        return None
    if message.get("tool_calls") or message.get("function_call"):
        return None
    return role, content
