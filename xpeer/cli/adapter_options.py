"""Options of `xpeer init` and `xpeer estimate` that say which adapters are trained."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Final, cast, get_args

import click

from xpeer.cli.common import F, GivenPath, Whole
from xpeer.errors import ConfigError
from xpeer.founding_model import LoraOptions
from xpeer.manifest.model import BaseDtype, LoraTrain


@dataclass(frozen=True, kw_only=True, slots=True)
class AdapterOptions:
    """The options as they were given."""

    lora_rank: int | None
    lora_alpha: float | None
    lora_target: tuple[str, ...]
    lora_rank_stabilised: bool
    lora_from: Path | None
    lora_train: LoraTrain | None
    base_dtype: BaseDtype | None

    def combined(self) -> LoraOptions | None:
        """Put the options together; None = all weights are trained.

        Raises:
            ConfigError: they exclude one another, or make no sense.
        """
        alpha, base = self.lora_alpha, self.base_dtype
        if alpha is not None and not 0 < alpha <= 1e6:
            raise ConfigError(
                f"--lora-alpha: {alpha:g} is no scale of adapters",
                "give a positive number, or leave it out for twice the rank",
            )
        given = {
            "--lora-rank": self.lora_rank is not None,
            "--lora-alpha": alpha is not None,
            "--lora-target": bool(self.lora_target),
            "--lora-rank-stabilised": self.lora_rank_stabilised,
            "--lora-train": self.lora_train is not None,
        }
        names = [option for option, was_given in given.items() if was_given]
        if self.lora_from is not None:
            if self.lora_train == "both":
                names.remove("--lora-train")
            if names:
                raise ConfigError(
                    f"--lora-from does not go with {' and '.join(names)}",
                    "the adapters in that folder decide this, and both of their factors are "
                    "trained",
                )
            return LoraOptions(base_dtype=base, folder=self.lora_from)
        if self.lora_rank is None:
            names += ["--base-dtype"] if base else []
            if names:
                needs = "needs" if len(names) == 1 else "need"
                raise ConfigError(
                    f"{' and '.join(names)} {needs} --lora-rank", "e.g. --lora-rank 8"
                )
            return None
        targets, train = _targets(self.lora_target), self.lora_train or "both"
        return LoraOptions(self.lora_rank, alpha, targets, train, base, self.lora_rank_stabilised)


_OPTIONS: Final[tuple[Callable[[Any], Any], ...]] = (
    click.option(
        "--lora-rank",
        type=Whole(1, 1024),
        help="Train adapters of this rank, not the model itself (needs xpeer[lora]).",
    ),
    click.option(
        "--lora-alpha",
        type=float,
        help="Scale of the adapters times their rank. Default: 2 * rank.",
    ),
    click.option(
        "--lora-target",
        multiple=True,
        metavar="LAYER",
        help="Layers with adapters (repeatable): names or their last parts, e.g. q_proj,v_proj, "
        "or a regular expression for whole names. Default: all linear layers but the output.",
    ),
    click.option(
        "--lora-rank-stabilised",
        is_flag=True,
        help="Scale adapters by alpha / sqrt(rank), not by alpha / rank (rsLoRA).",
    ),
    click.option(
        "--lora-from",
        type=GivenPath("folder", "adapters"),
        help="Folder of peft adapters to go on with. They decide rank, alpha and layers.",
    ),
    click.option(
        "--lora-train",
        type=click.Choice(get_args(LoraTrain)),
        help="Factors of an adapter to train. B: averaging is exact, and about half as much is "
        "exchanged and noised. Default: both.",
    ),
    click.option(
        "--base-dtype",
        type=click.Choice(get_args(BaseDtype)),
        help="Type in which every node holds the model's weights, with --lora-rank. Default: "
        "bfloat16 if they have 16 bits in --model, else float32. int8 and nf4 need "
        "xpeer[quantised].",
    ),
)


def adapter_options(command: F) -> F:
    """Give a command `adapters: AdapterOptions`."""
    names = [field.name for field in fields(AdapterOptions)]

    @functools.wraps(command)
    def with_adapters(*arguments: Any, **options: Any) -> Any:
        adapters = AdapterOptions(**{name: options.pop(name) for name in names})
        return command(*arguments, adapters=adapters, **options)

    made: Any = with_adapters
    for option in reversed(_OPTIONS):
        made = option(made)
    return cast(F, made)


def _targets(given: tuple[str, ...]) -> tuple[str, ...]:
    """Take lists of names apart. A comma in a pattern stays: it may be part of it."""
    lists = (each.split(",") if re.fullmatch(r"[\w., -]+", each) else [each] for each in given)
    return tuple(name.strip() for names in lists for name in names if name.strip())
