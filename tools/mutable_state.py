"""Mutable attributes of classes: what one has to keep in mind to read them.

A class has as mutable attributes:

1. what its methods bind outside of its constructor, or delete; what others bind from outside;
2. what is changed in place: containers, counters, events. A dict that is written under literal
   keys counts with all of them, and so does a `TypedDict`, and a value that is made anew from the
   old one by `{**old, "key": ...}`, `dict(old, key=...)` or `replace(old, key=...)`;
3. what is annotated in its body or constructor and set in neither;
4. all mutable attributes, at least one, of an object that it holds and writes, if no other class
   makes such objects: a bag of attributes is no way around the count;
5. one for each other object that it holds and writes attributes of, e.g. one that it was given.

What a base has, a class has. A constructor is `__init__` or `__post_init__`, without the functions
that it defines. To write is to bind an object's attribute, to change one in place, or to call a
method that only puts its arguments into attributes. A function outside of classes writes and makes
for the classes that refer to it. What is not seen: computed names (`setattr(self, name, 1)` counts
as one), variables of closures, and globals of modules.
"""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterator
from typing import Final, TypeAlias

from inference import Class, Program, Scope
from syntax import bound, dotted, keys_of_call, keys_of_value, last_word, only_gives, only_sets

MUTATORS: Final = frozenset(
    {
        *("append", "appendleft", "add", "extend", "extendleft", "insert", "remove", "discard"),
        *("pop", "popitem", "popleft", "clear", "update", "setdefault", "move_to_end", "sort"),
        *("reverse", "rotate", "subtract", "difference_update", "intersection_update"),
        *("symmetric_difference_update", "set", "put", "put_nowait", "set_result"),
        *("set_exception", "fill"),
    }
)
"""Methods of containers, counters and events. Those of tensors end with `_`."""
_MUTATING: Final = frozenset(
    {
        *("heappush", "heappop", "heapify", "heapreplace", "heappushpop"),
        *("insort", "insort_left", "insort_right", "shuffle", "next"),
    }
)
_HOMES: Final[tuple[list[str], ...]] = ([], ["heapq"], ["bisect"], ["random"])
"""Functions that change their first argument, and where they are."""
_INSIDE: Final = frozenset({"get", "setdefault", "values", "items"})
"""Methods of containers that give what they hold."""
_SETTERS: Final = frozenset({"setattr", "delattr", "__setattr__", "__delattr__"})
_CHECKS: Final = frozenset({"isinstance", "issubclass", "cast", "getattr", "hasattr"})
"""Functions that make no object of a class that they are given."""
_DECLARED: Final = frozenset(
    {"dataclass", "Struct", "Protocol", "TypedDict", "NamedTuple", "Enum", "StrEnum", "IntEnum"}
)
"""Classes whose constructors are made of the annotations in their bodies."""
_ALIASES: Final = 6
"""At most so many variables, each of which stands for the next."""

Place: TypeAlias = tuple[str, str]
"""An attribute: a class's key and a name. Or a parameter: a function's key and a name."""


