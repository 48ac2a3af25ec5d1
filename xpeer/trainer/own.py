"""Own steps: a node trains the swarm's model further, for itself alone (`xpeer finetune`).

The trainer's own parts take the steps: `build.assemble`, with another schedule, and checkpoints in
a folder of their own. Nothing of it is exchanged, given to joiners or written to the swarm's
checkpoints. Under privacy each step is charged to the home's ledger before it is taken.

The kept model is the measured one with the lowest loss on held-out text of the shard, the swarm's
model included. That choice is a query of private text that epsilon does not cover. It changes
nothing but the kept model, which stays in the home.
"""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import msgspec
import torch
from msgspec import structs

from xpeer.accounts import signal
from xpeer.accounts.own_model import Keep, OwnModel, OwnPlan, noted
from xpeer.accounts.spending import OwnSpending, SwarmSpending
from xpeer.config import Home, NodeConfig
from xpeer.errors import ConfigError, DivergedError, LocalError
from xpeer.files import put
from xpeer.manifest import End, Manifest
from xpeer.manifest.round import Round
from xpeer.manifest.signed import SignedManifest
from xpeer.trainer.build import assemble
from xpeer.trainer.own_run import OwnRun
from xpeer.trainer.saving import Saving
from xpeer.trainer.setup import TrainerSetup
from xpeer.training import checkpoint
from xpeer.training.checkpoint import Bundle
from xpeer.training.schedule import Counters, planned_steps, share_done

Report = Callable[[str], None]
MEASURED: Final = 10
"""How often the losses are measured on the way."""
_PLAN: Final = "plan.json"
_LEAST, _MOST = 10, 1000
"""Fewest and most own steps by default: else a quarter of the steps that the swarm's model has."""
_DIVERGED: Final = (
    "begin anew with --anew and a smaller --learning-rate; what was charged stays charged"
)
_FAR: Final = 10_000_000
"""More steps than any run has."""


@dataclass(frozen=True)
class Wishes:
    """What the operator asks for.

    Attributes:
        steps: own steps; None = a quarter of those behind the swarm's model.
        learning_rate: of own steps; None = the manifest's.
        keep: which model is kept.
        anew: True = an unfinished run is forgotten. What it was charged stays charged.
        spend_all: True = leave nothing of the budget for the rest of the swarm's run.
    """

    steps: int | None = None
    learning_rate: float | None = None
    keep: Keep | None = None
    anew: bool = False
    spend_all: bool = False


