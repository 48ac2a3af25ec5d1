"""Mutable attributes of objects that a class holds: rules 4 and 5, and ways around them."""

from __future__ import annotations

import pytest

from tests.unit.tools.made_up import BAG, HOLDER, names

FIELDS = {"bag.x", "bag.y", "bag.items"}


def test_an_object_that_only_this_class_makes_and_writes_counts_with_its_fields() -> None:
    assert names(BAG + HOLDER) == FIELDS
    assert names(BAG + HOLDER, "Bag") == {"x", "y", "items"}


def test_fields_that_its_own_methods_change_count_too() -> None:
    source = BAG.replace("    x: int", "    def go(self):\n        self.still = 1\n    x: int")
    assert names(source + HOLDER) == {*FIELDS, "bag.still"}


def test_what_it_is_annotated_as_changes_nothing() -> None:
    source = HOLDER.replace("self.bag =", "self.bag: object =")
    assert names(BAG + source) == FIELDS


def test_bags_in_bags_count_with_all_they_hold() -> None:
    source = """
        class Inner:
            def __init__(self):
                self.x = 0
        class Outer:
            def __init__(self):
                self.inner = Inner()
                self.y = 0
            def change(self):
                self.inner.x = 1
        class C:
            def __init__(self):
                self.outer = Outer()
            def change(self):
                self.outer.y = 1
    """
    assert names(source) == {"outer.y", "outer.inner.x"}


def test_bags_that_hold_each_other_count_once() -> None:
    source = """
        class C:
            def __init__(self):
                self.d = D()
            def change(self):
                self.d.x = 1
        class D:
            def __init__(self):
                self.x = 0
                self.c = C()
            def change(self):
                self.c.y = 1
    """
    assert names(source) == {"y", "d.x"}


def test_a_bag_in_a_container_counts_with_its_fields_beside_the_container() -> None:
    source = """
class C:
    def __init__(self):
        self.bags: dict[str, Bag] = {}
    def change(self, key: str):
        bag = self.bags.setdefault(key, Bag())
        bag.x = 1
"""
    assert names(BAG + source) == {"bags", "bags.x"}


@pytest.mark.parametrize(
    "maker",
    [
        "def made() -> Bag:\n    return Bag()",
        "def made() -> Bag:\n    return made_too()\ndef made_too() -> Bag:\n    return Bag()",
    ],
)
def test_a_factory_that_only_this_class_calls_makes_it_for_this_class(maker: str) -> None:
    holder = HOLDER.replace("Bag()", "made()")
    assert names(f"{BAG}{holder}{maker}") == FIELDS
    others = "\nclass Other:\n    def f(self):\n        return made()"
    assert names(f"{BAG}{holder}{maker}{others}") == {"bag"}


def test_so_does_a_class_method_of_the_bag() -> None:
    bag = BAG + "    @classmethod\n    def made(cls) -> 'Bag':\n        return cls()\n"
    assert names(bag + HOLDER.replace("Bag()", "Bag.made()")) == FIELDS


def test_an_annotation_says_what_an_attribute_holds_not_how_it_was_computed() -> None:
    source = """
class C:
    total: int
    def __init__(self, bags: list[Bag]):
        self.total = sum(bags)
    def change(self, bag: Bag):
        bag.x = 1
"""
    assert names(BAG + source) == set()


@pytest.mark.parametrize("change", ["write(self.bag)", "call(partial(write, self.bag))"])
def test_a_function_that_only_this_class_calls_writes_for_it(change: str) -> None:
    source = f"""
class C:
    def __init__(self):
        self.bag = Bag()
    def change(self):
        {change}
def write(bag: Bag):
    bag.x = 1
"""
    assert names(BAG + source) == {"bag.x"}


def test_a_setter_is_a_write_and_another_method_is_none() -> None:
    source = """
        class Bag:
            def __init__(self):
                self.x = 0
                self.count = 0
            def set_x(self, x):
                '''Set it.'''
                self.x = x
            def work(self):
                self.count += 1
        class C:
            def __init__(self):
                self.bag = Bag()
            def change(self):
                self.bag.{call}
    """
    assert names(source.replace("{call}", "set_x(1)")) == {"bag.x", "bag.count"}
    assert names(source.replace("{call}", "work()")) == set()


def test_a_property_with_a_setter_is_written_like_an_attribute() -> None:
    source = """
        class Bag:
            def __init__(self):
                self._x = 0
            @property
            def x(self): return self._x
            @x.setter
            def x(self, x): self._x = x
        class C:
            def __init__(self):
                self.bag = Bag()
            def change(self):
                self.bag.x = 1
    """
    assert names(source) == {"bag._x"}


def test_an_object_counts_with_at_least_one() -> None:
    source = """
        class Bag:
            def __init__(self): self.kept = Kept()
            @property
            def x(self): return 0
            @x.setter
            def x(self, x): print(x)
        class C:
            def __init__(self):
                self.bag = Bag()
            def change(self):
                self.bag.x = 1
    """
    assert names(source) == {"bag"}


def test_an_object_that_others_make_too_counts_as_one() -> None:
    assert names(BAG + HOLDER + "\ndef f(): return Bag()\n") == {"bag"}
    assert names(BAG + HOLDER + "\ndef f(): return list(map(Bag, range(3)))\n") == {"bag"}


def test_to_check_for_a_class_makes_no_object_of_it() -> None:
    assert names(BAG + HOLDER + "\ndef f(x): return isinstance(x, Bag)\n") == FIELDS


def test_an_object_that_is_handed_in_counts_as_one_if_it_is_written() -> None:
    given = HOLDER.replace(
        "(self):\n        self.bag = Bag()", "(self, bag: Bag):\n        self.bag = bag"
    )
    assert "bag: Bag" in given
    assert names(BAG + given) == {"bag"}
    reads = """
class C:
    def __init__(self, bag: Bag):
        self.bag = bag
    def read(self):
        return self.bag.x
def f(bag: Bag):
    bag.x = 1
"""
    assert names(BAG + reads) == set()


def test_an_object_that_is_reached_through_another_counts_for_both() -> None:
    source = """
class Holder:
    def __init__(self):
        self.bag = Bag()
class C:
    def __init__(self, holder: Holder):
        self.holder = holder
    def change(self):
        bag = self.holder.bag
        bag.x = 1
"""
    assert names(BAG + source) == {"holder"}


def test_a_dataclass_counts_with_fields_that_are_ever_bound_again() -> None:
    source = BAG + "def f(bag: Bag):\n    bag.y += 1\n    bag.items.clear()\n"
    assert names(source, "Bag") == {"y", "items"}


def test_a_frozen_dataclass_counts_with_what_it_holds_that_changes() -> None:
    source = BAG.replace("@dataclass", "@dataclass(frozen=True)")
    source += "def f(bag: Bag):\n    bag.items.clear()\n"
    assert names(source, "Bag") == {"items"}
