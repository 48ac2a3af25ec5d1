"""Gradients of an output layer some rows at a time, against the same written down as a whole."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, nn

from xpeer.errors import ConfigError
from xpeer.privacy import blocks
from xpeer.privacy.blocks import Blocked
from xpeer.privacy.layers import Outer, Part
from xpeer.privacy.record_gradients import RecordGradients

RECORDS, TOKENS, ROWS, WIDTH = 3, 5, 23, 4


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four rows at a time: 23 are not divisible by that."""
    monkeypatch.setattr(blocks, "_CPU_BLOCK", 4 * RECORDS * TOKENS)


def some(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def blocked(rows: Tensor, cols: Tensor) -> Blocked:
    return Blocked(lambda start, stop: rows[:, :, start:stop], cols, rows.shape[2])


def made(kind: str) -> tuple[Part, Tensor]:
    """A term of this kind, and the same written down."""
    cols = some(RECORDS, TOKENS, WIDTH, seed=len(kind))
    rows = some(RECORDS, TOKENS, ROWS, seed=1 + len(kind))
    if kind == "tensor":
        written = some(RECORDS, ROWS, WIDTH)
        return written, written
    if kind == "tokens":
        ids = torch.randint(0, ROWS, (RECORDS, TOKENS), generator=torch.Generator().manual_seed(2))
        return Outer(ids, cols), torch.einsum(
            "btp,btd->bpd", nn.functional.one_hot(ids, ROWS).float(), cols
        )
    whole = torch.einsum("btp,btd->bpd", rows, cols)
    return (Outer(rows, cols) if kind == "vectors" else blocked(rows, cols)), whole


KINDS = ("blocked", "tokens", "vectors", "tensor", "blocked too")


@pytest.mark.parametrize("small", [True, False])
@pytest.mark.parametrize("others", [0, 1, 2, 4])
def test_norms_and_sums_do_not_depend_on_how_terms_are_kept(small: bool, others: int) -> None:
    """A tied matrix has terms of several kinds, and they come in any order."""
    factors = torch.tensor([0.5, 0.0, 2.0])
    for kinds in itertools.permutations(KINDS, 1 + others):
        gradients = RecordGradients(nn.Parameter(torch.zeros(ROWS, WIDTH)), TOKENS if small else 1)
        whole = torch.zeros(RECORDS, ROWS, WIDTH)
        for kind in kinds:
            part, written = made(kind)
            gradients.take(part)
            whole += written
        squares = torch.as_tensor(gradients.squares())
        torch.testing.assert_close(squares, whole.double().square().sum((1, 2)), rtol=1e-5, atol=0)
        total = torch.ones(ROWS, WIDTH)
        gradients.add_weighted(factors, total)
        expected = 1 + torch.einsum("b,bpd->pd", factors, whole)
        torch.testing.assert_close(total, expected, rtol=1e-5, atol=1e-5)


def test_terms_that_all_but_cancel_keep_their_norm() -> None:
    """Inner products would lose it: here it is 1e-5 of what the terms are."""
    part, written = made("blocked")
    gradients = RecordGradients(nn.Parameter(torch.zeros(ROWS, WIDTH)), 1)
    gradients.take(part)
    left = 1e-5 * some(RECORDS, ROWS, WIDTH, seed=9)
    gradients.take(left - written)
    norms = torch.as_tensor(gradients.squares()).sqrt()
    torch.testing.assert_close(norms, left.double().square().sum((1, 2)).sqrt(), rtol=0.05, atol=0)


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16, torch.float64])
def test_gradients_that_differ_the_second_time_are_not_added_up(kind: torch.dtype) -> None:
    """By the last bit of one value: then what was measured is not what is added up."""
    rows, times = some(RECORDS, TOKENS, ROWS).to(kind), 0

    def unsteady(start: int, stop: int) -> Tensor:
        nonlocal times
        times += start == 0
        block = rows[:, :, start:stop].clone()
        if times > steady and start <= 20 < stop:
            block[1, 2, 20 - start] *= 1 + 2 * torch.finfo(kind).eps
        return block

    for steady in (2, 1):
        times = 0
        gradients = RecordGradients(nn.Parameter(torch.zeros(ROWS, WIDTH)), 1)
        gradients.take(Blocked(unsteady, some(RECORDS, TOKENS, WIDTH), ROWS))
        gradients.squares()
        total = torch.zeros(ROWS, WIDTH)
        if steady == 2:
            gradients.add_weighted(torch.ones(RECORDS), total)
        else:
            with pytest.raises(ConfigError, match="computed twice, differ"):
                gradients.add_weighted(torch.ones(RECORDS), total)


def test_what_was_not_measured_is_not_added_up() -> None:
    part = blocked(some(RECORDS, TOKENS, ROWS), some(RECORDS, TOKENS, WIDTH))
    part.block(0, 4)
    with pytest.raises(RuntimeError, match="not measured"):
        part.add_weighted(torch.ones(RECORDS), torch.zeros(ROWS, WIDTH))


def test_a_bias_is_the_sum_over_tokens() -> None:
    rows, cols = some(RECORDS, TOKENS, ROWS), some(RECORDS, TOKENS, WIDTH)
    torch.testing.assert_close(blocked(rows, cols).sums(), rows.sum(1))


def test_blocks_cover_all_rows_and_are_bounded() -> None:
    part = blocked(some(RECORDS, TOKENS, ROWS), some(RECORDS, TOKENS, WIDTH))
    spans = list(part.parts())
    assert [row for start, stop in spans for row in range(start, stop)] == list(range(ROWS))
    assert {stop - start for start, stop in spans} == {4, 3}
    wide = blocked(some(RECORDS, TOKENS, ROWS), some(RECORDS, TOKENS, 4 * TOKENS))
    assert next(wide.parts()) == (0, 1), "a written block is bounded, too"