class OwnTraining:
    """One run of own steps, from the swarm's newest checkpoint or an unfinished run.

    Args:
        home: of the node. The caller holds its lock.
        config: of the node.
        wishes: of the operator.
        report: called with each line on the progress.

    Raises:
        LocalError: there is nothing to train on or from, or no budget is left.
    """

    def __init__(self, home: Home, config: NodeConfig, wishes: Wishes, report: Report) -> None:
        self._report = report
        self._home, self._folder = home, home.own / "running"
        signed = SignedManifest.load(home.manifest)
        self._manifest = signed.open()
        _require_own_text(self._manifest, config)
        swarm, warnings = checkpoint.load_latest(home.checkpoints)
        if swarm is None:
            raise LocalError(
                f"there is no checkpoint in {home.checkpoints}",
                "train first: `xpeer start`; own steps begin with the swarm's model",
            )
        unfinished, old = self._unfinished(wishes)
        plan = unfinished or _planned(wishes, self._manifest, swarm.step)
        for warning in [*warnings, *old]:
            report(f"warning: {warning}")
        self._made = assemble(
            _setup(home, config, signed),
            own=OwnRun(
                manifest=own_manifest(self._manifest, plan),
                saved=self._resumed or _beginning(swarm),
                folder=self._folder,
                spending=OwnSpending(
                    plan.steps,
                    SwarmSpending(config.privacy.keep_back),
                    0 if wishes.spend_all else _to_come(self._manifest, swarm),
                    plan.noise_multiplier or None,
                ),
            ),
        )
        self._loop = self._made.trainer
        self._unfinished_before = unfinished is not None
        self._plan = unfinished or self._begin(plan)
        self._best: float | None = None
        """Lowest loss on held-out text so far; None until one was measured."""
        self._stopped = threading.Event()
        """Set once the operator has asked for an end."""

    def stop(self) -> None:
        """End at the next step boundary; the same command goes on later. For signal handlers."""
        self._stopped.set()
        self._loop.stop()

    def run(self) -> OwnModel | None:
        """Take the steps, and keep the model.

        Returns:
            The kept model's facts; None if the run was stopped before its end.

        Raises:
            LocalError: a step failed, or the disk is full.
        """
        try:
            for line in [*self._made.beginning.notes, *self._made.beginning.warnings]:
                self._report(line)
            self._announce()
            self._train()
            if self._stopped.is_set():
                return None
            return self._finish()
        finally:
            self._made.close()

    # ---- begin ---------------------------------------------------------------------------------

    def _unfinished(self, wishes: Wishes) -> tuple[OwnPlan | None, list[str]]:
        """The plan of an unfinished run, if the operator goes on with it."""
        self._resumed: Bundle | None = None
        file = self._folder / _PLAN
        if wishes.anew or not file.exists():
            return None, []
        try:
            plan = msgspec.json.decode(file.read_bytes(), type=OwnPlan)
        except (OSError, msgspec.MsgspecError) as e:
            raise LocalError(f"{file} can't be read: {e}", "begin anew with --anew") from e
        for name in ("steps", "learning_rate", "keep"):
            wished, planned = getattr(wishes, name), getattr(plan, name)
            if wished is not None and wished != planned:
                raise ConfigError(
                    f"--{name.replace('_', '-')} {wished}: an unfinished run has {planned}",
                    "leave the option out to go on with it, or begin anew with --anew",
                )
        self._resumed, warnings = checkpoint.load_latest(self._folder)
        return plan, warnings

    def _begin(self, plan: OwnPlan) -> OwnPlan:
        """Measure the swarm's model, and write down what will be done, before it is charged."""
        public, own = self._loop.measure()
        spent = self._made.mechanism.spent()
        plan = structs.replace(
            plan,
            noise_multiplier=spent.noise_multiplier,
            epsilon_before=spent.epsilon_spent,
            loss_before=own,
            loss_public_before=public,
        )
        if spent.noise_norm and signal.drowns(spent.noise_norm, plan.steps):
            self._report(
                f"warning: the noise of {plan.steps} own steps is {spent.noise_norm:.3g} times the "
                "signal: next to nothing is learnt - fewer --steps need less noise"
            )
        shutil.rmtree(self._folder, ignore_errors=True)
        put(self._folder / _PLAN, [msgspec.json.encode(plan)], durable=True)
        return plan

    def _announce(self) -> None:
        plan, at = self._plan, self._loop.counters.step
        noise = f", noise {plan.noise_multiplier:.3g}" if plan.noise_multiplier else ""
        begun = f" (goes on at step {at})" if at else ""
        if self._unfinished_before and not at:
            begun = " (begins again: a run ended before its first checkpoint)"
        self._report(
            f"{plan.steps} own steps from the swarm's model of step {plan.swarm_step:,}, rate "
            f"{plan.learning_rate:g}{noise}{begun}"
        )
        self._report(_losses(0, plan.loss_before, plan.loss_public_before))

    # ---- train ---------------------------------------------------------------------------------

    def _train(self) -> None:
        loop, plan = self._loop, self._plan
        saving = Saving(
            loop,
            self._made.checkpoints.copy,
            lambda work: work(),
            lambda _path, _step: None,
            lambda why: self._report(f"warning: no checkpoint was written: {why.problem}"),
            every_s=60.0,
            resumed=True,
        )
        loop.on_step = lambda _rest_s: saving.after_step()
        if plan.keep == "best" and plan.loss_before is not None:
            self._look_at_best()
        while loop.counters.step < plan.steps and not self._stopped.is_set():
            before, part = loop.counters.step, _part(plan.steps)
            try:
                loop.run(min(part, plan.steps - before))
            except DivergedError as e:
                raise DivergedError(e.problem, _DIVERGED) from e
            if self._stopped.is_set():
                saving.copy()()
                return
            if loop.counters.step == before:
                return  # the budget has ended
            saving.begin()
            public, own = self._measured()
            self._report(_losses(loop.counters.step, own, public))
            self._keep_if_best(own)

    def _measured(self) -> tuple[float, float | None]:
        """The public and the held-out loss, which the loop may have measured already."""
        measured = self._loop.measurements
        if measured.step != self._loop.counters.step or measured.public is None:
            return self._loop.measure()
        return measured.public, measured.validation

    def _look_at_best(self) -> None:
        """Measure the best model of an unfinished run; at first it is the swarm's."""
        kept, _ = checkpoint.load_latest(self._folder / "best")
        if kept is None:
            self._best = self._plan.loss_before
            if not self._loop.counters.step:
                self._copy_to_best()
            return
        self._best = self._of(kept.flat)[1]

    def _keep_if_best(self, loss: float | None) -> None:
        if self._best is not None and loss is not None and loss < self._best:
            self._best = loss
            self._copy_to_best()

    def _copy_to_best(self) -> None:
        self._made.checkpoints.beside(self._folder / "best").copy()()

    def _of(self, flat: torch.Tensor) -> tuple[float, float | None]:
        """The public and the held-out loss of other parameters, which are not kept in the loop."""
        before = self._loop.parameters.read()
        self._loop.parameters.write(flat)
        try:
            return self._loop.measure()
        finally:
            self._loop.parameters.write(before)

    # ---- end -----------------------------------------------------------------------------------

    def _finish(self) -> OwnModel:
        """Write the kept model, then forget the run."""
        kept = self._kept()
        public, own = self._of(kept.flat)
        spent, plan = self._made.mechanism.spent(), self._plan
        facts = OwnModel(
            plan=plan,
            steps=self._loop.counters.step,
            kept_step=kept.step,
            loss_after=own,
            loss_public_after=public,
            epsilon_spent=spent.epsilon_spent,
            epsilon_target=spent.epsilon_target,
            delta=spent.delta,
            chosen=self._best is not None,
        )
        counters = {**kept.counters, **noted(facts)}
        checkpoint.save(self._home.own, replace(kept, counters=counters), keep=1)
        shutil.rmtree(self._folder)
        return facts

    def _kept(self) -> Bundle:
        """The best model that was measured, else the last."""
        if self._best is not None:
            best, warnings = checkpoint.load_latest(self._folder / "best")
            for warning in warnings:
                self._report(f"warning: {warning}")
            if best is not None:
                return best
        return checkpoint.load(Path(self._made.checkpoints.beside(self._folder / "last").copy()()))


