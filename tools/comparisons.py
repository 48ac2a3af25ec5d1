"""Places that ask for an aggregation rule or a privacy mode by its name.

Such a place is a comparison with a name, a `match` over names, a lookup under a name, or one in a
table of names, unless the table belongs to a module that owns the names.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatch
from typing import Final

from sources import Module, Names
from syntax import last_word

FIELDS: Final = (
    "xpeer.manifest.round:Round.rule",
    "xpeer.manifest.privacy:Privacy.mode",
    "xpeer.manifest:Round.rule",
    "xpeer.manifest:Privacy.mode",
)
"""Fields of the manifest whose types list the names, here and in older versions."""
PAST: Final = frozenset({"update"})
"""A mode that old ledgers name, and that manifests once had."""
AMBIGUOUS: Final = frozenset({"record", *PAST})
"""Words that mean other things, too: they count beside something that is called rule or mode."""
_MOST_CHARS: Final = 90
_TABLES: Final = (ast.Constant, ast.Dict, ast.Tuple, ast.List, ast.Set)
_OTHERS: Final = frozenset({"unit", "kind", "row", "by"})
"""What else may be called "record": the unit of privacy, and a row that begins with it."""


def comparisons(modules: Mapping[str, Module], owners: Sequence[str]) -> list[str]:
    """Path, line and code of each place.

    Args:
        modules: of the product.
        owners: patterns for paths of modules in which names mean something.

    Raises:
        ValueError: the manifest lists no names where they are looked for.
    """
    search = _Search(modules, owners)
    places = []
    for module in modules.values():
        if not _is_of(owners, module):
            for node in sorted(search.places(module), key=lambda node: node.lineno):
                code = " ".join(ast.unparse(node).split())
                places.append(f"{module.path}:{node.lineno} {code[:_MOST_CHARS]}")
    return places


def _is_of(owners: Sequence[str], module: Module) -> bool:
    return any(fnmatch(module.path, owner) for owner in owners)


def names_of(modules: Mapping[str, Module]) -> frozenset[str]:
    """Names of rules and modes, as the manifest's types list them, and those of the past.

    Raises:
        ValueError: it lists none.
    """
    names, words = Names(modules), set(PAST)
    for place in FIELDS:
        key, _, field = place.rpartition(".")
        for node in getattr(names.definitions.get(key), "body", []):
            if isinstance(node, ast.AnnAssign) and last_word(node.target) == field:
                alias = names.resolve(key.partition(":")[0], node.annotation)
                literal = names.constants.get(alias, node.annotation)
                constants = (n.value for n in ast.walk(literal) if isinstance(n, ast.Constant))
                words |= {word for word in constants if isinstance(word, str)}
    if words == PAST:
        raise ValueError(f"no names of rules and modes at {' and '.join(FIELDS)}")
    return frozenset(words)


class _Search:
    def __init__(self, modules: Mapping[str, Module], owners: Sequence[str]) -> None:
        self._modules, self._owners = modules, owners
        self._names = Names(modules)
        self._words = names_of(modules)

    def places(self, module: Module) -> Iterator[ast.expr | ast.pattern]:
        """Expressions and patterns of a module."""
        for node in ast.walk(module.tree):
            match node:
                case ast.Compare(left=left, comparators=others):
                    yield from [node] if self._asks([left, *others], module) else []
                case ast.Match(subject=subject, cases=cases):
                    patterns = [case.pattern for case in cases]
                    yield from (each for each in patterns if self._asks([subject, each], module))
                case (
                    ast.Subscript(value=table, slice=key)
                    | ast.Call(func=ast.Attribute(value=table, attr="get" | "pop"), args=[key, *_])
                ):
                    yield from [node] if self._looks_up(table, key, module) else []

    def _asks(self, parts: Sequence[ast.AST], module: Module) -> bool:
        asked = [part for part in parts if not _gives_values(part)]
        words = {word for part in asked for word in self._texts(part, module)} & self._words
        called = {word.strip("_") for part in parts for word in _called(part)}
        if words <= AMBIGUOUS and not called & {"rule", "mode"}:
            return bool(words) and not called & _OTHERS
        return bool(words)

    def _looks_up(self, table: ast.expr, key: ast.expr, module: Module) -> bool:
        """Whether it is a table of names, or is asked for one; a type's `Literal` is neither."""
        if last_word(table) == "Literal":
            return False
        keys = self._texts(key, module) if isinstance(key, ast.Constant) else set()
        if isinstance(table, ast.Dict) or self._names.resolve(module.name, table):
            keys |= self._texts(table, module)
        return bool(keys & self._words - AMBIGUOUS)

    def _texts(self, node: ast.AST, module: Module) -> set[str]:
        """Strings in an expression or a pattern; of a table its keys, unless an owner has it."""
        if isinstance(node, ast.Dict):
            keys = (key for key in node.keys if key is not None)
            return {word for key in keys for word in self._texts(key, module)}
        texts: set[str] = set()
        for each in ast.walk(node):
            match each:
                case ast.Constant(value=str(word)):
                    texts.add(word)
                case ast.Name() | ast.Attribute():
                    key = self._names.resolve(module.name, each)
                    home = self._modules.get(key.partition(":")[0])
                    value = self._names.constants.get(key)
                    if home is None or not isinstance(value, _TABLES):
                        continue
                    if not _is_of(self._owners, home):
                        texts |= self._texts(value, home)
        return texts


def _gives_values(node: ast.AST) -> bool:
    """Whether it is what a table holds, whatever the keys."""
    return isinstance(node, ast.Call) and last_word(node.func) == "values"


def _called(node: ast.AST) -> Iterator[str]:
    """Identifiers of an expression, and the keys that it looks up."""
    for each in ast.walk(node):
        match each:
            case ast.Name(id=word) | ast.Attribute(attr=word):
                yield word
            case ast.Subscript(slice=ast.Constant(value=str(word))):
                yield word
