from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from xpeer.errors import LocalError
from xpeer.update import _ISSUER, PrivacyStamp, PrivateUpdate
from xpeer.wire.blockwise import BLOCK
from xpeer.wire.codec import decode, encode
from xpeer.wire.feedback import ErrorFeedback
from xpeer.wire.merge import difference
from xpeer.wire.payload import Norms
from xpeer.wire.reach import MARGIN, Reach

STAMP = PrivacyStamp(mode="record", steps_charged=3, issuer=_ISSUER)


def private(values: torch.Tensor) -> PrivateUpdate:
    return PrivateUpdate(values=values, step=1, stamp=STAMP)


def exchange(feedback: ErrorFeedback, name: str, values: torch.Tensor) -> torch.Tensor:
    corrected = feedback.correct(0, private(values))
    arrived = decode(name, encode(name, corrected.values), len(values))
    feedback.sent(0, corrected, arrived)
    return arrived


@given(st.sampled_from(["int8", "int4", "int2"]), st.integers(0, 2**32))
@settings(max_examples=20, deadline=None)
def test_what_arrives_adds_up_to_what_was_meant(name: str, seed: int) -> None:
    """The sum of what arrived is off by the last residual, which does not grow."""
    generator = torch.Generator().manual_seed(seed)
    feedback = ErrorFeedback()
    meant, arrived = torch.zeros(300), torch.zeros(300)
    sizes = []
    for _ in range(60):
        values = torch.randn(300, generator=generator) + 0.3
        meant += values
        arrived += exchange(feedback, name, values)
        sizes.append(float((meant - arrived).norm() / values.norm()))
    assert sizes[-1] < 4 * max(sizes[:10]) + 1e-3
    residual = feedback.state()["feedback.0"]
    assert torch.allclose(meant - arrived, residual, atol=1e-3)


def test_without_feedback_int2_is_biased_and_with_it_is_not() -> None:
    values = torch.full((BLOCK,), 0.1)
    values[0] = 1.0  # 0.1 always rounds to zero
    feedback = ErrorFeedback()
    total = sum((exchange(feedback, "int2", values) for _ in range(200)), torch.zeros(BLOCK))
    assert torch.equal(decode("int2", encode("int2", values), BLOCK)[1:], torch.zeros(BLOCK - 1))
    assert torch.allclose(total / 200, values, atol=0.05)


def test_the_residual_survives_a_checkpoint_and_a_failed_exchange() -> None:
    feedback = ErrorFeedback()
    values = torch.randn(300, generator=torch.Generator().manual_seed(1))
    exchange(feedback, "int4", values)
    state = feedback.state()
    feedback.correct(0, private(values))  # the exchange failed: nothing was sent
    assert torch.equal(feedback.state()["feedback.0"], state["feedback.0"])
    restored = ErrorFeedback()
    restored.load(state | {"reach.0": values})
    again = restored.correct(0, private(values))
    assert torch.equal(again.values, feedback.correct(0, private(values)).values)
    assert again.stamp is STAMP
    with pytest.raises(LocalError, match="another model"):
        restored.correct(0, private(values[:-1]))


def test_a_reach_follows_the_differences_and_doubles_on_overflow() -> None:
    own = torch.ones(300)
    reach = Reach()
    assert reach.of(0) is None
    reach.saw(0, own, Norms(0.0, 1.0, torch.tensor([0.5, 0.0, -1.0])))
    first = reach.of(0)
    assert first is not None
    assert first.tolist() == [0.5 * MARGIN, pytest.approx(0.9 * 0.25), 0.5]
    reach.saw(0, own, Norms(0.0, 1.0, torch.tensor([0.01, 0.0, -1.0])))
    second = reach.of(0)
    assert second is not None
    assert second.tolist() == [pytest.approx(0.9), pytest.approx(0.81 * 0.25), 1.0]
    other = Reach()
    other.load(reach.state() | {"feedback.0": own})
    assert torch.equal(other.state()["reach.0"], second)
    with pytest.raises(LocalError, match="modulo"):
        reach.saw(0, own, Norms(0.0, 1.0))


@pytest.mark.parametrize("name", ["int8-modulo", "int4-modulo"])
def test_a_block_that_drifted_away_comes_back(name: str) -> None:
    """Two peers, one of which is moved far beyond what was seen: they meet again."""
    generator = torch.Generator().manual_seed(4)
    thetas = [torch.randn(600, generator=generator) * 0.05] * 2
    reaches = [Reach(), Reach()]
    for t in range(60):
        if t == 20:
            thetas[1] = thetas[1].clone()
            thetas[1][130:250] += 3.0
        payloads = [encode(name, x, reach=r.of(0)) for x, r in zip(thetas, reaches, strict=True)]
        own = [decode(name, p, 600, near=x) for p, x in zip(payloads, thetas, strict=True)]
        moved = []
        for i in (0, 1):
            z, norms = difference(name, own[i], payloads[1 - i], 600)
            reaches[i].saw(0, own[i], norms)
            moved.append(thetas[i] + z / 2)
        thetas = moved
    step = 0.05 if name == "int4-modulo" else 0.01
    assert float((thetas[0] - thetas[1]).abs().max()) < step
