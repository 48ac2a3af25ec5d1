"""The other numbers of tools/structure.py, and the script itself."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from comparisons import names_of
from inference import Program
from sources import product
from structure import (
    CHARGE_COUNTS,
    circles,
    code_lines,
    components,
    constructor_arguments,
    functions,
    lines_of,
    main,
    mutable_attributes,
    places_of,
    sizes,
    walked,
)
from tests.unit.tools.made_up import BAG, HOLDER, MANIFEST, modules_of
from walks import WALKS

ROOT = Path(__file__).parents[3]

# Classes


def test_the_largest_classes_come_first_with_what_is_their_own() -> None:
    counts = mutable_attributes(Program(modules_of(made=BAG + HOLDER + "        self.own = 1\n")))
    assert [(each["class"], each["count"], each["own"]) for each in counts] == [
        ("made:C", 4, 1),
        ("made:Bag", 3, 3),
    ]


def arguments(source: str) -> dict[str, list[str]]:
    modules = modules_of(made=source)
    by_class = constructor_arguments(Program(modules), modules)
    return {key.partition(":")[2]: given for key, given in by_class.items()}


def test_every_argument_of_a_constructor_counts() -> None:
    source = "class C:\n    def __init__(self, a, /, b, *rest, c=1): ..."
    assert arguments(source) == {"C": ["a", "b", "c", "*rest"]}


def test_fields_count_unless_the_class_is_frozen() -> None:
    source = """
        class Base(Struct):
            a: int
        class Fields(Base):
            b: int = 1
        @dataclass
        class Data:
            a: int
            made: int = field(default=1, init=False)
            constant: ClassVar[int] = 1
        @dataclass(frozen=True)
        class Frozen:
            a: int
        class FrozenToo(Struct, frozen=True):
            a: int
    """
    assert arguments(source) == {"Base": ["a"], "Fields": ["a", "b"], "Data": ["a"]}


def test_keywords_in_a_bundle_count_with_all_their_keys() -> None:
    source = """
        class Given(TypedDict):
            x: int
            y: int
        class C:
            def __init__(self, a, **given: Unpack[Given]): ...
        class D:
            def __init__(self, a, **given): ...
        class E:
            def __init__(self, **given): ...
        def f():
            D(a=1, x=2)
            D(1, y=3, z=4)
    """
    assert arguments(source) == {
        "C": ["a", "**x", "**y"],
        "D": ["a", "**x", "**y", "**z"],
        "E": ["**given"],
    }


# Lines, modules, functions, imports

TEXT = '''\
"""Docstring
of two lines."""

# comment
a = """text
is code"""
def f():
    """Docstring."""
    return (
        a  # with a comment
    )
'''


def test_code_is_what_is_neither_blank_nor_comment_nor_docstring() -> None:
    assert code_lines(TEXT) == {5, 6, 7, 9, 10, 11}


def test_lines_of_folders_add_up(tmp_path: Path) -> None:
    for folder in ("a", "b/deep"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "m.py").write_text(TEXT)
    assert lines_of(tmp_path, "a", "b", "not there") == {"all": 22, "code": 12}


def test_files_that_only_mark_a_package_are_no_modules() -> None:
    texts = {"a": "x = 1\n" * 10, "b": "x = 1\n" * 20, "c": '"""Marker."""\n'}
    assert sizes(modules_of(**texts).values()) == {
        "count": 2,
        "median": 15,
        "largest": "b.py 20",
        "markers": 1,
    }


def test_functions_are_too_long_from_their_first_line_to_their_last() -> None:
    at_most, over = (
        "\n".join([f"def {n}():", *["    x = 1"] * k]) for n, k in (("a", 39), ("b", 40))
    )
    nested = "def outer():\n" + "\n".join("    " + line for line in over.splitlines())
    counts = functions(modules_of(m=f"{at_most}\n@wrapped\n{over}", n=nested).values())
    assert counts["count"] == 4
    assert counts["long"] == ["n.py:1 outer 42", "n.py:2 b 41", "m.py:42 b 41"]


def test_components_are_nodes_that_reach_one_another() -> None:
    graph = {"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a", "e"}, "e": {"d"}, "f": {"a"}}
    assert components(graph) == [["a", "b", "c"], ["d", "e"]]


def test_imports_for_types_alone_close_circles_of_their_own(tmp_path: Path) -> None:
    package = tmp_path / "madeupcircles"
    package.mkdir()
    texts = {
        "__init__": "",
        "a": "from madeupcircles import b",
        "b": "def f():\n    from madeupcircles.a import x",
        "c": "import madeupcircles.d",
        "d": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from madeupcircles import c",
    }
    for name, text in texts.items():
        (package / f"{name}.py").write_text(text)
    first = ["madeupcircles.a", "madeupcircles.b"]
    second = ["madeupcircles.c", "madeupcircles.d"]
    groups = circles(tmp_path, ["madeupcircles"], exclude_type_checking=True)
    assert groups == [first]
    groups = circles(tmp_path, ["madeupcircles"], exclude_type_checking=False)
    assert groups == [first, second]


# Places and walks


def test_places_are_attributes_or_columns_and_may_move() -> None:
    modules = modules_of(
        a="class C:\n    x: int\n    def f(self):\n        self.y = 1\n        self.z: int = 1",
        b='A = "CREATE TABLE head (v INTEGER, counter INTEGER); CREATE TABLE t (n INTEGER)"',
    )
    places = ["a.py:C.x", "a.py:C.y", "old.py:C.z", "b.py:head.counter", "b.py:t.n"]
    gone = ["a.py:C.w", "b.py:head.n", "a.py:D.x"]
    assert places_of(modules, places + gone) == {
        "there": ["a.py:C.x", "a.py:C.y", "a.py:C.z", "b.py:head.counter", "b.py:t.n"],
        "missing": gone,
    }


def test_a_walk_counts_files_once_and_says_what_is_not_there() -> None:
    modules = modules_of(
        a="def f(): ...\nclass C:\n    def m(self): ...",
        b="class D:\n    def m(self): ...\ndef g(): ...",
    )
    hops = ["a:f", "a:C.m", "b:g|a:f", "old:h|b:D", "old:D.m", "old:g", "a:C.n"]
    assert walked(modules, hops) == {
        "files": 2,
        "paths": ["a.py", "b.py"],
        "moved": ["old:D.m -> b:D.m"],
        "missing": ["old:g", "a:C.n"],
    }


def test_this_checkout_has_what_is_looked_for() -> None:
    modules = product(ROOT)
    assert places_of(modules, CHARGE_COUNTS)["missing"] == []
    assert {"gossip", "record"} <= names_of(modules)
    for hops in WALKS.values():
        assert walked(modules, hops)["files"] > 5
        assert all(each.count(":") == 1 for hop in hops for each in hop.split("|"))


# The script


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A project of two modules."""
    texts = {
        "xpeer/__init__.py": "",
        "xpeer/manifest.py": MANIFEST,
        "daemon/xpeer_daemon/__init__.py": "",
        "daemon/xpeer_daemon/node.py": BAG + HOLDER,
        "bootstrap/xpeer_bootstrap/__init__.py": "",
        "tests/test_a.py": "x = 1\n",
    }
    for path, text in texts.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)
    return tmp_path


def run(*arguments: str | Path) -> str:
    command = [sys.executable, str(ROOT / "tools/structure.py"), *map(str, arguments)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def test_it_counts_another_checkout(checkout: Path) -> None:
    numbers: dict[str, Any] = json.loads(run("--json", checkout))
    assert numbers["lines"]["tests"] == {"all": 1, "code": 1}
    assert numbers["modules"]["count"] == 2
    assert [each["count"] for each in numbers["mutable_attributes"]] == [3, 3, 0, 0]
    assert numbers["charge_counts"]["there"] == []
    assert run(checkout).startswith("lines: xpeer ")


def test_a_folder_without_the_project_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as refused:
        main([str(tmp_path)])
    assert refused.value.code == 2
