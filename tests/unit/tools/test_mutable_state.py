"""Which attributes of a class are mutable: rules 1 to 3, and ways around them."""

from __future__ import annotations

from textwrap import dedent

import pytest

from tests.unit.tools.made_up import names

EVENTS = "import asyncio\nimport heapq\nimport itertools\n"


# Rule 1: what is bound outside of the constructor


def test_what_only_the_constructor_binds_is_no_state() -> None:
    assert (
        names("class C:\n    def __init__(self):\n        self.a = 1\n        self.a = 2") == set()
    )


@pytest.mark.parametrize(
    "statement",
    [
        "self.a = 1",
        "self.a: int = 1",
        "self.a += 1",
        "self.a, b = 1, 2",
        "[*self.a] = 1, 2",
        "del self.a",
        "for self.a in range(3): pass",
        "with open('x') as self.a: pass",
        "setattr(self, 'a', 1)",
        "object.__setattr__(self, 'a', 1)",
        "(lambda: setattr(self, 'a', 1))()",
        "me = self; me.a = 1",
        "type(self).a = 1",
        "C.a = 1",
    ],
)
def test_what_a_method_binds_is_state_however_it_does(statement: str) -> None:
    source = f"""
        class C:
            def __init__(self):
                self.a = 0
            def change(self):
                {statement}
    """
    assert names(source) == {"a"}


def test_what_is_bound_for_the_first_time_by_a_method_is_state() -> None:
    assert names("class C:\n    def start(self):\n        self.a = 1") == {"a"}


def test_a_method_may_call_its_object_what_it_likes() -> None:
    assert names("class C:\n    def change(this):\n        this.a = 1") == {"a"}


def test_functions_that_a_constructor_defines_run_later() -> None:
    source = """
        class C:
            def __init__(self, on):
                def changed():
                    self.a = 1
                self.a = 0
                on(changed)
    """
    assert names(source) == {"a"}


def test_what_a_base_or_a_mixin_has_a_class_has() -> None:
    source = """
        class Mixin:
            def change(self):
                self.a = 1
        class C(Mixin):
            def change_too(self):
                self.b = 1
    """
    assert names(source) == {"a", "b"}


def test_computed_names_count_once() -> None:
    source = """
        class C:
            def change(self, name):
                setattr(self, name, 1)
                setattr(self, name + "_", 1)
    """
    assert names(source) == {"setattr()"}


@pytest.mark.parametrize(
    "outside",
    [
        "def f(c: C): c.a = 1",
        "def f(c: 'C | None'): c.a = 1",
        "def f(): C().a = 1",
        "def f():\n    c = C()\n    c.a = 1",
        "def f(cs: dict[str, C]): cs['x'].a = 1",
        "def f(cs: dict[str, C]):\n    for key, c in cs.items():\n        c.a = 1",
        "def f(cs: list[C]): [setattr(c, 'a', 1) for c in cs]",
        "def make() -> C: ...\ndef f(): make().a = 1",
        "async def make() -> C: ...\nasync def f():\n    (await make()).a = 1",
        "class D:\n    def __init__(self, c: C):\n        self.c = c\n"
        "    def f(self):\n        self.c.a = 1",
        "class D:\n    @property\n    def c(self) -> C: ...\ndef f(d: D): d.c.a = 1",
        "def f(x):\n    if isinstance(x, C):\n        x.a = 1",
        "Cs = list[C]\ndef f(cs: Cs): cs[0].a = 1",
        "THE = C()\ndef f(): THE.a = 1",
        "THE = C()\nTHE.a = 1",
    ],
)
def test_what_others_bind_is_state_if_the_class_can_be_told(outside: str) -> None:
    other = "class Other:\n    def __init__(self):\n        self.a = 0\n"
    source = "class C:\n    def __init__(self):\n        self.a = 0\n" + other + outside
    assert names(source) == {"a"}
    assert names(source, "Other") == set()


