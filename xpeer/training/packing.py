"""Short records side by side in one row, so that a pass computes next to no filling.

Without privacy only: there one example is one row, whose gradient is clipped. A record's loss stays
what it is alone. Its positions begin at zero, its tokens attend to no other record's (transformers
makes that mask where positions begin anew in a row), and its last token predicts nothing. Whether a
model's family keeps to that is tried out, not listed.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import torch
from torch import Tensor, nn

from xpeer.training.losses import (
    NO_TARGET,
    TokenLosses,
    inputs_of,
    takes_positions,
    token_losses,
)
from xpeer.training.losses import transformers_model as model_in
from xpeer.training.piece_table import Array, expanded
from xpeer.training.records import FILL

_WIDTH: Final = 512
"""Tokens of a row, unless a record has more: attention costs as much as all of a row's pairs."""
_STEP: Final = 64
"""Widths are multiples of this, so that a device meets few of them."""
_BY_LENGTH: Final = frozenset({"dynamic", "longrope"})
_TRIED: Final = 12
"""Tokens of the short records on which it is tried out whether records stay apart."""


class PackedLosses:
    """`losses.record_losses` of one model, with several records in a row.

    Args:
        model: on its device.
    """

    def __init__(self, model: nn.Module) -> None:
        self._losses: TokenLosses = token_losses(model)
        self._device = next(model.parameters()).device

    def __call__(self, _model: nn.Module, records: Tensor) -> tuple[Tensor, Tensor]:
        """See `losses.record_losses`; (records, T) int64, on the CPU."""
        sizes = _sizes(records)
        rows = _rows(sizes, records.shape[1] - 1)
        ids, targets = inputs_of(records)
        counted = (targets >= 0).sum(1).to(self._device)
        width = min(records.shape[1] - 1, -_STEP * (-max(_used(rows, sizes)) // _STEP))
        if len(rows) == len(records):  # nothing is gained by moving them
            ids, targets = ids[:, :width], targets[:, :width]
            return self._of_tokens(ids, targets, None).sum(1), counted
        owners, within, place = _places(rows, sizes, width)
        shape = len(rows), width
        source = torch.from_numpy(owners * ids.shape[1] + within)
        to = torch.from_numpy(place)
        packed = torch.zeros(len(rows) * width, dtype=torch.int64)
        wanted, positions = torch.full_like(packed, NO_TARGET), _positions(rows, sizes, width)
        packed[to], wanted[to] = ids.flatten()[source], targets.flatten()[source]
        each = self._of_tokens(packed.view(shape), wanted.view(shape), positions)
        chosen = each.flatten()[to.to(self._device)]
        sums = torch.zeros(len(records), dtype=each.dtype, device=self._device)
        return sums.index_add(0, torch.from_numpy(owners).to(self._device), chosen), counted

    def divide(self, records: Tensor, rows: int) -> list[Tensor]:
        """Divide a batch into passes, each (k, T).

        A pass computes at most as many tokens as `rows` full records have.
        """
        longest = records.shape[1] - 1
        sizes = _sizes(records)
        found = _rows(sizes, longest)
        found.sort(key=lambda row: len(row) > 1)  # those that need no mask are apart
        alone = sum(len(row) == 1 for row in found)
        passes, at = [], 0
        while at < len(found):
            first = int(sizes[found[at][0]])  # the others' are no longer
            width = first if at < alone else _capacity(first, longest)
            end = at + max(1, rows * longest // width)
            some = found[at : min(end, alone) if at < alone else end]
            passes.append(records[torch.tensor(sorted(n for row in some for n in row))])
            at += len(some)
        return passes

    def _of_tokens(self, ids: Tensor, targets: Tensor, positions: Tensor | None) -> Tensor:
        if positions is not None:
            positions = positions.to(self._device)
        return self._losses(ids.to(self._device), targets.to(self._device), positions)


def choose_packing(model: nn.Module, num_tokens: int) -> tuple[PackedLosses | None, str]:
    """Packed losses, if this model's records stay apart in a row; and a note for the operator.

    Args:
        model: on its device.
        num_tokens: T.
    """
    inner = model_in(model)
    if takes_positions(inner) and not _by_length(inner.config.to_dict()):
        packed = PackedLosses(model)
        if _stay_apart(packed, inner, num_tokens):
            return packed, "short records are packed: several in a sequence, each as if alone"
    family = inner.config.model_type
    return None, f"short records are not packed: {family} does not keep them apart in a sequence"


def _by_length(config: object) -> bool:
    """Whether positions are scaled by the longest record of a pass. `_stay_apart` can't notice
    that: its records are too short.
    """
    if not isinstance(config, dict):
        return False
    kinds = {config.get("rope_type"), config.get("type")}
    return bool(kinds & _BY_LENGTH) or any(map(_by_length, config.values()))


@torch.no_grad()
def _stay_apart(packed: PackedLosses, inner: Any, num_tokens: int) -> bool:
    """Whether arbitrary records have the same losses in one row as each alone, token by token."""
    short = min(_TRIED, (num_tokens - 1) // 3)
    sizes = [min(num_tokens - 1, _WIDTH) - 2 * short, short, short]
    generator = torch.Generator().manual_seed(1)
    vocabulary = inner.get_input_embeddings().weight.shape[0]
    text = torch.randint(0, vocabulary, (sum(sizes) + 1,), generator=generator)[None]
    ids, targets = text[:, :-1], text[:, 1:]
    positions = torch.cat([torch.arange(size) for size in sizes])[None]
    of_row = packed._of_tokens(ids, targets, positions)
    alone = [
        packed._of_tokens(some, wanted, None)
        for some, wanted in zip(
            torch.split(ids, sizes, 1), torch.split(targets, sizes, 1), strict=True
        )
    ]
    return torch.allclose(of_row, torch.cat(alone, 1), rtol=1e-4, atol=1e-4)


def _sizes(records: Tensor) -> Array:
    """Tokens that are read of each record, (k,) int64."""
    sizes: Array = ((records != FILL).sum(1) - 1).clamp(min=1).numpy()
    return sizes


def _rows(sizes: Array, longest: int) -> list[list[int]]:
    """Put records into rows: the longest first, each into the first row that has room (first fit).

    The records of some of these rows make the same rows again. So a pass finds its rows by itself.
    """
    rows: list[list[int]] = []
    room = np.zeros(len(sizes), np.int64)
    for number in np.argsort(-sizes, kind="stable").tolist():
        size = int(sizes[number])
        fits = np.flatnonzero(room[: len(rows)] >= size)
        if len(fits):
            row = int(fits[0])
        else:
            row = len(rows)
            rows.append([])
            room[row] = _capacity(size, longest)
        rows[row].append(number)
        room[row] -= size
    return rows


def _capacity(size: int, longest: int) -> int:
    """Tokens that fit into a row whose first record has `size` tokens."""
    return longest if size > _WIDTH else min(longest, _WIDTH)


def _used(rows: list[list[int]], sizes: Array) -> list[int]:
    """Tokens in each row."""
    return [int(sizes[row].sum()) for row in rows]


def _places(rows: list[list[int]], sizes: Array, width: int) -> tuple[Array, Array, Array]:
    """For each token in the rows: its record, its place in it, and its place in all rows."""
    order = np.array([number for row in rows for number in row], np.int64)
    begins = [row * width - used for row, used in enumerate(np.cumsum([0, *_used(rows, sizes)]))]
    firsts = np.repeat(np.array(begins[:-1], np.int64), [len(row) for row in rows])
    counts = sizes[order]
    within = expanded(np.zeros(len(order), np.int64), counts)
    place = np.arange(len(within), dtype=np.int64) + np.repeat(firsts, counts)
    return np.repeat(order, counts), within, place


def _positions(rows: list[list[int]], sizes: Array, width: int) -> Tensor:
    """Positions of all rows, (rows, width) int64; filling goes on after the last record."""
    found = np.empty((len(rows), width), np.int64)
    for number, row in enumerate(rows):
        counts = sizes[row].copy()
        counts[-1] += width - counts.sum()
        found[number] = expanded(np.zeros(len(row), np.int64), counts)
    return torch.from_numpy(found)
