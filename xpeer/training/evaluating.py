"""Measures the loss of a table as a shard is read: row by row, texts or examples."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch

from xpeer.errors import ShardError
from xpeer.status import by_reason
from xpeer.training.formats import texts
from xpeer.training.formats.examples import Example
from xpeer.training.formats.rows import NO_CHAT
from xpeer.training.losses import choose_losses
from xpeer.training.records import FILL
from xpeer.training.tokenizer import Tokenizer
from xpeer.training.trained import BATCH_RECORDS, Evaluation, Trained, record_tokens, records_of

_TOO_LONG: Final = "too long"
Row = tuple[list[list[int]], int]
"""Sequences of a row, as `losses.inputs_of` takes them, and the bytes that are predicted."""


@dataclass(frozen=True)
class Rows:
    """The loss of a table's rows."""

    loss: Evaluation
    rows: int
    left_out: Counter[str]
    """Rows that are not measured, by reason."""


@torch.no_grad()
def evaluate_rows(trained: Trained, file: Path, text_field: str) -> Rows:
    """Compute the loss of a table's rows. None sees another one.

    A text is a whole document, as in `evaluate_text`. Of an example only what is predicted counts,
    as in training; one that does not fit into a sequence is left out.

    Raises:
        ShardError: the file can't be read, or nothing of it would be predicted.
    """
    model, left_out = trained.model, Counter[str]()
    device = next(model.parameters()).device
    losses_of, _ = choose_losses(model)
    nats, tokens, size, rows = 0.0, 0, 0, 0
    waiting: list[list[int]] = []

    def measure() -> None:
        nonlocal nats, tokens
        losses, counted = losses_of(model, _filled(waiting).to(device))
        nats += float(losses.double().sum())
        tokens += int(counted.sum())
        waiting.clear()

    for records, predicted in _rows_of(trained, file, text_field, left_out):
        rows, size = rows + 1, size + predicted
        for record in records:
            waiting.append(record)
            if len(waiting) == BATCH_RECORDS:
                measure()
    if waiting:
        measure()
    if not tokens:
        why = f": {by_reason(left_out)}" if left_out else ""
        raise ShardError(
            f"{file}: nothing in it is predicted{why}", "give rows with text, or shorter examples"
        )
    return Rows(Evaluation(tokens=tokens, bytes=size, nats=nats), rows, left_out)


def _rows_of(
    trained: Trained, file: Path, text_field: str, left_out: Counter[str]
) -> Iterator[Row]:
    tokenizer, length = trained.tokenizer, record_tokens(trained.model)
    for row in texts(file, text_field, left_out, named=True):
        if isinstance(row, str):
            yield records_of(tokenizer, row, length), len(row.encode())
        elif isinstance(row, Example):
            made = _example(tokenizer, row)
            if made is None:
                left_out[NO_CHAT] += 1
            elif len(made[0][0]) > length:
                left_out[_TOO_LONG] += 1
            else:
                yield made


def _example(tokenizer: Tokenizer, example: Example) -> Row | None:
    marked = tokenizer.chat.mark(example)
    if marked is None:
        return None
    (encoded,) = tokenizer.encode_marked([marked])
    ids = [-2 - value // 2 if value % 2 else value // 2 for value in encoded.tolist()]
    return [ids], sum(len(marked.text[begin:end].encode()) for begin, end in marked.spans)


def _filled(records: list[list[int]]) -> torch.Tensor:
    longest = max(map(len, records))
    return torch.tensor([[*record, *[FILL] * (longest - len(record))] for record in records])
