"""A trainer and what belongs to it, as `build` leaves it."""

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
    """What is known of the text once it was cut into records."""

    num_records: int
    corpus: CorpusShare | None
    shard: ShardSummary
    problem: str = ""
    """Why no step is taken; empty = the text was read."""
    look_again: Callable[[], object] | None = None
    """Of a trainer without text: reads it, or raises ShardError; None = there is text."""


@dataclass(frozen=True, slots=True)
class Beginning:
    """What there is to say once, when the trainer is ready."""

    device: str
    resumed: bool
    """Whether it goes on from a checkpoint."""
    text: TextFacts
    notes: list[str]
    """What the operator should know."""
    warnings: list[str]
    """What is not as it should be."""
    steps_forfeited: int
    """Charged, and not behind the parameters that training began with."""


@dataclass(slots=True)
class Assembled:
    """A trainer, the account that it charges, and its checkpoints."""

    trainer: TrainingLoop
    mechanism: Mechanism
    ledger: Ledger
    model: torch.nn.Module
    tokenizer: Tokenizer
    frozen: FrozenValues
    checkpoints: Capture
    beginning: Beginning

    def ledger_counter(self) -> int:
        """Privacy charges so far."""
        return self.ledger.counter

    def spent(self) -> PrivacySpent:
        """What the ledger was charged, and when it ends; may take a moment, on any thread."""
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
        """Wait for the ledger's disk, and close it."""
        self.mechanism.close()
        self.ledger.close()
