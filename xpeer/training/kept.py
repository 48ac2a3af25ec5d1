"""What an export keeps of the model that training started from: its settings and its files.

The config.json of the source is in the manifest as it was, so that every member exports the same;
so is its generation_config.json. Other files come from the folders that this node has: the copy in
the founder's home, the base model of adapters, the tokenizer's folder.
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
_DTYPES: Final = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Source:
    """What an export takes over.

    Attributes:
        config: of the manifest; empty = the model's own.
        generation: of the manifest; empty = what transformers makes of the config.
        folders: with further files; of those that several have, the first's count.
        dtype: name to write the weights in; empty = the source's.
    """

    config: Mapping[str, Any] = field(default_factory=dict)
    generation: Mapping[str, Any] = field(default_factory=dict)
    folders: Sequence[Path] = ()
    dtype: str = ""

    @property
    def torch_dtype(self) -> torch.dtype:
        """What the weights are written in; float32 where the source has none of the usual ones."""
        said = self.dtype or self.config.get("dtype") or self.config.get("torch_dtype")
        return _DTYPES.get(str(said).removeprefix("torch."), torch.float32)

    def config_json(self, model: Any, *, untied: bool = False) -> dict[str, Any]:
        """config.json of an export: the source's, but for what training changed.

        Args:
            model: of transformers, as it is written.
            untied: an output that was tied to the embedding now has weights of its own.
        """
        made: dict[str, Any] = model.config.to_dict()
        kept = dict(self.config) or model.config.to_diff_dict()
        if "architectures" not in kept and kept.get("use_cache") is False:
            del kept["use_cache"]  # not the source's: older versions switched it off for training
        kept |= {"model_type": made["model_type"], "architectures": [type(model).__name__]}
        for key in _OF_THIS_MACHINE:
            kept.pop(key, None)
        if self.dtype or "torch_dtype" not in kept:
            kept.pop("torch_dtype", None)
            kept["dtype"] = str(self.torch_dtype).removeprefix("torch.")
        if untied:
            kept["tie_word_embeddings"] = False
        kept["transformers_version"] = made.get("transformers_version")
        return dict(sorted(kept.items()))

    def write_generation(self, folder: Path) -> None:
        """Replace what transformers made up, if the source had one."""
        if self.generation:
            write_json(folder / GENERATION, dict(self.generation))

    def copy_files(self, to: Path, *, carded: bool) -> None:
        """Copy terms of use and cards; the cards as source.NAME if the target has one of its own.

        Raises:
            ConfigError: one can't be read.
        """
        for folder in self.folders:
            copy(folder, to, _TERMS)
            copy(folder, to, _CARDS, prefix="source." if carded else "")


def config_for_manifest(config: Mapping[str, Any], model: Any) -> dict[str, Any]:
    """A source's config as the manifest holds it: all of it, but for paths of this machine.

    Args:
        config: the content of config.json.
        model: of transformers, made of it.
    """
    kept = _without_paths(config)
    kept["architectures"] = [type(model).__name__]
    if not {"dtype", "torch_dtype"} & kept.keys():
        kept["dtype"] = "float32"
    return kept


def read_generation(folder: Path) -> dict[str, Any]:
    """generation_config.json of a model's folder, as far as transformers knows its settings.

    Args:
        folder: without that file there are none.

    Raises:
        ConfigError: it is no JSON object, or a link to another folder.
    """
    file = folder / GENERATION
    try:
        found = json.loads(belonging.read_inside(file, folder))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as e:
        raise ConfigError(f"{file} can't be read: {e}", "restore it, or remove it") from e
    if not isinstance(found, dict):
        raise ConfigError(f"{file} is not a JSON object", "restore it, or remove it")
    from transformers import GenerationConfig  # noqa: PLC0415 - takes seconds

    known = GenerationConfig().to_dict().keys()
    return _without_paths({key: value for key, value in found.items() if key in known})


def copy(folder: Path, to: Path, names: Iterable[str], prefix: str = "") -> None:
    """Copy the files that there are, but for those that the target has.

    Raises:
        ConfigError: one can't be read, or is a link to another folder.
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
    """As transformers writes it."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _without_paths(config: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: _without_paths(value) if isinstance(value, dict) else value
        for key, value in config.items()
        if key not in _OF_THIS_MACHINE
    }
