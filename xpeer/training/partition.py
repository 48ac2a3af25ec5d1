"""Divides a corpus that all members hold among them.

    documents -> pieces    long ones are cut, at places that never move
    pieces    -> units     the model's size and the members' speeds decide how many
    units     -> members   in proportion to speed; few move when members or speeds change

A unit is called a corpus block in docs/words.md. Every member computes the whole division by
itself, from the manifest, the corpus and the roster. While members see slightly different speeds,
they disagree about a similarly small part of the units; these are trained twice or not at all.
Knows nothing of tokens and files.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Final

import numpy as np
import numpy.typing as npt

from xpeer.errors import LocalError, ShardError
from xpeer.identity import blake2b
from xpeer.manifest import Manifest, SharedCorpus
from xpeer.status import CorpusShare
from xpeer.training.document import Document

PIECE_RECORDS: Final = 32
"""A document of more records is cut, so that several members can train its pieces."""
CHARACTERS_PER_TOKEN: Final = {"byte": 1, "huggingface": 4}
"""A guess for each kind of tokenizer, the same at every member."""
UNIT_S: Final = 30.0
"""A unit keeps a typical member busy for at most about so long."""
NOMINAL_FLOPS: Final = 1e13
"""FLOP/s of a typical member while no speed is known."""
UNITS_PER_MEMBER: Final = 1024
"""At least so many, if there is enough text: members' parts then deviate by 1/sqrt(1024) = 3%."""
MAX_UNITS: Final = 1 << 20
WEIGHT_RANGE: Final = 64.0
"""No member counts as more than so many times faster, or slower, than the median member."""


def divide(
    documents: Iterable[Document], manifest: Manifest, speeds: Mapping[str, float], me: str
) -> tuple[list[Document], CorpusShare]:
    """Choose this member's part of the corpus.

    Args:
        documents: the corpus, the same at every member.
        manifest: of the swarm.
        speeds: tokens/s of each member by PeerID, ours included; 0 = unknown.
        me: our PeerID.

    Returns:
        The documents and pieces to train on, and their numbers for `status`.

    Raises:
        LocalError: `me` is not among the members.
    """
    parts = pieces(documents, manifest)
    names = np.array([int(part.id[:16], 16) for part in parts], np.uint64)
    chosen, share = choose(names, sum(len(part.text) for part in parts), manifest, speeds, me)
    return [parts[index] for index in chosen.tolist()], share


