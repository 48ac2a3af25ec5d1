"""Privacy for whole updates, for comparison: each window's difference is clipped and noised.

    d = theta_window - theta_released;  released <- released + clip(d, C) + N(0, sigma^2 C^2 I)

Every window counts (q = 1), the next one begins at released values, and a pair then averages what
both released (McMahan et al. 2018, arXiv:1710.06963, with one client that noises for itself). It
protects whatever a peer's whole shard did to a window's update, and pays for it with noise that no
batch size divides.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

import torch

from benchmarks.privacy import setting
from benchmarks.privacy.swarm import SWARM_ID, Swarm
from xpeer.identity import PeerId
from xpeer.network import matching
from xpeer.privacy import accountant
from xpeer.privacy.noise import SecretGenerator

WINDOW_STEPS: Final = 10
DELTA: Final = 1e-5


def train(
    shards: Sequence[torch.Tensor],
    make_model: Callable[[], torch.nn.Module],
    *,
    epsilon: float,
    rate: float,
    batch: int,
    steps: int,
    clip_norm: float,
) -> tuple[list[torch.Tensor], float]:
    """Train peers without record privacy, and release noised differences alone.

    Returns:
        Everybody's released parameters, averaged at the end; and epsilon.
    """
    windows = max(1, steps // WINDOW_STEPS)
    sigma = accountant.calibrate(epsilon, DELTA, 1.0, windows)
    spent = accountant.epsilon([accountant.Segment(sigma, 1.0, windows)], DELTA)
    manifest = setting.manifest_of(None, rate=rate, batch=batch, steps=steps)
    names = [PeerId(f"peer{number}") for number in range(len(shards))]
    generator = SecretGenerator()
    with (
        tempfile.TemporaryDirectory() as folder,
        Swarm(manifest, make_model, shards, Path(folder)) as swarm,
    ):
        released = [trainer.parameters.read() for trainer in swarm.trainers]
        for window in range(windows):
            for peer, trainer in enumerate(swarm.trainers):
                trainer.run(steps=steps // windows)
                change = trainer.parameters.read() - released[peer]
                change *= min(1.0, clip_norm / float(change.norm()))
                noise = generator.gaussian_(torch.empty_like(change), sigma * clip_norm)
                released[peer] = released[peer] + change + noise
            for a, b in matching.matching(SWARM_ID, window, names):
                one, other = names.index(a), names.index(b)
                mean = (released[one] + released[other]) / 2
                released[one], released[other] = mean, mean.clone()
            for trainer, values in zip(swarm.trainers, released, strict=True):
                trainer.parameters.write(values)
    mean = torch.stack(released).mean(dim=0)
    return [mean] * len(shards), spent
