"""Which product classes an expression may be of, by annotations, assignments and constructors.

A container is of the classes that it may hold: `dict[str, Partner]` is of Partner. That is coarse,
and enough: an attribute is then looked up in those classes alone that have it.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Final

from sources import Module, Names
from syntax import FUNCTIONS, Function, bound, dotted, is_property, last_word, walk

ROUNDS: Final = 4
"""Passes over all assignments: a class that is known through so many others is still known."""
CONSTRUCTORS: Final = {"__init__", "__post_init__"}
_NOTHING: Final[frozenset[str]] = frozenset()
_ALIASED: Final = (ast.Attribute, ast.Subscript, ast.Name, ast.Call)


@dataclass(slots=True)
class Class:
    """A class of the product.

    Attributes:
        bases: product classes that it is made from, by key.
        traits: other bases by their last name; "dataclass" and "frozen" where they apply.
        methods: by name; properties, too.
        annotated: annotated in the body.
        typed: annotated there or in a method.
        valued: bound in the body to a value.
        attributes: classes by attribute; grows while they are inferred.
    """

    key: str
    module: str
    node: ast.ClassDef
    bases: list[str] = field(default_factory=list)
    traits: set[str] = field(default_factory=set)
    methods: dict[str, Function] = field(default_factory=dict)
    annotated: dict[str, ast.expr] = field(default_factory=dict)
    typed: set[str] = field(default_factory=set)
    valued: set[str] = field(default_factory=set)
    attributes: dict[str, set[str]] = field(default_factory=dict)


@dataclass(slots=True)
class Scope:
    """A function with those that it defines; or what a class or a module runs when it is made.

    Attributes:
        owner: the class whose body or method this is, by key.
        me: name of the first parameter of a method, else "".
        constructs: True iff it is a constructor.
        local: classes by variable; grows while they are inferred.
        aliases: what a variable may stand for.
    """

    key: str
    module: str
    nodes: list[ast.stmt]
    function: Function | None = None
    owner: str = ""
    me: str = ""
    constructs: bool = False
    local: dict[str, set[str]] = field(default_factory=dict)
    aliases: dict[str, list[ast.expr]] = field(default_factory=dict)

    def walk(self) -> Iterator[tuple[ast.AST, bool]]:
        """Every node, and whether it runs later: in a function or lambda that this one defines."""
        for node in self.nodes:
            yield from walk(node)

    @property
    def parameters(self) -> list[str]:
        """Names, without the method's own object."""
        if self.function is None:
            return []
        given = self.function.args
        names = [each.arg for each in (*given.posonlyargs, *given.args, *given.kwonlyargs)]
        return [name for name in names if name != self.me]


