"""Chats with the same roles are marked in one pass, and as they would be without that."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.training.test_chat_templates import CHATS, FAMILIES, TEMPLATES, Family
from xpeer.training.chat import ChatTemplate
from xpeer.training.chat_shapes import Marked, Shape
from xpeer.training.formats.examples import Example

CONTENTS = st.one_of(
    st.sampled_from(
        [
            "Four.", " Four. ", "<think>\nhm\n</think>\n\nSix", "</think>", "zq1qz", "a\n\nb",
            "<tool_response>4</tool_response>", "\nFour", "assistant", "\ue000", "x" * 50, "é", "",
        ]
    ),
    st.text(max_size=12),
)  # fmt: skip
ROLES = st.sampled_from(["user", "assistant", "system", "tool"])
PLAIN = [("user", "One and one?"), ("assistant", "Two, I think.")]


class Counting(ChatTemplate):
    """Counts how often it is asked to write something."""

    written = 0

    def _render(self, messages: list[dict[str, str]], *, prompting: bool) -> str | None:
        self.written += 1
        return super()._render(messages, prompting=prompting)


def template_of(family: Family, text: str = "") -> Counting:
    text = text or (TEMPLATES / f"{family.template}.jinja").read_text(encoding="utf-8")
    special = {"bos_token": family.bos, "eos_token": family.eos}
    return Counting(text, special, family.special)


def chat_of(turns: int, words: str) -> Example:
    return Example(
        tuple((PLAIN[n % 2][0], f"{words} {n}, {PLAIN[n % 2][1]}") for n in range(turns))
    )


def alone(family: Family, example: Example) -> Marked | None:
    """By a template that has learnt nothing."""
    return template_of(family).mark(example)


@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "smolvlm"])
def test_the_third_chat_of_its_roles_is_written_once(name: str) -> None:
    family = FAMILIES[name]
    template = template_of(family)
    for words in ("a", "b"):
        template.mark(chat_of(8, words))
    template.written = 0
    for words in ("c", "a longer one", "d < e"):
        chat = chat_of(8, words)
        assert template.mark(chat) == alone(family, chat)
    assert template.written == 3


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("chat", CHATS)
def test_a_chat_that_comes_again_is_marked_again_so(name: str, chat: str) -> None:
    template, example = template_of(FAMILIES[name]), Example(CHATS[chat])
    first = template.mark(example)
    assert [template.mark(example) for _ in range(3)] == [first] * 3


@pytest.mark.parametrize("name", FAMILIES)
@settings(deadline=None, max_examples=40)
@given(data=st.data())
def test_any_chat_is_marked_as_if_it_were_the_first(name: str, data: Any) -> None:
    roles = data.draw(st.lists(ROLES, min_size=1, max_size=5))
    template = template_of(FAMILIES[name])
    for number in range(2):
        template.mark(Example(tuple((role, f"Word {number}.") for role in roles)))
    for _ in range(2):
        example = Example(tuple((role, data.draw(CONTENTS)) for role in roles))
        assert template.mark(example) == alone(FAMILIES[name], example)


def test_answers_that_are_read_alone_have_a_shape_of_their_own() -> None:
    family = FAMILIES["llama3"]
    template = template_of(family)
    for read in (frozenset[int](), frozenset({1}), frozenset({3})):
        for words in "abcd":
            example = Example(chat_of(4, words).turns, read)
            assert template.mark(example) == alone(family, example)


def test_a_template_that_looks_at_lengths_has_no_shape() -> None:
    text = (
        "{% for m in messages %}{% if m.content|length > 20 %}<long>{% endif %}"
        "<{{ m.role }}>{{ m.content }}<end>{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    family = Family("", ("<end>",))
    template = template_of(family, text)
    for size in (1, 2, 50, 3, 60, 1):
        example = Example((("user", "x" * size), ("assistant", "y" * size)))
        assert template.mark(example) == template_of(family, text).mark(example)


def test_a_span_has_its_bounds_in_what_is_written_around_contents() -> None:
    marked = Marked("<u>one<e><a>two<e>", ((12, 18),), is_chat=True)
    shape = Shape.of(marked, ["one", "two"])
    assert shape is not None
    assert shape.filled(["one", "two"]) == marked
    assert shape.filled(["", "zwei!"]) == Marked("<u><e><a>zwei!<e>", ((9, 17),), is_chat=True)
    assert Shape.of(Marked("<a>two<e>", ((4, 9),), is_chat=True), ["two"]) is None
    assert Shape.of(Marked("<a>two two<e>", ((3, 9),), is_chat=True), ["two"]) is None
