"""How long the demo's runs are, and what they start from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final, Literal

from xpeer.cli.demo import corpora, warmup
from xpeer.policies import PrivacyMode
from xpeer.training.tokenizer import ByteTokenizer, HuggingFaceTokenizer, Tokenizer

LORA: Final = (
    *("--lora-rank", "2", "--lora-train", "B"),
    *("--lora-target", r".*\.(down_proj|c_proj|fc2|fc_out|dense_4h_to_h)"),
)
"""Few values, so little noise: on a CPU a step has few records. Each block's last layer, by the
names that it has in most families: there the gradients of records agree best (docs/decisions.md).
"""
PROMPTS: Final = {
    "python": 'def read_config(path):\n    """',
    "headers": "#pragma once\n\n#include <ATen/",
    "licences": "Redistribution and use in source and binary forms, with or without",
}
"""What the model continues, before and after: beginnings that are in no shard alone."""


@dataclass(frozen=True)
class DemoPlan:
    """How long the demo's runs are."""

    steps: int
    """Private steps of a peer at full speed."""
    alone_rates: tuple[float, ...]
    """Learning rates for the lone runs; the best run of each peer counts. The swarm's rate is fixed
    beforehand. Empty = no lone runs."""
    alone: tuple[str, ...] = corpora.PRIVATE
    """Kinds of text of the peers that also train alone."""
    rate: float = 6e-3
    """The swarm's learning rate."""
    start_steps: int = warmup.STEPS
    """Steps of the public start's training, where the demo makes it."""
    sequence_tokens: int = 128
    batch_records: int = 48
    micro_batch: int = 0
    """Records a pass; 0 = as many as suit a processor."""
    shard_bytes: int = 4_000_000
    held_out_records: int = 96
    """Held-out records of each kind of text."""
    speeds: Mapping[str, float] = field(
        default_factory=lambda: {"python": 1.0, "headers": 1.0, "licences": 0.5}
    )
    """Fraction of the time in which each peer computes."""
    curve_steps: int = 5
    """Least number of steps between two points of a curve."""
    reply_tokens: int = 0
    """Tokens that the model adds to a prompt, before and after training; 0 = no prompts."""
    round_fields: Mapping[str, float] = field(default_factory=lambda: {"round.slot_s": 0.5})
    """Fields of the manifest."""
    timeout_s: float = 1800.0
    """Longest time for all runs of one kind."""
    adapters: bool = True
    """Whether adapters of a given model are trained, not all of it."""
    privacy: PrivacyMode = "record"
    clip_norm: float = 1.0
    """Norm to which each record's gradient is clipped, with privacy."""
    save_every_s: float = 2.0
    """Time between two checkpoints; curves are read from them."""


WINDOW_STEPS: Final = 5
EPSILON: Final = 8.0
FULL: Final = DemoPlan(steps=35, alone_rates=(4e-3, 6e-3, 9e-3))
QUICK: Final = DemoPlan(steps=15, alone_rates=(), start_steps=60)
"""One swarm, compared only with its start: two minutes."""
MODEL: Final = DemoPlan(
    steps=10, alone_rates=(5e-3, 1e-2), alone=("python",), rate=1e-2, sequence_tokens=64,
    batch_records=64, clip_norm=0.1, held_out_records=16,
    speeds=dict.fromkeys(corpora.PRIVATE, 1.0), curve_steps=4,
    reply_tokens=24, timeout_s=4 * 3600.0,
    # A step takes seconds, so a slot may be longer; adapters are small, so they go as a whole.
    round_fields={"round.slot_s": 2.0, "round.deadline_s": 120.0, "round.fragments": 1},
)  # fmt: skip
"""For a model of some 100 M parameters on two cores: under 20 minutes. One peer trains alone."""
MODEL_QUICK: Final = replace(
    MODEL, steps=5, alone_rates=(), alone=(), batch_records=16, shard_bytes=1_000_000,
    held_out_records=8, curve_steps=5, reply_tokens=16,
)  # fmt: skip


def choose(given_model: bool, quick: bool, privacy: PrivacyMode) -> DemoPlan:
    """The plan for the options of `xpeer demo`."""
    full, short = (MODEL, MODEL_QUICK) if given_model else (FULL, QUICK)
    return replace(short if quick else full, privacy=privacy)


@dataclass(frozen=True)
class PublicStart:
    """The model that all peers start from."""

    folder: Path
    tokenizer: Tokenizer
    unit: Literal["byte", "token"]
    """What losses are counted by."""
    options: tuple[str, ...]
    """Options of `xpeer init` beside --model."""
    settings: Mapping[str, str]
    """Environment of nodes, for what a joiner's config.toml would say."""
    base: Path | None = None
    """Folder of the model that exported adapters are for; None = exports are whole models."""

    @property
    def base_model(self) -> str:
        """What `data.base_model` has to be; empty if whole models are trained."""
        return str(self.base or "")


def own_start(folder: Path) -> PublicStart:
    """The demo's own small model for bytes, trained whole."""
    # for two million parameters compiling takes longer than it ever saves
    settings = {"XPEER_TRAINING_COMPILE_CODEC": "0"}
    return PublicStart(folder, ByteTokenizer(), "byte", ("--tokenizer", "bytes"), settings)


def given_start(folder: Path, *, adapters: bool) -> PublicStart:
    """A pretrained model.

    Args:
        folder: holds the model and its tokenizer.
        adapters: whether adapters of it are trained, not all of it.

    Raises:
        ConfigError: there is no tokenizer in the folder.
    """
    tokenizer, settings = HuggingFaceTokenizer(folder), {"XPEER_DATA_TOKENIZER": str(folder)}
    if not adapters:
        return PublicStart(folder, tokenizer, "token", (), settings)
    settings["XPEER_DATA_BASE_MODEL"] = str(folder)
    return PublicStart(folder, tokenizer, "token", LORA, settings, folder)
