"""Writes examples as the model's chat template does, and marks what is predicted.

What the assistant says is what the template adds to the conversation before it. So any template
will do whose text only grows with the conversation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from xpeer.errors import ConfigError
from xpeer.identity import blake2b
from xpeer.training.formats.examples import ASSISTANT, Example


@dataclass(frozen=True, slots=True)
class Marked:
    """A text of which parts are predicted.

    Attributes:
        text: the text.
        spans: beginning and end of each part that is predicted, in characters, ascending.
        is_chat: whether the text has special tokens that count as such, and needs no others.
    """

    text: str
    spans: tuple[tuple[int, int], ...]
    is_chat: bool


class ChatTemplate:
    """A chat template.

    Args:
        template: in Jinja; empty = the tokenizer has none.
        special: special tokens by name, and others that no message may contain.
        forbidden: texts that would be read as special tokens.
    """

    def __init__(self, template: str, special: dict[str, str], forbidden: Sequence[str]) -> None:
        self._template = template
        self._special = special
        self._forbidden = tuple(text for text in forbidden if text)

    @property
    def digest(self) -> str:
        """Names the template: another one writes other texts."""
        words = (self._template, *(f"{k}={v}" for k, v in sorted(self._special.items())))
        return blake2b(*(word.encode() for word in words), size=16).hex()

    def mark(self, example: Example) -> Marked | None:
        """Write an example; None = the template can't write it, or it would forge a special token.

        Raises:
            ConfigError: it is a chat, and there is no template.
        """
        if not example.is_chat:
            prompt, completion = (content for _, content in example.turns)
            text = prompt + completion
            return Marked(text, ((len(prompt), len(text)),), is_chat=False)
        if not self._template:
            raise ConfigError(
                "data.text_field = messages: the tokenizer has no chat template",
                "add chat_template.jinja to its folder, or name fields: prompt+completion",
            )
        contents = [content for _, content in example.turns]
        if any(token in content for token in self._forbidden for content in contents):
            return None
        return self._written(example)

    def _written(self, example: Example) -> Marked | None:
        messages = [{"role": role, "content": content} for role, content in example.turns]
        whole = self._render(messages, prompting=False)
        spans = []
        for number, (role, _) in enumerate(example.turns):
            if role != ASSISTANT:
                continue
            before = self._render(messages[:number], prompting=True)
            after = self._render(messages[: number + 1], prompting=False)
            if before is None or after is None or whole is None:
                return None
            if not after.startswith(before) or not whole.startswith(after):
                return None
            spans.append((len(before), len(after)))
        return Marked(whole, tuple(spans), is_chat=True) if whole is not None else None

    def _render(self, messages: list[dict[str, str]], *, prompting: bool) -> str | None:
        from jinja2.exceptions import TemplateError  # noqa: PLC0415 - only chats need it
        from transformers.utils.chat_template_utils import (  # noqa: PLC0415 - slow
            render_jinja_template,
        )

        try:
            rendered: Any = render_jinja_template(
                [messages],
                chat_template=self._template,
                add_generation_prompt=prompting,
                **self._special,
            )
        except (TemplateError, TypeError, ValueError):  # e.g. roles have to alternate
            return None
        return str(rendered[0][0])
