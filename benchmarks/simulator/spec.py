"""What one simulated training run is: everything its figures depend on, and nothing else."""

from __future__ import annotations

import hashlib
from typing import Literal

import msgspec
from msgspec import Struct

from benchmarks.simulator.model import CONTEXT, NUM_PARAMS
from xpeer.identity import blake2b
from xpeer.manifest import End, Manifest, Optimiser, PublicText
from xpeer.manifest.model import Model
from xpeer.manifest.privacy import Privacy
from xpeer.manifest.round import Round

BATCH_RECORDS = 8
SIMULATION = 2
"""Raised whenever the same `Run` would give other figures; finished runs are kept by it."""

RuleName = Literal[
    "synchronous", "alone", "gossip", "fedavg", "dynamic", "diloco", "noloco", "gasloc"
]
_ManifestRule = Literal["gossip", "fedavg", "dynamic", "gradient", "diloco", "noloco", "gasloc"]
_RULES: dict[RuleName, _ManifestRule] = {
    "synchronous": "gradient",
    "alone": "gossip",  # with nobody
    "gossip": "gossip",
    "fedavg": "fedavg",
    "dynamic": "dynamic",
    "diloco": "diloco",
    "noloco": "noloco",
    "gasloc": "gasloc",
}


class Link(Struct, frozen=True, forbid_unknown_fields=True):
    """Everybody's connection, and what is sent over it."""

    bandwidth_mbit_s: float = 100.0
    """Upwards and downwards, of every peer."""
    latency_s: float = 0.05
    """One way."""
    model_params: int = 135_000_000
    """Payloads take as long as those of a model of this size would: SmolLM2-135M's."""
    step_s: float = 5.0
    """Of the fastest peer."""


class Run(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One training run of N peers."""

    method: str
    """Label; runs of one method differ in rate and seed."""
    rule: RuleName
    rate: float
    """Peak learning rate of the local AdamW."""
    peers: int = 4
    warmup_steps: int = 30
    """Of the learning rate. With 10, rates above 2e-3 hurt every method."""
    steps: int = 240
    """Optimiser steps of the fastest peer: the end of the run, also by the simulated clock."""
    seed: int = 0
    group: Literal["pairs", "all"] = "pairs"
    barrier: bool = False
    """Everybody waits for the slowest, and for the exchange."""
    fragments: int = 1
    """F."""
    slot_steps: int = 20
    """Length of a slot, in steps of the fastest peer."""
    codec: str = "float32"
    outer_rate: float | None = None
    outer_momentum: float | None = None
    consensus_rate: float | None = None
    """Of rules with an outer optimiser; None: the papers' own."""
    late_steps: int = 0
    """Corrections are merged so many steps after their slot."""
    failing: float = 0.0
    """Share of exchanges that fail: one half at both ends, one half at one end."""
    slowness: tuple[int, ...] = ()
    """Duration of each peer's step in steps of the fastest; empty: all alike."""
    link: Link | None = None
    """None: transfers take no time."""
    exports: bool = False
    """Measure what peers would export at a quarter, a half and three quarters of the run."""

    def key(self, corpora: str) -> str:
        """Name of its figures, given the digest of the corpora."""
        body = msgspec.json.encode([SIMULATION, corpora, self], order="sorted")
        return hashlib.blake2b(body, digest_size=12).hexdigest()

    @property
    def step_s(self) -> float:
        """Seconds that a step of the fastest peer takes."""
        return self.link.step_s if self.link else 1.0

    @property
    def swarm_id(self) -> str:
        """Fingerprint of the simulated swarm: seeds fragments and matching."""
        return hashlib.blake2b(f"simulated {self.seed}".encode(), digest_size=32).hexdigest()

    def manifest(self) -> Manifest:
        """As the trainer's schedule reads it; the run ends with the clock."""
        return Manifest(
            name="simulated",
            created_unix_s=0,
            model=Model(config={}, num_params=NUM_PARAMS, initial_digest=""),
            optimiser=Optimiser(
                learning_rate=self.rate,
                warmup_steps=self.warmup_steps,
                batch_records=BATCH_RECORDS,
                sequence_tokens=CONTEXT,
            ),
            round=Round(
                rule=_RULES[self.rule],
                group=2 if self.group == "pairs" else 0,
                fragments=self.fragments,
                outer_rate=self.outer_rate,
                outer_momentum=self.outer_momentum,
                consensus_rate=self.consensus_rate,
            ),
            privacy=Privacy(mode="off"),
            public_text=PublicText(digest=blake2b(b"").hex(), text=""),
            end=End(seconds=self.steps * self.step_s),
        )
