"""What privacy protects, and how a step samples it: records, or whole documents.

Units are sampled independently, each with probability q. Whatever a sampled unit then gives to the
sum has norm C at most, so that adding or removing one unit moves the sum by C at most, and the
accountant's numbers hold for that unit:

    record      its gradient, clipped to C
    document    k of its records, chosen anew uniformly at random, each clipped to C / k

The choice within a document is no part of the guarantee, so its records are not amplified a second
time by sampling. k is the document's number of records, or `at_most` if it has more: the more, the
more of a document a step sees, for as many times the work.

What this module does not give: privacy of anything that several documents share, e.g. a person who
wrote two of them, or a text that lies in both with different surroundings.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from xpeer.errors import ConfigError
from xpeer.privacy.noise import SecretGenerator

Unit = Literal["record", "document"]


@dataclass(frozen=True, slots=True)
class Sample:
    """The records of a step."""

    indices: Tensor  # (m,) int64, ascending
    shares: Tensor  # (m,) float64: of the clipping norm that each may use
    """Those of a unit add up to 1."""


class Units(Protocol):
    """A shard's units of privacy."""

    kind: Unit

    def __len__(self) -> int:
        """How many there are."""

    def sample(self, generator: SecretGenerator, probability: float) -> Sample:
        """Poisson sampling: every unit independently with this probability."""

    def part(self, rank: int, world: int) -> Units:
        """Those whose number is `rank` modulo `world`: disjoint parts that make the whole."""


class Records:
    """Each record is a unit.

    Args:
        indices: of the records, (n,) int64, ascending.
    """

    kind: Unit = "record"

    def __init__(self, indices: Tensor) -> None:
        self._indices = indices

    def __len__(self) -> int:
        """How many records there are."""
        return len(self._indices)

    def sample(self, generator: SecretGenerator, probability: float) -> Sample:
        """See `Units`."""
        chosen = self._indices[generator.poisson_sample(len(self), probability)]
        return Sample(chosen, torch.ones(len(chosen), dtype=torch.float64))

    def part(self, rank: int, world: int) -> Records:
        """See `Units`."""
        return Records(self._indices[rank::world])


class Documents:
    """Each document is a unit.

    Args:
        indices: of the records, (n,) int64, ascending.
        owners: the document that each is of, (n,) int64, ascending; any numbers.
        at_most: records of one document in a step.
    """

    kind: Unit = "document"

    def __init__(self, indices: Tensor, owners: Tensor, at_most: int) -> None:
        if len(owners) != len(indices) or bool((owners[1:] < owners[:-1]).any()):
            raise ConfigError("privacy.unit = document: records must come document by document")
        self._indices = indices
        self._at_most = at_most
        begins = torch.ones(len(owners), dtype=torch.bool)
        begins[1:] = owners[1:] != owners[:-1]
        self._owners = begins.cumsum(0) - 1  # counted from 0
        self._counts = torch.bincount(self._owners)
        self._ends = self._counts.cumsum(0)

    def __len__(self) -> int:
        """How many documents there are."""
        return len(self._counts)

    def sample(self, generator: SecretGenerator, probability: float) -> Sample:
        """See `Units`."""
        documents = generator.poisson_sample(len(self), probability)
        counts = self._counts[documents]
        owners = documents.repeat_interleave(counts)  # of all records of the sampled documents
        first = (self._ends - self._counts)[owners]
        before = (counts.cumsum(0) - counts).repeat_interleave(counts)
        rows = first + torch.arange(len(owners)) - before
        kept = generator.ranks_within(owners) < self._at_most
        shares = 1.0 / self._counts[owners].clamp(max=self._at_most).double()
        return Sample(self._indices[rows[kept]], shares[kept])

    def part(self, rank: int, world: int) -> Documents:
        """See `Units`."""
        mine = self._owners % world == rank
        return Documents(self._indices[mine], self._owners[mine], self._at_most)


def units_of(kind: Unit, num_records: int, owners: Tensor | None, at_most: int) -> Units:
    """The units that a manifest asks for.

    Args:
        kind: of the manifest.
        num_records: n.
        owners: the document of each record, (n,) int64, ascending; needed for documents only.
        at_most: records of one document in a step.

    Raises:
        ConfigError: nobody knows which document a record is of.
    """
    if kind == "record":
        return Records(torch.arange(num_records))
    if owners is None:
        raise ConfigError(
            "privacy.unit = document, but nobody said which document a record is of",
            "use privacy.unit = record",
        )
    return Documents(torch.arange(num_records), owners, at_most)
