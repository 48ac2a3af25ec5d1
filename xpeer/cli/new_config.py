"""The config.toml of a new home, as `xpeer init` writes it."""

from __future__ import annotations

from typing import Any, Final

import msgspec

from xpeer.cli.common import load_config
from xpeer.config import Home
from xpeer.errors import ConfigError
from xpeer.readiness import check_settings

_EXPLAINED: Final = {
    "network.listen": "where members reach this node (TCP)",
    "network.announce": "what to tell others instead, behind NAT or port forwarding",
    "network.bootstrap": "entry points: .../p2p/PEERID",
    "network.name": "what the other members see this node called",
    "data.shard": "text this node trains on; it never leaves the node",
    "data.corpus": "this node's copy of the corpus that all members share",
    "data.text_field": "field of its rows that holds the text; messages: chats",
    "data.tokenizer": "folder of the swarm's tokenizer",
    "data.base_model": "folder of the model whose adapters the swarm trains",
}


def check_new(home: Home, settings: dict[str, Any]) -> None:
    """Refuse settings that can't be written, and those that `xpeer start` would refuse.

    Args:
        home: to be made; a config.toml that exists there is never replaced.
        settings: {"section.key": value}; empty values are not given.

    Raises:
        ConfigError: names the setting, its value and a remedy.
    """
    given = {key: value for key, value in settings.items() if value}
    try:
        msgspec.json.encode(given)
    except UnicodeEncodeError as e:
        raise ConfigError(
            f"{e.object!r} is not UTF-8, so config.toml can't hold it", "rename that file"
        ) from e
    check_settings(home, load_config(home, given))
    if given and home.config.exists():
        raise ConfigError(
            f"{home.config} exists already, so {', '.join(sorted(given))} would be ignored",
            "leave the options out and edit that file",
        )


def as_toml(settings: dict[str, Any]) -> str:
    """config.toml with the given settings, and the other usual settings as comments.

    Args:
        settings: {"section.key": value}; an empty value becomes a comment.
    """
    lines = ["# Settings of this node. `xpeer start` refuses keys that it does not know."]
    section = ""
    for dotted, value in settings.items():
        here, _, key = dotted.partition(".")
        if here != section:
            lines += ["", f"[{here}]"]
            section = here
        lines.append(f"# {_EXPLAINED[dotted]}")
        # A JSON string or list of strings is one in TOML, too.
        lines.append(f"{'' if value else '# '}{key} = {msgspec.json.encode(value).decode()}")
    return "\n".join(lines) + "\n"
