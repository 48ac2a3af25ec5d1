"""What privacy protects, and how a step samples it: records, or whole documents.

Units are sampled independently, each with probability q. A sampled unit adds a vector of norm C at
most to the sum. So adding or removing one unit moves the sum by C at most, and the accountant's
numbers hold for that unit:

    record      its gradient, clipped to C
    document    k of its records, chosen anew uniformly at random, each clipped to C / k

The choice within a document is no part of the guarantee, so sampling amplifies privacy only once. k
is the document's number of records, or `at_most` if it has more. With a larger k a step sees more
of a document, at as many times the work.

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
    fractions: Tensor  # (m,) float64
    """Fraction of the clipping norm to which each record is clipped. Those of a unit add up to
    1."""


class Units(Protocol):
    """The units of privacy of a shard."""

    kind: Unit

    def __len__(self) -> int:
        """Return the number of units."""

    def sample(self, generator: SecretGenerator, probability: float) -> Sample:
        """Sample every unit independently with this probability (Poisson sampling)."""

    def part(self, rank: int, world: int) -> Units:
        """Units whose number is `rank` modulo `world`. The parts of all ranks are disjoint and make
        the whole.
        """


class Records:
    """Each record is a unit.

    Args:
        indices: indices of the records, (n,) int64, ascending.
    """

    kind: Unit = "record"

    def __init__(self, indices: Tensor) -> None:
        self._indices = indices

    def __len__(self) -> int:
        """Return the number of records."""
        return len(self._indices)

    def sample(self, generator: SecretGenerator, probability: float) -> Sample:
        """See `Units.sample`."""
        chosen = self._indices[generator.poisson_sample(len(self), probability)]
        return Sample(chosen, torch.ones(len(chosen), dtype=torch.float64))

    def part(self, rank: int, world: int) -> Records:
        """See `Units.part`."""
        return Records(self._indices[rank::world])


class Documents:
    """Each document is a unit.

    Args:
        indices: indices of the records, (n,) int64, ascending.
        owners: number of the document of each record, (n,) int64, ascending; gaps are allowed.
        at_most: largest number of records of one document in a step.

    Raises:
        ConfigError: the owners are not ascending.
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
        """Return the number of documents."""
        return len(self._counts)

    def sample(self, generator: SecretGenerator, probability: float) -> Sample:
        """See `Units.sample`."""
        documents = generator.poisson_sample(len(self), probability)
        counts = self._counts[documents]
        owners = documents.repeat_interleave(counts)  # of all records of the sampled documents
        first = (self._ends - self._counts)[owners]
        before = (counts.cumsum(0) - counts).repeat_interleave(counts)
        rows = first + torch.arange(len(owners)) - before
        kept = generator.ranks_within(owners) < self._at_most
        fractions = 1.0 / self._counts[owners].clamp(max=self._at_most).double()
        return Sample(self._indices[rows[kept]], fractions[kept])

    def part(self, rank: int, world: int) -> Documents:
        """See `Units.part`."""
        mine = self._owners % world == rank
        return Documents(self._indices[mine], self._owners[mine], self._at_most)


def units_of(kind: Unit, num_records: int, owners: Tensor | None, at_most: int) -> Units:
    """The units that a manifest asks for.

    Args:
        kind: the manifest's unit.
        num_records: n.
        owners: number of the document of each record, (n,) int64, ascending. Needed for documents
            only.
        at_most: largest number of records of one document in a step.

    Raises:
        ConfigError: documents are the unit, and `owners` is None or not ascending.
    """
    if kind == "record":
        return Records(torch.arange(num_records))
    if owners is None:
        raise ConfigError(
            "privacy.unit = document, but nobody said which document a record is of",
            "use privacy.unit = record",
        )
    return Documents(torch.arange(num_records), owners, at_most)