class Program:
    """Classes and functions of a product, and of which classes their expressions are.

    Args:
        modules: by name.
    """

    def __init__(self, modules: Mapping[str, Module]) -> None:
        self.names = Names(modules)
        self.classes: dict[str, Class] = {}
        self.scopes: dict[str, Scope] = {}
        for key, node in self.names.definitions.items():
            if isinstance(node, ast.ClassDef):
                self.classes[key] = _class_of(key, node, self.names)
                self.scopes[f"{key}."] = _scope_of(f"{key}.", node.body, key)
            else:
                owner = key.rpartition(".")[0]
                is_method = isinstance(self.names.definitions.get(owner), ast.ClassDef)
                self.scopes[key] = _scope_of_function(key, node, owner if is_method else "")
        for name, module in modules.items():
            self.scopes[f"{name}:"] = _scope_of(f"{name}:", module.tree.body)
        for _ in range(ROUNDS):
            for scope in self.scopes.values():
                self._infer(scope)

    def family(self, key: str) -> list[Class]:
        """A class and all that it is made from, nearest first."""
        classes: dict[str, Class] = {}
        wanted = [key]
        while wanted:
            if (each := wanted.pop(0)) not in classes and each in self.classes:
                classes[each] = self.classes[each]
                wanted += self.classes[each].bases
        return list(classes.values())

    def traits(self, key: str) -> set[str]:
        """Traits of a class and of all that it is made from; who obeys a protocol is none."""
        inherited = {trait for each in self.family(key) for trait in each.traits} - {"Protocol"}
        return inherited | self.classes[key].traits

    def method(self, key: str, name: str) -> Function | None:
        """A method of a class, or one that it inherits."""
        return next((c.methods[name] for c in self.family(key) if name in c.methods), None)

    # Classes of expressions

    def mentioned(self, annotation: ast.AST | None, module: str, depth: int = 4) -> frozenset[str]:
        """Classes that an annotation names; none of what a Callable takes or gives."""
        match annotation:
            case ast.Constant(value=str(text)) if (parsed := _parsed(text)) is not None:
                return self.mentioned(parsed, module, depth)
            case ast.Subscript() if last_word(annotation) == "Callable":
                return _NOTHING
            case ast.Name() | ast.Attribute():
                key = self.names.resolve(module, annotation)
                if key in self.classes:
                    return frozenset({key})
                alias = self.names.constants.get(key)
                home = key.partition(":")[0]
                return self.mentioned(alias, home, depth - 1) if alias and depth else _NOTHING
            case ast.Subscript() | ast.BinOp() | ast.Tuple() | ast.List():
                parts = ast.iter_child_nodes(annotation)
                return _NOTHING.union(*(self.mentioned(each, module, depth) for each in parts))
        return _NOTHING

    def of(self, expression: ast.AST | None, scope: Scope) -> frozenset[str]:
        """Classes that an expression may be of; empty if nothing says which."""
        match expression:
            case ast.Name(id=name) if name in scope.local:
                return frozenset(scope.local[name])
            case ast.Name():
                return self._of_name(expression, scope.module)
            case ast.Attribute(value=value, attr=name):
                named = self._of_name(expression, scope.module)
                return named or self._of_attributes(self.of(value, scope), name)
            case ast.Call():
                return self._of_call(expression, scope)
            case ast.Subscript(value=value, slice=key):
                return self._of_item(self.of(value, scope), key)
            case ast.comprehension(target=target):
                return self.of(target, scope)
            case ast.Lambda() | ast.Constant() | ast.Compare() | ast.JoinedStr() | None:
                return _NOTHING
        return _NOTHING.union(*(self.of(e, scope) for e in ast.iter_child_nodes(expression)))

    def _of_name(self, expression: ast.AST, module: str) -> frozenset[str]:
        """A class stands for its objects; a module's variable is of what was bound to it."""
        key = self.names.resolve(module, expression)
        if key in self.classes:
            return frozenset({key})
        home, _, name = key.partition(":")
        return frozenset(self.scopes[f"{home}:"].local.get(name, ())) if home else _NOTHING

    def _of_attributes(self, classes: Iterable[str], name: str) -> frozenset[str]:
        kinds: set[str] = set()
        for key in classes:
            for each in self.family(key):
                kinds |= each.attributes.get(name, set())
            method = self.method(key, name)
            if method is not None and is_property(method):
                kinds |= self._given_by(key, name)
        return frozenset(kinds)

    def _of_item(self, held: frozenset[str], key: ast.expr) -> frozenset[str]:
        """What a container holds; of a `TypedDict`, of which classes this key's value is."""
        kinds: set[str] = set()
        for each in held:
            if "TypedDict" in self.traits(each) and isinstance(key, ast.Constant):
                kinds |= self._of_attributes({each}, str(key.value))
            elif self.method(each, "__getitem__") is not None:
                kinds |= self._given_by(each, "__getitem__")
            else:
                kinds.add(each)
        return frozenset(kinds)

    def _given_by(self, key: str, name: str) -> frozenset[str]:
        """What a method returns, by its annotation."""
        owner = next(each for each in self.family(key) if name in each.methods)
        returned = owner.methods[name].returns
        if last_word(returned) == "Self":
            return frozenset({key})
        return self.mentioned(returned, owner.module)

    def _of_call(self, call: ast.Call, scope: Scope) -> frozenset[str]:
        key = self.names.resolve(scope.module, call.func)
        home, _, name = key.partition(":")
        if key in self.classes:
            return frozenset({key})
        match self.names.definitions.get(key), call.func:
            case ast.FunctionDef() | ast.AsyncFunctionDef() as function, _ if "." not in name:
                return self.mentioned(function.returns, home)
            case _, ast.Attribute(value=value, attr=word):
                held = self.of(value, scope)
                given = [self._given_by(each, word) for each in held if self.method(each, word)]
                return _NOTHING.union(*given) if given else held
            case _, ast.Name(id=word) if word in scope.local:
                return frozenset(scope.local[word])
        arguments = [*call.args, *(each.value for each in call.keywords)]
        return _NOTHING.union(*(self.of(each, scope) for each in arguments))

    # Assignments

    def _infer(self, scope: Scope) -> None:
        for argument in ast.walk(scope.function) if scope.function is not None else ():
            if isinstance(argument, ast.arg):
                named = self.mentioned(argument.annotation, scope.module)
                scope.local.setdefault(argument.arg, set()).update(named)
        for node, _ in scope.walk():
            match node:
                case ast.AnnAssign(annotation=annotation, value=made):
                    named = self.mentioned(annotation, scope.module)
                    self._note(node.target, named | self._made(made, scope), scope)
                    continue
                case ast.Call(func=ast.Name(id="isinstance"), args=[ast.Name() as checked, kind]):
                    self._note(checked, self.mentioned(kind, scope.module), scope)
            for target, value in bound(node):
                of = self._made if self._is_annotated(target, scope) else self.of
                self._note(target, of(value, scope), scope)

    def _is_annotated(self, target: ast.expr, scope: Scope) -> bool:
        """Whether it is an attribute of the scope's object, and an annotation says what it is."""
        words = dotted(target)
        return words[:1] == [scope.me] and any(
            words[-1] in each.typed for each in self.family(scope.owner)
        )

    def _made(self, value: ast.AST | None, scope: Scope) -> frozenset[str]:
        """Classes whose constructors a value is from, whatever the annotation says."""
        match value:
            case ast.Call(func=function):
                key = self.names.resolve(scope.module, function)
                return frozenset({key} & self.classes.keys())
            case ast.IfExp(body=one, orelse=other):
                return self._made(one, scope) | self._made(other, scope)
            case ast.BoolOp(values=parts) | ast.List(elts=parts) | ast.Dict(values=parts):
                return _NOTHING.union(*(self._made(each, scope) for each in parts))
        return _NOTHING

    def _note(self, target: ast.AST, classes: frozenset[str], scope: Scope) -> None:
        match target:
            case ast.Name(id=name) if scope.function is not None or not scope.owner:
                scope.local.setdefault(name, set()).update(classes)
            case ast.Name(id=name):
                self.classes[scope.owner].attributes.setdefault(name, set()).update(classes)
            case ast.Attribute(value=ast.Name(id=scope.me), attr=name) if scope.me:
                self.classes[scope.owner].attributes.setdefault(name, set()).update(classes)
            case ast.Tuple(elts=parts) | ast.List(elts=parts):
                for part in parts:
                    self._note(part, classes, scope)
            case ast.Starred(value=part):
                self._note(part, classes, scope)


