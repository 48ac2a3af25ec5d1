"""Folders of models, tokenizers and adapters that are not there: what to do instead.

Whoever knows a model by its name on the Hugging Face Hub tries that name first. xpeer downloads
nothing, so the error holds the line that does.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final, Literal

from xpeer.errors import ConfigError
from xpeer.paths import folder_of

_HUB_ID: Final = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_CONFIG: Final = "config.json"

Content = Literal["model", "tokenizer", "adapters", "config", ""]
"""What a path holds: a folder of one of these, a model's config.json, or any other file."""
REMEDIES: Final[dict[Content, str]] = {
    "model": "name a folder that save_pretrained wrote, with config.json and model.safetensors",
    "tokenizer": "name the folder that holds its tokenizer.json",
    "adapters": "name a folder of adapters that peft wrote, with adapter_config.json and "
    "adapter_model.safetensors",
    "config": "name a model's config.json",
    "": "correct the path",
}


def folder_named(setting: str, text: str, content: Content) -> Path:
    """The folder that a setting names, which has to be there.

    Raises:
        ConfigError: as `paths.folder_of`, or it is not there.
    """
    path = folder_of(setting, text)
    if not path.exists():
        raise missing(path, setting, content)
    return path


def missing(path: Path, option: str, content: Content) -> ConfigError:
    """The error for a path that is not there. It guesses whether a hub's name was meant.

    Args:
        path: as given.
        option: the option's or setting's name.
        content: what was expected there.
    """
    what = "file" if content in ("config", "") else "folder"
    hub = _hub_name(path, content)
    if not hub:
        return ConfigError(f"{option} {path}: there is no such {what}", REMEDIES[content])
    local = hub.rpartition("/")[2]
    file, given = (f" {_CONFIG}", f"{local}/{_CONFIG}") if content == "config" else ("", local)
    return ConfigError(
        f"{option} {path}: there is no such {what} here, and xpeer downloads no models",
        f"if it is meant as a model of the Hugging Face Hub, download it first: "
        f"`hf download {hub}{file} --local-dir {local}`, then give that {what}: "
        + (f"{option} {given}" if option.startswith("-") else f"{option} = {given}"),
    )


def _hub_name(path: Path, content: Content) -> str:
    """The name on the hub that a path may be meant as; empty = it is none."""
    if content == "config" and path.name == _CONFIG:
        path = path.parent
    text = str(path)
    hub = re.sub(r"^(https?:/+)?(www\.)?(huggingface\.co|hf\.co)/", "", text)
    if hub == text and text.startswith("hf:/"):
        hub = text.removeprefix("hf:").lstrip("/")
    is_file = content == "" or (content == "config" and path.suffix == ".json")
    is_below = "/" in text and path.parent.is_dir()
    return "" if is_file or is_below or _HUB_ID.fullmatch(hub) is None else hub
