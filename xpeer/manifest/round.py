"""The manifest's section on exchanges: how often, with whom, in which form, by which rule."""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta, Struct

from xpeer.forms import Codec
from xpeer.leaves import seen_by
from xpeer.manifest.kinds import Count, Positive
from xpeer.policies import RULES, RuleName, RulePolicy


@seen_by("members", all_public=True)
class Round(Struct, frozen=True, forbid_unknown_fields=True):
    """How often members exchange, and what."""

    window_steps: Count = 5
    """H: a window ends after this many local steps ..."""
    window_s: Positive | None = None
    """... or after this many seconds, whichever comes first. None = by steps alone."""
    slot_s: Positive = 1.0
    """Length of a slot of the shared clock. Groups are drawn anew in every slot; groups of more
    than two begin to meet only in every n-th slot."""
    fragments: Annotated[int, Meta(ge=1, le=1024)] = 5
    """F: the parameters are exchanged in this many parts, F parts a window; 1 = all at once."""
    codec: Codec = "int8"
    """Form of the values in a payload. int4 and int2 round stochastically."""
    rule: RuleName = "gossip"
    """How an exchange changes the parameters: see `xpeer/mixing/rules`."""
    combiner: Literal["mean", "trimmed-mean"] = "mean"
    """How the values of a group become one: see `xpeer/mixing/combine.py`."""
    trim: Annotated[int, Meta(ge=1, le=31)] = 1
    """For trimmed-mean: this many of the largest and of the smallest values of each parameter are
    left out. As many hostile members of a group can't move the result out of the range of the
    honest members' values."""
    group: Annotated[int, Meta(ge=0, le=8)] = 2
    """k: members that meet in a slot; 0 = all."""
    outer_rate: Positive | None = None
    """Constant of the outer optimiser: alpha of diloco and noloco, eta of gasloc. None = value of
    the paper, here and below."""
    outer_momentum: Annotated[float, Meta(ge=0, lt=1)] | None = None
    """Constant of the outer optimiser: mu of diloco and noloco, gamma of gasloc."""
    consensus_rate: Positive | None = None
    """Constant of the outer optimiser: gamma of noloco, alpha of gasloc."""
    masks: bool = False
    """True iff groups of exactly `group` members exchange fixed-point values under masks, which
    cancel in the group's sum. A member learns the sum of the others and no single value. The values
    replace those of `codec`. This is no differential privacy."""
    mask_bits: Literal[16, 32] = 16
    """Bits per parameter. With 16, the sum of k members may be at most 32768 steps away from k
    times one's own value."""
    mask_step: Annotated[float, Meta(ge=1e-9, le=1.0)] = 2.0**-14
    """Distance of two neighbouring masked values, in parameters' units."""
    deadline_s: Positive = 30.0
    """Longest duration of an exchange, from its agreement on."""
    closing_windows: Annotated[int, Meta(ge=0)] | None = None
    """Windows of mixing without training at the end; None = 2*ceil(log2 N)."""

    def check(self) -> None:
        """Check what no single field can.

        Raises:
            ValueError: names fields and remedy.
        """
        if self.group == 1:
            raise ValueError("round.group = 1 meets nobody: use 2 to 8, or 0 for all")
        self._check_combiner()
        if not self.policy.fits(self.group, self.fragments):
            raise ValueError(self.policy.misfit)
        if self.masks:
            self._check_masks()
        outer = (self.outer_rate, self.outer_momentum, self.consensus_rate)
        if outer != (None, None, None) and self.policy.outer is None:
            raise ValueError(
                f"round.rule = {self.rule} has no outer optimiser: leave round.outer_rate, "
                "round.outer_momentum and round.consensus_rate unset"
            )

    def _check_combiner(self) -> None:
        if self.combiner != "trimmed-mean" and self.trim != 1:
            raise ValueError(
                f"round.trim means nothing for round.combiner = {self.combiner}: unset it, or set "
                "round.combiner = trimmed-mean"
            )
        if self.combiner == "mean":
            return
        if self.masks:
            raise ValueError(
                f"round.combiner = {self.combiner} compares the values of single members, which "
                "round.masks = true hides: set one of them back"
            )
        if not self.policy.uses_slots:
            raise ValueError(
                f"round.rule = {self.rule} meets in pairs, of which round.combiner = "
                f"{self.combiner} leaves nothing: set round.rule = gossip"
            )
        if self.policy.weighting != "equal":
            raise ValueError(
                f"round.rule = {self.rule} weights members by what they declare, and "
                f"round.combiner = {self.combiner} counts all alike: set round.rule = gossip"
            )
        if 0 < self.group < self.least_group:
            raise ValueError(
                f"round.combiner = {self.combiner} with round.trim = {self.trim} leaves nothing of "
                f"round.group = {self.group}: set round.group to {self.least_group} or more (8 at "
                "most), or to 0 for all"
            )

    @property
    def least_group(self) -> int:
        """Least number of members, ourselves included, with which a group merges."""
        if self.masks:
            return self.group
        return 2 * self.trim + 1 if self.combiner == "trimmed-mean" else 2

    def _check_masks(self) -> None:
        if not self.policy.needs_only_sum:
            raise ValueError(
                f"round.masks = true shows nothing but a group's plain sum, and round.rule = "
                f"{self.rule} asks for more: set round.rule = gossip, or round.masks = false"
            )
        if self.group < 3:
            raise ValueError(
                f"round.masks = true hides nothing with round.group = {self.group}: "
                "set round.group = 3 to 8, or round.masks = false"
            )

    @property
    def policy(self) -> RulePolicy:
        """Policy of `rule`."""
        return RULES[self.rule]

    @property
    def payload_codec(self) -> str:
        """Name of the codec of an exchange's payload."""
        return f"masked{self.mask_bits}" if self.masks else self.codec
