"""Loss against epsilon: the swarm, each of its peers alone, the public start."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any, Final, Literal

import torch
from msgspec import Struct

from benchmarks.privacy import setting
from benchmarks.privacy.swarm import Swarm
from xpeer.manifest import Manifest
from xpeer.training.flat import write_flat
from xpeer.training.model import build

STEPS: Final = 30
BATCH: Final = 64
SHARD_RECORDS: Final = 26_000
"""Of every peer, so that epsilon means the same for all."""

Method = Literal["swarm", "alone"]


class Utility(Struct, frozen=True, kw_only=True, tag=True):
    """One training run: of all peers, or of one alone."""

    method: Method
    epsilon: float | None
    rate: float
    seed: int
    peer: int = 0
    """Which one is alone."""
    steps: int = STEPS
    batch: int = BATCH
    start_steps: int = setting.START_STEPS

    def figures(self) -> dict[str, Any]:
        """Losses in nats per byte on everybody's held-out text; `tuning` is reported nowhere."""
        start = setting.public_start(self.seed, self.start_steps)
        manifest = setting.manifest_of(
            self.epsilon,
            rate=self.rate,
            batch=self.batch,
            steps=self.steps,
            num_params=start.numel(),
        )
        shards = equal_shards()
        if self.method == "alone":
            shards = [shards[self.peer]]
        models, spent = trained(manifest, shards, start)
        measured = model_with(start)
        tuning, report = setting.held_out()
        figures: dict[str, Any] = {"epsilon_spent": spent, "tuning": [], "report": []}
        figures["start"] = float(setting.losses_by_record(measured, report).mean())
        for flat in models:
            write_flat(measured, flat)
            for name, text in (("tuning", tuning), ("report", report)):
                figures[name].append(float(setting.losses_by_record(measured, text).mean()))
        return figures


def equal_shards() -> list[torch.Tensor]:
    """Each peer's records: as many for every peer."""
    return [records[:SHARD_RECORDS] for records in setting.shards()]


def trained(
    manifest: Manifest, shards: list[torch.Tensor], start: torch.Tensor
) -> tuple[list[torch.Tensor], float | None]:
    """Train a peer for each shard, and close if there are several.

    Args:
        manifest: of the swarm.
        shards: records of each peer.
        start: (P,) float32, the parameters to begin with.

    Returns:
        Parameters at the end, of every peer; epsilon.
    """
    with (
        tempfile.TemporaryDirectory() as folder,
        Swarm(manifest, lambda: model_with(start), shards, Path(folder)) as swarm,
    ):
        swarm.train()
        if len(shards) > 1:
            swarm.close_down()
        return [t.parameters.read() for t in swarm.trainers], swarm.epsilon_spent()


def model_with(flat: torch.Tensor) -> torch.nn.Module:
    """The benchmark's model with these parameters, (P,) float32."""
    model = build(setting.CONFIG, seed=0)
    write_flat(model, flat)
    return model
