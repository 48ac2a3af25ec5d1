"""Which tokens of a chat are predicted, by the templates of models that people have.

An answer with the token that ends its turn, and nothing else.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import pytest

from tests.unit.training.test_tokens import byte_level
from xpeer.training.chat import ChatTemplate
from xpeer.training.formats.examples import Example
from xpeer.training.tokenizer import HuggingFaceTokenizer

TEMPLATES: Final = Path(__file__).parents[2] / "vectors" / "templates"
NO_THOUGHTS: Final = "<think>\n\n</think>\n\n"

Turns = tuple[tuple[str, str], ...]
SYSTEM, ASK, AGAIN = ("system", "Be short."), ("user", "Two and two?"), ("user", "And two?")
FOUR, SIX = ("assistant", "Four."), ("assistant", "Six, é.")
CHATS: Final[dict[str, Turns]] = {
    "several turns": (ASK, FOUR, AGAIN, SIX),
    "a system's message": (SYSTEM, ASK, FOUR, AGAIN, SIX),
    "a tool": (ASK, ("assistant", "Let me see."), ("tool", "4"), FOUR),
    "thoughts": (
        ASK,
        ("assistant", "<think>\nhm\n</think>\n\nFour."),
        AGAIN,
        ("assistant", "<think>\nso\n</think>\n\nSix, é."),
    ),
    "an empty answer": (ASK, ("assistant", " \n"), AGAIN, SIX),
    "a user's last word": (ASK, FOUR, AGAIN),
    "one answer": (ASK, FOUR),
    "the same words": (("user", "Four."), FOUR, ("user", "Four."), FOUR),
    "space around": (ASK, ("assistant", " Four. \n"), AGAIN, SIX),
}


@dataclass(frozen=True)
class Family:
    """A model's template, and its special tokens."""

    template: str
    special: tuple[str, ...]
    bos: str = ""
    eos: str = ""


FAMILIES: Final = {
    "qwen3": Family("qwen3", ("<|im_start|>", "<|im_end|>"), eos="<|im_end|>"),
    "llama3": Family(
        "llama3",
        ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        "<|begin_of_text|>",
        "<|eot_id|>",
    ),
    "gemma2": Family("gemma2", ("<bos>", "<start_of_turn>", "<end_of_turn>"), "<bos>"),
    "gemma3": Family("gemma3", ("<bos>", "<start_of_turn>", "<end_of_turn>"), "<bos>"),
    "smollm2": Family("smollm2", ("<|im_start|>", "<|im_end|>"), eos="<|im_end|>"),
    "mistral": Family("mistral", ("<s>", "</s>", "[INST]", "[/INST]"), "<s>", "</s>"),
    "smolvlm": Family("smolvlm", ("<end_of_utterance>", "<image>")),
}
IM, EOT, GEMMA, EOS = "<|im_end|>", "<|eot_id|>", "<end_of_turn>", "</s>"
HM, SO = "<think>\nhm\n</think>\n\nFour.", "<think>\nso\n</think>\n\nSix, é."

Wanted = dict[str, list[str] | None]
WITHOUT_TOOLS: Final[Wanted] = {"a tool": None}
WITHOUT_SYSTEM: Final[Wanted] = {"a system's message": None}


def plain(end: str, before: str = "") -> Wanted:
    """What is predicted where a template writes every answer as it is."""

    def said(*answers: str) -> list[str]:
        return [f"{before}{answer}{end}" for answer in answers]

    return {
        "several turns": said("Four.", "Six, é."),
        "a system's message": said("Four.", "Six, é."),
        "a tool": said("Let me see.", "Four."),
        "thoughts": said(HM, SO),
        "an empty answer": said("Six, é."),
        "a user's last word": said("Four."),
        "one answer": said("Four."),
        "the same words": said("Four.", "Four."),
        "space around": said("Four.", "Six, é."),
    }


PREDICTED: Final[dict[str, Wanted]] = {
    "qwen3": {
        # only what follows the last question has thoughts: earlier ones are taken back
        "several turns": ["Four.<|im_end|>", f"{NO_THOUGHTS}Six, é.<|im_end|>"],
        "a system's message": ["Four.<|im_end|>", f"{NO_THOUGHTS}Six, é.<|im_end|>"],
        "a tool": ["Let me see.<|im_end|>", f"{NO_THOUGHTS}Four.<|im_end|>"],
        "thoughts": [f"{SO}<|im_end|>"],
        "an empty answer": [f"{NO_THOUGHTS}Six, é.<|im_end|>"],
        "a user's last word": ["Four.<|im_end|>"],
        "one answer": [f"{NO_THOUGHTS}Four.<|im_end|>"],
        "the same words": ["Four.<|im_end|>", f"{NO_THOUGHTS}Four.<|im_end|>"],
        "space around": [" Four. \n<|im_end|>", f"{NO_THOUGHTS}Six, é.<|im_end|>"],
    },
    "llama3": plain(EOT),
    "gemma2": plain(GEMMA) | WITHOUT_TOOLS | WITHOUT_SYSTEM,
    "gemma3": plain(GEMMA) | WITHOUT_TOOLS,
    "smollm2": plain(IM) | {"space around": [f" Four. \n{IM}", f"Six, é.{IM}"]},
    "mistral": plain(EOS, " ") | WITHOUT_TOOLS,
    # it writes no content at all: an answer of nothing must not be learnt
    "smolvlm": dict.fromkeys(CHATS),
}


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def tokenizer(family: str, tmp_path_factory: pytest.TempPathFactory) -> HuggingFaceTokenizer:
    return tokenizer_of(FAMILIES[family], tmp_path_factory.mktemp(family))


