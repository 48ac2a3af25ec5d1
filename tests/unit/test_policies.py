"""Names of rules and privacy modes are compared by nobody: code asks their policies."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Final, get_args

import pytest
import torch

from xpeer.accounts.chain import ChargeContext
from xpeer.manifest.privacy import Privacy
from xpeer.manifest.round import Round
from xpeer.mixing import rules
from xpeer.policies import MODES, RULES, PrivacyMode, RuleName, privacy_policy

ROOT: Final = Path(__file__).parents[2]
PRODUCT: Final = ("xpeer", "daemon", "bootstrap")
OWNERS: Final = ("xpeer/policies.py", "xpeer/mixing/rules/")
"""Where names mean something: the policies, and the classes that do the arithmetic."""
KINDS: Final = {
    *("Rule", "GradientAveraging", "DiLoCo", "NoLoCo", "GASLoC"),
    *("Mechanism", "RecordMechanism", "OffMechanism", "IdleMechanism"),
}
UNITS: Final = {"unit", "kind", "row"}
"""What else may be "record": the unit of privacy, and a register's row, which begins with it."""


def words_in(*nodes: ast.AST) -> tuple[set[str], set[str]]:
    """Identifiers of expressions, and the names of rules and modes among their constants."""
    identifiers: set[str] = set()
    names: set[str] = set()
    for node in nodes:
        for each in ast.walk(node):
            match each:
                case ast.Name(id=word) | ast.Attribute(attr=word):
                    identifiers.add(word)
                case ast.Constant(value=str(word)) if word in RULES or word in MODES:
                    names.add(word)
                case ast.Constant(value=str(word)):
                    identifiers.add(word)  # a key: privacy["mode"]
    return identifiers, names


def is_comparison(node: ast.AST, *, strict: bool = True) -> bool:
    """Whether it asks which rule or mode something is, or of which class.

    Args:
        node: of the tree.
        strict: "gossip" is always a rule. Else only beside something that is called rule or mode:
            benchmarks have methods of their own by some of these names.
    """
    match node:
        case ast.Compare(left=left, comparators=right):
            identifiers, names = words_in(left, *right)
        case ast.Match(subject=subject, cases=cases):
            identifiers, names = words_in(subject, *(case.pattern for case in cases))
        case ast.Call(func=ast.Name(id="isinstance" | "issubclass"), args=[_, kinds]):
            identifiers, names = words_in(kinds)
        case _:
            return False
    if identifiers & KINDS or (names and identifiers & {"rule", "mode"}):
        return True
    return bool(names) and strict and not (names == {"record"} and identifiers & UNITS)


def is_table(node: ast.AST) -> bool:
    """Whether it is a collection of such names, or keyed by them."""
    words: list[ast.expr | None] = []
    if isinstance(node, ast.Dict):
        words += node.keys
    elif isinstance(node, (ast.Set, ast.List)) or (isinstance(node, ast.Tuple) and node.elts[1:]):
        words += node.elts
    texts = [word.value for word in words if isinstance(word, ast.Constant)]
    return bool(words) and len(texts) == len(words) and all(t in RULES or t in MODES for t in texts)


def nodes_of(*folders: str) -> Iterator[tuple[str, ast.AST]]:
    """Every expression of the sources but the owners', and where it stands."""
    for folder in folders:
        for path in sorted((ROOT / folder).rglob("*.py")):
            name = path.relative_to(ROOT).as_posix()
            if not name.startswith(OWNERS):
                for node in ast.walk(ast.parse(path.read_text())):
                    yield f"{name}:{getattr(node, 'lineno', 0)}", node


def test_nobody_compares_the_name_of_a_rule_or_of_a_mode() -> None:
    assert [where for where, node in nodes_of(*PRODUCT) if is_comparison(node)] == []
    benchmarks = nodes_of("benchmarks")
    assert [where for where, node in benchmarks if is_comparison(node, strict=False)] == []


def test_nobody_else_keeps_a_table_of_rules_or_of_modes() -> None:
    assert [where for where, node in nodes_of(*PRODUCT) if is_table(node)] == []


