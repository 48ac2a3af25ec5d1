"""Rehearsals of earlier starts, so that a restart makes none again.

They are in a small file in the home's cache, which says nothing of the text. What is of another
model, setting or version is not found in it. A file that can't be read is replaced.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
from collections.abc import Callable
from pathlib import Path
from typing import Final

import msgspec
from msgspec import Struct

from xpeer.estimate.step import Step, StepMemory, memory_of
from xpeer.files import put
from xpeer.leaves import Parts, seen_by

NAME: Final = "memory.json"
_MOST: Final = 16
"""Rehearsals that are kept: those that were made last."""
_PACKAGES: Final = ("xpeer", "torch", "transformers", "peft")


@seen_by("home")
class _Rehearsals(Struct, frozen=True, forbid_unknown_fields=True):
    by_step: Parts[dict[str, StepMemory]] = {}
    """By `_key`, in the order in which they were made."""


class Rehearsals:
    """Rehearses steps, and remembers what they need.

    Args:
        folder: `Home.cache`; None = remember nothing beyond this object.
        writes: whether new ones are written to it.
        on_operation: called at each operation of a rehearsal, as a sign of life.

    Attributes:
        made: number of rehearsals that were made, rather than remembered.
    """

    def __init__(
        self,
        folder: Path | None = None,
        *,
        writes: bool = True,
        on_operation: Callable[[], None] = lambda: None,
    ) -> None:
        self.made = 0
        self._path = None if folder is None else folder / NAME
        self._writes = writes
        self._on_operation = on_operation
        self._known = self._read()

    def of(self, step: Step) -> StepMemory:
        """What a step needs.

        Raises:
            ConfigError: see `step.memory_of`.
        """
        key = _key(step)
        if key not in self._known:
            self.made += 1
            self._known[key] = memory_of(step, self._on_operation)
            self._keep()
        return self._known[key]

    def _read(self) -> dict[str, StepMemory]:
        if self._path is None:
            return {}
        try:
            return msgspec.json.decode(self._path.read_bytes(), type=_Rehearsals).by_step
        except (OSError, msgspec.MsgspecError, UnicodeDecodeError):
            return {}

    def _keep(self) -> None:
        """Write them. Errors of the disk are ignored: the next start can do without."""
        if self._path is None or not self._writes:
            return
        last = dict(list(self._known.items())[-_MOST:])
        with contextlib.suppress(OSError):
            put(self._path, [msgspec.json.encode(_Rehearsals(last))])


def _key(step: Step) -> str:
    """Hash of all that a step's memory depends on."""
    parts = [msgspec.json.encode(step, order="sorted"), *(_version(p) for p in _PACKAGES)]
    return hashlib.blake2b(b"\0".join(parts), digest_size=16).hexdigest()


def _version(package: str) -> bytes:
    try:
        return importlib.metadata.version(package).encode()
    except importlib.metadata.PackageNotFoundError:
        return b""
