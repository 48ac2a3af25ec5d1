"""Numbers about the project's structure, of this checkout or of another one.

    python tools/structure.py [--json] [FOLDER]

Reads the sources and runs none of them. Needs grimp, which comes with import-linter. What counts
as a mutable attribute stands in `mutable_state.py`, and which walks are counted in `walks.py`.
"""

from __future__ import annotations

import argparse
import ast
import io
import json
import re
import statistics
import sys
import tokenize
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import grimp

from comparisons import comparisons
from inference import Class, Program
from mutable_state import MutableState
from sources import PACKAGES, Module, Names, files, product
from syntax import FUNCTIONS, Function, last_word
from walks import WALKS

OWNERS: Final = ("*/policies.py", "*/rules/*")
"""Where the names of rules and modes mean something: their policies, and the rules' arithmetic."""

CHARGE_COUNTS: Final = (
    "xpeer/privacy/ledger_file.py:head.counter",
    "xpeer/privacy/charges.py:Chain.charges|ChargeChain.charges",
    "xpeer/privacy/register_file.py:ledgers.counter",
    "xpeer/training/ipc.py:Progressed.ledger_counter",
    "xpeer/training/handle.py:TrainerProcess.ledger_counter",
    "daemon/xpeer_daemon/partners.py:Record.highest_counter|LedgerWatch.highest",
    "daemon/xpeer_daemon/store.py:peers.ledger_counter",
)
"""Where the number of privacy charges is stored: attributes of classes, or columns of tables."""

MARKER_LINES: Final = 3
"""A file up to this long only marks a package."""
LONG_LINES: Final = 40
LARGEST: Final = 5

Numbers = dict[str, Any]


def measure(root: Path) -> Numbers:
    """Everything, as `--json` prints it.

    Args:
        root: folder of a checkout.

    Raises:
        ValueError: there is no such project.
    """
    modules = product(root)
    if not modules:
        raise ValueError(f"{root} has none of {', '.join(PACKAGES.values())}")
    program = Program(modules)
    return {
        "lines": {
            **{package: lines_of(root, folder) for package, folder in PACKAGES.items()},
            "product": lines_of(root, *PACKAGES.values()),
            "tests": lines_of(root, "tests"),
            "benchmarks": lines_of(root, "benchmarks"),
        },
        "modules": sizes(modules.values()),
        "circles": circles(root, list(PACKAGES), exclude_type_checking=True),
        "circles_with_type_checking": circles(root, list(PACKAGES), exclude_type_checking=False),
        "mutable_attributes": mutable_attributes(program),
        "constructor_arguments": largest(constructor_arguments(program, modules)),
        "functions": functions(modules.values()),
        "comparisons": comparisons(modules, OWNERS),
        "charge_counts": places_of(modules, CHARGE_COUNTS),
        "walks": {name: walked(modules, hops) for name, hops in WALKS.items()},
    }


# Lines


def lines_of(root: Path, *folders: str) -> dict[str, int]:
    """All lines of Python files, and those with code."""
    texts = [path.read_text() for path in files(root, *folders)]
    return {
        "all": sum(len(text.splitlines()) for text in texts),
        "code": sum(len(code_lines(text)) for text in texts),
    }


def code_lines(text: str) -> set[int]:
    """Numbers of the lines that are neither blank nor only comment or docstring."""
    nothing = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT}
    nothing |= {tokenize.ENDMARKER, tokenize.ENCODING}
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in nothing:
            lines |= set(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(text)):  # a string that stands alone documents something
        match node:
            case ast.Expr(value=ast.Constant(value=str()), end_lineno=int(end)):
                lines -= set(range(node.lineno, end + 1))
    return lines


def sizes(modules: Iterable[Module]) -> Numbers:
    """Number, median and largest, in lines, of the modules that are more than a marker."""
    lines = {module.path: len(module.text.splitlines()) for module in modules}
    real = {path: count for path, count in lines.items() if count > MARKER_LINES}
    longest = max(real, key=lambda path: real[path])
    return {
        "count": len(real),
        "median": statistics.median(real.values()),
        "largest": f"{longest} {real[longest]}",
        "markers": len(lines) - len(real),
    }


def functions(modules: Iterable[Module]) -> Numbers:
    """How many there are, and those that are too long."""
    count, long = 0, []
    for module in modules:
        for node in ast.walk(module.tree):
            if isinstance(node, FUNCTIONS):
                count += 1
                lines = (node.end_lineno or node.lineno) - node.lineno + 1
                if lines > LONG_LINES:
                    long.append((lines, f"{module.path}:{node.lineno} {node.name} {lines}"))
    return {"count": count, "long": [text for _, text in sorted(long, reverse=True)]}


# Imports


