"""How a model is cut into fragments, and what is copied out of it and added to it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from xpeer.errors import LocalError
from xpeer.mixing.cut import LINE, fragment_size, largest, padded
from xpeer.mixing.fragments import Fragments

models = st.integers(1, 300_000)
cuts = st.integers(1, 40)


def fragments_of(num_params: int, num_fragments: int) -> Fragments:
    return Fragments(num_params, min(num_fragments, padded(num_params) // LINE))


@given(models, cuts)
@settings(max_examples=60)
def test_every_value_is_in_exactly_one_fragment(num_params: int, num_fragments: int) -> None:
    fragments = fragments_of(num_params, num_fragments)
    parts = [fragments.indices(f) for f in range(fragments.num_fragments)]
    sizes = [len(part) for part in parts]
    assert torch.equal(torch.cat(parts).sort().values, torch.arange(padded(num_params)))
    assert sizes == [fragments.size(f) for f in range(fragments.num_fragments)]
    assert sizes[0] == fragment_size(num_params, fragments.num_fragments, 0)
    assert max(sizes) == largest(num_params, fragments.num_fragments)
    assert max(sizes) - min(sizes) <= 2 * LINE * fragments.num_fragments


@given(models, cuts)
@settings(max_examples=60)
def test_lines_go_where_the_formula_says(num_params: int, num_fragments: int) -> None:
    fragments = fragments_of(num_params, num_fragments)
    for f in {0, fragments.num_fragments - 1}:
        line = fragments.indices(f) // LINE
        assert bool(
            ((line + line // (13 * fragments.num_fragments)) % fragments.num_fragments == f).all()
        )


@given(models, cuts, st.integers(0, 2**31))
@settings(max_examples=60)
def test_adding_what_was_gathered_is_indexing(
    num_params: int, num_fragments: int, seed: int
) -> None:
    fragments = fragments_of(num_params, num_fragments)
    generator = torch.Generator().manual_seed(seed)
    flat = torch.randn(padded(num_params), generator=generator)
    f = seed % fragments.num_fragments
    taken = fragments.gather(flat, f)
    assert torch.equal(taken, flat[fragments.indices(f)])
    added = torch.randn(len(taken), generator=generator)
    wanted = flat.clone()
    wanted[fragments.indices(f)] += added
    fragments.add_(flat, f, added)
    assert torch.equal(flat, wanted)


@given(models, cuts, st.integers(0, 2**31), st.integers(1, 5000))
@settings(max_examples=60)
def test_pieces_are_changed_in_the_order_of_gathering(
    num_params: int, num_fragments: int, seed: int, most: int
) -> None:
    fragments = fragments_of(num_params, num_fragments)
    generator = torch.Generator().manual_seed(seed)
    flat = torch.randn(padded(num_params), generator=generator)
    f = seed % fragments.num_fragments
    added = torch.randn(fragments.size(f), generator=generator)
    starts, wanted = [0], flat.clone()
    wanted[fragments.indices(f)] += added

    def change(start: int, values: torch.Tensor) -> None:
        assert start == starts[-1]
        starts.append(start + values.numel())
        values += added[start : starts[-1]].view(values.shape)

    fragments.change_(flat, f, change, most)
    assert torch.equal(flat, wanted)
    assert starts[-1] == fragments.size(f)


@pytest.mark.parametrize("row", [576, 640, 1024, 5 * 64, 5 * 13 * 64])
def test_every_column_has_its_part_in_every_fragment(row: int) -> None:
    """Also where a row is a multiple of F lines."""
    num_rows, num_fragments = 4000, 5
    fragments = Fragments(row * num_rows, num_fragments)
    for f in range(num_fragments):
        columns = torch.bincount(fragments.indices(f) % row, minlength=row) / num_rows
        assert bool(((columns - 1 / num_fragments).abs() < 0.05).all())


def test_one_fragment_is_the_vector_itself() -> None:
    flat = torch.randn(padded(10_000))
    assert torch.equal(Fragments(10_000, 1).gather(flat, 0), flat)


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(LocalError, match="fragments = 4"):
        Fragments(150, 4)
    with pytest.raises(LocalError, match="fragment 4"):
        Fragments(1000, 4).size(4)
    with pytest.raises(LocalError, match="fragment -1"):
        Fragments(1000, 4).gather(torch.zeros(1024), -1)
