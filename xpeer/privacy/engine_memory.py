"""Which engine clipped last time, so that a start need not try them all again.

One small file in the home's cache. It says nothing of the text, and nothing depends on it but time:
the engine it names is held against plain autograd at every start, as any candidate is, and a file
that can't be read, or is of another model, device, version or batch, is made again.
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

from xpeer.files import private_umask
from xpeer.leaves import Local, seen_by

NAME: Final = "engine.json"
_PACKAGES: Final = ("xpeer", "torch", "transformers", "peft")


@seen_by("home", "as PrivacySpent's engine")
class _Choice(Struct, frozen=True, forbid_unknown_fields=True):
    setting: Local[str]
    """What it was chosen for: `setting_of`."""
    engine: Local[str]
    reason: Local[str]


class EngineMemory:
    """The file.

    Args:
        folder: `Home.cache`.
        setting: what the choice is for.
    """

    def __init__(self, folder: Path, setting: str) -> None:
        self._path = folder / NAME
        self._setting = setting

    def recall(self) -> tuple[str, str] | None:
        """The engine's name, and why it was chosen; None: nothing that is of use is known."""
        try:
            found = msgspec.json.decode(self._path.read_bytes(), type=_Choice)
        except (OSError, msgspec.MsgspecError, UnicodeDecodeError):
            return None
        return (found.engine, found.reason) if found.setting == self._setting else None

    def keep(self, engine: str, reason: str) -> None:
        """Remember a choice, if the disk allows: the next start can do without."""
        beside = self._path.with_name(NAME + ".new")
        content = msgspec.json.encode(_Choice(self._setting, engine, reason))
        with private_umask(), contextlib.suppress(OSError):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            beside.write_bytes(content)
            beside.replace(self._path)


def setting_of(model: nn.Module, records: torch.Tensor, *details: object) -> str:
    """A hash of all that the engines' order may depend on.

    Args:
        model: on its device: its config, and which parameters are trained.
        records: (n, T); only T counts.
        details: of the node and the manifest: privacy mode and unit, sizes of batches.
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
