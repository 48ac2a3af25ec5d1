"""Combiners: what several partners' differences come to, and what hostile ones can do about it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.training.loops import NUM_PARAMS, trainer_with, unbounded
from xpeer.errors import PeerError, Reason
from xpeer.forms import Form
from xpeer.manifest.round import Round
from xpeer.mixing.combine import Mean, TrimmedMean, make
from xpeer.mixing.cut import padded
from xpeer.mixing.received import consolidate_
from xpeer.training.loop import TrainingLoop
from xpeer.update import PeerUpdate
from xpeer.wire import codec

sizes = st.sampled_from([1, 5, 1000, (1 << 14) + 3])
seeds = st.integers(0, 2**31)


def randn(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def trimmed(differences: torch.Tensor, trim: int) -> torch.Tensor:
    """Of (m, V, n), which stays as it was."""
    return TrimmedMean(trim).combine(list(differences.clone()), [0.1] * len(differences)).scaled()


@given(
    trim=st.integers(1, 3), more=st.integers(0, 3), hostile=st.integers(0, 3), n=sizes, seed=seeds,
    size=st.sampled_from([-1e30, -3.0, 0.0, 1e-3, 5.0, 1e38]),
)  # fmt: skip
@settings(max_examples=100)
def test_hostile_values_never_leave_the_honest_range(
    trim: int, more: int, hostile: int, n: int, seed: int, size: float
) -> None:
    """Ours is honest; at most k of the others are not, and each sends what it likes."""
    honest = randn(seed, 2 * trim + more - min(hostile, trim), 1, n)
    attack = size * (1 + randn(seed + 1, min(hostile, trim), 1, n).abs())
    shift = trimmed(torch.cat((honest, attack.clamp(-3e38, 3e38))), trim)
    own = torch.zeros(1, 1, n)
    low, high = torch.cat((honest, own)).aminmax(dim=0)
    slack = 1e-6 * torch.maximum(low.abs(), high.abs())
    assert bool((low - slack <= shift).all())
    assert bool((shift <= high + slack).all())


@given(m=st.integers(1, 7), vectors=st.integers(1, 2), n=sizes, seed=seeds)
@settings(max_examples=40)
def test_nothing_trimmed_is_the_mean(m: int, vectors: int, n: int, seed: int) -> None:
    differences = randn(seed, m, vectors, n)
    mean = Mean().combine(list(differences.clone()), [1 / (m + 1)] * m).scaled()
    assert torch.allclose(trimmed(differences, 0), mean, atol=1e-6)
    assert torch.allclose(mean, differences.sum(0) / (m + 1), atol=1e-6)


@given(trim=st.integers(1, 3), more=st.integers(0, 2), n=sizes, seed=seeds)
@settings(max_examples=40)
def test_the_order_of_partners_is_nothing(trim: int, more: int, n: int, seed: int) -> None:
    differences = randn(seed, 2 * trim + more, 2, n)
    order = torch.randperm(len(differences), generator=torch.Generator().manual_seed(seed))
    one, other = trimmed(differences, trim), trimmed(differences[order], trim)
    assert torch.allclose(one, other, atol=1e-6)  # but for the order of a sum


def test_a_case_by_hand() -> None:
    """Of {0, 1, 2, 9} and {0, -5, 4, 1}: the middle two each."""
    differences = torch.tensor([[[1.0, -5.0]], [[2.0, 4.0]], [[9.0, 1.0]]])
    assert trimmed(differences, 1).tolist() == [[1.5, 0.5]]


@given(m=st.integers(1, 5), seed=seeds)
@settings(max_examples=20)
def test_the_mean_is_the_weighted_sum_to_the_bit(m: int, seed: int) -> None:
    differences, weights = randn(seed, m, 1, 50), randn(seed + 1, m).abs().tolist()
    expected = differences[0] * weights[0]
    for values, weight in zip(differences[1:], weights[1:], strict=True):
        expected = expected.add(values, alpha=weight)
    assert torch.equal(Mean().combine(list(differences.clone()), weights).scaled(), expected)


@pytest.mark.parametrize(("trim", "partners"), [(1, 1), (2, 3)])
def test_too_few_partners_decide_nothing(trim: int, partners: int) -> None:
    with pytest.raises(PeerError, match=Reason.GROUP_TOO_SMALL):
        trimmed(torch.ones(partners, 1, 3), trim)
    trimmed(torch.ones(partners + 1, 1, 3), trim)


# Through a trainer


def peers_of(k: int, **changes: Any) -> list[TrainingLoop]:
    rules = Round(window_steps=4, fragments=1, codec="float32", group=k, **changes)
    peers = [trainer_with(seed=seed, round=rules) for seed in range(k)]
    for peer in peers:
        unbounded(peer)
    return peers


def meet(peers: list[TrainingLoop], attack: torch.Tensor, hostile: int) -> None:
    """All exchange with all; the hostile one sends what it likes."""
    form = Form("float32", attack.numel())
    sent = [
        bytes(p.exchanges.compress(1, p.snapshot(1, 0, averaging=False)).payload) for p in peers
    ]
    sent[hostile] = codec.encode("float32", attack)
    for number, peer in enumerate(peers):
        others = [other for other in range(len(peers)) if other != number]
        for other in others:
            peer.exchanges.verify(1, other, PeerUpdate(sent[other], form, f"peer {other}"))
        peer.exchanges.resolve(1, dict.fromkeys(others, 1 / len(peers)))
        peer.merge(1)


@pytest.mark.parametrize("trim", [1, 2])
def test_a_group_of_five_stays_in_its_honest_range_and_agrees(trim: int) -> None:
    peers = peers_of(5, combiner="trimmed-mean", trim=trim)
    before = torch.stack([peer.parameters.read() for peer in peers[:-1]])
    meet(peers, 1e6 * randn(9, NUM_PARAMS), hostile=4)
    low, high = before.aminmax(dim=0)
    after = [peer.parameters.read() for peer in peers[:-1]]
    for each in after:
        assert bool(((low - 1e-5 <= each) & (each <= high + 1e-5)).all())
        assert torch.allclose(each, after[0], atol=1e-5)
    assert not torch.equal(after[0], before[0])
    own, received = after[0], peers[0].exchanges.consolidation.now()
    shown = torch.nn.functional.pad(own, (0, padded(len(own)) - len(own)))
    consolidate_(shown, peers[0].exchanges.fragments, received)
    assert torch.allclose(shown[: len(own)], own, atol=0.05)  # no value of the hostile one is in it


def test_without_trimming_one_of_five_moves_all() -> None:
    peers = peers_of(5)
    meet(peers, torch.full((NUM_PARAMS,), 1e6), hostile=4)
    assert float(peers[0].parameters.read().abs().min()) > 1e5


def test_a_meeting_of_too_few_is_not_merged_and_can_be_dropped() -> None:
    a, b, *_ = peers_of(3, combiner="trimmed-mean")
    before = a.parameters.read()
    update = b.exchanges.compress(1, b.snapshot(1, 0, averaging=False))
    a.exchanges.compress(1, a.snapshot(1, 0, averaging=False))
    a.exchanges.verify(1, 1, PeerUpdate(update.payload, update.form, "b"))
    with pytest.raises(PeerError, match=Reason.GROUP_TOO_SMALL):
        a.exchanges.resolve(1, {1: 1 / 3})
    a.exchanges.drop(1)
    a.merge(1)
    assert torch.equal(a.parameters.read(), before)


@pytest.mark.parametrize("rule", ["diloco", "noloco", "gasloc", "gradient"])
def test_rules_get_what_a_combiner_made(rule: str) -> None:
    """Three peers of which two are the same: the median is theirs, whatever the third sends."""
    group, steps = 0 if rule in ("diloco", "gradient") else 3, 2
    rules = Round(
        rule=rule,  # type: ignore[arg-type] # a name of the list
        window_steps=steps,
        fragments=1,
        codec="float32",
        group=group,
        combiner="trimmed-mean",
    )
    peers = [trainer_with(seed=0, round=rules) for _ in range(3)]
    for peer in peers:
        unbounded(peer)
        peer.run(steps=steps)
    updates = [p.exchanges.compress(1, p.snapshot(1, 0, averaging=False)) for p in peers]
    form = updates[0].form
    same = bytes(updates[2].payload)
    far = codec.encode("float32", torch.full((form.num_values,), 1e6))
    for peer, third in zip(peers[:2], (far, same), strict=True):
        peer.exchanges.verify(1, 1, PeerUpdate(same, form, "b"))
        peer.exchanges.verify(1, 2, PeerUpdate(third, form, "c"))
        peer.exchanges.resolve(1, {1: 1 / 3, 2: 1 / 3})
        peer.merge(1)
        if rule == "gradient":
            peer._finish_gradient()
    attacked, reference = (peer.parameters.read() for peer in peers[:2])
    assert torch.allclose(attacked, reference, atol=1e-6)


def test_the_manifest_chooses() -> None:
    assert isinstance(make(Round()), Mean)
    chosen = make(Round(combiner="trimmed-mean", trim=2, group=5))
    assert isinstance(chosen, TrimmedMean)
    assert not chosen.trusts_each
