"""Keeps settings and files of the model that training started from (the source), for exports.

The manifest holds the source's config.json and generation_config.json as they were, so that every
member exports the same. Other files come from folders that this node has: the copy in the founder's
home, the base model of adapters, the tokenizer's folder.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import torch

from xpeer import belonging
from xpeer.errors import ConfigError
from xpeer.training.export_config import completed

CONFIG: Final = "config.json"
GENERATION: Final = "generation_config.json"
TOKENIZER_FILES: Final = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "vocab.txt", "merges.txt", "tokenizer.model", "spiece.model"),
    *("sentencepiece.bpe.model", "tekken.json"),
    *("chat_template.jinja", "chat_template.json", "additional_chat_templates/*.jinja"),
)
_TERMS: Final = ("LICENSE*", "LICENCE*", "COPYING*", "NOTICE*", "USE_POLICY*")
_CARDS: Final = ("README.md", "privacy.json", "source.*README.md", "source.*privacy.json")
_OF_THIS_MACHINE: Final = ("_name_or_path", "transformers_version")
_OF_ALL_PARTS: Final = ("dtype", "torch_dtype", "bos_token_id", "eos_token_id", "pad_token_id")
"""Keys of a config of several parts that a language model alone needs, too."""
_DTYPES: Final = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Source:
    """What an export keeps of the source.

    Attributes:
        config: config.json, from the manifest; empty = the model's own.
        generation: generation_config.json, from the manifest; empty = transformers' default.
        folders: folders with further files; if several have a file, the first one counts.
        dtype: name of the type to write the weights in; empty = the source's.
    """

    config: Mapping[str, Any] = field(default_factory=dict)
    generation: Mapping[str, Any] = field(default_factory=dict)
    folders: Sequence[Path] = ()
    dtype: str = ""

    @property
    def torch_dtype(self) -> torch.dtype:
        """The type to write the weights in; float32 if the source names none of the usual ones."""
        name = self.dtype or _dtype_in(self.config)
        return _DTYPES.get(str(name).removeprefix("torch."), torch.float32)

    def config_json(self, model: Any, *, untied: bool = False) -> dict[str, Any]:
        """Make the config.json of an export: the source's, except for what training changed, and
        what other engines need besides (`export_config`).

        Args:
            model: of transformers, as it is exported.
            untied: whether an output that was tied to the embedding now has its own weights.
        """
        made: dict[str, Any] = model.config.to_dict()
        kept = dict(self.config) or model.config.to_diff_dict()
        if "architectures" not in kept and kept.get("use_cache") is False:
            del kept[
                "use_cache"
            ]  # not from the source: older versions of xpeer switched it off for training
        kept |= {"model_type": made["model_type"], "architectures": [type(model).__name__]}
        for key in _OF_THIS_MACHINE:
            kept.pop(key, None)
        kept = completed(kept, made, str(self.torch_dtype).removeprefix("torch."))
        if untied:
            kept["tie_word_embeddings"] = False
            if isinstance(text := kept.get("text_config"), dict):
                text["tie_word_embeddings"] = False
        kept["transformers_version"] = made.get("transformers_version")
        return dict(sorted(kept.items()))

    def write_generation(self, folder: Path) -> None:
        """Write the source's generation_config.json, if it had one, over that of transformers."""
        if self.generation:
            write_json(folder / GENERATION, dict(self.generation))

    def copy_files(self, to: Path, *, carded: bool) -> None:
        """Copy terms of use and cards.

        Args:
            to: the export's folder.
            carded: whether the export has cards of its own; then cards are copied as source.NAME.

        Raises:
            ConfigError: a file can't be read.
        """
        for folder in self.folders:
            copy(folder, to, _TERMS)
            copy(folder, to, _CARDS, prefix="source." if carded else "")


def config_for_manifest(config: Mapping[str, Any], model: Any) -> dict[str, Any]:
    """Prepare a source's config for the manifest: all of it, except paths of this machine.

    Args:
        config: the content of config.json.
        model: of transformers, built from that config.
    """
    kept = _without_paths(_of_text(config, model))
    kept["architectures"] = [type(model).__name__]
    if _dtype_in(kept) is None:
        kept["dtype"] = "float32"
    return kept


def _of_text(config: Mapping[str, Any], model: Any) -> Mapping[str, Any]:
    """The language model's settings, if transformers makes nothing else of this config."""
    text, kind = config.get("text_config"), model.config.model_type
    if kind == config.get("model_type") or not isinstance(text, Mapping):
        return config
    outside = {key: config[key] for key in _OF_ALL_PARTS if key in config}
    return outside | dict(text) | {"model_type": kind}


def _dtype_in(config: Mapping[str, Any]) -> Any:
    """The type of the weights; None = the config does not say."""
    text = config.get("text_config")
    for section in (config, text if isinstance(text, Mapping) else {}):
        if found := section.get("dtype") or section.get("torch_dtype"):
            return found
    return None


def read_generation(folder: Path) -> dict[str, Any]:
    """Read generation_config.json: those settings that transformers knows.

    Args:
        folder: of a model; without that file there are no settings.

    Raises:
        ConfigError: the file is no JSON object, or a link to another folder.
    """
    file = folder / GENERATION
    try:
        content = json.loads(belonging.read_inside(file, folder))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as e:
        raise ConfigError(f"{file} can't be read: {e}", "restore it, or remove it") from e
    if not isinstance(content, dict):
        raise ConfigError(f"{file} is not a JSON object", "restore it, or remove it")
    from transformers import GenerationConfig  # noqa: PLC0415 - takes seconds

    known = GenerationConfig().to_dict().keys()
    return _without_paths({key: value for key, value in content.items() if key in known})


def copy(folder: Path, to: Path, names: Iterable[str], prefix: str = "") -> None:
    """Copy the files that match `names` and that the target does not have.

    Raises:
        ConfigError: a file can't be read, or is a link to another folder.
    """
    for pattern in names:
        for file in sorted(folder.glob(pattern)):
            target = to / file.relative_to(folder).with_name(prefix + file.name)
            if not file.is_file() or target.exists():
                continue
            try:
                content = belonging.read_inside(file, folder)
            except OSError as e:
                raise ConfigError(f"{file} can't be read: {e.strerror}", "check its mode") from e
            target.parent.mkdir(exist_ok=True)
            target.write_bytes(content)


def write_json(path: Path, content: Any) -> None:
    """Write JSON in the layout of transformers."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _without_paths(config: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: _without_paths(value) if isinstance(value, dict) else value
        for key, value in config.items()
        if key not in _OF_THIS_MACHINE
    }
