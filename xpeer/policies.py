"""Policies of the aggregation rules and of the privacy modes, by their names in the manifest.

Code that behaves differently under some rule or mode asks for a policy's attribute and compares no
names (tests/unit/test_policies.py), so that a new rule or mode says here once what it asks for.

Knows neither torch nor the manifest. The arithmetic of rules is in `xpeer/mixing/rules`, the
mechanisms of modes are in `xpeer/privacy`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final, Literal

RuleName = Literal[
    "gossip", "fedavg", "dynamic", "asynchronous", "gradient", "diloco", "noloco", "gasloc"
]
PrivacyMode = Literal["record", "off"]
Weighting = Literal["equal", "tokens", "quality"]
"""What a partner counts by: as much as we do, its tokens per second, or its loss on the public
text."""


@dataclass(frozen=True, slots=True)
class OuterRates:
    """Constants of a rule's outer optimiser as its paper has them."""

    rate: float
    momentum: float
    consensus: float


@dataclass(frozen=True, slots=True)
class RulePolicy:
    """What a rule asks of those who match, schedule, charge and send for it."""

    weighting: Weighting = "equal"
    vectors: int = 1
    """V: values that travel for each parameter of a fragment."""
    waits: bool = False
    """True iff a window's steps end in one optimiser step that waits for the group's answer. The
    parameters stay where they are until then."""
    uses_slots: bool = True
    """False: a member that trains meets anybody who is free, at any time. Once its training is
    over, it uses slots as all do."""
    needs_only_sum: bool = False
    """True iff a group's plain sum is all that it asks for, so that masks may hide the rest."""
    outer: OuterRates | None = None
    """None: it has no outer optimiser."""
    group: int | None = None
    """The only `round.group` that it works with. None: any."""
    fragments: int | None = None
    """The only `round.fragments` that it works with. None: any."""
    misfit: str = ""
    """What a founder reads who asks for another group or number of fragments."""

    def fits(self, group: int, fragments: int) -> bool:
        """Whether it works with `round.group` and `round.fragments`."""
        return self.group in (None, group) and self.fragments in (None, fragments)


RULES: Final[Mapping[RuleName, RulePolicy]] = MappingProxyType(
    {
        "gossip": RulePolicy(needs_only_sum=True),
        "fedavg": RulePolicy(weighting="tokens"),
        "dynamic": RulePolicy(weighting="quality"),
        "asynchronous": RulePolicy(
            uses_slots=False,
            group=2,
            misfit="round.rule = asynchronous meets in pairs: set round.group = 2",
        ),
        "gradient": RulePolicy(
            vectors=2,
            waits=True,
            group=0,
            fragments=1,
            misfit="round.rule = gradient exchanges all of the gradient with everybody: "
            "set round.fragments = 1 and round.group = 0",
        ),
        "diloco": RulePolicy(
            outer=OuterRates(0.7, 0.9, 0.0),
            group=0,
            misfit="round.rule = diloco needs everybody in one group: set round.group = 0, "
            "or round.rule = noloco for smaller ones",
        ),
        "noloco": RulePolicy(vectors=2, outer=OuterRates(0.7, 0.5, 0.7)),
        "gasloc": RulePolicy(outer=OuterRates(1.0, 0.2, 1.0)),
    }
)


@dataclass(frozen=True, slots=True)
class PrivacyPolicy:
    """What a mode asks of those who train, measure and report under it."""

    clips_records: bool = False
    """True iff a step is one of DP-SGD: each record's gradient is clipped, their sum is noised."""
    charges: bool = True
    """True iff steps are charged to the ledger before they are taken."""
    hides_batches: bool = True
    """True iff nothing that others see may follow from what a batch held: from its tokens, its
    loss, or how long it took."""
    warning: str = ""
    """What the operator reads at every turn. Empty: nothing."""
    unit: str = ""
    """What all its charges are counted by, whatever they note. Empty: what they note."""


MODES: Final[Mapping[str, PrivacyPolicy]] = MappingProxyType(
    {
        "record": PrivacyPolicy(clips_records=True),
        "off": PrivacyPolicy(
            charges=False,
            hides_batches=False,
            warning="PRIVACY OFF: the swarm's manifest says so; what is shared protects no record",
        ),
        # Removed on 2026-11-29: no manifest has it. Ledgers do; early ones noted no unit.
        "update": PrivacyPolicy(unit="shard"),
    }
)


def privacy_policy(mode: str) -> PrivacyPolicy:
    """Policy of a mode as a manifest, a ledger, a card or a status names it.

    A name that this version does not know counts as a mode that charges and hides, and that no
    mechanism knows how to train under.
    """
    return MODES.get(mode, PrivacyPolicy())