def _require_own_text(manifest: Manifest, config: NodeConfig) -> None:
    if manifest.shared_corpus:
        raise ConfigError(
            "this swarm shares one corpus: no member has text of its own in it",
            "use the swarm's model: `xpeer checkpoint export`",
        )
    if not config.data.shard:
        raise ConfigError("data.shard is not set", "name the text that own steps train on")


def _planned(wishes: Wishes, manifest: Manifest, swarm_step: int) -> OwnPlan:
    return OwnPlan(
        steps=wishes.steps or max(_LEAST, min(_MOST, swarm_step // 4)),
        learning_rate=wishes.learning_rate or manifest.optimiser.learning_rate,
        keep=wishes.keep or "best",
        swarm_step=swarm_step,
    )


def _part(steps: int) -> int:
    """Steps between two measurements."""
    return max(1, steps // MEASURED)


def own_manifest(manifest: Manifest, plan: OwnPlan) -> Manifest:
    """The manifest with the schedule of own steps, and without exchanges. It is never signed."""
    return structs.replace(
        manifest,
        optimiser=structs.replace(
            manifest.optimiser,
            learning_rate=plan.learning_rate,
            warmup_steps=min(manifest.optimiser.warmup_steps, plan.steps // 5),
            schedule="linear",
            final_rate=0.0,
        ),
        round=Round(window_steps=_part(plan.steps), fragments=manifest.round.fragments),
        end=End(steps=plan.steps),
    )


def _beginning(swarm: Bundle) -> Bundle:
    """The swarm's model as own steps begin with it: as an export has it, with fresh moments."""
    return replace(
        swarm,
        flat=swarm.consolidated(),
        optimiser_step=0,
        consolidation=None,
        rule={},
        seen=torch.empty(0, dtype=torch.int64),
        counters={"clip_norm": swarm.counters.get("clip_norm")},
    )


def _to_come(manifest: Manifest, swarm: Bundle) -> int:
    """Most private steps that the swarm's run may still take on this node."""
    counters = Counters.from_dict(swarm.counters)
    if (done := share_done(counters, manifest)) is not None and done >= 1.0:
        return 0
    planned = planned_steps(manifest)
    return _FAR if planned is None else max(0, planned - counters.step)


def _setup(home: Home, config: NodeConfig, signed: SignedManifest) -> TrainerSetup:
    return TrainerSetup(
        manifest_path=str(home.manifest),
        swarm_id=signed.genesis.swarm_id,
        home=str(home.path),
        config=config,
        peer_id="own",
        has_trained=True,
    )


def _losses(step: int, own: float | None, public: float) -> str:
    held_out = "-" if own is None else f"{own:.4f}"
    return f"step {step}: loss on held-out own text {held_out}, on the public text {public:.4f}"
