"""Fixed-point sums: rounding, decoding near own values, and every case that must be refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.factories import privacy_stamp
from xpeer.errors import LocalError, PeerError, Reason
from xpeer.forms import BLOCK, Form
from xpeer.update import PrivateUpdate, RawUpdate
from xpeer.wire import fixedpoint
from xpeer.wire.fixedpoint import Grid

STAMP = privacy_stamp()
GRIDS = [Grid(16, 2.0**-14), Grid(32, 2.0**-14), Grid(16, 1e-3)]


def randn(n: int, seed: int) -> torch.Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(seed))


def encode(grid: Grid, values: torch.Tensor, seed: int | None = None) -> bytearray:
    out = bytearray(grid.form(len(values)).num_bytes)
    fixedpoint.encode_into(grid, values, out, seed=seed)
    return out


def total(grid: Grid, payloads: list[bytearray], n: int) -> bytearray:
    out = bytearray(payloads[0])
    for payload in payloads[1:]:
        fixedpoint.add_into(
            fixedpoint.rings(grid.form(n), out), fixedpoint.rings(grid.form(n), payload)
        )
    return out


def others_minus(grid: Grid, payloads: list[bytearray], own: int, n: int) -> torch.Tensor:
    out = torch.full((n,), torch.nan)
    fixedpoint.difference(grid, payloads[own], total(grid, payloads, n), len(payloads), out)
    return out


@given(
    grid=st.sampled_from(GRIDS),
    n=st.sampled_from([1, 127, 128, 1000, BLOCK * 600 + 5]),
    k=st.integers(2, 8),
    level=st.sampled_from([0.0, 1.0, -300.0]),
    seed=st.integers(0, 2**32),
)
@settings(max_examples=40)
def test_of_a_sum_everybody_learns_the_others_mean(
    grid: Grid, n: int, k: int, level: float, seed: int
) -> None:
    """However large the values are: only how far they are apart has to fit."""
    values = [level + 0.02 * randn(n, seed + i) for i in range(k)]
    payloads = [encode(grid, each) for each in values]
    for own in range(k):
        z = others_minus(grid, payloads, own, n)
        others = sum(each.double() for i, each in enumerate(values) if i != own) / (k - 1)
        # each of the two is rounded to a neighbour on the grid; float32 has its own at 300
        allowed = 2 * grid.step + 1e-7 * abs(level) * 4
        assert float((z - (others - values[own].double())).abs().max()) <= allowed


def test_merges_of_a_group_keep_its_mean_whatever_the_grid_drops() -> None:
    k, n, grid = 3, 5000, Grid(16, 2.0**-10)
    values = [randn(n, i) * 0.1 for i in range(k)]
    payloads = [encode(grid, each) for each in values]
    merged = [
        values[own].double() + (k - 1) / k * others_minus(grid, payloads, own, n).double()
        for own in range(k)
    ]
    before = torch.stack(values).double().sum(0)
    assert float((torch.stack(merged).sum(0) - before).abs().max()) < 1e-7
    spread = max(float((each - merged[0]).abs().max()) for each in merged)
    assert spread <= 2 * grid.step + 1e-7


@pytest.mark.parametrize("grid", GRIDS)
def test_what_was_sent_is_known_to_its_sender(grid: Grid) -> None:
    """Of the low bits and the values themselves; on the grid, with nothing of what was rounded."""
    values = 3 + randn(5000, 1)
    payload = encode(grid, values)
    sent = fixedpoint.rounded(grid, values, payload)
    assert float((sent - values).abs().max()) < grid.step * 1.001
    again = fixedpoint.rings(grid.form(5000), encode(grid, sent + grid.step * 1e-3, seed=1))[0]
    codes = fixedpoint.rings(grid.form(5000), payload)[0]
    assert float((codes == again).mean()) > 0.99


def test_rounding_is_unbiased_and_to_a_neighbour() -> None:
    grid = Grid(32, 0.5)
    values = torch.full((200_000,), 0.15)  # 0.3 of a step
    codes = fixedpoint.rings(grid.form(len(values)), encode(grid, values))[0]
    assert set(np.unique(codes).tolist()) == {0, 1}
    share = float(codes.mean())
    assert share == pytest.approx(0.3, abs=5 * (0.21 / 200_000) ** 0.5)
    negative = fixedpoint.rings(grid.form(len(values)), encode(grid, -values))[0].view(np.int32)
    assert set(np.unique(negative).tolist()) == {-1, 0}


def test_what_is_on_the_grid_is_exact() -> None:
    grid = Grid(16, 2.0**-14)
    values = torch.arange(-3000, 3000, dtype=torch.float32) * 2.0**-14
    for seed in range(3):
        codes = fixedpoint.rings(grid.form(len(values)), encode(grid, values, seed))[0]
        assert torch.equal(torch.from_numpy(codes.view(np.int16).astype(np.float32)) * grid.step,
                           values)  # fmt: skip


@pytest.mark.parametrize("where", [0, 130, 599])
def test_16_bits_refuse_what_is_too_far_away(where: int) -> None:
    """The check sees what the low bits can't tell: one value, a whole turn of the range away."""
    grid, n, k = Grid(16, 2.0**-14), 600, 3
    values = [torch.zeros(n) for _ in range(k)]
    reach = grid.reach(k)
    for far, safe in [(0.9 * reach, True), (1.1 * reach, False), (2 * reach, False)]:
        values[2][where] = far
        payloads = [encode(grid, each) for each in values]
        if safe:
            assert float(others_minus(grid, payloads, 0, n)[where]) == pytest.approx(
                far / 2, abs=grid.step
            )
            continue
        with pytest.raises(PeerError, match=Reason.OUT_OF_RANGE):
            others_minus(grid, payloads, 0, n)


