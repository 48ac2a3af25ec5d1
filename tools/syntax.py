"""What single statements and expressions of Python do, as far as one sees it from them alone."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator
from typing import Final, TypeAlias

Function: TypeAlias = ast.FunctionDef | ast.AsyncFunctionDef
Definition: TypeAlias = Function | ast.ClassDef
FUNCTIONS: Final = (ast.FunctionDef, ast.AsyncFunctionDef)


def dotted(expression: ast.AST | None) -> list[str]:
    """["a", "b"] of `a.b`; empty if there is more to it than names."""
    match expression:
        case ast.Name(id=word):
            return [word]
        case ast.Attribute(value=value, attr=word):
            before = dotted(value)
            return [*before, word] if before else []
    return []


def last_word(expression: ast.AST | None) -> str:
    """Of `a.b` and `f().b` "b"; "" if it ends otherwise. Of `dict[str, int]` "dict"."""
    match expression:
        case ast.Subscript(value=value):
            return last_word(value)
        case ast.Name(id=word) | ast.Attribute(attr=word):
            return word
    return ""


def definitions(body: Iterable[ast.AST], prefix: str = "") -> Iterator[tuple[str, Definition]]:
    """Functions, classes and their methods with qualified names; none that a function defines."""
    for node in body:
        match node:
            case ast.FunctionDef() | ast.AsyncFunctionDef():
                yield prefix + node.name, node
            case ast.ClassDef():
                yield prefix + node.name, node
                yield from definitions(node.body, f"{prefix}{node.name}.")
            case ast.If() | ast.Try() | ast.With() | ast.ExceptHandler():
                yield from definitions(ast.iter_child_nodes(node), prefix)


def walk(node: ast.AST, *, later: bool = False) -> Iterator[tuple[ast.AST, bool]]:
    """Every node, and whether it runs later: in a function or lambda that is defined here."""
    later = later or isinstance(node, (*FUNCTIONS, ast.Lambda))
    yield node, later
    for child in ast.iter_child_nodes(node):
        yield from walk(child, later=later)


def bound(node: ast.AST) -> Iterator[tuple[ast.expr, ast.expr | None]]:
    """Targets that a node binds or deletes, each with its value; None: the value is unknown.

    `a, b = c, d` is taken apart, and `for x in (a, b)` binds x to both.
    """
    match node:
        case ast.Assign(targets=targets, value=value):
            for target in targets:
                yield from _pairs(target, value)
        case ast.AnnAssign(target=target, value=ast.expr() as value):
            yield target, value
        case ast.NamedExpr(target=target, value=value) | ast.AugAssign(target=target, value=value):
            yield target, value
        case (
            ast.For(target=target, iter=value)
            | ast.AsyncFor(target=target, iter=value)
            | ast.comprehension(target=target, iter=value)
        ):
            yield target, value
            if isinstance(value, (ast.Tuple, ast.List)):
                yield from ((target, each) for each in value.elts)
        case ast.withitem(context_expr=value, optional_vars=ast.expr() as target):
            yield target, value
        case ast.Delete(targets=targets):
            yield from ((target, None) for target in targets)


def _pairs(target: ast.expr, value: ast.expr) -> Iterator[tuple[ast.expr, ast.expr | None]]:
    match target, value:
        case (ast.Tuple(elts=left), ast.Tuple(elts=right)) if len(left) == len(right):
            for one, other in zip(left, right, strict=True):
                yield from _pairs(one, other)
        case _:
            yield target, value


def keys_of_value(value: ast.expr | None) -> Iterator[str]:
    """`["a"]` for literal keys of a dict; `.a` for fields that `replace` changes."""
    match value:
        case ast.Dict(keys=keys):
            for key in keys:
                if isinstance(key, ast.Constant) and isinstance(key.value, str):
                    yield f'["{key.value}"]'
        case ast.BinOp(left=left, right=right):
            yield from keys_of_value(left)
            yield from keys_of_value(right)
        case ast.Call(func=function, keywords=keywords):
            form = {"dict": '["{}"]', "replace": ".{}"}.get(last_word(function), "")
            yield from (form.format(each.arg) for each in keywords if each.arg and form)


def keys_of_call(call: ast.Call) -> Iterator[str]:
    """What `update(a=1)`, `update({"a": 1})`, `setdefault("a", 1)` and `pop("a")` write."""
    match last_word(call.func), call.args:
        case "update", []:
            yield from (f'["{each.arg}"]' for each in call.keywords if each.arg)
        case "update", [changes]:
            yield from keys_of_value(changes)
        case "setdefault" | "pop", [ast.Constant(value=str(word)), *_]:
            yield f'["{word}"]'


def is_property(method: Function) -> bool:
    """Whether reading the attribute calls it."""
    return bool({last_word(each) for each in method.decorator_list} & _PROPERTIES)


_PROPERTIES: Final = {"property", "cached_property"}


def only_gives(method: Function) -> str:
    """The attribute that a property gives as it is; "" if it does more."""
    match method.body[-1]:
        case ast.Return(value=ast.Attribute(value=ast.Name(), attr=name)) if is_property(method):
            return name
    return ""


def only_sets(method: Function) -> bool:
    """Whether a method does nothing but put its arguments into attributes."""
    names = [each.arg for each in (*method.args.args, *method.args.kwonlyargs)]
    if not names:  # it has no object
        return False
    me, *arguments = names
    body = method.body[1:] if ast.get_docstring(method) is not None else method.body
    return bool(body) and all(
        isinstance(node, (ast.Assign, ast.AnnAssign))
        and last_word(node.value) in arguments
        and isinstance(node.value, ast.Name)
        and all(dotted(target)[:-1] == [me] for target, _ in bound(node))
        for node in body
    )
