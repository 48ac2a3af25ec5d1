"""Policies of the aggregation rules and of the privacy modes, by their names in the manifest.

Code that behaves differently under some rule or mode reads an attribute of its policy. It compares
no names (tests/unit/test_policies.py), so a new rule or mode only needs a policy here.

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
"""What a partner's weight depends on: nothing, its tokens per second, or its loss on the public
text."""


@dataclass(frozen=True, slots=True)
class OuterRates:
    """Constants of a rule's outer optimiser as its paper has them."""

    rate: float
    momentum: float
    consensus: float


@dataclass(frozen=True, slots=True)
class RulePolicy:
    """Attributes of a rule that matching, scheduling, charging and sending depend on."""

    weighting: Weighting = "equal"
    vectors: int = 1
    """V: values that travel for each parameter of a fragment."""
    kept: int = 0
    """Values that it keeps on the host for each parameter, while a node runs."""
    saved: int = 0
    """How many of these are in a checkpoint."""
    waits: bool = False
    """True iff a window's steps end in one optimiser step that waits for the group's answer. The
    parameters stay where they are until then."""
    uses_slots: bool = True
    """False: a member that trains meets any free member, at any time. Once its training is over,
    it uses slots like all rules."""
    needs_only_sum: bool = False
    """True iff the rule needs only a group's plain sum, so that masks may hide single values."""
    outer: OuterRates | None = None
    """None = it has no outer optimiser."""
    group: int | None = None
    """The only `round.group` that it works with; None = it works with any."""
    fragments: int | None = None
    """The only `round.fragments` that it works with; None = it works with any."""
    misfit: str = ""
    """Error text for a founder who sets another group or number of fragments."""

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
            kept=4,
            saved=1,
            waits=True,
            group=0,
            fragments=1,
            misfit="round.rule = gradient exchanges all of the gradient with everybody: "
            "set round.fragments = 1 and round.group = 0",
        ),
        "diloco": RulePolicy(
            kept=2,
            saved=2,
            outer=OuterRates(0.7, 0.9, 0.0),
            group=0,
            misfit="round.rule = diloco needs everybody in one group: set round.group = 0, "
            "or round.rule = noloco for smaller ones",
        ),
        "noloco": RulePolicy(vectors=2, kept=3, saved=3, outer=OuterRates(0.7, 0.5, 0.7)),
        "gasloc": RulePolicy(kept=2, saved=2, outer=OuterRates(1.0, 0.2, 1.0)),
    }
)


@dataclass(frozen=True, slots=True)
class PrivacyPolicy:
    """Attributes of a mode that training, measuring and reporting depend on."""

    clips_records: bool = False
    """True iff a step is one of DP-SGD: each record's gradient is clipped, their sum is noised."""
    charges: bool = True
    """True iff steps are charged to the ledger before they are taken."""
    hides_batches: bool = True
    """True iff nothing that others see may depend on a batch: on its tokens, its loss, or the time
    that it took."""
    warning: str = ""
    """Warning for the operator, in the log and in every status; empty = none."""
    unit: str = ""
    """The unit of all its charges, whatever they note; empty = the unit that they note."""


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
    """Policy of a mode that a manifest, a ledger, a card or a status names.

    A mode that this version does not know charges and hides, and no mechanism can train under it.
    """
    return MODES.get(mode, PrivacyPolicy())