def test_an_object_of_no_known_class_is_of_the_only_one_with_such_an_attribute() -> None:
    one = "class C:\n    def __init__(self):\n        self.a = 0\ndef f(x): x.a = 1\n"
    assert names(one) == {"a"}
    two = one + "class D:\n    def __init__(self):\n        self.a = 0\n"
    assert names(two) == names(two, "D") == set()


def test_a_class_of_another_module_is_known_by_its_import() -> None:
    source = "class C:\n    def __init__(self):\n        self.a = self.b = 0"
    other = "from made import C as Made\ndef f(c: Made): c.a = 1"
    another = "import made\ndef f(c: made.C): c.b = 1"
    twice = "class C:\n    def __init__(self):\n        self.a = self.b = 0"
    assert names(source, other=other, another=another, twice=twice) == {"a", "b"}


def test_whoever_obeys_a_protocol_has_the_state_not_the_protocol() -> None:
    source = """
        from typing import Protocol
        class Like(Protocol):
            a: int
        class C:
            def __init__(self):
                self.a = 0
        def f(x: Like): x.a = 1
    """
    assert names(source) == {"a"}
    assert names(source, "Like") == set()


# Rule 2: what is changed in place


@pytest.mark.parametrize(
    ("made", "change"),
    [
        ("[]", "self.a.append(1)"),
        ("[]", "self.a[0] = 1"),
        ("{}", "del self.a[1]"),
        ("{}", "self.a[1] += 1"),
        ("set()", "self.a.add(1)"),
        ("asyncio.Event()", "self.a.set()"),
        ("asyncio.Queue()", "self.a.put_nowait(1)"),
        ("itertools.count()", "next(self.a)"),
        ("[]", "heapq.heappush(self.a, 1)"),
        ("torch.zeros(3)", "self.a.add_(1)"),
        ("{}", "self.a[1].append(2)"),
        ("{}", "self.a.setdefault(1, []).append(2)"),
        ("{}", "self.a.get(1).append(2)"),
        ("[]", "mine = self.a; mine.append(1)"),
        ("[]", "mine = self.a; yours = mine; yours.append(1)"),
        ("[]", "one, mine = 1, self.a; mine.append(1)"),
        ("[]", "[each.clear() for each in (self.a, [])]"),
        ("{}", "inner = self.a.setdefault(1, []); inner.append(1)"),
        ("[]", "self.same.append(1)"),
        ("[]", "fill(self.a)"),
        ("[]", "fill(into=self.a)"),
        ("[]", "hand_on(self.a)"),
        ("[]", "Filler(self.a)"),
        ("[]", "FillerToo(self.a)"),
    ],
)
def test_a_container_that_is_changed_in_place_is_state(made: str, change: str) -> None:
    source = f"""
        class C:
            def __init__(self):
                self.a = {made}
                self.still = []
            @property
            def same(self):
                return self.a
            def change(self):
                {change}
        def fill(into):
            into.append(1)
        def hand_on(items):
            fill(items)
        class Filler:
            def __init__(self, items):
                self.items = items
            def fill(self):
                self.items.append(1)
        @dataclass
        class FillerToo:
            items_too: list
            def fill(self):
                self.items_too.append(1)
    """
    assert names(EVENTS + dedent(source)) == {"a"}


def test_others_may_change_it() -> None:
    source = """
        class C:
            def __init__(self):
                self.a = []
                self.b = []
        def f(c: C):
            c.a.append(1)
            fill(c.b)
        def fill(items):
            items.append(1)
    """
    assert names(source) == {"a", "b"}


def test_what_the_constructor_fills_is_no_state() -> None:
    source = """
        class C:
            def __init__(self):
                self.a = []
                self.a.append(1)
            def read(self):
                return self.a[0], self.a.copy(), len(self.a)
    """
    assert names(source) == set()


def test_an_objects_own_method_is_no_change_of_a_container() -> None:
    source = """
        class Log:
            def add(self, line): print(line)
        class C:
            def __init__(self, log: Log):
                self.log = log
            def note(self):
                self.log.add("x")
    """
    assert names(source) == set()


def test_a_container_of_the_class_body_is_state_too() -> None:
    source = "class C:\n    a = []\n    def change(self):\n        self.a.append(1)"
    assert names(source) == {"a"}


