"""The pieces that a joiner has in its home, across restarts and crashes."""

from __future__ import annotations

import random
import shutil
from collections import namedtuple
from pathlib import Path

import pytest

from tests.unit.network.test_giving import LEAVES, PAYLOAD, SHAPE, SIGNER, signed
from xpeer.errors import LocalError, PeerError, Reason
from xpeer.identity import Identity
from xpeer.network import pieces
from xpeer.network.pieces import Signer, Tree, leaves_of, root_of
from xpeer.wire.messages import PIECE_BYTES, TreeOffer
from xpeer_daemon import gathered as gathering
from xpeer_daemon.gathered import Gathered


def tree_of(payload: bytes, step: int = 7) -> Tree:
    donor, leaves = Identity.generate(), leaves_of(memoryview(payload))
    offer = signed(donor, TreeOffer("float32", len(payload), step, 2.0, root_of(leaves), bytes(64)))
    return pieces.verified(SIGNER, donor.peer_id, offer, leaves, SHAPE)


def give(gathered: Gathered, tree: Tree, payload: bytes, *numbers: int) -> None:
    gathered.adopt(tree)
    for piece in numbers:
        gathered.write(piece, memoryview(payload)[SHAPE.place(piece)])
        gathered.wrote(piece, tree)


OTHER = random.Random(3).randbytes(len(PAYLOAD))


def test_a_restart_finds_every_piece_again_with_its_donor(tmp_path: Path) -> None:
    folder = tmp_path / "joining"
    gathered = Gathered.open(folder, SHAPE, SIGNER)
    one, other = tree_of(PAYLOAD), tree_of(OTHER)
    give(gathered, one, PAYLOAD, 0, 3)
    give(gathered, other, OTHER, 2)
    gathered.close()
    assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {0o600}
    assert folder.stat().st_mode & 0o777 == 0o700

    again = Gathered.open(folder, SHAPE, SIGNER)
    assert again.missing() == [1]
    assert again.sources() == [one, other]
    assert again.num_bytes == len(PAYLOAD) - PIECE_BYTES
    give(again, other, OTHER, 1)
    whole = bytes(again.payload())
    assert (
        whole
        == PAYLOAD[:PIECE_BYTES] + OTHER[PIECE_BYTES : 3 * PIECE_BYTES] + PAYLOAD[3 * PIECE_BYTES :]
    )
    again.close()