@pytest.mark.parametrize(
    "code",
    [
        'manifest.round.rule == "gradient"',
        '"gossip" != anything',
        'self.rule not in ("diloco", "noloco")',
        'privacy["mode"] == "off"',
        'known.privacy.mode != "off"',
        'rules.mode != "record"',
        "isinstance(rule, rules.GradientAveraging)",
        "isinstance(mechanism, (IdleMechanism, int))",
        "type(meeting.rule) is Rule",
        'match rule:\n    case "asynchronous":\n        pass',
    ],
)
def test_a_comparison_is_noticed(code: str) -> None:
    assert any(map(is_comparison, ast.walk(ast.parse(code))))


@pytest.mark.parametrize("code", ['rules.unit == "record"', 'self._mode == "pause"', "a != mode"])
def test_other_comparisons_are_not(code: str) -> None:
    assert not any(map(is_comparison, ast.walk(ast.parse(code))))


@pytest.mark.parametrize(
    "code", ['{"off": "PRIVACY OFF"}', '{"diloco", "noloco"}', '("off", "record")']
)
def test_a_table_is_noticed(code: str) -> None:
    assert any(map(is_table, ast.walk(ast.parse(code))))


def test_every_name_of_a_manifest_has_its_policy() -> None:
    assert list(RULES) == list(get_args(RuleName))
    assert set(get_args(PrivacyMode)) < set(MODES)


def test_policies_need_the_standard_library_alone() -> None:
    """The daemon and every light command read them."""
    tree = ast.parse((ROOT / "xpeer/policies.py").read_text())
    imported = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert not any(isinstance(node, ast.Import) for node in ast.walk(tree))
    assert imported <= sys.stdlib_module_names | {"collections.abc"}


@pytest.mark.parametrize("name", RULES)
def test_a_rule_sends_and_waits_as_its_policy_says(name: RuleName) -> None:
    policy = RULES[name]
    round_ = Round(rule=name, fragments=policy.fragments or 5, group=policy.group or 0)
    rule, theta = rules.make(round_), torch.zeros(7)
    rule.begin(0, theta)
    if rule.gradients is not None:
        rule.gradients.accumulate(torch.ones(7))
    assert rule.outgoing(0, theta).numel() == policy.vectors * theta.numel()
    assert rule.vectors == policy.vectors
    assert (rule.gradients is not None) == policy.waits


@pytest.mark.parametrize("name", [name for name in RULES if RULES[name].misfit])
def test_a_rule_refuses_the_groups_that_its_policy_excludes(name: RuleName) -> None:
    policy = RULES[name]
    assert policy.group is not None
    Round(rule=name, group=policy.group, fragments=policy.fragments or 5).check()
    with pytest.raises(ValueError, match=f"round.rule = {name} ") as refused:
        Round(rule=name, group=3, fragments=policy.fragments or 5).check()
    assert str(refused.value) == policy.misfit


def test_what_the_modes_ask_for() -> None:
    record, off = Privacy(mode="record").policy, Privacy(mode="off").policy
    assert (record.clips_records, record.charges, record.hides_batches) == (True, True, True)
    assert (off.clips_records, off.charges, off.hides_batches) == (False, False, False)
    assert record.warning == ""
    assert off.warning.startswith("PRIVACY OFF")


@pytest.mark.parametrize("mode", ["update", "tomorrow's"])
def test_a_mode_that_nobody_trains_under_counts_as_one_that_charges(mode: str) -> None:
    policy = privacy_policy(mode)
    assert (policy.clips_records, policy.charges, policy.hides_batches) == (False, True, True)


def test_charges_of_the_removed_mode_are_counted_by_shard() -> None:
    """Early versions noted no unit with them."""
    assert ChargeContext("s", "update", 1.0, 1e-5, 8.0).exact_unit == "shard"
    assert ChargeContext("s", "record", 1.0, 1e-5, 8.0, cut="128 byte tokens").exact_unit.endswith(
        "tokens"
    )


@pytest.mark.parametrize("name", RULES)
def test_a_rule_saves_as_much_as_its_policy_says(name: RuleName) -> None:
    policy = RULES[name]
    round_ = Round(rule=name, fragments=policy.fragments or 5, group=policy.group or 0)
    rule, theta = rules.make(round_), torch.zeros(7)
    rule.begin(0, theta)
    if (gradients := rule.gradients) is not None:
        gradients.accumulate(torch.ones(7))
    sent = rule.outgoing(0, theta).view(policy.vectors, 7)
    rule.merged(0, rule.correct(0, theta, sent, torch.zeros_like(sent)).state)
    assert sum(value.numel() for value in rule.state().values()) == 7 * policy.saved
    assert policy.saved <= policy.kept