def _parsed(text: str) -> ast.expr | None:
    """An annotation in quotes; None if it is a word of another kind."""
    try:
        return ast.parse(text, mode="eval").body
    except SyntaxError:
        return None


def _scope_of(key: str, body: list[ast.stmt], owner: str = "") -> Scope:
    kept = [node for node in body if not isinstance(node, (*FUNCTIONS, ast.ClassDef))]
    scope = Scope(key, key.partition(":")[0], kept, owner=owner)
    _note_aliases(scope)
    return scope


def _scope_of_function(key: str, function: Function, owner: str) -> Scope:
    scope = Scope(key, key.partition(":")[0], function.body, function, owner)
    given = [*function.args.posonlyargs, *function.args.args]
    if owner and given and "staticmethod" not in map(last_word, function.decorator_list):
        scope.me = given[0].arg
        scope.local[scope.me] = {owner}
    scope.constructs = bool(owner) and function.name in CONSTRUCTORS
    _note_aliases(scope)
    return scope


def _note_aliases(scope: Scope) -> None:
    for node, _ in scope.walk():
        for target, value in bound(node):
            if isinstance(target, ast.Name) and isinstance(value, _ALIASED):
                scope.aliases.setdefault(target.id, []).append(value)


def _class_of(key: str, node: ast.ClassDef, names: Names) -> Class:
    made = Class(key, key.partition(":")[0], node)
    keywords = list(node.keywords)
    for base in node.bases:
        head = base.value if isinstance(base, ast.Subscript) else base
        resolved = names.resolve(made.module, head)
        if resolved in names.definitions:
            made.bases.append(resolved)
        else:
            made.traits.add(last_word(head))
    for decorator in node.decorator_list:
        made.traits.add(last_word(decorator.func if isinstance(decorator, ast.Call) else decorator))
        keywords += decorator.keywords if isinstance(decorator, ast.Call) else []
    if any(each.arg == "frozen" and ast.unparse(each.value) == "True" for each in keywords):
        made.traits.add("frozen")
    for member in node.body:
        match member:
            case ast.FunctionDef() | ast.AsyncFunctionDef():
                made.methods.setdefault(member.name, member)
            case ast.AnnAssign(target=ast.Name(id=name), annotation=annotation):
                made.annotated[name] = annotation
                made.valued |= {name} if member.value is not None else set()
            case ast.Assign(targets=[ast.Name(id=name)]):
                made.valued.add(name)
    typed = (each.target for each in ast.walk(node) if isinstance(each, ast.AnnAssign))
    made.typed = set(map(last_word, typed))
    return made
