"""The norm limit: what it learns from, what bounds it, and that honest peers are hardly clipped."""

from __future__ import annotations

import pytest
import torch

from xpeer.mixing.screen import (
    CAP,
    CLIP_AFTER,
    CLIP_FLOOR,
    CLIP_MULTIPLE,
    FLOOR,
    LEAST_DECAYED,
    LEAST_WARMED_UP,
    MAX_PARTNERS,
    STALE_MERGES,
    STALE_SHARE,
    Movement,
    NormLimit,
    RateShare,
    Scale,
)

OWN = 100.0
M = Scale(moved=1.0)


def taught(**norms: float) -> NormLimit:
    limit = NormLimit()
    for partner, norm in norms.items():
        for _ in range(CLIP_AFTER):
            limit.accepted(norm, partner)
    return limit


def test_without_any_history_the_limit_follows_from_our_own_training() -> None:
    assert NormLimit().limit(OWN, M, "a") == CAP
    assert NormLimit().limit(OWN, Scale(), "a") == OWN  # nobody has trained yet


def test_the_limit_is_a_multiple_of_what_the_others_are_apart() -> None:
    limit = taught(a=2.0, b=2.5)
    assert limit.limit(OWN, M, "a") == CLIP_MULTIPLE * 2.5
    assert limit.limit(OWN, M, "b") == CLIP_MULTIPLE * 2.0
    assert limit.limit(OWN, M, "c") == CLIP_MULTIPLE * 2.0  # of two, the lower


@pytest.mark.parametrize("norm", [1e-9, 0.5, 3.9, 1e6])
def test_floor_and_cap_hold_whatever_partners_teach(norm: float) -> None:
    limit = taught(a=norm, b=norm, c=norm)
    assert FLOOR <= limit.limit(OWN, M, "d") <= CAP


def test_nobody_raises_its_own_limit() -> None:
    limit = taught(honest=1.5, other=1.5)
    before = limit.limit(OWN, M, "bad")
    for _ in range(100):
        limit.accepted(limit.limit(OWN, M, "bad"), "bad")  # always just within
    assert limit.limit(OWN, M, "bad") == before


def test_an_attacker_that_is_far_away_starves_no_honest_partner_and_one_that_is_near_neither() -> (
    None
):
    for norm in (0.0, CAP):
        limit = taught(honest=1.5, bad=norm)
        assert limit.limit(OWN, M, "honest") >= FLOOR


def test_who_is_clipped_again_and_again_is_heard_less_and_forgiven_at_once() -> None:
    limit = taught(a=2.0, b=2.0)
    kept = []
    for _ in range(6):
        kept.append(limit.kept(OWN, 80.0, M, "bad"))
        limit.clipped("bad")
    assert kept == [8.0, 4.0, 2.0, 2.0, 2.0, 2.0]
    assert limit.kept(OWN, 80.0, M, "a") == 8.0  # nobody else pays for it
    assert limit.kept(OWN, 7.9, M, "bad") == 7.9  # an honest one that was too far away once
    limit.accepted(7.9, "bad")
    assert limit.kept(OWN, 80.0, M, "bad") == 8.0


def test_a_median_of_zero_does_not_keep_peers_apart() -> None:
    assert taught(a=0.0, b=0.0).limit(OWN, Scale(), "a") == CLIP_FLOOR * OWN


def test_a_joiner_or_a_node_that_resumed_lets_others_be_farther_away() -> None:
    assert NormLimit().limit(OWN, Scale(0.1, stale=True), "a") == STALE_SHARE * OWN
    assert taught(b=9.0).limit(OWN, Scale(0.1, stale=True), "a") == CLIP_MULTIPLE * 9.0


def test_gradients_are_measured_by_our_own() -> None:
    limit = NormLimit(of_differences=True)
    assert limit.limit(OWN, M, "a") == CAP * OWN


def test_movements_are_measured_by_how_far_we_usually_move_if_we_took_no_step() -> None:
    """A fragment meets twice without a step between: our pseudo-gradient is what a codec left."""
    limit = NormLimit(of_differences=True, of_movements=True)
    left = 1e-3
    assert limit.limit(left, M, "a") == CAP * M.moved
    assert limit.kept(left, 2.0, M, "a") == 2.0
    assert limit.limit(5.0, M, "a") == CAP * 5.0
    assert NormLimit(of_differences=True).limit(left, M, "a") == CAP * left  # a gradient is none


def test_a_masked_group_has_no_others_and_is_bounded_all_the_same() -> None:
    limit = NormLimit()
    for _ in range(CLIP_AFTER):
        limit.accepted(2.0)
    assert limit.limit(OWN, M) == CLIP_MULTIPLE * 2.0


def test_the_memory_of_partners_is_bounded() -> None:
    limit = NormLimit()
    for number in range(3 * MAX_PARTNERS):
        limit.accepted(1.0, f"peer{number}")
    assert len(limit._accepted) == MAX_PARTNERS


@pytest.mark.parametrize("n", [10, 5_000, 100_000])
def test_movement_is_what_training_does_and_no_merge(n: int) -> None:
    generator = torch.Generator().manual_seed(0)
    theta, movement = torch.randn(n, generator=generator), Movement(1)
    movement.begin(0, theta)
    assert movement.scale(0, theta) == Scale(0.0)
    step = torch.randn(n, generator=generator)
    theta = theta + step
    assert movement.scale(0, theta).moved == pytest.approx(float(step.norm()), rel=0.1)
    far = 1e3 * torch.randn(n, generator=generator)  # whatever a partner makes of us
    movement.merged(0, theta, far, 0.5)
    theta = theta + 0.5 * far + step  # one more step while it was in flight
    assert movement.scale(0, theta).moved == pytest.approx(float(step.norm()), rel=0.1)


def test_who_has_stopped_training_keeps_its_measure() -> None:
    theta, movement = torch.zeros(1000), Movement(1)
    movement.begin(0, theta)
    for _ in range(5):
        movement.merged(0, theta + 1.0, torch.zeros(1000), 1.0)
        theta = theta + 1.0
    before = movement.scale(0, theta).moved
    for _ in range(50):  # the closing consolidation
        movement.merged(0, theta, torch.zeros(1000), 1.0)
    assert before == movement.scale(0, theta).moved == pytest.approx(1000**0.5)


def test_a_checkpoint_lies_behind_for_some_merges() -> None:
    theta, movement = torch.zeros(10), Movement(2)
    for fragment in (0, 1):
        movement.begin(fragment, theta)
    movement.lies_behind()
    for _ in range(2 * STALE_MERGES):
        assert movement.scale(0, theta).stale
        movement.merged(0, theta, theta, 1.0)
    assert not movement.scale(0, theta).stale


def test_others_at_another_place_of_the_run_may_move_more() -> None:
    theta, movement = torch.zeros(100), Movement(1)
    movement.begin(0, theta)
    theta = theta + 0.1
    moved = movement.scale(0, theta).moved
    for rate, times in (
        (RateShare(warmed_up=0.5), 2),
        (RateShare(warmed_up=0.01), 1 / LEAST_WARMED_UP),
        (RateShare(decayed=0.8), 1.25),
        (RateShare(decayed=0.1), 1 / LEAST_DECAYED),
    ):
        assert movement.scale(0, theta, rate).moved == pytest.approx(times * moved)
