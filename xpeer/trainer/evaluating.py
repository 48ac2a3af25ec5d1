"""Measures losses: on the public text, and on text held out of the shard.

What joiners are given is measured beside training, on a few records of the public text. How much
these records' loss differs from all records' is known from the last measurement of all.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable
from functools import partial
from typing import Final

import torch

from xpeer.manifest import Manifest
from xpeer.privacy.clipping import RecordLosses
from xpeer.trainer.computing import Computing
from xpeer.training.document import document_of
from xpeer.training.losses import choose_losses, evaluate, inputs_of
from xpeer.training.measuring import Evaluation, spread
from xpeer.training.records import cut
from xpeer.training.tokenizer import Tokenizer
from xpeer.training.twin import Twin

PUBLIC_RECORDS: Final = 64
"""Most records of the public text to measure on: evenly spread, and the same at every peer."""
BESIDE_RECORDS: Final = 4
"""Most records of them that are measured beside training, for a joiner. All of them take as long as
ten steps of few records; a donor's steps should not become slower by a twentieth."""


class Public:
    """Measures on the manifest's public text.

    Args:
        records: of it.
        computing: how the model computes.
        beat: called after each pass.
        beside: records of a pass beside training, in the memory that this leaves.
    """

    def __init__(
        self,
        records: torch.Tensor,
        computing: Computing,
        beat: Callable[[], None],
        beside: int = 1,
    ) -> None:
        chosen = spread(torch.arange(len(records)), BESIDE_RECORDS)
        others = torch.ones(len(records), dtype=torch.bool)
        others[chosen] = False
        self._few, self._others = records[chosen], records[others]
        self._evaluate = partial(evaluate, on_progress=beat, precision=computing.precision)
        self._micro_batch, self._beside = computing.measured_records, beside
        self._ratio: float | None = None
        """Loss of all records over that of a few, with our own parameters as measured last; None =
        not yet. A donor that is refused must not change what we offer, nor what was begun beside
        training before we measured."""

    def of_all(self, model: torch.nn.Module, losses: RecordLosses) -> float:
        """Measure a model on all records, in nats per token."""
        return self._measured(model, losses, self._micro_batch)[0]

    def of_own(self, model: torch.nn.Module, losses: RecordLosses) -> float:
        """The same with our own parameters: `of_few` then goes by their ratio."""
        loss, few = self._measured(model, losses, self._micro_batch)
        self._ratio = _ratio(loss, few)
        return loss

    def _measured(
        self, model: torch.nn.Module, losses: RecordLosses, size: int
    ) -> tuple[float, float]:
        """Loss of all records, and of a few; `size` records of a pass."""
        parts = [records for records in (self._few, self._others) if len(records)]
        means = [self._evaluate(model, part, size, losses_of_records=losses) for part in parts]
        tokens = [int((inputs_of(part)[1] >= 0).sum()) for part in parts]
        nats = sum(mean * count for mean, count in zip(means, tokens, strict=True))
        return nats / sum(tokens), means[0]

    def of_few(self, model: torch.nn.Module, losses: RecordLosses) -> float:
        """Estimate what `of_own` would measure, from a few records; at first, measure all."""
        if self._ratio is None:
            loss, few = self._measured(model, losses, self._beside)
            if self._ratio is None:  # training may have measured meanwhile
                self._ratio = _ratio(loss, few)
            return loss
        return self._ratio * self._evaluate(
            model, self._few, self._beside, losses_of_records=losses
        )


def _ratio(of_all: float, of_few: float) -> float | None:
    return of_all / of_few if of_few > 0 else None


def any_tokens(vocabulary: int, sequence_tokens: int) -> torch.Tensor:
    """Records of token ids in an order that nobody can know before; each id once, if there is room.

    Returns:
        (records, sequence_tokens) int64, PUBLIC_RECORDS at most.
    """
    generator = torch.Generator().manual_seed(secrets.randbits(63))
    count = min(PUBLIC_RECORDS, -(-vocabulary // sequence_tokens))
    ids = torch.randperm(vocabulary, generator=generator)
    more = -(-count * sequence_tokens // vocabulary)
    return ids.repeat(more)[: count * sequence_tokens].view(count, sequence_tokens)


def evaluation_of(
    manifest: Manifest,
    tokenizer: Tokenizer,
    model: torch.nn.Module,
    twin: Twin,
    computing: Computing,
    held_out: torch.Tensor,
    beat: Callable[[], None],
) -> Evaluation:
    """Prepare to measure the model's losses, and those of values that joiners are given.

    Args:
        manifest: of the swarm.
        tokenizer: of the model.
        model: in training.
        twin: of the model. It measures on the public text alone.
        computing: how the model computes.
        held_out: (n, T) int64: records of the shard's held-out text.
        beat: called after each pass.
    """
    document = document_of(manifest.public_text.text, "public text")
    length = manifest.optimiser.sequence_tokens
    records = spread(cut([document], tokenizer, length), PUBLIC_RECORDS)
    public = Public(records, computing, beat, twin.records)
    losses_of_twin: RecordLosses | None = None

    def of_copy(values: torch.Tensor) -> float:
        nonlocal losses_of_twin
        with twin.with_values(values):
            losses_of_twin = losses_of_twin or choose_losses(twin.model)[0]
            return public.of_few(twin.model, losses_of_twin)

    of_records = partial(
        evaluate,
        model,
        micro_batch=computing.measured_records,
        on_progress=beat,
        precision=computing.precision,
        losses_of_records=computing.losses,
    )
    return Evaluation(
        public=partial(public.of_own, model, computing.losses),
        of_others=partial(public.of_all, model, computing.losses),
        of_any_tokens=lambda: of_records(any_tokens(tokenizer.vocab_size, length)),
        validation=partial(of_records, held_out) if len(held_out) else None,
        of_copy=of_copy,
    )