def choose(
    names: npt.NDArray[np.uint64],
    characters: int,
    manifest: Manifest,
    speeds: Mapping[str, float],
    me: str,
) -> tuple[npt.NDArray[np.int64], CorpusShare]:
    """Do as `divide`, by the pieces' names.

    Args:
        names: first 8 bytes of each piece's id, big endian, (n,).
        characters: in all pieces.
        manifest: see `divide`.
        speeds: see `divide`.
        me: see `divide`.

    Returns:
        Indices of the pieces to train on, (k,) int64, unit by unit; and their numbers.
    """
    if me not in speeds:
        raise LocalError(f"{me} is not among the members that share the corpus")
    tokens = characters // CHARACTERS_PER_TOKEN[manifest.tokenizer.kind]
    count = num_units(tokens, len(names), manifest.model.num_params, speeds)
    shares = weights(speeds)
    unit = unit_of(names, count)
    with_text = np.unique(unit).tolist()
    mine = units_of(with_text, count, shares, me)
    order = np.argsort(unit, kind="stable").astype(np.int64)
    chosen = order[np.isin(unit[order], mine)]
    share = CorpusShare(
        units=len(mine),
        units_total=len(with_text),
        unit_tokens=max(1, tokens // max(1, len(with_text))),
        documents=len(chosen),
        documents_total=len(names),
        weight=shares[me] / sum(shares.values()),
    )
    return chosen, share


def refuse_other(shared: SharedCorpus, digest: str) -> None:
    """Refuse a copy of the corpus that differs from the founder's.

    Args:
        shared: section of the manifest.
        digest: of the copy's documents.

    Raises:
        ShardError: its documents differ.
    """
    if shared.digest not in ("", digest):
        raise ShardError(
            f"data.corpus: this copy of {shared.name!r} has digest {digest[:16]}, but the swarm's "
            f"has {shared.digest[:16]}",
            "get the founder's documents; data.text_field has to be the same, too",
        )


def pieces(documents: Iterable[Document], manifest: Manifest) -> list[Document]:
    """Cut long documents into pieces, at spaces where there are any nearby.

    The pieces do not depend on anything that changes during a run. Under privacy a record is the
    unit of protection, so records must stay the same, whoever trains on them.
    """
    length = piece_characters(manifest)
    return [piece for document in documents for piece in cut_document(document, length)]


def piece_characters(manifest: Manifest) -> int:
    """Most characters of a piece."""
    per_token = CHARACTERS_PER_TOKEN[manifest.tokenizer.kind]
    return PIECE_RECORDS * manifest.optimiser.sequence_tokens * per_token


def cut_document(document: Document, length: int) -> list[Document]:
    """Cut a document into pieces of at most so many characters; 0 = leave it whole."""
    if not length:
        return [document]
    texts = list(cut_text([document.text], length))
    if len(texts) == 1:
        return [document]
    return [
        Document(
            piece_id(document.id, number),
            text,
            document.source,
            begins=number == 0,
            ends=number == len(texts) - 1,
            whole=document.id,
        )
        for number, text in enumerate(texts)
    ]


def piece_id(whole: str, number: int) -> str:
    """The id of a document's piece."""
    return blake2b(b"piece", whole.encode(), number.to_bytes(4, "little"), size=16).hex()


def cut_text(blocks: Iterable[str], length: int) -> Iterator[str]:
    """Cut a text, given in blocks, into pieces of at most so many characters."""
    text = ""
    for block in blocks:
        text, start = text + block, 0
        while len(text) - start > length:
            space = text.rfind(" ", start + length - length // 8, start + length)
            end = space + 1 if space >= 0 else start + length
            yield text[start:end]
            start = end
        text = text[start:]
    yield text


def num_units(tokens: int, num_pieces: int, num_params: int, speeds: Mapping[str, float]) -> int:
    """Number of units to divide the corpus into: a power of two, so that it changes rarely.

    A unit takes a typical member UNIT_S to train on, or less if members' parts would otherwise be
    inaccurate. There are hardly more units than pieces. If no speed is known, a typical member does
    NOMINAL_FLOPS; a token takes 6 operations a parameter (Kaplan et al. 2020, section 2.1).

    Args:
        tokens: number of tokens in the corpus, about.
        num_pieces: number of pieces of the corpus.
        num_params: of the model.
        speeds: tokens/s by PeerID; 0 = unknown.
    """
    known = [speed for speed in speeds.values() if _usable(speed)]
    typical = statistics.median_low(known) if known else NOMINAL_FLOPS / (6 * num_params)
    wanted = max(tokens / (UNIT_S * typical), UNITS_PER_MEMBER * len(speeds))
    return _power_of_two(min(wanted, num_pieces, MAX_UNITS))


def unit_of(names: npt.NDArray[np.uint64], count: int) -> npt.NDArray[np.int64]:
    """The unit of each piece, (n,). If the count doubles, half of the pieces keep their unit."""
    return (names % np.uint64(count)).astype(np.int64)


def weights(speeds: Mapping[str, float]) -> dict[str, float]:
    """Speeds relative to the median member; a member of unknown speed counts as the median."""
    known = [speed for speed in speeds.values() if _usable(speed)]
    typical = statistics.median_low(known) if known else 1.0
    return {
        peer: min(max(speed / typical, 1 / WEIGHT_RANGE), WEIGHT_RANGE) if _usable(speed) else 1.0
        for peer, speed in speeds.items()
    }


def moved(before: Mapping[str, float], after: Mapping[str, float]) -> float:
    """Fraction of the corpus that changes its member between two divisions, 0 to 1."""
    old, new = weights(before), weights(after)
    old_sum, new_sum = sum(old.values()), sum(new.values())
    return 0.5 * sum(
        abs(new.get(peer, 0.0) / new_sum - old.get(peer, 0.0) / old_sum)
        for peer in old.keys() | new.keys()
    )


def owners(count: int, shares: Mapping[str, float]) -> tuple[list[str], npt.NDArray[np.int64]]:
    """Assign each unit to a member.

    By weighted rendezvous hashing: the member with the lowest -ln(u(unit, member)) / weight trains
    a unit, where u is uniform from a hash. When a member leaves, only its units move. When a member
    comes, only its new units move. When a weight changes, units move only to or from that member.
    (Schindelhauer & Schomaker 2005, "Weighted distributed hash tables": the logarithmic method.)

    Args:
        count: number of units.
        shares: weight of each member by PeerID.

    Returns:
        The PeerIDs in order, and the index of each unit's owner among them, (count,) int64.
    """
    names = sorted(shares)
    best = np.full(count, math.inf)
    owner = np.zeros(count, np.int64)
    for index, name in enumerate(names):
        score = _scores(count, name, shares[name])
        closer = score < best
        best = np.where(closer, score, best)
        owner[closer] = index
    return names, owner


def units_of(units: Sequence[int], count: int, shares: Mapping[str, float], me: str) -> list[int]:
    """List the units that a member trains.

    A member to which no unit is assigned trains the one that it came closest to. Its owner trains
    that unit, too.

    Args:
        units: the units that have text.
        count: number of all units.
        shares: weight of each member by PeerID.
        me: PeerID of the member.
    """
    names, owner = owners(count, shares)
    mine = (owner == names.index(me)).tolist()
    chosen = [unit for unit in units if mine[unit]]
    if chosen or not units:
        return chosen
    score = _scores(count, me, shares[me]).tolist()
    return [min(units, key=lambda unit: score[unit])]


def _scores(count: int, name: str, weight: float) -> npt.NDArray[np.float64]:
    """A member's score for each unit, (count,) float64, exponential with the weight as its rate."""
    seed = int.from_bytes(blake2b(b"assign", name.encode(), size=8), "little")
    return -np.log(_uniform(seed, count)) / weight


_GAMMA: Final = np.uint64(0x9E3779B97F4A7C15)
_MIX_1: Final = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2: Final = np.uint64(0x94D049BB133111EB)


def _uniform(seed: int, count: int) -> npt.NDArray[np.float64]:
    """The first outputs of SplitMix64 (Steele, Lea & Flood 2014), (count,) in (0, 1)."""
    state = np.arange(1, count + 1, dtype=np.uint64) * _GAMMA + np.uint64(seed)
    state = (state ^ (state >> np.uint64(30))) * _MIX_1
    state = (state ^ (state >> np.uint64(27))) * _MIX_2
    state ^= state >> np.uint64(31)
    return ((state >> np.uint64(11)).astype(np.float64) + 0.5) / 2.0**53


def _usable(speed: float) -> bool:
    return math.isfinite(speed) and speed > 0


def _power_of_two(at_least: float) -> int:
    return 1 << max(0, math.ceil(math.log2(max(1.0, at_least))))
