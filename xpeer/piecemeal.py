"""Packages of which we need a part, without the work that the rest would be.

`import hivemind.p2p` runs `hivemind/__init__.py`, which imports all of hivemind, and torch with it:
over a second and 230 MB for what a daemon never uses. Here such an `__init__` is read, not run. A
name that it imports is looked up when somebody asks for it.

An `__init__` that does more than to import names and to set constants is run as usual.
"""

from __future__ import annotations

import ast
import sys
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from importlib.util import resolve_name
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import ModuleType


def take(*packages: str) -> None:
    """Have these packages come piecemeal from now on; one that was imported before stays whole."""
    if _finder not in sys.meta_path:
        sys.meta_path.insert(0, _finder)
    _finder.names.update(packages)


class _Piecemeal(MetaPathFinder):
    """Finds the packages that were named where Python would find them."""

    def __init__(self) -> None:
        self.names: set[str] = set()

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Find one of these packages, with a loader that looks its names up later."""
        if fullname not in self.names:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and isinstance(spec.loader, SourceFileLoader):
            read = _read(fullname, spec.loader.get_source(fullname) or "")
            if read is not None:
                spec.loader = _Names(*read)
        return spec


class _Names(Loader):
    """Makes a package of names that are looked up when somebody asks for them.

    Args:
        sources: the module that each name comes from.
        constants: what it sets.
    """

    def __init__(self, sources: dict[str, str], constants: dict[str, Any]) -> None:
        self._sources, self._constants = sources, constants

    def create_module(self, spec: ModuleSpec) -> None:
        """Make it as usual."""

    def exec_module(self, module: ModuleType) -> None:
        """Set its constants, and how its names are found."""
        package, sources = module.__name__, self._sources

        def look_up(name: str) -> Any:
            if name not in sources:
                raise AttributeError(f"module {package!r} has no attribute {name!r}")
            source = sources[name]
            if source == package:  # one of its own modules
                return import_module(f"{package}.{name}")
            return getattr(import_module(source), name)

        vars(module).update(self._constants)
        module.__getattr__ = look_up  # type: ignore[method-assign]  # PEP 562


def _read(package: str, text: str) -> tuple[dict[str, str], dict[str, Any]] | None:
    """The names that an `__init__` imports and the constants that it sets.

    None = it does more than that.
    """
    sources: dict[str, str] = {}
    constants: dict[str, Any] = {}
    for line in ast.parse(text).body:
        match line:
            case ast.ImportFrom() if all(each.asname is None for each in line.names):
                source = resolve_name("." * line.level + (line.module or ""), package)
                sources |= {each.name: source for each in line.names}
            case ast.Assign(targets=[ast.Name(id=name)], value=ast.Constant(value=value)):
                constants[name] = value
            case ast.Expr(value=ast.Constant()):
                pass  # a docstring
            case _:
                return None
    return None if "*" in sources else (sources, constants)


_finder = _Piecemeal()