def circles(root: Path, packages: Sequence[str], *, exclude_type_checking: bool) -> list[list[str]]:
    """Modules that import one another, directly or through others.

    Args:
        root: of the checkout.
        packages: of the product; none of them may be imported in this process.
        exclude_type_checking: leave out imports that are never run.
    """
    folders = {str((root / PACKAGES.get(package, package)).parent) for package in packages}
    sys.path[:0] = folders
    try:
        graph = grimp.build_graph(
            packages[0],
            *packages[1:],
            exclude_type_checking_imports=exclude_type_checking,
            cache_dir=None,
        )
    finally:
        del sys.path[: len(folders)]
    imports = {each: graph.find_modules_directly_imported_by(each) for each in graph.modules}
    return components(imports)


def components(imports: Mapping[str, Iterable[str]]) -> list[list[str]]:
    """Strongly connected components of more than one node, sorted."""
    reached = {node: _reached(node, imports) for node in imports}
    groups = {
        tuple(sorted({node, *(other for other in reached[node] if node in reached[other])}))
        for node in imports
    }
    return [list(each) for each in sorted(groups) if len(each) > 1]


def _reached(start: str, imports: Mapping[str, Iterable[str]]) -> set[str]:
    seen: set[str] = set()
    waiting = [start]
    while waiting:
        new = set(imports.get(waiting.pop(), ())) - seen
        seen |= new
        waiting += new
    return seen


# Classes


def largest(by_class: Mapping[str, Sequence[str]]) -> list[Numbers]:
    """Classes with the most names."""
    order = sorted(by_class, key=lambda key: (-len(by_class[key]), key))
    return [
        {"class": key, "count": len(by_class[key]), "names": list(by_class[key])}
        for key in order[:LARGEST]
    ]


def mutable_attributes(program: Program) -> list[Numbers]:
    """Classes with the most of them; of how many are the class's own, not those of its objects."""
    state = MutableState(program)
    counts = largest({key: sorted(state.names_of(key)) for key in program.classes})
    for each in counts:
        each["own"] = len(state.own_names_of(each["class"]))
    return counts


def constructor_arguments(program: Program, modules: Mapping[str, Module]) -> dict[str, list[str]]:
    """Arguments of each class that writes its own constructor, and fields of those that have one
    made for them and are not frozen. A `TypedDict` that is unpacked counts with all its keys,
    other `**` with all that is given anywhere.
    """
    arguments: dict[str, list[str]] = {}
    for key, each in program.classes.items():
        if "__init__" in each.methods:
            arguments[key] = list(_arguments(each.methods["__init__"], each, program, modules))
        elif program.traits(key) & {"dataclass", "Struct"} and "frozen" not in program.traits(key):
            family = reversed(program.family(key))
            arguments[key] = list(dict.fromkeys(name for c in family for name in _fields(c)))
    return arguments


def _arguments(
    constructor: Function, each: Class, program: Program, modules: Mapping[str, Module]
) -> Iterator[str]:
    given = constructor.args
    plain = [argument.arg for argument in (*given.posonlyargs, *given.args, *given.kwonlyargs)]
    yield from plain[1:]
    if given.vararg is not None:
        yield f"*{given.vararg.arg}"
    if given.kwarg is None:
        return
    packed = program.mentioned(given.kwarg.annotation, each.module)
    keys = [name for kind in packed for c in program.family(kind) for name in c.annotated]
    names = keys or sorted(_given_names(each.key, program, modules) - set(plain))
    yield from (f"**{name}" for name in names or [given.kwarg.arg])


def _given_names(key: str, program: Program, modules: Mapping[str, Module]) -> set[str]:
    return {
        word.arg
        for module in modules.values()
        for call in ast.walk(module.tree)
        if isinstance(call, ast.Call) and program.names.resolve(module.name, call.func) == key
        for word in call.keywords
        if word.arg
    }


def _fields(each: Class) -> Iterator[str]:
    """What the constructor of a dataclass or a Struct takes."""
    for node in each.node.body:
        if isinstance(node, ast.AnnAssign) and last_word(node.annotation) != "ClassVar":
            given = node.value.keywords if isinstance(node.value, ast.Call) else []
            if not any(k.arg == "init" and ast.unparse(k.value) == "False" for k in given):
                yield last_word(node.target)


# Places and walks


def places_of(modules: Mapping[str, Module], places: Sequence[str]) -> dict[str, list[str]]:
    """Which "path:Class.attribute" and "path:table.column" there are, and which are not.

    One that moved counts by its name, if only one module has it; of names between bars the first.
    """
    there, missing = [], []
    for place in places:
        path, _, names = place.partition(":")
        for name in names.split("|"):
            homes = [module.path for module in modules.values() if _has(module, name)]
            home = path if path in homes else homes[0] if len(homes) == 1 else ""
            if home:
                there.append(f"{home}:{name}")
                break
        else:
            missing.append(place)
    return {"there": there, "missing": missing}


