from __future__ import annotations

from typing import Any, cast, get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.factories import privacy_stamp
from xpeer.errors import LocalError, PeerError, Reason
from xpeer.forms import BLOCK, SIZES, Codec, Form
from xpeer.update import PrivateUpdate, RawUpdate
from xpeer.wire import fixedpoint
from xpeer.wire.codec import FLOATS, NAMES, compress, decode, decode_part, encode, encode_into

sizes = st.sampled_from([1, 2, 127, 128, 129, 255, 256, 1000, 32768, 32769, 70001])
magnitudes = st.sampled_from([1e-30, 1e-12, 1e-7, 1e-5, 1e-3, 1.0, 50.0, 1e6])


def random_values(n: int, magnitude: float, seed: int) -> torch.Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(seed)) * magnitude


def bound(payload: bytes, n: int) -> torch.Tensor:
    """Half a scale; float32's own denormals (below 1e-40) may vanish."""
    blocks = -(-n // BLOCK)
    per_block = torch.frombuffer(bytearray(payload[: 2 * blocks]), dtype=torch.float16).float()
    return per_block.repeat_interleave(BLOCK)[:n].double() * 0.5 * (1 + 1e-5) + 1e-40


@given(sizes, magnitudes, st.integers(0, 2**32))
@settings(max_examples=60)
def test_int8_error_is_at_most_half_a_scale(n: int, magnitude: float, seed: int) -> None:
    values = random_values(n, magnitude, seed)
    payload = encode("int8", values)
    error = (decode(Form("int8", n), payload).double() - values.double()).abs()
    assert bool((error <= bound(payload, n)).all())


@given(st.lists(st.floats(-8e6, 8e6, width=32), min_size=1, max_size=400))
@settings(max_examples=100)
def test_int8_error_bound_for_arbitrary_values(numbers: list[float]) -> None:
    values = torch.tensor(numbers, dtype=torch.float32)
    payload = encode("int8", values)
    error = (decode(Form("int8", len(numbers)), payload).double() - values.double()).abs()
    assert bool((error <= bound(payload, len(numbers))).all())


@given(st.sampled_from(NAMES), sizes, st.integers(0, 2**32), st.data())
@settings(max_examples=100)
def test_a_part_is_a_part_of_the_whole(name: str, n: int, seed: int, data: st.DataObject) -> None:
    """Wherever it begins and ends: within a block, or at the last value."""
    start = data.draw(st.integers(0, n))
    count = data.draw(st.integers(0, n - start) | st.just(n - start))
    form, payload = Form(name, n), bytearray(encode(name, random_values(n, 0.05, seed)))
    out = torch.full((count,), torch.nan)
    assert decode_part(form, payload, start, out) is out
    assert torch.equal(out, decode(form, payload)[start : start + count])


@pytest.mark.parametrize(("start", "count"), [(-1, 2), (0, 301), (300, 1), (299, 2)])
def test_values_that_are_not_there_are_refused(start: int, count: int) -> None:
    payload = encode("int8", random_values(300, 1.0, 0))
    with pytest.raises(LocalError, match="are not there"):
        decode_part(Form("int8", 300), payload, start, torch.empty(count))


@given(st.sampled_from(NAMES), sizes, st.integers(0, 2**32))
@settings(max_examples=30)
def test_size_is_exact_and_decoding_is_idempotent(name: str, n: int, seed: int) -> None:
    values = random_values(n, 0.05, seed)
    payload = encode(name, values)
    assert len(payload) == Form(name, n).num_bytes
    once = decode(Form(name, n), payload)
    assert once.dtype == torch.float32
    assert torch.equal(once, decode(Form(name, n), memoryview(bytearray(payload))))
    again = torch.empty(n)
    assert decode(Form(name, n), payload, out=again) is again
    assert torch.equal(once, again)


def test_float32_is_exact_and_int8_takes_a_quarter() -> None:
    values = random_values(12800, 1.0, 1)
    assert torch.equal(decode(Form("float32", 12800), encode("float32", values)), values)
    assert Form("int8", 12800).num_bytes == 12800 + 2 * 100


def test_every_codec_of_the_manifest_has_a_size() -> None:
    assert set(NAMES) == set(get_args(Codec))
    assert set(SIZES) == {*NAMES, *fixedpoint.NAMES}


def test_known_bytes() -> None:
    """The layout other implementations would have to read: scales, then values."""
    payload = encode("int8", torch.tensor([127.0, -63.0, 0.4, 0.0]))
    assert payload == b"\x00\x3c" + bytes([127, 256 - 63, 0, 0])


def test_zeros_stay_zero() -> None:
    payload = encode("int8", torch.zeros(300))
    assert payload == bytes(len(payload))
    assert torch.equal(decode(Form("int8", 300), payload), torch.zeros(300))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_not_finite_are_refused_on_encode(name: str, bad: float) -> None:
    values = torch.ones(200)
    values[150] = bad
    with pytest.raises(LocalError, match="diverged"):
        encode(name, values)


def test_a_scale_beyond_float16_is_refused_on_encode() -> None:
    with pytest.raises(LocalError, match="too large"):
        encode("int8", torch.full((128,), 1e8))
    assert decode(Form("int8", 128), encode("int8", torch.full((128,), 8.3e6)))[0] > 8.2e6


@pytest.mark.parametrize("name", NAMES)
def test_wrong_lengths_are_refused(name: str) -> None:
    payload = encode(name, torch.ones(300))
    with pytest.raises(PeerError) as short:
        decode(Form(name, 300), payload[:-1])
    with pytest.raises(PeerError) as long:
        decode(Form(name, 300), payload + b"\0")
    with pytest.raises(PeerError) as empty:
        decode(Form(name, 300), b"")
    assert [e.value.reason for e in (short, long, empty)] == [
        Reason.MALFORMED, Reason.OVERSIZE, Reason.MALFORMED,
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("scale", "reason"),
    [
        (float("nan"), Reason.NOT_FINITE),
        (float("inf"), Reason.NOT_FINITE),
        (-1.0, Reason.MALFORMED),
    ],
)
def test_bad_scales_are_refused(scale: float, reason: str) -> None:
    payload = bytearray(encode("int8", torch.ones(300)))
    payload[2:4] = bytes(torch.tensor([scale], dtype=torch.float16).view(torch.uint8).tolist())
    with pytest.raises(PeerError) as error:
        decode(Form("int8", 300), payload)
    assert error.value.reason == reason


@pytest.mark.parametrize("name", FLOATS)
def test_bad_values_are_refused(name: str) -> None:
    values = torch.tensor([1.0, float("inf")], dtype=FLOATS[name])
    with pytest.raises(PeerError) as error:
        decode(Form(name, 2), bytes(values.view(torch.uint8).tolist()))
    assert error.value.reason == Reason.NOT_FINITE


@given(st.sampled_from(NAMES), st.integers(0, 400), st.binary(max_size=1600))
@settings(max_examples=100)
def test_arbitrary_bytes_decode_or_are_a_peer_error(name: str, n: int, payload: bytes) -> None:
    try:
        values = decode(Form(name, n), payload)
    except PeerError:
        return
    assert values.shape == (n,)
    assert bool(torch.isfinite(values).all())


def test_an_unknown_codec_and_a_wrong_buffer_are_local_errors() -> None:
    with pytest.raises(LocalError, match="unknown"):
        encode("zip", torch.ones(3))
    with pytest.raises(LocalError, match="buffer"):
        encode_into("float32", torch.ones(3), memoryview(bytearray(11)))
    with pytest.raises(LocalError, match="flat float32"):
        encode("float32", torch.ones(2, 2))


def test_only_a_private_update_is_compressed() -> None:
    values = random_values(300, 1.0, 2)
    update = compress(PrivateUpdate(values=values, step=7, stamp=privacy_stamp()), "int8")
    assert (update.form, update.step) == (Form("int8", 300), 7)
    assert update.payload == encode("int8", values)
    with pytest.raises(TypeError):
        compress(cast("Any", RawUpdate(values=values, step=7)), "int8")