@pytest.mark.parametrize(
    "change",
    [
        'self.a["x"] = 1; self.a["y"] += 1',
        "self.a.update(x=1, y=2)",
        'self.a.update({"x": 1, "y": 2})',
        'self.a.setdefault("x", 1); self.a.pop("y")',
        'self.a[X] = 1; self.a["y"] = 1',
        'self.a = {**self.a, "x": 1, "y": 2}',
        'self.a = self.a | {"x": 1, "y": 2}',
        'self.a |= {"x": 1, "y": 2}',
        "self.a = dict(self.a, x=1, y=2)",
    ],
)
def test_a_dict_counts_with_all_literal_keys_that_it_is_written_under(change: str) -> None:
    source = f"""
        X = "x"
        class C:
            def __init__(self):
                self.a = {{}}
            def change(self):
                {change}
    """
    assert names(source) == {'a["x"]', 'a["y"]'}


def test_keys_that_a_dict_begins_with_count_if_it_is_changed_under_any() -> None:
    source = """
        class C:
            def __init__(self):
                self.a = {"x": 0, "y": 0}
                self.constant = {"x": 0}
            def change(self, key):
                self.a[key] = 1
    """
    assert names(source) == {'a["x"]', 'a["y"]'}


def test_literal_keys_count_at_any_depth() -> None:
    source = """
        class C:
            def __init__(self):
                self.a = {}
            def change(self, peer):
                self.a[peer]["x"] = 1
                self.a[peer].update(y=2)
                self.a["z"]["x"] = 1
    """
    assert names(source) == {'a["x"]', 'a["y"]', 'a["z"]["x"]'}


def test_a_typed_dict_counts_with_all_its_keys() -> None:
    source = """
        from typing import TypedDict
        class Base(TypedDict):
            x: int
        class Bag(Base):
            y: int
        class C:
            def __init__(self, a: Bag, constant: Bag):
                self.a = a
                self.constant = constant
            def change(self, **changes):
                self.a.update(**changes)
    """
    assert names(source) == {'a["x"]', 'a["y"]'}


def test_a_frozen_bag_that_is_replaced_counts_with_what_changes() -> None:
    source = """
        from dataclasses import dataclass, replace
        @dataclass(frozen=True)
        class Bag:
            x: int = 0
            y: int = 0
            z: int = 0
        class C:
            def __init__(self):
                self.a = Bag()
            def change(self):
                self.a = replace(self.a, x=1)
                self.a = replace(self.a, y=1)
    """
    assert names(source) == {"a.x", "a.y"}


def test_attributes_of_other_libraries_objects_count() -> None:
    source = """
        from types import SimpleNamespace
        class C:
            def __init__(self, given):
                self.made = SimpleNamespace()
                self.given = given
            def change(self):
                self.made.x = 1
                self.made.items.append(1)
                self.given.x = self.given.y = 1
    """
    assert names(source) == {"made.x", "made.items", "given"}


def test_writing_into_an_objects_dict_counts_its_keys() -> None:
    source = """
        class C:
            def change(self):
                self.__dict__["x"] = 1
                self.__dict__.update(y=2)
    """
    assert names(source) == {'__dict__["x"]', '__dict__["y"]'}


# Rule 3: what is promised and not there


def test_what_is_annotated_and_not_set_is_state() -> None:
    source = """
        from typing import ClassVar
        class C:
            in_body: int
            set_in_body: int = 1
            set_later: int
            constant: ClassVar[int]
            below: int
            def __init__(self):
                self.in_constructor: int
                self.set_later = 1
                self.both: int
                self.both = 1
        class D(C):
            below = 1
    """
    assert names(source) == {"in_body", "in_constructor"}


@pytest.mark.parametrize(
    "head",
    [
        "@dataclass\nclass C:",
        "class C(Struct, frozen=True):",
        "class C(Protocol):",
        "class C(TypedDict):",
        "class C(NamedTuple):",
    ],
)
def test_fields_are_no_promises(head: str) -> None:
    assert names(f"{head}\n    a: int") == set()