def tokenizer_of(family: Family, folder: Path) -> HuggingFaceTokenizer:
    byte_level(folder)
    from tokenizers import Tokenizer, decoders

    fast = Tokenizer.from_file(str(folder / "tokenizer.json"))
    fast.add_special_tokens(list(family.special))
    fast.decoder = decoders.ByteLevel()
    fast.save(str(folder / "tokenizer.json"))
    template = (TEMPLATES / f"{family.template}.jinja").read_text(encoding="utf-8")
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    named = {"bos_token": family.bos, "eos_token": family.eos, "unk_token": "<unk>"}
    named = {name: token for name, token in named.items() if token}
    (folder / "tokenizer_config.json").write_text(json.dumps(named))
    return HuggingFaceTokenizer(folder)


@pytest.mark.parametrize("chat", CHATS)
def test_an_answer_and_its_end_are_predicted_and_nothing_else(
    family: str, tokenizer: HuggingFaceTokenizer, chat: str
) -> None:
    wanted = PREDICTED[family][chat]
    marked = tokenizer.chat.mark(Example(CHATS[chat]))
    if wanted is None:
        assert marked is None
        return
    assert marked is not None
    assert [marked.text[begin:end] for begin, end in marked.spans] == wanted
    (encoded,) = tokenizer.encode_marked([marked])
    ids, read = encoded >> 1, encoded & 1
    fast = tokenizer._with_special
    assert ids.tolist() == fast.encode(marked.text, add_special_tokens=False).ids
    predicted = [int(i) for i, is_read in zip(ids, read, strict=True) if not is_read]
    assert fast.decode(predicted, skip_special_tokens=False) == "".join(wanted)


def test_thoughts_between_calls_of_tools_are_kept() -> None:
    """They come behind the last question, where Qwen3 takes none back."""
    template = _template("qwen3")
    asks = ("assistant", "<think>\nhm\n</think>\n\nLet me see.")
    marked = template.mark(Example((ASK, asks, ("tool", "4"), ("tool", "5"), FOUR)))
    assert marked is not None
    assert [marked.text[begin:end] for begin, end in marked.spans] == [
        "<think>\nhm\n</think>\n\nLet me see.<|im_end|>",
        f"{NO_THOUGHTS}Four.<|im_end|>",
    ]


def test_an_end_of_text_behind_the_end_of_the_turn_is_read() -> None:
    """As Phi's templates have it: no model that is used writes it."""
    text = "{% for m in messages %}<{{ m.role }}>{{ m.content }}<end>\n{% endfor %}"
    text += "{% if add_generation_prompt %}<assistant>{% else %}<eos>{% endif %}"
    marked = ChatTemplate(text, {}, ["<end>", "<eos>"]).mark(Example((ASK, FOUR, AGAIN, SIX)))
    assert marked is not None
    said = [marked.text[begin:end] for begin, end in marked.spans]
    assert said == ["Four.<end>", "Six, é.<end>"]


@pytest.mark.parametrize(
    ("form", "written"),
    [("%d %B %Y", "26 July 2024"), ("%A, %-d. %b %y, %H:%M", "Friday, 26. Jul 24, 00:00")],
)
def test_a_template_that_asks_the_clock_has_the_same_day(form: str, written: str) -> None:
    """As SmolLM3's: the tokens that a node made yesterday would differ from today's."""
    text = f"{{% macro above() %}}{{{{ strftime_now('{form}') }}}}{{% endmacro %}}"
    text += f"{{{{ above() }}}}{{% for m in messages %}}|{{{{ strftime_now('{form}') }}}}"
    text += "{{ m.content }}{% endfor %}"
    marked = ChatTemplate(text, {}, []).mark(Example((ASK, FOUR)))
    assert marked is not None
    assert marked.text == f"{written}|{written}Two and two?|{written}Four."


def test_a_template_writes_the_same_on_every_day() -> None:
    """Else the tokens of a cache would depend on the day that they were made."""
    text = "{% if not date_string is defined %}{% set date_string = strftime_now('%d %b %Y') %}"
    text += "{% endif %}{{ date_string }}{% for m in messages %}|{{ m.content }}{% endfor %}"
    marked = ChatTemplate(text, {}, []).mark(Example((ASK, FOUR)))
    assert marked is not None
    assert marked.text == "26 Jul 2024|Two and two?|Four."


def test_the_key_of_the_cache_has_what_decides_tokens() -> None:
    first = ChatTemplate("a", {"bos_token": "<s>"}, ["<s>"])
    others = [
        ChatTemplate("b", {"bos_token": "<s>"}, ["<s>"]),
        ChatTemplate("a", {"bos_token": "<t>"}, ["<s>"]),
        ChatTemplate("a", {"bos_token": "<s>"}, ["<s>", "</s>"]),
    ]
    assert len({first.digest, *(other.digest for other in others)}) == 4


def _template(name: str) -> ChatTemplate:
    family = FAMILIES[name]
    text = (TEMPLATES / f"{family.template}.jinja").read_text(encoding="utf-8")
    return ChatTemplate(text, {}, family.special)
