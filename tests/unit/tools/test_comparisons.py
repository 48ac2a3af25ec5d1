"""Where code asks for a rule or a privacy mode by its name."""

from __future__ import annotations

import pytest

from comparisons import comparisons, names_of
from sources import Module
from tests.unit.tools.made_up import MANIFEST, modules_of


def compared(code: str, **others: str) -> list[str]:
    texts = {"policies": 'RULES = {"gossip": 1, "diloco": 2}', "made": code, **others}
    modules = modules_of(**texts)
    modules["xpeer.manifest"] = Module.of("xpeer.manifest", MANIFEST)
    return comparisons(modules, ["policies.py"])


def test_the_names_are_the_manifests_and_those_of_the_past() -> None:
    modules = {"xpeer.manifest": Module.of("xpeer.manifest", MANIFEST)}
    assert names_of(modules) == {"gossip", "diloco", "record", "off", "update"}
    with pytest.raises(ValueError, match="no names"):
        names_of(modules_of(made="a = 1"))


@pytest.mark.parametrize(
    "code",
    [
        'x.rule == "gossip"',
        '"off" != anything',
        'x.mode != "record"',
        'self._mode == "update"',
        'x["mode"] == "record"',
        'x.rule in ("gossip", "diloco")',
        'rule not in {"diloco"}',
        'OFF = "off"\nx.mode == OFF',
        'PLAIN = ("gossip",)\nx.rule in PLAIN',
        'match x.rule:\n    case "gossip" | "other": pass',
        '{"off": 1, "record": 2}[x.mode]',
        'TABLE = {"gossip": 1}\nTABLE[x]',
        'TABLE = {"gossip": 1}\nTABLE.get(x.rule)',
        'TABLE = {"gossip": 1}\nx.rule in TABLE',
        'x["gossip"]',
        'from policies import RULES\nRULES["gossip"]',
        'from policies import RULES\nRULES[x] if x.rule == "diloco" else 0',
    ],
)
def test_to_ask_for_a_name_is_found(code: str) -> None:
    [place] = compared(code)
    assert place.startswith("made.py:")


@pytest.mark.parametrize(
    "code",
    [
        'x.unit == "record"',
        'row[1] != "record"',
        'self.mode == "pause"',
        "x.policy.waits",
        "x.rule == y.rule",
        'def f(x: Literal["gossip"]): ...',
        'row["record"]',
        'TABLE = {"gossip": 1}\nx in TABLE.values()',
        "from policies import RULES\nRULES[x.rule]",
    ],
)
def test_other_code_is_not(code: str) -> None:
    assert compared(code) == []


def test_owners_may_compare_and_every_place_counts() -> None:
    code = 'a = x.rule == "gossip" or x.rule == "diloco"\nx.mode == "off"'
    assert compared("", policies=code) == []
    assert compared(code) == [
        "made.py:1 x.rule == 'gossip'",
        "made.py:1 x.rule == 'diloco'",
        "made.py:2 x.mode == 'off'",
    ]
