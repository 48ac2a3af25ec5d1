"""What averaging the factors of adapters apart loses, against products that are made whole."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch

from xpeer.mixing.cut import padded
from xpeer.mixing.factors import FactorPair, misalignment
from xpeer.mixing.fragments import Fragments
from xpeer.mixing.misalignment import Misalignment

PAIRS = [
    FactorPair(a_at=0, b_at=4 * 30, rank=4, inputs=30, outputs=50),
    FactorPair(a_at=320, b_at=320 + 4 * 17, rank=4, inputs=17, outputs=9),
]
SIZE = 320 + 4 * (17 + 9)


def random(seed: int) -> torch.Tensor:
    return torch.randn(SIZE, generator=torch.Generator().manual_seed(seed))


def dense(one: torch.Tensor, two: torch.Tensor) -> float:
    lost, whole = [], []
    for pair in PAIRS:
        (b1, a1), (b2, a2) = pair.of(one), pair.of(two)
        mean = (b1 @ a1 + b2 @ a2) / 2
        lost.append((mean - (b1 + b2) @ (a1 + a2) / 4).flatten())
        whole.append(mean.flatten())
    return float(torch.cat(lost).norm() / torch.cat(whole).norm())


@pytest.mark.parametrize("far", [1.0, 0.1, 1e-3])
def test_it_is_what_the_dense_products_say(far: float) -> None:
    one = random(1)
    two = one + far * random(2)
    measured = misalignment(PAIRS, (one + two) / 2, one - two)
    assert measured == pytest.approx(dense(one, two), rel=1e-4)


def test_it_is_of_second_order_in_the_distance() -> None:
    mean, apart = random(1), random(2)
    far, near = (misalignment(PAIRS, mean, scale * apart) for scale in (2e-3, 1e-3))
    assert far / near == pytest.approx(4.0, rel=1e-3)


def test_nothing_is_lost_where_peers_share_a_factor() -> None:
    mean, apart = random(1), random(2)
    for pair in PAIRS:
        apart[pair.a_at : pair.a_at + pair.rank * pair.inputs] = 0.0
    assert misalignment(PAIRS, mean, apart) == 0.0
    assert misalignment(PAIRS, torch.zeros(SIZE), torch.zeros(SIZE)) == 0.0


def merged(measured: Misalignment, fragments: Fragments, whole: torch.Tensor) -> Iterator[None]:
    """Merge one fragment after another."""
    for fragment in range(3):
        filled = torch.nn.functional.pad(whole, (0, padded(SIZE) - SIZE))
        z = fragments.gather(filled, fragment)
        kept = measured.copy(z)
        z.zero_()  # a combiner may overwrite it
        measured.merged(fragment, kept)
        yield


def test_the_newest_difference_of_each_fragment_counts() -> None:
    fragments = Fragments(SIZE, 3)
    measured = Misalignment(PAIRS, fragments)
    mean, old, new = random(1), random(2), 0.1 * random(3)
    for _ in merged(measured, fragments, old):
        assert measured.latest is None  # some were never merged
        measured.measure(mean.clone)
    assert measured.latest == pytest.approx(misalignment(PAIRS, mean, old), rel=0.01)
    for _ in merged(measured, fragments, new):
        pass
    measured.measure(mean.clone)
    expected = misalignment(PAIRS, mean, new)
    assert measured.latest == pytest.approx(expected, rel=0.01)  # kept as bfloat16
    measured.begin()
    assert measured.latest is None
    measured.measure(mean.clone)
    assert measured.latest is None
    nothing = Misalignment([], fragments)
    nothing.measure(mean.clone)
    assert nothing.latest == 0.0


def test_whoever_asks_waits_for_nothing_and_piles_nothing_up() -> None:
    """The work is left to another thread, and there is never more than one piece of it."""
    fragments = Fragments(SIZE, 3)
    work: list[Callable[[], None]] = []
    read: list[torch.Tensor] = []
    measured = Misalignment(PAIRS, fragments)
    measured.submit = work.append
    mean, apart = random(1), 0.1 * random(3)
    for _ in merged(measured, fragments, apart):
        pass

    def copied() -> torch.Tensor:
        read.append(mean.clone())
        return read[-1]

    for _ in range(3):  # windows end faster than it is computed
        measured.measure(copied)
    assert (len(work), len(read)) == (1, 1)
    assert measured.latest is None
    for _ in merged(measured, fragments, 50 * apart):  # it is computed of what was there
        pass
    work.pop()()
    assert measured.latest == pytest.approx(misalignment(PAIRS, mean, apart), rel=0.01)

    measured.measure(copied)
    measured.begin()  # the parameters were replaced meanwhile
    work.pop()()
    assert measured.latest is None, "it says nothing of the present ones"


def test_a_failure_is_no_end_of_measuring() -> None:
    fragments = Fragments(SIZE, 3)
    work: list[Callable[[], None]] = []
    measured = Misalignment(PAIRS, fragments)
    measured.submit = work.append
    for _ in merged(measured, fragments, random(3)):
        pass
    measured.measure(lambda: torch.zeros(1))  # too short
    with pytest.raises(RuntimeError):
        work.pop()()
    measured.measure(random(1).clone)
    work.pop()()
    assert measured.latest is not None
