"""Options of one node for computing gradients. None of them changes what the gradients are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from torch import Tensor

from xpeer.privacy import noise
from xpeer.privacy.clipping import DEFAULT_MEMORY_BYTES, Engine
from xpeer.privacy.ranks import Ranks
from xpeer.privacy.steps import FULL, Precision


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of a mechanism.

    Attributes:
        micro_batch: records per pass; 0 = the engine chooses.
        memory_bytes: bound of what the engine keeps during a pass.
        precision: of the passes through the model in steps.
        engine: clips the records' gradients; None = the fastest exact one is chosen, as in every
            trainer. The swarms and audits of benchmarks/privacy give one, which they choose once
            for all peers and all runs; tests give wrong ones.
        generator: kind of noise generator.
        cache: folder where the choice of the engine is remembered; None = nowhere.
        relieve: saves memory where a pass of one record is too large, and returns how, for the
            operator; "" = it can't.
        divide: divides a batch into passes of at most so many rows, without privacy; then the loss
            takes records on the CPU, and puts several into a row. None = a record is a row.
        clip_norm: C of the last checkpoint, where it adapts; None = begin with the manifest's.
        ranks: ranks that take each step in common. One of them holds the ledger. None = one alone,
            as in every trainer: there is no setting yet for a node with several GPUs, which this
            is for.
    """

    micro_batch: int = 0
    memory_bytes: int = DEFAULT_MEMORY_BYTES
    precision: Precision = FULL
    engine: Engine | None = None
    generator: noise.Generator = "fast"
    cache: Path | None = None
    relieve: Callable[[], str] = lambda: ""
    divide: Callable[[Tensor, int], Sequence[Tensor]] | None = None
    clip_norm: float | None = None
    ranks: Ranks | None = None


DEFAULT: Final = Options()
