"""Reads what stands beside a tokenizer.json: its special tokens, and its chat template.

They decide which tokens texts and chats become, as tokenizer.json does. Needs neither torch nor
tokenizers.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from xpeer import belonging
from xpeer.errors import ConfigError
from xpeer.identity import blake2b

ENDS: Final = ("bos_token", "eos_token")
"""Names of the tokens that are put around every text."""
_TEMPLATE: Final = "chat_template.jinja"


@dataclass(frozen=True, slots=True)
class Writing:
    """How a tokenizer writes texts and chats.

    Attributes:
        special: text of each special token, by its name.
        template: its chat template, in Jinja; empty = it has none.
    """

    special: dict[str, str]
    template: str

    @property
    def chat_digest(self) -> str:
        """BLAKE2b-256 (hex) of the template."""
        return blake2b(self.template.encode()).hex()

    @property
    def in_use(self) -> dict[str, str]:
        """The special tokens that decide tokens: ends of texts, and what the template names."""
        return {
            name: text
            for name, text in sorted(self.special.items())
            if name in ENDS or name in self.template
        }


def writing_of(folder: Path) -> Writing:
    """Read how the tokenizer in a folder writes.

    Raises:
        ConfigError: a file is damaged, or a link to elsewhere.
    """
    entries = special_entries(folder)
    special = {
        name: text
        for name, entry in entries.items()
        if name.endswith("_token") and (text := text_of(entry)) is not None
    }
    return Writing(special, _chat_template(folder, entries))


def differing(
    seen: Writing, special: Mapping[str, str] | None, chat_digest: str, *, chats: bool
) -> list[str]:
    """What of a node's tokenizer is not as the founder's, of what its text depends on.

    Args:
        seen: how it writes.
        special: the founder's special tokens, by name; None = they are not known.
        chat_digest: of the founder's chat template; empty = it is not known.
        chats: whether the node writes chats.
    """
    items = []
    if special is not None:
        for name in sorted({*ENDS, *(special if chats else ())}):
            here, there = seen.special.get(name), special.get(name)
            if here != there:
                items.append(f"{name} ({_said(here)}, the founder's: {_said(there)})")
    if chats and chat_digest and seen.chat_digest != chat_digest:
        none = chat_digest == Writing({}, "").chat_digest
        founders = "the founder's folder has none" if none else f"the founder's: {chat_digest[:16]}"
        items.append(f"chat template (BLAKE2b-256 {seen.chat_digest[:16]}; {founders})")
    return items


def _said(token: str | None) -> str:
    return "none" if token is None else repr(token)


def text_of(entry: Any) -> str | None:
    """The text of a special token, as one of transformers' files has it; None = it is none."""
    text = entry.get("content") if isinstance(entry, dict) else entry
    return text if isinstance(text, str) else None


def special_entries(folder: Path) -> dict[str, Any]:
    """Read the special tokens from the two files of transformers; the newer format wins."""
    entries: dict[str, Any] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        file = folder / name
        try:
            content = json.loads(belonging.read_inside(file, folder))
        except FileNotFoundError:
            continue
        except (OSError, ValueError, RecursionError) as e:
            raise ConfigError(f"data.tokenizer: {file} can't be read: {e}", "restore it") from e
        if isinstance(content, dict):
            entries.update({key: value for key, value in content.items() if value is not None})
    return entries


def _chat_template(folder: Path, entries: dict[str, Any]) -> str:
    """Read the chat template. A file of its own wins."""
    try:
        return belonging.read_inside(folder / _TEMPLATE, folder).decode()
    except FileNotFoundError:
        template = entries.get("chat_template", "")
    except (OSError, ValueError) as e:
        raise ConfigError(f"data.tokenizer: {folder}/{_TEMPLATE}: {e}", "restore it") from e
    if isinstance(template, list):  # several, by name
        named = {each.get("name"): each.get("template") for each in template}
        template = named.get("default", "")
    return template if isinstance(template, str) else ""
