"""What a joiner is given: our parameters, averaged with those that partners sent."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from tests.unit.training.loops import NUM_PARAMS, swap, trainer_with, unbounded
from xpeer.errors import PeerError, Reason
from xpeer.manifest.round import Round
from xpeer.mixing.received import consolidate_
from xpeer.training import handover
from xpeer.training.measuring import Evaluation


def test_a_joiner_is_given_the_mean_where_a_partner_sent_something() -> None:
    rules = Round(window_steps=4, fragments=2)
    ours, theirs = peers = [trainer_with(seed=seed, round=rules) for seed in range(2)]
    for peer in peers:
        unbounded(peer)
    alone = torch.empty(NUM_PARAMS)
    ours.show(alone)()
    assert torch.equal(alone, ours.parameters.read())

    sent = theirs.parameters.read()
    swap(ours, theirs, 1, 1)
    ours.exchanges.resolve(1, {1: 0.5})
    ours.merge(1)
    own, out = ours.parameters.read(), torch.full((NUM_PARAMS,), torch.nan)
    finish = ours.show(out)
    ours.parameters.write(own + 1)  # the next step does not wait for the copy
    finish()
    met = torch.zeros(NUM_PARAMS, dtype=torch.bool)
    indices = ours.exchanges.fragments.indices(1)
    met[indices[indices < NUM_PARAMS]] = True
    assert torch.allclose(out[met], (own + sent)[met] / 2, atol=0.05)
    assert torch.equal(out[~met], own[~met])


def test_a_model_of_whole_lines_is_averaged_where_it_is_handed_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A second copy of a large model would be in nobody's account of the memory."""
    averaged: list[int] = []
    real = consolidate_

    def recorded(flat: torch.Tensor, *others: Any) -> None:
        averaged.append(flat.data_ptr())
        real(flat, *others)

    monkeypatch.setattr(handover, "consolidate_", recorded)
    rules = Round(window_steps=4, fragments=2)
    ours, theirs = peers = [trainer_with(seed=seed, round=rules) for seed in range(2)]
    for peer in peers:
        unbounded(peer)
    swap(ours, theirs, 1, 1)
    ours.exchanges.resolve(1, {1: 0.5})
    ours.merge(1)
    out = torch.empty(NUM_PARAMS)
    ours.show(out)()
    assert averaged == [out.data_ptr()]


def test_a_donors_parameters_are_measured_as_others() -> None:
    """What is remembered of our own measurements stays."""
    loop = trainer_with(seed=0)
    loop.measurements._evaluation = Evaluation(public=lambda: 1.0, of_others=lambda: 7.0)
    with pytest.raises(PeerError, match=r"worse-than-ours: public loss 7\.000"):
        loop.replace(loop.parameters.read(), 5)


@pytest.mark.parametrize(
    ("loss", "reason"), [(math.nan, Reason.NOT_FINITE), (1e4, Reason.REFUSED), (30.0, None)]
)
def test_parameters_have_to_be_sane_on_tokens_that_the_public_text_lacks(
    loss: float, reason: str | None
) -> None:
    """Else they would be saved, and end the run at the first record that has such a token."""
    loop = trainer_with(seed=0)
    before, asked = loop.parameters.read() + 1, list[torch.Tensor]()

    def of_any_tokens() -> float:
        asked.append(loop.parameters.read())
        return loss

    loop.measurements._evaluation = Evaluation(public=lambda: 1.0, of_any_tokens=of_any_tokens)
    if reason is None:
        loop.replace(before, 5)
    else:
        with pytest.raises(PeerError, match=reason):
            loop.replace(before, 5)
    assert torch.equal(asked[0], before)


def test_no_parameter_is_huge() -> None:
    """A norm squares what it gets: finite values may be infinite there."""
    loop = trainer_with(seed=0)
    values = loop.parameters.read()
    for huge in (1e20, -1e20):
        values[3] = huge
        with pytest.raises(PeerError, match=r"values up to 1e\+20"):
            loop.replace(values, 5)
