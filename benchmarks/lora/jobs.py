"""A swarm that trains adapters of a frozen, public model: both factors, or B alone.

Model, text, public start and the peers in one process are those of the privacy benchmark.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from msgspec import Struct

from benchmarks.privacy import setting
from benchmarks.privacy.swarm import Swarm
from benchmarks.privacy.utility import equal_shards, model_with
from xpeer.manifest.model import Lora, LoraTrain
from xpeer.mixing.factors import misalignment
from xpeer.training.adapters import adapt, factor_pairs


class Factors(Struct, frozen=True, kw_only=True, tag=True):
    """One training run of all peers."""

    train: LoraTrain
    epsilon: float | None
    rate: float
    seed: int
    rank: int = 8
    steps: int = 30
    batch: int = 64
    start_steps: int = setting.START_STEPS

    def figures(self) -> dict[str, Any]:
        """Losses in nats per byte on everybody's held-out text; `tuning` is reported nowhere."""
        start = setting.public_start(self.seed, self.start_steps)
        lora = Lora(self.rank, 2.0 * self.rank, self.seed, "", train=self.train)
        shards = equal_shards()
        manifest = setting.manifest_of(
            self.epsilon, rate=self.rate, batch=self.batch, steps=self.steps
        )
        with (
            tempfile.TemporaryDirectory() as folder,
            Swarm(manifest, lambda: adapt(model_with(start), lora), shards, Path(folder)) as swarm,
        ):
            swarm.train()
            one, two = (trainer.parameters.read() for trainer in swarm.trainers[:2])
            lost = misalignment(factor_pairs(swarm.models[0]), (one + two) / 2, one - two)
            swarm.close_down()
            return {
                "epsilon_spent": swarm.epsilon_spent(),
                "trained_params": swarm.trainers[0].parameters.num_params,
                "misalignment": lost,
                "start": self._losses(model_with(start))["report"],
                "peers": [self._losses(model) for model in swarm.models],
            }

    def _losses(self, model: torch.nn.Module) -> dict[str, float]:
        texts = zip(("tuning", "report"), setting.held_out(), strict=True)
        return {name: float(setting.losses_by_record(model, text).mean()) for name, text in texts}
