"""Writes examples as the model's chat template does, and marks what is predicted.

An answer is what the template adds to its prompt. Some templates write an answer otherwise once the
chat has gone on: Qwen3's has thoughts in the last one alone. Such an answer is looked for in the
whole chat, and predicted if all of it is there.
"""

from __future__ import annotations

import datetime
import functools
import itertools
from collections.abc import Sequence
from typing import Any, Final

from xpeer.errors import ConfigError, ShardError
from xpeer.identity import blake2b
from xpeer.training.chat_shapes import Marked, Shape, Shapes, Span
from xpeer.training.formats.examples import Example

_RULE: Final = "marks/3"
"""Names the rule by which parts are marked: the cache keeps no tokens of another one."""
_DAY: Final = datetime.datetime(2024, 7, 26)
"""What Llama's templates call today: else the day of a start would be in the tokens."""
_CODES: Final = ("-d", "-m", "-H", "-I", "-M", "-S", *"aAbBcdeDFHIjmMpSTuUwWxXyYzZ")
_CLOCK: Final = (
    "{%- macro strftime_now(format) -%}{{- format"
    + "".join(f"|replace('%{code}', '{_DAY.strftime(f'%{code}')}')" for code in _CODES)
    + " -}}{%- endmacro -%}"
)
"""Stands above templates that ask the clock themselves. A function in its place can't be handed
over: transformers gives templates plain data alone."""
_STAND_INS: Final = tuple(map(chr, range(0xE000, 0xE010)))
"""Characters that stand for an answer while it is looked for."""

_REFUSALS: Final = (
    TypeError, ValueError, LookupError, ArithmeticError, AttributeError, RecursionError,
)  # fmt: skip
"""What a template, which is a program, may run into."""

_TAG_MIN: Final = 3
"""Shorter texts in a template are no tags that a message is searched for."""

Message = dict[str, str]


