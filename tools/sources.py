"""Sources of a checkout of the project, and what the names in them refer to.

Reads files and imports none of them. Knows nothing of what is counted.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from syntax import Definition, definitions, dotted

PACKAGES: Final = {
    "xpeer": "xpeer",
    "xpeer_daemon": "daemon/xpeer_daemon",
    "xpeer_bootstrap": "bootstrap/xpeer_bootstrap",
}
"""The product: folders by package."""


@dataclass(frozen=True, slots=True)
class Module:
    """One file.

    Attributes:
        name: with dots, as it is imported.
        path: from the checkout's root, with slashes.
    """

    name: str
    path: str
    text: str
    tree: ast.Module

    @classmethod
    def of(cls, name: str, text: str, path: str = "") -> Module:
        """Parse one.

        Raises:
            SyntaxError: the text is no Python.
        """
        return cls(name, path or name.replace(".", "/") + ".py", text, ast.parse(text))


def files(root: Path, *folders: str) -> list[Path]:
    """Python files of these folders, sorted; none of a folder that is not there."""
    return sorted(path for folder in folders for path in (root / folder).rglob("*.py"))


def product(root: Path) -> dict[str, Module]:
    """Modules of the product by name."""
    modules = {}
    for package, folder in PACKAGES.items():
        for path in files(root, folder):
            parts = [package, *path.relative_to(root / folder).with_suffix("").parts]
            name = ".".join(parts).removesuffix(".__init__")
            modules[name] = Module.of(name, path.read_text(), path.relative_to(root).as_posix())
    return modules


class Names:
    """What the product defines, by keys such as "package.module:Class.method".

    Args:
        modules: by name.
    """

    def __init__(self, modules: Mapping[str, Module]) -> None:
        self.definitions: dict[str, Definition] = {}
        self.constants: dict[str, ast.expr] = {}
        self._modules = modules
        self._imports: dict[str, dict[str, str]] = {}
        for name, module in modules.items():
            for qualified, node in definitions(module.tree.body):
                self.definitions[f"{name}:{qualified}"] = node
            for target, value in _assigned(module.tree.body):
                self.constants[f"{name}:{target}"] = value
            self._imports[name] = dict(_imported(module.tree))

    def resolve(self, module: str, expression: ast.AST) -> str:
        """Key of what an expression of a module names; "" if it is not of the product."""
        words = dotted(expression)
        return self._find(module, words) if words else ""

    def _find(self, module: str, words: list[str], hops: int = 8) -> str:
        key = f"{module}:{'.'.join(words)}"
        if key in self.definitions or key in self.constants:
            return key
        source = self._imports.get(module, {}).get(words[0])
        if source is None or not hops:
            return ""
        whole = [*source.split("."), *words[1:]]
        for cut in range(len(whole) - 1, 0, -1):
            if (package := ".".join(whole[:cut])) in self._modules:
                return self._find(package, whole[cut:], hops - 1)
        return ""


def _assigned(body: Iterable[ast.stmt]) -> Iterator[tuple[str, ast.expr]]:
    for node in body:
        match node:
            case ast.Assign(targets=[ast.Name(id=name)], value=value):
                yield name, value
            case ast.AnnAssign(target=ast.Name(id=name), value=ast.expr() as value):
                yield name, value


def _imported(tree: ast.Module) -> Iterator[tuple[str, str]]:
    """Local names and what they stand for, with dots; imports within functions, too."""
    for node in ast.walk(tree):
        match node:
            case ast.Import(names=aliases):
                for alias in aliases:
                    whole = alias.name if alias.asname else alias.name.partition(".")[0]
                    yield alias.asname or whole, whole
            case ast.ImportFrom(module=str(source), names=aliases):
                for alias in aliases:
                    yield alias.asname or alias.name, f"{source}.{alias.name}"
