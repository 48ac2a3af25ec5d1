"""What is compared with what, as `Run`s without rate and seed."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

import msgspec

from benchmarks.simulator.spec import Link, Run

RATES: Final = (5e-4, 8e-4, 1.25e-3, 2e-3, 3.2e-3, 5e-3, 8e-3, 12.5e-3, 20e-3)
"""The grid: a factor of 1.6. Every method is tuned on it, until its best rate is no edge."""
FIRST_RATES: Final = (3.2e-3, 5e-3)
FRAGMENTS: Final = 5
"""With int8 at every step: the bytes of float32 parameters every 20 steps."""
WINDOW_STEPS: Final = 20
SLOWNESS: Final = (1, 1, 2, 4)


@dataclass(frozen=True)
class Setting:
    """Under which conditions methods meet."""

    peers: int = 4
    steps: int = 240
    clock: bool = False
    """Equal wall-clock on simulated links with unequal speeds, instead of equal tokens."""

    @property
    def name(self) -> str:
        """In results."""
        return f"N={self.peers}, {self.steps} steps" + (", clock" if self.clock else "")

    def run(self, method: str, rate: float, seed: int) -> Run:
        """Of one of METHODS or VARIANTS."""
        run = msgspec.structs.replace(
            {**METHODS, **VARIANTS}[method],
            method=method,
            rate=rate,
            seed=seed,
            peers=self.peers,
            steps=self.steps,
        )
        if run.group == "all" and run.fragments > 1:
            # a ring sends 2 (N - 1) / N of the fragment: more fragments make the bytes equal
            ring = 2 * (self.peers - 1) / self.peers
            run = msgspec.structs.replace(run, fragments=math.ceil(FRAGMENTS * ring))
        if self.clock:
            slowness = tuple(SLOWNESS[peer * 4 // self.peers] for peer in range(self.peers))
            return msgspec.structs.replace(run, link=Link(), slowness=slowness)
        return run


def _method(**fields: object) -> Run:
    return msgspec.convert({"method": "", "rate": 1.0, **fields}, Run)


_SPREAD: Final = _method(rule="gossip", fragments=FRAGMENTS, slot_steps=1, codec="int8")

METHODS: Final[dict[str, Run]] = {
    "synchronous": _method(rule="synchronous", group="all", barrier=True, slot_steps=1),
    "alone": _method(rule="alone"),
    "all-reduce": _method(rule="gossip", group="all", barrier=True),
    "spread": _SPREAD,
    "spread all-reduce": msgspec.structs.replace(_SPREAD, group="all", barrier=True),
    "gossip": _method(rule="gossip"),
    "DiLoCo": _method(rule="diloco", group="all", barrier=True),
    "DiLoCo 0.5": _method(rule="diloco", group="all", barrier=True, outer_momentum=0.5),
    "NoLoCo": _method(rule="noloco", slot_steps=2 * WINDOW_STEPS),  # sends two vectors
    "GASLoC": _method(rule="gasloc"),
    "FedAvg": _method(rule="fedavg", group="all", barrier=True),
}
"""Each tuned for itself. FedAvg with equal speeds is all-reduce averaging, so it runs on the clock
alone. All but the synchronous one send about the same bytes; a ring sends half as many again."""

VARIANTS: Final[dict[str, Run]] = {
    "spread, exports": msgspec.structs.replace(_SPREAD, exports=True),
    "spread float32": msgspec.structs.replace(_SPREAD, codec="float32"),
    "spread int4": msgspec.structs.replace(_SPREAD, codec="int4"),
    "spread, 30% failing": msgspec.structs.replace(_SPREAD, failing=0.3),
    "spread, 1 step late": msgspec.structs.replace(_SPREAD, late_steps=1),
    "spread, 2 steps late": msgspec.structs.replace(_SPREAD, late_steps=2),
    "spread, 4 steps late": msgspec.structs.replace(_SPREAD, late_steps=4),
}
"""At the rate that was tuned for `spread`: paired with its runs, seed by seed."""
