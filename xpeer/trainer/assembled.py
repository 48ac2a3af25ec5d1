"""The parts of a trainer, as `build` returns them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import msgspec
import torch

from xpeer.accounts.ledger import Ledger
from xpeer.privacy.mechanism import Mechanism
from xpeer.status import CorpusShare, PrivacySpent, ShardSummary
from xpeer.trainer.capture import Capture, FrozenValues
from xpeer.training.loop import TrainingLoop
from xpeer.training.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class TextFacts:
    """Facts about the text, once it is cut into records."""

    num_records: int
    corpus: CorpusShare | None
    shard: ShardSummary
    problem: str = ""
    """Why there is no text to take steps with; empty = the text was read, or the loop takes no
    further step anyway."""
    look_again: Callable[[], object] | None = None
    """Tries to read the missing text, and raises ShardError if it can't; None = `problem` is
    empty."""


@dataclass(frozen=True, slots=True)
class Beginning:
    """Facts to report once, when the trainer is ready."""

    device: str
    precision: str
    """In what the model computes, e.g. bfloat16."""
    resumed: bool
    """Whether training goes on from a checkpoint."""
    text: TextFacts
    notes: list[str]
    """Lines for the operator's log."""
    warnings: list[str]
    """Warnings for the operator's log."""
    steps_forfeited: int
    """Steps that were charged, but that the initial parameters do not contain."""
    uncompiled: str
    """See `Computing.uncompiled`."""


@dataclass(slots=True)
class Assembled:
    """A training loop with its ledger and its checkpoints."""

    trainer: TrainingLoop
    mechanism: Mechanism
    ledger: Ledger
    model: torch.nn.Module
    tokenizer: Tokenizer
    frozen: FrozenValues
    checkpoints: Capture
    beginning: Beginning

    def ledger_counter(self) -> int:
        """Number of privacy charges so far."""
        return self.ledger.counter

    def spent(self) -> PrivacySpent:
        """Ask the ledger what was spent, and when the budget ends; may be slow, on any thread."""
        spent = self.mechanism.spent()
        if spent.steps_left is None:
            return spent
        ends = self.ledger.ends_unix_s(spent.steps_left)
        return msgspec.structs.replace(
            spent,
            ends_unix_s=ends,
            documents_elsewhere=self.ledger.documents_elsewhere(),
            steps_forfeited=self.beginning.steps_forfeited,
        )

    def close(self) -> None:
        """Wait until the ledger is on the disk, and close it."""
        self.mechanism.close()
        self.ledger.close()
