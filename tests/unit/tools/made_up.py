"""Made-up sources, and what tools/ count in them."""

from __future__ import annotations

from textwrap import dedent

from inference import Program
from mutable_state import MutableState
from sources import Module

BAG = """
from dataclasses import dataclass, field
@dataclass
class Bag:
    x: int = 0
    y: int = 0
    items: list = field(default_factory=list)
    still: int = 0
"""
HOLDER = """
class C:
    def __init__(self):
        self.bag = Bag()
    def change(self):
        self.bag.x = 1
        self.bag.y = 2
        self.bag.items.append(3)
"""
"""What only C makes and writes."""

MANIFEST = """
from typing import Literal
Rule = Literal["gossip", "diloco"]
class Round(Struct):
    rule: Rule = "gossip"
class Privacy(Struct):
    mode: Literal["record", "off"] = "record"
"""


def modules_of(**sources: str) -> dict[str, Module]:
    """Modules by name."""
    return {name: Module.of(name, dedent(text)) for name, text in sources.items()}


def names(source: str, of: str = "C", **others: str) -> set[str]:
    """Mutable attributes of a class of the module `made`."""
    program = Program(modules_of(made=source, **others))
    return MutableState(program).names_of(f"made:{of}")
