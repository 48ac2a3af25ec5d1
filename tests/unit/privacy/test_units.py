from __future__ import annotations

import math

import pytest
import torch

from xpeer.errors import ConfigError
from xpeer.privacy.noise import SecretGenerator
from xpeer.privacy.units import Documents, Records, units_of

SIZES = torch.tensor([1, 5, 2, 40, 3, 1, 8])
OWNERS = torch.arange(len(SIZES)).repeat_interleave(SIZES)
N = len(OWNERS)


def documents(at_most: int) -> Documents:
    return Documents(torch.arange(N), OWNERS, at_most)


class Chosen(SecretGenerator):
    """Says which units are sampled."""

    def __init__(self, chosen: list[int]) -> None:
        super().__init__()
        self.chosen = torch.tensor(chosen, dtype=torch.int64)
        self.asked: list[tuple[int, float]] = []

    def poisson_sample(self, num_records: int, probability: float) -> torch.Tensor:
        self.asked.append((num_records, probability))
        return self.chosen


@pytest.mark.parametrize("at_most", [1, 3, 100])
def test_a_documents_shares_make_one_whole(at_most: int) -> None:
    generator = Chosen([0, 2, 3, 6])
    sample = documents(at_most).sample(generator, 0.25)
    assert generator.asked == [(7, 0.25)]  # documents are drawn, whatever their length
    assert sample.indices.tolist() == sorted(set(sample.indices.tolist()))
    owners = OWNERS[sample.indices]
    for document in (0, 2, 3, 6):
        mine = owners == document
        assert int(mine.sum()) == min(at_most, int(SIZES[document]))
        assert float(sample.fractions[mine].sum()) == pytest.approx(1.0)
    assert set(owners.tolist()) == {0, 2, 3, 6}


def test_every_record_of_a_document_has_its_turn() -> None:
    units, draws = documents(2), 3000
    counts = torch.zeros(N)
    for _ in range(draws):
        counts[units.sample(Chosen([3]), 0.5).indices] += 1
    mine = counts[OWNERS == 3]
    q = 2 / 40
    assert float((mine - draws * q).abs().max()) < 7 * math.sqrt(draws * q * (1 - q))
    assert float(counts.sum()) == 2 * draws


def test_no_document_no_record() -> None:
    sample = documents(3).sample(Chosen([]), 0.5)
    assert len(sample.indices) == len(sample.fractions) == 0


def test_documents_are_sampled_as_often_as_each_other() -> None:
    secret, draws, q = SecretGenerator(), 4000, 0.3
    counts = torch.zeros(len(SIZES))
    for _ in range(draws):
        counts[OWNERS[documents(1).sample(secret, q).indices]] += 1
    assert float((counts - draws * q).abs().max()) < 7 * math.sqrt(draws * q * (1 - q))


@pytest.mark.parametrize("world", [1, 2, 3, 9])
def test_ranks_share_the_units_between_them(world: int) -> None:
    for units in (Records(torch.arange(N)), documents(100)):
        everything = Chosen(list(range(len(units))))
        whole = units.sample(everything, 1.0).indices.tolist()
        found: list[int] = []
        for rank in range(world):
            part = units.part(rank, world)
            found += part.sample(Chosen(list(range(len(part)))), 1.0).indices.tolist()
        assert sorted(found) == whole == list(range(N))
    owners = [
        set(OWNERS[documents(100).part(r, 2).sample(Chosen(list(range(n))), 1.0).indices].tolist())
        for r, n in ((0, 4), (1, 3))
    ]
    assert owners == [{0, 2, 4, 6}, {1, 3, 5}]


def test_the_unit_is_the_manifests() -> None:
    assert units_of("record", 9, None, 1).kind == "record"
    assert len(units_of("document", N, OWNERS, 1)) == len(SIZES)
    with pytest.raises(ConfigError, match="which document"):
        units_of("document", 9, None, 1)
    with pytest.raises(ConfigError, match="document by document"):
        units_of("document", 3, torch.tensor([0, 1, 0]), 1)