class ChatTemplate:
    """A chat template.

    Args:
        template: in Jinja; empty = the tokenizer has none.
        special: special tokens by name, and others that no message may contain.
        forbidden: texts that would be read as special tokens.
        differing: what of all this is not as the founder's; then it writes no chat.
    """

    def __init__(
        self,
        template: str,
        special: dict[str, str],
        forbidden: Sequence[str],
        differing: Sequence[str] = (),
    ) -> None:
        self._template = template
        self._differing = differing
        self._special = special
        self._forbidden = tuple(text for text in forbidden if text)
        self._shapes = Shapes()

    @property
    def digest(self) -> str:
        """Names the template, and how its texts are marked: with another one tokens differ."""
        special = (f"{k}={v}" for k, v in sorted(self._special.items()))
        words = (_RULE, self._template, *special, *sorted(self._forbidden))
        return blake2b(*(word.encode() for word in words), size=16).hex()

    def mark(self, example: Example) -> Marked | None:
        """Write an example.

        An answer without visible text is read: there is nothing to imitate.

        Returns:
            None = the template can't write it, it would forge a special token, or nothing of it
            would be predicted.

        Raises:
            ShardError: it is a chat, and there is no template, or not the swarm's.
        """
        if not example.is_chat:
            prompt, completion = (content for _, content in example.turns)
            text = prompt + completion
            return Marked(text, ((len(prompt), len(text)),), is_chat=False)
        if not self._template:
            raise ShardError(
                "the text holds chats (lists of messages), and the tokenizer has no chat template",
                "add chat_template.jinja to its folder, or name fields of text: prompt+completion",
            )
        if self._differing:
            raise ShardError(
                "the text holds chats (lists of messages), and the tokenizer has another "
                f"{' and another '.join(self._differing)}, so the tokens would not be the swarm's",
                "copy tokenizer_config.json, special_tokens_map.json and chat_template.jinja from "
                "the founder's folder, those that are there",
            )
        if any(token in text for token in self._forbidden for text in example.texts):
            return None
        return self._written(example)

    def asking(self, prompt: str) -> Marked:
        """Write a prompt as a user's message, up to where the assistant's answer begins.

        Raises:
            ConfigError: there is no template, it is not the swarm's, or it can't write this.
        """
        if not self._template or self._differing:
            what = f"another {' and another '.join(self._differing)}" if self._differing else ""
            raise ConfigError(
                f"--chat: the tokenizer has {what or 'no chat template'}",
                "copy the founder's tokenizer_config.json, special_tokens_map.json and "
                "chat_template.jinja into its folder, those that are there, or leave --chat out",
            )
        forged = next((token for token in self._forbidden if token in prompt), None)
        if forged is not None:
            raise ConfigError(
                f"--prompt holds the special token {forged}, which --chat writes itself",
                "take it out, or leave --chat out",
            )
        asked = self._render([{"role": "user", "content": prompt}], prompting=True)
        if asked is None:
            raise ConfigError(
                "--chat: the chat template refuses a chat that begins with a user's message",
                "leave --chat out, and write the prompt as the model was trained on it",
            )
        return Marked(asked, (), is_chat=True)

    def _written(self, example: Example) -> Marked | None:
        whole = self._render(_messages_of(example), prompting=False)
        if whole is None:
            return None
        roles, contents = zip(*example.turns, strict=True)
        key = roles, tuple(example.answers)
        if not all(map(self._is_plain, contents)):
            return self._searched(example, whole)
        filled = self._shapes.filled(key, contents, whole)
        if filled is not None:
            return filled
        marked = self._searched(example, whole)
        if marked is not None and self._shapes.wants(key):
            shape = self._shape_of(example)
            right = shape is not None and shape.filled(contents) == marked
            self._shapes.learn(key, shape if right else None)
        return marked

    def _is_plain(self, content: str) -> bool:
        """Whether no template has a reason to write this otherwise than other contents."""
        if not content or content != content.strip():
            return False
        return not any(tag in content for tag in self._tags)

    @functools.cached_property
    def _tags(self) -> tuple[str, ...]:
        """Texts that the template may search messages for, such as `</think>`: no mere words."""
        from jinja2 import Environment  # noqa: PLC0415 - only chats need it

        strings = (
            text[1:-1].encode("ascii", "backslashreplace").decode("unicode-escape").strip()
            for _, kind, text in Environment(autoescape=True).lex(self._template)
            if kind == "string"
        )
        return tuple({each for each in strings if len(each) >= _TAG_MIN and not each.isalnum()})

    def _shape_of(self, example: Example) -> Shape | None:
        """What is written around the contents of a chat, found with words in their place."""
        words = [f"zq{number}qz" for number in range(len(example.turns))]
        roles = (role for role, _ in example.turns)
        other = Example(tuple(zip(roles, words, strict=True)), example.read)
        whole = self._render(_messages_of(other), prompting=False)
        marked = self._searched(other, whole) if whole is not None else None
        return Shape.of(marked, words) if marked is not None else None

    def _searched(self, example: Example, whole: str) -> Marked | None:
        """Look for the answers in a chat as the template writes it."""
        messages = _messages_of(example)
        spans: list[Span] = []
        for number in example.answers:
            begin, end = self._place(messages, number, whole) or (0, 0)
            begin = max(begin, spans[-1][1] if spans else 0)
            end = begin + self._ending(whole[begin:end])
            if begin < end:
                spans.append((begin, end))
        return Marked(whole, tuple(spans), is_chat=True) if spans else None

    def _place(self, messages: list[Message], number: int, whole: str) -> Span | None:
        """Where an answer is in the whole chat; None = not all of it is there."""
        before = self._render(messages[:number], prompting=True)
        after = self._render(messages[: number + 1], prompting=False)
        said = _packed(messages[number]["content"])
        begins = before is not None and whole.startswith(before)
        if before is not None and begins:
            end = 0
            if number + 1 == len(messages):
                end = len(whole)
            elif after is not None and after.startswith(before) and whole.startswith(after):
                end = len(after)
            if said in _packed(whole[len(before) : end]):
                return len(before), end
        found = self._content(messages, number, whole)
        if found is None:
            return None
        if before is not None and begins:
            begin = len(before)
        else:
            begin = self._begin(messages, number, whole, found[0], before)
        if said not in _packed(whole[begin : found[1]]):
            return None  # taken back, at least in part
        end = found[1] + self._tail(messages[: number + 1], after, whole, found)
        return begin, end

    def _content(self, messages: list[Message], number: int, whole: str) -> Span | None:
        """Where the content of a message is in a text: what changes with it."""
        stand_in = next((each for each in _STAND_INS if each not in whole), None)
        if stand_in is None:
            return None
        other = [*messages[:number], {**messages[number], "content": stand_in}]
        changed = self._render([*other, *messages[number + 1 :]], prompting=False)
        if changed is None or changed.count(stand_in) != 1:
            return None
        begin = changed.index(stand_in)
        behind = changed[begin + 1 :]
        end = len(whole) - len(behind)
        if not whole.startswith(changed[:begin]):  # what comes before it changes, too: thoughts
            pairs = zip(whole, changed, strict=False)
            begin = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
        return (begin, end) if begin <= end and whole.endswith(behind) else None

    def _begin(
        self, messages: list[Message], number: int, whole: str, content: int, before: str | None
    ) -> int:
        """Where an answer begins whose content begins at `content`: behind its header."""
        above = self._content(messages, number - 1, whole) if number else (0, 0)
        base = self._render(messages[:number], prompting=False)
        if above is None or before is None or base is None or not before.startswith(base):
            return content
        header, earliest = before[len(base) :], above[1]
        if header:
            at = whole.rfind(header, earliest, content)
            return content if at < 0 else at + len(header)
        while content > earliest and whole[content - 1] == " ":
            content -= 1  # it is a part of the first token
        return content

    def _tail(self, messages: list[Message], after: str | None, whole: str, content: Span) -> int:
        """How much behind the content of the last of some messages ends it in the whole chat."""
        said, rest = whole[content[0] : content[1]], whole[content[1] :]
        for token in self._forbidden:  # mostly one of them ends it: that needs no search
            if (
                after is not None
                and rest.startswith(token)
                and after.rstrip().endswith(said + token)
            ):
                return len(token)
        found = None if after is None else self._content(messages, len(messages) - 1, after)
        tail = "" if after is None or found is None else after[found[1] :]
        tail = tail[: self._ending(tail)]
        return len(tail) if rest.startswith(tail) else 0

    def _ending(self, text: str) -> int:
        """How much of an answer is predicted: up to the first of the special tokens at its end."""
        size, rest = len(text), text.rstrip()
        while rest.endswith(self._forbidden):
            size = len(rest)
            rest = rest[: -max(len(t) for t in self._forbidden if rest.endswith(t))].rstrip()
        return size

    def _render(self, messages: list[Message], *, prompting: bool) -> str | None:
        from jinja2.exceptions import TemplateError  # noqa: PLC0415 - only chats need it
        from transformers.utils.chat_template_utils import (  # noqa: PLC0415 - slow
            render_jinja_template,
        )

        asks_the_clock = "strftime_now" in self._template
        try:
            rendered: Any = render_jinja_template(
                [messages],
                chat_template=_CLOCK + self._template if asks_the_clock else self._template,
                add_generation_prompt=prompting,
                date_string=_DAY.strftime("%d %b %Y"),
                **self._special,
            )
        except (TemplateError, *_REFUSALS):  # e.g. roles have to alternate
            return None
        return str(rendered[0][0])


def _messages_of(example: Example) -> list[Message]:
    return [{"role": role, "content": content} for role, content in example.turns]


def _packed(text: str) -> str:
    """The text without its white space: templates trim."""
    return "".join(text.split())
