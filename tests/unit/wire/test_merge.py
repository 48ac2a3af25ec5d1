from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from xpeer.errors import LocalError, PeerError, Reason
from xpeer.forms import Form
from xpeer.wire.codec import FLOATS, INTS, NAMES, decode, encode
from xpeer.wire.merge import difference

names = st.sampled_from(NAMES)
lengths = st.sampled_from([0, 1, 127, 128, 129, 1000, 131072, 140003])
seeds = st.integers(0, 2**32)


def pair(n: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ours = torch.randn(n, generator=generator) * 0.02
    return ours, ours * (1 + torch.randn(n, generator=generator) * 5e-3)


def sent(name: str, values: torch.Tensor, dither: int | None = None) -> tuple[bytes, torch.Tensor]:
    """The payload, and what it decodes to."""
    dither = None if name in FLOATS else dither
    payload = encode(name, values, dither=dither)
    return payload, decode(Form(name, len(values)), payload)


@given(names, lengths, seeds, st.one_of(st.none(), seeds), st.booleans())
@settings(max_examples=80)
def test_the_difference_is_that_of_what_was_sent(
    name: str, n: int, seed: int, dither: int | None, as_payload: bool
) -> None:
    ours, theirs = pair(n, seed)
    our_payload, q_ours = sent(name, ours, dither)
    their_payload, q_theirs = sent(name, theirs, dither)
    own = our_payload if as_payload else q_ours
    z, norms = difference(Form(name, n), own, their_payload)
    assert torch.equal(z, q_theirs - q_ours)
    exact = (q_theirs - q_ours).double()
    assert math.isclose(norms.norm, float(exact.norm()), rel_tol=1e-5, abs_tol=1e-30)
    assert math.isclose(norms.own_norm, float(q_ours.double().norm()), rel_tol=1e-5)


@given(names, lengths, seeds)
@settings(max_examples=60)
def test_a_given_buffer_is_overwritten_with_the_difference(name: str, n: int, seed: int) -> None:
    ours, theirs = pair(n, seed)
    their_payload, q_theirs = sent(name, theirs)
    our_payload, q_ours = sent(name, ours)
    for own in (our_payload, q_ours):
        out = torch.full((n,), float("nan"))
        z, norms = difference(Form(name, n), own, their_payload, out=out)
        assert z is out
        assert torch.equal(out, q_theirs - q_ours)
        assert norms == difference(Form(name, n), own, their_payload)[1]


@given(names, seeds)
@settings(max_examples=40)
def test_what_one_side_adds_the_other_takes_away(name: str, seed: int) -> None:
    """Mixing keeps the mean whatever the codec drops."""
    ours, theirs = pair(1000, seed)
    our_payload, q_ours = sent(name, ours, seed)
    their_payload, q_theirs = sent(name, theirs, seed + 1)
    z_ours, _ = difference(Form(name, 1000), q_ours, their_payload)
    z_theirs, _ = difference(Form(name, 1000), q_theirs, our_payload)
    assert torch.equal(z_ours, -z_theirs)


@pytest.mark.parametrize("name", NAMES)
def test_a_refused_payload_changes_nothing(name: str) -> None:
    n = 300
    ours, theirs = pair(n, 3)
    _, q_ours = sent(name, ours)
    bad = bytearray(encode(name, theirs))
    bad[-4:] = b"\xff\xff\xff\xff"  # NaN in the float codecs
    if name not in FLOATS:
        bad = bytearray(encode(name, theirs))
        bad[4:6] = b"\x00\x7e"  # a scale that is NaN
    own, out = q_ours.clone(), ours.clone()
    with pytest.raises(PeerError) as error:
        difference(Form(name, n), own, bytes(bad[:-1]), out=out)
    assert error.value.reason == Reason.MALFORMED
    assert torch.equal(out, ours)
    with pytest.raises(PeerError) as error:
        difference(Form(name, n), own, bytes(bad), out=out)
    assert error.value.reason == Reason.NOT_FINITE
    assert torch.equal(own, q_ours)
    if name in INTS:  # a float codec's values are read as they are written
        assert torch.equal(out, ours)


def test_a_difference_that_overflows_float32_is_refused() -> None:
    high, low = encode("float32", torch.tensor([3e38])), torch.tensor([-3e38])
    with pytest.raises(PeerError) as error:
        difference(Form("float32", 1), low, high)
    assert error.value.reason == Reason.NOT_FINITE


def test_large_float32_values_have_a_norm() -> None:
    _, norms = difference(
        Form("float32", 4), torch.zeros(4), encode("float32", torch.full((4,), 1e30))
    )
    assert math.isclose(norms.norm, 2e30, rel_tol=1e-6)


def test_arguments_that_do_not_fit() -> None:
    payload = encode("int8", torch.ones(4))
    with pytest.raises(LocalError, match="needed"):
        difference(Form("int8", 4), torch.ones(5), encode("int8", torch.ones(4)))
    with pytest.raises(LocalError, match="needed"):
        difference(Form("int8", 4), payload, payload, out=torch.ones(5))
