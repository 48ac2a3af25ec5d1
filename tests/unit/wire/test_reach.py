from __future__ import annotations

import pytest
import torch

from xpeer.errors import LocalError
from xpeer.wire.codec import decode, encode
from xpeer.wire.merge import difference
from xpeer.wire.reach import MARGIN, Reach


def test_a_reach_follows_the_differences_and_doubles_on_overflow() -> None:
    own = torch.ones(300)
    reach = Reach()
    assert reach.of(0) is None
    reach.saw(0, own, torch.tensor([0.5, 0.0, -1.0]))
    first = reach.of(0)
    assert first is not None
    assert first.tolist() == [0.5 * MARGIN, pytest.approx(0.9 * 0.25), 0.5]
    reach.saw(0, own, torch.tensor([0.01, 0.0, -1.0]))
    second = reach.of(0)
    assert second is not None
    assert second.tolist() == [pytest.approx(0.9), pytest.approx(0.81 * 0.25), 1.0]
    with pytest.raises(LocalError, match="each block"):
        reach.saw(0, own, torch.ones(2))


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
            assert norms.largest is not None
            reaches[i].saw(0, own[i], norms.largest)
            moved.append(thetas[i] + z / 2)
        thetas = moved
    step = 0.05 if name == "int4-modulo" else 0.01
    assert float((thetas[0] - thetas[1]).abs().max()) < step
