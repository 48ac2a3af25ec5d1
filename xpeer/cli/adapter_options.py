"""The options of `xpeer init` and `xpeer estimate` that say which adapters are trained."""

from __future__ import annotations

import re
from pathlib import Path

from xpeer.errors import ConfigError
from xpeer.founding_model import LoraOptions
from xpeer.manifest.model import BaseDtype, LoraTrain


def adapters_of(
    rank: int | None,
    folder: Path | None,
    *,
    alpha: float | None,
    target: tuple[str, ...],
    train: LoraTrain | None,
    rank_stabilised: bool,
    base: BaseDtype | None,
) -> LoraOptions | None:
    """Put the options together; None = all weights are trained.

    Raises:
        ConfigError: they exclude one another, or make no sense.
    """
    if alpha is not None and not 0 < alpha <= 1e6:
        raise ConfigError(
            f"--lora-alpha: {alpha:g} is no scale of adapters",
            "give a positive number, or leave it out for twice the rank",
        )
    given = {
        "--lora-rank": rank is not None,
        "--lora-alpha": alpha is not None,
        "--lora-target": bool(target),
        "--lora-rank-stabilised": rank_stabilised,
        "--lora-train": train is not None,
    }
    names = [option for option, was_given in given.items() if was_given]
    if folder is not None:
        if train == "both":
            names.remove("--lora-train")
        if names:
            raise ConfigError(
                f"--lora-from does not go with {' and '.join(names)}",
                "the adapters in that folder decide this, and both of their factors are trained",
            )
        return LoraOptions(base_dtype=base, folder=folder)
    if rank is None:
        names += ["--base-dtype"] if base else []
        if names:
            needs = "needs" if len(names) == 1 else "need"
            raise ConfigError(f"{' and '.join(names)} {needs} --lora-rank", "e.g. --lora-rank 8")
        return None
    return LoraOptions(rank, alpha, _targets(target), train or "both", base, rank_stabilised)


def _targets(given: tuple[str, ...]) -> tuple[str, ...]:
    """Take lists of names apart. A comma in a pattern stays: it may be part of it."""
    lists = (each.split(",") if re.fullmatch(r"[\w., -]+", each) else [each] for each in given)
    return tuple(name.strip() for names in lists for name in names if name.strip())