def test_two_that_wrap_in_one_block_are_noticed() -> None:
    grid, n = Grid(16, 2.0**-14), 256
    turn = 2.0**16 * grid.step
    for one, other in [(3, 4), (0, 127), (60, 61)]:
        for sign in (1.0, -1.0):
            values = [torch.zeros(n) for _ in range(3)]
            values[1][one], values[1][other] = turn, sign * turn
            with pytest.raises(PeerError, match=Reason.OUT_OF_RANGE):
                others_minus(grid, [encode(grid, each) for each in values], 0, n)


def test_random_integers_instead_of_a_payload_are_refused() -> None:
    """Masks that do not cancel look like this."""
    for grid in GRIDS:
        n = 4096
        payloads = [encode(grid, randn(n, i) * 0.02) for i in range(3)]
        noise = np.random.default_rng(1)
        payloads[1] = bytearray(noise.bytes(len(payloads[1])))
        with pytest.raises(PeerError, match=Reason.OUT_OF_RANGE):
            others_minus(grid, payloads, 0, n)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 2.0**27 * 2.0**-14 * 1.01])
def test_values_that_cannot_be_sent_are_our_own_error(bad: float) -> None:
    values = torch.zeros(300)
    values[200] = bad
    with pytest.raises(LocalError, match="not finite or too large"):
        encode(Grid(16, 2.0**-14), values)


def test_sizes_are_checked_and_known_to_the_form() -> None:
    for grid in GRIDS:
        size = grid.form(1000).num_bytes
        assert size == (1000 * 4 if grid.bits == 32 else 1000 * 2 + 8 * 4)
        with pytest.raises(PeerError, match=Reason.MALFORMED):
            fixedpoint.rings(grid.form(1000), bytes(size - 1))
        with pytest.raises(PeerError, match=Reason.OVERSIZE):
            fixedpoint.rings(grid.form(1000), bytes(size + 1))


def test_only_a_private_update_is_compressed() -> None:
    grid = GRIDS[0]
    out = torch.empty(grid.form(10).num_bytes, dtype=torch.uint8)
    with pytest.raises(TypeError, match="PrivateUpdate"):
        fixedpoint.compress(RawUpdate(torch.zeros(10), 1), grid, out)  # type: ignore[arg-type]
    done = fixedpoint.compress(PrivateUpdate(torch.zeros(10), 1, STAMP), grid, out)
    assert (done.form, len(done.payload)) == (Form("masked16", 10), len(out))
