"""The int codecs against a plain reference, and what they promise."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.wire import reference_codec as reference
from xpeer.errors import LocalError, PeerError, Reason
from xpeer.forms import BLOCK, Form
from xpeer.wire.codec import NAMES, decode, encode

INTS = ["int8", "int4", "int2"]
names = st.sampled_from(INTS)
lengths = st.sampled_from([1, 2, 3, 5, 127, 128, 129, 255, 256, 300, 515])
dithers = st.one_of(st.none(), st.integers(-(2**65), 2**65))
seeds = st.integers(0, 2**32)


@st.composite
def vectors(draw: st.DrawFn) -> torch.Tensor:
    """Bell-shaped of any size, sparse, and arbitrary floats, subnormal ones included."""
    n = draw(lengths)
    kind = draw(st.sampled_from(["normal", "sparse", "blocks", "arbitrary"]))
    generator = torch.Generator().manual_seed(draw(seeds))
    if kind == "arbitrary":
        floats = st.floats(-4e4, 4e4, width=32)
        return torch.tensor(draw(st.lists(floats, min_size=1, max_size=300)), dtype=torch.float32)
    scale = draw(st.sampled_from([1e-42, 1e-30, 1e-8, 1e-4, 0.02, 1.0, 1e3]))
    values = torch.randn(n, generator=generator) * scale
    if kind == "sparse":
        values *= torch.rand(n, generator=generator) < 0.05
    if kind == "blocks":  # each of another size, some zero
        blocks = 10.0 ** torch.randint(-6, 3, (n // BLOCK + 1,), generator=generator)
        values *= (blocks * (blocks > 1e-5)).repeat_interleave(BLOCK)[:n]
    return values.clamp(-6e4, 6e4)  # int2's level is the largest value: it has to be a float16


def blocks_of(n: int) -> int:
    return -(-n // BLOCK)


def steps_of(payload: bytes, n: int) -> torch.Tensor:
    per_block = np.frombuffer(payload[: 2 * blocks_of(n)], dtype="<f2").astype(np.float64)
    return torch.from_numpy(np.repeat(per_block, BLOCK)[:n])


@given(names, vectors(), dithers)
@settings(max_examples=60)
def test_bytes_are_those_of_the_reference(
    name: str, values: torch.Tensor, dither: int | None
) -> None:
    payload = encode(name, values, dither=dither)
    assert len(payload) == Form(name, values.numel()).num_bytes
    assert payload == reference.encode(name, values.numpy(), dither)
    decoded = decode(Form(name, values.numel()), payload)
    expected = reference.decode(name, payload, len(values))
    assert torch.equal(decoded, torch.from_numpy(expected))


@given(names, vectors(), dithers)
@settings(max_examples=100)
def test_the_error_is_within_a_step_and_half_of_one_to_nearest(
    name: str, values: torch.Tensor, dither: int | None
) -> None:
    payload = encode(name, values, dither=dither)
    error = (decode(Form(name, len(values)), payload).double() - values.double()).abs()
    steps = steps_of(payload, len(values))
    share = 0.5 if dither is None else 1.0
    limit = steps * share * (1 + 1e-5) + values.abs() * 2.0**-22 + 1e-40  # float32's own rounding
    if name == "int2" and dither is None:
        limit = torch.maximum(limit, values.abs() - steps)  # beyond the level it clips
    assert bool((error <= limit).all())


@given(names, vectors())
@settings(max_examples=60)
def test_to_nearest_is_symmetric_and_never_further_than_zero(
    name: str, values: torch.Tensor
) -> None:
    """|x - Q(x)| <= |x| for every value: what error feedback needs to converge."""
    n = len(values)
    quantised = decode(Form(name, n), encode(name, values))
    assert torch.equal(decode(Form(name, n), encode(name, -values)), -quantised)
    slack = values.double().abs() * (1 + 1e-6) + 1e-40
    assert bool(((quantised.double() - values.double()).abs() <= slack).all())


@given(names, st.integers(0, 2**63))
@settings(max_examples=25)
def test_stochastic_rounding_is_unbiased(name: str, seed: int) -> None:
    """128 different values, 2,000 times each: within six standard errors of the mean."""
    values = torch.linspace(-2, 2, BLOCK)
    trials = 2000
    many = values.repeat(trials)
    payload = encode(name, many, dither=seed)
    rounded = decode(Form(name, len(many)), payload)
    step = float(steps_of(payload, 1)[0])
    error = (rounded.view(-1, BLOCK).double().mean(0) - values.double()).abs() / step
    share = values.double() / step % 1
    deviation = (share * (1 - share) / trials).sqrt()
    assert bool((error <= 6 * deviation + 1e-4).all())


def test_dither_differs_between_values_blocks_and_seeds() -> None:
    values = torch.full((1 << 16,), 0.5)
    values[::BLOCK] = 127.0  # int8 with a step of 1
    ones = decode(Form("int8", len(values)), encode("int8", values, dither=1))
    twos = decode(Form("int8", len(values)), encode("int8", values, dither=2))
    keep = torch.arange(len(values)) % BLOCK != 0
    up, other = ones[keep], twos[keep]
    n = up.numel()
    assert abs(float(up.mean()) - 0.5) < 5 * 0.5 / n**0.5
    for lag in (1, 2, 127, 254):  # neighbours, and the same column of the next blocks
        agree = float((up[lag:] == up[:-lag]).float().mean())
        assert abs(agree - 0.5) < 5 * 0.5 / n**0.5
    assert abs(float((up == other).float().mean()) - 0.5) < 5 * 0.5 / n**0.5


@pytest.mark.parametrize("name", INTS)
def test_nothing_is_zero_bytes(name: str) -> None:
    assert encode(name, torch.empty(0)) == b""
    assert decode(Form(name, 0), b"").shape == (0,)


@pytest.mark.parametrize(
    ("name", "bits"),
    [("float32", 32), ("bfloat16", 16), ("int8", 8.125), ("int4", 4.125), ("int2", 2.125)],
)  # fmt: skip
def test_bits_per_value(name: str, bits: float) -> None:
    assert Form(name, BLOCK).num_bytes * 8 / BLOCK == bits


@pytest.mark.parametrize("name", INTS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("position", [0, 130, 258])
def test_values_that_are_not_finite_are_refused(name: str, bad: float, position: int) -> None:
    values = torch.ones(259)
    values[position] = bad
    for dither in (None, 1):
        with pytest.raises(LocalError, match="diverged"):
            encode(name, values, dither=dither)


@pytest.mark.parametrize("payload_bits", [0x7FFFFFFF, -1, 0x7FC00000, 0x7F800001])
def test_every_kind_of_nan_is_refused(payload_bits: int) -> None:
    values = torch.zeros(128)
    values.view(torch.int32)[5] = payload_bits
    with pytest.raises(LocalError, match="diverged"):
        encode("int8", values)


@pytest.mark.parametrize("name", ["int4", "int2"])
def test_codes_beyond_the_last_value_are_refused(name: str) -> None:
    payload = bytearray(encode(name, torch.ones(129)))
    payload[-1] |= 0x80
    with pytest.raises(PeerError) as error:
        decode(Form(name, 129), payload)
    assert error.value.reason == Reason.MALFORMED


def test_arguments_that_do_not_fit_the_codec() -> None:
    ones = torch.ones(4)
    with pytest.raises(LocalError, match="dither"):
        encode("bfloat16", ones, dither=1)
    with pytest.raises(LocalError, match="needed"):
        decode(Form("int8", 4), encode("int8", ones), out=torch.ones(5))
    assert "int4" in NAMES
