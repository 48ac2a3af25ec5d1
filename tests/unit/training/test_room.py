"""Arrays with a row for each document lie in files; results are those of arrays in memory."""

from __future__ import annotations

import errno
import mmap
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from xpeer.training.document import HexIds, firsts, in_hex
from xpeer.training.listing import Listing
from xpeer.training.room import Room
from xpeer.training.token_file import (
    BEGINS,
    CONTINUES,
    ENDS,
    OPEN,
    PASSAGE,
    SOURCE,
    TokenFileWriter,
    open_token_file,
)

LARGE = 1 << 18


def lies_in_a_file(array: Any) -> bool:
    while isinstance(array, np.ndarray):
        array = array.base
    return isinstance(array, mmap.mmap)


def test_large_arrays_lie_in_files_that_have_no_name(tmp_path: Path) -> None:
    room = Room(tmp_path)
    large, small = room.empty((LARGE, 2), ">u8"), room.empty(5, np.int64)
    assert (lies_in_a_file(large), lies_in_a_file(small)) == (True, False)
    assert not lies_in_a_file(Room().empty(LARGE, np.int64))
    assert not list(tmp_path.iterdir())
    values = np.arange(2 * LARGE, dtype=">u8").reshape(-1, 2)
    large[:] = values
    chosen = np.arange(LARGE)[::-1]
    taken = room.taken(large, chosen)
    assert lies_in_a_file(taken)
    assert np.array_equal(taken, values[::-1])
    assert taken.dtype == values.dtype
    assert len(room.taken(values[:0], np.empty(0, np.int64))) == 0


def test_on_a_full_disk_they_are_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    array = Room(tmp_path).empty(LARGE, np.int64)
    assert not lies_in_a_file(array)
    assert array.shape == (LARGE,)


@given(st.lists(st.tuples(st.integers(0, 3), st.sampled_from([0, 1, 2**63, 2**64 - 1]))))
def test_first_occurrences_also_where_halves_are_shared(pairs: list[tuple[int, int]]) -> None:
    ids = np.array(pairs, np.uint64).reshape(-1, 2)
    wanted = [n for n, pair in enumerate(pairs) if pair not in pairs[:n]]
    for order in (ids, ids.astype(">u8")):
        assert firsts(order).tolist() == wanted


def test_pieces_that_go_on_in_another_file_are_listed_once(tmp_path: Path) -> None:
    """As many documents as fill several blocks, in two files, read in another order."""
    count = 100_000
    files = []
    for number in range(2):
        writer = TokenFileWriter(tmp_path, "<u2")
        passages = np.zeros(count, PASSAGE)
        passages["tokens"] = 1 + np.arange(count) % 3
        passages["characters"] = 7
        passages["flags"] = BEGINS | ENDS
        passages["id"] = passages["whole"] = np.stack([np.arange(count), np.full(count, number)], 1)
        if number:
            passages["flags"][0] = CONTINUES | ENDS
        else:
            passages["flags"][-1] = BEGINS | OPEN
        writer.add(np.arange(int(passages["tokens"].sum())).astype("<u2"))
        sources = np.zeros(1, SOURCE)
        sources["passages"] = count
        files.append(open_token_file(writer.publish(passages, sources), verify=True))
    rows = np.arange(2 * count)
    table = Listing(files, Room(tmp_path)).table(rows, np.repeat([0, 1], count))
    assert len(table) == 2 * count - 1
    across = count - 1
    assert table.tokens[across] == 1 + (count - 1) % 3 + 1
    assert table.characters[across] == 14
    assert np.diff(table.passages)[across] == 2
    assert lies_in_a_file(table.id)
    chosen = np.array([across + 1, across, 0])
    few = table.select(chosen)
    assert few.tokens.tolist() == table.tokens[chosen].tolist()
    assert few.passages.tolist() == [0, 1, 3, 4]
    assert few.file.tolist() == [1, 0, 1, 0]
    assert few.begin.tolist() == [1, int(table.begin[across]), 0, 0]
    assert few.id.tolist() == table.id[chosen].tolist()


def test_a_file_of_tokens_takes_one_descriptor(tmp_path: Path) -> None:
    writer = TokenFileWriter(tmp_path, "<u2")
    writer.add(np.zeros(3, "<u2"))
    passages, sources = np.zeros(1, PASSAGE), np.zeros(1, SOURCE)
    passages["tokens"], sources["passages"] = 3, 1
    path = writer.publish(passages, sources)
    before = len(list(Path("/proc/self/fd").iterdir()))
    opened = [open_token_file(path, verify=False) for _ in range(5)]
    assert len(list(Path("/proc/self/fd").iterdir())) - before == len(opened)


def test_ids_are_written_when_they_are_asked_for() -> None:
    ids = np.random.default_rng(1).integers(0, 2**63, (70_000, 2)).astype(">u8")
    named, wanted = HexIds(ids), in_hex(ids)
    assert len(named) == len(wanted)
    assert list(named) == wanted
    assert (named[0], named[-1], named[5:7]) == (wanted[0], wanted[-1], wanted[5:7])
    assert wanted[3] in named
