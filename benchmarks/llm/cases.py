"""What is trained, with how much privacy, and at which rates."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final

from xpeer.cli.demo import corpora, plan
from xpeer.policies import PrivacyMode, privacy_policy


@dataclass(frozen=True)
class Case:
    """One swarm, and the same peers alone."""

    adapters: bool
    """Whether adapters are trained, not all weights."""
    privacy: PrivacyMode
    rates: tuple[tuple[float, tuple[float, ...]], ...]
    """Learning rates of each run: the swarm's, and those of its peers alone. The best of all runs
    counts, of each by the very text that is reported."""

    @property
    def name(self) -> str:
        """E.g. `lora_eps8`."""
        epsilon = f"eps{plan.EPSILON:g}" if privacy_policy(self.privacy).charges else "off"
        return f"{'lora' if self.adapters else 'full'}_{epsilon}"

    def plan(self, run: int, quick: bool) -> plan.DemoPlan:
        """How one of its runs is made."""
        rate, alone = self.rates[run]
        changed = replace(
            plan.MODEL,
            alone_rates=alone,
            alone=corpora.PRIVATE,
            rate=rate,
            adapters=self.adapters,
            privacy=self.privacy,
            clip_norm=plan.MODEL.clip_norm if self.adapters else 1.0,
            # No curves, so checkpoints at the end are enough: all weights' are 1.6 GB each.
            save_every_s=24 * 3600.0,
            curve_steps=plan.MODEL.steps,
            reply_tokens=0,
        )
        if not self.adapters:
            # a fragment of 27 million values takes some seconds on cores that others use, too
            wide = {"round.fragments": 5, "round.slot_s": 10.0}
            # three trainers that save need 24 GB with 16 records a pass
            fields = {**changed.round_fields, **wide}
            changed = replace(changed, batch_records=32, micro_batch=4, round_fields=fields)
        return _short(changed) if quick else changed


def _short(of: plan.DemoPlan) -> plan.DemoPlan:
    """For a tiny model."""
    return replace(
        of,
        steps=5,
        sequence_tokens=32,
        batch_records=8,
        held_out_records=8,
        shard_bytes=300_000,
        curve_steps=5,
    )


_ADAPTERS: Final = (
    (1e-2, (5e-3, 1e-2, 2e-2)), (2e-2, (4e-2,)), (4e-2, (8e-2,)), (8e-2, (1.6e-1,))
)  # fmt: skip
_WEIGHTS: Final = ((1e-4, (1e-4,)), (2e-4, (2e-4,)))
CASES: Final = (
    Case(adapters=True, privacy="record", rates=_ADAPTERS),
    Case(adapters=True, privacy="off", rates=_ADAPTERS),
    Case(adapters=False, privacy="off", rates=_WEIGHTS),
    Case(adapters=False, privacy="record", rates=((1e-5, (1e-5,)),)),
)
QUICK_CASES: Final = (
    Case(adapters=True, privacy="record", rates=((1e-2, (1e-2,)), (2e-2, (2e-2,)))),
    Case(adapters=False, privacy="off", rates=((1e-3, (1e-3,)),)),
)
