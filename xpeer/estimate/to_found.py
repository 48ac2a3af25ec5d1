"""Whether this machine can found a swarm, before `xpeer init` loads a model.

As at a start, what can never fit is a problem, and what does not fit now a warning.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Final

import torch

from xpeer.amounts import size
from xpeer.config import Home, NodeConfig
from xpeer.errors import ConfigError
from xpeer.estimate import phases, remedies, room
from xpeer.estimate.fit import (
    DAMAGED,
    OVERRIDE,
    SURE,
    Fit,
    Sizes,
    converted_bytes,
    sizes_of,
    tight,
    too_large,
)
from xpeer.estimate.room import Room
from xpeer.manifest import Manifest
from xpeer.source import entries

_NO_TRIAL: Final = "try no step first (--skip-trial)"


def examine(
    manifest: Manifest,
    config: NodeConfig,
    home: Home,
    device: torch.device,
    folder: Path | None,
    *,
    trial: bool,
    here: Callable[[torch.device], Room] = room.of_device,
) -> Fit:
    """Compare what it takes to found a swarm with what this machine has. Nothing is loaded.

    Args:
        manifest: as far as shapes decide it.
        config: of the node.
        home: that the swarm will be founded in.
        device: to train on.
        folder: of the model to start from; None = its weights are drawn.
        trial: whether a run is tried in small before the manifest is signed.
        here: says what memory a device has.

    Raises:
        ConfigError: see `fit.sizes_of`.
    """
    fit, sizes = Fit(), sizes_of(manifest, config, device)
    base = folder if manifest.model.lora is not None else None
    converted = 0 if base is None else converted_bytes(base, manifest.model.base_dtype)
    needs = phases.init_of(sizes.bound, phases.Wire.of(manifest), converted=converted, trial=trial)
    ways = [remedies.of_founding(sizes.step, remedies.PLAIN), *([_NO_TRIAL] if trial else [])]
    remedy = ", or ".join(ways)
    on_gpu = device.type == "cuda"
    if trial and on_gpu and sizes.least > (gpu := here(device)).most:
        fit.problems.append(too_large(sizes.least_in_words(sizes.least), gpu, remedy))
    host = needs.host
    if trial and not on_gpu:
        host += sizes.least - sizes.frozen_bytes  # these are counted once
    yielding, here_now = _pages(base, sizes, trial=trial), here(torch.device("cpu"))
    _compare_host(fit, host, yielding, here_now, remedy)
    if trial and not on_gpu and host - yielding + phases.slack(sizes.bound) > here_now.free:
        fit.be_short()
    _compare_disk(fit, needs.disk, home, remedy)
    return fit


def _pages(base: Path | None, sizes: Sizes, *, trial: bool) -> int:
    """Bytes of frozen weights that are pages of a file, which give way."""
    try:
        if base is None or not entries(base):
            return 0
    except DAMAGED:
        return 0
    frozen = sizes.bound.source - 4 * sizes.num_trained
    return frozen - (sizes.code_bytes if trial else 0)


def _compare_host(fit: Fit, needed: int, yielding: int, host: Room, remedy: str) -> None:
    what = f"to found this swarm needs about {size(needed)} of memory"
    if SURE * needed - yielding > host.most:
        fit.problems.append(too_large(what, host, remedy))
    elif needed - yielding > host.free:
        fit.warnings.append(tight(what, host, remedy))


def _compare_disk(fit: Fit, needed: int, home: Home, remedy: str) -> None:
    try:
        free = room.disk(home.path).free
    except OSError as e:
        fit.warnings.append(f"{home.path}: its disk can't be asked for free space: {e.strerror}")
        return
    if needed > free:
        what = f"to found this swarm needs {size(needed)} in {home.path}, {size(free)} are free"
        fit.problems.append(
            ConfigError(
                what, f"free space, choose a --home on a larger disk, or {remedy}; {OVERRIDE}"
            )
        )
