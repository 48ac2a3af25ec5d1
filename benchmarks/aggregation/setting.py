"""Four unequal clouds, what they cost, and what is compared. Prices and links are assumptions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

from benchmarks.simulator.spec import Link, Run

CLOUDS: Final = 4
DATA: Final = (8, 4, 2, 1)
"""Parts of text, each cloud's of another kind."""
PART_BYTES: Final = 75_000
SLOWNESS: Final = (1, 1, 2, 4)
"""Seconds per step, of the fastest cloud's."""
WINDOW_STEPS: Final = 8
"""H: local steps in a round."""
ROUNDS: Final = 50
LINK: Final = Link()
"""100 Mbit/s and 50 ms; payloads of a model of 135 million parameters; 5 s a step."""
GPU_HOUR_USD: Final = 2.0
"""Of every cloud, for as long as the run takes: one that waits is paid for."""
EGRESS_GB_USD: Final = 0.09
CODEC: Final = "int8"
WARMUP_SHARE: Final = 0.06
"""Of the run: 24 of 400 steps."""
FRAGMENTS: Final = 4
TUNING_ROUNDS: Final = 25
"""Rates are chosen in runs of half the length, with the first seed."""
RATES: Final = (1.25e-3, 2.5e-3, 5e-3, 10e-3, 20e-3, 40e-3)
FIRST_RATES: Final = (2.5e-3, 5e-3)

Method = Literal["FedAvg", "dynamic", "gradient", "asynchronous", "spread gossip"]
METHODS: Final[tuple[Method, ...]] = (
    "FedAvg", "dynamic", "gradient", "asynchronous", "spread gossip",
)  # fmt: skip


@dataclass(frozen=True)
class Trial:
    """One run of one method."""

    method: Method
    rate: float
    seed: int = 0
    rounds: int = ROUNDS

    @property
    def steps(self) -> int:
        """That each cloud takes, on average."""
        return self.rounds * WINDOW_STEPS

    def run(self) -> Run:
        """As the simulator's parts read it. Its end only scales the schedule."""
        pairs = self.method in ("asynchronous", "spread gossip")
        rule = {"FedAvg": "fedavg", "dynamic": "dynamic"}.get(self.method, "gossip")
        optimiser_steps = self.rounds if self.method == "gradient" else self.steps
        return Run(
            method=self.method,
            rule=rule,  # type: ignore[arg-type] # one of three literals
            rate=self.rate,
            peers=CLOUDS,
            warmup_steps=max(1, round(WARMUP_SHARE * optimiser_steps)),
            steps=self.steps,
            seed=self.seed,
            group="pairs" if pairs else "all",
            barrier=not pairs,
            fragments=FRAGMENTS if self.method == "spread gossip" else 1,
            slot_steps=WINDOW_STEPS // FRAGMENTS,
            codec=CODEC,
            slowness=SLOWNESS,
            link=LINK,
        )


def cost_usd(seconds: float, bytes_sent: float) -> float:
    """Of all clouds together: rented for so long, and so many bytes sent."""
    return CLOUDS * GPU_HOUR_USD * seconds / 3600 + EGRESS_GB_USD * bytes_sent / 1e9