def test_a_restart_hashes_each_piece_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many trees there are: of a large model it reads gigabytes."""
    gathered = Gathered.open(tmp_path / "joining", SHAPE, SIGNER)
    for payload in (PAYLOAD, OTHER):
        give(gathered, tree_of(payload), payload, 0)
    gathered.close()
    hashed, real = list[int](), pieces.hash_of

    def hash_of(piece: memoryview) -> bytes:
        hashed.append(len(piece))
        return real(piece)

    monkeypatch.setattr(pieces, "hash_of", hash_of)
    Gathered.open(tmp_path / "joining", SHAPE, SIGNER).close()
    assert len(hashed) == SHAPE.num_pieces


def test_what_a_crash_left_half_written_is_not_taken_for_a_piece(tmp_path: Path) -> None:
    gathered = Gathered.open(tmp_path / "joining", SHAPE, SIGNER)
    give(gathered, tree_of(PAYLOAD), PAYLOAD, 0, 1)
    gathered.write(1, memoryview(PAYLOAD)[:1000])  # over its beginning
    gathered.close()
    (tmp_path / "joining" / "tree-9").write_bytes(b"cut")
    again = Gathered.open(tmp_path / "joining", SHAPE, SIGNER)
    assert (again.missing(), len(again.trees)) == ([1, 2, 3], 1)
    assert not (tmp_path / "joining" / "tree-9").exists()
    again.close()


def test_trees_of_another_swarm_are_void(tmp_path: Path) -> None:
    gathered = Gathered.open(tmp_path / "joining", SHAPE, SIGNER)
    give(gathered, tree_of(PAYLOAD), PAYLOAD, 0)
    gathered.close()
    again = Gathered.open(tmp_path / "joining", SHAPE, Signer("cd" * 32, b"m" * 32))
    assert (again.trees, again.num_bytes) == ({}, 0)
    again.close()


def test_a_lying_donor_takes_its_pieces_along(tmp_path: Path) -> None:
    gathered = Gathered.open(tmp_path / "joining", SHAPE, SIGNER)
    one, other = tree_of(PAYLOAD), tree_of(OTHER)
    give(gathered, one, PAYLOAD, 0, 1)
    give(gathered, other, OTHER, 2, 3)
    gathered.discard(one)
    assert (gathered.missing(), gathered.sources()) == ([0, 1], [other])
    assert gathered.num_bytes == PIECE_BYTES + 400
    gathered.close()


def test_what_is_set_aside_comes_back_unless_it_was_overwritten(tmp_path: Path) -> None:
    gathered = Gathered.open(tmp_path / "joining", SHAPE, SIGNER)
    one, other = tree_of(PAYLOAD), tree_of(OTHER)
    give(gathered, one, PAYLOAD, 0, 1, 2)
    gathered.set_aside(one)
    assert (gathered.missing(), gathered.sources(), gathered.num_bytes) == ([3, 0, 1, 2], [], 0)
    give(gathered, other, OTHER, 1)
    gathered.write(2, memoryview(OTHER)[:100])  # and then it was cancelled
    gathered.tidy()
    gathered.bring_back()
    assert (gathered.missing(), gathered.sources()) == ([2, 3], [one, other])
    assert gathered.num_bytes == 2 * PIECE_BYTES
    gathered.close()
    again = Gathered.open(tmp_path / "joining", SHAPE, SIGNER)
    assert (again.missing(), again.sources()) == ([2, 3], [one, other])
    again.close()


def test_many_snapshots_of_others_do_not_take_the_place_of_what_is_set_aside(
    tmp_path: Path,
) -> None:
    gathered = Gathered.open(tmp_path / "joining", SHAPE, SIGNER)
    one = tree_of(PAYLOAD)
    give(gathered, one, PAYLOAD, 0)
    gathered.set_aside(one)
    for step in range(gathering.MAX_TREES):
        gathered.adopt(tree_of(OTHER, step))
    gathered.bring_back()
    assert gathered.sources() == [one]
    gathered.set_aside(one)
    gathered.discard(one)  # its donor lied
    gathered.bring_back()
    assert gathered.sources() == []
    gathered.close()


def test_the_number_of_trees_is_bounded(tmp_path: Path) -> None:
    gathered = Gathered.open(tmp_path / "joining", SHAPE, SIGNER)
    for step in range(gathering.MAX_TREES):
        give(gathered, tree_of(PAYLOAD, step), PAYLOAD, step % 2)
    in_use = list(gathered.trees.values())[2:]
    gathered.adopt(new := tree_of(PAYLOAD, 99), in_use)  # in the place of one without pieces
    assert len(gathered.trees) == gathering.MAX_TREES
    assert gathered.missing() == [2, 3]
    gathered.wrote(1, new)
    gathered.tidy()  # later trees took the pieces over
    assert len(gathered.trees) == 2
    gathered.close()


def test_a_tree_too_many_is_refused_while_all_are_in_use(tmp_path: Path) -> None:
    gathered = Gathered.open(tmp_path / "joining", SHAPE, SIGNER)
    for step in range(gathering.MAX_TREES):
        gathered.adopt(tree_of(PAYLOAD, step))
    with pytest.raises(PeerError, match=Reason.BUSY):
        gathered.adopt(tree_of(PAYLOAD, 99), list(gathered.trees.values()))
    assert len(gathered.trees) == gathering.MAX_TREES
    gathered.close()


def test_a_disk_without_room_is_named_before_anything_is_fetched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**9, 10**9, 1000))
    with pytest.raises(LocalError, match=r"need .* MB in .*joining.*free space"):
        Gathered.open(tmp_path / "joining", SHAPE, SIGNER)


def test_equal_snapshots_of_two_donors_are_two(tmp_path: Path) -> None:
    """As before the first step. What one of them claims of it does not count for the other."""
    gathered = Gathered.open(tmp_path / "joining", SHAPE, SIGNER)
    one, other = tree_of(PAYLOAD), tree_of(PAYLOAD)
    assert one.root == other.root
    give(gathered, one, PAYLOAD, 0)
    give(gathered, other, PAYLOAD, 1)
    gathered.discard(one)
    assert (gathered.missing(), gathered.sources()) == ([0, 2, 3], [other])
    gathered.close()


def test_leaves_are_of_all_pieces() -> None:
    assert len(LEAVES) == 32 * SHAPE.num_pieces
