"""What a member needs besides its text. An invitation lists all of it.

Needs no torch. Whether a model's weights are the right ones shows when they are loaded.
"""

from __future__ import annotations

import importlib.util
import shlex
import sys
from typing import Annotated, Any, Final, Literal

from msgspec import UNSET, Meta, Struct, UnsetType

from xpeer import belonging
from xpeer.config import Data, Home
from xpeer.errors import ConfigError
from xpeer.folders import Content, folder_named
from xpeer.identity import blake2b
from xpeer.leaves import Public, seen_by
from xpeer.manifest import Manifest
from xpeer.manifest.model import QUANTISED
from xpeer.paths import folder_of
from xpeer.source import check_folder, has_tokenizer
from xpeer.tokenizer_files import differing, writing_of

_Digest = Annotated[str, Meta(max_length=64)]
_Special = Annotated[dict[str, Annotated[str, Meta(max_length=200)]], Meta(max_length=16)]
_CHATS: Final = "messages"
"""`data.text_field` of nodes that write chats."""


def installing(extra: str) -> str:
    """How to install an extra into the environment that this xpeer runs in.

    The source names the versions. A registry's package of this name may be anybody's.
    """
    python = shlex.quote(sys.executable)
    return (
        f"install xpeer[{extra}], in the folder of its source: "
        f"{python} -m pip install -c constraints.txt '.[{extra}]'"
    )


@seen_by("anybody", "the manifest's")
class Needs(Struct, frozen=True, forbid_unknown_fields=True):
    """Files that every training member of a swarm needs."""

    tokenizer: Public[_Digest] = ""
    """BLAKE2b-256 (hex) of the tokenizer's tokenizer.json; empty = bytes."""
    base_model: Public[_Digest] = ""
    """BLAKE2b-256 (hex) of the weights whose adapters are trained; empty = no adapters."""
    source: Public[Annotated[str, Meta(max_length=200)]] = ""
    """Name of the model in the founder's folder."""
    quantised: Public[Literal[True] | UnsetType] = UNSET
    """True iff every member quantises that model; otherwise an invitation does not have the field,
    so that older versions can read it."""
    special: Public[_Special | UnsetType] = UNSET
    """The tokenizer's special tokens by name; an invitation lacks it where the manifest does."""
    chat_digest: Public[_Digest | UnsetType] = UNSET
    """BLAKE2b-256 (hex) of its chat template; an invitation lacks it where the manifest does."""

    @classmethod
    def of(cls, manifest: Manifest) -> Needs | None:
        """The needs of a manifest's members; None = they need nothing."""
        lora, digest = manifest.model.lora, manifest.tokenizer.digest
        if lora is None and not digest:
            return None
        model = manifest.model
        base = lora.base_digest if lora is not None else ""
        quantised: Any = True if model.base_dtype in QUANTISED else UNSET
        special = manifest.tokenizer.special
        return cls(
            digest,
            base,
            model.source,
            quantised,
            UNSET if special is None else special,
            manifest.tokenizer.chat_digest or UNSET,
        )

    def options(self) -> list[str]:
        """Options of `xpeer init --join` and `xpeer start` for the files, with placeholders."""
        options = ["--base-model /path/to/model"] if self.base_model else []
        return options + (["--tokenizer /path/to/tokenizer"] if self.tokenizer else [])

    def in_words(self) -> list[str]:
        """The needs in words, one item each."""
        named = f" ({self.source})" if self.source else ""
        items = []
        if self.base_model:
            items.append(
                f"--base-model (data.base_model): a copy of the founder's model{named}, whose "
                f"weights have BLAKE2b-256 {self.base_model[:16]}"
            )
            items += [
                f"{package}: it comes with xpeer[{extra}] (docs/operating.md, Install)"
                for package, extra in self._packages
            ]
        if self.tokenizer:
            which = "that model" if self.base_model else f"the founder's model{named}"
            items.append(
                f"--tokenizer (data.tokenizer): the folder of {which}'s tokenizer, whose "
                f"tokenizer.json has BLAKE2b-256 {self.tokenizer[:16]}"
            )
        return items

    @property
    def _packages(self) -> list[tuple[str, str]]:
        """Packages, and the extra that installs each."""
        packages = [("peft", "lora")] if self.base_model else []
        return packages + ([("bitsandbytes", "quantised")] if self.quantised is True else [])

    def unmet(self, data: Data, home: Home) -> list[str]:
        """The needs that are missing or wrong on this node, one item each; empty = all are met."""
        words = self.in_words()
        model, tokenizer = words[0] if words else "", words[-1:] if self.tokenizer else []
        items = []
        if self.base_model and not data.base_model and not home.initial_model.exists():
            items.append(model)
        if self.base_model and data.base_model:
            try:
                setting = "data.base_model"
                check_folder(folder_of(setting, data.base_model), setting)
            except ConfigError as e:
                items.append(str(e))
        for package, extra in self._packages:
            if importlib.util.find_spec(package) is None:
                items.append(f"{package}: {installing(extra)}")
        said = any(item.startswith("data.base_model") for item in items)
        about = self._unmet_tokenizer(data, *tokenizer)
        return items + [each for each in about if not (said and each.startswith("data.base_model"))]

    def _unmet_tokenizer(self, data: Data, said: str = "") -> list[str]:
        if not self.tokenizer:
            return []
        setting = "data.tokenizer" if data.tokenizer else "data.base_model"
        named = data.tokenizer or data.base_model
        try:
            content: Content = "tokenizer" if data.tokenizer else "model"
            folder = folder_named(setting, named, content) if named else None
            lacks = folder is None or not (data.tokenizer or has_tokenizer(folder, setting))
        except ConfigError as e:
            return [str(e)]
        if folder is None or lacks:
            return [said]
        file = folder / "tokenizer.json"
        try:
            seen = blake2b(belonging.read_inside(file, file.parent)).hex()
        except ConfigError as e:
            return [f"{setting}: {e.problem}"]
        except OSError as e:
            return [f"{setting}: {file} can't be read: {e.strerror}"]
        if seen != self.tokenizer:
            should = f"and it should be that of {said}"
            return [f"{setting}: {file} has BLAKE2b-256 {seen[:16]}, {should}"]
        try:
            writing = writing_of(file.parent)
        except ConfigError as e:
            return [f"{setting}: {e.problem}"]
        items = differing(
            writing,
            self.special if isinstance(self.special, dict) else None,
            self.chat_digest if isinstance(self.chat_digest, str) else "",
            chats=data.text_field == _CHATS,
        )
        if not items:
            return []
        return [
            f"{setting}: {file.parent} has another {' and another '.join(items)}, so its "
            "tokens would not be the swarm's; copy tokenizer_config.json, special_tokens_map.json "
            "and chat_template.jinja from the founder's folder, those that are there"
        ]


def require(needs: Needs | None, data: Data, home: Home) -> None:
    """Refuse a node that lacks something.

    Raises:
        ConfigError: names everything that is missing or wrong.
    """
    unmet = needs.unmet(data, home) if needs is not None else []
    if unmet:
        raise ConfigError(
            f"this node lacks {len(unmet)} of what the swarm's members need: "
            + "; ".join(f"({n}) {item}" for n, item in enumerate(unmet, start=1)),
            f"set them in {home.config}, or give the options to `xpeer init --join` or "
            "`xpeer start`",
        )
