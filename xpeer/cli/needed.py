"""What a node of a swarm needs, in words, for `xpeer init`."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

from xpeer.amounts import duration, size
from xpeer.cli.common import say
from xpeer.config import Home, NodeConfig
from xpeer.errors import LocalError
from xpeer.manifest import Manifest
from xpeer.shortage import keep_nothing

if TYPE_CHECKING:
    from xpeer.estimate.phases import Phase


def say_needs(manifest: Manifest, config: NodeConfig, home: Home) -> bool:
    """Say what a node of a swarm needs, and warn if this machine has less.

    Returns:
        Whether a step can be taken here: False = it is certain that it can't.
    """
    from xpeer.estimate import phases  # noqa: PLC0415 - torch takes seconds
    from xpeer.estimate.fit import examine  # noqa: PLC0415
    from xpeer.estimate.remembered import Rehearsals  # noqa: PLC0415
    from xpeer.training.losses import choose_device  # noqa: PLC0415

    began = time.monotonic()
    try:
        private = manifest.privacy.policy.clips_records
        device, _ = choose_device(config.training.device, private=private)
        fit = examine(manifest, config, home, device, Rehearsals(), asked=True)
    except LocalError as e:
        say(f"warning: what a node needs is not known: {e}")
        return True
    if fit.memory is not None:
        wire = phases.Wire.of(manifest)
        found = phases.phases_of(
            *(fit.memory, wire, config.checkpoint.keep),
            private=private,
            on_cpu=device.type == "cpu",
        )
        rows = {p.name: p for p in found}
        took = duration(time.monotonic() - began)
        say(f"a node of this swarm needs (found in {took}):")
        word = "about" if fit.rehearsed else "less than"
        for line in _lines(rows, device.type, wire.partners, word):
            say(f"  {line}")
    for warning in fit.warnings:
        say(f"warning: {warning}")
    for problem in fit.problems:
        say(f"warning: a node on this machine could not start: {problem.problem}")
        say(f"  {problem.remedy}")
    return not fit.problems


def require_room(
    manifest: Manifest, config: NodeConfig, home: Home, folder: Path | None, *, trial: bool
) -> None:
    """Compare what it takes to found a swarm with what this machine has, before a model is loaded.

    Args:
        manifest: as far as it is known.
        config: of the node; `training.check_fit` says what to do.
        home: that the swarm will be founded in.
        folder: of the model to start from; None = its weights are drawn.
        trial: whether a run is tried in small.

    Raises:
        ConfigError: it can't fit.
    """
    from xpeer.estimate import to_found  # noqa: PLC0415 - torch takes seconds
    from xpeer.training.losses import choose_device  # noqa: PLC0415

    wanted = config.training.check_fit
    if wanted == "skip":
        return
    private = manifest.privacy.policy.clips_records
    try:
        device, _ = choose_device(config.training.device, private=private)
        fit = to_found.examine(manifest, config, home, device, folder, trial=trial)
    except LocalError:
        return  # `say_needs` says why
    if wanted == "refuse":
        fit.require()
    if fit.short:
        keep_nothing()
    for note in fit.notes:
        say(note)
    for warning in (*fit.warnings, *fit.problems):
        say(f"warning: {warning}")


def _lines(rows: dict[str, Phase], device: str, partners: int, word: str) -> list[str]:
    step, window, join = rows["step"], rows["window"], rows["join"]
    host = max(row.host for row in rows.values() if row.name not in ("init", "export"))
    kept = f", up to {size(step.slack)} of freed memory if there is room" if step.slack else ""
    what = "in the process" if device == "cpu" else f"on a device like this one's ({device})"
    others = "a partner" if partners == 1 else f"{partners} partners"
    return [
        f"memory: {word} {size(step.device)} {what} for a step, {size(host)} on the host besides"
        f"{kept}",
        f"disk: {size(rows['checkpoint'].disk)} for checkpoints",
        f"network: {size(window.wire)} sent, and as much received, in each window with {others}; "
        f"{size(join.wire)} to join",
    ]
