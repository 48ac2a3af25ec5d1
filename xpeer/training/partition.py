"""Who trains what of a corpus that all members hold.

    documents -> pieces    long ones are cut, at places that never move
    pieces    -> units     as many as the model's size and the members' speed ask for
    units     -> members   in proportion to speed; few move when members or speeds change

Every member computes all of it by itself from the manifest, the corpus and what the roster says.
Members that read different speeds for a while agree on all but a like share of the units, which
are trained twice or not at all until then. Knows no tokens and no files.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Final

import torch

from xpeer.errors import LocalError, ShardError
from xpeer.identity import blake2b
from xpeer.manifest import Manifest, SharedCorpus
from xpeer.status import CorpusShare
from xpeer.training.document import Document, corpus_digest

PIECE_RECORDS: Final = 32
"""A document of more records than this is cut: its pieces may have different trainers."""
CHARACTERS_PER_TOKEN: Final = {"byte": 1, "huggingface": 4}
"""By kind of tokenizer; a guess, the same everywhere."""
UNIT_S: Final = 30.0
"""A unit is at most about this long a part of a typical member's training."""
NOMINAL_FLOPS: Final = 1e13
"""Of a member of which no speed is known."""
UNITS_PER_MEMBER: Final = 1024
"""At least, where there is text for that: shares then deviate by 1/sqrt(1024) = 3%."""
MAX_UNITS: Final = 1 << 20
WEIGHT_RANGE: Final = 64.0
"""Nobody's word makes it this many times faster, or slower, than the median member."""


