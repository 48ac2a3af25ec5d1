"""Reads the markers of `xpeer.leaves`: all structures that leave, and the table of docs/privacy.md.

python -m tests.leaving     writes that table anew, after a field was added or changed
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import pkgutil
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, Final, cast, get_args, get_type_hints

import msgspec
import torch

import xpeer
import xpeer_bootstrap
import xpeer_daemon
from xpeer import leaves
from xpeer.leaves import ATTRIBUTE, Audience, Destination, Treatment

PACKAGES: Final = (xpeer, xpeer_daemon, xpeer_bootstrap)
DATACLASSES: Final = ("xpeer.forms.", "xpeer.update.", "xpeer.training.checkpoint.Bundle")
"""They cross processes or go to the disk. Others count if they have a marker, or if a field that
leaves holds one; msgspec's structures count in any case."""
SEEN_BY_OTHERS: Final[tuple[Audience, ...]] = ("anybody", "members", "partners", "export")
AUDIENCES: Final = (*SEEN_BY_OTHERS, "node", "home")
DOCUMENT: Final = Path(__file__).parents[1] / "docs" / "privacy.md"
BEGIN, END = "<!-- python -m tests.leaving -->", "<!-- end of what it wrote -->"


def modules() -> Iterator[ModuleType]:
    """All modules of the product."""
    for package in PACKAGES:
        for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
            if not module.name.endswith("__main__"):
                yield importlib.import_module(module.name)


def structures(module: ModuleType) -> Iterator[type]:
    """Structures that a module defines and that can be sent or saved."""
    for kind in vars(module).values():
        if isinstance(kind, type) and kind.__module__ == module.__name__ and is_structure(kind):
            yield kind


def is_structure(kind: type) -> bool:
    """Whether msgspec encodes it for us, or it is one of the dataclasses that count."""
    if issubclass(kind, msgspec.Struct):
        return True
    if not dataclasses.is_dataclass(kind):
        return False
    return name_of(kind).startswith(DATACLASSES) or ATTRIBUTE in vars(kind) or any(marked(kind))


def all_structures() -> list[type]:
    """Of the product, those that stay included; dataclasses inside of them, too."""
    every = [kind for module in modules() for kind in structures(module)]
    for kind in every:  # grows while it is walked
        if (goes := destination(kind)) is not None and goes.audience is not None:
            every += [inner for inner in inside(kind) if inner not in every]
    return every


def name_of(kind: type) -> str:
    """Module and class."""
    return f"{kind.__module__}.{kind.__qualname__}"


def destination(kind: type) -> Destination | None:
    """Where it goes by its own word; None: it says nothing."""
    return vars(kind).get(ATTRIBUTE)


def fields(kind: type) -> list[str]:
    """Names, in the order in which they are encoded."""
    if issubclass(kind, msgspec.Struct):
        return list(kind.__struct_fields__)
    return [field.name for field in dataclasses.fields(cast(Any, kind))]


def types_of(kind: type) -> dict[str, Any]:
    """Types of its fields, with their markers."""
    hints = get_type_hints(kind, localns={"torch": torch}, include_extras=True)
    return {field: hints[field] for field in fields(kind)}


def marks(annotation: Any) -> list[Treatment]:
    """Markers of a field; one is as it should be."""
    return [m for m in getattr(annotation, "__metadata__", ()) if isinstance(m, Treatment)]


def marked(kind: type) -> Iterator[Treatment]:
    """All markers of its fields."""
    for field in dataclasses.fields(cast(Any, kind)):  # not resolved: most dataclasses have none
        if str(field.type).partition("[")[0] in {each.name.capitalize() for each in Treatment}:
            yield Treatment(str(field.type).partition("[")[0].lower())


def treatments(kind: type) -> dict[str, Treatment | None]:
    """By field; None: it has no marker, or several."""
    goes = destination(kind)
    if goes is not None and goes.all_public:
        return dict.fromkeys(fields(kind), Treatment.PUBLIC)
    found = {field: marks(annotation) for field, annotation in types_of(kind).items()}
    return {field: each[0] if len(each) == 1 else None for field, each in found.items()}


def inside(kind: type, among: set[str] | None = None) -> Iterator[type]:
    """Structures that its fields hold, or those of its fields."""
    for field, annotation in types_of(kind).items():
        if among is None or field in among:
            yield from _held(annotation)


def _held(annotation: Any) -> Iterator[type]:
    if isinstance(annotation, type) and (
        issubclass(annotation, msgspec.Struct) or dataclasses.is_dataclass(annotation)
    ):
        yield annotation
    for argument in get_args(annotation):
        yield from _held(argument)


def holds_structures(annotation: Any) -> bool:
    """Whether there is one in a field of this type."""
    return any(True for _ in _held(annotation))


def plain(annotation: Any) -> Any:
    """A type without what is annotated."""
    return annotation.__origin__ if hasattr(annotation, "__metadata__") else annotation


def visible(value: Any, *wanted: Treatment, path: str = "") -> Iterator[tuple[str, Any]]:
    """Fields of a structure that are treated so, and of structures in its parts, with a path."""
    if isinstance(value, list | tuple):
        for number, each in enumerate(value):
            yield from visible(each, *wanted, path=f"{path}[{number}]")
        return
    if not isinstance(value, msgspec.Struct) and not dataclasses.is_dataclass(value):
        return
    path = path or type(value).__name__
    for field, treatment in treatments(type(value)).items():
        if treatment in wanted:
            yield f"{path}.{field}", getattr(value, field)
        elif treatment is Treatment.PARTS:
            yield from visible(getattr(value, field), *wanted, path=f"{path}.{field}")


def table() -> str:
    """What docs/privacy.md says of every structure that leaves."""
    rows: dict[tuple[int, str], list[tuple[str, str, str]]] = {}
    for kind in sorted(all_structures(), key=name_of):
        goes = destination(kind)
        if goes is not None and goes.audience is not None and fields(kind):
            name = name_of(kind).removeprefix("xpeer.")
            group = name.rpartition(".")[0] if goes.all_public else name
            row = rows.setdefault((AUDIENCES.index(goes.audience), group), [])
            row.append((name, _by_treatment(kind, goes), goes.why))
    lines = ["| structure | who reads it | fields | why |", "|---|---|---|---|"]
    for (audience, group), each in sorted(rows.items()):
        structure = f"`{each[0][0]}`" if len(each) == 1 else f"all others of `{group}`"
        why = next((why for _, _, why in each if why), "")
        lines.append(f"| {structure} | {AUDIENCES[audience]} | {each[0][1]} | {why} |")
    return "\n".join(lines)


def _by_treatment(kind: type, goes: Destination) -> str:
    if goes.all_public:
        return "public: all"
    of = treatments(kind)
    named = {t: ", ".join(f"`{field}`" for field in of if of[field] is t) for t in Treatment}
    return "; ".join(f"{treatment}: {names}" for treatment, names in named.items() if names)


def legend() -> str:
    """What the treatments mean, as `xpeer.leaves` says."""
    text = inspect.cleandoc(str(leaves.__doc__))
    return text.partition("privacy is on:\n\n")[2].partition("\n\nWhat this module")[0].rstrip()


def written(document: str) -> str:
    """The document with the table as it has to be."""
    before, _, rest = document.partition(BEGIN)
    after = rest.partition(END)[2]
    return f"{before}{BEGIN}\n\n{legend()}\n\n{table()}\n\n{END}{after}"


if __name__ == "__main__":
    DOCUMENT.write_text(written(DOCUMENT.read_text(encoding="utf-8")), encoding="utf-8")