class MutableState:
    """What a program's classes change after they were made.

    Args:
        program: a product.
    """

    def __init__(self, program: Program) -> None:
        self._program = program
        self._rebound: set[Place] = set()
        self._changed: set[Place] = set()  # in place
        self._keys: dict[Place, set[str]] = defaultdict(set)  # suffixes, such as ["key"]
        self._set_first: set[Place] = set()
        self._promised: set[Place] = set()
        self._passed: list[tuple[Place, Place]] = []  # from, to
        self._foreign: list[Place] = []  # attributes of objects of other libraries, with holders
        self._written: dict[str, set[str]] = defaultdict(set)  # classes by scope
        self._made: dict[str, set[str]] = defaultdict(set)  # scopes by class
        self._referring: dict[str, set[str]] = defaultdict(set)  # scopes by function
        self._by_name: dict[str, set[str]] = defaultdict(set)  # classes by attribute
        for key, each in program.classes.items():
            if "Protocol" not in program.traits(key):
                for name in {*each.attributes, *each.annotated}:
                    self._by_name[name].add(key)
        for scope in program.scopes.values():
            for node, later in scope.walk():
                self._look_at(node, scope, first=scope.constructs and not later)
        self._pass_on()
        self._writes: dict[str, set[str]] = defaultdict(set)  # classes by class
        for written_in, classes in self._written.items():
            for writer in self._runners(written_in):
                self._writes[writer] |= classes

    def names_of(self, key: str, seen: frozenset[str] = frozenset()) -> set[str]:
        """Names of all mutable attributes of a class.

        Args:
            key: of the class.
            seen: classes of objects that hold this one.
        """
        return self.own_names_of(key) | {
            f"{name}.{word}"
            for name, kind in self._bags(key)
            if kind not in seen
            for word in self.names_of(kind, seen | {key})
        }

    def own_names_of(self, key: str) -> set[str]:
        """Without what the objects have that only this class makes."""
        names = {name for name, _ in {*self._held(key)} - self._bags(key)}
        names |= {name for name, kind in self._bags(key) if not self._has_state(kind)}
        return names.union(*(self._names_in(each) for each in self._program.family(key)))

    def _has_state(self, key: str) -> bool:
        own = (self._names_in(each) for each in self._program.family(key))
        return any(own) or any(True for _ in self._held(key))

    def _held(self, key: str) -> Iterator[tuple[str, str]]:
        """Attributes and classes of objects that a class holds and writes."""
        family = self._program.family(key)
        writes = set[str]().union(*(self._writes[each.key] for each in family))
        for each in family:
            for name, held in each.attributes.items():
                yield from ((name, kind) for kind in held & writes - {c.key for c in family})

    def _bags(self, key: str) -> set[tuple[str, str]]:
        """Of these, those of which no other class makes objects."""
        keys = {each.key for each in self._program.family(key)}
        held = ((name, kind, self._makers(kind)) for name, kind in self._held(key))
        return {(name, kind) for name, kind, makers in held if makers and makers <= keys}

    # Statements

    def _look_at(self, node: ast.AST, scope: Scope, *, first: bool) -> None:
        for target, value in bound(node):
            self._bind(target, value, scope, first)
        match node:
            case ast.AnnAssign(target=ast.Attribute(value=base, attr=name), value=None):
                if first and dotted(base) == [scope.me]:
                    self._promised.add((scope.owner, name))
            case ast.Call():
                self._call(node, scope, first)
            case ast.Name() | ast.Attribute():
                for function in self._functions(node, scope):
                    self._referring[function].add(scope.key)

    def _bind(self, target: ast.AST, value: ast.expr | None, scope: Scope, first: bool) -> None:
        match target:
            case ast.Attribute(value=base, attr=name):
                self._bind_attribute(base, name, value, scope, first)
            case ast.Subscript():
                self._change(target, scope, first)
            case ast.Tuple(elts=parts) | ast.List(elts=parts):
                for part in parts:
                    self._bind(part, None, scope, first)
            case ast.Starred(value=part):
                self._bind(part, None, scope, first)

    def _bind_attribute(
        self, base: ast.expr, name: str, value: ast.expr | None, scope: Scope, first: bool
    ) -> None:
        constructing = first and dotted(base) == [scope.me]
        owners = self._owners(base, name, scope)
        for place in owners:
            self._keys[place] |= set(keys_of_value(value))
            if not constructing:
                self._rebound.add(place)
                continue
            self._set_first.add(place)
            if isinstance(value, ast.Name) and value.id in scope.parameters:
                self._passed.append(((scope.key, value.id), place))
        if not owners and not self._program.of(base, scope):
            self._note_foreign(base, name, scope)
        if not constructing:
            self._written[scope.key] |= self._touched(base, scope)

    def _note_foreign(self, base: ast.expr, name: str, scope: Scope) -> None:
        for root, _ in self._roots(base, scope):
            if isinstance(root, ast.Attribute):
                for holder in self._owners(root.value, root.attr, scope):
                    self._foreign.append(holder)
                    self._keys[holder].add(f".{name}")

    def _change(
        self, container: ast.expr, scope: Scope, first: bool, keys: tuple[str, ...] = ()
    ) -> None:
        """Note that a container is changed in place.

        Args:
            container: the container, or an item of it that is bound.
            scope: where.
            first: in a constructor.
            keys: literals that it is changed under.
        """
        for root, path in self._roots(container, scope):
            if isinstance(root, ast.Name):
                self._changed.add((scope.key, root.id))
                continue
            mine = dotted(root.value) == [scope.me]
            if mine and first:
                continue
            owners = self._owners(root.value, root.attr, scope)
            for place in owners:
                self._changed.add(place)
                self._keys[place] |= {path + key for key in keys} or {path}
            if not owners:
                self._note_foreign(root.value, root.attr, scope)
            if not mine:
                self._written[scope.key] |= self._touched(root.value, scope)

    def _call(self, call: ast.Call, scope: Scope, first: bool) -> None:
        match last_word(call.func), call.args:
            case word, [base, attribute, *_] if word in _SETTERS:
                name = attribute.value if isinstance(attribute, ast.Constant) else "setattr()"
                self._bind_attribute(base, str(name), None, scope, first)
            case word, [changed, *_] if word in _MUTATING and dotted(call.func)[:-1] in _HOMES:
                self._change(changed, scope, first)
        if isinstance(call.func, ast.Attribute):
            self._call_method(call, call.func.value, call.func.attr, scope, first)
        handed: list[ast.expr] = [*call.args, *(each.value for each in call.keywords)]
        for each in [call.func, *([] if last_word(call.func) in _CHECKS else handed)]:
            kind = self._program.names.resolve(scope.module, each)
            if each is call.func and dotted(each) == [scope.me]:
                kind = scope.owner  # cls()
            if kind in self._program.classes:
                self._made[kind].add(scope.key)
        for target in self._functions(call.func, scope):
            self._pass_arguments(call, target, scope)

    def _call_method(
        self, call: ast.Call, base: ast.expr, name: str, scope: Scope, first: bool
    ) -> None:
        methods = {key: self._program.method(key, name) for key in self._program.of(base, scope)}
        if any(methods.values()):
            setters = {key for key, method in methods.items() if method and only_sets(method)}
            self._written[scope.key] |= setters - {scope.owner}
        elif name in MUTATORS or (name.endswith("_") and not name.startswith("_")):
            self._change(base, scope, first, tuple(keys_of_call(call)))

    # Names

    def _owners(self, base: ast.expr, name: str, scope: Scope) -> list[Place]:
        """Classes that have the attribute, of those that the object may be of; or the only one."""
        held = self._program.of(base, scope)
        declared = [place for key in held for place in self._declared(key, name)]
        if real := [each for each in declared if "Protocol" not in self._program.traits(each[0])]:
            return real
        if held and not declared:  # it has no such attribute yet, or binding it calls a method
            calls = any(self._program.method(key, name) for key in held)
            return [] if calls or len(held) > 1 else [(key, name) for key in held]
        others = self._by_name[name]
        return [(key, name) for key in others] if len(others) == 1 else []

    def _declared(self, key: str, name: str) -> list[Place]:
        for each in self._program.family(key):
            if name in each.attributes or name in each.annotated:
                return [(each.key, name)]
            if name in each.methods and (other := only_gives(each.methods[name])):
                return self._declared(key, other)
        classes = self._program.classes.items()
        return [(k, name) for k, c in classes if key in c.bases and name in c.attributes]

    def _roots(
        self, container: ast.expr, scope: Scope, path: str = "", depth: int = _ALIASES
    ) -> Iterator[tuple[ast.Attribute | ast.Name, str]]:
        """Attributes or parameters that hold a container, and the literals on the way to it."""
        match container:
            case ast.Attribute():
                yield container, path
            case ast.Subscript(value=value, slice=key):
                yield from self._roots(value, scope, self._literal(key, scope) + path, depth)
            case ast.Call(func=ast.Attribute(value=value, attr=name), args=args) if name in _INSIDE:
                key_path = self._literal(args[0], scope) if args else ""
                yield from self._roots(value, scope, key_path + path, depth)
            case ast.Name(id=name) if name in scope.aliases and depth:
                for alias in scope.aliases[name]:
                    yield from self._roots(alias, scope, path, depth - 1)
            case ast.Name(id=name) if name in scope.parameters:
                yield container, path

    def _literal(self, key: ast.expr, scope: Scope) -> str:
        """`["a"]` of a literal or a constant; else nothing."""
        named = self._program.names.resolve(scope.module, key)
        match self._program.names.constants.get(named, key):
            case ast.Constant(value=str(text)):
                return f'["{text}"]'
        return ""

    def _touched(self, base: ast.expr, scope: Scope, depth: int = _ALIASES) -> set[str]:
        """Classes of an object, and of those that it is reached through; not the scope's own."""
        touched = set(self._program.of(base, scope)) - {scope.owner}
        if isinstance(base, (ast.Attribute, ast.Subscript)):
            touched |= self._touched(base.value, scope, depth)
        if isinstance(base, ast.Name) and depth:
            for alias in scope.aliases.get(base.id, []):
                touched |= self._touched(alias, scope, depth - 1)
        return touched

    def _functions(self, node: ast.AST, scope: Scope) -> list[str]:
        """Functions, methods or classes that an expression names."""
        key = self._program.names.resolve(scope.module, node)
        if key in self._program.scopes or key in self._program.classes:
            return [key]
        if not isinstance(node, ast.Attribute):
            return []
        held = self._program.of(node.value, scope)
        family = (each for key in held for each in self._program.family(key))
        return [f"{each.key}.{node.attr}" for each in family if node.attr in each.methods]

    # Containers that are handed on

    def _parameters(self, target: str) -> list[Place]:
        """What the arguments of a call become, in their order."""
        if target not in self._program.classes:
            return [(target, name) for name in self._program.scopes[target].parameters]
        family = self._program.family(target)
        for each in family:
            if "__init__" in each.methods:
                return self._parameters(f"{each.key}.__init__")
        return [(each.key, name) for each in reversed(family) for name in each.annotated]

    def _pass_arguments(self, call: ast.Call, target: str, scope: Scope) -> None:
        parameters = self._parameters(target)
        by_name = {place[1]: place for place in parameters}
        pairs = [*zip(call.args, parameters, strict=False)]
        pairs += [(k.value, by_name[k.arg]) for k in call.keywords if k.arg in by_name]
        for argument, parameter in pairs:
            for root, _ in self._roots(argument, scope):
                if isinstance(root, ast.Name):
                    self._passed.append(((scope.key, root.id), parameter))
                else:
                    sources = self._owners(root.value, root.attr, scope)
                    self._passed += [(source, parameter) for source in sources]

    def _pass_on(self) -> None:
        """Who hands on a container that another changes has it changed."""
        before = -1
        while before != len(self._changed):
            before = len(self._changed)
            self._changed |= {source for source, kept in self._passed if kept in self._changed}
        given = {kept for _, kept in self._passed}
        for holder in self._foreign:
            self._changed.add(holder)
            if holder in given:  # by whoever made it: it counts once
                self._keys[holder] = {key for key in self._keys[holder] if key[:1] != "."}

    # Objects

    def _runners(self, scope: str, made: str = "", seen: frozenset[str] = frozenset()) -> set[str]:
        """Classes whose methods run a scope; a function that nobody refers to stands for itself.

        Args:
            scope: its key.
            made: a class whose methods stand for those who refer to them.
            seen: scopes that are run by it.
        """
        owner = self._program.scopes[scope].owner
        if owner and owner != made:
            return {owner}
        wanted = self._referring[scope] - seen - {scope}
        runners = (self._runners(each, made, seen | {scope}) for each in wanted)
        return set[str]().union(*runners) or {owner or scope}

    def _makers(self, key: str) -> set[str]:
        return set[str]().union(*(self._runners(scope, key) for scope in self._made[key]))

    # Counts

    def _names_in(self, each: Class) -> set[str]:
        """Rules 1 to 3, without what is inherited."""
        names: set[str] = set()
        for name in {name for key, name in {*self._rebound, *self._changed} if key == each.key}:
            suffixes = self._keys[each.key, name]
            for kind in each.attributes.get(name, ()):
                if "TypedDict" in self._program.traits(kind):
                    family = self._program.family(kind)
                    suffixes = suffixes | {f'["{key}"]' for c in family for key in c.annotated}
            names |= {name + suffix for suffix in suffixes - {""} or {""}}
        if not self._program.traits(each.key) & _DECLARED:
            names |= {n for n in self._promises(each) if (each.key, n) not in self._set_first}
        return names

    def _promises(self, each: Class) -> set[str]:
        """What is annotated without a value, unless it is a constant that classes below have."""
        classes = self._program.classes.values()
        below = [c for c in classes if each in self._program.family(c.key)]
        constants = {name for other in below for name in other.valued}
        promised = {name for key, name in self._promised if key == each.key}
        for name, annotation in each.annotated.items():
            promised |= {name} if last_word(annotation) != "ClassVar" else set()
        return promised - constants
