"""Compares, before anything is loaded, what this node needs with what its machine has."""

from __future__ import annotations

from pathlib import Path

import torch

from xpeer.config import Home
from xpeer.estimate.fit import Fit, examine
from xpeer.estimate.remembered import Rehearsals
from xpeer.manifest import Manifest
from xpeer.trainer.setup import TrainerSetup
from xpeer.trainer.starting import Startup
from xpeer.training.losses import choose_device


def examined(
    setup: TrainerSetup, manifest: Manifest, startup: Startup, *, lends: bool = True
) -> Fit:
    """Compare, and refuse what can't fit, as `training.check_fit` says.

    Memory is short, too, where an earlier trainer was killed: see `ended.Ended`.

    A home that has trained is never refused: that it did says more than an estimate.

    Args:
        setup: of the node.
        manifest: of the swarm.
        startup: learns that this is being done.
        lends: whether joiners are given its model.

    Raises:
        ConfigError: it can't fit, and this home has never trained.
    """
    private = manifest.privacy.policy.clips_records
    device, _ = choose_device(setup.config.training.device, private=private)
    fit = _compared(setup, manifest, startup, device, lends=lends)
    if setup.was_killed:  # on a GPU, too: that was for memory of the host
        fit.be_short()
    return fit


def _compared(
    setup: TrainerSetup, manifest: Manifest, startup: Startup, device: torch.device, *, lends: bool
) -> Fit:
    wanted = setup.config.training.check_fit
    if wanted == "skip":
        return Fit()
    startup.enter("compares what it needs with what this machine has")
    home = Home(Path(setup.home))
    rehearsals = Rehearsals(home.cache, on_operation=startup.pulse.beat)
    fit = examine(manifest, setup.config, home, device, rehearsals, lends=lends)
    if wanted == "refuse" and not setup.has_trained:
        fit.require()
    fit.warnings += map(str, fit.problems)
    return fit