def _has(module: Module, place: str) -> bool:
    owner, _, name = place.partition(".")
    column = re.compile(rf"CREATE TABLE (IF NOT EXISTS )?{owner} ?\([^;]*\b{name}\b")
    for node in ast.walk(module.tree):
        match node:
            case ast.Constant(value=str(text)) if column.search(text):
                return True
            case ast.ClassDef(name=word) if word == owner:
                return any(_declares(each, name) for each in ast.walk(node))
    return False


def _declares(node: ast.AST, name: str) -> bool:
    match node:
        case ast.AnnAssign(target=ast.Name(id=word) | ast.Attribute(attr=word)):
            return word == name
        case ast.Attribute(attr=word, ctx=ast.Store()):
            return word == name
    return False


def walked(modules: Mapping[str, Module], hops: Sequence[str]) -> Numbers:
    """Files of a walk. A class that only moved counts by its name, if only one module has it."""
    names = Names(modules)
    homes: dict[str, list[str]] = {}
    for key in names.definitions:
        module, _, name = key.partition(":")
        if name.lstrip("_")[:1].isupper():
            homes.setdefault(name, []).append(module)
    paths: dict[str, None] = {}
    missing, moved = [], []
    for hop in hops:
        there = [each for each in hop.split("|") if each in names.definitions]
        called = [each.partition(":")[2] for each in hop.split("|")]
        elsewhere = [f"{homes[each][0]}:{each}" for each in called if len(homes.get(each, ())) == 1]
        if not there + elsewhere:
            missing.append(hop)
            continue
        if not there:
            moved.append(f"{hop} -> {elsewhere[0]}")
        home = (there + elsewhere)[0].partition(":")[0]
        paths[modules[home].path] = None
    return {"files": len(paths), "paths": list(paths), "moved": moved, "missing": missing}


# Output


def table(numbers: Numbers) -> list[str]:
    """Lines for people: a row for each number, then what the numbers are of."""
    lines, sizes_, functions_ = numbers["lines"], numbers["modules"], numbers["functions"]
    places, long = numbers["charge_counts"], functions_["long"]
    rows = [(f"lines: {name}", f"{n['all']} ({n['code']} code)") for name, n in lines.items()]
    rows += [
        ("modules", f"{sizes_['count']} (and {sizes_['markers']} that only mark a package)"),
        ("median module, lines", f"{sizes_['median']:g}"),
        ("largest module, lines", sizes_["largest"]),
        ("import circles", str(len(numbers["circles"]))),
        ("... with those for types alone", str(len(numbers["circles_with_type_checking"]))),
        (f"functions over {LONG_LINES} lines", f"{len(long)} of {functions_['count']}"),
        ("comparisons with a rule's or mode's name", str(len(numbers["comparisons"]))),
        ("places with the number of charges", f"{len(places['there'])}"),
    ]
    rows += [(f"files: {name}", str(walk["files"])) for name, walk in numbers["walks"].items()]
    return [*(f"{name:<45} {value}" for name, value in rows), *_details(numbers)]


def _details(numbers: Numbers) -> Iterator[str]:
    for name, key in (
        ("Import circles", "circles"),
        ("Import circles with imports for types alone", "circles_with_type_checking"),
    ):
        yield from _titled(name, [" <-> ".join(each) for each in numbers[key]])
    yield from _titled(
        "Mutable attributes (in brackets: without those of objects that only the class makes)",
        [_class(each, f" ({each['own']})") for each in numbers["mutable_attributes"]],
    )
    yield from _titled(
        "Constructor arguments (without frozen dataclasses and Structs)",
        [_class(each) for each in numbers["constructor_arguments"]],
    )
    yield from _titled(f"Functions over {LONG_LINES} lines", numbers["functions"]["long"])
    yield from _titled(f"Comparisons, but for {', '.join(OWNERS)}", numbers["comparisons"])
    places = numbers["charge_counts"]
    missing = [f"not there: {place}" for place in places["missing"]]
    yield from _titled("Places with the number of charges", [*places["there"], *missing])
    for name, walk in numbers["walks"].items():
        notes = [f"moved: {hop}" for hop in walk["moved"]]
        notes += [f"not there: {hop}" for hop in walk["missing"]]
        yield from _titled(f"Files of {name}", [*walk["paths"], *notes])


def _titled(title: str, lines: Sequence[str]) -> Iterator[str]:
    yield ""
    yield f"{title}: {'none' if not lines else ''}".rstrip()
    yield from (f"  {line}" for line in lines)


def _class(each: Numbers, note: str = "") -> str:
    return f"{each['count']}{note} {each['class']}: {', '.join(each['names'])}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the numbers; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="for programs")
    parser.add_argument(
        "folder", nargs="?", type=Path, default=Path(__file__).parents[1], help="another checkout"
    )
    options = parser.parse_args(arguments)
    try:
        numbers = measure(options.folder.resolve())
    except ValueError as e:
        parser.error(str(e))
    print(json.dumps(numbers, indent=2) if options.json else "\n".join(table(numbers)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