def divide(
    documents: Iterable[Document], manifest: Manifest, speeds: Mapping[str, float], me: str
) -> tuple[list[Document], CorpusShare]:
    """This member's part of the corpus.

    Args:
        documents: of the corpus, the same at every member.
        manifest: of the swarm.
        speeds: tokens/s by PeerID, ours included; 0 = unknown.
        me: one of them.

    Returns:
        Documents and pieces of documents to train on, and what they are in numbers.

    Raises:
        LocalError: `me` is not among the members.
    """
    if me not in speeds:
        raise LocalError(f"{me} is not among the members that share the corpus")
    parts = pieces(documents, manifest)
    per_token = CHARACTERS_PER_TOKEN[manifest.tokenizer.kind]
    tokens = sum(len(part.text) for part in parts) // per_token
    count = num_units(tokens, len(parts), manifest.model.num_params, speeds)
    shares = weights(speeds)
    by_unit: dict[int, list[Document]] = {}
    for part in parts:
        by_unit.setdefault(unit_of(part, count), []).append(part)
    mine = units_of(sorted(by_unit), count, shares, me)
    chosen = [part for unit in mine for part in by_unit[unit]]
    share = CorpusShare(
        units=len(mine),
        units_total=len(by_unit),
        unit_tokens=max(1, tokens // max(1, len(by_unit))),
        documents=len(chosen),
        documents_total=len(parts),
        weight=shares[me] / sum(shares.values()),
    )
    return chosen, share


def refuse_other(shared: SharedCorpus, documents: Iterable[Document]) -> None:
    """Refuse a copy that is not the founder's.

    Raises:
        ShardError: its documents differ.
    """
    found = corpus_digest(documents)
    if shared.digest not in ("", found):
        raise ShardError(
            f"data.corpus: this copy of {shared.name!r} has digest {found[:16]}, but the swarm's "
            f"has {shared.digest[:16]}",
            "get the founder's documents; data.text_field has to be the same, too",
        )


def pieces(documents: Iterable[Document], manifest: Manifest) -> list[Document]:
    """Cut long documents, each at a space where there is one nearby.

    Depends on nothing that changes during a run: under privacy a record is what the ledger
    protects, so records must stay the same whoever trains them.
    """
    per_token = CHARACTERS_PER_TOKEN[manifest.tokenizer.kind]
    length = PIECE_RECORDS * manifest.optimiser.sequence_tokens * per_token
    return [piece for document in documents for piece in _cut(document, length)]


def _cut(document: Document, length: int) -> list[Document]:
    text = document.text
    ends: list[int] = []
    start = 0
    while len(text) - start > length:
        space = text.rfind(" ", start + length - length // 8, start + length)
        start = space + 1 if space >= 0 else start + length
        ends.append(start)
    if not ends:
        return [document]
    starts = [0, *ends]
    return [
        Document(
            blake2b(b"piece", document.id.encode(), number.to_bytes(4, "little"), size=16).hex(),
            text[begin:end],
            document.source,
            begins=number == 0,
            ends=end == len(text),
            whole=document.id,
        )
        for number, (begin, end) in enumerate(zip(starts, [*ends, len(text)], strict=True))
    ]


def num_units(tokens: int, num_pieces: int, num_params: int, speeds: Mapping[str, float]) -> int:
    """How many units the corpus is divided into: a power of two, so that it changes rarely.

    A unit is UNIT_S of a typical member's training, or less where shares would be inaccurate; but
    hardly less than a piece. A member of unknown speed does NOMINAL_FLOPS, and a token takes 6
    operations a parameter (Kaplan et al. 2020, section 2.1).

    Args:
        tokens: of the corpus, about.
        num_pieces: of the corpus.
        num_params: of the model.
        speeds: tokens/s by PeerID; 0 = unknown.
    """
    known = [speed for speed in speeds.values() if _usable(speed)]
    typical = statistics.median_low(known) if known else NOMINAL_FLOPS / (6 * num_params)
    wanted = max(tokens / (UNIT_S * typical), UNITS_PER_MEMBER * len(speeds))
    return _power_of_two(min(wanted, num_pieces, MAX_UNITS))


def unit_of(piece: Document, count: int) -> int:
    """The unit of a piece. Twice as many units leave half of the pieces in units of old names."""
    return int(piece.id[:16], 16) % count


def weights(speeds: Mapping[str, float]) -> dict[str, float]:
    """Speeds relative to the median member, which also stands in for those of unknown speed."""
    known = [speed for speed in speeds.values() if _usable(speed)]
    typical = statistics.median_low(known) if known else 1.0
    return {
        peer: min(max(speed / typical, 1 / WEIGHT_RANGE), WEIGHT_RANGE) if _usable(speed) else 1.0
        for peer, speed in speeds.items()
    }


def moved(before: Mapping[str, float], after: Mapping[str, float]) -> float:
    """Share of the corpus that another division would give to another member, 0 to 1."""
    old, new = weights(before), weights(after)
    old_sum, new_sum = sum(old.values()), sum(new.values())
    return 0.5 * sum(
        abs(new.get(peer, 0.0) / new_sum - old.get(peer, 0.0) / old_sum)
        for peer in old.keys() | new.keys()
    )


def owners(count: int, shares: Mapping[str, float]) -> tuple[list[str], torch.Tensor]:
    """Who trains each unit.

    Weighted rendezvous hashing: the member with the lowest -ln(u(unit, member)) / weight trains a
    unit, u uniform from a hash. When a member leaves only its units move, when one comes
    only those that it takes, and when a weight changes only to or from that member.
    (Schindelhauer & Schomaker 2005, "Weighted distributed hash tables": the logarithmic method.)

    Args:
        count: of units.
        shares: weight by PeerID.

    Returns:
        PeerIDs in order, and the index of each unit's owner among them, (count,) int64.
    """
    names = sorted(shares)
    best = torch.full((count,), math.inf, dtype=torch.float64)
    owner = torch.zeros(count, dtype=torch.int64)
    for index, name in enumerate(names):
        score = _scores(count, name, shares[name])
        closer = score < best
        best = torch.where(closer, score, best)
        owner[closer] = index
    return names, owner


def units_of(units: Sequence[int], count: int, shares: Mapping[str, float], me: str) -> list[int]:
    """Which units a member trains.

    One that none falls to trains the one that it came closest to, twice with its owner.

    Args:
        units: those that have text.
        count: of all units.
        shares: weight by PeerID.
        me: one of them.
    """
    names, owner = owners(count, shares)
    mine = (owner == names.index(me)).tolist()
    chosen = [unit for unit in units if mine[unit]]
    if chosen or not units:
        return chosen
    score = _scores(count, me, shares[me]).tolist()
    return [min(units, key=lambda unit: score[unit])]


def _scores(count: int, name: str, weight: float) -> torch.Tensor:
    """(count,) float64; exponentially distributed with the weight as its rate."""
    seed = int.from_bytes(blake2b(b"assign", name.encode(), size=8), "little", signed=True)
    return -torch.log(_uniform(seed, count)) / weight


_GAMMA: Final = 0x9E3779B97F4A7C15 - (1 << 64)
_MIX_1: Final = 0xBF58476D1CE4E5B9 - (1 << 64)
_MIX_2: Final = 0x94D049BB133111EB - (1 << 64)


def _uniform(seed: int, count: int) -> torch.Tensor:
    """The first outputs of SplitMix64 (Steele, Lea & Flood 2014), (count,) float64 in (0, 1)."""
    state = torch.arange(1, count + 1, dtype=torch.int64) * _GAMMA + seed
    state = (state ^ _shifted(state, 30)) * _MIX_1
    state = (state ^ _shifted(state, 27)) * _MIX_2
    state = state ^ _shifted(state, 31)
    return (_shifted(state, 11).double() + 0.5) / 2.0**53


def _shifted(state: torch.Tensor, bits: int) -> torch.Tensor:
    """To the right, zeros filled in: torch's own shift of int64 keeps the sign."""
    return (state >> bits) & ((1 << (64 - bits)) - 1)


def _usable(speed: float) -> bool:
    return math.isfinite(speed) and speed > 0


def _power_of_two(at_least: float) -> int:
    return 1 << max(0, math.ceil(math.log2(max(1.0, at_least))))
