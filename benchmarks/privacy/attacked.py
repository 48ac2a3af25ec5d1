"""Canaries and membership: what training on a record shows of it to those outside.

One peer's shard is salted before it trains with a partner on other text:

    coins       records of random characters, each included by a fair coin: the one-run audit
                (Steinke et al. 2023, arXiv:2305.08846) turns guesses into a bound on epsilon
    members     real records, half of them included: loss thresholds, and LiRA (Carlini et al. 2022,
                arXiv:2112.03570) with the other runs as shadow models
    secrets     a phrase with random digits, in one record or repeated in several: exposure (Carlini
                et al. 2019, arXiv:1802.08232). Repeated k times it has k times the epsilon.

Attackers see the released model, or, as the partner, every fragment that the peer showed while it
trained. They know the public start and all candidates.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from msgspec import Struct

from benchmarks.privacy import bounds, setting
from benchmarks.privacy.swarm import ReceivedFragment, Swarm
from benchmarks.privacy.utility import model_with
from xpeer.mixing.cut import padded
from xpeer.mixing.fragments import Fragments

VICTIM, PARTNER = 0, 1
REPEATS: Final = (1, 4, 16)
PHRASE: Final = b"\n# deploy key of vault %d is "
DIGITS: Final = 8
_PRINTABLE: Final = (32, 127)
_ROUNDED: Final = 5


class Attacked(Struct, frozen=True, kw_only=True, tag=True):
    """One run of two peers, and the attackers' scores; higher = rather a member."""

    epsilon: float | None
    seed: int
    rate: float
    steps: int = 240
    batch: int = 64
    coins: int = 200
    members: int = 300
    others: int = 200
    """Records of the shard that are in every run."""
    candidates: int = 511
    looks: int = 3
    """Moments at which the partner evaluates what it has put together."""
    start_steps: int = setting.START_STEPS

    def figures(self) -> dict[str, Any]:
        """Scores, and what they give for this run alone."""
        rng = np.random.default_rng(1000 + self.seed)
        real = setting.shards()[VICTIM]
        always, tried = real[: self.others], real[self.others : self.others + self.members]
        coins = torch.from_numpy(_noise(self.coins))
        flips = rng.random(self.coins + self.members) < 0.5
        secrets = [_secret(rng, number) for number in range(len(REPEATS))]
        repeated = [
            torch.from_numpy(secret[:1].repeat(k, axis=0))
            for secret, k in zip(secrets, REPEATS, strict=True)
        ]
        targets = torch.cat([coins, tried])
        shard = torch.cat([always, targets[torch.from_numpy(flips)], *repeated])
        start = setting.public_start(self.seed, self.start_steps)
        released, seen, told = self._train(shard, start)
        texts = torch.cat([targets, *(self._with_others(rng, secret) for secret in secrets)])
        before = setting.losses_by_record(model_with(start), texts).numpy()
        figures: dict[str, Any] = told | {"included": flips.astype(int).tolist()}
        for view, models in (("released", [released]), ("partner", seen)):
            losses = [setting.losses_by_record(model_with(m), texts).numpy() for m in models]
            figures[view] = self._judged(before, np.stack(losses), flips)
        return figures

    def _train(
        self, shard: torch.Tensor, start: torch.Tensor
    ) -> tuple[torch.Tensor, list[torch.Tensor], dict[str, Any]]:
        """The released model; what the partner put together at several moments; the ledger."""
        manifest = setting.manifest_of(
            self.epsilon,
            rate=self.rate,
            batch=self.batch,
            steps=self.steps,
            num_params=start.numel(),
        )
        fragments = Fragments(start.numel(), manifest.round.fragments)
        known = torch.zeros(padded(start.numel()))
        known[: start.numel()] = start
        seen: list[torch.Tensor] = []

        def watch(shown: ReceivedFragment) -> None:
            if shown.sender == VICTIM:
                own = fragments.gather(known, shown.fragment)
                fragments.add_(known, shown.fragment, shown.values - own, 1.0)

        def look(step: int) -> None:
            if step % max(1, self.steps // self.looks) == 0:
                seen.append(known[: start.numel()].clone())

        shards = [shard, setting.shards()[PARTNER][: len(shard)]]
        with (
            tempfile.TemporaryDirectory() as folder,
            Swarm(manifest, lambda: model_with(start), shards, Path(folder), watch=watch) as swarm,
        ):
            swarm.train(look)
            released = swarm.close_down()
            spent = swarm.mechanisms[VICTIM].spent()
        told = {
            "epsilon_spent": spent.epsilon_spent if self.epsilon is not None else None,
            "delta": spent.delta or 1e-5,
            "noise_multiplier": spent.noise_multiplier,
            "records": len(shard),
        }
        return released, seen, told

    def _with_others(self, rng: np.random.Generator, secret: np.ndarray) -> torch.Tensor:
        """The secret's record, and candidates with other digits."""
        rows = secret.repeat(self.candidates + 1, axis=0)
        at = secret.shape[1] - DIGITS
        rows[1:, at:] = rng.integers(48, 58, (self.candidates, DIGITS))
        return torch.from_numpy(rows)

    def _judged(self, before: np.ndarray, losses: np.ndarray, flips: np.ndarray) -> dict[str, Any]:
        """From losses, (moments, texts)."""
        m = self.coins + self.members
        gains = (before - losses).mean(axis=0)[:m]
        exposures = {}
        for number, k in enumerate(REPEATS):
            at = m + number * (self.candidates + 1)
            each = losses[:, at : at + self.candidates + 1]
            exposures[str(k)] = max(bounds.exposure(row[0], row[1:]) for row in each)
        return {
            "scores": [round(float(value), _ROUNDED) for value in gains],
            "losses": [round(float(value), _ROUNDED) for value in losses.mean(axis=0)[:m]],
            "exposure": exposures,
        }


def _noise(count: int) -> np.ndarray:
    """Records of random printable characters, the same in all runs, (count, T) int64."""
    rng = np.random.default_rng(7)
    return rng.integers(*_PRINTABLE, (count, setting.RECORD_TOKENS))


def _secret(rng: np.random.Generator, number: int) -> np.ndarray:
    """A phrase that ends in random digits, (1, T) int64."""
    filler = b"# kept here for the nightly job, do not share" * 2
    phrase = PHRASE % number
    free = setting.RECORD_TOKENS - len(phrase) - DIGITS
    text = np.frombuffer(filler[:free] + phrase, dtype=np.uint8).astype(np.int64)
    return np.concatenate([text, rng.integers(48, 58, DIGITS)])[None]
