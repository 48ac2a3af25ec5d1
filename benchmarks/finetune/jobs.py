"""Runs: a swarm whose peers then take own steps, and a peer alone. Both spend the same epsilon.

Model, text, public start and the peers in one process are those of the privacy benchmark. Own steps
are the trainer's own loop and mechanism with the schedule of `xpeer finetune`, charged to the very
ledger that the swarm's steps were charged to. The last model counts (`--keep last`): epsilon covers
it in full.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any, Final

import torch
from msgspec import Struct

from benchmarks.privacy import setting
from benchmarks.privacy.ledgers import open_ledger
from benchmarks.privacy.swarm import Swarm
from benchmarks.privacy.utility import equal_shards, model_with, trained
from benchmarks.simulator.corpora import HELD_OUT_WINDOWS
from xpeer.accounts.own_model import OwnPlan
from xpeer.accounts.spending import OwnSpending, SwarmSpending
from xpeer.manifest import Manifest
from xpeer.privacy.mechanism import RecordMechanism
from xpeer.trainer.own import own_manifest
from xpeer.training.flat import FlatParameters
from xpeer.training.loop_parts import make_loop
from xpeer.training.losses import record_losses
from xpeer.training.measuring import Evaluation

EPSILON: Final = 8.0


class Finetuned(Struct, frozen=True, kw_only=True, tag=True):
    """A swarm; then every peer goes on from its model, at several rates."""

    rate: float
    seed: int
    own_rates: tuple[float, ...]
    steps: int = 40
    own_steps: int = 10
    keep_back: float = 0.25
    batch: int = 64
    start_steps: int = setting.START_STEPS

    def figures(self) -> dict[str, Any]:
        """For each peer the losses of the swarm's model, and of its own one at each rate."""
        start = setting.public_start(self.seed, self.start_steps)
        shards = equal_shards()
        manifest = setting.manifest_of(
            EPSILON,
            rate=self.rate,
            batch=self.batch,
            steps=self.steps,
            num_params=start.numel(),
        )
        spending = SwarmSpending(self.keep_back)
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            with Swarm(
                manifest, lambda: model_with(start), shards, folder, spending=spending
            ) as swarm:
                swarm.train()
                swarm.close_down()
                models = [trainer.parameters.read() for trainer in swarm.trainers]
                spent = swarm.epsilon_spent()
            peers = []
            for peer, (flat, records) in enumerate(zip(models, shards, strict=True)):
                own = []
                for number, rate in enumerate(self.own_rates):
                    home = folder / f"{peer}-{number}"
                    shutil.copytree(folder / str(peer), home)  # as if the others were never made
                    own.append(
                        {"rate": rate, **self._own(manifest, flat, records, home, rate, peer)}
                    )
                peers.append({"swarm": losses_of(flat, peer), "own": own})
        return {"epsilon_of_swarm": spent, "start": losses_of(start, None), "peers": peers}

    def _own(
        self,
        manifest: Manifest,
        flat: torch.Tensor,
        records: torch.Tensor,
        home: Path,
        rate: float,
        peer: int,
    ) -> dict[str, Any]:
        plan = OwnPlan(steps=self.own_steps, learning_rate=rate, keep="last", swarm_step=self.steps)
        ours, model = own_manifest(manifest, plan), model_with(flat)
        ledger = open_ledger(home, ours)
        spending = OwnSpending(self.own_steps, SwarmSpending(self.keep_back))
        mechanism = RecordMechanism(ours, model, records, record_losses, ledger, spending=spending)
        parameters = FlatParameters(model, ours.round.fragments)
        loop = make_loop(ours, parameters, mechanism, Evaluation(public=lambda: 0.0))
        loop.run(self.own_steps)
        spent = mechanism.spent()
        mechanism.close()
        ledger.close()
        return {
            "steps": loop.counters.step,
            "epsilon_spent": spent.epsilon_spent,
            **losses_of(parameters.read(), peer),
        }


class Lone(Struct, frozen=True, kw_only=True, tag=True):
    """One peer alone, with the whole of epsilon and as many steps."""

    rate: float
    seed: int
    peer: int
    steps: int = 50
    batch: int = 64
    start_steps: int = setting.START_STEPS

    def figures(self) -> dict[str, Any]:
        """Its losses."""
        start = setting.public_start(self.seed, self.start_steps)
        manifest = setting.manifest_of(
            EPSILON,
            rate=self.rate,
            batch=self.batch,
            steps=self.steps,
            num_params=start.numel(),
        )
        (flat,), spent = trained(manifest, [equal_shards()[self.peer]], start)
        return {"epsilon_spent": spent, **losses_of(flat, self.peer)}


def losses_of(flat: torch.Tensor, peer: int | None) -> dict[str, float]:
    """Nats per byte of (P,) parameters: on a peer's held-out text and on everybody's. `tuning` is
    of other held-out text of the peer, and reported nowhere.
    """
    model = model_with(flat)
    tuning, report = (setting.losses_by_record(model, text) for text in setting.held_out())
    found = {"mixed": float(report.mean())}
    if peer is not None:
        own = slice(peer * HELD_OUT_WINDOWS, (peer + 1) * HELD_OUT_WINDOWS)
        found |= {"own": float(report[own].mean()), "tuning": float(tuning[own].mean())}
    return found
