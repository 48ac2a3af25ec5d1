"""A memory of the engine that clipped last time, so that a start need not try them all again.

It is one small file in the home's cache, and says nothing of the text. Only the time of a start
depends on it: the remembered engine is compared with plain autograd at every start, as any
candidate is. A file that can't be read, or is for another model, device, version or batch, is
replaced.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
from pathlib import Path
from typing import Any, Final

import msgspec
import torch
from msgspec import Struct
from torch import nn

from xpeer.files import put
from xpeer.leaves import Local, seen_by
from xpeer.privacy.steps import Records

NAME: Final = "engine.json"
_PACKAGES: Final = ("xpeer", "torch", "transformers", "peft")


@seen_by("home", "as PrivacySpent's engine")
class _Choice(Struct, frozen=True, forbid_unknown_fields=True):
    setting: Local[str]
    """Hash of what the engine was chosen for: `setting_of`."""
    engine: Local[str]
    reason: Local[str]
    refused: Local[str] = ""


class EngineMemory:
    """The file with the choice.

    Args:
        folder: `Home.cache`.
        setting: what the choice is for: `setting_of`.
    """

    def __init__(self, folder: Path, setting: str) -> None:
        self._path = folder / NAME
        self._setting = setting

    def recall(self) -> tuple[str, str, str] | None:
        """The engine's name, why it was chosen, and which better ones were refused.

        Returns:
            None = nothing is stored for this setting.
        """
        try:
            choice = msgspec.json.decode(self._path.read_bytes(), type=_Choice)
        except (OSError, msgspec.MsgspecError, UnicodeDecodeError):
            return None
        if choice.setting != self._setting:
            return None
        return choice.engine, choice.reason, choice.refused

    def keep(self, engine: str, reason: str, refused: str) -> None:
        """Store a choice. Errors of the disk are ignored: the next start can do without."""
        content = msgspec.json.encode(_Choice(self._setting, engine, reason, refused))
        with contextlib.suppress(OSError):
            put(self._path, [content])


def setting_of(model: nn.Module, records: Records, *details: object) -> str:
    """Hash everything that the choice of an engine may depend on.

    Args:
        model: on its device. Its config counts, and which parameters are trained.
        records: (n, T); only T counts.
        details: what else counts: privacy mode and unit, sizes of batches.
    """
    device = next(model.parameters()).device
    config: Any = getattr(model, "config", None)
    parts = [
        type(model).__qualname__,
        str(config.to_dict() if hasattr(config, "to_dict") else config),
        str([(name, tuple(p.shape), p.requires_grad) for name, p in model.named_parameters()]),
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"{device.type} {torch.get_num_threads()}",
        str([(name, _version(name)) for name in _PACKAGES]),
        str(records.shape[1]),
        *map(str, details),
    ]
    return hashlib.blake2b("\0".join(parts).encode(), digest_size=16).hexdigest()


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""
